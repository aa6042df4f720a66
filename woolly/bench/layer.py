"""Where one layer's time goes, at prefill and at decode: the program's own stages, so nothing is measured apart.

A stage is what lies between two barriers: a matmul, the attention, or operations that run token by token, fused. Shares
of the layer sum to 100 %; a second table says what part the layers are of a whole step.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from woolly.bench.harness import Bench, Row, median
from woolly.bench.limits import Limits, bound, matmul_limit
from woolly.bench.steps import StepTimes, timed_step
from woolly.bench.subjects import Subject, opened
from woolly.formats import FLOATS

COLUMNS = [
    ("model", "model", ""),
    ("phase", "phase", ""),
    ("part", "part", ""),
    ("does", "what it is", ""),
    ("seconds", ">µs", "us"),
    ("of_whole", ">of the whole", ".1%"),
    ("gops", ">Gop/s", ",.1f"),
    ("gb_per_s", ">GB/s", ",.1f"),
    ("limit", "limit", ""),
    ("share", ">share of limit", ".0%"),
]

WORDS = {
    "attn_norm": "RMSNorm, quantise",
    "attn_qkv": "matmul of queries, keys, values",
    "attn_q_bias": "biases, RoPE, cache write",
    "attn_q_norm": "RMSNorms, RoPE, cache write",
    "attn_rope": "RoPE, cache write",
    "attn_heads": "attention",
    "attn_heads.q16": "quantise",
    "attn_residual": "output matmul, added",
    "attn_out": "output matmul",
    "attn_output_bias": "bias, norm, quantise",
    "post_attention_norm": "RMSNorms, quantise",
    "ffn_norm": "RMSNorm, quantise",
    "ffn_gate_up": "matmul of gate and up",
    "ffn_up": "matmul of up",
    "ffn_gate_bias": "biases, gated activation, quantise",
    "ffn_up_bias": "bias, activation, quantise",
    "ffn_glu": "gated activation, quantise",
    "ffn_residual": "down matmul, added",
    "ffn_out": "down matmul",
    "ffn_down_bias": "bias, norm, quantise",
    "post_ffw_norm": "RMSNorms, quantise",
}


def run(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of each stage of a layer, and of the step, for a prompt and for one token."""
    bench.progress.start("layer", 3)
    bench.progress.step("opening the model")
    limits = Limits(repeat=bench.repeat)
    n_ctx = args.depth + args.prompt_tokens + 1
    with opened(args, n_threads=bench.n_threads, n_ctx=n_ctx) as subject:
        for phase, n_tokens in (("prefill", args.prompt_tokens), ("decode", 1)):
            bench.progress.step(phase)
            depth = args.depth if phase == "prefill" else args.depth + args.prompt_tokens
            repeat = bench.repeat if phase == "prefill" else 5 * bench.repeat
            steps = timed_step(subject, n_tokens=n_tokens, depth=depth, repeat=repeat)
            common = {"mode": "layer", "model": subject.name, "phase": phase, "n_threads": bench.n_threads}
            common |= {"isa": subject.model.isa, "n_tokens": n_tokens, "depth": depth}
            for row in _layer_rows(bench, limits, subject, steps, n_tokens, depth):
                yield {**common, "table": "one layer", **row}
            for row in _step_rows(bench, limits, subject, steps, n_tokens):
                yield {**common, "table": "one step", **row}


def _layer_rows(
    bench: Bench, limits: Limits, subject: Subject, steps: list[StepTimes], n_tokens: int, depth: int
) -> Iterator[Row]:
    """Each stage's median over steps and layers, scaled so that they sum to the median layer."""
    layers = [layer for step in steps for number, layer in step.by_layer().items() if number or step_has_one(step)]
    medians = {name: median([layer[name] for layer in layers if name in layer]) for name in layers[0]}
    whole = sum(medians.values())
    last = subject.model.config.n_layers - 1
    for name, seconds in medians.items():
        row: Row = {"part": name, "does": WORDS.get(name), "seconds": seconds, "of_whole": seconds / whole}
        if name == "attn_heads":
            row |= _attention_shares(bench, limits, subject, seconds, n_tokens, depth)
        elif subject.stage_matrices(f"blk.{last}.{name}"):
            row |= _matmul_shares(bench, limits, subject, f"blk.{last}.{name}", seconds, n_tokens)
        yield row
    yield {"part": "layer", "does": f"the sum, ×{last + 1} in a step", "seconds": whole, "of_whole": 1.0}


