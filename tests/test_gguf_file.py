"""The GGUF reader: what it reads equals what gguf wrote, and whatever else it gets, it refuses in one clear line."""

import os
import re
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import gguf_builder as build
import numpy as np
import pytest
from gguf_builder import REFUSED_S, GGUFBuilder, array, f32, string, u32, u64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from woolly._kernels.scan import decode_strings, scan_strings
from woolly.errors import GGUFError
from woolly.gguf_file import MAX_KEYS, MAX_TENSORS, GGUFFile, TensorInfo
from woolly.metadata import StringArray

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
VOCABULARIES = sorted((SHARED_DATA / "vocab").glob("*.gguf"))


@pytest.fixture
def open_bytes(tmp_path):
    """Open a file that holds the given bytes."""
    path = tmp_path / "model.gguf"

    def opener(data):
        path.write_bytes(data)
        return GGUFFile.open(path)

    return opener


@pytest.fixture
def refused(open_bytes):
    """Check that the bytes are refused in one printable line that matches, within a second; return the message."""

    def check(data, match):
        start_s = time.process_time()
        with pytest.raises(GGUFError, match=match) as caught:
            open_bytes(data)
        assert time.process_time() - start_s < REFUSED_S
        message = str(caught.value)
        assert message.isprintable()
        assert len(message) < 1000
        return message

    return check


def small_file():
    """A file with a value of every type and tensors of three formats, as a builder."""
    return (
        GGUFBuilder()
        .key("general.architecture", build.STRING, string("llama"))
        .key("general.alignment", build.UINT32, u32(32))
        .key("llama.block_count", build.UINT32, u32(30))
        .key("llama.rope.freq_base", build.FLOAT32, f32(1e4))
        .key("a.bool", build.BOOL, b"\1")
        .key("a.floats", build.ARRAY, array(build.FLOAT32, [f32(0.5), f32(-1)]))
        .key("a.bools", build.ARRAY, array(build.BOOL, [b"\0", b"\1"]))
        .key("tokenizer.ggml.tokens", build.ARRAY, array(build.STRING, [string("a"), string(""), string("Gruß")]))
        .tensor("norm", [4], build.F32, struct.pack("<4f", 1, 2, 3, 4))
        .tensor("matrix", [32, 3], build.Q4_0, bytes(range(54)))
        .tensor("cube", [1, 2, 3], build.F16, bytes(12))
    )


# What can be read


def test_metadata_have_python_values(open_bytes):
    metadata = open_bytes(small_file().build()).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 30
    assert metadata["llama.rope.freq_base"] == 1e4
    assert metadata["a.bool"] is True
    np.testing.assert_array_equal(metadata["a.floats"], np.array([0.5, -1], np.float32), strict=True)
    np.testing.assert_array_equal(metadata["a.bools"], np.array([False, True]), strict=True)
    assert list(metadata["tokenizer.ggml.tokens"]) == ["a", "", "Gruß"]
    assert len(metadata) == 8
    assert "llama.block_count" in metadata
    assert metadata.get("absent") is None
    with pytest.raises(KeyError):
        metadata["absent"]


def test_arrays_are_aligned_and_read_only(open_bytes):
    floats = open_bytes(small_file().build()).metadata["a.floats"]
    assert floats.flags.aligned
    with pytest.raises(ValueError, match="read-only"):
        floats[0] = 1


def test_tensors_have_their_shape_outermost_first(open_bytes):
    tensors = open_bytes(small_file().build()).tensors
    assert list(tensors) == ["norm", "matrix", "cube"]
    assert [info.shape for info in tensors.values()] == [(4,), (3, 32), (3, 2, 1)]
    assert [info.format.name for info in tensors.values()] == ["f32", "q4_0", "f16"]
    assert [info.n_bytes for info in tensors.values()] == [16, 54, 12]
    assert all(isinstance(info, TensorInfo) and info.offset % 32 == 0 for info in tensors.values())


def test_tensor_bytes_are_read_whole_or_in_pieces(open_bytes):
    file = open_bytes(small_file().build())
    data = file.tensor_bytes("matrix")
    assert data.dtype == np.uint8
    assert data.tobytes() == bytes(range(54))
    stored = file.bytes_of("matrix")
    assert (stored.n_bytes, stored.read(50).tolist(), stored.read(3, 5).tolist()) == (54, [50, 51, 52, 53], [3, 4])
    with pytest.raises(KeyError):
        file.tensor_bytes("absent")


