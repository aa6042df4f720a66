"""Chat templates: a list of messages in, the text of a prompt out.

Templates come from model files, so they are untrusted programs: they run in jinja2's immutable sandbox, see nothing but
plain JSON data, and are bounded in length, output and time. The environment matches the one that Hugging Face
transformers renders with, option for option, so that a prompt comes out byte for byte as the model was trained on.
This module knows nothing of tokens or models.
"""

from __future__ import annotations

import functools
import json
import traceback
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols

from woolly.errors import TemplateError
from woolly.sandbox import BoundedEnvironment, Budget, limited

# The longest template in common use (gpt-oss) has 17,000 characters; a context of a million tokens has some 5 million.
MAX_TEMPLATE_CHARS = 256 * 1024
MAX_OUTPUT_CHARS = 16 * 1024 * 1024
MAX_RENDER_S = 10.0

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled chat template.

    Parameters
    ----------
    source : str
        The jinja2 source, at most `MAX_TEMPLATE_CHARS` characters.
    bos_token, eos_token : str or None, keyword-only
        Text of the special tokens that the template may write; None leaves the variable undefined.

    Raises
    ------
    TemplateError
        The source is too long or is not a valid template; the message gives the line.

    Notes
    -----
    An instance is immutable and may be shared between threads.
    """

    def __init__(self, source: str, *, bos_token: str | None = "", eos_token: str | None = "") -> None:
        if not isinstance(source, str):
            raise TypeError(f"a chat template is a string, got {type(source).__name__}")
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(f"chat template has {len(source)} characters, the limit is {MAX_TEMPLATE_CHARS}")
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        try:
            with limited(MAX_RENDER_S, MAX_OUTPUT_CHARS):  # constant expressions are computed here
                self._template = _environment().from_string(source)
        except TemplateError:
            raise
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"chat template, line {error.lineno}: {error.message}") from error
        except Exception as error:  # deep nesting ends in RecursionError, odd constants in others of the compiler's
            raise TemplateError(f"chat template does not compile: {_describe(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        **kwargs: Any,
    ) -> str:
        """Render `messages` as the prompt text, special tokens included.

        Parameters
        ----------
        messages : sequence of dict
            Each has `role` (str) and `content` (str, or a list of parts); `content` may be left out or None where
            there are `tool_calls`. Other keys are passed on to the template, but for those whose value is None.
        tools : sequence of dict, optional
            JSON schemas of the functions that the model may call.
        add_generation_prompt : bool, optional
            End with the header that makes the model answer; by default yes, unless the final message is continued.
        continue_final_message : bool or str
            End inside the last message, so that the model goes on with it; a str names the field to go on with, such as
            "reasoning_content", else it is "content".
        **kwargs
            Further variables that the template reads, for example `enable_thinking=False` or `documents=[…]`. They
            must be JSON data.

        Raises
        ------
        TypeError, ValueError
            The messages are malformed; the error names the first that is.
        TemplateError
            The template refused the messages or failed, in its own words, or its output or time is out of bounds.
        """
        validate_messages(messages)
        variables: dict[str, Any] = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        variables = {name: value for name, value in variables.items() if value is not None}
        variables |= {name: _plain(name, value) for name, value in kwargs.items()}
        variables.setdefault("documents", None)
        variables["messages"] = plain = [_as_templates_read(message) for message in _plain("messages", messages)]
        variables["tools"] = None if tools is None else _plain_tools(tools)
        if add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt begins a new message: it cannot go with continue_final_message")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        variables["add_generation_prompt"] = bool(add_generation_prompt)
        if not continue_final_message:
            return self._run(variables)
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        final = _tag_final(plain[-1], field, self.source)
        return _cut_at_tag(self._run(variables), final)

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """Names of what the template reads and does not set itself."""
        environment = _environment()
        names = jinja2.meta.find_undeclared_variables(environment.parse(self.source))
        return frozenset(names) - environment.globals.keys()

    def _run(self, variables: Mapping[str, Any]) -> str:
        try:
            with limited(MAX_RENDER_S, MAX_OUTPUT_CHARS) as budget:
                return _join_bounded(self._template.generate(variables), budget)
        except TemplateError:
            raise
        except Exception as error:  # whatever a template raises, a TypeError of its own too, is the template's failure
            raise TemplateError(f"chat template{_template_line(error)}: {_describe(error)}") from error


def validate_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Check that `messages` is a non-empty list of dicts with `role` and `content`.

    Raises
    ------
    TypeError, ValueError
        With the index of the first message that is wrong, what was expected and what came.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a list of dicts with role and content, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty: at least one message is needed")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{i}] must be a dict with role and content, got {type(message).__name__}")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise ValueError(f"messages[{i}]: role must be a non-empty string, got {role!r}")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise ValueError(f"messages[{i}] ({role}) has no content")
        if content is not None and not isinstance(content, (str, list)):
            raise TypeError(f"messages[{i}] ({role}): content must be a string, got {type(content).__name__}")


# --- data for the template ---


def _plain(name: str, value: Any) -> Any:
    """A copy of `value` made of JSON types only: an object with methods would be a way out of the sandbox."""
    try:
        return json.loads(json.dumps(value, default=_as_json))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{name} must be JSON data: {error}") from error


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return list(value)
    raise TypeError(f"a {type(value).__name__} cannot be passed to a chat template")


def _plain_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    plain = _plain("tools", tools)
    if not isinstance(plain, list) or not all(isinstance(tool, dict) for tool in plain):
        raise TypeError("tools must be a list of dicts (JSON schemas)")
    return plain


def _as_templates_read(message: dict[str, Any]) -> dict[str, Any]:
    """A message without empty fields, and its reasoning under all the names that templates read: as transformers."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[field] for field in _REASONING_FIELDS if field in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


