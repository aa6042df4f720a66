"""The weights of a model file, packed for the kernels as they are asked for.

Owns shapes, streaming and accounting: a tensor is packed as it is read, and nothing is inflated on the way. It does not
know what a tensor is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from woolly._kernels import PackedExperts, PackedMatrix, dequantize, kernel_formats
from woolly._kernels.pages import Pages
from woolly.checkpoint import Checkpoint
from woolly.errors import GGUFError, UnsupportedFormatError
from woolly.formats import FORMATS
from woolly.gguf_file import TensorInfo
from woolly.metadata import show
from woolly.stored_file import ByteSource, FileRange

_ALIGN = 64  # bytes at most lie unused between two matrices
_ROWS_A_GROUP = 16
_STEP_BYTES = 64 << 20  # of a file that are packed between two looks at Ctrl-C


def packed_bytes(info: TensorInfo) -> int:
    """Bytes that a tensor takes once it is packed, or as it is where no kernel takes its format."""
    if len(info.shape) == 1 or info.format.name not in kernel_formats():
        return max(info.n_bytes, 4 * info.shape[-1])
    *experts, n_rows, n_cols = info.shape  # each expert's rows are packed by themselves
    return math.prod(experts) * PackedMatrix(n_rows, n_cols, info.format.name).nbytes


def check_shape(path: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape than the model expects.

    Raises
    ------
    GGUFError
        Gives both shapes.
    """
    if info.shape != shape:
        place = f"{path}: tensor {show(info.name)} at offset {info.offset}"
        raise GGUFError(f"{place} has shape {info.shape}, the configuration says {shape}")


class Weights:
    """Tensors of a checkpoint by name, checked against the shape that the model expects.

    Parameters
    ----------
    file : Checkpoint
        A GGUF file, or what shows a folder as one.
    n_threads : int, optional
        For packing.
    check : callable, optional
        Called before each tensor; what it raises ends the packing.

    Attributes
    ----------
    nbytes : int
        Bytes of all weights taken so far, as they lie in memory.
    """

    def __init__(
        self, file: Checkpoint, *, n_threads: int | None = None, check: Callable[[], None] | None = None
    ) -> None:
        self._file = file
        self._check = check
        self._n_threads = n_threads
        self._taken: set[str] = set()
        self._pages = Pages(sum(packed_bytes(info) + _ALIGN for info in file.tensors.values() if len(info.shape) == 2))
        self.nbytes = 0

    def __contains__(self, name: str) -> bool:
        return name in self._file.tensors

    def matrix(self, name: str, shape: tuple[int, int], /) -> PackedMatrix:
        """The matrix `name`, packed.

        Parameters
        ----------
        name : str
        shape : (n_rows, n_cols)
            What the model's configuration says.

        Raises
        ------
        GGUFError
            The tensor is missing or has another shape.
        UnsupportedFormatError
            No kernel takes its format.
        """
        (packed,) = self.matrices(name, (shape[0],), shape[1])
        return packed

    def matrices(self, name: str, n_rows: Sequence[int], n_cols: int, /) -> list[PackedMatrix]:
        """The matrices of so many rows each that lie one below the other in the tensor `name`. Raises as `matrix`."""
        info = self._checked(name, (sum(n_rows), n_cols))
        stored = self._file.bytes_of(name)
        parts, begin = [], 0
        for n in n_rows:
            part = PackedMatrix(n, n_cols, info.format.name).reserve(take=self._pages.take)
            begin = self._pack(part, stored, begin)
            parts.append(part)
            self.nbytes += part.nbytes
        return parts

    def _pack(self, matrix: PackedMatrix, stored: ByteSource, begin: int) -> int:
        """Pack a matrix from a tensor's bytes from `begin` on; return where they end."""
        n_rows, row_bytes = matrix.n_rows, FORMATS[matrix.format].nbytes(matrix.n_cols)
        step = max(_ROWS_A_GROUP, _STEP_BYTES // row_bytes // _ROWS_A_GROUP * _ROWS_A_GROUP)
        for first in range(0, n_rows, step):
            n, at = min(step, n_rows - first), begin + first * row_bytes
            if isinstance(stored, FileRange):
                with stored.file.reading() as file:
                    matrix.pack_file(file, stored.offset + at, first=first, n_rows=n, n_threads=self._n_threads)
            else:
                rows = stored.read(at, at + n * row_bytes).reshape(n, row_bytes)
                matrix.pack(rows, first=first, n_threads=self._n_threads)
        return begin + n_rows * row_bytes

    def experts(self, name: str, shape: tuple[int, int, int], /) -> PackedExperts:
        """The matrices of all experts in the tensor `name`, (n_experts, n_rows, n_cols). Raises as `matrix` does.

        Files of 2023 have a tensor an expert, which must be of one format: ffn_up.0, ffn_up.1 … for ffn_up_exps.
        """
        names = [name.replace("_exps", f".{expert}") for expert in range(shape[0])]
        if name in self or names[0] not in self:
            names = [name]
        found = {self._checked(each, shape if each == name else shape[1:]).format.name for each in names}
        if len(found) > 1:
            formats = " and ".join(sorted(found))
            raise UnsupportedFormatError(
                f"{self._file.path}: experts of {name!r} are stored as {formats}, not as one format"
            )
        packed = PackedExperts(*shape, found.pop()).reserve()
        matrices = iter(packed.matrices)
        for each in names:
            stored, begin = self._file.bytes_of(each), 0
            while begin < stored.n_bytes:
                begin = self._pack(next(matrices), stored, begin)
        self.nbytes += packed.nbytes
        return packed

    def vector(self, name: str, n: int, /) -> NDArray[np.float32]:
        """The vector `name` as float32, (n,). Raises as `matrix` does."""
        return self._values(name, (n,))

    def table(self, name: str, shape: tuple[int, int], /) -> NDArray[np.float32]:
        """The tensor `name` as float32, (n_rows, n). Raises as `matrix` does."""
        return self._values(name, shape)

    def _values(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        info = self._checked(name, shape)
        values = dequantize(self._file.bytes_of(name).read().reshape(1, -1), info.format.name).reshape(shape)
        self.nbytes += values.nbytes
        return values

    def check_all_taken(self) -> None:
        """Refuse a file with tensors that the model has no use for: its arithmetic would not be this model's.

        Raises
        ------
        GGUFError
            Names the first such tensor.
        """
        for name in self._file.tensors:
            if name not in self._taken:
                raise GGUFError(f"{self._file.path}: tensor {show(name)} has no place in this architecture")

    def skip(self, name: str) -> None:
        """Say that a tensor is known and not needed."""
        self._taken.add(name)

    def _checked(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        if self._check is not None:
            self._check()
        info = self._file.tensors.get(name)
        if info is None:
            raise GGUFError(f"{self._file.path}: tensor {show(name)} is missing")
        check_shape(self._file.path, info, shape)
        if info.format.name not in kernel_formats():
            raise UnsupportedFormatError(
                f"{self._file.path}: tensor {show(name)} is stored as {info.format.name}, which has no kernels yet; "
                f"those that have: {', '.join(kernel_formats())}"
            )
        self._taken.add(name)
        return info
