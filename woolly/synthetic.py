"""Models with generated weights: what the machine can do, without a file.

Owns which sizes are asked for (arguments, then WOOLLY_FAST_… variables, then defaults), the names and shapes of the
tensors, their distribution, and when they are generated. The arithmetic is `woolly.models.llama`'s, as for any file.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from woolly._kernels import (
    GENERATED_FORMATS,
    PackedMatrix,
    generate,
    generate_all,
    kernel_formats,
)
from woolly.byte_tokenizer import MIN_VOCAB_SIZE
from woolly.config import ModelConfig, RopeScaling
from woolly.errors import WoollyError
from woolly.memory import check_fits
from woolly.planning import cache_bytes, scratch_bytes

REQUEST_VARIABLE = "WOOLLY_FAST_FP32"
NORM_NOISE = 0.1  # norm weights are 1 + U(-0.1, 0.1)
EMBEDDING_BOUND = math.sqrt(3)  # unit variance: the residual stream begins as large as a layer's output
BATCH_BYTES = 1 << 28  # generated in one parallel region, between two looks at whether anybody still wants it
RMS_NORM_EPS = float(np.float32(1e-5))  # as a GGUF file would hold it

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class Setting:
    """A size that a user may choose: its argument's name, its variable, default and bounds."""

    name: str
    variable: str
    default: int | None
    least: int
    most: int


SETTINGS = (
    Setting("vocab_size", "WOOLLY_FAST_VOCAB_SIZE", 32000, MIN_VOCAB_SIZE, 1 << 20),
    Setting("hidden_size", "WOOLLY_FAST_HIDDEN_SIZE", 4096, 2, 1 << 16),
    Setting("n_layers", "WOOLLY_FAST_NUM_LAYERS", 32, 1, 256),
    Setting("n_heads", "WOOLLY_FAST_NUM_HEADS", 32, 1, 1024),
    Setting("n_kv_heads", "WOOLLY_FAST_NUM_KV_HEADS", None, 1, 1024),
    Setting("intermediate_size", "WOOLLY_FAST_INTERMEDIATE_SIZE", 11008, 1, 1 << 18),
    Setting("n_ctx", "WOOLLY_FAST_CONTEXT_LENGTH", 2048, 1, 1 << 20),
    Setting("seed", "WOOLLY_FAST_SEED", 42, 0, 2**64 - 1),
)
DTYPE_VARIABLE = "WOOLLY_FAST_DTYPE"
MAX_HEAD_DIM = 1024
_YES, _NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class SyntheticSpec:
    """What to generate.

    Attributes
    ----------
    config : ModelConfig
    n_ctx : int
    seed : int
    dtype : str
        The format of every matrix.
    """

    config: ModelConfig
    n_ctx: int
    seed: int
    dtype: str

    @property
    def name(self) -> str:
        """What the model calls itself, such as "generated-4096x32-f32"."""
        return f"generated-{self.config.hidden_size}x{self.config.n_layers}-{self.dtype}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by its name, in the order of a GGUF file; vectors are norms."""
        return tensor_shapes(self.config)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors in memory: groups of 16 rows are whole."""
        return sum(self._tensor_bytes(shape) for shape in self.shapes.values())

    def _tensor_bytes(self, shape: tuple[int, ...]) -> int:
        if len(shape) == 1:
            return 4 * shape[0]
        _, block_size, block_bytes = kernel_formats()[self.dtype]
        return -(-shape[0] // 16) * 16 * shape[1] // block_size * block_bytes


def is_requested() -> bool:
    """Whether WOOLLY_FAST_FP32 asks for a generated model where none is named.

    Raises
    ------
    WoollyError
        Its value is neither yes nor no.
    """
    value = os.environ.get(REQUEST_VARIABLE, "").strip().lower()
    if value not in _YES + _NO:
        raise WoollyError(f"{REQUEST_VARIABLE}: expected 1 or 0, got {os.environ[REQUEST_VARIABLE]!r}")
    return value in _YES


def resolve(*, rope_theta: float = 10000.0, dtype: str | None = None, **sizes: int | None) -> SyntheticSpec:
    """The model that arguments, variables and defaults ask for, in this order, with every value checked.

    Parameters
    ----------
    rope_theta : float
    dtype : str, optional
    **sizes : int or None
        By the names of `SETTINGS`; None leaves the choice to the variable, or the default.

    Raises
    ------
    WoollyError
        Names the argument or variable, its value, and the rule that it breaks.
    """
    unknown = sorted(sizes.keys() - {setting.name for setting in SETTINGS})
    if unknown:
        raise TypeError(f"unknown argument {unknown[0]!r}, known: {', '.join(setting.name for setting in SETTINGS)}")
    values, sources = {}, {}
    for setting in SETTINGS:
        values[setting.name], sources[setting.name] = _value_of(setting, sizes.get(setting.name))
    if values["n_kv_heads"] is None:
        values["n_kv_heads"] = values["n_heads"]
    _check_heads(values, sources)
    dtype = _check_dtype(dtype, values, sources)
    if isinstance(rope_theta, bool) or not isinstance(rope_theta, int | float) or not 0 < rope_theta <= 1e12:
        raise WoollyError(f"rope_theta: expected a number above 0 and at most 1e12, got {rope_theta!r}")
    return SyntheticSpec(_config(values, rope_theta), values["n_ctx"], values["seed"], dtype)


def _value_of(setting: Setting, argument: int | None) -> tuple[int | None, str]:
    """A setting's value, and the name under which it was given."""
    value, source = argument, setting.name
    text = os.environ.get(setting.variable)
    if argument is None and text is not None:
        source = setting.variable
        try:
            value = int(text)
        except ValueError:
            value = text  # type: ignore[assignment] - refused below
    if value is None:
        return setting.default, source
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not setting.least <= value <= setting.most:
        raise WoollyError(f"{source}: expected an integer of {setting.least} to {setting.most}, got {value!r}")
    return int(value), source


