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
from woolly.errors import WoollyError
from woolly.materialise import Materialisation
from woolly.prompts import DEFAULT, PromptExplanation, Prompts
from woolly.session import Completion, Piece, Session, Timing
from woolly.terminal import escape_controls
from woolly.tokenizer import Tokenizer


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a process with a model and one full session takes: a forecast of its peak.

    Attributes
    ----------
    runtime_bytes : int
        What the process held, beside the weights, when the model had been opened: Python, its libraries, vocabulary.
    weights_bytes : int
    kv_cache_bytes : int
        Of one session at n_ctx tokens; taken from the system as it fills.
    scratch_bytes : int
        Activations of the largest batch, and one row of logits.
    """

    runtime_bytes: int
    weights_bytes: int
    kv_cache_bytes: int
    scratch_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.runtime_bytes + self.weights_bytes + self.kv_cache_bytes + self.scratch_bytes


class Model:
    """A loaded model. Made by `woolly.load_gguf`, `woolly.load`.

    Attributes
    ----------
    name : str
    config : ModelConfig
    engine : Engine
    tokenizer : Tokenizer
    chat_template : ChatTemplate or None
        The default one, compiled when it is first asked for.
    chat_templates : mapping of str to ChatTemplate
        All by name, such as "default" and "tool_use".
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
        chat_template: ChatTemplate | Mapping[str, ChatTemplate] | None,
        *,
        weights_bytes: int,
        runtime_bytes: int = 0,
        load_s: float,
        materialisation: Materialisation | None = None,
    ) -> None:
        self.name = name
        self.engine = engine
        self.tokenizer = tokenizer
        self._prompts = Prompts(name, tokenizer, chat_template)
        self.load_s = load_s
        self.materialisation = materialisation
        self._weights_bytes, self._runtime_bytes = weights_bytes, runtime_bytes
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
    def compute(self) -> str:
        """How matmuls are computed: "exact", "int8" or "bf16"."""
        return self.engine.program.compute

    @property
    def base_timing(self) -> Timing:
        """What every timing of this model shares."""
        times = {"init_s": self.init_s, "materialise_s": self.materialise_s}
        return Timing(self.load_s, threads=self.n_threads, isa=self.isa, compute=self.compute, **times)

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
        """Bytes of the runtime, weights, one session's KV cache, and scratch."""
        self._wait_recorded()
        scratch = self.engine.program.buffer_bytes + 4 * self.config.vocab_size
        return MemoryPlan(self._runtime_bytes, self._weights_bytes, self.engine.kv_cache_bytes, scratch)

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

    @property
    def chat_templates(self) -> Mapping[str, ChatTemplate]:
        """The chat templates by name."""
        return self._prompts.templates

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The default chat template; TemplateError if it does not compile."""
        return self._prompts.templates.get(DEFAULT)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template_options: Any) -> list[int]:
        """Token ids of a conversation as the chat template writes it, ready for the answer.

        Control tokens spelled out in the data are text: only the template's own become control tokens. BOS is added
        where the model wants one and the template wrote none.

        Parameters
        ----------
        messages : sequence of dict
            As for `ChatTemplate.render`.
        **template_options
            tools, add_generation_prompt, continue_final_message, enable_thinking and what else the template reads.
            chat_template names one of several; by default it is "tool_use" where there are tools and such a template.

        Raises
        ------
        UnsupportedModelError
            The model has no chat template.
        TemplateError
            The template refuses the conversation, or there is none of that name.
        TypeError
            The template does not read an option.
        """
        return self._prompts.explain(messages, **template_options).ids

    def explain_prompt(
        self, messages: Sequence[Mapping[str, Any]], *, show: bool = True, **template_options: Any
    ) -> PromptExplanation:
        """What the model gets for a conversation: the text, the tokens, and where BOS comes from.

        Parameters
        ----------
        messages, **template_options
            As for `encode_chat`, whose ids and errors these are.
        show : bool
            Print it too, with control characters written as escapes.
        """
        explanation = self._prompts.explain(messages, **template_options)
        if show:
            print(escape_controls(str(explanation)))
        return explanation

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
        sizes = f"{config.architecture}, {config.n_layers} layers, n_ctx {self.n_ctx}"
        how = "" if self.compute == "exact" else f", compute {self.compute}"
        return f"<woolly.Model {self.name!r}: {sizes}{how}>"
