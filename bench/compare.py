"""The same work on other engines, where they are installed: python bench/compare.py --model smollm2 [--threads N] …

GGUF models against llama.cpp (the package xllamacpp): a prompt of random tokens, then tokens one by one; loading is
excluded on both sides, as is a first run that warms up. FP32 matmuls against numpy and PyTorch. Engines take turns,
A B A B, so that what else the machine does falls on all of them; figures are medians, and the last line is one JSON
object. Not part of the package.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Turn = Callable[[], dict[str, float]]  # does the work once and returns its rates


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

    path = Path(hub.resolve(model))
    engines: dict[str, Turn] = {"woolly": woolly_turn(path, args, n_threads)}
    try:
        engines["llama.cpp"] = llama_cpp_turn(path, args, n_threads)
    except ImportError:
        missing.append("xllamacpp")
    rates = take_turns(engines, args.repeat)
    return show(path.stem, rates, {"pp": f"pp{args.prompt_tokens}", "tg": f"tg{args.gen_tokens}"}, "tokens/s")


def woolly_turn(path: Path, args: argparse.Namespace, n_threads: int) -> Turn:
    """Woolly's engine, without sampling: tokens are given."""
    import woolly
    from woolly.bench.steps import token_ids

    model = woolly.load_gguf(path, n_ctx=args.prompt_tokens + args.gen_tokens + 8, n_threads=n_threads)
    prompt = token_ids(args.prompt_tokens, model.config.vocab_size)
    following = token_ids(args.gen_tokens, model.config.vocab_size, seed=1)
    sequence = model.engine.new_sequence()

    def turn() -> dict[str, float]:
        sequence.rewind(0)
        started = time.perf_counter()
        model.engine.step([(sequence, prompt)])
        prefilled = time.perf_counter()
        for k in range(len(following)):
            model.engine.step([(sequence, following[k : k + 1])])
        done = time.perf_counter()
        return {"pp": len(prompt) / (prefilled - started), "tg": len(following) / (done - prefilled)}

    return turn


def llama_cpp_turn(path: Path, args: argparse.Namespace, n_threads: int) -> Turn:
    """llama.cpp's server within this process, by its own timings; greedy, and the end of the text is not heeded."""
    import xllamacpp

    from woolly.bench.steps import token_ids
    from woolly.gguf_file import GGUFFile

    with GGUFFile.open(path) as file:
        vocab_size = len(file.metadata.get_array("tokenizer.ggml.tokens", "string"))
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = args.prompt_tokens + args.gen_tokens + 64
    params.n_parallel = 1
    params.n_batch = params.n_ubatch = max(512, args.prompt_tokens)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    params.n_gpu_layers = 0
    params.verbosity = -1
    server = xllamacpp.Server(params)
    request = {
        "prompt": token_ids(args.prompt_tokens, vocab_size).tolist(),
        "n_predict": args.gen_tokens + 1,  # the first comes with the prompt's logits
        "temperature": 0,
        "top_k": 1,
        "ignore_eos": True,
        "cache_prompt": False,
    }

    def turn() -> dict[str, float]:
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        timings = answer["timings"]
        if timings["prompt_n"] < args.prompt_tokens:
            raise RuntimeError(f"llama.cpp computed {timings['prompt_n']} tokens of {args.prompt_tokens}")
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


def take_turns(engines: dict[str, Turn], repeat: int) -> dict[str, list[dict[str, float]]]:
    """Rates of each engine: one turn each to warm up, then A B A B."""
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for turn in engines.values():
        turn()
    for _ in range(repeat):
        for name, turn in engines.items():
            rates[name].append(turn())
    return rates


def show(title: str, rates: dict[str, list[dict[str, float]]], tests: dict[str, str], unit: str) -> dict[str, Any]:
    """Print medians and Woolly's ratio to each, and return them with the samples."""
    table: dict[str, Any] = {}
    print(title)
    for test, label in tests.items():
        medians = {name: statistics.median(turn[test] for turn in turns) for name, turns in rates.items()}
        for name, value in medians.items():
            ratio = medians["woolly"] / value
            text = "" if name == "woolly" else f"   woolly is × {ratio:.2f}"
            print(f"  {label:8} {name:10} {value:10,.1f} {unit}{text}")
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