def _check_heads(values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    hidden, heads, kv_heads = values["hidden_size"], values["n_heads"], values["n_kv_heads"]
    if hidden % heads:
        raise WoollyError(f"{sources['n_heads']}: expected a divisor of hidden_size {hidden}, got {heads}")
    if heads % kv_heads:
        raise WoollyError(f"{sources['n_kv_heads']}: expected a divisor of n_heads {heads}, got {kv_heads}")
    head_dim = hidden // heads
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise WoollyError(
            f"{sources['n_heads']}: expected heads of an even size of at most {MAX_HEAD_DIM}, "
            f"got {heads} heads of {head_dim}"
        )


def _check_dtype(dtype: str | None, values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    source = "dtype"
    if dtype is None and DTYPE_VARIABLE in os.environ:
        dtype, source = os.environ[DTYPE_VARIABLE], DTYPE_VARIABLE
    dtype = "f32" if dtype is None else dtype
    if dtype not in GENERATED_FORMATS:
        raise WoollyError(f"{source}: expected one of {', '.join(GENERATED_FORMATS)}, got {dtype!r}")
    block_size = kernel_formats()[dtype][1]
    for name in ("hidden_size", "intermediate_size"):
        if values[name] % block_size:
            raise WoollyError(f"{sources[name]}: {dtype} wants a multiple of {block_size}, got {values[name]}")
    return dtype


def _config(values: Mapping[str, Any], rope_theta: float) -> ModelConfig:
    head_dim = values["hidden_size"] // values["n_heads"]
    sizes = {name: values[name] for name in values if name not in ("n_ctx", "seed")}
    return ModelConfig(
        architecture="llama",
        head_dim=head_dim,
        n_ctx_train=values["n_ctx"],
        rms_norm_eps=RMS_NORM_EPS,
        rope_theta=float(np.float32(rope_theta)),
        rope_dim=head_dim,
        rope_scaling=RopeScaling(n_ctx_original=values["n_ctx"]),  # as a file that says nothing of it is read
        attention_scale=head_dim**-0.5,
        **sizes,
    )


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that `woolly.models.llama` asks for."""
    hidden, mlp, kv_size = config.hidden_size, config.intermediate_size, config.n_kv_heads * config.head_dim
    block: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (kv_size, hidden),
        "attn_v": (kv_size, hidden),
        "attn_output": (hidden, hidden),
        "ffn_norm": (hidden,),
        "ffn_gate": (mlp, hidden),
        "ffn_up": (mlp, hidden),
        "ffn_down": (hidden, mlp),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab_size, hidden)}
    for layer in range(config.n_layers):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes | {"output_norm.weight": (hidden,), "output.weight": (config.vocab_size, hidden)}


def check_memory(spec: SyntheticSpec, max_tokens: int, *, compute: str = "exact") -> None:
    """Refuse a model that does not fit; say how many layers would, or which formats.

    Parameters
    ----------
    spec : SyntheticSpec
    max_tokens : int
        Of one batch.
    compute : {"exact", "int8", "bf16"}

    Raises
    ------
    NotEnoughMemoryError
    """

    def total(other: SyntheticSpec) -> int:
        return sum(plan_parts(other, max_tokens, compute=compute).values())

    def what_fits(available: int) -> str:
        first = replace(spec, config=replace(spec.config, n_layers=1))
        second = replace(spec, config=replace(spec.config, n_layers=2))
        n_layers = 1 + (available - total(first)) // (total(second) - total(first))
        ways = [f"{n_layers} layers in {spec.dtype}"] if n_layers >= 1 else []
        others = [dtype for dtype in GENERATED_FORMATS if _fits_blocks(spec.config, dtype)]
        fitting = [dtype for dtype in others if total(replace(spec, dtype=dtype)) <= available]
        if fitting:
            ways.append(f"all {spec.config.n_layers} layers with dtype {', '.join(fitting)}")
        return "; ".join(ways) or "smaller sizes"

    check_fits(spec.name, plan_parts(spec, max_tokens, compute=compute), what_fits=what_fits)


def plan_parts(spec: SyntheticSpec, max_tokens: int, *, compute: str = "exact") -> dict[str, int]:
    """Bytes of the weights, of one session's full KV cache, and about those of the activations."""
    quantised = kernel_formats()[spec.dtype][1] > 1
    return {
        "weights": spec.weights_bytes,
        "KV cache": cache_bytes(spec.config, spec.n_ctx),
        "scratch": scratch_bytes(spec.config, max_tokens, quantised=quantised, compute=compute),
    }


def _fits_blocks(config: ModelConfig, dtype: str) -> bool:
    block_size = kernel_formats()[dtype][1]
    return not (config.hidden_size % block_size or config.intermediate_size % block_size)


class SyntheticWeights:
    """Generated tensors by name, with the interface of `woolly.weights.Weights`.

    Parameters
    ----------
    spec : SyntheticSpec
    n_threads : int, optional

    Attributes
    ----------
    nbytes : int
        Bytes of all tensors asked for so far.

    Notes
    -----
    Matrices are handed out with their memory reserved and empty; `fill` generates them, in the order they were asked
    for. What a tensor holds depends on the seed and its name alone.
    """

    def __init__(self, spec: SyntheticSpec, *, n_threads: int | None = None) -> None:
        self._spec = spec
        self._shapes = spec.shapes
        self._n_threads = n_threads
        self._empty: deque[tuple[str, PackedMatrix]] = deque()
        self.nbytes = 0

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def matrix(self, name: str, shape: tuple[int, int], /) -> PackedMatrix:
        """The matrix `name`, its weights yet to come."""
        self._check(name, shape)
        matrix = PackedMatrix(*shape, self._spec.dtype).reserve()
        self._empty.append((name, matrix))
        self.nbytes += matrix.nbytes
        return matrix

    def vector(self, name: str, n: int, /) -> NDArray[np.float32]:
        """The norm `name`: 1 + small noise, float32, (n,)."""
        self._check(name, (n,))
        self.nbytes += 4 * n
        return generate_vector(name, n, seed=self._spec.seed)

    def fill_next(self) -> bool:
        """Generate the next few matrices; False when there are none left."""
        batch, n_bytes = [], 0
        while self._empty and n_bytes < BATCH_BYTES:
            name, matrix = self._empty.popleft()
            batch.append((matrix, tensor_id(name), weight_bound(name, matrix.n_rows, matrix.n_cols)))
            n_bytes += matrix.nbytes
        generate_all(batch, seed=self._spec.seed, n_threads=self._n_threads)
        return bool(batch)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if self._shapes.get(name) != shape:
            raise WoollyError(
                f"generated weights: {name!r} of shape {shape} was asked for, have {self._shapes.get(name)}"
            )


def generate_matrix(name: str, matrix: PackedMatrix, *, seed: int, n_threads: int | None = None) -> PackedMatrix:
    """Fill the matrix `name`, and return it."""
    bound = weight_bound(name, matrix.n_rows, matrix.n_cols)
    return generate(matrix, seed=seed, tensor=tensor_id(name), bound=bound, n_threads=n_threads)


def weight_bound(name: str, n_rows: int, n_cols: int) -> float:
    """Xavier/Glorot uniform: weights are U(-a, a) with a = sqrt(6 / (fan_in + fan_out)); embeddings have variance 1.

    Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks".
    """
    return EMBEDDING_BOUND if name == "token_embd.weight" else math.sqrt(6 / (n_rows + n_cols))


def generate_vector(name: str, n: int, *, seed: int) -> NDArray[np.float32]:
    """1 + U(-0.1, 0.1), float32, (n,)."""
    column = PackedMatrix(n, 1, "f32")
    generate(column, seed=seed, tensor=tensor_id(name), bound=NORM_NOISE, n_threads=1)
    return 1 + column.unpack().view(np.float32)[:, 0]


def tensor_id(name: str) -> int:
    """Which of a seed's streams of numbers a tensor takes: the first 8 bytes of its name's SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
