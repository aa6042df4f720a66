"""From logits to the next token.

A sampler is a chain of small closures, built once per request from `SamplingParams` in llama.cpp's default order:
repetition penalty, top-k, top-p, min-p, temperature, draw. It knows nothing of models or text. Randomness is numpy's
Philox with the request's own seed, so a draw depends on nothing that other requests do.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from woolly.errors import WoollyError

# Groups of logits whose maxima bound the k-th largest logit from below. Measured on 262,144 logits with k = 40:
# 512 to 8,192 groups are equally fast, ten times faster than argpartition over the whole array.
_N_GROUPS = 2048


@dataclass(frozen=True)
class Candidates:
    """The tokens still in the running.

    Attributes
    ----------
    ids : int64, (n,), token ids
    logits : float32, (n,), their logits
    is_sorted : bool
        Whether they run from the largest logit to the smallest, equal ones by ascending id.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    is_sorted: bool


Filter = Callable[[Candidates], Candidates]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token.

    Attributes
    ----------
    temperature : float
        Divides the logits before the draw; 0 takes the most likely token, the lowest id where several are equal.
    top_k : int
        Keep the k most likely tokens; 0 keeps all.
    top_p : float
        Keep the fewest tokens, most likely first, whose probabilities reach this sum; 1 keeps all.
    min_p : float
        Keep the tokens at least this likely relative to the most likely one; 0 keeps all.
    repeat_penalty : float
        Positive logits of recent tokens are divided by it, negative ones multiplied; 1 is off.
    repeat_last_n : int
        How many of the latest tokens, the prompt's included, count as recent; 0 is off, -1 means all.
    seed : int or None
        Of the random numbers, below 2**64; None takes one from the operating system.

    Raises
    ------
    TypeError, ValueError
        A field has the wrong type or lies out of its range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_float("temperature", self.temperature, "finite and at least 0", lambda v: v >= 0)
        _check_int("top_k", self.top_k, "at least 0 (0 is off)", lambda v: v >= 0)
        _check_float("top_p", self.top_p, "between 0 and 1 (1 is off)", lambda v: 0 <= v <= 1)
        _check_float("min_p", self.min_p, "between 0 and 1 (0 is off)", lambda v: 0 <= v <= 1)
        _check_float("repeat_penalty", self.repeat_penalty, "finite and above 0 (1 is off)", lambda v: v > 0)
        _check_int("repeat_last_n", self.repeat_last_n, "at least -1 (-1 is all, 0 is off)", lambda v: v >= -1)
        if self.seed is not None:
            _check_int("seed", self.seed, "between 0 and 2**64 - 1", lambda v: 0 <= v < 2**64)


class Sampler:
    """Draws the tokens of one request.

    Parameters
    ----------
    params : SamplingParams

    Attributes
    ----------
    seed : int
        The seed in use, so that a run without one can be repeated.

    Notes
    -----
    The random generator is state: use one sampler per request, from one thread at a time.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = params.seed if params.seed is not None else int(np.random.SeedSequence().generate_state(1)[0])
        self._filters = make_filters(params)
        self._rng = np.random.Generator(np.random.Philox(self.seed))

    def sample(self, logits: NDArray[np.float32], history: Sequence[int] = ()) -> int:
        """Choose the next token.

        Parameters
        ----------
        logits : float32, (vocab_size,)
            Left unchanged. -inf rules a token out.
        history : sequence of int
            The tokens so far, oldest first; only the repetition penalty reads it.

        Raises
        ------
        WoollyError
            A logit is NaN or +inf, or all are -inf.
        ValueError
            The logits are not a one-dimensional float32 array, or the history has an id beyond them.
        """
        best = _check_logits(logits)
        params = self.params
        if params.repeat_penalty != 1.0 and params.repeat_last_n != 0:
            logits = penalise_repeats(logits, history, params.repeat_penalty, params.repeat_last_n)
            best = int(logits.argmax())
        if params.temperature == 0:
            return best
        candidates = Candidates(_token_ids(len(logits)), logits, is_sorted=False)
        for keep in self._filters:
            candidates = keep(candidates)
        return draw(candidates, params.temperature, self._rng)


def make_filters(params: SamplingParams) -> list[Filter]:
    """The closures that narrow the candidates, in order; those switched off are left out."""
    filters: list[Filter] = []
    if params.top_k > 0:
        filters.append(lambda candidates: keep_top_k(candidates, params.top_k))
    if params.top_p < 1:
        filters.append(lambda candidates: keep_top_p(candidates, params.top_p))
    if params.min_p > 0:
        filters.append(lambda candidates: keep_min_p(candidates, params.min_p))
    return filters


def penalise_repeats(
    logits: NDArray[np.float32], history: Sequence[int], penalty: float, last_n: int
) -> NDArray[np.float32]:
    """A copy of the logits with the recent tokens made less likely: l / penalty where l > 0, else l × penalty."""
    recent = history[-last_n:] if last_n > 0 else history
    if len(recent) == 0:
        return logits
    ids = np.unique(np.asarray(recent, dtype=np.int64))
    if ids[0] < 0 or ids[-1] >= len(logits):
        raise ValueError(f"history has token {ids[0] if ids[0] < 0 else ids[-1]}, the vocabulary ends at {len(logits)}")
    penalised = logits.copy()
    chosen = logits[ids].astype(np.float64)
    with np.errstate(over="ignore"):
        chosen = np.where(chosen > 0, chosen / penalty, chosen * penalty)
        # An extreme penalty must not turn a finite logit into an infinite one.
        finite = np.isfinite(logits[ids])
        chosen[finite] = np.clip(chosen[finite], np.finfo(np.float32).min, np.finfo(np.float32).max)
    penalised[ids] = chosen
    return penalised


def keep_top_k(candidates: Candidates, k: int) -> Candidates:
    """The k largest, sorted; ties go to the lower id whatever the machine's sort does."""
    logits = candidates.logits
    if k < len(logits):
        at_least = np.flatnonzero(logits >= _lower_bound_of_kth(logits, k))
        candidates = Candidates(candidates.ids[at_least], logits[at_least], is_sorted=False)
    ranked = _sorted(candidates)
    return Candidates(ranked.ids[:k], ranked.logits[:k], is_sorted=True)


