"""Hypothesis strategies: the vocabulary of all property tests.

A strategy draws shapes and a seed and makes arrays with numpy from the seed: drawing element by element would be a
hundred times slower and shrink no better. Sizes lean to the edges: 0, 1, and one short of, at and past a multiple of
the lanes. Imports nothing of woolly.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from make_gguf import FLOATS, LUT4, RANDOM_BLOCKS, ggml_type_of, random_blocks, store_floats

LANES = 16
"""Rows that packed weights interleave, and lanes of every reduction."""

QUANTISED_FORMATS = tuple(RANDOM_BLOCKS)
FORMATS = (*FLOATS, *QUANTISED_FORMATS)
CONVERTED_FORMATS = ("f64", *LUT4)
"""Formats that are stored as another one when they are packed."""

seeds = st.integers(0, 2**32 - 1)
n_threads = st.sampled_from((1, 2, 3, 4, 7))
format_names = st.sampled_from(FORMATS)
quantised_format_names = st.sampled_from(QUANTISED_FORMATS)


def block_shape(name: str) -> tuple[int, int]:
    """Values and bytes of a block of a format; (1, bytes of an element) for the float formats."""
    return gguf.GGML_QUANT_SIZES[ggml_type_of(name)]


def stored_bytes(name: str) -> int:
    """Bytes of a block when it is packed."""
    return 4 if name == "f64" else 149 if name in LUT4 else block_shape(name)[1]


def sizes(max_size: int, *, min_size: int = 0, lanes: int = LANES) -> st.SearchStrategy[int]:
    """Lengths from min_size to max_size, most of them at the edges of whole groups of lanes."""
    edges = {0, 1, 2, *(multiple + off for multiple in range(lanes, max_size + 2, lanes) for off in (-1, 0, 1))}
    edges = sorted(edge for edge in edges if min_size <= edge <= max_size)
    anywhere = st.integers(min_size, max_size)
    return st.sampled_from(edges) | anywhere if edges else anywhere


def random_floats(seed: int, shape: tuple[int, ...], *, magnitude: float = 1.0) -> npt.NDArray[np.float32]:
    """Normal values times magnitude, a few of them zero and a few a hundred times as large, as in activations."""
    rng = np.random.default_rng(seed)
    x = magnitude * rng.standard_normal(shape)
    kind = rng.random(shape)
    return np.where(kind < 0.02, 0, np.where(kind > 0.99, 100 * x, x)).astype(np.float32)


@st.composite
def float_arrays(
    draw: st.DrawFn, shape: tuple[int, ...] | st.SearchStrategy[tuple[int, ...]], *, max_exponent: int = 3
) -> npt.NDArray[np.float32]:
    """Finite float32 arrays of a shape, given or drawn, of magnitude 10^-max_exponent to 10^max_exponent."""
    shape = draw(shape) if isinstance(shape, st.SearchStrategy) else shape
    exponent = draw(st.integers(-max_exponent, max_exponent))
    return random_floats(draw(seeds), shape, magnitude=10.0**exponent)


def float_matrices(
    *, max_rows: int = 40, max_cols: int = 100, min_rows: int = 0, min_cols: int = 1, max_exponent: int = 3
) -> st.SearchStrategy[npt.NDArray[np.float32]]:
    """Finite float32 matrices of odd shapes, C-contiguous."""
    shapes = st.tuples(sizes(max_rows, min_size=min_rows), sizes(max_cols, min_size=min_cols))
    return float_arrays(shapes, max_exponent=max_exponent)


@st.composite
def raw_blocks(draw: st.DrawFn, name: str, n_rows: int, n_blocks: int) -> npt.NDArray[np.uint8]:
    """Stored rows of a format: uint8 (n_rows, n_blocks · block_bytes), every byte pattern of the integers possible.

    Scales are finite fp16 of either sign from 2^-12 to 2^-2, a few of them zero or subnormal; float formats hold finite
    values. A block of a float format is one value.
    """
    return random_raw(draw(seeds), name, n_rows, n_blocks)


def random_raw(seed: int, name: str, n_rows: int, n_blocks: int) -> npt.NDArray[np.uint8]:
    """What `raw_blocks` draws, from a seed."""
    shape = (n_rows, n_blocks)
    if name in FLOATS:
        return store_floats(random_floats(seed, shape), name)
    rng = np.random.default_rng(seed)
    scales = rng.choice((-1, 1), shape) * 2 ** rng.uniform(-12, -2, shape)
    kind = rng.random(shape)
    scales = np.where(kind < 0.02, 0, np.where(kind > 0.98, 1e-6, scales)).astype(np.float16)
    return random_blocks(rng, name, n_rows, n_blocks, scales)


@dataclass(frozen=True)
class MatmulCase:
    """Weights as stored and activations for them."""

    name: str
    raw: npt.NDArray[np.uint8]  # (n_rows, row_bytes)
    x: npt.NDArray[np.float32]  # (n, k)


@st.composite
def matmul_cases(draw: st.DrawFn, name: str, *, max_rows: int = 50, max_k: int = 600, max_n: int = 20) -> MatmulCase:
    """Matmuls of one format with odd numbers of rows and columns, k a multiple of the format's block."""
    block_size, _ = block_shape(name)
    n_rows, n = draw(sizes(max_rows, min_size=1)), draw(sizes(max_n))
    n_blocks = draw(sizes(max(1, max_k // block_size), min_size=1))
    x = draw(float_arrays((n, n_blocks * block_size), max_exponent=1))
    return MatmulCase(name, draw(raw_blocks(name, n_rows, n_blocks)), x)


@dataclass(frozen=True)
class HeadConfig:
    """Heads of a grouped-query attention: n_heads is a multiple of n_kv_heads."""

    n_heads: int
    n_kv_heads: int
    head_dim: int


@st.composite
def head_configs(
    draw: st.DrawFn, *, max_kv_heads: int = 3, head_dims: tuple[int, ...] = (2, 16, 30, 32, 64, 80, 128, 256)
) -> HeadConfig:
    """One to four query heads a key/value head; even head_dims, some of them no multiple of the lanes."""
    n_kv_heads = draw(st.integers(1, max_kv_heads))
    return HeadConfig(n_kv_heads * draw(st.integers(1, 4)), n_kv_heads, draw(st.sampled_from(head_dims)))


@dataclass(frozen=True)
class AttentionCase:
    """Queries of n_q consecutive positions from pos, and the keys and values of all positions up to the last."""

    q: npt.NDArray[np.float32]  # (n_q, n_heads, head_dim)
    k: npt.NDArray[np.float32]  # (pos + n_q, n_kv_heads, head_dim)
    v: npt.NDArray[np.float32]  # (pos + n_q, n_kv_heads, head_dim)
    pos: int
    window: int | None


@st.composite
def attention_cases(
    draw: st.DrawFn, *, max_q: int = 20, max_pos: int = 300, heads: st.SearchStrategy[HeadConfig] | None = None
) -> AttentionCase:
    """Attention over a cache, with and without a sliding window."""
    config = draw(heads if heads is not None else head_configs())
    n_q, pos = draw(sizes(max_q, min_size=1)), draw(sizes(max_pos, lanes=64))
    n_kv = pos + n_q
    window = draw(st.none() | st.integers(1, n_kv + 1))
    q = draw(float_arrays((n_q, config.n_heads, config.head_dim), max_exponent=0))
    k = draw(float_arrays((n_kv, config.n_kv_heads, config.head_dim), max_exponent=0))
    v = draw(float_arrays((n_kv, config.n_kv_heads, config.head_dim), max_exponent=1))
    return AttentionCase(q, k, v, pos, window)


def token_lists(vocab: int, *, min_size: int = 1, max_size: int = 40) -> st.SearchStrategy[list[int]]:
    """Token ids of one sequence."""
    return st.lists(st.integers(0, vocab - 1), min_size=min_size, max_size=max_size)


def token_batches(vocab: int, *, max_sequences: int = 4, max_size: int = 20) -> st.SearchStrategy[list[list[int]]]:
    """A ragged batch: the token ids of one to max_sequences sequences, none of them empty."""
    return st.lists(token_lists(vocab, max_size=max_size), min_size=1, max_size=max_sequences)


@st.composite
def chunkings(draw: st.DrawFn, n: int) -> list[int]:
    """Ways to feed n tokens: lengths, each at least 1, that add up to n."""
    cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=8))) if n > 1 else []
    return np.diff([0, *cuts, n]).tolist()
