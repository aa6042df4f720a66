"""Text in and out of one conversation: streaming, stop strings, and reuse of what the KV cache already holds."""

from __future__ import annotations

import contextlib
import operator
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from woolly._kernels import Stop
from woolly.errors import ContextFullError, WoollyError
from woolly.sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from woolly.model import Model

DEFAULT_MAX_TOKENS = 256
_SAMPLING_FIELDS = frozenset(f.name for f in fields(SamplingParams))


@dataclass(frozen=True)
class Timing:
    """Where a request's time went.

    Attributes
    ----------
    load_s : float
        Opening the model, in seconds.
    ttft_s : float
        From the request to its first token, tokenising included.
    prefill_tokens_per_s, decode_tokens_per_s : float
        Of the model alone, without tokenising and sampling; 0 where nothing was computed.
    threads : int
    isa : str
    compute : str
        "exact", "int8" or "bf16".
    init_s, materialise_s : float or None
        Where weights are generated: the constructor, and generating them. None for a model from a file.
    """

    load_s: float
    ttft_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    threads: int = 0
    isa: str = ""
    compute: str = "exact"
    init_s: float | None = None
    materialise_s: float | None = None


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    Attributes
    ----------
    text : str
    tokens : list of int
        Generated ids, without the one that ended the answer.
    finish_reason : str
        "stop" (end of generation or a stop string) or "length".
    prompt_tokens : int
        Tokens of the prompt, those found in the cache included.
    timing : Timing
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int
    timing: Timing

    @property
    def completion_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens)


@dataclass(frozen=True)
class Piece:
    """A bit of streamed text: whole code points, possibly none.

    Attributes
    ----------
    text : str
    token : int or None
        The id that was generated, None on the last piece.
    finish_reason : str or None
        Set on the last piece.
    completion : Completion or None
        Set on the last piece.
    """

    text: str
    token: int | None = None
    finish_reason: str | None = None
    completion: Completion | None = None


@dataclass
class _Clock:
    """Accumulates the times of one request."""

    start_s: float = field(default_factory=time.perf_counter)
    ttft_s: float = 0.0
    prefill_s: float = 0.0
    n_prefilled: int = 0
    decode_s: float = 0.0
    n_decoded: int = 0

    def timing(self, base: Timing) -> Timing:
        return replace(
            base,
            ttft_s=self.ttft_s,
            prefill_tokens_per_s=self.n_prefilled / self.prefill_s if self.n_prefilled else 0.0,
            decode_tokens_per_s=self.n_decoded / self.decode_s if self.n_decoded else 0.0,
        )


