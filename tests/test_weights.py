"""Tensors by name, against the shape that a model expects."""

import gguf
import numpy as np
import pytest
import reference
from gguf_builder import GGUFBuilder
from make_gguf import row_bytes, write_tiny_llama

from woolly.errors import GGUFError, UnsupportedFormatError
from woolly.gguf_file import GGUFFile
from woolly.weights import Weights


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "f64"])
def test_matrices_are_packed_and_counted(tmp_path, name: str) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", dtype=name)
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    with GGUFFile.open(path) as file:
        weights = Weights(file, n_threads=2)
        matrix = weights.matrix("blk.0.ffn_down.weight", (64, 128))
        vector = weights.vector("output_norm.weight", 64)
    tensor = stored["blk.0.ffn_down.weight"]
    assert (matrix.shape, matrix.format) == ((64, 128), name)
    assert matrix.dequantize().tobytes() == reference.dequantize(tensor.data, tensor.tensor_type).tobytes()
    np.testing.assert_array_equal(vector, stored["output_norm.weight"].data)
    stored_as = "f32" if name == "f64" else name
    assert weights.nbytes == matrix.nbytes + vector.nbytes == 64 * row_bytes(stored_as, 128) + 256


def test_one_tensor_may_hold_several_matrices(tmp_path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", dtype="q8_0")
    with GGUFFile.open(path) as file:
        weights = Weights(file)
        whole = Weights(file).matrix("blk.0.ffn_up.weight", (128, 64)).dequantize()
        parts = weights.matrices("blk.0.ffn_up.weight", (5, 70, 53), 64)
        assert [part.shape for part in parts] == [(5, 64), (70, 64), (53, 64)]
        assert np.concatenate([part.dequantize() for part in parts]).tobytes() == whole.tobytes()
        assert weights.nbytes == sum(part.nbytes for part in parts)
        with pytest.raises(GGUFError, match=r"has shape \(128, 64\), the configuration says \(127, 64\)"):
            weights.matrices("blk.0.ffn_up.weight", (5, 70, 52), 64)


def test_missing_and_misshapen_tensors_are_refused(tmp_path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    with GGUFFile.open(path) as file:
        weights = Weights(file)
        assert "output_norm.weight" in weights
        assert "output.weight" not in weights
        with pytest.raises(GGUFError, match=r"tiny.gguf: tensor 'output.weight' is missing"):
            weights.matrix("output.weight", (320, 64))
        message = r"tiny.gguf: tensor 'blk.0.attn_k.weight' at offset \d+ has shape \(32, 64\), the configuration says "
        with pytest.raises(GGUFError, match=message + r"\(64, 64\)"):
            weights.matrix("blk.0.attn_k.weight", (64, 64))
        with pytest.raises(GGUFError, match=r"has shape \(64,\), the configuration says \(65,\)"):
            weights.vector("output_norm.weight", 65)
        assert weights.nbytes == 0


@pytest.mark.parametrize(
    ("name", "ggml_type", "n_bytes"),
    [("nvfp4", 40, 72), ("i8", 24, 128), ("i16", 25, 256), ("i32", 26, 512), ("i64", 27, 1024)],
)
def test_formats_without_kernels_are_refused(tmp_path, name: str, ggml_type: int, n_bytes: int) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(GGUFBuilder().tensor("w", [64, 2], ggml_type, bytes(n_bytes)).build())
    with GGUFFile.open(path) as file:
        message = rf"odd.gguf: tensor 'w' is stored as {name}, which has no kernels yet; those that have: f32, f16"
        with pytest.raises(UnsupportedFormatError, match=message):
            Weights(file).matrix("w", (2, 64))


def test_tensors_that_nobody_takes_are_refused(tmp_path) -> None:
    path = tmp_path / "two.gguf"
    path.write_bytes(GGUFBuilder().tensor("a", [2], data=bytes(8)).tensor("b.bias", [2], data=bytes(8)).build())
    with GGUFFile.open(path) as file:
        weights = Weights(file)
        weights.vector("a", 2)
        with pytest.raises(GGUFError, match=r"two.gguf: tensor 'b.bias' has no place in this architecture"):
            weights.check_all_taken()
        weights.skip("b.bias")
        weights.check_all_taken()


def test_weights_outlive_the_file(tmp_path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", dtype="q8_0")
    with GGUFFile.open(path) as file:
        weights = Weights(file)
        matrix, vector = weights.matrix("token_embd.weight", (320, 64)), weights.vector("output_norm.weight", 64)
    path.unlink()
    assert np.isfinite(matrix.dequantize()).all()
    assert np.isfinite(vector).all()


def test_what_goes_wrong_meanwhile_ends_packing_before_the_next_tensor(tmp_path) -> None:
    wrong: list[GGUFError] = []

    def check() -> None:
        for error in wrong:
            raise error

    path = write_tiny_llama(tmp_path / "tiny.gguf", dtype="q8_0")
    with GGUFFile.open(path) as file:
        weights = Weights(file, check=check)
        weights.vector("output_norm.weight", 64)
        wrong.append(GGUFError("the vocabulary is bad"))
        with pytest.raises(GGUFError, match="the vocabulary is bad"):
            weights.matrix("token_embd.weight", (320, 64))
