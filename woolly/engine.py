"""Prefill and decode over token ids, for many sequences at once. Knows nothing of text.

A step takes new tokens of any number of sequences, each with its own KV cache and position, and cuts them into batches
that fit the program. What comes out for a sequence does not depend on the others, nor on how it was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from woolly._kernels import KV_DTYPES, KVCache, Program, Stop
from woolly.config import ModelConfig
from woolly.errors import ContextFullError, NonFiniteError, WoollyError


class EngineSequence:
    """One sequence: its KV cache and how many positions of it are filled.

    Attributes
    ----------
    cache : KVCache
    n_past : int
        Positions in the cache, in tokens.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.n_past = 0

    def rewind(self, n: int, /) -> None:
        """Forget all but the first n positions.

        Raises
        ------
        ValueError
            The sequence has no n positions.
        """
        if not 0 <= n <= self.n_past:
            raise ValueError(f"rewind: cannot go to {n}, the sequence has {self.n_past} positions")
        self.n_past = n


@dataclass
class _Piece:
    """A run of one sequence's tokens within a batch, and which of them want logits."""

    item: int
    begin: int
    end: int


class Engine:
    """Runs a recorded program over sequences.

    Parameters
    ----------
    program : Program
    config : ModelConfig
    n_ctx : int
        Most positions a sequence may have.
    cache_dtype : {"f16", "f32"}
    wait_ready : callable, optional
        Called before each step; returns when the weights are there.

    Notes
    -----
    Safe to use from several threads: the program runs one step at a time and lets go of the GIL. A sequence belongs to
    one thread at a time.
    """

    def __init__(
        self,
        program: Program,
        config: ModelConfig,
        n_ctx: int,
        *,
        cache_dtype: str = "f16",
        wait_ready: Callable[[], None] | None = None,
    ) -> None:
        check_cache_dtype(cache_dtype)
        self.program = program
        self.config = config
        self.n_ctx = n_ctx
        self.cache_dtype = cache_dtype
        self._wait_ready = wait_ready

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of one sequence's cache, once it is full."""
        c = self.config
        return KVCache.bytes_for(c.n_layers, c.n_kv_heads, c.head_dim, self.n_ctx, dtype=self.cache_dtype)

    def new_sequence(self) -> EngineSequence:
        """An empty sequence."""
        c = self.config
        return EngineSequence(KVCache(c.n_layers, c.n_kv_heads, c.head_dim, self.n_ctx, dtype=self.cache_dtype))

    def step(
        self,
        items: Sequence[tuple[EngineSequence, Sequence[int] | NDArray[np.integer]]],
        *,
        logits: str = "last",
        chunk: int | None = None,
        capture: dict[str, NDArray[np.float32] | None] | None = None,
        stop: Stop | None = None,
    ) -> list[NDArray[np.float32]]:
        """Append tokens to sequences and compute logits.

        Parameters
        ----------
        items : sequence of (EngineSequence, token ids)
            Each sequence at most once, with at least one token.
        logits : {"last", "all"}
            For which of the new tokens.
        chunk : int, optional
            Most tokens computed at a time; the program's limit if None. Changes no result.
        capture : dict, optional
            Keys name operations (`program.names`); values become float32 (n_tokens, width), all items in a row.
        stop : Stop, optional
            Ends the step from another thread or at a deadline.

        Returns
        -------
        list of float32, (n, vocab_size)
            For each item; n is 1 for "last".

        Raises
        ------
        ContextFullError
            A sequence would grow beyond n_ctx. No sequence has changed.
        CancelledError
            `stop` ended the step. As after Ctrl-C, whole batches may have been done: `n_past` of each sequence is true.
        NonFiniteError
            A logit is NaN or infinite; the message names the operation that made the first such number. The sequences
            are as they were before.
        WoollyError
            A token id is out of range, or an item has no tokens.
        """
        if self._wait_ready is not None:
            self._wait_ready()
        if logits not in ("last", "all"):
            raise ValueError(f'step: logits must be "last" or "all", got {logits!r}')
        if chunk is not None and chunk < 1:
            raise ValueError(f"step: chunk must be at least 1, got {chunk}")
        if len({id(sequence) for sequence, _ in items}) < len(items):
            raise ValueError("step: a sequence may be in a step only once")
        tokens = [self._checked(sequence, ids) for sequence, ids in items]
        limit = min(chunk or self.program.max_tokens, self.program.max_tokens)
        n_rows = [1 if logits == "last" else len(ids) for ids in tokens]
        results = [np.empty((n, self.config.vocab_size), dtype=np.float32) for n in n_rows]
        captured: dict[str, list[NDArray[np.float32]]] = {name: [] for name in capture or ()}
        sequences = [sequence for sequence, _ in items]
        before = [sequence.n_past for sequence in sequences]
        batches = _batches([len(ids) for ids in tokens], limit)
        for batch in batches:
            self._run(batch, sequences, tokens, results, captured, stop=stop)
        if capture is not None:
            capture.update({name: np.concatenate(parts) for name, parts in captured.items() if parts})
        if not all(map(_is_finite, results)):
            for sequence, n_past in zip(sequences, before, strict=True):
                sequence.n_past = n_past
            self._explain(batches, sequences, tokens, results)
        return results

    def _checked(self, sequence: EngineSequence, ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int32]:
        array = np.asarray(ids)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
            got = f"{array.dtype} {array.shape}"
            raise WoollyError(f"expected at least one token id in a vector of integers, got {got}")
        if array.min() < 0 or array.max() >= self.config.vocab_size:
            bad = array[(array < 0) | (array >= self.config.vocab_size)][0]
            raise WoollyError(f"token id {bad} is not in the vocabulary of {self.config.vocab_size}")
        if sequence.n_past + array.size > self.n_ctx:
            raise ContextFullError(
                f"{sequence.n_past} tokens in the context and {array.size} new ones do not fit "
                f"into n_ctx = {self.n_ctx}"
            )
        return array.astype(np.int32)

    def _explain(
        self,
        batches: list[list[_Piece]],
        sequences: list[EngineSequence],
        tokens: list[NDArray[np.int32]],
        results: list[NDArray[np.float32]],
    ) -> NoReturn:
        """Run a step again, operation by operation, until the first number that is not finite."""
        before = [sequence.n_past for sequence in sequences]
        watch = _Watch([*self.program.names, *self.program.part_names])
        try:
            for batch in batches:
                self._run(batch, sequences, tokens, results, {}, capture=watch)
        finally:
            for sequence, n_past in zip(sequences, before, strict=True):
                sequence.n_past = n_past
        raise NonFiniteError("logits are not finite, from keys and values of earlier tokens")

    def _run(
        self,
        batch: list[_Piece],
        sequences: list[EngineSequence],
        tokens: list[NDArray[np.int32]],
        results: list[NDArray[np.float32]],
        captured: Mapping[str, list[NDArray[np.float32]]],
        *,
        capture: dict[str, NDArray[np.float32] | None] | None = None,
        stop: Stop | None = None,
    ) -> None:
        spans = [(sequences[p.item].cache, sequences[p.item].n_past, p.end - p.begin) for p in batch]
        outputs, places, start = [], [], 0
        for p in batch:
            wants_all = len(results[p.item]) == len(tokens[p.item])
            first = p.begin if wants_all else max(p.begin, len(tokens[p.item]) - 1)
            outputs += range(start + first - p.begin, start + p.end - p.begin)
            places += [(p.item, row if wants_all else 0) for row in range(first, p.end)]
            start += p.end - p.begin
        if len(batch) == 1 and len(places) == len(results[batch[0].item]):
            rows = results[batch[0].item]  # the usual case: written in place
        else:
            rows = np.empty((len(places), self.config.vocab_size), dtype=np.float32)
        ids = np.concatenate([tokens[p.item][p.begin : p.end] for p in batch])
        if captured:
            capture = dict.fromkeys(captured)
        self.program.run(ids, spans, np.array(outputs, dtype=np.int32), rows, capture=capture, stop=stop)
        for p in batch:
            sequences[p.item].n_past += p.end - p.begin
        for name in captured:
            captured[name].append(capture[name])
        if rows is not results[batch[0].item]:
            for (item, row), values in zip(places, rows, strict=True):
                results[item][row] = values


