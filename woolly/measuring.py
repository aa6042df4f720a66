"""How good a model's next-token distributions are: perplexity, and how far they are from another model's.

The conventions are those of llama.cpp's perplexity tool. A text is cut into windows of n_ctx tokens, what is left over
is dropped, and BOS takes the first place of each window where the model adds one. The first half of a window is context
only; every position p of the second half but the last is scored by the token that follows, at p + 1.

    perplexity = exp(mean of -log q(token))        KL(p || q) = sum over the vocabulary of p (log p - log q)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from woolly.base_logits import n_scored, rows_of_a_piece
from woolly.errors import WoollyError
from woolly.model import Model
from woolly.tokenizer import Tokenizer

MIN_CTX = 4


class Distributions(Protocol):
    """Next-token distributions over the windows of a text: a model's, or a file of them (`woolly.base_logits`)."""

    n_vocab: int
    least: float  # logarithms at or below it stand for a probability of 0

    def log_probs(self, window: int) -> Iterator[NDArray[np.float64]]:
        """Their logarithms at the scored positions of a window: pieces of float64, (n, n_vocab), the same for all."""
        ...


class ModelDistributions:
    """A model's distributions.

    Parameters
    ----------
    model : Model
    windows : int32, (n_windows, n_ctx)
    """

    least = -np.inf

    def __init__(self, model: Model, windows: NDArray[np.int32]) -> None:
        self.n_vocab = model.config.vocab_size
        self._engine = model.engine
        self._windows = as_read(model.tokenizer, windows)

    def log_probs(self, window: int) -> Iterator[NDArray[np.float64]]:
        """As `Distributions`; logits are computed for the scored positions alone."""
        tokens = self._windows[window]
        half, step = len(tokens) // 2, rows_of_a_piece(self.n_vocab)
        sequence = self._engine.new_sequence()
        self._engine.step([(sequence, tokens[:half])])
        for first in range(half, len(tokens) - 1, step):
            part = tokens[first : min(first + step, len(tokens) - 1)]
            yield log_softmax(self._engine.step([(sequence, part)], logits="all")[0])


@dataclass(frozen=True)
class Quality:
    """What was measured, position by position. Those that take a base are None without one.

    Attributes
    ----------
    losses : float64, (n,)
        -log q of the tokens that came.
    base_losses : float64, (n,), optional
    divergences : float64, (n,), optional
        KL(base || model).
    same_top : bool, (n,), optional
        Whether both find the same token the likeliest.
    """

    losses: NDArray[np.float64]
    base_losses: NDArray[np.float64] | None = None
    divergences: NDArray[np.float64] | None = None
    same_top: NDArray[np.bool_] | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return float(np.exp(self.losses.mean()))

    def summary(self) -> dict[str, float]:
        """Means with their standard errors (as if positions were independent), and quantiles, by name."""
        found = {"tokens": len(self.losses), "perplexity": self.perplexity}
        found["perplexity_error"] = self.perplexity * _error(self.losses)
        if self.base_losses is None or self.divergences is None or self.same_top is None:
            return found
        ratio = float(np.exp((self.losses - self.base_losses).mean()))
        median, p99, p999 = np.quantile(self.divergences, (0.5, 0.99, 0.999)).tolist()
        return found | {
            "base_perplexity": float(np.exp(self.base_losses.mean())),
            "perplexity_ratio": ratio,
            "perplexity_ratio_error": ratio * _error(self.losses - self.base_losses),
            "kl_mean": float(self.divergences.mean()),
            "kl_mean_error": _error(self.divergences),
            "kl_median": median,
            "kl_p99": p99,
            "kl_p99.9": p999,
            "kl_max": float(self.divergences.max()),
            "same_top": float(self.same_top.mean()),
            "same_top_error": _error(self.same_top),
        }


def cut_windows(tokenizer: Tokenizer, text: str, n_ctx: int, n_windows: int | None = None) -> NDArray[np.int32]:
    """The tokens of a text in windows: int32, (n_windows, n_ctx).

    Parameters
    ----------
    tokenizer : Tokenizer
    text : str
    n_ctx : int
        Tokens of a window, at least 4.
    n_windows : int, optional
        At most; all if None.

    Raises
    ------
    WoollyError
        The text is shorter than a window.
    """
    if n_ctx < MIN_CTX:
        raise ValueError(f"cut_windows: n_ctx must be at least {MIN_CTX}, got {n_ctx}")
    tokens = np.array(tokenizer.encode(text), np.int32)
    n = len(tokens) // n_ctx
    if n == 0:
        raise WoollyError(f"the text has {len(tokens)} tokens, and one window takes {n_ctx}: a longer text is needed")
    n = n if n_windows is None else min(n, n_windows)
    return tokens[: n * n_ctx].reshape(n, n_ctx)


def as_read(tokenizer: Tokenizer, windows: NDArray[np.int32]) -> NDArray[np.int32]:
    """Windows as a model reads them: with BOS in the first place where it adds one."""
    windows = windows.copy()
    if tokenizer.add_bos:
        windows[:, 0] = tokenizer.bos_id
    return windows


def measure(
    found: Distributions,
    windows: NDArray[np.int32],
    /,
    *,
    base: Distributions | None = None,
    on_rows: Callable[[NDArray[np.float64]], object] = lambda log_probs: None,
    on_window: Callable[[float], object] = lambda perplexity: None,
) -> Quality:
    """Measure distributions, and how far they are from a base.

    Parameters
    ----------
    found : Distributions
    windows : int32, (n_windows, n_ctx)
        The text that they are of.
    base : Distributions, optional
        Of the same text and vocabulary.
    on_rows : callable
        Given the logarithms as they come, in order: float64, (n, n_vocab).
    on_window : callable
        Told the perplexity so far after each window.
    """
    n_rows = n_scored(windows.shape[1])
    least = -np.inf if base is None else base.least
    losses = np.empty(len(windows) * n_rows)
    compared = None if base is None else (losses.copy(), losses.copy(), np.empty(len(losses), bool))
    done = 0
    for i, window in enumerate(windows):
        targets = window[len(window) - n_rows :]
        pieces = itertools.repeat(None) if base is None else base.log_probs(i)
        for q, p in zip(found.log_probs(i), pieces, strict=False):
            rows, at = np.arange(len(q)), slice(done, done + len(q))
            following = targets[done - i * n_rows :][: len(q)]
            losses[at] = -q[rows, following]
            if compared is not None and p is not None:
                compared[0][at] = -p[rows, following]
                compared[1][at] = (np.where(p > least, np.exp(p), 0) * (p - q)).sum(axis=1)
                compared[2][at] = p.argmax(axis=1) == q.argmax(axis=1)
            on_rows(q)
            done += len(q)
        on_window(float(np.exp(losses[:done].mean())))
    return Quality(losses, *compared) if compared is not None else Quality(losses)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithms of probabilities: float64, (n, n_vocab)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _error(values: NDArray[Any]) -> float:
    """Standard error of the mean."""
    return float(values.std() / np.sqrt(max(1, len(values) - 1)))
