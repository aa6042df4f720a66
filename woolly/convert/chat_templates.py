"""The chat templates of a model folder, as GGUF keys: those that transformers finds, in its order of precedence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from woolly.convert.config_json import JsonObject, read_json
from woolly.errors import CheckpointError

_MOST_FILES = 64
_MOST_BYTES = 1 << 20  # the longest in common use has 17,000 characters


def read_chat_templates(folder: Path, settings: JsonObject) -> dict[str, Any]:
    """The keys of the default chat template and of further, named ones such as "tool_use".

    Where the folder has chat_template.jinja or additional_chat_templates/NAME.jinja, only these count; otherwise the
    field of tokenizer_config.json, and last chat_template.json, which older processors of images wrote.

    Parameters
    ----------
    folder : Path
    settings : JsonObject
        tokenizer_config.json: its chat_template is a text, or a list of named ones of which one is "default".

    Raises
    ------
    CheckpointError
        A field is of another kind, or a file is too large or not UTF-8.
    """
    templates = _in_files(folder) or _in_field(settings)
    if not templates and (folder / "chat_template.json").is_file():
        templates = _in_field(read_json(folder / "chat_template.json"))
    keys: dict[str, Any] = {"tokenizer.chat_template": templates.pop("default", None)}
    if templates:
        keys["tokenizer.chat_templates"] = sorted(templates)
        keys |= {f"tokenizer.chat_template.{name}": template for name, template in templates.items()}
    return keys


def _in_files(folder: Path) -> dict[str, str]:
    """The templates that are files of their own, by name."""
    files = {"default": folder / "chat_template.jinja"} if (folder / "chat_template.jinja").is_file() else {}
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if len(more) > _MOST_FILES:
        raise CheckpointError(f"{more[0].parent}: {len(more)} chat templates, {_MOST_FILES} are allowed")
    files |= {path.name.removesuffix(".jinja"): path for path in more}
    return {name: _read(path) for name, path in files.items()}


def _in_field(settings: JsonObject) -> dict[str, str]:
    """The templates of the field chat_template, by name."""
    value = settings.fields.get("chat_template")
    if isinstance(value, list):
        entries = settings.get_objects("chat_template")
        return {entry.get_str("name"): entry.get_str("template") for entry in entries}
    template = settings.get_str("chat_template", None)
    return {} if template is None else {"default": template}


def _read(path: Path) -> str:
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise CheckpointError(f"{path}: {size} bytes, a chat template may have {_MOST_BYTES}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8: byte {error.object[error.start]:#04x} at {error.start}") from None
