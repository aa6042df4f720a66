"""A whole model: prompts (pp) and generation (tg) as llama-bench has them, first tokens, sustained rate, memory.

Rows of pp and tg carry llama-bench's fields. Tokens are random and none is sampled; time to first token includes
sampling it. With only some layers measured, rows are projections and say so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

from woolly.bench import machine
from woolly.bench.harness import Bench, Row, median, spread
from woolly.bench.limits import Limits, bound, matmul_limit
from woolly.bench.steps import PROJECTION_RULE, projected_s, timed_step, token_ids
from woolly.bench.subjects import Subject, opened
from woolly.errors import WoollyError

SUSTAINED_PROMPT = 16
ENDS = 10  # tokens at the beginning and at the end of sustained generation

COLUMNS = [
    ("model", "model", ""),
    ("n_params", ">params", ",d"),
    ("n_threads", ">threads", "d"),
    ("test", "test", ""),
    ("avg_ts", ">tokens/s", ",.1f"),
    ("stddev_ts", ">±", ",.1f"),
    ("ttft_s", ">first token ms", "ms"),
    ("first_ts", ">first 10", ",.1f"),
    ("last_ts", ">last 10", ",.1f"),
    ("limit", "limit", ""),
    ("share", ">share", ".0%"),
    ("memory_bytes", ">peak memory GB", "GB"),
    ("projected", "", ""),
]


def run(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of every test."""
    sustained = args.sustained + SUSTAINED_PROMPT if args.sustained else 0
    n_ctx = max(max(args.depth) + max([*args.prompt_tokens, *args.gen_tokens]), *args.prompts, sustained) + 1
    prompts = [n for n in args.prompt_tokens if n]
    lengths = [n for n in args.gen_tokens if n]
    n_rates = len(args.depth) * (len(prompts) + len(lengths) * len(args.sequences))
    bench.progress.start("model", n_rates + len(args.prompts) + 2)
    bench.progress.step("opening the model")
    limits = Limits(repeat=bench.repeat)
    with opened(args, n_threads=bench.n_threads, n_ctx=n_ctx) as subject:
        if args.measure_layers is not None and args.measure_layers > subject.all_layers:
            raise WoollyError(f"--measure-layers: {args.measure_layers} of {subject.all_layers} layers are asked for")
        common = _common(bench, subject)
        for depth in args.depth:
            for n in prompts:
                bench.progress.step(f"pp{n} @ d{depth}")
                yield common | _prefill_row(bench, limits, subject, n, depth)
            for n in lengths:
                for n_sequences in args.sequences:
                    bench.progress.step(f"tg{n} @ d{depth}, {n_sequences} sequence(s)")
                    yield common | _decode_row(bench, limits, subject, n, depth, n_sequences)
        if not subject.is_partial:
            for n in args.prompts:
                bench.progress.step(f"first token after {n}")
                yield common | _first_token_row(bench, subject, n)
            if args.sustained:
                bench.progress.step(f"{args.sustained} tokens in a row")
                yield common | _sustained_row(subject, args.sustained)
        yield common | {"test": "peak memory", "memory_bytes": machine.peak_memory_bytes()}


def _common(bench: Bench, subject: Subject) -> Row:
    """llama-bench's fields that all rows share, and ours: a projection is marked on every row it touches."""
    row: Row = {
        "mode": "model",
        "model": subject.name,
        "n_params": subject.n_params,
        "model_size": sum(matrix.nbytes for matrix in subject.matrices.values()),
        "n_threads": bench.n_threads,
        "isa": subject.model.isa,
        "compute": subject.model.compute,
        "load_s": subject.model.load_s,
        "type_k": subject.model.engine.cache_dtype,
        "projected": None,
    }
    if subject.is_partial:
        row["projected"] = f"projected from {subject.model.config.n_layers} of {subject.all_layers} layers"
        row["rule"] = PROJECTION_RULE
    return row


def _prefill_row(bench: Bench, limits: Limits, subject: Subject, n: int, depth: int) -> Row:
    steps = timed_step(subject, n_tokens=n, depth=depth, repeat=bench.repeat)
    c = subject.model.config
    samples = [projected_s(step, c.n_layers, subject.all_layers) for step in steps]
    row = _rates("pp", n, depth, samples)
    skipped = ("token_embd.weight", "output.weight")
    ops = 2.0 * n * sum(m.n_rows * m.n_cols for name, m in subject.matrices.items() if name not in skipped)
    kind, reachable = matmul_limit(is_float=_is_float(subject), n_tokens=n, compute=subject.model.compute)
    n_bytes = subject.read_bytes()
    return row | bound(
        limits,
        kind=kind,
        ops=ops,
        n_bytes=n_bytes,
        working_set=n_bytes,
        seconds=median(samples),
        n_threads=bench.n_threads,
        reachable=reachable,
    )