def test_what_was_read_outlives_the_file_and_more_is_refused(open_bytes):
    with open_bytes(small_file().tensor("big", [4096], data=bytes(16384)).build()) as file:
        data = file.tensor_bytes("matrix")
        tokens = file.metadata["tokenizer.ggml.tokens"]
    file.close()
    assert data[53] == 53
    assert tokens[2] == "Gruß"
    with pytest.raises(ValueError, match=r"model\.gguf': the file is closed$"):
        file.tensor_bytes("big")


def test_a_file_that_was_shortened_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(small_file().build())
    with GGUFFile.open(path) as file:
        os.truncate(path, 100)
        with pytest.raises(GGUFError, match="the file was shortened while it was open, to 100 bytes"):
            file.tensor_bytes("norm")


def test_a_file_that_was_overwritten_stays_within_its_bounds(tmp_path):
    """What was checked when it was opened is not read again, and so not trusted again."""
    path = tmp_path / "model.gguf"
    path.write_bytes(small_file().build())
    size = path.stat().st_size
    for byte in (b"\xff", b"\0", b"\x7f"):
        path.write_bytes(small_file().build())
        with GGUFFile.open(path) as file:
            with path.open("r+b", buffering=0) as other:
                other.write(byte * size)
            read_everything(file)


def test_a_file_that_was_replaced_is_read_as_it_was(tmp_path):
    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    path.write_bytes(small_file().build())
    expected = {name: GGUFFile.open(path).tensor_bytes(name).tobytes() for name in GGUFFile.open(path).tensors}
    other.write_bytes(b"GGUF")
    with GGUFFile.open(path) as file:
        other.replace(path)
        assert {name: file.tensor_bytes(name).tobytes() for name in file.tensors} == expected


def test_a_header_of_any_length_is_read(open_bytes):
    """In pieces that double, of which none ends where a field does."""
    words = [f"{i:0{i % 97}}" for i in range(40_000)]
    numbers = np.arange(300_001, dtype=np.float32)
    builder = GGUFBuilder().key("words", build.ARRAY, array(build.STRING, [string(word) for word in words]))
    builder.key("numbers", build.ARRAY, array(build.FLOAT32, [numbers.tobytes()], length=len(numbers)))
    builder.key("text", build.STRING, string("x" * 3_000_000)).tensor("last", [4], data=b"0123456789abcdef")
    file = open_bytes(builder.build())
    assert list(file.metadata["words"]) == words
    np.testing.assert_array_equal(file.metadata["numbers"], numbers)
    assert file.metadata["text"] == "x" * 3_000_000
    assert file.tensor_bytes("last").tobytes() == b"0123456789abcdef"


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_open(open_bytes, version):
    file = open_bytes(GGUFBuilder(version=version).build())
    assert (file.version, file.alignment, len(file.metadata), len(file.tensors)) == (version, 32, 0, 0)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_the_alignment_of_the_file_holds(open_bytes, alignment):
    builder = GGUFBuilder(alignment=alignment).key("general.alignment", build.UINT32, u32(alignment))
    file = open_bytes(builder.tensor("a", [1], data=b"abcd").tensor("b", [1], data=b"efgh").build())
    assert file.alignment == alignment
    assert file.tensor_bytes("b").tobytes() == b"efgh"


def test_tensors_out_of_order_and_with_gaps_open(open_bytes):
    builder = GGUFBuilder().tensor("late", [1], data=bytes(96) + b"late", offset=96).tensor("early", [8], offset=32)
    file = open_bytes(builder.build())
    assert file.tensor_bytes("late").tobytes() == b"late"
    assert file.tensors["early"].offset == file.tensors["late"].offset - 64


def test_string_arrays_are_sequences(open_bytes):
    words = [f"word {i} ü" for i in range(10)]
    builder = GGUFBuilder().key("words", build.ARRAY, array(build.STRING, [string(word) for word in words]))
    found = open_bytes(builder.build()).metadata["words"]
    assert isinstance(found, StringArray)
    assert (len(found), found[0], found[-1], found[2:9:3]) == (10, words[0], words[-1], words[2:9:3])
    assert found.tolist() == list(found) == words
    assert words[3] in found
    assert found.raw(3) == words[3].encode()
    assert repr(found) == "<StringArray of 10 strings>"
    for index in (10, -11):
        with pytest.raises(IndexError):
            found[index]


