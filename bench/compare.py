"""The same work on other engines, where they are installed: python bench/compare.py --model smollm2 [--threads N] …

GGUF models against llama.cpp (the package xllamacpp): a prompt of random tokens, then tokens one by one; loading is
excluded on both sides, as is a first run that warms up. FP32 matmuls against numpy and PyTorch. Engines take turns,
A B A B, so that what else the machine does falls on all of them; each that runs models has a process of its own, as an
OpenMP runtime has one way to wait, that of who loads it first. Figures are medians, and the last line is one JSON
object. Not part of the package.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Rates = dict[str, float]
Turn = Callable[[], Rates]  # does the work once and returns its rates


def main() -> int:
    """Compare what the arguments name, and print tables and one line of JSON."""
    args = _arguments()
    if args.threads is not None:  # before numpy and PyTorch are imported
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
            os.environ[name] = str(args.threads)
    from woolly import WoollyError
    from woolly._kernels import check_threads
    from woolly.bench import machine

    n_threads = check_threads(args.threads)
    result: dict[str, Any] = {"machine": machine.describe(n_threads), "models": {}, "matmuls": {}, "missing": []}
    try:
        for model in args.model:
            result["models"][model] = compare_model(model, args, n_threads, result["missing"])
        for shape in args.matmul:
            result["matmuls"]["x".join(map(str, shape))] = compare_matmul(shape, args, n_threads, result["missing"])
    except WoollyError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 1
    result["missing"] = sorted(set(result["missing"]))
    if result["missing"]:
        print(f"not installed: {', '.join(result['missing'])}\n")
    print(json.dumps(result, allow_nan=False))
    return 0


def compare_model(model: str, args: argparse.Namespace, n_threads: int, missing: list[str]) -> dict[str, Any]:
    """Prompt and generation rates of one GGUF file."""
    from woolly import hub
    from woolly.bench.steps import token_ids
    from woolly.gguf_file import GGUFFile

    path = Path(hub.resolve(model))
    with GGUFFile.open(path) as file:
        vocab_size = len(file.metadata.get_array("tokenizer.ggml.tokens", "string"))
    prompt = token_ids(args.prompt_tokens, vocab_size).tolist()
    following = token_ids(args.gen_tokens, vocab_size, seed=1).tolist()
    engines: dict[str, Turn] = {}
    for i, compute in enumerate(args.compute):
        name = "woolly" if i == 0 else f"woolly {compute}"
        engines[name] = in_own_process(woolly_turn, path, prompt, following, n_threads, compute)
    try:
        engines["llama.cpp"] = in_own_process(llama_cpp_turn, path, prompt, args.gen_tokens, n_threads)
    except ImportError:
        missing.append("xllamacpp")
    rates = take_turns(engines, args.repeat)
    return show(path.stem, rates, {"pp": f"pp{args.prompt_tokens}", "tg": f"tg{args.gen_tokens}"}, "tokens/s")


def in_own_process(engine: Callable[..., Turn], *given: object) -> Turn:
    """The turn that an engine makes of what it is given, there; raises what it raises."""
    from woolly import WoollyError

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, engine, given), daemon=True)
    process.start()
    theirs.close()

    def received() -> Rates:
        try:
            answer = ours.recv()
        except EOFError:
            process.join()
            raise WoollyError(f"{engine.__name__} with {given[0]}: its process died ({process.exitcode})") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def turn() -> Rates:
        ours.send("turn")
        return received()

    received()
    return turn


def _serve(pipe: Connection, engine: Callable[..., Turn], given: tuple[object, ...]) -> None:
    try:
        turn = engine(*given)
        pipe.send({})
        while pipe.recv():
            pipe.send(turn())
    except EOFError:  # who asks has ended
        pass
    except Exception as error:
        pipe.send(error)


def woolly_turn(path: Path, prompt: list[int], following: list[int], n_threads: int, compute: str) -> Turn:
    """Woolly's engine, without sampling: tokens are given."""
    import woolly

    n_ctx = len(prompt) + len(following) + 8
    model = woolly.load_gguf(path, n_ctx=n_ctx, n_threads=n_threads, compute=compute)
    sequence = model.engine.new_sequence()

    def turn() -> Rates:
        sequence.rewind(0)
        started = time.perf_counter()
        model.engine.step([(sequence, prompt)])
        prefilled = time.perf_counter()
        for k in range(len(following)):
            model.engine.step([(sequence, following[k : k + 1])])
        done = time.perf_counter()
        return {"pp": len(prompt) / (prefilled - started), "tg": len(following) / (done - prefilled)}

    return turn