def keep_top_p(candidates: Candidates, p: float) -> Candidates:
    """The fewest tokens, most likely first, whose probabilities sum to at least p; always one."""
    total = np.exp(_relative(candidates.logits)).sum()
    n = len(candidates.ids)
    # Sorting a whole vocabulary takes tens of milliseconds, and the head of the distribution nearly always suffices.
    n_head = n if candidates.is_sorted else min(n, 256)
    while True:
        head = candidates if candidates.is_sorted else keep_top_k(candidates, n_head)
        reached = np.cumsum(np.exp(_relative(head.logits))) >= p * total
        if reached.any() or n_head == n:
            break
        n_head = min(n, 16 * n_head)
    n_kept = int(np.argmax(reached)) + 1 if reached.any() else n
    return Candidates(head.ids[:n_kept], head.logits[:n_kept], is_sorted=True)


def keep_min_p(candidates: Candidates, p: float) -> Candidates:
    """The tokens with probability ≥ p × the largest one's, which is logit ≥ max + ln p; always one."""
    logits = candidates.logits
    kept = logits >= float(logits.max()) + math.log(p)
    return Candidates(candidates.ids[kept], logits[kept], candidates.is_sorted)


def draw(candidates: Candidates, temperature: float, rng: np.random.Generator) -> int:
    """One id, with probability ∝ exp(logit / temperature), by inverting the cumulative sum (float64)."""
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to -inf, which is right
        cumulative = np.cumsum(np.exp(_relative(candidates.logits) / temperature))
    i = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    # Rounding can carry the product up to the sum itself: stay at the last token that has a probability.
    last = np.searchsorted(cumulative, cumulative[-1], side="left")
    return int(candidates.ids[min(i, last)])


@functools.lru_cache(maxsize=4)
def _token_ids(vocab_size: int) -> NDArray[np.int64]:
    ids = np.arange(vocab_size)
    ids.flags.writeable = False  # shared by all samplers
    return ids


def _relative(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """logits - max in float64, so that exp neither overflows nor loses the small ones."""
    return logits.astype(np.float64) - float(logits.max())


def _sorted(candidates: Candidates) -> Candidates:
    if candidates.is_sorted:
        return candidates
    order = np.argsort(-candidates.logits, kind="stable")  # stable: ids ascend, so equal logits keep that order
    return Candidates(candidates.ids[order], candidates.logits[order], is_sorted=True)


def _lower_bound_of_kth(logits: NDArray[np.float32], k: int) -> np.float32:
    """A value that at least k logits reach, and few more: the k-th largest of the maxima of groups."""
    n_rows = len(logits) // _N_GROUPS
    if n_rows > 1 and k < _N_GROUPS:
        # A group is a column, every _N_GROUPS-th logit, so that the maxima are taken row by row with full vectors.
        logits = logits[: n_rows * _N_GROUPS].reshape(n_rows, _N_GROUPS).max(axis=0)
    return np.partition(logits, len(logits) - k)[len(logits) - k]


def _check_logits(logits: NDArray[np.float32]) -> int:
    """Refuse what no token can be drawn from; the largest logit's id, the lowest of equal ones."""
    if not isinstance(logits, np.ndarray) or logits.dtype != np.float32 or logits.ndim != 1 or len(logits) == 0:
        got = f"{logits.dtype} {logits.shape}" if isinstance(logits, np.ndarray) else type(logits).__name__
        raise ValueError(f"logits must be a float32 array of shape (vocab_size,), got {got}")
    best = int(logits.argmax())  # the first NaN if there is one: one pass tells all three
    largest = logits[best]
    if math.isfinite(largest):
        return best
    if np.isnan(largest):
        raise WoollyError(f"logits hold NaN (first at token {int(np.argmax(np.isnan(logits)))})")
    if largest > 0:
        raise WoollyError(f"logits hold +inf (first at token {int(np.argmax(logits))})")
    raise WoollyError("all logits are -inf: no token can be chosen")


def _check_float(name: str, value: float, expected: str, is_valid: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or not is_valid(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _check_int(name: str, value: int, expected: str, is_valid: Callable[[int], bool]) -> None:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not is_valid(number):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