def test_invalid_utf8_in_values_is_replaced(open_bytes):
    builder = GGUFBuilder().key("one", build.STRING, string(b"a\xffb"))
    metadata = open_bytes(builder.key("many", build.ARRAY, array(build.STRING, [string(b"\xc3")])).build()).metadata
    assert metadata["one"] == "a\ufffdb"
    assert metadata["many"][0] == metadata["many"].tolist()[0] == "\ufffd"
    assert metadata["many"].raw(0) == b"\xc3"


def test_a_million_tokens_open_fast(open_bytes):
    data = GGUFBuilder().key("tokens", build.ARRAY, array(build.STRING, [string("token")] * 1_000_000)).build()
    start_s = time.process_time()
    file = open_bytes(data)
    assert time.process_time() - start_s < REFUSED_S
    assert file.metadata["tokens"][999_999] == "token"


def test_a_file_of_the_gguf_package_is_read_back(tmp_path):
    path = tmp_path / "written.gguf"
    rng = np.random.default_rng(0)
    values = {
        "uint8": 200, "int8": -100, "uint16": 60_000, "int16": -30_000, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 0.1, "bool": False, "string": "naïve",
    }  # fmt: skip
    arrays = {"ints": [1, 2, -3], "floats": [0.5, 1.5], "bools": [True, False], "strings": ["a", "", "日本"]}
    tensors = {"f32": rng.standard_normal((3, 5), np.float32), "f16": rng.standard_normal((2, 3, 4)).astype(np.float16)}
    packed = gguf.quantize(rng.standard_normal((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)

    writer = gguf.GGUFWriter(path, "llama")
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    for kind, value in arrays.items():
        writer.add_array(f"an.array.{kind}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.add_tensor("q8_0", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with GGUFFile.open(path) as file:
        assert {kind: file.metadata[f"a.{kind}"] for kind in values} == values
        assert {kind: file.metadata[f"an.array.{kind}"].tolist() for kind in arrays} == arrays
        assert {name: info.shape for name, info in file.tensors.items()} == {
            "f32": (3, 5), "f16": (2, 3, 4), "q8_0": (4, 64),
        }  # fmt: skip
        for name, tensor in [*tensors.items(), ("q8_0", packed)]:
            assert file.tensor_bytes(name).tobytes() == tensor.tobytes()


@pytest.mark.skipif(not VOCABULARIES, reason=f"no vocabularies in {SHARED_DATA.name}/vocab beside the checkout")
def test_real_vocabularies_equal_the_gguf_package():
    path = min(VOCABULARIES, key=lambda path: path.stat().st_size)
    expected = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if key[:5] != "GGUF."}
    found = GGUFFile.open(path).metadata
    assert {key: value.tolist() if hasattr(value, "tolist") else value for key, value in found.items()} == expected


# Typed access to metadata


def test_accessors_return_values_of_their_type(open_bytes):
    metadata = open_bytes(small_file().build()).metadata
    assert metadata.get_str("general.architecture") == "llama"
    assert metadata.get_int("llama.block_count") == 30
    assert metadata.get_float("llama.rope.freq_base") == 1e4
    assert metadata.get_bool("a.bool") is True
    assert metadata.get_array("a.floats", "float", length=2).tolist() == [0.5, -1]
    assert metadata.get_array("a.bools", "bool").tolist() == [False, True]
    assert metadata.get_array("tokenizer.ggml.tokens", "string", length=3)[0] == "a"
    assert metadata.get_int("absent", None) is None
    assert metadata.get_str("absent", default="x") == "x"
    assert metadata.get_array("absent", "int", default=()) == ()


@pytest.mark.parametrize(
    ("access", "match"),
    [
        (lambda m: m.get_int("absent"), r"model\.gguf': metadata has no key 'absent', expected an integer$"),
        (lambda m: m.get_array("absent", "int"), r"metadata has no key 'absent', expected an array of integers$"),
        (lambda m: m.get_int("a.bool"), r"key 'a\.bool' at byte \d+: expected an integer, got bool True$"),
        (lambda m: m.get_int("general.architecture"), r"expected an integer, got string 'llama'$"),
        (lambda m: m.get_int("llama.rope.freq_base"), r"expected an integer, got float32 10000\.0$"),
        (lambda m: m.get_float("llama.block_count"), r"expected a float, got uint32 30$"),
        (lambda m: m.get_bool("llama.block_count"), r"expected a bool, got uint32 30$"),
        (lambda m: m.get_str("a.floats"), r"expected a string, got array of float32 of length 2$"),
        (lambda m: m.get_array("a.bool", "bool"), r"expected an array of booleans, got bool True$"),
        (lambda m: m.get_array("a.floats", "int"), r"an array of integers, got array of float32 of length 2$"),
        (lambda m: m.get_array("a.floats", "float", length=3), r"array of 3 floats, got array of float32 of length 2$"),
        (lambda m: m.get_array("tokenizer.ggml.tokens", "float"), r"floats, got array of string of length 3$"),
    ],
)
def test_accessors_refuse_other_types(open_bytes, access, match):
    metadata = open_bytes(small_file().build()).metadata
    with pytest.raises(GGUFError, match=match):
        access(metadata)


def test_a_value_of_the_wrong_type_is_shown_escaped_and_short(open_bytes):
    metadata = open_bytes(GGUFBuilder().key("k", build.STRING, string("\x1b[31m" + "x" * 10**6)).build()).metadata
    with pytest.raises(GGUFError, match=r"expected an integer, got string '\\x1b\[31mx+…$") as caught:
        metadata.get_int("k")
    assert len(str(caught.value)) < 400


# What is no GGUF file


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        GGUFFile.open(tmp_path / "absent.gguf")


def test_a_directory(tmp_path):
    with pytest.raises(GGUFError, match=r": expected a GGUF file, this is a directory$"):
        GGUFFile.open(tmp_path)


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GGUFError, match=r"pipe': expected a GGUF file, this is no regular file$"):
        GGUFFile.open(tmp_path / "pipe")


def test_an_empty_file(refused):
    refused(b"", r"model\.gguf': magic at byte 0: the file is empty$")


def test_a_text_file(refused):
    refused(b"Hello, world\n", r"magic at byte 0: expected b'GGUF', found b'Hell': not a GGUF file$")


def test_a_file_shorter_than_the_magic(refused):
    refused(b"GG", r"magic at byte 0: expected b'GGUF', found b'GG': not a GGUF file$")


@pytest.mark.parametrize("version", [0, 1, 4, 2**32 - 1])
def test_an_unknown_version(refused, version):
    refused(GGUFBuilder(version=version).build(), rf"version at byte 4: expected 2 or 3, found {version}$")


def test_a_big_endian_file(refused):
    refused(GGUFBuilder(version=3 << 24).build(), r"version at byte 4: 0x03000000 belongs to a big-endian file, only")


def test_the_name_of_the_file_is_escaped(tmp_path):
    path = tmp_path / "a\n\x1b[31m.gguf"
    path.write_bytes(b"text")
    with pytest.raises(GGUFError, match=r"a\\n\\x1b\[31m\.gguf': magic at byte 0"):
        GGUFFile.open(path)


# Counts and lengths that lie


@pytest.mark.parametrize("count", [32_769, 2**32, 2**63, 2**64 - 1])
def test_number_of_tensors_beyond_the_limit(refused, count):
    match = rf"number of tensors at byte 8: {count} is more than the limit of 32768$"
    refused(small_file().build(n_tensors=count), match)


@pytest.mark.parametrize("count", [8_193, 2**63, 2**64 - 1])
def test_number_of_keys_beyond_the_limit(refused, count):
    refused(small_file().build(n_keys=count), rf"number of keys at byte 16: {count} is more than the limit of 8192$")


def test_more_tensors_than_the_file_can_hold(refused):
    refused(
        GGUFBuilder().build(n_tensors=5), r"number of tensors at byte 8: 5 entries need at least 165 bytes, the file"
    )


def test_more_keys_than_the_file_can_hold(refused):
    refused(
        GGUFBuilder().build(n_keys=9), r"number of keys at byte 16: 9 entries need at least 126 bytes, the file ends"
    )


def test_one_key_too_many(refused):
    data = GGUFBuilder().key("k", build.STRING, string("v" * 20)).header(n_keys=2)
    refused(data, rf"length of key 1 at byte {len(data)}: needs 8 bytes, the file ends at {len(data)}$")


@pytest.mark.parametrize("length", [2**48, 2**63, 2**64 - 1])
def test_key_length_beyond_the_limit(refused, length):
    data = GGUFBuilder().key("key", build.UINT32, u32(0), key_length=length).build()
    refused(data, rf"length of key 0 at byte 24: {length} is more than the limit of 65535$")


def test_key_length_past_the_file(refused):
    data = GGUFBuilder().key("key", build.UINT32, u32(0), key_length=1000).build()
    refused(data, rf"length of key 0 at byte 24: 1000 entries need at least 1000 bytes, the file ends at {len(data)}$")


@pytest.mark.parametrize("length", [2**48, 2**64 - 1])
def test_string_length_beyond_the_limit(refused, length):
    data = GGUFBuilder().key("k", build.STRING, string("x", length=length)).build()
    refused(data, rf"length of value of key 'k' at byte 37: {length} is more than the limit of 67108864$")


def test_string_length_past_the_file(refused):
    data = GGUFBuilder().key("k", build.STRING, string("x", length=100)).build()
    refused(data, r"length of value of key 'k' at byte 37: 100 entries need at least 100 bytes, the file ends at")


@pytest.mark.parametrize("element_type", [build.UINT8, build.FLOAT32, build.BOOL, build.STRING])
@pytest.mark.parametrize("length", [2**61, 2**64 - 1])
def test_array_length_beyond_the_limit(refused, element_type, length):
    data = GGUFBuilder().key("k", build.ARRAY, array(element_type, [], length=length)).build()
    refused(data, rf"length of value of key 'k' at byte 41: {length} is more than the limit of 134217728$")


@pytest.mark.parametrize(("element_type", "n_bytes"), [(build.UINT8, 1), (build.FLOAT64, 8), (build.STRING, 8)])
def test_array_length_past_the_file(refused, element_type, n_bytes):
    data = GGUFBuilder().key("k", build.ARRAY, array(element_type, [], length=1000)).build()
    refused(data, rf"value of key 'k' at byte 41: 1000 entries need at least {1000 * n_bytes} bytes, the file ends at")


@pytest.mark.parametrize("length", [40, 2**48, 2**63, 2**64 - 1])
def test_string_in_an_array_past_the_file(refused, length):
    strings = [string("fine"), string("x", length=length), string("never reached")]
    data = GGUFBuilder().key("k", build.ARRAY, array(build.STRING, strings)).build()
    match = rf"value of key 'k' at byte 49: string 1 at byte 61 has length {length}, \d+ bytes are left, the file ends"
    refused(data, match)


def test_array_of_strings_that_ends_early(refused):
    data = GGUFBuilder().key("k", build.ARRAY, array(build.STRING, [string(b"12345678")], length=2)).header()
    refused(
        data,
        r"value of key 'k' at byte 49: string 1 at byte 65 needs 8 bytes for its length, 0 are left, the file ends",
    )


def test_a_header_beyond_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("woolly.gguf_file.MAX_HEADER_BYTES", 100)
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUFBuilder().key("k", build.STRING, string("x" * 200)).build())
    with pytest.raises(GGUFError, match=r"200 entries need at least 200 bytes, a header may take 100 bytes$"):
        GGUFFile.open(path)


