from typing import Literal

import numpy as np
from numpy.typing import NDArray

from woolly._kernels.matmul import PackedMatrix

GATINGS: tuple[str, ...]

class PackedExperts:
    format: str
    matrices: list[PackedMatrix]
    nbytes: int
    def __init__(self, n_experts: int, n_rows: int, n_cols: int, format: str, /) -> None: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    def reserve(self) -> PackedExperts: ...
    def pack(self, rows: NDArray[np.uint8], *, n_threads: int | None = None) -> PackedExperts: ...

def pair_columns(n_experts: int, n_used: int, max_tokens: int, /) -> int: ...
def route_experts(
    scores: NDArray[np.float32],
    /,
    *,
    n_used: int,
    gating: Literal["softmax", "softmax_chosen"] = "softmax",
    normalise: bool = True,
    scale: float = 1.0,
) -> tuple[NDArray[np.float32], NDArray[np.int32]]: ...
