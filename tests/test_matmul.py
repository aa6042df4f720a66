"""Packed matrices and their matmul: every format, on every instruction set.

Bounds follow from the roundings. u is the largest relative error of one in float32. A float format's element is a chain
of k fused multiply-adds: k u Σ|w||x|. A quantised format's element is a chain over blocks of 32, whose integer dot
products are exact; each block rounds its sum to float32, twice by its scales, and once into the chain. With
compute="int8" the activations' scale is no power of two, and rounds once more.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import reference
import strategies as sts
from hypothesis import given, settings
from hypothesis import strategies as st
from make_gguf import FLOATS, RANDOM_BLOCKS, random_blocks
from strategies import MatmulCase

from woolly._kernels import (
    PackedMatrix,
    aligned_empty,
    available_isas,
    converted_formats,
    dequantize,
    kernel_formats,
    matmul,
    quantize_q8,
    quantize_q16,
    use_isa,
)
from woolly._kernels.pages import Pages
from woolly.errors import UnsupportedFormatError, WoollyError

U = 2.0**-24

fewer_examples = settings(max_examples=settings.default.max_examples // 3)  # of each of the many formats
each_format = pytest.mark.parametrize("name", sts.FORMATS)
each_compute = pytest.mark.parametrize("compute", ["exact", "int8"])
each_kept_format = pytest.mark.parametrize("name", [name for name in sts.FORMATS if name not in sts.CONVERTED_FORMATS])
each_converted_format = pytest.mark.parametrize("name", sts.CONVERTED_FORMATS)


def pack(name: str, raw: np.ndarray) -> PackedMatrix:
    block_size, block_bytes = sts.block_shape(name)
    return PackedMatrix(len(raw), raw.shape[1] // block_bytes * block_size, name).pack(raw)


def minima(name: str, raw: np.ndarray) -> np.ndarray | float:
    """What each weight adds to its scale times its quant: the values of the same blocks with all quants at zero."""
    if name not in RANDOM_BLOCKS or not RANDOM_BLOCKS[name].has_minima:
        return 0.0
    begin, end = RANDOM_BLOCKS[name].quants
    blocks = raw.reshape(len(raw), -1, sts.block_shape(name)[1]).copy()
    blocks[:, :, begin:end] = 0
    return reference.dequantize(blocks.reshape(raw.shape), name).astype(np.float64)


def expected_and_bound(case: MatmulCase, compute: str) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, of activations as the kernel quantises them, and how far float32 may be from it."""
    w, x = reference.dequantize(case.raw, case.name).astype(np.float64), case.x.astype(np.float64)
    if case.name in FLOATS:
        return reference.matmul(w, x), (w.shape[1] + 1) * U * reference.matmul(np.abs(w), np.abs(x))
    x = reference.dequantize_activations(*(quantize_q16 if compute == "exact" else quantize_q8)(case.x))
    m = minima(case.name, case.raw)
    size = reference.matmul(np.abs(w - m) + np.abs(m), np.abs(x))
    return reference.matmul(w, x), (w.shape[1] // 32 + (5 if compute == "exact" else 6)) * U * size


def assert_equals_reference(case: MatmulCase, compute: str = "exact") -> None:
    expected, bound = expected_and_bound(case, compute)
    actual = matmul(pack(case.name, case.raw), case.x, compute=compute)
    assert (actual.dtype, actual.shape) == (np.float32, (len(case.x), len(case.raw)))
    excess = np.abs(actual - expected) - 1.01 * bound - 2.0**-126  # products below the normal range lose bits
    assert (excess <= 0).all(), f"{case.name}: off by {excess.max():g} more than the bound"


def assert_same_bits(compute: Callable[[int], np.ndarray]) -> None:
    """compute(n_threads) gives the same bytes on every instruction set, with one thread and with more."""
    expected = compute(1).tobytes()
    for isa in available_isas():
        with use_isa(isa):
            assert all(compute(n_threads).tobytes() == expected for n_threads in (1, 2, 3)), isa


# Packing


@each_kept_format
@fewer_examples
@given(sts.sizes(50, min_size=1), sts.sizes(40, min_size=1), sts.seeds, sts.n_threads)
def test_unpack_gives_back_what_was_packed(
    isa: str, name: str, n_rows: int, n_blocks: int, seed: int, n_threads: int
) -> None:
    n_blocks = max(1, n_blocks // 4) if sts.block_shape(name)[0] == 256 else n_blocks
    raw = sts.random_raw(seed, name, n_rows, n_blocks)
    packed = PackedMatrix(n_rows, n_blocks * sts.block_shape(name)[0], name).pack(raw, n_threads=n_threads)
    np.testing.assert_array_equal(packed.unpack(), raw)


@each_format
def test_packing_any_bytes_is_the_same_on_every_isa(name: str) -> None:
    """Also bytes that are no number: NaNs and infinities must come through as they are."""
    raw = np.random.default_rng(0).integers(0, 256, (35, 6 * sts.block_shape(name)[1]), np.uint8)
    images = set()
    for isa in available_isas():
        with use_isa(isa):
            packed = pack(name, raw)
            if name not in sts.CONVERTED_FORMATS:
                np.testing.assert_array_equal(packed.unpack(), raw)
            images.add(packed.data.tobytes())
    assert len(images) == 1


@each_format
def test_a_matrix_packed_under_one_isa_serves_all(name: str) -> None:
    raw, x = sts.random_raw(1, name, 40, 2), sts.random_floats(2, (3, 2 * sts.block_shape(name)[0]))
    with use_isa("scalar"):
        packed = pack(name, raw)
    assert_same_bits(lambda n_threads: matmul(packed, x, n_threads=n_threads))


@each_format
def test_packed_size_is_the_source_padded_to_whole_groups(name: str) -> None:
    block_size, block_bytes = sts.block_shape(name)[0], sts.stored_bytes(name)
    packed = PackedMatrix(33, 3 * block_size, name)
    assert packed.shape == (packed.n_rows, packed.n_cols) == (33, 3 * block_size)
    assert (packed.format, packed.nbytes, packed.data) == (name, 48 * 3 * block_bytes, None)
    packed.pack(sts.random_raw(0, name, 33, 3))
    assert packed.data.nbytes == packed.nbytes
    assert packed.data.ctypes.data % 64 == 0


@each_format
def test_packing_again_replaces(name: str) -> None:
    packed = pack(name, sts.random_raw(0, name, 17, 2))
    again = sts.random_raw(1, name, 17, 2)
    assert packed.pack(again) is packed
    assert packed.dequantize().tobytes() == reference.dequantize(again, name).tobytes()


@each_format
def test_packing_in_pieces_is_packing_the_whole(name: str) -> None:
    raw = sts.random_raw(0, name, 51, 3)
    whole, pieces = pack(name, raw), PackedMatrix(51, 3 * sts.block_shape(name)[0], name)
    for first, end in ((16, 48), (48, 51), (0, 16), (16, 16)):
        pieces.pack(raw[first:end], first=first, n_threads=2)
    assert pieces.data.tobytes() == whole.data.tobytes()


@each_format
def test_packing_from_a_file_is_packing_its_rows(name: str, tmp_path: Path) -> None:
    block_size = sts.block_shape(name)[0]
    n_blocks = -(-20_000 // block_size)  # 16 rows are more than what is read at once, or less: by the format
    raw = sts.random_raw(7, name, 51, n_blocks)
    (tmp_path / "rows").write_bytes(b"before" + raw.tobytes() + b"after")
    read, pieces = (PackedMatrix(51, n_blocks * block_size, name) for _ in range(2))
    with (tmp_path / "rows").open("rb") as file:
        read.pack_file(file, 6, n_threads=3)
        for first, end in ((32, 51), (0, 32), (16, 16)):
            pieces.pack_file(file, 6 + first * raw.shape[1], first=first, n_rows=end - first, n_threads=1)
        assert file.tell() == 0
    expected = pack(name, raw).data.tobytes()
    assert read.data.tobytes() == expected
    assert pieces.data.tobytes() == expected


def test_a_file_that_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    matrix = PackedMatrix(51, 32, "q8_0")
    (tmp_path / "rows").write_bytes(bytes(51 * 34))
    with (tmp_path / "rows").open("rb") as file:
        for n_threads in (1, 2):
            with pytest.raises(EOFError):
                matrix.pack_file(file, 1, n_threads=n_threads)
        with pytest.raises(ValueError, match="whole groups of 16 of the 51 rows, got 3 from 32 on"):
            matrix.pack_file(file, 0, first=32, n_rows=3)
    with (tmp_path / "rows").open("r+b") as file, (tmp_path / "other").open("wb") as unreadable:
        with pytest.raises(OSError, match="the rows cannot be read") as error:
            matrix.pack_file(unreadable, 0)
        assert error.value.errno == errno.EBADF
        assert matrix.pack_file(file, 0).unpack().tobytes() == bytes(51 * 34)


@pytest.mark.parametrize(("first", "n"), [(-16, 16), (8, 16), (0, 15), (32, 8), (48, 16), (16, 51)])
def test_pieces_are_whole_groups(first: int, n: int) -> None:
    matrix = PackedMatrix(51, 32, "q8_0")
    message = f"pack: expected whole groups of 16 of the 51 rows, got {n} from {first} on"
    with pytest.raises(ValueError, match=message):
        matrix.pack(np.zeros((n, 34), np.uint8), first=first)


def test_memory_may_come_from_elsewhere() -> None:
    memory, raw = Pages(1 << 16), sts.random_raw(0, "q4_0", 33, 2)
    matrices = [PackedMatrix(33, 64, "q4_0").reserve(take=memory.take).pack(raw) for _ in range(2)]
    assert all((matrix.unpack() == raw).all() for matrix in matrices)
    first, second = (matrix.data.ctypes.data for matrix in matrices)
    assert second - first == -(-matrices[0].nbytes // 64) * 64


@each_converted_format
def test_converted_formats_cannot_be_unpacked(name: str) -> None:
    packed = pack(name, sts.random_raw(0, name, 17, 2))
    message = f"unpack: {name} is converted when it is packed; dequantize gives its values"
    with pytest.raises(ValueError, match=message):
        packed.unpack()
    assert name in converted_formats()


def test_wrong_shapes_and_formats_are_refused() -> None:
    with pytest.raises(UnsupportedFormatError, match="format 'q9_9' has no kernels; those that have: f32, f16"):
        PackedMatrix(1, 32, "q9_9")
    for shape in ((0, 32), (1, 0), (-1, 32)):
        with pytest.raises(ValueError, match=rf"expected a shape of at least \(1, 1\), got \({shape[0]}, {shape[1]}\)"):
            PackedMatrix(*shape, "q4_0")
    with pytest.raises(ValueError, match="PackedMatrix: q6_k wants a multiple of 256 columns, got 128"):
        PackedMatrix(1, 128, "q6_k")
    with pytest.raises(TypeError, match=r"positional arguments|exactly 3"):
        PackedMatrix(1, 32)


def test_wrong_rows_are_refused() -> None:
    packed = PackedMatrix(2, 64, "q4_0")
    for shape in ((2, 35), (3, 36), (0, 36)):
        message = rf"pack: expected q4_0 rows of shape \(2, 36\) bytes, got \({shape[0]}, {shape[1]}\)"
        with pytest.raises(ValueError, match=message):
            packed.pack(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="Buffer dtype mismatch"):
        packed.pack(np.zeros((2, 36), np.int8))
    with pytest.raises(ValueError, match="not C-contiguous"):
        packed.pack(np.zeros((36, 2), np.uint8).T)
    with pytest.raises(TypeError, match="'rows' must not be None"):
        packed.pack(None)
    with pytest.raises(WoollyError, match="n_threads: expected an integer of 1 to 256, got 0"):
        packed.pack(np.zeros((2, 36), np.uint8), n_threads=0)


def test_nothing_can_be_done_before_packing() -> None:
    packed = PackedMatrix(2, 64, "q4_0")
    calls = (
        packed.unpack,
        packed.dequantize,
        lambda: packed.rows(np.zeros(1, np.int64)),
        lambda: matmul(packed, np.zeros((1, 64), np.float32)),
    )
    for call in calls:
        with pytest.raises(ValueError, match="PackedMatrix: nothing was packed yet"):
            call()


def test_aligned_memory() -> None:
    for n_bytes, align in ((1, 64), (65, 128), (100, 4096)):
        memory = aligned_empty(n_bytes, align=align)
        assert (memory.shape, memory.dtype, memory.ctypes.data % align) == ((n_bytes,), np.uint8, 0)


# Dequantisation


@each_format
@fewer_examples
@given(sts.sizes(20), sts.sizes(20), sts.seeds)
def test_dequantize_is_the_published_one(isa: str, name: str, n_rows: int, n_blocks: int, seed: int) -> None:
    raw = sts.random_raw(seed, name, n_rows, n_blocks)
    values = dequantize(raw, name)
    assert (values.dtype, values.shape) == (np.float32, (n_rows, n_blocks * sts.block_shape(name)[0]))
    if raw.size:
        assert values.tobytes() == reference.dequantize(raw, name).tobytes()


@pytest.mark.parametrize("name", sts.QUANTISED_FORMATS)
def test_dequantize_of_extreme_scales(isa: str, name: str) -> None:
    """The largest, the least and subnormal scales, of either sign; of those in powers of two every one."""
    rng = np.random.default_rng(11)
    most = 65000 / max(map(abs, RANDOM_BLOCKS[name].scale_ratios))
    scales = rng.choice(np.array([most, 2.0**-14, 2.0**-24, 1023 * 2.0**-24, 0.0]), (6, 8))
    raw = random_blocks(rng, name, 6, 8, np.copysign(scales, rng.choice((-1, 1), (6, 8))).astype(np.float16))
    if name == "mxfp4":
        raw = np.resize(raw, (256, raw.shape[1]))
        raw[:, 0] = np.arange(256)
    with np.errstate(over="ignore"):
        assert dequantize(raw, name).tobytes() == reference.dequantize(raw, name).tobytes()


@each_format
def test_embedding_rows_are_dequantised(isa: str, name: str) -> None:
    raw = sts.random_raw(3, name, 37, 2)
    packed, values = pack(name, raw), reference.dequantize(raw, name)
    index = np.array([36, 0, 0, 16, 15], np.int64)
    assert packed.rows(index).tobytes() == values[index].tobytes()
    assert packed.rows(index[:0]).shape == (0, values.shape[1])
    assert packed.dequantize().tobytes() == values.tobytes()


@pytest.mark.parametrize("index", [-1, 37, 2**40, -(2**63)])
def test_embedding_rows_outside_are_refused(index: int) -> None:
    packed = pack("q8_0", sts.random_raw(3, "q8_0", 37, 2))
    with pytest.raises(IndexError, match=rf"rows: index {index} is not in \[0, 37\)"):
        packed.rows(np.array([0, index], np.int64))


def test_dequantize_refuses_what_is_no_block() -> None:
    with pytest.raises(ValueError, match="dequantize: q4_0 rows are multiples of 18 bytes, got 19"):
        dequantize(np.zeros((1, 19), np.uint8), "q4_0")
    with pytest.raises(UnsupportedFormatError, match="format 'i8' has no kernels"):
        dequantize(np.zeros((1, 18), np.uint8), "i8")
    with pytest.raises(TypeError, match="'rows' must not be None"):
        dequantize(None, "q4_0")
    with pytest.raises(TypeError, match="'index' must not be None"):
        pack("q8_0", sts.random_raw(3, "q8_0", 1, 1)).rows(None)
    with pytest.raises(ValueError, match="Buffer dtype mismatch"):
        pack("q8_0", sts.random_raw(3, "q8_0", 1, 1)).rows(np.zeros(1, np.int32))


# Matmul


@each_format
@fewer_examples
@given(st.data())
def test_matmul(isa: str, name: str, data: st.DataObject) -> None:
    case = data.draw(sts.matmul_cases(name))
    assert_equals_reference(case)
    assert_equals_reference(case, "int8")


@each_format
@fewer_examples
@given(st.data())
def test_matmul_same_bits(name: str, data: st.DataObject) -> None:
    case = data.draw(sts.matmul_cases(name))
    packed = pack(name, case.raw)
    for compute in ("exact", "int8"):
        assert_same_bits(lambda n_threads, how=compute: matmul(packed, case.x, compute=how, n_threads=n_threads))


@each_format
@each_compute
@pytest.mark.parametrize(
    ("n_rows", "n_blocks", "n"), [(1, 1, 1), (16, 1, 130), (33, 5, 97), (47, 70, 7), (64, 9, 257), (100, 9, 30)]
)
def test_matmul_past_every_tile(isa: str, name: str, n_rows: int, n_blocks: int, n: int, compute: str) -> None:
    """Columns beyond a block of them, k beyond a tile, rows that are no whole group."""
    block_size = sts.block_shape(name)[0]
    n_blocks = n_blocks if block_size < 256 else max(1, n_blocks // 8)
    n_blocks = n_blocks * 32 + 1 if block_size == 1 else n_blocks
    x = sts.random_floats(5, (n, n_blocks * block_size))
    assert_equals_reference(MatmulCase(name, sts.random_raw(4, name, n_rows, n_blocks), x), compute)


@each_format
@each_compute
def test_a_column_is_the_same_alone_and_among_others(isa: str, name: str, compute: str) -> None:
    block_size = sts.block_shape(name)[0]
    n_blocks = {1: 300, 32: 11}.get(block_size, 3)
    packed = pack(name, sts.random_raw(6, name, 141, n_blocks))
    x = sts.random_floats(7, (140, n_blocks * block_size))
    whole = matmul(packed, x, compute=compute)
    for n in (*range(1, 18), 21, 26, 31, 34, 43, 48, 49, 57, 60, 64, 65, 75, 97, 129):
        assert matmul(packed, x[-n:], compute=compute).tobytes() == whole[-n:].tobytes(), n


@pytest.mark.parametrize("name", sts.QUANTISED_FORMATS)
def test_dot_products_that_floats_cannot_hold_are_rounded_once(isa: str, name: str) -> None:
    """Columns that follow the signs of a row, so that sums of integers pass 2^24."""
    n_blocks = 3 if sts.block_shape(name)[0] == 32 else 2
    raw = sts.random_raw(8, name, 75, n_blocks)
    values = reference.dequantize(raw, name)
    signs = np.where((values < 0) & (not RANDOM_BLOCKS[name].has_minima), -1, 1)
    x = (signs * np.random.default_rng(9).uniform(0.97, 0.996, signs.shape)).astype(np.float32)
    packed = pack(name, raw)
    with use_isa("scalar"):
        whole = matmul(packed, x)
    for n in (8, 9, 33, 64, 75):
        assert matmul(packed, x[:n]).tobytes() == whole[:n].tobytes(), n


@each_format
def test_a_row_is_the_same_alone_and_in_a_task_of_many(isa: str, name: str) -> None:
    block_size = sts.block_shape(name)[0]
    raw = sts.random_raw(6, name, 600, {1: 40, 32: 5}.get(block_size, 2))
    packed = pack(name, raw)
    x = sts.random_floats(7, (76, packed.n_cols))
    for n in (16, 48, 76):
        whole = matmul(packed, x[:n], n_threads=1)
        assert matmul(pack(name, raw[-20:]), x[:n]).tobytes() == whole[:, -20:].tobytes(), n


@pytest.mark.parametrize("name", sts.QUANTISED_FORMATS)
@each_compute
def test_extreme_quants_do_not_saturate(isa: str, name: str, compute: str) -> None:
    """All bits of the quants set and cleared, against the largest activations of either sign."""
    raw = sts.random_raw(8, name, 4, 1)
    begin, end = RANDOM_BLOCKS[name].quants
    for row, byte in enumerate((0x00, 0xFF, 0x80, 0x7F)):
        raw[row, begin:end] = byte
    k = sts.block_shape(name)[0]
    signs = np.where(np.arange(k) % 2, -1, 1)
    x = np.stack([np.full(k, 32639), np.full(k, -32639), 32639 * signs, np.full(k, 128), np.full(k, -127)] * 10)
    assert_equals_reference(MatmulCase(name, raw, x.astype(np.float32)), compute)


@each_format
@each_compute
def test_a_column_that_is_not_finite_spoils_no_other(isa: str, name: str, compute: str) -> None:
    k = 2 * sts.block_shape(name)[0]
    packed, x = pack(name, sts.random_raw(9, name, 20, 2)), sts.random_floats(10, (60, k))
    expected = matmul(packed, x, compute=compute)
    for n, value in ((60, np.nan), (50, np.nan), (30, np.nan), (9, np.nan), (9, np.inf), (3, np.nan)):
        spoiled = x[:n].copy()
        spoiled[1, 0] = value
        actual = matmul(packed, spoiled, compute=compute)
        assert not np.isfinite(actual[1]).any()
        assert np.delete(actual, 1, 0).tobytes() == np.delete(expected[:n], 1, 0).tobytes()


@each_format
def test_out_is_used_and_no_tokens_are_fine(isa: str, name: str) -> None:
    packed, x = pack(name, sts.random_raw(1, name, 19, 1)), sts.random_floats(2, (3, sts.block_shape(name)[0]))
    out = np.full((3, 19), np.nan, np.float32)
    assert matmul(packed, x, out=out) is out
    assert out.tobytes() == matmul(packed, x).tobytes()
    assert matmul(packed, x[:0]).shape == (0, 19)


def test_matmul_refuses_what_does_not_fit() -> None:
    packed, x = pack("q4_0", sts.random_raw(1, "q4_0", 19, 2)), np.zeros((3, 64), np.float32)
    with pytest.raises(ValueError, match=r"matmul: x has 32 columns, w \(q4_0\) expects 64"):
        matmul(packed, x[:, :32].copy())
    with pytest.raises(TypeError, match="'x' must not be None"):
        matmul(packed, None)
    with pytest.raises(TypeError, match="got NoneType"):
        matmul(None, x)
    with pytest.raises(ValueError, match="expected 'const float' but got 'double'"):
        matmul(packed, x.astype(np.float64))
    with pytest.raises(ValueError, match="not C-contiguous"):
        matmul(packed, np.asfortranarray(x))
    with pytest.raises(WoollyError, match="n_threads: expected an integer of 1 to 256, got 300"):
        matmul(packed, x, n_threads=300)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((3, 18), np.float32), r"must be a float32 array of shape \(3, 19\), got float32 \(3, 18\)"),
        (np.zeros((3, 19), np.float16), r"must be a float32 array of shape \(3, 19\), got float16 \(3, 19\)"),
        ("out", r"must be a float32 array of shape \(3, 19\), got str"),
        (np.zeros((19, 3), np.float32).T, "must be C-contiguous and writable"),
        (np.broadcast_to(np.float32(0), (3, 19)), "must be C-contiguous and writable"),
    ],
)
def test_matmul_refuses_a_bad_out(out: object, message: str) -> None:
    packed = pack("q4_0", sts.random_raw(1, "q4_0", 19, 2))
    with pytest.raises(ValueError, match=f"matmul: out {message}"):
        matmul(packed, np.zeros((3, 64), np.float32), out=out)


@pytest.mark.parametrize("name", ["f32", "q8_0"])
def test_matmul_refuses_to_write_over_its_input(name: str) -> None:
    x = sts.random_floats(2, (3, 32))
    packed = pack(name, sts.random_raw(1, name, 32, 32 // sts.block_shape(name)[0]))
    with pytest.raises(ValueError, match="matmul: out shares memory with x"):
        matmul(packed, x, out=x)


def test_two_python_threads_at_once() -> None:
    cases = [(pack(name, sts.random_raw(1, name, 70, 256 // sts.block_shape(name)[0]))) for name in sts.FORMATS]
    x = sts.random_floats(2, (40, 256))
    expected = [matmul(packed, x).tobytes() for packed in cases]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            assert [y.tobytes() for y in pool.map(lambda packed: matmul(packed, x, n_threads=2), cases)] == expected


def test_every_kernel_format_is_tested() -> None:
    assert set(sts.FORMATS) == set(kernel_formats())
    assert set(sts.CONVERTED_FORMATS) == set(converted_formats())
