"""Writes tiny random GGUF models, with a real byte-level tokenizer, for tests that need a file but not its meaning.

Everything follows from the seed. The package `gguf` does the writing and quantises where it can; blocks of the formats
that it cannot make (the K types among them) are random bytes with small scales. Imports nothing of woolly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2; the 256 byte tokens follow, then the tokens that MERGES make."""

MERGES = ("Ġ t", "h e", "i n", "Ġ a", "Ġt he", "e r", "o n", "Ġ s", "r e", "Ċ Ċ", "Ġ w", "o u", "Ġa n", "Ġan d")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MIN_VOCAB = len(SPECIAL_TOKENS) + 256 + len(MERGES)


# Blocks


@dataclass(frozen=True)
class RandomBlock:
    """How to make a random block of a format whose blocks hold scales among integers."""

    scale_offsets: tuple[int, ...]  # of each scale in the block, in bytes; fp16 if not said otherwise
    scale_ratios: tuple[float, ...]  # of each scale to the first: a minimum that centres the values
    quants: tuple[int, int]  # the bytes that hold quants, from and to
    spread: float  # standard deviation of the values for a first scale of 1
    has_minima: bool = False
    scale_kind: str = "f16"  # or "e8m0": a power of two in a byte; "f16 in 4": four bits in each of four words


RANDOM_BLOCKS = {
    "q8_0": RandomBlock((0,), (1,), (2, 34), 74),  # d q, q in -128..127
    "q4_0": RandomBlock((0,), (1,), (2, 18), 4.6),  # d (q - 8), q in 0..15
    "q4_1": RandomBlock((0, 2), (1, -7.5), (4, 20), 4.6, has_minima=True),  # d q + m
    "q5_0": RandomBlock((0,), (1,), (2, 22), 9.2),  # d (q - 16), q in 0..31
    "q5_1": RandomBlock((0, 2), (1, -15.5), (4, 24), 9.2, has_minima=True),  # d q + m
    "q2_k": RandomBlock((80, 82), (1, 1.5), (16, 80), 13.9, has_minima=True),  # d s q - dmin m, s and m in 0..15
    "q3_k": RandomBlock((108,), (1,), (0, 96), 43),  # d s (q - 4), s in -32..31, q in 0..7
    "q4_k": RandomBlock((0, 2), (1, 7.5), (16, 144), 258, has_minima=True),  # d s q - dmin m, s and m in 0..63
    "q5_k": RandomBlock((0, 2), (1, 15.5), (16, 176), 527, has_minima=True),  # as q4_k, q in 0..31
    "q6_k": RandomBlock((208,), (1,), (0, 192), 1370),  # d s (q - 32), s in -128..127, q in 0..63
    "iq4_nl": RandomBlock((0,), (1,), (2, 18), 67),  # d t[q], t in -127..113
    "iq4_xs": RandomBlock((0,), (1,), (8, 136), 1250),  # d s t[q], s in -32..31
    "mxfp4": RandomBlock((0,), (1,), (1, 17), 5.9, scale_kind="e8m0"),  # d t[q], t in -12..12
    "iq1_s": RandomBlock((0,), (1,), (2, 50), 7.2),  # d s (q + 1/8 or - 1/8), s in 1..15, q in -1..1
    "iq1_m": RandomBlock((48,), (1,), (0, 48), 7.2, scale_kind="f16 in 4"),  # the same
    "iq2_xxs": RandomBlock((0,), (1,), (2, 66), 54.5),  # d (s + 1/2) q / 4, s in 0..15, ±q one of 8, 25, 43
    "iq2_xs": RandomBlock((0,), (1,), (2, 74), 56),
    "iq2_s": RandomBlock((0,), (1,), (2, 82), 56.5),
    "iq3_xxs": RandomBlock((0,), (1,), (2, 98), 142),  # d (s + 1/2) q / 2, ±q one of eight from 4 to 62
    "iq3_s": RandomBlock((0,), (1,), (2, 110), 140),  # d (2 s + 1) q, q in -15..15, odd
    "tq1_0": RandomBlock((52,), (1,), (0, 52), 0.82),  # d q, q in -1..1
    "tq2_0": RandomBlock((64,), (1,), (0, 64), 1.22),  # d q, q in -1..2
}

