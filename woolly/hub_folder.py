"""Which files of a Hugging Face repository make a model folder: its settings, its tokenizer, its safetensors files.

Knows names only, of a repository or of what is in the cache; fetching them is hub_hf.py's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from woolly.errors import DownloadError

WORD = "safetensors"  # in the place of a quantisation: hf:OWNER/REPO:safetensors
INDEX = "model.safetensors.index.json"
_REQUIRED = ("config.json", "tokenizer.json")
_OPTIONAL = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json", INDEX)
_TEMPLATE = re.compile(r"additional_chat_templates/[\w-][\w.-]*\.jinja")
_WEIGHTS = re.compile(r"[\w-][\w.-]*\.safetensors")
_MAX_INDEX_BYTES = 64 << 20


def is_meant(files: list[str], quant: str | None) -> bool:
    """Whether the folder is wanted: it was asked for by name, or nothing else is there."""
    if quant is not None:
        return quant.lower() == WORD
    return any(map(_WEIGHTS.fullmatch, files)) and not any(file.lower().endswith(".gguf") for file in files)


def settings_files(name: str, files: list[str]) -> list[str]:
    """All that is wanted but the weights, out of a repository's files.

    Raises
    ------
    DownloadError
        One is missing without which `woolly.load` would not open the folder.
    """
    for required in _REQUIRED:
        if required not in files:
            raise DownloadError(f"{name}: the repository has no {required}, which a model in safetensors takes")
    return [file for file in files if file in _REQUIRED or file in _OPTIONAL or _TEMPLATE.fullmatch(file)]


def weight_files(name: str, files: list[str], folder: Path) -> list[str]:
    """The safetensors files: those that the index names, else model.safetensors, else the only one.

    Parameters
    ----------
    name : str
        As the user wrote it, for messages.
    files : list of str
        Of the repository.
    folder : Path
        Where the index lies, if the repository has one.

    Raises
    ------
    DownloadError
        None is meant, or one that the index names is not there.
    """
    found = [file for file in files if _WEIGHTS.fullmatch(file)]
    if INDEX in files:
        wanted = _in_index(name, folder / INDEX)
        if missing := sorted(wanted - set(found)):
            raise DownloadError(f"{name}: {missing[0]} is missing")
        return sorted(wanted)
    whole = [file for file in found if file == "model.safetensors"] or found
    if len(whole) != 1:
        raise DownloadError(f"{name}: expected model.safetensors or {INDEX}, found {len(found)} safetensors files")
    return whole


def find_files(folder: Path) -> list[str] | None:
    """The weights of a folder in the cache that is whole; None where one is missing.

    Notes
    -----
    Weights are fetched last, so where they are there, the rest is too.
    """
    files = [path.name for path in folder.glob("*") if path.is_file()]
    try:
        settings_files("", files)
        return weight_files("", files, folder)
    except DownloadError:
        return None


def _in_index(name: str, path: Path) -> set[str]:
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError
        wanted = set(json.loads(path.read_bytes())["weight_map"].values())
        if not wanted or not all(map(_WEIGHTS.fullmatch, wanted)):
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise DownloadError(f"{name}: {INDEX} does not name safetensors files") from None
    return wanted
