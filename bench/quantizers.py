"""What `woolly quantize` loses, beside ggml's own quantisers on the same weights: python bench/quantizers.py MODEL ...

The model's matrices are made F32 first, and that is what both are measured against, with the same mix of formats: the
KL divergence of the next-token distributions, and the perplexity, over the second half of each window of 512 tokens.
ggml's quantisers are those in xllamacpp, called without an importance matrix; where that is not installed only
Woolly's are measured. The last line is one JSON object.

Weights that the file has quantised lie on a grid once dequantised, which one quantiser may hit and another miss, and no
weights as they were trained do: normal noise of `--dither` times the root mean square of 32 weights, about the error
that 4 bits have left already, takes them off it.

A ratio below 1 means that Woolly's file is nearer to the F32 model. Its standard error is that over the windows of
the text; other noise draws other errors of the weights, which moves it more: `--seeds N` measures N draws, and ends
with the means over them. Where most rows of a model are no whole number of 256-blocks, as SmolLM2's, a mix is mostly
fallbacks: `--alone` quantises the matrices that take the type's own format, and leaves the others F32.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quality import TEXT, WINDOW
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import woolly
from woolly import hub, quantizing
from woolly._kernels import quantize_rows
from woolly.errors import WoollyError
from woolly.formats import FLOATS, FORMATS
from woolly.gguf_file import GGUFFile
from woolly.measuring import Distributions, ModelDistributions, cut_windows, measure
from woolly.mixes import resolve_mix
from woolly.quantizing import TensorPlan, plan_quantization, quantize_file

TYPES = "q2_k,q3_k_s,q3_k_m,q4_k_s,q4_k_m,q5_k_m,q6_k,iq4_nl,iq4_xs"
Rows = Callable[..., NDArray[np.uint8]]


def ggml_quantizer(n_threads: int) -> Rows | None:
    """ggml's quantisers with the signature of ours, or None."""
    try:
        from xllamacpp import xllamacpp

        library = ctypes.CDLL(xllamacpp.__file__)
        library.quantize_q4_K  # noqa: B018 - some builds do not export them
    except (ImportError, AttributeError):
        return None

    def rows(x: NDArray[np.float32], name: str, **options: Any) -> NDArray[np.uint8]:
        if name in FLOATS:
            return quantize_rows(x, name)
        function = getattr(library, "quantize_" + name.replace("_k", "_K"))
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
        x = np.ascontiguousarray(x)
        out = np.empty((len(x), FORMATS[name].nbytes(x.shape[1])), np.uint8)
        parts = np.linspace(0, len(x), 33).astype(int)

        def fill(first: int, last: int) -> None:
            function(x[first:].ctypes.data, out[first:].ctypes.data, last - first, x.shape[1], None)

        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(fill, parts[:-1], parts[1:]))
        return out

    return rows


def remembering(rows: Rows, folder: Path) -> Rows:
    """The same quantiser, which keeps its results in a folder: types share formats."""
    folder.mkdir()

    def remembered(x: NDArray[np.float32], name: str, *, searched: bool, **options: Any) -> NDArray[np.uint8]:
        path = folder / f"{name}-{searched}-{hashlib.sha1(x, usedforsecurity=False).hexdigest()}.npy"
        if not path.exists():
            np.save(path, rows(x, name, searched=searched))
        return np.load(path)

    return remembered


def dithering(amount: float, seed: int) -> Rows:
    """F32 rows with noise; see the module's docstring."""

    def rows(x: NDArray[np.float32], name: str, **options: Any) -> NDArray[np.uint8]:
        groups = x.reshape(-1, 32)
        digest = hashlib.sha1(x, usedforsecurity=False).digest()
        rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
        noise = rng.standard_normal(groups.shape, np.float32) * np.sqrt((groups**2).mean(axis=1, keepdims=True))
        return quantize_rows((groups + np.float32(amount) * noise).reshape(x.shape), name)

    return rows


