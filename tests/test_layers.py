"""The parts of blocks: RoPE tables, and what each function records."""

import numpy as np
import pytest

from woolly.layers import RopeTable


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