# Keys and values that are not what they should be


@pytest.mark.parametrize("value_type", [13, 2**31, 2**32 - 1])
def test_unknown_value_type(refused, value_type):
    data = GGUFBuilder().key("k", value_type, u64(0)).build()
    refused(data, rf"value of key 'k' at byte 33: value type {value_type} is unknown$")


@pytest.mark.parametrize("element_type", [13, 2**32 - 1])
def test_unknown_element_type(refused, element_type):
    data = GGUFBuilder().key("k", build.ARRAY, array(element_type, [], length=1)).build()
    refused(data, rf"element type of value of key 'k' at byte 37: value type {element_type} is unknown$")


def test_arrays_nested_100_000_deep(refused):
    data = GGUFBuilder().key("k", build.ARRAY, (u32(build.ARRAY) + u64(1)) * 100_000).build()
    refused(data, r"element type of value of key 'k' at byte 37: arrays of arrays are not supported$")


def test_bool_that_is_neither_0_nor_1(refused):
    data = GGUFBuilder().key("k", build.BOOL, b"\2").build()
    refused(data, r"value of key 'k' at byte 37: expected the byte 0 or 1 for a bool, found 2$")


def test_bool_in_an_array_that_is_neither_0_nor_1(refused):
    data = GGUFBuilder().key("k", build.ARRAY, array(build.BOOL, [b"\0", b"\1", b"\xff"])).build()
    refused(data, r"value of key 'k' at byte 51: expected the byte 0 or 1 for a bool, found 255$")


