from collections.abc import Sequence

from woolly._kernels.matmul import PackedMatrix

GENERATED_FORMATS: tuple[str, ...]

def generate(
    matrix: PackedMatrix, /, *, seed: int, tensor: int, bound: float, n_threads: int | None = None
) -> PackedMatrix: ...
def generate_all(
    items: Sequence[tuple[PackedMatrix, int, float]], /, *, seed: int, n_threads: int | None = None
) -> None: ...
