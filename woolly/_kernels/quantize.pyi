import numpy as np
from numpy.typing import NDArray

QUANTIZED_FORMATS: tuple[str, ...]

def quantize_rows(
    x: NDArray[np.float32], format: str, /, *, searched: bool = False, n_threads: int | None = None
) -> NDArray[np.uint8]: ...