def test_duplicate_key(refused):
    data = GGUFBuilder().key("k", build.BOOL, b"\0").key("k", build.BOOL, b"\1").build()
    refused(data, r"key 1 at byte 38: 'k' was already at byte 24$")


def test_empty_key(refused):
    refused(GGUFBuilder().key("", build.UINT64, u64(0)).build(), r"key 0 at byte 24: is empty$")


def test_key_that_is_not_utf8(refused):
    data = GGUFBuilder().key(b"ab\xff", build.BOOL, b"\0").build()
    refused(data, r"key 0 at byte 24: b'ab\\xff' is not UTF-8: byte 0xff at 2$")


def test_control_characters_in_a_key_are_escaped(refused):
    data = GGUFBuilder().key("a\x1b[31m\n", 13, u64(0)).build()
    refused(data, r"value of key 'a\\x1b\[31m\\n' at byte 39: value type 13 is unknown$")


@pytest.mark.parametrize("alignment", [0, 1, 3, 4, 33, 2**22, 2**31, 2**32 - 1])
def test_alignment_that_is_no_sensible_power_of_two(refused, alignment):
    data = GGUFBuilder().key("general.alignment", build.UINT32, u32(alignment)).build()
    refused(data, rf"'general.alignment' at byte 24: expected a power of two from 8 to 2097152, found {alignment}$")


