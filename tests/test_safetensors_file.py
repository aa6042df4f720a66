"""Safetensors files: what is read, and everything that is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_folder import encode, safetensors_bytes, with_header

from woolly.errors import CheckpointError
from woolly.safetensors_file import MAX_TENSORS, SafetensorsFile

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def write(tmp_path: Path, raw: bytes) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    return path


def test_tensors_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    tensors = {"a": encode(VALUES, "BF16"), "b": encode(VALUES, "F32"), "empty": ("I64", [0, 3], b"")}
    file = SafetensorsFile.open(write(tmp_path, safetensors_bytes(tensors, {"format": "pt"})))
    assert file.metadata == {"format": "pt"}
    assert list(file.tensors) == ["a", "b", "empty"]
    b = file.tensors["b"]
    assert (b.dtype, b.shape, b.n_bytes) == ("F32", (2, 3), 24)
    raw = file.bytes_of(b).read()
    assert raw.tobytes() == VALUES.tobytes()
    assert file.bytes_of(b).read(4, 12).view("<f4").tolist() == VALUES.ravel()[1:3].tolist()
    file.close()
    assert raw.tobytes() == VALUES.tobytes()
    with pytest.raises(ValueError, match="the file is closed"):
        file.bytes_of(b).read()


def test_the_package_reads_the_same(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "x.safetensors"
    numpy.save_file({"a": VALUES, "b": VALUES.astype(np.float16)}, path, {"k": "v"})
    file = SafetensorsFile.open(path)
    assert file.metadata == {"k": "v"}
    assert file.bytes_of(file.tensors["a"]).read().tobytes() == VALUES.tobytes()
    assert file.tensors["b"].dtype == "F16"


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "header: no JSON"),
        (b"[" * 5000, "header: no JSON"),
        (b"\xff", "header: no JSON"),
        (b"[]", r"header: expected a JSON object, found \[\]"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b"[" * (4 * MAX_TENSORS + 1), "more than 1048576 lists and objects"),
        ({"__metadata__": {"a": 1}}, "__metadata__: expected an object of strings, found {'a': 1}"),
        ({"a": 3}, "tensor 'a': expected dtype, shape and data_offsets, found 3"),
        (entry(dtype="F31"), "tensor 'a': dtype 'F31' is unknown"),
        (entry(dtype=[1]), r"tensor 'a': dtype \[1\] is unknown"),
        (entry(shape=[2, -3]), r"expected a shape of at most 8 whole numbers, found \[2, -3\]"),
        (entry(shape=[1] * 9), "expected a shape of at most 8"),
        (entry(shape=[2.0, 3]), "expected a shape of at most 8"),
        (entry(shape=[True, 6]), "expected a shape of at most 8"),
        (entry(data_offsets=[0]), r"expected two data_offsets, found \[0\]"),
        (entry(data_offsets=[24, 0]), r"F32 of shape \[2, 3\] takes 24 bytes, data_offsets are \[24, 0\]"),
        (entry(shape=[1 << 62, 1 << 62]), "data_offsets are"),
        (entry(shape=[7]), r"F32 of shape \[7\] takes 28 bytes, data_offsets are \[0, 24\]"),
        (entry(data_offsets=[1, 25]), r"its bytes begin at \d+, those before it end at \d+"),
        (entry(shape=[5], data_offsets=[0, 20]), r"the tensors end at byte \d+, the file at \d+"),
        (entry(shape=[8], data_offsets=[0, 32]), r"the tensors end at byte \d+, the file at \d+"),
        ({**entry(), "b": entry()["a"]}, "tensor 'b': its bytes begin at"),
        ({**entry(), "b": {"dtype": "U8", "shape": [4], "data_offsets": [20, 24]}}, "tensor 'b': its bytes begin at"),
    ],
)
def test_malformed_headers_are_refused(tmp_path: Path, header: Any, message: str) -> None:
    path = write(tmp_path, with_header(header, VALUES.tobytes()))
    with pytest.raises(CheckpointError, match=message) as error:
        SafetensorsFile.open(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "header: the file is empty"),
        (b"1234", "bytes long, the file has 4"),
        ((1 << 63).to_bytes(8, "little"), "header: 9223372036854775808 bytes long, the file has 8"),
        ((9).to_bytes(8, "little") + b"{}", "header: 9 bytes long, the file has 10"),
    ],
)
def test_short_files_are_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile.open(write(tmp_path, raw))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path, "a directory"), (tmp_path / "pipe", "no regular file")):
        with pytest.raises(CheckpointError, match=f"expected a safetensors file, this is {kind}"):
            SafetensorsFile.open(path)
    with pytest.raises(FileNotFoundError):
        SafetensorsFile.open(tmp_path / "nothing")


def test_a_file_that_was_shortened_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, safetensors_bytes({"a": encode(VALUES, "F32")}))
    file = SafetensorsFile.open(path)
    os.truncate(path, 10)
    with pytest.raises(CheckpointError, match="the file was shortened while it was open, to 10 bytes"):
        file.bytes_of(file.tensors["a"]).read()


@given(st.data())
def test_any_change_opens_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(safetensors_bytes({"a": encode(VALUES, "F16"), "b": encode(VALUES, "F32")}, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path, bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    try:
        file = SafetensorsFile.open(path)
    except CheckpointError:
        return
    assert sum(file.bytes_of(tensor).read().size for tensor in file.tensors.values()) <= len(raw)