def _decode_row(bench: Bench, limits: Limits, subject: Subject, n: int, depth: int, n_sequences: int) -> Row:
    """Each sample is n steps of one token for each sequence, from the same depth; rates count all sequences."""
    if subject.is_partial:
        c = subject.model.config
        steps = timed_step(subject, n_tokens=1, depth=depth, repeat=n)
        samples = [n * projected_s(step, c.n_layers, subject.all_layers) for step in steps]
    else:
        samples = _generate(bench, subject, n, depth, n_sequences)
    row = _rates("tg", n, depth, samples, n_sequences)
    c = subject.model.config
    # keys and values of every sequence, f16
    cache_bytes = 4 * n_sequences * subject.all_layers * c.n_kv_heads * c.head_dim * (depth + n // 2)
    n_bytes = subject.read_bytes() + cache_bytes
    return row | bound(
        limits,
        kind=None,
        ops=2.0 * n_sequences * sum(m.n_rows * m.n_cols for m in subject.matrices.values()),
        n_bytes=n_bytes,
        working_set=n_bytes,
        seconds=median(samples) / n,
        n_threads=bench.n_threads,
    )


def _generate(bench: Bench, subject: Subject, n: int, depth: int, n_sequences: int) -> list[float]:
    engine, vocab_size = subject.model.engine, subject.model.config.vocab_size
    sequences = [engine.new_sequence() for _ in range(n_sequences)]
    if depth:
        for sequence in sequences:
            engine.step([(sequence, token_ids(depth, vocab_size))])
    ids = [token_ids(n, vocab_size, seed=2 + i) for i in range(n_sequences)]
    samples = []
    for _ in range(bench.repeat + 1):
        for sequence in sequences:
            sequence.rewind(depth)
        started = time.perf_counter()
        for k in range(n):
            engine.step([(sequence, own[k : k + 1]) for sequence, own in zip(sequences, ids, strict=True)])
        samples.append(time.perf_counter() - started)
    return samples[1:]


def _rates(test: str, n: int, depth: int, seconds: list[float], n_sequences: int = 1) -> Row:
    """llama-bench's fields of one test."""
    rates = [n * n_sequences / sample for sample in seconds]
    return {
        "test": f"{test}{n}" + (f" × {n_sequences}" if n_sequences > 1 else "") + (f" @ d{depth}" if depth else ""),
        "n_sequences": n_sequences,
        "n_prompt": n if test == "pp" else 0,
        "n_gen": n if test == "tg" else 0,
        "n_depth": depth,
        "avg_ts": sum(rates) / len(rates),
        "stddev_ts": spread(rates),
        "median_ts": median(rates),
        "samples_ts": rates,
        "samples": len(rates),
        "avg_ns": round(1e9 * sum(seconds) / len(seconds)),
    }


def _first_token_row(bench: Bench, subject: Subject, n: int) -> Row:
    """From the request to its first token, in a session of its own."""
    ids = token_ids(n, subject.model.config.vocab_size, seed=n).tolist()
    samples = [subject.model.generate(ids, max_tokens=1, temperature=0).timing.ttft_s for _ in range(bench.repeat + 1)]
    return {"test": f"prompt {n}", "n_prompt": n, "ttft_s": median(samples[1:]), "samples_s": samples[1:]}


def _sustained_row(subject: Subject, n: int) -> Row:
    """Generation with sampling, token by token; the first ten tokens after the prompt against the last ten."""
    times = _token_times(subject, n)
    ends = min(ENDS, max(1, len(times) // 2))
    return {
        "test": f"sustained {n}",
        "n_gen": n,
        "avg_ts": len(times) / sum(times),
        "first_ts": ends / sum(times[:ends]),
        "last_ts": ends / sum(times[-ends:]),
        "samples_s": times,
    }


def _token_times(subject: Subject, n: int) -> list[float]:
    """Seconds of each of n tokens after a short prompt, whatever they are: the end of the answer is not heeded."""
    from woolly.sampling import Sampler, SamplingParams

    session, sampler = subject.model.session(), Sampler(SamplingParams(seed=0))
    ids = token_ids(SUSTAINED_PROMPT, subject.model.config.vocab_size).tolist()
    feed: Callable[..., object] = session.feed
    logits, times = feed(ids), []
    for _ in range(n):
        started = time.perf_counter()
        token = sampler.sample(logits, ids)
        ids.append(token)
        logits = feed([token])
        times.append(time.perf_counter() - started)
    return times


def _is_float(subject: Subject) -> bool:
    return all(m.format in ("f32", "f16", "bf16") for name, m in subject.matrices.items() if name.startswith("blk."))
