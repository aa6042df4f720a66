import numpy as np
from numpy.typing import NDArray

def scan_strings(
    data: NDArray[np.uint8], offset: int, count: int, /
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]: ...
def decode_strings(data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64], /) -> list[str]: ...