FLOATS = ("f32", "f16", "bf16", "f64")

LUT4 = tuple(name for name in RANDOM_BLOCKS if name[:3] in ("iq1", "iq2", "iq3", "tq1", "tq2"))
"""Formats that are unpacked to 4 bits a weight when they are packed."""

QUANTISED_BY_GGUF = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4")
"""Those whose random rows are quantised numbers; ternary ones would be too coarse, the others are dequantised only."""


def ggml_type_of(name: str) -> gguf.GGMLQuantizationType:
    """ggml's type of a format named in lower case, as woolly names them: "q4_0"."""
    return gguf.GGMLQuantizationType[name.upper()]


def row_bytes(name: str, n_values: int) -> int:
    """Bytes of a row of n_values in a format; ValueError where they are not whole blocks."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type_of(name)]
    if n_values % block_size:
        raise ValueError(f"{name}: a row of {n_values} values is not a multiple of {block_size}")
    return n_values // block_size * block_bytes


def random_blocks(
    rng: np.random.Generator, name: str, n_rows: int, n_blocks: int, scales: npt.NDArray[np.float16]
) -> npt.NDArray[np.uint8]:
    """Random bytes, scales set from scales (n_rows, n_blocks): uint8 (n_rows, n_blocks · block_bytes)."""
    block, (_, block_bytes) = RANDOM_BLOCKS[name], gguf.GGML_QUANT_SIZES[ggml_type_of(name)]
    raw = rng.integers(0, 256, (n_rows, n_blocks, block_bytes), np.uint8)
    for offset, ratio in zip(block.scale_offsets, block.scale_ratios, strict=True):
        _store_scales(raw[:, :, offset:], block.scale_kind, scales.astype(np.float32) * ratio)
    return raw.reshape(n_rows, n_blocks * block_bytes)


def _store_scales(field: npt.NDArray[np.uint8], kind: str, scales: npt.NDArray[np.float32]) -> None:
    """Write scales (n_rows, n_blocks) to the first bytes of field (n_rows, n_blocks, bytes)."""
    halves = scales.astype("<f2")
    if kind == "e8m0":  # 2^(e - 128) of the magnitude; zero is the least, 2^-128
        field[..., 0] = np.floor(np.log2(np.maximum(np.abs(scales), 2.0**-128))) + 128
    elif kind == "f16 in 4":
        nibbles = halves[..., None].view("<u2") >> np.arange(0, 16, 4, dtype=np.uint16) & 15
        field[..., 1:8:2] = field[..., 1:8:2] & 15 | nibbles.astype(np.uint8) << 4
    else:
        field[..., :2] = halves[..., None].view(np.uint8)


def random_rows(
    rng: np.random.Generator, name: str, n_rows: int, n_values: int, *, std: float
) -> npt.NDArray[np.uint8]:
    """A weight matrix of values around zero with standard deviation std, stored: uint8 (n_rows, row_bytes)."""
    width = row_bytes(name, n_values)
    if name in FLOATS:
        return store_floats((std * rng.standard_normal((n_rows, n_values))).astype(np.float32), name)
    if name not in QUANTISED_BY_GGUF:
        n_blocks = n_values // gguf.GGML_QUANT_SIZES[ggml_type_of(name)][0]
        scales = np.full((n_rows, n_blocks), std / RANDOM_BLOCKS[name].spread, np.float16)
        if not RANDOM_BLOCKS[name].has_minima:  # either sign, as a table's mean is not zero
            scales *= rng.choice((-1, 1), scales.shape).astype(np.float16)
        return random_blocks(rng, name, n_rows, n_blocks, scales)
    values = (std * rng.standard_normal((n_rows, n_values))).astype(np.float32)
    return np.ascontiguousarray(gguf.quants.quantize(values, ggml_type_of(name))).view(np.uint8).reshape(n_rows, width)


def store_floats(values: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.uint8]:
    """Values (n_rows, n) in a float format: uint8 (n_rows, row_bytes)."""
    if name == "f64":
        stored = values.astype(np.float64)
    else:
        stored = gguf.quants.quantize(values, ggml_type_of(name)) if values.size else np.empty(0)
    return stored.view(np.uint8).reshape(len(values), row_bytes(name, values.shape[1]))


# Tokenizer


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    """A `gpt2` vocabulary: specials, bytes, merges, and unused tokens up to vocab."""
    if vocab < MIN_VOCAB:
        raise ValueError(f"vocab is {vocab}, the tokenizer needs at least {MIN_VOCAB}")
    merged = [merge.replace(" ", "") for merge in MERGES]
    unused = [f"[PAD{i}]" for i in range(MIN_VOCAB, vocab)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*SPECIAL_TOKENS, *byte_alphabet(), *merged, *unused])
    writer.add_token_types(
        [gguf.TokenType.CONTROL] * len(SPECIAL_TOKENS)
        + [gguf.TokenType.NORMAL] * (256 + len(merged))
        + [gguf.TokenType.UNUSED] * len(unused)
    )
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


# Models


def write_tiny_llama(
    path: str | Path,
    *,
    n_layers: int = 2,
    hidden: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate: int = 128,
    vocab: int = 320,
    dtype: str = "f32",
    embedding_dtype: str | None = None,
    tied: bool = True,
    rope_theta: float = 10_000.0,
    rope_dims: int | None = None,
    freq_factors: bool = False,
    n_ctx: int = 256,
    seed: int = 0,
) -> Path:
    """Write a random `llama` model and return its path.

    dtype : format of the matrices, such as "q4_0"; hidden, intermediate and n_heads · head_dim must be whole
        blocks of it (256 for the K types). Norms are always F32.
    embedding_dtype : format of the embedding and of an untied output, dtype where not given.
    freq_factors : whether to store `rope_freqs`, as Llama 3 models do.
    """
    model = _TinyModel(path, "llama", hidden, dtype, seed)
    head_dim = hidden // n_heads if head_dim is None else head_dim
    rope_dims = head_dim if rope_dims is None else rope_dims
    model.add_sizes(n_layers, n_heads, n_kv_heads, head_dim, intermediate, vocab, n_ctx)
    model.writer.add_rope_dimension_count(rope_dims)
    model.writer.add_rope_freq_base(rope_theta)
    model.add_embedding(vocab, embedding_dtype, tied=tied)
    if freq_factors:
        model.writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, rope_dims // 2, dtype=np.float32))
    for layer in range(n_layers):
        model.add_block(layer, n_heads * head_dim, n_kv_heads * head_dim, intermediate)
    return model.finish()


def write_tiny_gemma3(
    path: str | Path,
    *,
    n_layers: int = 7,
    hidden: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 1,
    head_dim: int = 32,
    intermediate: int = 128,
    vocab: int = 320,
    dtype: str = "f32",
    embedding_dtype: str | None = None,
    tied: bool = True,
    rope_theta: float = 1_000_000.0,
    sliding_window: int = 8,
    n_ctx: int = 256,
    seed: int = 0,
) -> Path:
    """Write a random `gemma3` model and return its path; six layers or more include a global one.

    The options are those of `write_tiny_llama`; sliding_window counts positions, the query's own included. The
    tokenizer is the byte-level one, though Gemma's own is not.
    """
    model = _TinyModel(path, "gemma3", hidden, dtype, seed)
    model.add_sizes(n_layers, n_heads, n_kv_heads, head_dim, intermediate, vocab, n_ctx)
    model.writer.add_rope_freq_base(rope_theta)
    model.writer.add_sliding_window(sliding_window)
    model.add_embedding(vocab, embedding_dtype, tied=tied)
    for layer in range(n_layers):
        model.add_block(layer, n_heads * head_dim, n_kv_heads * head_dim, intermediate)
        for name, size in (
            ("attn_q_norm", head_dim),
            ("attn_k_norm", head_dim),
            ("post_attention_norm", hidden),
            ("post_ffw_norm", hidden),
        ):
            model.add_norm(f"blk.{layer}.{name}", size)
    return model.finish()


class _TinyModel:
    """What the two architectures share: the writer, the random state and the tensors of a pre-norm gated block."""

    def __init__(self, path: str | Path, arch: str, hidden: int, dtype: str, seed: int) -> None:
        self.path = Path(path)
        self.hidden = hidden
        self.dtype = dtype
        self.rng = np.random.default_rng(seed)
        self.writer = gguf.GGUFWriter(self.path, arch)
        self.writer.add_name(f"tiny {arch}")

    def add_sizes(
        self, n_layers: int, n_heads: int, n_kv_heads: int, head_dim: int, intermediate: int, vocab: int, n_ctx: int
    ) -> None:
        self.writer.add_block_count(n_layers)
        self.writer.add_context_length(n_ctx)
        self.writer.add_embedding_length(self.hidden)
        self.writer.add_feed_forward_length(intermediate)
        self.writer.add_head_count(n_heads)
        self.writer.add_head_count_kv(n_kv_heads)
        self.writer.add_key_length(head_dim)
        self.writer.add_value_length(head_dim)
        self.writer.add_layer_norm_rms_eps(1e-6)
        self.writer.add_vocab_size(vocab)
        add_tokenizer(self.writer, vocab)

    def add_matrix(self, name: str, rows: int, cols: int, *, dtype: str | None = None, gain: float = 1.0) -> None:
        """A matrix that keeps the variance of its inputs, times gain²."""
        dtype = self.dtype if dtype is None else dtype
        raw = random_rows(self.rng, dtype, rows, cols, std=gain * cols**-0.5)
        numbers = {"f32": np.float32, "f16": np.float16, "f64": np.float64}
        if dtype in numbers:  # the writer wants these as numbers, every other format as bytes
            raw = raw.view(numbers[dtype])
        self.writer.add_tensor(f"{name}.weight", raw, raw_dtype=ggml_type_of(dtype))

    def add_norm(self, name: str, size: int, *, gain: float = 1.0) -> None:
        weight = gain * (1 + 0.1 * self.rng.standard_normal(size))
        self.writer.add_tensor(f"{name}.weight", weight.astype(np.float32))

    def add_embedding(self, vocab: int, dtype: str | None, *, tied: bool) -> None:
        # A faint embedding leaves the residual stream to the blocks, or a tied model would repeat its last token.
        # Logits get a standard deviation of 3: near ties are rare.
        self.add_matrix("token_embd", vocab, self.hidden, dtype=dtype, gain=0.25)
        self.add_norm("output_norm", self.hidden, gain=3 / 0.25)
        if not tied:
            self.add_matrix("output", vocab, self.hidden, dtype=dtype, gain=0.25)

    def add_block(self, layer: int, q_size: int, kv_size: int, intermediate: int) -> None:
        blk = f"blk.{layer}"
        self.add_norm(f"{blk}.attn_norm", self.hidden)
        self.add_matrix(f"{blk}.attn_q", q_size, self.hidden)
        self.add_matrix(f"{blk}.attn_k", kv_size, self.hidden)
        self.add_matrix(f"{blk}.attn_v", kv_size, self.hidden, gain=2)  # attention averages: the context should count
        self.add_matrix(f"{blk}.attn_output", self.hidden, q_size)
        self.add_norm(f"{blk}.ffn_norm", self.hidden)
        self.add_matrix(f"{blk}.ffn_gate", intermediate, self.hidden)
        self.add_matrix(f"{blk}.ffn_up", intermediate, self.hidden)
        self.add_matrix(f"{blk}.ffn_down", self.hidden, intermediate)

    def finish(self) -> Path:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.path
