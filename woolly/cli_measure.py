"""`woolly perplexity` and `woolly compare`: how good a model is on a text, and how far from another one."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from woolly import hub
from woolly.errors import WoollyError
from woolly.terminal import print_facts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from woolly.measuring import Distributions, Quality
    from woolly.model import Model


def perplexity(args: argparse.Namespace) -> int:
    """Measure one model, beside a base where one is named."""
    from woolly.atomic import check_target
    from woolly.measuring import ModelDistributions, cut_windows, measure

    text, base = _checked_text(args), args.kl_base and hub.resolve(args.kl_base)
    if args.save_base is not None:
        check_target(Path(args.save_base), force=args.force)
    with _loaded(args.model, args) as model:
        windows = cut_windows(model.tokenizer, text, args.ctx, args.chunks)
        began = time.perf_counter()
        with (
            _opened_base(base, args, text, windows, model) as of_base,
            _keeping(args, windows, model) as keep,
            _progress(len(windows), "Perplexity") as advance,
        ):
            found = ModelDistributions(model, windows)
            quality = measure(found, windows, base=of_base, on_rows=keep, on_window=advance)
        names = {"model": args.model or model.name} | ({"base": args.kl_base} if base else {})
        _show(quality, names, windows, time.perf_counter() - began, args)
    return 0


def compare(args: argparse.Namespace) -> int:
    """Measure two models side by side, the first as the base."""
    from woolly.measuring import ModelDistributions, cut_windows, measure

    text = _checked_text(args)
    with _loaded(args.a, args) as a, _loaded(args.b, args) as b:
        windows = cut_windows(b.tokenizer, text, args.ctx, args.chunks)
        _check_same_tokens(args.a, a, args.b, windows, text, b)
        began = time.perf_counter()
        with _progress(len(windows), "Comparing") as advance:
            of_a, of_b = (ModelDistributions(model, windows) for model in (a, b))
            quality = measure(of_b, windows, base=of_a, on_window=advance)
        _show(quality, {"model": args.b, "base": args.a}, windows, time.perf_counter() - began, args)
    return 0


# --- what is read ---


def _checked_text(args: argparse.Namespace) -> str:
    from woolly.measuring import MIN_CTX

    if args.ctx < MIN_CTX:
        args.parser.error(f"--ctx must be at least {MIN_CTX}, got {args.ctx}")
    raw = Path(args.text).read_bytes()
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise WoollyError(f"{args.text}: expected text in UTF-8, byte {error.start} is none") from None


@contextlib.contextmanager
def _loaded(name: str | None, args: argparse.Namespace) -> Iterator[Model]:
    import woolly

    with contextlib.closing(woolly.load(name, n_ctx=args.ctx, n_threads=args.threads, compute=args.compute)) as model:
        yield model


@contextlib.contextmanager
def _opened_base(
    path: Path | None, args: argparse.Namespace, text: str, windows: NDArray[np.int32], model: Model
) -> Iterator[Distributions | None]:
    """The base's distributions: of a file of them, or of another model."""
    from woolly.base_logits import BaseLogits, check_fits, is_base_logits
    from woolly.measuring import ModelDistributions

    if path is None:
        yield None
    elif is_base_logits(path):
        with BaseLogits(path) as base:
            check_fits(path, base, windows, model.config.vocab_size)
            yield base
    else:
        with _loaded(args.kl_base, args) as other:
            _check_same_tokens(args.kl_base, other, model.name, windows, text, model)
            yield ModelDistributions(other, windows)


def _check_same_tokens(name: str, base: Model, other: str, windows: NDArray[np.int32], text: str, model: Model) -> None:
    """Distributions can be compared only where both models read the same tokens."""
    from woolly.measuring import cut_windows

    sizes = base.config.vocab_size, model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise WoollyError(f"{name} has {sizes[0]} tokens and {other} {sizes[1]}: their distributions do not compare")
    theirs = cut_windows(base.tokenizer, text, windows.shape[1], len(windows))
    if theirs.shape != windows.shape or (theirs != windows).any():
        raise WoollyError(f"{name} and {other} cut the text into different tokens: their distributions do not compare")


# --- what is written ---


@contextlib.contextmanager
def _keeping(
    args: argparse.Namespace, windows: NDArray[np.int32], model: Model
) -> Iterator[Callable[[NDArray[np.float64]], object]]:
    """Yields what takes the rows of distributions: nothing, or a file that has its name when all are there."""
    from woolly.atomic import check_target, replacing, reserve
    from woolly.base_logits import n_bytes_of, write_header, write_rows

    if args.save_base is None:
        yield lambda log_probs: None
        return
    target, n_vocab = Path(args.save_base), model.config.vocab_size
    with replacing(target) as temporary, temporary.open("wb") as out:
        reserve(out.fileno(), target, n_bytes_of(windows.shape[1], n_vocab, len(windows)))
        write_header(out, windows, n_vocab)
        yield lambda log_probs: write_rows(out, log_probs)
        check_target(target, force=args.force)


@contextlib.contextmanager
def _progress(n_windows: int, title: str) -> Iterator[Callable[[float], object]]:
    """A bar on stderr, where that is a terminal, with the perplexity so far."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    so_far = TextColumn("{task.fields[so_far]}")
    with Progress(*columns, so_far, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=n_windows, so_far="")
        yield lambda value: progress.update(task, advance=1, so_far=f"{value:.3f}")


def _show(
    quality: Quality, names: dict[str, str], windows: NDArray[np.int32], seconds: float, args: argparse.Namespace
) -> None:
    sizes = {"text": args.text, "ctx": windows.shape[1], "chunks": len(windows)}
    found: dict[str, Any] = quality.summary()
    if args.json:
        print(json.dumps(names | sizes | found | {"seconds": round(seconds, 3)}))
        return
    facts = [
        ("Model", names["model"]),
        ("Text", f"{args.text}: {len(windows)} windows of {windows.shape[1]} tokens, {found['tokens']} scored"),
        ("Perplexity", f"{found['perplexity']:.4f} ± {found['perplexity_error']:.4f}"),
    ]
    if "base" in names:
        facts += [
            ("Base", names["base"]),
            ("Its perplexity", f"{found['base_perplexity']:.4f}"),
            ("Ratio", f"{found['perplexity_ratio']:.5f} ± {found['perplexity_ratio_error']:.5f}"),
            ("KL divergence", f"{found['kl_mean']:.6g} ± {found['kl_mean_error']:.2g} in the mean"),
            ("", f"median {found['kl_median']:.6g}, 99 % {found['kl_p99']:.6g}, 99.9 % {found['kl_p99.9']:.6g}"),
            ("", f"largest {found['kl_max']:.6g}"),
            ("Same top token", f"{found['same_top']:.3%} ± {found['same_top_error']:.3%}"),
        ]
    print_facts([*facts, ("Time", f"{seconds:.1f} s")])
