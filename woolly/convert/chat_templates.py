"""The chat templates of a model folder, as GGUF keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from woolly.convert.config_json import JsonObject
from woolly.errors import CheckpointError


def read_chat_templates(folder: Path, settings: JsonObject) -> dict[str, Any]:
    """The keys of the chat template and of further, named ones; the file chat_template.jinja comes first.

    Parameters
    ----------
    folder : Path
    settings : JsonObject
        tokenizer_config.json: its chat_template is a text, or a list of named ones of which one is "default".

    Raises
    ------
    CheckpointError
        It is neither, or chat_template.jinja is not UTF-8.
    """
    value = settings.fields.get("chat_template")
    named = {}
    if isinstance(value, list):
        entries = settings.get_objects("chat_template")
        named = {entry.get_str("name"): entry.get_str("template") for entry in entries}
        value = named.pop("default", None)
    if value is not None and not isinstance(value, str):
        settings.refuse("chat_template", "expected a string")
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            value = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{path}: not UTF-8: byte {error.object[error.start]:#04x} at {error.start}"
            ) from None
    keys: dict[str, Any] = {"tokenizer.chat_template": value}
    if named:
        keys["tokenizer.chat_templates"] = sorted(named)
        keys |= {f"tokenizer.chat_template.{name}": template for name, template in named.items()}
    return keys