def llama_cpp_turn(path: Path, prompt: list[int], n_gen: int, n_threads: int) -> Turn:
    """llama.cpp's server within this process, by its own timings; greedy, and the end of the text is not heeded."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = len(prompt) + n_gen + 64
    params.n_parallel = 1
    params.n_batch = params.n_ubatch = max(512, len(prompt))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    params.n_gpu_layers = 0
    params.verbosity = -1
    server = xllamacpp.Server(params)
    request = {
        "prompt": prompt,
        "n_predict": n_gen + 1,  # the first comes with the prompt's logits
        "temperature": 0,
        "top_k": 1,
        "ignore_eos": True,
        "cache_prompt": False,
    }

    def turn() -> Rates:
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        timings = answer["timings"]
        if timings["prompt_n"] < len(prompt):
            raise RuntimeError(f"llama.cpp computed {timings['prompt_n']} tokens of {len(prompt)}")
        return {"pp": timings["prompt_per_second"], "tg": timings["predicted_per_second"]}

    return turn


def compare_matmul(
    shape: tuple[int, int, int], args: argparse.Namespace, n_threads: int, missing: list[str]
) -> dict[str, Any]:
    """out = x w^T in FP32 for x (m, k), w (n, k)."""
    import numpy as np

    from woolly._kernels import PackedMatrix, matmul

    m, n, k = shape
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((m, k), dtype=np.float32), rng.standard_normal((n, k), dtype=np.float32)
    packed = PackedMatrix(n, k, "f32").pack(w.view(np.uint8), n_threads=n_threads)
    out = np.empty((m, n), dtype=np.float32)
    gflop = 2 * m * n * k / 1e9
    engines: dict[str, Turn] = {
        "woolly": lambda: {"matmul": gflop / _seconds(lambda: matmul(packed, x, out=out, n_threads=n_threads))},
        "numpy": lambda: {"matmul": gflop / _seconds(lambda: np.matmul(x, w.T, out=out))},
    }
    try:
        import torch

        torch.set_num_threads(n_threads)
        tx, tw = torch.from_numpy(x), torch.from_numpy(w)
        engines["torch"] = lambda: {"matmul": gflop / _seconds(lambda: torch.nn.functional.linear(tx, tw))}
    except ImportError:
        missing.append("torch")
    rates = take_turns(engines, args.repeat)
    return show(f"FP32, ({m}, {k}) by ({n}, {k})", rates, {"matmul": "matmul"}, "GFLOP/s")


def take_turns(engines: dict[str, Turn], repeat: int) -> dict[str, list[Rates]]:
    """Rates of each engine: one turn each to warm up, then A B A B."""
    rates: dict[str, list[Rates]] = {name: [] for name in engines}
    for turn in engines.values():
        turn()
    for _ in range(repeat):
        for name, turn in engines.items():
            rates[name].append(turn())
    return rates


def show(title: str, rates: dict[str, list[Rates]], tests: dict[str, str], unit: str) -> dict[str, Any]:
    """Print medians and Woolly's ratio to each, and return them with the samples."""
    table: dict[str, Any] = {}
    print(title)
    for test, label in tests.items():
        medians = {name: statistics.median(turn[test] for turn in turns) for name, turns in rates.items()}
        for name, value in medians.items():
            ratio = medians["woolly"] / value
            text = "" if name == "woolly" else f"   woolly is × {ratio:.2f}"
            print(f"  {label:8} {name:12} {value:10,.1f} {unit}{text}")
            samples = [turn[test] for turn in rates[name]]
            table.setdefault(label, {})[name] = {"median": value, "woolly_ratio": ratio, "samples": samples}
    print()
    return table


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--model", metavar="MODEL", action="append", default=[], help="a GGUF file or a name; repeatable"
    )
    text = "an FP32 matmul of (M, K) by (N, K); repeatable"
    parser.add_argument("--matmul", metavar="M,N,K", type=_shape, action="append", default=[], help=text)
    parser.add_argument("-p", "--prompt-tokens", metavar="N", type=_positive, default=256)
    parser.add_argument("-n", "--gen-tokens", metavar="N", type=_positive, default=32)
    parser.add_argument("--threads", metavar="N", type=_positive)
    text = "Woolly's ways to compute, NAME,NAME; default: exact"
    parser.add_argument("--compute", metavar="NAMES", type=lambda text: text.split(","), default=["exact"], help=text)
    parser.add_argument("--repeat", metavar="N", type=_positive, default=5)
    args = parser.parse_args()
    if not args.model and not args.matmul:
        parser.error("nothing to compare: give --model or --matmul")
    return args


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _shape(text: str) -> tuple[int, int, int]:
    parts = [_positive(part) for part in text.split(",")]
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"expected three sizes, M,N,K, got {text!r}")
    return parts[0], parts[1], parts[2]


if __name__ == "__main__":
    sys.exit(main())