class Kept:
    """The distributions of a model that is closed again, in float32: a `woolly.measuring.Distributions`."""

    least = -np.inf

    def __init__(self, source: Distributions, windows: NDArray[np.int32], progress: Progress) -> None:
        self.n_vocab = source.n_vocab
        self._windows = [
            [piece.astype(np.float32) for piece in source.log_probs(i)]
            for i in progress.track(range(len(windows)), description="F32 reads")
        ]

    def log_probs(self, window: int) -> Iterator[NDArray[Any]]:
        """As `Distributions`."""
        return iter(self._windows[window])


class Judge:
    """The F32 model's distributions over some windows of a text, and how far another file's are from them."""

    def __init__(self, base: Path, text: str, n_windows: int, progress: Progress) -> None:
        self.base = base
        self._progress = progress
        with woolly.load_gguf(base, n_ctx=WINDOW) as model:
            self._windows = cut_windows(model.tokenizer, text, WINDOW, n_windows)
            self._exact = Kept(ModelDistributions(model, self._windows), self._windows, progress)
        self.perplexity = measure(self._exact, self._windows).perplexity

    def measure(self, type: str, *, alone: bool, who: str, rows: Rows) -> dict[str, Any]:
        """Quantise the base model with one quantiser, and compare: the figures of each window, and their means."""
        path = self.base.with_name("quantised.gguf")
        quantizing.quantize_rows = rows
        with GGUFFile.open(self.base) as file:
            plan = plan_quantization(file, type, pure=alone)
            if alone:
                plan = replace(plan, tensors=tuple(_own_or_kept(tensor, plan.mix.base) for tensor in plan.tensors))
            task = self._progress.add_task(f"{type}: {who} quantises", total=plan.bytes_before)
            quantize_file(file, path, plan, on_progress=lambda _, n: self._progress.advance(task, n))
            self._progress.remove_task(task)
        with woolly.load_gguf(path, n_ctx=WINDOW) as model:
            task = self._progress.add_task(f"{type} of {who}: reads", total=len(self._windows))
            found = ModelDistributions(model, self._windows)
            advance = partial(self._progress.advance, task)
            quality = measure(found, self._windows, base=self._exact, on_window=lambda _: advance())
            self._progress.remove_task(task)
        return {
            "bits": plan.bits_per_weight,
            "share": sum(tensor.n_bytes for tensor in plan.tensors if tensor.format.name == plan.mix.base)
            / plan.bytes_after,
            "kl": float(quality.divergences.mean()),
            "perplexity": quality.perplexity,
            "divergences": quality.divergences.reshape(len(self._windows), -1).mean(axis=1).tolist(),
            "losses": quality.losses.reshape(len(self._windows), -1).mean(axis=1).tolist(),
        }


