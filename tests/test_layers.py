"""The parts of blocks: RoPE tables, and what each function records."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import oracle_models
import pytest

import woolly
from woolly.config import RopeScaling
from woolly.errors import GGUFError
from woolly.layers import RopeTable, yarn_ramp


@pytest.mark.parametrize(("n_rot", "theta"), [(2, 10.0), (16, 10_000.0), (64, 500_000.0), (256, 1e6)])
def test_rope_tables_are_the_published_angles(n_rot: int, theta: float) -> None:
    table = RopeTable(300, n_rot, theta)
    assert table.cos.shape == table.sin.shape == (300, n_rot // 2)
    assert table.cos.dtype == table.sin.dtype == np.float32
    for pos, i in ((0, 0), (1, 0), (299, n_rot // 2 - 1), (150, n_rot // 4)):
        angle = pos * theta ** (-2 * i / n_rot)
        # made in float64: what is left is the rounding to float32
        assert table.cos[pos, i] == np.float32(np.cos(angle))
        assert table.sin[pos, i] == np.float32(np.sin(angle))


def test_frequency_factors_divide() -> None:
    factors = np.array([1, 2, 8, 32], np.float32)
    table, plain = RopeTable(65, 8, 100.0, freq_factors=factors), RopeTable(65, 8, 100.0)
    np.testing.assert_array_equal(table.cos[:, 0], plain.cos[:, 0])
    np.testing.assert_allclose(table.sin[64, 1], plain.sin[32, 1], rtol=1e-6)
    np.testing.assert_allclose(table.cos[64, 2:], plain.cos[[8, 2], [2, 3]], rtol=1e-6)


def test_linear_scaling_divides_positions() -> None:
    scaled, plain = RopeTable(65, 8, 100.0, scaling=RopeScaling("linear", 4.0)), RopeTable(65, 8, 100.0)
    np.testing.assert_array_equal(scaled.cos[::4], plain.cos[:17])
    np.testing.assert_array_equal(scaled.sin[::4], plain.sin[:17])


def test_yarn_slows_what_turns_slowly() -> None:
    scaling = RopeScaling("yarn", 4.0, n_ctx_original=2048, attention_factor=0.5)
    slow = yarn_ramp(64, 10_000.0, scaling)
    turns = 2048 * 10_000.0 ** (-np.arange(0, 64, 2) / 64) / (2 * np.pi)
    assert (slow[turns > 40] == 0).all()
    assert (slow[turns < 0.7] == 1).all()
    assert (np.diff(slow) >= 0).all()
    table, plain = RopeTable(9, 64, 10_000.0, scaling=scaling), RopeTable(9, 64, 10_000.0)
    size = 0.5 * (1 + 0.1 * math.log(4))
    np.testing.assert_allclose(np.hypot(table.cos, table.sin), size, rtol=1e-6)
    np.testing.assert_allclose(table.cos[:, 0], size * plain.cos[:, 0], rtol=1e-6)
    np.testing.assert_allclose(table.sin[8, -1], size * plain.sin[2, -1], rtol=1e-6)


def test_ends_of_yarn_that_fall_together() -> None:
    scaling = RopeScaling("yarn", 4.0, n_ctx_original=1, beta_fast=1e6, beta_slow=1e5)
    assert yarn_ramp(8, 10_000.0, scaling).tolist() == [0, 1, 1, 1]


def test_frequency_factors_that_nothing_can_be_divided_by_are_refused(tmp_path: Path) -> None:
    model = oracle_models.MODELS["phi3-long-factors"]
    rope = {**model.rope, "long_factor": [0.0] * 12}
    path = tmp_path / "zero.gguf"
    oracle_models.write_gguf(dataclasses.replace(model, config={**model.config, "rope_parameters": rope}), path)
    with pytest.raises(GGUFError, match=r"'rope_factors_long\.weight': expected finite frequency factors above 0"):
        woolly.load_gguf(path)


def test_the_context_chooses_longropes_factors(tmp_path: Path) -> None:
    path = oracle_models.write_gguf(oracle_models.MODELS["phi3-long-factors"], tmp_path / "phi3.gguf")
    logits = {n_ctx: woolly.load_gguf(path, n_ctx=n_ctx).forward([5, 6, 7]).tobytes() for n_ctx in (64, 65, 256)}
    assert logits[64] != logits[65] == logits[256]
