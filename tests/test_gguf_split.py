"""Models in several files: opened by the first, and everything that keeps them from being opened."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_builder import INT32, UINT16, GGUFBuilder
from make_gguf import write_tiny_llama

import woolly
from woolly.errors import GGUFError
from woolly.gguf_file import GGUFFile
from woolly.gguf_split import SplitGGUFFile, open_gguf


def split(source: Path, folder: Path, *, tensors_a_part: int) -> list[Path]:
    """Write the model of a file again as parts, with the gguf package."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama", split_max_tensors=tensors_a_part)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("model-*-of-*.gguf"))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "whole.gguf", dtype="q8_0", vocab=320)


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    n_tensors = len(gguf.GGUFReader(whole).tensors)
    paths = split(whole, tmp_path, tensors_a_part=-(-n_tensors // 3))
    assert [path.name for path in paths] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return paths


def part(number: int, count: int, name: str, total: int | None = None) -> bytes:
    """A file of one tensor that says which part of how many it is."""
    builder = GGUFBuilder()
    builder.key("split.no", UINT16, struct.pack("<H", number - 1)).key("split.count", UINT16, struct.pack("<H", count))
    if total is not None:
        builder.key("split.tensors.count", INT32, struct.pack("<i", total))
    return builder.tensor(name, [2], data=bytes(8)).build()


def test_parts_are_one_model(whole: Path, parts: list[Path]) -> None:
    ids = [1, 70, 71, 72]
    with woolly.load_gguf(whole, n_ctx=64) as one, woolly.load_gguf(parts[0], n_ctx=64) as three:
        assert three.forward(ids).tobytes() == one.forward(ids).tobytes()


def test_parts_are_one_file(whole: Path, parts: list[Path]) -> None:
    with GGUFFile.open(whole) as one, open_gguf(parts[0]) as three:
        assert isinstance(three, SplitGGUFFile)
        assert len(three.parts) == 3
        assert three.path == str(parts[0])
        assert three.metadata.get_str("general.architecture") == "llama"
        assert set(three.tensors) == set(one.tensors)
        assert three.n_bytes == sum(path.stat().st_size for path in parts)
        for name, info in one.tensors.items():
            assert (three.tensors[name].shape, three.tensors[name].format) == (info.shape, info.format)
            np.testing.assert_array_equal(three.tensor_bytes(name), one.tensor_bytes(name))
    with pytest.raises(ValueError, match="the file is closed"):
        three.tensor_bytes("output_norm.weight")


def test_inspect_shows_all_parts(parts: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    from woolly import cli

    assert cli.main(["inspect", str(parts[0]), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "blk.0.attn_q.weight" in out
    assert "output_norm.weight" in out


def test_a_whole_file_is_opened_as_it_is(whole: Path, tmp_path: Path) -> None:
    with open_gguf(whole) as file:
        assert type(file) is GGUFFile
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(part(1, 1, "a"))
    with open_gguf(alone) as file:
        assert list(file.tensors) == ["a"]


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(GGUFError, match=r"part 2 of 3 is missing: expected '.*model-00002-of-00003\.gguf'"):
        woolly.load_gguf(parts[0])


def test_a_later_part_points_to_the_first(parts: list[Path]) -> None:
    with pytest.raises(GGUFError, match=r"this is part 3 of 3, not the first; open '.*model-00001-of-00003\.gguf'"):
        woolly.load_gguf(parts[2])
    renamed = parts[2].rename(parts[2].with_name("third.gguf"))
    with pytest.raises(GGUFError, match=r"third\.gguf': this is part 3 of 3, not the first$"):
        open_gguf(renamed)


def test_the_first_part_must_be_named_as_one(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("first.gguf"))
    with pytest.raises(GGUFError, match=r"the first of 3 parts must be named NAME-00001-of-00003\.gguf"):
        open_gguf(renamed)


def test_parts_of_different_models_are_refused(tmp_path: Path) -> None:
    first, second = (tmp_path / f"x-0000{i}-of-00002.gguf" for i in (1, 2))
    first.write_bytes(part(1, 2, "a"))
    second.write_bytes(part(2, 3, "b"))
    with pytest.raises(GGUFError, match=r"x-00002-of-00002\.gguf': expected part 2 of 2, this is part 2 of 3"):
        open_gguf(first)
    second.write_bytes(part(2, 2, "a"))
    with pytest.raises(GGUFError, match=r"x-00002-of-00002\.gguf': tensor 'a' is also in '.*x-00001-of-00002\.gguf'"):
        open_gguf(first)
    first.write_bytes(part(1, 2, "a", total=3))
    second.write_bytes(part(2, 2, "b"))
    with pytest.raises(GGUFError, match=r"split\.tensors\.count says 3, the parts hold 2"):
        open_gguf(first)
    second.write_bytes(b"GGUF")
    with pytest.raises(GGUFError, match=r"x-00002-of-00002\.gguf': version at byte 4"):
        open_gguf(first)