# --- continuing the last message, as transformers does ---

# Its trailing space shows whether the template trims what it writes.
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def _tag_final(message: dict[str, Any], field: str, source: str) -> str:
    """Mark the end of a field of the last message and return the text before the mark."""
    final = message.get(field)
    if final is None:
        raise ValueError(f"continue_final_message: the last message has no {field} to continue")
    fields = [field]
    if field in _REASONING_FIELDS:  # the template may read any of its copies
        fields = [name for name in _REASONING_FIELDS if message.get(name) == final]
    if not any(name in source for name in fields):
        raise ValueError(f"continue_final_message: the chat template does not read {field}")
    if isinstance(final, str):
        message.update(dict.fromkeys(fields, final + _TAG))
        return final
    parts = [part for part in final if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if not parts:
        raise ValueError(f"continue_final_message: the {field} of the last message has no text to continue")
    final = parts[-1]["text"]
    parts[-1]["text"] += _TAG
    return final


def _cut_at_tag(text: str, final: str) -> str:
    at = text.rfind(_TAG.strip())
    if at < 0 or final.strip() not in text:
        raise TemplateError("chat template: it leaves out the last message, which was to be continued, or parts of it")
    # Where the template has trimmed the mark, it would have trimmed the text before.
    return text[:at] if text.startswith(_TAG, at) else text[:at].rstrip()


# --- bounds and errors ---


def _join_bounded(pieces: Iterable[str], budget: Budget) -> str:
    """Join what a template yields; stop when it passes the bounds on size or time."""
    parts = []
    n_chars = 0
    for piece in pieces:
        n_chars += len(piece)
        budget.check_chars(n_chars)
        budget.tick()
        parts.append(piece)
    return "".join(parts)


def _describe(error: Exception) -> str:
    """The template's own words where it has raised, else the Python error with its kind."""
    message = " ".join(str(error).split())
    if isinstance(error, jinja2.TemplateError) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _template_line(error: Exception) -> str:
    """`, line N` of the innermost template frame: jinja2 rewrites tracebacks to the lines of the source."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f", line {lines[-1]}" if lines else ""


# --- the environment, as transformers sets it up ---


class _GenerationTag(Extension):
    """Accepts `{% generation %}…{% endgeneration %}`, which marks the assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012 - the name and type are jinja2's

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, not the bare body: variables that are set inside stay inside, as in transformers.
        return nodes.CallBlock(self.call_method("_passed_through"), [], [], body).set_lineno(lineno)

    def _passed_through(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without underscored attributes, which name Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named self, so that namespace(self=1) works
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} starts with an underscore")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML and sorts the keys, which a prompt must not have."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(
        filters={"tojson": _tojson}, trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
    }
    return environment
