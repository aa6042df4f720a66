from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from woolly._kernels.attention import KVCache
from woolly._kernels.executor import Stop
from woolly._kernels.experts import PackedExperts
from woolly._kernels.matmul import PackedMatrix

def row_stride(width: int, /) -> int: ...

class Program:
    max_tokens: int
    n_threads: int
    compute: str
    buffer_bytes: int
    names: list[str]
    part_names: list[str]
    def __init__(self, max_tokens: int, n_threads: int | None = None, *, compute: str = "exact") -> None: ...
    def buffer(self, name: str, width: int, /, *, pairs: int = 0) -> str: ...
    def width(self, name: str, /) -> int: ...
    def embed(self, out: str, table: PackedMatrix, /, *, factor: float = 1.0, name: str = "embd") -> str: ...
    def rmsnorm(
        self, out: str, x: str, weight: ArrayLike, /, *, eps: float, accumulate: bool = False, name: str
    ) -> str: ...
    def layernorm(self, out: str, x: str, weight: ArrayLike, bias: ArrayLike, /, *, eps: float, name: str) -> str: ...
    def bias(self, x: str, bias: ArrayLike, /, *, name: str) -> str: ...
    def activate(self, out: str, x: str, /, *, activation: str, name: str) -> str: ...
    def softcap_logits(self, cap: float, /, *, name: str = "logits_softcap") -> None: ...
    def add(self, out: str, x: str, y: str, /, *, name: str) -> str: ...
    def glu(self, out: str, gate: str, up: str, /, *, activation: str, name: str) -> str: ...
    def matmul(
        self,
        outs: Sequence[str],
        x: str,
        matrices: Sequence[PackedMatrix],
        /,
        *,
        accumulate: bool = False,
        exact: bool = False,
        name: str,
    ) -> str | list[str]: ...
    def route(
        self,
        out: str,
        scores: str,
        /,
        *,
        n_used: int,
        gating: str,
        normalise: bool = True,
        scale: float = 1.0,
        name: str,
    ) -> str: ...
    def expert_matmul(
        self,
        outs: Sequence[str],
        x: str,
        experts: Sequence[PackedExperts],
        /,
        *,
        route: str,
        biases: Sequence[ArrayLike | None] | None = None,
        name: str,
    ) -> str | list[str]: ...
    def combine(self, out: str, rows: str, /, *, route: str, name: str) -> str: ...
    def rope_store(
        self,
        q: str,
        k: str,
        v: str,
        /,
        *,
        layer: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        cos: NDArray[np.float32] | None,
        sin: NDArray[np.float32] | None,
        pairing: str,
        scale: float,
        q_norm: ArrayLike | None = None,
        k_norm: ArrayLike | None = None,
        eps: float = 0.0,
        name: str,
    ) -> str: ...
    def attention(
        self,
        out: str,
        q: str,
        /,
        *,
        layer: int,
        n_heads: int,
        window: int = 0,
        softcap: float = 0.0,
        sinks: ArrayLike | None = None,
        name: str,
    ) -> str: ...
    def select(self, out: str, x: str, /, *, name: str = "select") -> str: ...
    def scale(self, out: str, x: str, factor: float, /, *, name: str) -> str: ...
    def close(self) -> None: ...
    def run(
        self,
        tokens: ArrayLike,
        spans: Sequence[tuple[KVCache, int, int]],
        outputs: ArrayLike,
        logits: NDArray[np.float32],
        /,
        *,
        capture: dict[str, NDArray[np.float32] | None] | None = None,
        times: NDArray[np.float64] | None = None,
        stop: Stop | None = None,
    ) -> None: ...
    @property
    def stage_names(self) -> list[str]: ...
    @property
    def vocab_size(self) -> int: ...