@pytest.mark.parametrize(
    ("value_type", "value", "name"),
    [
        (build.UINT64, u64(32), "uint64"),
        (build.INT32, u32(32), "int32"),
        (build.STRING, string("32"), "string"),
        (build.ARRAY, array(build.UINT32, [u32(32)]), "array of uint32"),
    ],
)
def test_alignment_of_the_wrong_type(refused, value_type, value, name):
    data = GGUFBuilder().key("general.alignment", value_type, value).build()
    refused(data, rf"key 'general.alignment' at byte 24: expected uint32, got {name}$")


# Tensors that cannot be


@pytest.mark.parametrize("n_dims", [0, 5, 2**31, 2**32 - 1])
def test_number_of_dimensions(refused, n_dims):
    data = GGUFBuilder().tensor("t", [1] * 5, n_dims=n_dims, data=bytes(4)).build()
    refused(data, rf"n_dims of tensor 't' at byte 33: expected 1 to 4, found {n_dims}$")


def test_zero_dimension(refused):
    data = GGUFBuilder().tensor("t", [32, 0]).build()
    refused(data, r"dimension 1 of tensor 't' at byte 45: expected at least 1, found 0$")


@pytest.mark.parametrize(
    "dims",
    [[2**32, 2**32], [4194305, 4194305, 211106198978564], [2**63], [2**64 - 1], [2**62, 2], [2**64 - 1] * 4],
    ids=str,
)
def test_product_of_dimensions_that_wraps(refused, dims):
    data = GGUFBuilder().tensor("t", dims, data=bytes(64)).build()
    refused(data, rf"dimensions of tensor 't' at byte 37: the product of {re.escape(str(dims))} passes 2\*\*63 - 1$")


@pytest.mark.parametrize("dims", [[2**62], [2**61 + 8], [2**63 - 1], [1000, 1000]], ids=str)
def test_tensor_larger_than_the_file(refused, dims):
    data = GGUFBuilder().tensor("t", dims, data=bytes(64)).build()
    n_bytes = 4 * int(np.prod(np.array(dims, object)))
    match = rf"dimensions of tensor 't' at byte 37: {re.escape(str(dims))} need {n_bytes} bytes, the file has \d+$"
    refused(data, match)


@pytest.mark.parametrize(
    ("dims", "ggml_type", "n_bytes"), [([2**62 - 1], build.F32, 2**64 - 4), ([2**63 - 1], 24, 2**63 - 1)]
)
def test_byte_size_that_wraps_on_padding(refused, dims, ggml_type, n_bytes):
    """Rounded up to the alignment, these are 0 in 64 bits, or negative."""
    data = GGUFBuilder().tensor("t", dims, ggml_type, bytes(64)).tensor("u", [16], data=bytes(64)).build()
    refused(data, rf"dimensions of tensor 't' at byte 37: \[{dims[0]}\] need {n_bytes} bytes, the file has \d+$")


@pytest.mark.parametrize("columns", [1, 31, 33])
def test_row_that_is_no_whole_number_of_blocks(refused, columns):
    data = GGUFBuilder().tensor("t", [columns, 32], build.Q4_0, bytes(1024)).build()
    refused(data, rf"dimension 0 of tensor 't' at byte 37: expected a multiple of q4_0's block of 32, found {columns}$")


