"""How the tensors of a GGUF file are made of those of safetensors files: as they stand, permuted, stacked, widened.

Owns the arithmetic of single tensors and their shapes. It does not know which tensor of which architecture takes what.
BF16, which numpy lacks, is carried as uint16 where bits only move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from woolly.errors import CheckpointError
from woolly.metadata import show
from woolly.safetensors_file import SafeTensor, SafetensorsFile
from woolly.stored_file import ByteSource, FileRange, HeldBytes

FORMAT_OF_DTYPE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_CARRIER = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "U8": np.dtype("u1")}

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Part:
    """A tensor in one of the folder's files."""

    file: SafetensorsFile
    tensor: SafeTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost dimension first."""
        return self.tensor.shape

    def array(self) -> Array:
        """Its numbers; those of BF16 as uint16."""
        return self.bytes.read().view(_CARRIER[self.tensor.dtype]).reshape(self.shape)

    @property
    def bytes(self) -> FileRange:
        """Its bytes, to be read."""
        return self.file.bytes_of(self.tensor)

    def fail(self, problem: str) -> CheckpointError:
        """The error for this tensor, to be raised."""
        return CheckpointError(f"{self.file.path!r}: tensor {show(self.tensor.name)}: {problem}")


@dataclass(frozen=True)
class Transform:
    """A change to a tensor.

    Attributes
    ----------
    apply : callable
        From the parts' arrays to the tensor's.
    shape : callable, optional
        From the parts' shapes to the tensor's; by default it stays that of the first. It raises ValueError, which says
        what a shape must be, where the parts do not fit.
    """

    apply: Callable[[list[Array]], Array]
    shape: Callable[[list[tuple[int, ...]]], tuple[int, ...]] = lambda shapes: shapes[0]


@dataclass(frozen=True)
class Made:
    """A tensor under its GGUF name and how to make it.

    Attributes
    ----------
    name : str
    shape : tuple of int
    format : str
    parts : sequence of Part
    transform : Transform or None
        None where the bytes stay as they are.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    parts: Sequence[Part]
    transform: Transform | None = None

    def bytes(self) -> ByteSource:
        """The tensor's bytes as GGUF has them; made now, where they are not those of a file."""
        if is_kept_f32(self.name, self.shape):
            arrays: list[Array] = [widen(part) for part in self.parts]
        elif self.transform is None:
            return self.parts[0].bytes
        else:
            arrays = [part.array() for part in self.parts]
        array = self.transform.apply(arrays) if self.transform else arrays[0]
        return HeldBytes(np.ascontiguousarray(array).view(np.uint8).reshape(-1))


def made(name: str, parts: Sequence[Part], transform: Transform | None = None) -> Made:
    """A tensor of floats made of others, in their format or in F32 (`is_kept_f32`).

    Raises
    ------
    CheckpointError
        The parts' shapes do not fit each other or the transform, or their dtypes differ or are no floats.
    """
    first = parts[0]
    for part in parts:
        if part.tensor.dtype not in FORMAT_OF_DTYPE:
            raise part.fail(f"expected F32, F16 or BF16 weights for {name}, found {part.tensor.dtype}")
        if (part.tensor.dtype, part.shape) != (first.tensor.dtype, first.shape):
            raise part.fail(f"expected {first.tensor.dtype} of shape {first.shape} like its like, found {part.shape}")
    try:
        shape = transform.shape([part.shape for part in parts]) if transform else first.shape
    except ValueError as error:
        raise first.fail(f"shape {first.shape}: {error}") from None
    if not 1 <= len(shape) <= 3 or 0 in shape:
        raise first.fail(f"expected one to three dimensions, each at least 1, found {first.shape}")
    format_name = "f32" if is_kept_f32(name, shape) else FORMAT_OF_DTYPE[first.tensor.dtype]
    return Made(name, shape, format_name, parts, transform)


def is_kept_f32(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is F32 in every GGUF file, as other engines want it: norms, biases, the router of experts."""
    return len(shape) == 1 or name.endswith((".bias", ".ffn_gate_inp.weight"))


def widen(part: Part) -> NDArray[np.float32]:
    """A tensor's numbers as float32, exactly."""
    array = part.array()
    if part.tensor.dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


# --- the changes ---


def interleave_halves(n_heads: int) -> Transform:
    """Rows of each head from (first half, second half) to pairs: row 2 i is i of the first half, 2 i + 1 of the second.

    Hugging Face rotates dimension i with i + head_dim / 2, GGUF's `llama` and its relatives i with i + 1. Works on the
    rows of a matrix and on a bias.
    """

    def apply(arrays: list[Array]) -> Array:
        (array,) = arrays
        heads = array.reshape(n_heads, 2, array.shape[0] // n_heads // 2, *array.shape[1:])
        return heads.swapaxes(1, 2).reshape(array.shape)

    def shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        if shapes[0][0] % (2 * n_heads):
            raise ValueError(f"expected a multiple of {2 * n_heads} rows for {n_heads} heads")
        return shapes[0]

    return Transform(apply, shape)


PLUS_ONE = Transform(lambda arrays: arrays[0] + np.float32(1))
"""Gemma's norms multiply by 1 + weight; GGUF files hold the sum."""

STACK = Transform(np.stack, lambda shapes: (len(shapes), *shapes[0]))
"""The matrices of a layer's experts, one after the other."""
