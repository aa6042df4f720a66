"""Whole mixtures of experts: the same bits however they are computed, every format, and files that are refused.

That the logits are right is `test_oracle.py`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import oracle_models as oracle
import pytest

import woolly
from woolly._kernels import kernel_formats
from woolly.errors import GGUFError, UnsupportedFormatError
from woolly.model import Model

MIXTURES = ("mixtral", "qwen3moe", "gpt-oss")
TOKENS = oracle.TOKENS[:70]


def load(path: Path, *, n_threads: int = 2) -> Model:
    return woolly.load_gguf(path, n_ctx=128, n_threads=n_threads, cache_dtype="f32")


def write(
    path: Path,
    name: str,
    *,
    change: Callable[[str, np.ndarray], dict[str, np.ndarray]] = lambda name, values: {name: values},
    raw_dtype: gguf.GGMLQuantizationType | None = None,
    **keys: Any,
) -> Path:
    """Write a model with keys changed, and each tensor as `change` has it: arrays by name, raw where they are bytes."""
    plain = gguf.GGUFWriter.add_tensor

    def add_tensor(writer: gguf.GGUFWriter, tensor: str, values: np.ndarray) -> None:
        for written, array in change(tensor, values).items():
            plain(writer, written, array, raw_dtype=raw_dtype if array.dtype == np.uint8 else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add_tensor)
        return oracle.write_gguf(oracle.MODELS[name], path, changes=keys)


@pytest.mark.parametrize("name", MIXTURES)
def test_same_bits_over_threads_chunks_and_batches(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "tiny.gguf", name)
    with load(path, n_threads=1) as model:
        logits = model.forward(TOKENS)
    for n_threads in (1, 2, 5):
        with load(path, n_threads=n_threads) as model:
            assert model.forward(TOKENS).tobytes() == logits.tobytes(), n_threads
            for chunk in (1, 7):
                fed = model.session().feed(TOKENS, logits="all", chunk=chunk)
                assert fed.tobytes() == logits.tobytes(), (n_threads, chunk)
            batch = [(model.engine.new_sequence(), part) for part in (TOKENS[5:40], TOKENS, TOKENS[:3])]
            assert model.engine.step(batch, logits="all")[1].tobytes() == logits.tobytes(), n_threads
            sequences = [sequence for sequence, _ in batch]
            last = model.engine.step([(sequence, [9]) for sequence in sequences])
            model.engine.step([(alone := model.engine.new_sequence(), TOKENS)])
            assert last[1].tobytes() == model.engine.step([(alone, [9])])[0].tobytes(), n_threads


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(
    "dtype", [name for name in ("F16", "Q8_0", "Q4_0", "MXFP4") if name.lower() in kernel_formats()]
)
def test_experts_of_other_formats(tmp_path: Path, name: str, dtype: str) -> None:
    """The same as their values in F32, but for the rounding of activations to 16 bits."""
    kind = gguf.GGMLQuantizationType[dtype]
    is_quantised = re.compile(r"blk\.\d+\.ffn_(gate|up)_exps\.weight").fullmatch

    def stored(tensor: str, values: np.ndarray) -> dict[str, np.ndarray]:
        return {tensor: gguf.quants.quantize(values, kind) if is_quantised(tensor) else values}

    def rounded(tensor: str, values: np.ndarray) -> dict[str, np.ndarray]:
        if is_quantised(tensor):
            values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        return {tensor: values}

    with load(write(tmp_path / "stored.gguf", name, change=stored, raw_dtype=kind)) as model:
        logits = model.forward(TOKENS)
    with load(write(tmp_path / "rounded.gguf", name, change=rounded)) as model:
        expected = model.forward(TOKENS)
    assert np.abs(logits - expected).max() < (2e-5 if dtype == "F16" else 5e-4) * np.abs(expected).max()


def test_memory_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", "qwen3moe")
    with load(path) as model:
        assert 1 < model.memory_plan().weights_bytes / path.stat().st_size < 1.15  # 40 rows are padded to 48


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("mixtral", {"expert_count": 5}, r"'blk.0.ffn_gate_inp.weight' at offset \d+ has shape \(4, 96\), the conf"),
        (
            "qwen3moe",
            {"expert_feed_forward_length": None},
            r"'blk.0.ffn_gate_exps.weight' at offset \d+ has shape \(12, 40, 96\), the configuration says \(12, 144,",
        ),
    ],
)
def test_keys_that_do_not_fit_are_refused(tmp_path: Path, name: str, keys: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "tiny.gguf", name, **keys)
    with pytest.raises(GGUFError, match=message):
        load(path)


@pytest.mark.parametrize(
    "tensor",
    ["ffn_gate_inp.weight", "ffn_gate_exps.weight", "ffn_down_exps.weight", "attn_sinks.weight"],
)
def test_missing_tensors_are_named(tmp_path: Path, tensor: str) -> None:
    path = write(
        tmp_path / "tiny.gguf",
        "gpt-oss",
        change=lambda name, values: {} if name == f"blk.1.{tensor}" else {name: values},
    )
    with pytest.raises(GGUFError, match=f"tensor 'blk.1.{tensor}' is missing"):
        load(path)


def test_biases_of_the_wrong_shape_are_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path / "tiny.gguf",
        "gpt-oss",
        change=lambda name, values: {name: values[:, :-1] if "up_exps.bias" in name else values},
    )
    message = r"'blk.0.ffn_up_exps.bias' at offset \d+ has shape \(6, 71\), the configuration says \(6, 72\)"
    with pytest.raises(GGUFError, match=message):
        load(path)


def split(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """A tensor an expert, as files of 2023 have them."""
    if "_exps" not in name:
        return {name: values}
    return {name.replace("_exps", f".{e}"): part for e, part in enumerate(values)}


def test_files_with_a_tensor_an_expert(tmp_path: Path) -> None:
    with load(write(tmp_path / "whole.gguf", "mixtral")) as whole:
        expected = whole.forward(TOKENS)
    with load(write(tmp_path / "split.gguf", "mixtral", change=split)) as model:
        assert model.forward(TOKENS).tobytes() == expected.tobytes()

    def mixed(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
        tensors = split(name, values)
        return {name: part.astype(np.float16) if ".2.weight" in name else part for name, part in tensors.items()}

    message = r"experts of 'blk\.0\.ffn_gate_exps\.weight' are stored as f16 and f32, not as one"
    with pytest.raises(UnsupportedFormatError, match=message):
        load(write(tmp_path / "mixed.gguf", "mixtral", change=mixed))
