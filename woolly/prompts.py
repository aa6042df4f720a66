"""From a conversation to token ids: which template writes it, what counts as a control token, where BOS comes from.

Owns the choice among a model's templates and the guard that keeps what people type from becoming control tokens. Knows
nothing of files or weights; the template writes the text, the tokenizer makes the ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from woolly.chat import ChatTemplate, validate_messages
from woolly.errors import TemplateError, UnsupportedModelError, WoollyError

if TYPE_CHECKING:
    from woolly.tokenizer import Tokenizer

DEFAULT = "default"
NONCHARACTERS = "\ufdd0\ufdd1\ufdd2\ufdd3"  # code points that Unicode gives no meaning: marks that no text should hold

# What may be said to every template: programs say it without asking which model they talk to.
_COMMON_OPTIONS = frozenset(
    ("add_generation_prompt", "continue_final_message", "documents", "enable_thinking", "reasoning_effort", "thinking")
)
_BOS_SENTENCES = {
    "template": "the template writes it",
    "tokenizer": "the tokenizer adds it; the template writes none",
    "both": "the template writes it and the tokenizer would add another: one is kept",
    "none": "none: neither the template writes one nor does the tokenizer add one",
}


class TemplateSet(Mapping[str, ChatTemplate]):
    """The chat templates of a model by name, compiled when they are first asked for.

    Parameters
    ----------
    sources : mapping of str to str
        Jinja2 sources; "default" is the one that is meant where no name is said.
    bos_token, eos_token : str or None, keyword-only
        As for `ChatTemplate`.
    """

    def __init__(self, sources: Mapping[str, str], *, bos_token: str | None = "", eos_token: str | None = "") -> None:
        self._sources = dict(sources)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._compiled: dict[str, ChatTemplate] = {}

    def __getitem__(self, name: str) -> ChatTemplate:
        if name not in self._compiled:
            source = self._sources[name]
            try:
                self._compiled[name] = ChatTemplate(source, **self._tokens)
            except TemplateError as error:
                raise error if name == DEFAULT else TemplateError(f"{name}: {error}") from error
        return self._compiled[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


@dataclass(frozen=True)
class PromptExplanation:
    """What a conversation becomes before the model sees it; printed, it reads as a report.

    Attributes
    ----------
    text : str
        As the template wrote it.
    ids : list of int
        What the model gets.
    tokens : list of str
        The ids as the vocabulary writes them.
    bos : {"template", "tokenizer", "both", "none"}
        Where the BOS token comes from. "both": the template writes it and the tokenizer would have added another,
        which was left out.
    template : str
        The name of the template that was used.
    """

    text: str = field(repr=False)
    ids: list[int]
    tokens: list[str]
    bos: str
    template: str = DEFAULT

    def __str__(self) -> str:
        rows = [f"{token_id:>8}  {token}" for token_id, token in zip(self.ids, self.tokens, strict=True)]
        facts = [f"template: {self.template}", f"tokens: {len(self.ids)}", f"BOS: {_BOS_SENTENCES[self.bos]}"]
        return "\n".join([self.text, "", *rows, "", *facts])


class Prompts:
    """Writes conversations for one model.

    Parameters
    ----------
    name : str
        What the model is called in messages.
    tokenizer : Tokenizer
    templates : ChatTemplate or mapping of str to ChatTemplate or None
        One template, or several by name.
    """

    def __init__(
        self, name: str, tokenizer: Tokenizer, templates: ChatTemplate | Mapping[str, ChatTemplate] | None
    ) -> None:
        self._name = name
        self._tokenizer = tokenizer
        if templates is None:
            templates = {}
        self.templates = {DEFAULT: templates} if isinstance(templates, ChatTemplate) else templates

    def choose(self, name: str | None, tools: Sequence[Mapping[str, Any]] | None) -> str:
        """Return the name of the template to use: the one asked for, the one for tools if there are any, the default.

        Raises
        ------
        UnsupportedModelError
            The model has no template.
        TemplateError
            It has none of that name, or several and none is the default.
        """
        if not self.templates:
            raise UnsupportedModelError(f"{self._name} has no chat template: use stream or generate with plain text")
        wanted = name or ("tool_use" if tools is not None and "tool_use" in self.templates else DEFAULT)
        if wanted not in self.templates:
            known = ", ".join(sorted(self.templates))
            raise TemplateError(f"{self._name} has no chat template {wanted!r}; say chat_template= one of: {known}")
        return wanted

    def explain(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> PromptExplanation:
        """Write a conversation and make token ids of it, and say how; parameters as for `Model.encode_chat`."""
        validate_messages(messages)
        name = self.choose(chat_template, tools)
        template = self.templates[name]
        _check_options(template, options)
        data = _marked({"messages": messages, "tools": tools, **options}, "", ())
        mark = _unused_mark(data)
        marked = _marked(data, mark, self._tokenizer.control_spellings)
        text = template.render(marked.pop("messages"), **marked)
        ids = self._tokenizer.encode_marked(text, mark)
        tokens = [self._tokenizer.id_to_token(token_id) for token_id in ids]
        return PromptExplanation(text.replace(mark, ""), ids, tokens, self._find_bos(text), name)

    def _find_bos(self, text: str) -> str:
        bos_id, adds = self._tokenizer.bos_id, self._tokenizer.add_bos
        if bos_id is not None and text.startswith(self._tokenizer.id_to_token(bos_id)):
            return "both" if adds else "template"
        return "tokenizer" if adds else "none"


def _check_options(template: ChatTemplate, options: Mapping[str, Any]) -> None:
    """Refuse what neither every template may be told nor this one reads: a misspelt option, most likely."""
    for name in options:
        if name not in _COMMON_OPTIONS and name not in template.variables:
            reads = ", ".join(sorted(template.variables - {"messages"})) or "nothing"
            raise TypeError(
                f"{name} is neither a sampling parameter nor a variable that the chat template reads ({reads})"
            )


def _unused_mark(data: dict[str, Any]) -> str:
    """A character that occurs nowhere in the data for a template."""
    everything = repr(data)
    for mark in NONCHARACTERS:
        if mark not in everything and repr(mark)[1:-1] not in everything:
            return mark
    raise WoollyError("the messages hold every one of the characters U+FDD0 to U+FDD3, which have no meaning in text")


def _marked(value: Any, mark: str, spellings: Sequence[str]) -> Any:
    """The same data in dicts and lists, with a mark inside every control token that its texts spell out."""
    if isinstance(value, str):
        for spelling in spellings:
            if spelling in value:
                value = value.replace(spelling, spelling[0] + mark + spelling[1:])
        return value
    if isinstance(value, Mapping):
        kept = ("role", "bos_token", "eos_token")
        return {key: item if key in kept else _marked(item, mark, spellings) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, mark, spellings) for item in value]
    return value
