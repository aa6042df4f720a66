"""A model in several GGUF files, `NAME-00001-of-00003.gguf` and so on, opened as one by naming the first.

Owns how parts are found and that they belong together; what a part holds is `gguf_file`'s business. The first part
has the metadata of the model; the key ``split.no`` counts parts from 0, ``split.count`` says how many there are, and
``split.tensors.count`` how many tensors they hold together.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack

from woolly.errors import GGUFError
from woolly.gguf_file import GGUFFile, TensorInfo
from woolly.stored_file import FileRange

_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file, with all its other parts if it is the first of several.

    Raises
    ------
    GGUFError
        As `GGUFFile.open`; also if the file is a later part, or a part is missing or belongs to another model.
    OSError
        As `GGUFFile.open`.
    """
    first = GGUFFile.open(path)
    try:
        n_parts = first.metadata.get_int("split.count", 1)
        return first if n_parts <= 1 else _open_parts(first, n_parts)
    except BaseException:
        first.close()
        raise


class SplitGGUFFile(GGUFFile):
    """Several files as one: `path` and `metadata` are the first part's, `tensors` are those of all.

    Attributes
    ----------
    parts : tuple of GGUFFile
    """

    def __init__(self, parts: tuple[GGUFFile, ...]) -> None:
        first = parts[0]
        self.parts = parts
        self.path, self.version, self.alignment = first.path, first.version, first.alignment
        self.metadata = first.metadata
        self.tensors: dict[str, TensorInfo] = {}
        self._part_of: dict[str, GGUFFile] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in self.tensors:
                    raise GGUFError(f"{part.path!r}: tensor {name!r} is also in {self._part_of[name].path!r}")
                self.tensors[name], self._part_of[name] = info, part
        expected = first.metadata.get_int("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            raise GGUFError(f"{self.path!r}: split.tensors.count says {expected}, the parts hold {len(self.tensors)}")

    @property
    def n_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.n_bytes for part in self.parts)

    def bytes_of(self, name: str) -> FileRange:
        """As `GGUFFile.bytes_of`, from the part that holds it."""
        return self._part_of[name].bytes_of(name)

    def close(self) -> None:
        """Let go of all parts."""
        for part in self.parts:
            part.close()


def _open_parts(first: GGUFFile, n_parts: int) -> SplitGGUFFile:
    """Open the parts after the first by their names."""
    match = _PART_NAME.fullmatch(first.path)
    number = first.metadata.get_int("split.no") + 1
    if number != 1:
        name = f"; open {_part_path(match['stem'], 1, n_parts)!r}" if match else ""
        raise GGUFError(f"{first.path!r}: this is part {number} of {n_parts}, not the first{name}")
    if match is None or int(match["part"]) != 1 or int(match["count"]) != n_parts:
        raise GGUFError(f"{first.path!r}: the first of {n_parts} parts must be named NAME-00001-of-{n_parts:05d}.gguf")
    with ExitStack() as opened:
        parts = [first]
        for part in range(2, n_parts + 1):
            path = _part_path(match["stem"], part, n_parts)
            if not os.path.exists(path):
                raise GGUFError(f"{first.path!r}: part {part} of {n_parts} is missing: expected {path!r}")
            parts.append(opened.enter_context(GGUFFile.open(path)))
            _check_part(parts[-1], part, n_parts)
        whole = SplitGGUFFile(tuple(parts))
        opened.pop_all()
    return whole


def _part_path(stem: str, part: int, n_parts: int) -> str:
    return f"{stem}-{part:05d}-of-{n_parts:05d}.gguf"


def _check_part(file: GGUFFile, part: int, n_parts: int) -> None:
    found = file.metadata.get_int("split.no") + 1, file.metadata.get_int("split.count")
    if found != (part, n_parts):
        raise GGUFError(f"{file.path!r}: expected part {part} of {n_parts}, this is part {found[0]} of {found[1]}")
