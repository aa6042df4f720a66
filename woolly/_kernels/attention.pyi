from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

KV_DTYPES: dict[str, tuple[type, int]]

class KVCache:
    n_layers: int
    n_kv_heads: int
    head_dim: int
    n_ctx: int
    dtype: str
    def __init__(
        self, n_layers: int, n_kv_heads: int, head_dim: int, n_ctx: int, *, dtype: Literal["f16", "f32"] = "f16"
    ) -> None: ...
    @staticmethod
    def bytes_for(
        n_layers: int, n_kv_heads: int, head_dim: int, n_ctx: int, *, dtype: Literal["f16", "f32"] = "f16"
    ) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def keys(self, layer: int, n: int, /) -> NDArray[Any]: ...
    def values(self, layer: int, n: int, /) -> NDArray[Any]: ...
    def store(self, layer: int, pos: int, k: NDArray[np.float32], v: NDArray[np.float32], /) -> None: ...

def attention_f32(
    q: NDArray[np.float32],
    cache: KVCache,
    /,
    *,
    layer: int,
    pos: int,
    window: int = 0,
    softcap: float = 0.0,
    sinks: NDArray[np.float32] | None = None,
    split: bool = False,
    out: NDArray[np.float32] | None = None,
    n_threads: int | None = None,
) -> NDArray[np.float32]: ...