@pytest.mark.parametrize("ggml_type", [4, 31, 1000, 2**31, 2**32 - 1])
def test_unknown_ggml_type(refused, ggml_type):
    data = GGUFBuilder().tensor("t", [32], ggml_type, bytes(128)).build()
    refused(data, rf"type of tensor 't' at byte 45: ggml type {ggml_type} is unknown$")


@pytest.mark.parametrize("offset", [1, 16, 2**64 - 1])
def test_offset_that_is_not_aligned(refused, offset):
    data = GGUFBuilder().tensor("t", [4], data=bytes(64), offset=offset).build()
    refused(data, rf"offset of tensor 't' at byte 49: expected a multiple of 32, found {offset}$")


@pytest.mark.parametrize("offset", [64, 2**32, 2**63, 2**64 - 32])
def test_offset_past_the_end(refused, offset):
    data = GGUFBuilder().tensor("t", [4], data=bytes(64), offset=offset).build()
    place = rf"16 bytes from byte {64 + offset} on end past the file's 128"
    refused(data, rf"offset of tensor 't' at byte 49: found {offset}: {place}$")


def test_tensor_that_ends_past_the_file(refused):
    data = GGUFBuilder().tensor("t", [9], data=bytes(32)).build()
    refused(data, r"offset of tensor 't' at byte 49: found 0: 36 bytes from byte 64 on end past the file's 96$")


def test_offsets_whose_running_sum_wraps(refused):
    # Sizes added up in 64 bits would come out small; nothing here is added up in 64 bits.
    builder = GGUFBuilder()
    for i in range(4):
        builder.tensor(f"t{i}", [2**60], data=bytes(32))
    refused(
        builder.build(), r"dimensions of tensor 't0' at byte 38: \[\d+\] need 4611686018427387904 bytes, the file has"
    )


def test_overlapping_tensors(refused):
    data = GGUFBuilder().tensor("a", [16], data=bytes(64)).tensor("b", [4], data=bytes(16), offset=32).build()
    overlap = r"its data begin at 128, those of tensor 'a' end at 160"
    refused(data, rf"offset of tensor 'b' at byte 82: {overlap}$")


def test_duplicate_tensor(refused):
    data = GGUFBuilder().tensor("a", [4], data=bytes(16)).tensor("a", [4], data=bytes(16)).build()
    refused(data, r"tensor 1 at byte 57: the name 'a' is taken by an earlier tensor$")


def test_empty_tensor_name(refused):
    refused(GGUFBuilder().tensor("", [4, 1], data=bytes(16)).build(), r"name of tensor 0 at byte 24: is empty$")


def test_tensor_name_that_is_not_utf8(refused):
    data = GGUFBuilder().tensor(b"\x80", [4], data=bytes(16)).build()
    refused(data, r"name of tensor 0 at byte 24: b'\\x80' is not UTF-8: byte 0x80 at 0$")


def test_long_tensor_name_with_escapes_is_cut(refused):
    data = GGUFBuilder().tensor("\x1b\u202e" * 9000, [4], 4, data=bytes(16)).build()
    refused(data, r"type of tensor '\\x1b\\u202e\\x1b[^ ]*… at byte \d+: ggml type 4 is unknown$")


def test_tensors_entry_that_ends_early(refused):
    data = GGUFBuilder().tensor("long name", [4]).header()[:-1]
    refused(data, r"dimensions, type and offset of tensor 'long name' at byte 45: needs 20 bytes, the file ends at 64$")


# Whole classes of damage


def test_truncation_at_every_byte(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(small_file().build())
    GGUFFile.open(path)
    for n_bytes in reversed(range(path.stat().st_size)):
        os.truncate(path, n_bytes)
        with pytest.raises(GGUFError):
            GGUFFile.open(path)


def read_everything(file):
    """Touch whatever a file that has opened says that it has."""
    for value in file.metadata.values():
        if isinstance(value, StringArray):
            value.tolist()
    for name, info in file.tensors.items():
        assert len(file.tensor_bytes(name)) == info.n_bytes == info.format.nbytes(int(np.prod(info.shape)))


def test_every_bit_flipped(tmp_path):
    builder = small_file()
    path = tmp_path / "model.gguf"
    path.write_bytes(builder.build())
    n_refused = 0
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(builder.header()):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
                try:
                    read_everything(GGUFFile.open(path))
                except GGUFError as error:
                    assert str(error).isprintable()  # noqa: PT017
                    n_refused += 1
            os.pwrite(file.fileno(), bytes([byte]), at)
    read_everything(GGUFFile.open(path))
    assert n_refused > 1000


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, 600), st.sampled_from([b"", b"\xff" * 8, bytes(8), u64(2**63)]) | st.binary(max_size=16)
        ),
        min_size=1,
        max_size=4,
    ),
    insert=st.booleans(),
)
def test_random_edits_open_or_are_refused(open_bytes, edits, insert):
    data = bytearray(small_file().build())
    for at, replacement in edits:
        data[at : at if insert else at + len(replacement)] = replacement
    try:
        read_everything(open_bytes(data))
    except GGUFError as error:
        assert str(error).isprintable()  # noqa: PT017


