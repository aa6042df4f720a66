from typing import Literal

import numpy as np
from numpy.typing import NDArray

def rmsnorm_f32(
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    /,
    *,
    eps: float,
    out: NDArray[np.float32] | None = None,
    n_threads: int | None = None,
) -> NDArray[np.float32]: ...
def layernorm_f32(
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    /,
    *,
    eps: float,
    out: NDArray[np.float32] | None = None,
    n_threads: int | None = None,
) -> NDArray[np.float32]: ...
def activation_f32(
    x: NDArray[np.float32],
    /,
    *,
    activation: Literal["silu", "gelu_tanh"],
    out: NDArray[np.float32] | None = None,
    n_threads: int | None = None,
) -> NDArray[np.float32]: ...
def softcap_f32(
    x: NDArray[np.float32], /, *, cap: float, out: NDArray[np.float32] | None = None, n_threads: int | None = None
) -> NDArray[np.float32]: ...
def glu_f32(
    gate: NDArray[np.float32],
    up: NDArray[np.float32],
    /,
    *,
    activation: Literal["silu", "gelu_tanh", "swiglu_clamped"],
    out: NDArray[np.float32] | None = None,
    n_threads: int | None = None,
) -> NDArray[np.float32]: ...
def exp_f32(x: NDArray[np.float32], /) -> NDArray[np.float32]: ...
def softmax_f32(
    x: NDArray[np.float32], /, *, out: NDArray[np.float32] | None = None, n_threads: int | None = None
) -> NDArray[np.float32]: ...
def rope_f32(
    x: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    /,
    *,
    pairing: Literal["norm", "neox"],
    n_threads: int | None = None,
) -> NDArray[np.float32]: ...
def quantize_q16(x: NDArray[np.float32], /) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...
def quantize_q8(x: NDArray[np.float32], /) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...