class _Watch(dict[str, Any]):
    """Takes what a run captures, keeps nothing, and raises at the first output that is not finite."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(dict.fromkeys(names))

    def __setitem__(self, name: str, rows: NDArray[np.float32]) -> None:
        if not _is_finite(rows):
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(rows))[0])  # of experts: token, slot, column
            raise NonFiniteError(
                f"logits are not finite: the first number that is not is {rows[place]} in the output of "
                f"{name!r}, row {place[0]}, column {place[-1]}"
            )


def check_cache_dtype(cache_dtype: str) -> None:
    """Raise ValueError unless keys and values can be stored so."""
    if cache_dtype not in KV_DTYPES:
        names = " or ".join(f'"{name}"' for name in KV_DTYPES)
        raise ValueError(f"cache_dtype must be {names}, got {cache_dtype!r}")


def _is_finite(rows: NDArray[np.float32]) -> bool:
    """Whether no value is NaN or infinite; a NaN is the largest and the smallest of any array that holds one."""
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(rows.max(initial=0)) and np.isfinite(rows.min(initial=0)))


def _batches(lengths: list[int], limit: int) -> list[list[_Piece]]:
    """Cut items of these lengths into batches of at most `limit` tokens, in order."""
    batches: list[list[_Piece]] = []
    room = 0
    for item, length in enumerate(lengths):
        begin = 0
        while begin < length:
            if room == 0:
                batches.append([])
                room = limit
            end = min(length, begin + room)
            batches[-1].append(_Piece(item, begin, end))
            room -= end - begin
            begin = end
    return batches