def ratios_of(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Ours by theirs, of divergence and perplexity, with the standard errors of both by resampling the windows."""
    n = len(ours["losses"])
    drawn = np.random.default_rng(0).integers(0, n, (2000, n))
    of_kl = [np.array(who["divergences"])[drawn].mean(axis=1) for who in (ours, theirs)]
    of_loss = np.array(ours["losses"])[drawn].mean(axis=1) - np.array(theirs["losses"])[drawn].mean(axis=1)
    return {
        "kl_ratio": ours["kl"] / theirs["kl"],
        "kl_ratio_error": float((of_kl[0] / of_kl[1]).std()),
        "perplexity_ratio": ours["perplexity"] / theirs["perplexity"],
        "perplexity_ratio_error": float(np.exp(of_loss).std()),
    }


def _own_or_kept(tensor: TensorPlan, own: str) -> TensorPlan:
    return tensor if tensor.format.name == own else TensorPlan(tensor.source, tensor.source.format)


def measure_model(
    name: str, seed: int, options: argparse.Namespace, text: str, progress: Progress
) -> list[dict[str, Any]]:
    """All types of one model with the noise of a seed."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        quantizers = {"woolly": quantize_rows, "ggml": ggml_quantizer(options.threads)}
        quantizers = {who: remembering(rows, Path(folder) / who) for who, rows in quantizers.items() if rows}
        base = Path(folder) / "base.gguf"
        quantizing.quantize_rows = dithering(options.dither, seed)
        with GGUFFile.open(hub.resolve(name)) as file:
            quantize_file(file, base, plan_quantization(file, "f32", allow_requantize=True))
        judge = Judge(base, text, options.windows, progress)
        progress.console.print(f"{Path(name).stem}, seed {seed}: perplexity in F32 {judge.perplexity:.4f}")
        for type in options.types.split(","):
            both = {
                who: judge.measure(type, alone=options.alone, who=who, rows=rows) for who, rows in quantizers.items()
            }
            ratios = ratios_of(both["woolly"], both["ggml"]) if "ggml" in both else {}
            about = {"model": Path(name).stem, "seed": seed, "type": type, "alone": options.alone}
            results.append({**about, **both, **ratios})
            progress.console.print(_line(type, both, ratios))
    return results


def _line(type: str, both: dict[str, dict[str, Any]], ratios: dict[str, float]) -> str:
    ours = both["woolly"]
    words = [f"{who} KL {found['kl']:.5f}, perplexity {found['perplexity']:.4f}" for who, found in both.items()]
    if ratios:
        words.append("ratios {:.3f} ± {:.3f} and {:.4f} ± {:.4f}".format(*ratios.values()))
    return f"{type:7} {ours['bits']:.3f} bits, {ours['share']:.0%} of the bytes its own: {'; '.join(words)}"


def _means(results: list[dict[str, Any]]) -> Iterator[str]:
    """Each type's ratios over all seeds, with the standard error that their spread gives."""
    for model, type in dict.fromkeys((result["model"], result["type"]) for result in results):
        ratios = [
            (result["kl_ratio"], result["perplexity_ratio"])
            for result in results
            if (result["model"], result["type"]) == (model, type) and "kl_ratio" in result
        ]
        if len(ratios) > 1:
            means, errors = np.mean(ratios, axis=0), np.std(ratios, axis=0, ddof=1) / np.sqrt(len(ratios))
            kl, perplexity = (f"{mean:.3f} ± {error:.3f}" for mean, error in zip(means, errors, strict=True))
            yield f"{model} {type:7} over {len(ratios)} seeds: KL {kl}, perplexity {perplexity}"


def main() -> None:
    """Measure each model and print what came out."""
    parser = argparse.ArgumentParser(description="what quantising loses, beside ggml's quantisers")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a path or a cached name")
    parser.add_argument("--types", default=TYPES, help="default: %(default)s")
    parser.add_argument("--alone", action="store_true", help="only what takes the type's own format, the rest in F32")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens (default: %(default)s)")
    parser.add_argument("--text", default=TEXT, help="what is read (default: %(default)s)")
    parser.add_argument("--dither", type=float, default=0.08, help="noise added to the weights (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="draws of the noise (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of ggml's quantisers (default: %(default)s)")
    options = parser.parse_args()
    if not Path(options.text).is_file():
        parser.error(f"the text {options.text} is not there: choose another with --text")
    try:
        _measure_all(options)
    except (WoollyError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")


def _measure_all(options: argparse.Namespace) -> None:
    text = Path(options.text).read_text()
    for type in options.types.split(","):
        resolve_mix(type)
    for name in options.models:
        hub.resolve(name)  # what is not there is told before the first is measured
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, width=160), transient=True) as progress:
        runs = itertools.product(options.models, range(options.seeds))
        results = [result for name, seed in runs for result in measure_model(name, seed, options, text, progress)]
        for line in _means(results):
            progress.console.print(line)
    print(json.dumps({"text": options.text, "windows": options.windows, "dither": options.dither, "results": results}))


if __name__ == "__main__":
    main()
