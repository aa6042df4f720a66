"""The registry of tensor formats against the gguf package's tables."""

import dataclasses

import gguf
import pytest

from woolly.errors import UnsupportedFormatError
from woolly.formats import FORMATS, format_of_ggml_type


@pytest.mark.parametrize("ggml_type", list(gguf.GGML_QUANT_SIZES), ids=lambda ggml_type: ggml_type.name)
def test_every_format_of_the_gguf_package_is_registered_with_its_sizes(ggml_type):
    format = format_of_ggml_type(int(ggml_type))
    assert format.name == ggml_type.name.lower()
    assert (format.block_size, format.block_bytes) == gguf.GGML_QUANT_SIZES[ggml_type]


def test_names_and_types_are_unique_and_find_the_same_format():
    assert len({format.ggml_type for format in FORMATS.values()}) == len(FORMATS)
    for name, format in FORMATS.items():
        assert format.name == name
        assert format_of_ggml_type(format.ggml_type) is format


@pytest.mark.parametrize("ggml_type", [-1, 4, 5, 31, 36, 2**31, 2**32 - 1])
def test_an_unknown_type_is_refused_with_its_id(ggml_type):
    with pytest.raises(UnsupportedFormatError, match=rf"^ggml type {ggml_type} is unknown$"):
        format_of_ggml_type(ggml_type)


def test_nbytes_counts_whole_blocks():
    assert FORMATS["f32"].nbytes(3) == 12
    assert FORMATS["q4_0"].nbytes(64) == 36
    assert FORMATS["q6_k"].nbytes(0) == 0
    assert FORMATS["q8_0"].nbytes(2**70) == 34 * 2**65


@pytest.mark.parametrize("n_elements", [1, 31, 33, -32])
def test_nbytes_refuses_a_broken_block(n_elements):
    with pytest.raises(ValueError, match=rf"^q4_0: {n_elements} elements are no whole number of blocks of 32$"):
        FORMATS["q4_0"].nbytes(n_elements)


def test_formats_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FORMATS["f32"].block_bytes = 2
