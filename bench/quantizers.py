"""What `woolly quantize` loses, beside ggml's own quantisers on the same weights: python bench/quantizers.py MODEL ...

The model's matrices are made F32 first (dequantised where the file has them quantised), and that is what both are
measured against, with the same mix of formats: the KL divergence of the next-token distributions, and the perplexity,
over the second half of each window of 512 tokens. ggml's quantisers are those in xllamacpp, called without an
importance matrix; where that is not installed only Woolly's are measured. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import woolly
from woolly import hub, quantizing
from woolly._kernels import quantize_rows
from woolly.formats import FORMATS
from woolly.gguf_file import GGUFFile
from woolly.quantizing import plan_quantization, quantize_file

WINDOW = 512
TEXT = "/usr/share/common-licenses/GPL-3"
TYPES = "q2_k,q3_k_s,q3_k_m,q4_k_s,q4_k_m,q5_k_m,q6_k,iq4_nl,iq4_xs"
Rows = Callable[..., NDArray[np.uint8]]


def ggml_quantizer() -> Rows | None:
    """ggml's quantisers with the signature of ours, or None."""
    try:
        from xllamacpp import xllamacpp

        library = ctypes.CDLL(xllamacpp.__file__)
        library.quantize_q4_K  # noqa: B018 - some builds do not export them
    except (ImportError, AttributeError):
        return None

    def rows(x: NDArray[np.float32], name: str, *, n_threads: int | None = None) -> NDArray[np.uint8]:
        if name in ("f32", "f16", "bf16"):
            return quantize_rows(x, name)
        function = getattr(
            library, f"quantize_{name.removesuffix('_k')}_K" if name.endswith("_k") else f"quantize_{name}"
        )
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
        out = np.empty((len(x), FORMATS[name].nbytes(x.shape[1])), np.uint8)
        function(np.ascontiguousarray(x).ctypes.data, out.ctypes.data, *x.shape, None)
        return out

    return rows


def distributions(path: Path, text: str, n_windows: int) -> tuple[list[NDArray[np.float32]], list[list[int]]]:
    """Logarithms of the next-token probabilities over each window's second half, and the tokens that came."""
    found, targets = [], []
    with woolly.load_gguf(path, n_ctx=WINDOW) as model:
        tokenizer = model.tokenizer
        tokens = tokenizer.encode(text)
        for i in range(min(n_windows, len(tokens) // WINDOW)):
            window = list(tokens[i * WINDOW : (i + 1) * WINDOW])
            targets.append(window[WINDOW // 2 + 1 :])
            if tokenizer.add_bos:
                window[0] = tokenizer.bos_id
            logits = model.forward(window)[WINDOW // 2 : -1]
            logits = logits - logits.max(axis=1, keepdims=True)
            found.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return found, targets


def perplexity(found: list[NDArray[np.float32]], targets: list[list[int]]) -> float:
    """Of the tokens that came."""
    losses = [-p[np.arange(len(t)), t].astype(np.float64) for p, t in zip(found, targets, strict=True)]
    return float(np.exp(np.mean(losses)))


def measure(base: Path, type: str, rows: Rows, text: str, exact: list[NDArray[np.float32]]) -> dict[str, float]:
    """Quantise the base model with one quantiser, and compare."""
    with tempfile.TemporaryDirectory(dir=base.parent) as folder:
        path = Path(folder) / "quantised.gguf"
        quantizing.quantize_rows = rows
        began = time.perf_counter()
        with GGUFFile.open(base) as file:
            plan = plan_quantization(file, type)
            quantize_file(file, path, plan)
        seconds = time.perf_counter() - began
        found, targets = distributions(path, text, len(exact))
    divergence = [(np.exp(p) * (p - q)).sum(axis=1) for p, q in zip(exact, found, strict=True)]
    return {
        "bits": plan.bits_per_weight,
        "kl": float(np.mean(divergence)),
        "perplexity": perplexity(found, targets),
        "seconds": seconds,
    }


def measure_model(name: str, options: argparse.Namespace, text: str) -> list[dict[str, Any]]:
    """All types of one model."""
    quantizers = {"woolly": quantize_rows, "ggml": ggml_quantizer()}
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.gguf"
        quantizing.quantize_rows = quantize_rows
        with GGUFFile.open(hub.resolve(name)) as file:
            quantize_file(file, base, plan_quantization(file, "f32", allow_requantize=True))
        exact, targets = distributions(base, text, options.windows)
        print(f"{Path(name).stem}: perplexity in F32 {perplexity(exact, targets):.4f}", flush=True)
        for type in options.types.split(","):
            both = {who: measure(base, type, rows, text, exact) for who, rows in quantizers.items() if rows}
            results.append({"model": Path(name).stem, "type": type, **both})
            words = [f"{who} KL {m['kl']:.5f}, perplexity {m['perplexity']:.4f}" for who, m in both.items()]
            print(f"{type:7} {both['woolly']['bits']:.3f} bits: {'; '.join(words)}", flush=True)
    return results


def main() -> None:
    """Measure each model and print what came out."""
    parser = argparse.ArgumentParser(description="what quantising loses, beside ggml's quantisers")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a path or a cached name")
    parser.add_argument("--types", default=TYPES, help="default: %(default)s")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens (default: %(default)s)")
    parser.add_argument("--text", default=TEXT, help="what is read (default: %(default)s)")
    options = parser.parse_args()
    text = Path(options.text).read_text()
    results = [result for name in options.models for result in measure_model(name, options, text)]
    print(json.dumps({"text": options.text, "windows": options.windows, "results": results}))


if __name__ == "__main__":
    main()