def step_has_one(step: StepTimes) -> bool:
    """Whether there is only a first layer, whose norm runs with the embedding: then it must do."""
    return len(step.by_layer()) == 1


def _step_rows(bench: Bench, limits: Limits, subject: Subject, steps: list[StepTimes], n_tokens: int) -> Iterator[Row]:
    """Layers, embedding, head, and what is outside the program."""
    step = sorted(steps, key=lambda step: step.total_s)[len(steps) // 2]
    head = {name: seconds for name, seconds in step.stages.items() if name == "logits"}
    others = sum(step.stages.values()) - step.layers_s - sum(head.values())
    parts = {
        "layers": (f"{subject.model.config.n_layers} layers", step.layers_s),
        "embedding, norms": ("outside the layers", others),
        "head": ("matmul of the last token's logits", sum(head.values())),
        "outside": ("Python, entering the region", step.total_s - sum(step.stages.values())),
    }
    for part, (does, seconds) in parts.items():
        row: Row = {"part": part, "does": does, "seconds": seconds, "of_whole": seconds / step.total_s}
        yield row | (_matmul_shares(bench, limits, subject, "logits", seconds, 1) if part == "head" else {})
    row = {"part": "step", "does": "the median step", "seconds": step.total_s, "of_whole": 1.0}
    if n_tokens == 1:
        row |= _step_shares(bench, limits, subject, step)
    yield row | {"tokens_per_s": n_tokens / step.total_s}


def _step_shares(bench: Bench, limits: Limits, subject: Subject, step: StepTimes) -> Row:
    """A decode step reads every weight once."""
    n_bytes = subject.read_bytes()
    return bound(
        limits,
        kind=None,
        ops=2.0 * sum(m.n_rows * m.n_cols for m in subject.matrices.values()),
        n_bytes=n_bytes,
        working_set=n_bytes,
        seconds=step.total_s,
        n_threads=bench.n_threads,
    )


def _matmul_shares(bench: Bench, limits: Limits, subject: Subject, stage: str, seconds: float, n_tokens: int) -> Row:
    """Weights come from wherever the whole model's weights fit, as others are read in between."""
    matrices = subject.stage_matrices(stage)
    is_float = all(matrix.format in FLOATS for matrix in matrices)
    kind, reachable = matmul_limit(is_float=is_float, n_tokens=n_tokens, compute=subject.model.compute)
    return bound(
        limits,
        kind=kind,
        ops=2.0 * n_tokens * sum(m.n_rows * m.n_cols for m in matrices),
        n_bytes=sum(m.nbytes for m in matrices),
        working_set=subject.read_bytes(),
        seconds=seconds,
        n_threads=bench.n_threads,
        reachable=reachable,
    )


def _attention_shares(bench: Bench, limits: Limits, subject: Subject, seconds: float, n_tokens: int, depth: int) -> Row:
    """Keys and values in f16; a window is not counted, so its layers seem faster than they are only beyond it."""
    c = subject.model.config
    n_keys = n_tokens * depth + n_tokens * (n_tokens + 1) // 2
    cache_bytes = 2 * (depth + n_tokens) * c.n_kv_heads * c.head_dim * 2
    return bound(
        limits,
        kind="fma_f32",
        ops=4.0 * c.n_heads * c.head_dim * n_keys,
        n_bytes=cache_bytes,
        working_set=subject.read_bytes() if n_tokens == 1 else cache_bytes,
        seconds=seconds,
        n_threads=bench.n_threads,
    )
