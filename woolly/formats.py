"""The registry of tensor formats: what ggml calls each one and how many bytes its blocks take.

Owns names and sizes only. It knows no kernels, so a file that holds formats without one can still be inspected.
"""

from __future__ import annotations

from dataclasses import dataclass

from woolly.errors import UnsupportedFormatError


@dataclass(frozen=True, slots=True)
class Format:
    """How the elements of a tensor are stored: in blocks of a fixed number of elements and bytes.

    Attributes
    ----------
    name : str
        ggml's name in lower case, such as ``"q4_0"``.
    ggml_type : int
        The id that stands for the format in a GGUF file.
    block_size : int
        Elements in a block; 1 for plain types.
    block_bytes : int
        Bytes that one block takes.
    """

    name: str
    ggml_type: int
    block_size: int
    block_bytes: int

    def nbytes(self, n_elements: int) -> int:
        """Return the bytes that ``n_elements`` take: ``n_elements / block_size * block_bytes``.

        Raises
        ------
        ValueError
            If ``n_elements`` is negative or no whole number of blocks.
        """
        n_blocks, rest = divmod(n_elements, self.block_size)
        if n_elements < 0 or rest:
            raise ValueError(f"{self.name}: {n_elements} elements are no whole number of blocks of {self.block_size}")
        return n_blocks * self.block_bytes


FLOATS = ("f32", "f16", "bf16")  # formats of weights that nobody has quantised

# Source: ggml.h (enum ggml_type) and ggml-common.h (the block structs). The ids left out (4, 5, 31 to 33, 36 to 38)
# were removed from ggml. Q8_1 and Q8_K hold activations while ggml computes and stand in no file; Q8_1 has the 40 bytes
# of the gguf package here, while ggml's own struct has shrunk to 36.
_ALL = (
    Format("f32", 0, 1, 4),
    Format("f16", 1, 1, 2),
    Format("q4_0", 2, 32, 18),
    Format("q4_1", 3, 32, 20),
    Format("q5_0", 6, 32, 22),
    Format("q5_1", 7, 32, 24),
    Format("q8_0", 8, 32, 34),
    Format("q8_1", 9, 32, 40),
    Format("q2_k", 10, 256, 84),
    Format("q3_k", 11, 256, 110),
    Format("q4_k", 12, 256, 144),
    Format("q5_k", 13, 256, 176),
    Format("q6_k", 14, 256, 210),
    Format("q8_k", 15, 256, 292),
    Format("iq2_xxs", 16, 256, 66),
    Format("iq2_xs", 17, 256, 74),
    Format("iq3_xxs", 18, 256, 98),
    Format("iq1_s", 19, 256, 50),
    Format("iq4_nl", 20, 32, 18),
    Format("iq3_s", 21, 256, 110),
    Format("iq2_s", 22, 256, 82),
    Format("iq4_xs", 23, 256, 136),
    Format("i8", 24, 1, 1),
    Format("i16", 25, 1, 2),
    Format("i32", 26, 1, 4),
    Format("i64", 27, 1, 8),
    Format("f64", 28, 1, 8),
    Format("iq1_m", 29, 256, 56),
    Format("bf16", 30, 1, 2),
    Format("tq1_0", 34, 256, 54),
    Format("tq2_0", 35, 256, 66),
    Format("mxfp4", 39, 32, 17),
    Format("nvfp4", 40, 64, 36),
    Format("q1_0", 41, 128, 18),
)

FORMATS: dict[str, Format] = {format.name: format for format in _ALL}
_BY_GGML_TYPE = {format.ggml_type: format for format in _ALL}


def format_of_ggml_type(ggml_type: int) -> Format:
    """Return the format that a GGUF file means by the id ``ggml_type``.

    Raises
    ------
    UnsupportedFormatError
        If no format has this id.
    """
    try:
        return _BY_GGML_TYPE[ggml_type]
    except KeyError:
        raise UnsupportedFormatError(f"ggml type {ggml_type} is unknown") from None
