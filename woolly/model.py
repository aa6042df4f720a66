"""A model ready to run: engine, tokenizer and template under one roof. Sessions do the talking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from woolly._kernels import active_isa
from woolly.chat import ChatTemplate
from woolly.config import ModelConfig
from woolly.engine import Engine
from woolly.errors import UnsupportedModelError, WoollyError
from woolly.materialise import Materialisation
from woolly.session import Completion, Piece, Session, Timing
from woolly.tokenizer import Tokenizer

NONCHARACTERS = "\ufdd0\ufdd1\ufdd2\ufdd3"  # code points that Unicode gives no meaning: marks that no text should hold


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a model and one full session take.

    Attributes
    ----------
    weights_bytes : int
    kv_cache_bytes : int
        Of one session at n_ctx tokens; taken from the system as it fills.
    scratch_bytes : int
        Activations of the largest batch, and one row of logits.
    """

    weights_bytes: int
    kv_cache_bytes: int
    scratch_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.weights_bytes + self.kv_cache_bytes + self.scratch_bytes


class Model:
    """A loaded model. Made by `woolly.load_gguf`, `woolly.load`.

    Attributes
    ----------
    name : str
    config : ModelConfig
    engine : Engine
    tokenizer : Tokenizer
    chat_template : ChatTemplate or None
    load_s : float
        Seconds that loading took.
    materialisation : Materialisation or None
        What still generates weights, or has, where there is no file.

    Notes
    -----
    May be used from several Python threads, each with a session of its own; steps run one after the other, on all the
    model's threads, with the GIL released.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        *,
        weights_bytes: int,
        load_s: float,
        materialisation: Materialisation | None = None,
    ) -> None:
        self.name = name
        self.engine = engine
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.load_s = load_s
        self.materialisation = materialisation
        self._weights_bytes = weights_bytes
        self._is_open = True

    @property
    def config(self) -> ModelConfig:
        """Sizes and constants."""
        return self.engine.config

    @property
    def n_ctx(self) -> int:
        """Most tokens a session may hold."""
        return self.engine.n_ctx

    @property
    def n_threads(self) -> int:
        """Threads of a step."""
        return self.engine.program.n_threads

    @property
    def isa(self) -> str:
        """Instruction set of the kernels in use."""
        return active_isa()

    @property
    def base_timing(self) -> Timing:
        """What every timing of this model shares."""
        times = {"init_s": self.init_s, "materialise_s": self.materialise_s}
        return Timing(self.load_s, threads=self.n_threads, isa=self.isa, **times)

    @property
    def is_generated(self) -> bool:
        """Whether the weights are generated: whatever the model says is noise."""
        return self.materialisation is not None

    @property
    def init_s(self) -> float | None:
        """Seconds that `load_fast_fp32` took to return; None for a model from a file."""
        return self.load_s if self.is_generated else None

    @property
    def materialise_s(self) -> float | None:
        """Seconds that generating the weights took; None until it is done, and for a model from a file."""
        return self.materialisation.seconds if self.materialisation else None

    def wait_ready(self) -> None:
        """Wait until the weights are there: at once, unless they are being generated.

        Raises
        ------
        WoollyError
            Generating them failed, or the model was closed before it was done.
        """
        if self.materialisation is not None:
            self.materialisation.wait()

    def memory_plan(self) -> MemoryPlan:
        """Bytes of weights, one session's KV cache, and scratch."""
        self._wait_recorded()
        scratch = self.engine.program.buffer_bytes + 4 * self.config.vocab_size
        return MemoryPlan(self._weights_bytes, self.engine.kv_cache_bytes, scratch)

    def session(self) -> Session:
        """A new, empty session."""
        self.check_open()
        return Session(self)

    def forward(
        self, ids: Sequence[int], /, *, capture: dict[str, NDArray[np.float32] | None] | None = None
    ) -> NDArray[np.float32]:
        """Logits of every token, from an empty cache.

        Parameters
        ----------
        ids : sequence of int
        capture : dict, optional
            Keys name operations (see `operations`); values become their float32 outputs, a row a token.

        Returns
        -------
        float32, (n_tokens, vocab_size)
        """
        self.check_open()
        return self.engine.step([(self.engine.new_sequence(), ids)], logits="all", capture=capture)[0]

    @property
    def operations(self) -> list[str]:
        """Names of the operations of a forward pass, in order, such as "blk.3.attn_norm"."""
        self._wait_recorded()
        return list(self.engine.program.names)

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[Piece]:
        """Continue a prompt in a session of its own; arguments as for `Session.stream`."""
        return self.session().stream(prompt, **options)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Completion:
        """Continue a prompt and return the whole answer; arguments as for `Session.stream`."""
        return self.session().generate(prompt, **options)

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Iterator[Piece]:
        """Answer a conversation in a session of its own; arguments as for `Session.stream_chat`."""
        return self.session().stream_chat(messages, **options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Completion:
        """Answer a conversation and return the whole answer; arguments as for `Session.stream_chat`."""
        return self.session().chat(messages, **options)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template_options: Any) -> list[int]:
        """Token ids of a conversation as the chat template writes it, ready for the answer.

        Control tokens spelled out in a message's text are text: only the template's own become control tokens. BOS is
        added where the model wants one and the template wrote none.

        Raises
        ------
        UnsupportedModelError
            The model has no chat template.
        TemplateError
            The template refuses the conversation.
        """
        if self.chat_template is None:
            raise UnsupportedModelError(f"{self.name} has no chat template: use stream or generate with plain text")
        mark = _unused_mark(messages)
        marked = [_marked(message, mark, self.tokenizer.control_spellings) for message in messages]
        text = self.chat_template.render(marked, **template_options)
        return self.tokenizer.encode_marked(text, mark)

    def check_open(self) -> None:
        """Raise WoollyError if the model was closed."""
        if not self._is_open:
            raise WoollyError(f"{self.name}: the model was closed")

    def close(self) -> None:
        """Refuse further use, and end what other threads compute with it: they get WoollyError.

        Memory goes when the last session does.
        """
        self._is_open = False
        self.engine.program.close()
        if self.materialisation is not None:
            self.materialisation.cancel()

    def _wait_recorded(self) -> None:
        if self.materialisation is not None:
            self.materialisation.wait_recorded()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        config = self.config
        return f"<woolly.Model {self.name!r}: {config.architecture}, {config.n_layers} layers, n_ctx {self.n_ctx}>"


def _unused_mark(messages: Sequence[Mapping[str, Any]]) -> str:
    """A character that occurs in no message."""
    everything = repr([dict(message) if isinstance(message, Mapping) else message for message in messages])
    for mark in NONCHARACTERS:
        if mark not in everything and repr(mark)[1:-1] not in everything:
            return mark
    raise WoollyError("the messages hold every one of the characters U+FDD0 to U+FDD3, which have no meaning in text")


def _marked(value: Any, mark: str, spellings: Sequence[str]) -> Any:
    """The same message with a mark inside every control token that its texts spell out."""
    if isinstance(value, str):
        for spelling in spellings:
            if spelling in value:
                value = value.replace(spelling, spelling[0] + mark + spelling[1:])
        return value
    if isinstance(value, Mapping):
        return {key: item if key == "role" else _marked(item, mark, spellings) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, mark, spellings) for item in value]
    return value