@pytest.mark.parametrize(
    "data",
    [
        GGUFBuilder().build(n_tensors=2**63),
        GGUFBuilder().key("k", build.ARRAY, array(build.STRING, [], length=10**6) + bytes(7 * 10**6)).build(),
        GGUFBuilder().key("k", build.ARRAY, array(build.STRING, [u64(2**40)], length=10**6) + bytes(9 * 10**6)).build(),
        GGUFBuilder().key("k", build.ARRAY, array(build.FLOAT32, [], length=2**61)).build(),
        GGUFBuilder().tensor("t", [2**40, 2**20], data=bytes(10**6)).build(),
    ],
    ids=["tensors", "short array", "long string", "array length", "dimensions"],
)
def test_a_refused_file_allocates_little(tmp_path, data):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError):
            GGUFFile.open(path)
        assert tracemalloc.get_traced_memory()[1] < len(data) + 200_000
    finally:
        tracemalloc.stop()


def test_a_file_with_all_allowed_keys_and_tensors_is_refused_in_a_second(refused):
    builder = GGUFBuilder()
    for i in range(MAX_KEYS):
        builder.key(f"{i}", build.BOOL, b"\0")
    for i in range(MAX_TENSORS):
        builder.tensor(f"{i}", [1], offset=32 * i)
    data = builder.build() + bytes(32 * (MAX_TENSORS - 1))
    refused(
        data, rf"offset of tensor '{MAX_TENSORS - 1}' at byte \d+: found \d+: 4 bytes from byte \d+ on end past the"
    )


# The kernel under the string arrays


def test_scan_and_decode_find_all_strings():
    words = ["", "a", "日本語", "x" * 300]
    data = np.frombuffer(b"??" + b"".join(map(string, words)), np.uint8)
    starts, lengths, end = scan_strings(data, 2, len(words))
    assert starts.dtype == lengths.dtype == np.int64
    assert end == len(data)
    assert decode_strings(data, starts, lengths) == words
    assert scan_strings(data, 2, 2)[2] == 2 + 8 + 9
    assert scan_strings(data, len(data), 0)[2] == len(data)


@pytest.mark.parametrize(
    ("offset", "count", "match"),
    [
        (-1, 0, r"^offset -1 is not within the 18 bytes$"),
        (19, 0, r"^offset 19 is not within the 18 bytes$"),
        (0, -1, r"^-1 strings at byte 0 do not fit into 18 bytes$"),
        (0, 3, r"^3 strings at byte 0 do not fit into 18 bytes$"),
        (0, 2, r"^string 1 at byte 9 has length 2, 1 bytes are left$"),
    ],
)
def test_scan_refuses_what_is_not_there(offset, count, match):
    data = np.frombuffer(string("a") + string("b", length=2), np.uint8)
    with pytest.raises(ValueError, match=match):
        scan_strings(data, offset, count)


@pytest.mark.parametrize("place", [(-1, 1), (0, 4), (3, 1), (4, 0), (0, -1), (2**63 - 1, 2**63 - 1)])
def test_decode_refuses_what_is_not_there(place):
    start, length = place
    with pytest.raises(ValueError, match=rf"^string 1 at byte {start} has length {length}, there are 3 bytes$"):
        decode_strings(np.zeros(3, np.uint8), np.array([0, start]), np.array([1, length]))


def test_kernels_refuse_other_arguments():
    data, places = np.zeros(8, np.uint8), np.zeros(1, np.int64)
    with pytest.raises(ValueError, match=r"^there are 1 starts and 2 lengths$"):
        decode_strings(data, places, np.zeros(2, np.int64))
    with pytest.raises(TypeError):
        scan_strings(None, 0, 0)
    with pytest.raises(TypeError):
        decode_strings(data, None, places)
    with pytest.raises(ValueError, match="dtype"):
        scan_strings(data.view(np.int8), 0, 0)
    with pytest.raises(ValueError, match="contiguous"):
        scan_strings(data[::2], 0, 0)