class Session:
    """One sequence of tokens with its KV cache. Made by `Model.session`.

    Notes
    -----
    A prompt that begins like what the cache holds is only computed from where it differs. One thread and one answer at
    a time: another thread gets WoollyError while a step runs, and so does a stream that is read on after something else
    has used the session. `cancel` alone may be called from any thread.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._sequence = model.engine.new_sequence()
        self._tokens: list[int] = []  # what the cache holds, position by position
        self._busy = threading.RLock()
        self._stop = Stop()
        self._n_changes = 0  # of the cache: how a stream notices that something else has used the session
        self._is_answering = False  # a stream feeds, not the user

    @property
    def n_past(self) -> int:
        """Positions in the cache, in tokens."""
        return self._sequence.n_past

    @property
    def tokens(self) -> list[int]:
        """The ids in the cache."""
        return self._tokens[: self.n_past]

    def rewind(self, n: int, /) -> None:
        """Forget all but the first n tokens.

        Raises
        ------
        ValueError
            There are no n tokens.
        """
        with self._alone():
            self._sequence.rewind(n)
            del self._tokens[n:]
            self._n_changes += 1

    def cancel(self) -> None:
        """End the `feed` or the answer that is under way, from any thread: whoever waits for it gets CancelledError.

        It takes effect after the operation in hand. What was computed stays, and the session can be used again; the
        next prompt gets the same answer as ever. A request that begins later is not affected.
        """
        self._stop.cancel()

    def feed(
        self,
        ids: Sequence[int],
        /,
        *,
        logits: str = "last",
        chunk: int | None = None,
        timeout_s: float | None = None,
    ) -> NDArray[np.float32]:
        """Append tokens.

        Parameters
        ----------
        ids : sequence of int
        logits : {"last", "all"}
        chunk : int, optional
            Most tokens computed at a time; changes no result.
        timeout_s : float, optional
            Seconds after which it gives up.

        Returns
        -------
        float32, (vocab_size,), or (n_tokens, vocab_size) for "all"

        Raises
        ------
        ContextFullError
            They do not fit into the context; nothing has changed.
        CancelledError
            `cancel` or `timeout_s` ended it. As after Ctrl-C, `n_past` tells how many tokens are in the cache.
        NonFiniteError
            The model's numbers are NaN or infinite; nothing has changed.
        WoollyError
            An id is no token of the model's, or another thread is using the session.
        """
        self._model.check_open()
        ids = _checked_ids(ids)
        with self._alone():
            if not self._is_answering:
                self._stop.reset(_deadline(timeout_s))
            self._n_changes += 1
            self._tokens[self.n_past :] = ids
            try:
                rows = self._model.engine.step([(self._sequence, ids)], logits=logits, chunk=chunk, stop=self._stop)[0]
            finally:
                del self._tokens[self.n_past :]
        return rows[0] if logits == "last" else rows

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: str | Sequence[str] = (),
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Continue a prompt, piece by piece.

        Parameters
        ----------
        prompt : str or token ids
            Text gets the tokens that the model begins with (BOS); ids are taken as they are.
        max_tokens : int
        stop : str or sequence of str
            Strings that end the answer; they are not part of it.
        timeout_s : float, optional
            Seconds from now after which prefill or decode is ended.
        **sampling
            Fields of `SamplingParams`: temperature, top_k, top_p, min_p, repeat_penalty, seed …

        Yields
        ------
        Piece
            One for each token; the last has `finish_reason` and `completion`.

        Raises
        ------
        ContextFullError
            The prompt does not fit, or the context fills up before the answer ends.
        CancelledError
            `cancel` or `timeout_s` ended it.
        WoollyError
            Something else has used the session since the last piece, and the answer cannot go on.
        """
        clock = _Clock()
        ids = self._model.tokenizer.encode(prompt) if isinstance(prompt, str) else _checked_ids(prompt)
        return self._generate(ids, clock, max_tokens, stop, SamplingParams(**sampling), _deadline(timeout_s))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: str | Sequence[str] = (),
        timeout_s: float | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Answer a conversation through the model's chat template; arguments as for `stream`.

        Options that are not fields of `SamplingParams` are the template's, as for `Model.encode_chat`: tools,
        enable_thinking …
        """
        clock = _Clock()
        sampling = {name: options.pop(name) for name in _SAMPLING_FIELDS & options.keys()}
        ids = self._model.encode_chat(messages, **options)
        return self._generate(ids, clock, max_tokens, stop, SamplingParams(**sampling), _deadline(timeout_s))

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Completion:
        """Continue a prompt and return the whole answer; arguments as for `stream`."""
        return _last(self.stream(prompt, **options))

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Completion:
        """Answer a conversation and return the whole answer; arguments as for `stream_chat`."""
        return _last(self.stream_chat(messages, **options))

    def _prefill(self, ids: list[int], clock: _Clock) -> NDArray[np.float32]:
        """Bring the cache to hold ids, keeping the prefix it shares with them; logits of the last."""
        if not ids:
            raise WoollyError("the prompt is empty: there is nothing to continue")
        n_shared = 0
        for ours, theirs in zip(self._tokens[: self.n_past], ids[:-1], strict=False):
            if ours != theirs:
                break
            n_shared += 1
        if len(ids) > self._model.n_ctx:
            raise ContextFullError(f"the prompt has {len(ids)} tokens, n_ctx is {self._model.n_ctx}")
        self._model.wait_ready()  # not a part of prefill, though of the time to the first token
        started = time.perf_counter()
        self.rewind(n_shared)
        logits = self.feed(ids[n_shared:])
        clock.prefill_s += time.perf_counter() - started
        clock.n_prefilled += len(ids) - n_shared
        return logits

    def _decode(self, token: int, clock: _Clock) -> NDArray[np.float32]:
        started = time.perf_counter()
        logits = self.feed([token])
        clock.decode_s += time.perf_counter() - started
        clock.n_decoded += 1
        return logits

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads out while the cache changes."""
        if not self._busy.acquire(blocking=False):
            raise WoollyError("the session is in use by another thread: give each thread a session of its own")
        try:
            yield
        finally:
            self._busy.release()

    @contextlib.contextmanager
    def _answering(self, deadline_s: float | None) -> Iterator[None]:
        """A step of a stream: alone, and ended by a `cancel` that came before it or at the stream's own deadline."""
        with self._alone():
            self._is_answering = True
            self._stop.set_deadline(deadline_s)
            try:
                yield
            finally:
                self._is_answering = False

    def _generate(
        self,
        ids: list[int],
        clock: _Clock,
        max_tokens: int,
        stop: str | Sequence[str],
        params: SamplingParams,
        deadline_s: float | None,
    ) -> Iterator[Piece]:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        sampler = Sampler(params)
        decoder = self._model.tokenizer.stream_decoder(continuation=True)
        text = _StopText((stop,) if isinstance(stop, str) else tuple(stop))
        history: list[int] = list(ids)
        generated: list[int] = []
        self._stop.reset()
        with self._answering(deadline_s):
            logits = self._prefill(ids, clock)
            n_changes = self._n_changes
        reason = "length"
        while True:
            token = sampler.sample(logits, history)
            clock.ttft_s = clock.ttft_s or time.perf_counter() - clock.start_s
            if token in self._model.tokenizer.eog_ids:
                reason = "stop"
                break
            generated.append(token)
            history.append(token)
            out = text.add(decoder.feed(token))
            if text.stopped:
                reason, rest = "stop", out
                break
            yield Piece(out, token)
            if len(generated) == max_tokens:
                break
            with self._answering(deadline_s):
                if self._n_changes != n_changes:
                    raise WoollyError("the session has been used for something else since this answer's last piece")
                logits = self._decode(token, clock)
                n_changes = self._n_changes
        if not text.stopped:
            rest = text.add(decoder.flush())
            reason = "stop" if text.stopped else reason
            rest += text.flush()
        completion = Completion(text.whole, generated, reason, len(ids), clock.timing(self._model.base_timing))
        yield Piece(rest, None, reason, completion)


