"""How true a model's numbers are: perplexity, divergence from the float64 oracle, greedy agreement.

    python bench/quality.py MODEL... [--text FILE] [--windows N]
    python bench/quality.py --each-format MODEL...

For each model (a path or a cached name):

- the perplexity of the whole text in windows of 512 tokens, the second half of each scored, as llama.cpp's tool does
- over the first N windows, against the float64 oracle of tests/reference.py on the same weights: the mean and largest
  KL divergence of its next-token distributions from the engine's, and how often the most likely token is the same
- the greedy tokens of a list of prompts where the oracle prefers another by a gap of 0.05 or more

With --each-format the model is quantised to each format that has a kernel (from F32, dequantised where the file is
quantised; rows that the format's blocks do not divide fall back as in `woolly quantize --pure`), and a table says how
far the engine is from the oracle on those weights.

The oracle takes 8 bytes a weight and about a second for 100 tokens of a small model. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import woolly
from woolly import hub
from woolly._kernels import COMPUTES, QUANTIZED_FORMATS
from woolly.base_logits import rows_of_a_piece
from woolly.errors import WoollyError
from woolly.gguf_file import GGUFFile
from woolly.measuring import ModelDistributions, Quality, as_read, cut_windows, log_softmax
from woolly.measuring import measure as measure_windows
from woolly.quantizing import plan_quantization, quantize_file
from woolly.terminal import escape_controls

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import reference
from reference import ReferenceModel

WINDOW = 512
TEXT = "/usr/share/common-licenses/GPL-3"
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "In 1969, Neil Armstrong became the first person to",
    "Water boils at a temperature of",
    "The three primary colours are",
)


class OracleDistributions:
    """The oracle's: a `woolly.measuring.Distributions`."""

    least = -np.inf

    def __init__(self, oracle: ReferenceModel, model: woolly.Model, windows: np.ndarray) -> None:
        self.n_vocab = model.config.vocab_size
        self._oracle = oracle
        self._windows = as_read(model.tokenizer, windows)

    def log_probs(self, window: int) -> Iterator[np.ndarray]:
        """As `Distributions`."""
        logits = self._oracle.forward(self._windows[window].tolist())[WINDOW // 2 : -1]
        step = rows_of_a_piece(self.n_vocab)
        return (log_softmax(logits[first : first + step]) for first in range(0, len(logits), step))


def measure_text(
    model: woolly.Model, windows: np.ndarray, progress: Progress, what: str, base: OracleDistributions | None = None
) -> Quality:
    """The engine on windows of a text, beside the oracle where that is given."""
    task = progress.add_task(f"{model.name}: {what}", total=len(windows))
    found = ModelDistributions(model, windows)
    return measure_windows(found, windows, base=base, on_window=lambda _: progress.advance(task))


def measure_divergence(
    model: woolly.Model, oracle: ReferenceModel, windows: np.ndarray, progress: Progress
) -> dict[str, Any]:
    """The oracle's distributions against the engine's, and its own perplexity, over the scored half of windows."""
    quality = measure_text(model, windows, progress, "divergence", OracleDistributions(oracle, model, windows))
    return {
        "windows": len(windows),
        "kl_mean": float(quality.divergences.mean()),
        "kl_max": float(quality.divergences.max()),
        "top1_agreement": float(quality.same_top.mean()),
        "perplexity": quality.perplexity,
        "oracle_perplexity": float(np.exp(quality.base_losses.mean())),
    }


def measure_greedy(model: woolly.Model, oracle: ReferenceModel, n_tokens: int, progress: Progress) -> dict[str, Any]:
    """Where the oracle would have chosen another token than the engine did, near ties (a gap below 0.05) left out."""
    disagreements, total, near_ties = [], 0, 0
    for prompt in progress.track(PROMPTS, description=f"{model.name}: greedy"):
        ids = model.tokenizer.encode(prompt)
        chosen = model.generate(ids, max_tokens=n_tokens, temperature=0).tokens
        if not chosen:
            continue
        logits = oracle.forward(ids + chosen)[len(ids) - 1 : -1]
        rows = reference.greedy_disagreements(logits, chosen)
        disagreements += [{"prompt": prompt, "token": row} for row in rows]
        near_ties += int((logits.argmax(axis=-1) != chosen).sum()) - len(rows)
        total += len(chosen)
    return {"tokens": total, "near_ties": near_ties, "disagreements": disagreements}


def measure(name: str, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Everything about one model."""
    path = hub.resolve(name)
    how = {
        "n_threads": options.threads,
        "cache_dtype": options.cache_dtype,
        "compute": options.compute,
        "name": Path(name).stem,
    }
    with woolly.load_gguf(path, **how) as model:
        text = Path(options.text).read_text()
        windows = cut_windows(model.tokenizer, text, WINDOW)
        result: dict[str, Any] = {"model": model.name, "isa": model.isa, "threads": model.n_threads}
        result["tokens"] = len(model.tokenizer.encode(text))
        result["perplexity"] = measure_text(model, windows, progress, "perplexity").perplexity
        if options.windows or options.greedy:
            oracle = ReferenceModel.from_gguf(path)
            if options.windows:
                result["oracle"] = measure_divergence(model, oracle, windows[: options.windows], progress)
            if options.greedy:
                result["greedy"] = measure_greedy(model, oracle, options.greedy, progress)
    return result


def measure_formats(name: str, options: argparse.Namespace, progress: Progress) -> Iterator[dict[str, Any]]:
    """The engine against the oracle for each format, on one model's weights in it."""
    with tempfile.TemporaryDirectory() as folder:
        base, path = Path(folder) / "base.gguf", Path(folder) / "quantised.gguf"
        with GGUFFile.open(hub.resolve(name)) as file:
            quantize_file(file, base, plan_quantization(file, "f32", allow_requantize=True))
        for format in progress.track(QUANTIZED_FORMATS, description=f"{Path(name).stem}: each format"):
            with GGUFFile.open(base) as file:
                plan = plan_quantization(file, format, pure=True)
                quantize_file(file, path, plan, n_threads=options.threads)
            n_weights: Counter[str] = Counter()
            for tensor in plan.tensors:
                n_weights[tensor.format.name] += math.prod(tensor.source.shape)
            how = {
                "n_threads": options.threads,
                "cache_dtype": options.cache_dtype,
                "compute": options.compute,
                "name": format,
            }
            with woolly.load_gguf(path, **how) as model:
                windows = cut_windows(model.tokenizer, Path(options.text).read_text(), WINDOW, options.windows)
                found = measure_divergence(model, ReferenceModel.from_gguf(path), windows, progress)
                shares = {name: n / plan.n_weights for name, n in n_weights.most_common()}
                yield {"model": Path(name).stem, "format": format, "isa": model.isa, "weights": shares, **found}


def show_formats(results: list[dict[str, Any]], console: Console) -> None:
    """One row a format."""
    table = Table("Model", "Format", "Weights in it", "Mean KL", "Largest", "Same first", "Perplexity", "Oracle's")
    for found in results:
        numbers = (f"{found['weights'][found['format']]:.0%}", f"{found['kl_mean']:.1e}", f"{found['kl_max']:.1e}")
        numbers += (f"{found['top1_agreement']:.1%}", f"{found['perplexity']:.3f}", f"{found['oracle_perplexity']:.3f}")
        table.add_row(found["model"], found["format"], *numbers)
    console.print(table)


def show(result: dict[str, Any], console: Console) -> None:
    """A few lines to read."""
    console.print(f"{result['model']}: perplexity {result['perplexity']:.4f} over {result['tokens'] // WINDOW} windows")
    if oracle := result.get("oracle"):
        console.print(
            f"  against float64 over {oracle['windows']} windows: KL {oracle['kl_mean']:.2e} (at most "
            f"{oracle['kl_max']:.2e}), the same first token {oracle['top1_agreement']:.2%}, perplexity "
            f"{oracle['perplexity']:.4f} and {oracle['oracle_perplexity']:.4f}"
        )
    if greedy := result.get("greedy"):
        console.print(
            f"  greedy: {len(greedy['disagreements'])} disagreements and {greedy['near_ties']} near ties "
            f"in {greedy['tokens']} tokens"
        )


def main() -> None:
    """Measure each model and print what came out."""
    parser = argparse.ArgumentParser(description="perplexity, divergence from the float64 oracle, greedy agreement")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a path or a cached name")
    parser.add_argument("--text", default=TEXT, help="what is read (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=3, help="of these the oracle judges (default: %(default)s)")
    parser.add_argument("--greedy", type=int, default=32, help="tokens after each prompt (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: a thread a core")
    parser.add_argument("--cache-dtype", choices=("f16", "f32"), default="f16")
    parser.add_argument("--compute", choices=COMPUTES, default="exact", help="default: %(default)s")
    parser.add_argument("--each-format", action="store_true", help="quantise the model to each format, and compare")
    options = parser.parse_args()
    if not Path(options.text).is_file():
        parser.error(f"the text {options.text} is not there: choose another with --text")
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)  # a file has no width to fit into
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results = []
    try:
        for name in options.models:
            hub.resolve(name)  # what is not there is told before the first is measured
        with Progress(*columns, console=console, transient=True) as progress:
            for name in options.models:
                if options.each_format:
                    results += measure_formats(name, options, progress)
                else:
                    results.append(measure(name, options, progress))
                    show(results[-1], progress.console)
    except (OSError, WoollyError) as error:
        parser.exit(1, f"{parser.prog}: error: {escape_controls(str(error))}\n")
    if options.each_format:
        show_formats(results, console)
    print(json.dumps({"text": options.text, "window": WINDOW, "results": results}))


if __name__ == "__main__":
    main()