def _checked_ids(ids: Sequence[int]) -> list[int]:
    """Token ids as a list; WoollyError for what is no integer, be it a string of digits or a whole float."""
    if isinstance(ids, str | bytes | bytearray):
        raise WoollyError(f"expected a sequence of token ids, got {type(ids).__name__}")
    checked = []
    for token in ids:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise WoollyError(f"token ids are integers, got {token!r}")
        checked.append(operator.index(token))
    return checked


def _deadline(timeout_s: float | None) -> float | None:
    """A time of the monotonic clock from seconds that are left."""
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not timeout_s > 0:
        raise ValueError(f"timeout_s must be a number of seconds above 0, got {timeout_s!r}")
    return time.monotonic() + timeout_s


def _last(pieces: Iterator[Piece]) -> Completion:
    for piece in pieces:
        if piece.completion is not None:
            return piece.completion
    raise AssertionError("a stream ends with its completion")


class _StopText:
    """Text as it may be shown: held back while it could be the beginning of a stop string.

    Attributes
    ----------
    whole : str
        Everything released so far.
    stopped : bool
        A stop string has come; nothing from it on is released.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise ValueError(f"stop strings must be strings of at least one character, got {stops!r}")
        self._stops = stops
        self._held = ""
        self.whole = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """Take more text; return what may be shown now."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found), drop_rest=True)
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._release(len(self._held) - keep)

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return self._release(len(self._held))

    def _release(self, n: int, *, drop_rest: bool = False) -> str:
        out, self._held = self._held[:n], "" if drop_rest else self._held[n:]
        self.whole += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-n:]):
            return n
    return 0
