"""Writing a checkpoint as a GGUF file or as a safetensors file, tensor by tensor, on several threads.

Owns the layout of the files that are written. Memory holds a few chunks of rows for each thread, and of tensors whose
rows change places one at a time.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np

from woolly._kernels import check_threads, kernel_formats
from woolly.atomic import check_target, replacing, reserve
from woolly.checkpoint import Checkpoint
from woolly.convert.quantized import convert_rows, target_formats
from woolly.convert.self_contained import METADATA_NAME, encode_metadata
from woolly.errors import UnsupportedFormatError
from woolly.formats import FLOATS, FORMATS, Format
from woolly.gguf_file import DEFAULT_ALIGNMENT
from woolly.metadata import Metadata, StringArray
from woolly.mixes import MIXES, resolve_mix
from woolly.quantizing import naming, read_rows, row_chunks
from woolly.stored_file import aligned

DTYPE_OF_FORMAT = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_DTYPE_ALIGNMENT = 64  # of the data in a safetensors file: a cache line, so that matrices are read without a copy
Progress = Callable[[int], None]


def write_gguf(
    source: Checkpoint,
    path: str | os.PathLike[str],
    *,
    type: str | None = None,
    force: bool = False,
    n_threads: int | None = None,
    show_bytes: Progress = lambda n_bytes: None,
) -> None:
    """Write a GGUF file that other engines open too.

    Parameters
    ----------
    source : Checkpoint
    path : path
    type : str, optional
        What to do with matrices of floats: a name of `woolly.mixes.MIXES`. None leaves them as they are. Norms, biases
        and the router of experts are F32 always.
    force : bool
        Replace a file that is there.
    n_threads : int, optional
    show_bytes : callable, optional
        Told the bytes written so far.

    Raises
    ------
    WoollyError
        The file exists, the disk has too little room, there is no such type, or a weight cannot be quantised.
    OSError
        Writing fails. Whatever happens, `path` is as it was before or whole.
    """
    formats = target_formats(source, type)
    with _opened(Path(path), force) as (descriptor, temporary):
        _write_gguf_header(temporary, source, formats, _file_type(source, formats, type))
        header_bytes = temporary.stat().st_size
        start, offsets, end = _places(source, formats, header_bytes, DEFAULT_ALIGNMENT, pads=True)
        reserve(descriptor, Path(path), end)
        assert start % DEFAULT_ALIGNMENT == 0
        searched = type is not None and resolve_mix(type).is_searched
        _write_tensors(descriptor, source, formats, offsets, check_threads(n_threads), show_bytes, searched=searched)


def write_safetensors(
    source: Checkpoint,
    path: str | os.PathLike[str],
    *,
    format: str = "f32",
    force: bool = False,
    n_threads: int | None = None,
    show_bytes: Progress = lambda n_bytes: None,
) -> None:
    """Write all tensors as floats into a safetensors file that holds the whole model (`woolly.convert.self_contained`).

    Parameters and errors as for `write_gguf`; `format` is f32, f16 or bf16.

    Raises
    ------
    UnsupportedFormatError
        A tensor's format cannot be read.
    """
    formats = _dequantized_formats(source, format)
    with _opened(Path(path), force) as (descriptor, _):
        header = _safetensors_header(source, formats)
        _write_all(descriptor, header, 0)
        _, offsets, end = _places(source, formats, len(header), 1, pads=False)
        reserve(descriptor, Path(path), end)
        _write_tensors(descriptor, source, formats, offsets, check_threads(n_threads), show_bytes)


def bytes_of_gguf(source: Checkpoint, type: str | None) -> int:
    """Bytes of the tensors that `write_gguf` writes: the total of a progress bar."""
    return _sum_bytes(source, target_formats(source, type))


def bytes_of_safetensors(source: Checkpoint, format: str) -> int:
    """Bytes of the tensors that `write_safetensors` writes."""
    return _sum_bytes(source, _dequantized_formats(source, format))


def _sum_bytes(source: Checkpoint, formats: Mapping[str, Format]) -> int:
    return sum(target.nbytes(math.prod(source.tensors[name].shape)) for name, target in formats.items())


def _dequantized_formats(source: Checkpoint, format: str) -> dict[str, Format]:
    formats = {}
    for name, info in source.tensors.items():
        if info.format.name not in kernel_formats():
            raise UnsupportedFormatError(
                f"{source.path}: tensor {name!r} is stored as {info.format.name}, which cannot be dequantised yet"
            )
        formats[name] = FORMATS["f32"] if len(info.shape) == 1 else FORMATS[format]
    # Wide ones first, so that every tensor's address is a multiple of its numbers' size.
    return dict(sorted(formats.items(), key=lambda item: -item[1].block_bytes))


@contextlib.contextmanager
def _opened(path: Path, force: bool) -> Iterator[tuple[int, Path]]:
    """A descriptor of the file to write and its temporary name; it gets its own when the block ends well."""
    check_target(path, force=force)
    with replacing(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CLOEXEC)
        try:
            yield descriptor, temporary
        finally:
            os.close(descriptor)
        check_target(path, force=force)


def _write_all(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at an offset; safe from several threads at once."""
    view = memoryview(data).cast("B")
    while view:
        n_bytes = os.pwrite(descriptor, view, offset)
        view, offset = view[n_bytes:], offset + n_bytes


def _write_tensors(
    descriptor: int,
    source: Checkpoint,
    formats: Mapping[str, Format],
    offsets: Mapping[str, int],
    n_threads: int,
    show_bytes: Progress,
    *,
    searched: bool = False,
) -> None:
    n_written = 0
    with ThreadPoolExecutor(n_threads) as pool:
        for name, target in formats.items():
            info = source.tensors[name]
            n_cols = info.shape[-1]
            stored, row_bytes = source.bytes_of(name), target.nbytes(n_cols)

            def write(chunk: slice, stored=stored, info=info, target=target, at=offsets[name], step=row_bytes) -> int:
                rows = read_rows(stored, chunk, info.format.nbytes(info.shape[-1]))
                with naming(source.path, info.name, chunk.start):
                    out = convert_rows(rows, info.format.name, target.name, searched=searched)
                _write_all(descriptor, out.data, at + chunk.start * step)
                return out.nbytes

            for n_bytes in pool.map(write, row_chunks(math.prod(info.shape[:-1]), n_cols)):
                n_written += n_bytes
                show_bytes(n_written)


def _places(
    source: Checkpoint, formats: Mapping[str, Format], header_bytes: int, alignment: int, *, pads: bool
) -> tuple[int, dict[str, int], int]:
    """Where the data begin, where each tensor begins, and where the file ends."""
    start = end = aligned(header_bytes, alignment)
    offsets = {}
    for name, target in formats.items():
        offsets[name] = end
        end += target.nbytes(math.prod(source.tensors[name].shape))
        if pads:
            end = aligned(end, alignment)
    return start, offsets, end


# --- headers ---


def _file_type(source: Checkpoint, formats: Mapping[str, Format], type: str | None) -> int:
    """The value of general.file_type: the type's, else that of the format that most of the weights have."""
    if type is not None:
        return resolve_mix(type).file_type
    n_weights: dict[str, int] = {}
    for name, info in source.tensors.items():
        n_weights[formats[name].name] = n_weights.get(formats[name].name, 0) + math.prod(info.shape)
    main = max(n_weights, key=n_weights.__getitem__)
    return next((mix.file_type for mix in MIXES.values() if mix.base == main), int(gguf.LlamaFileType.GUESSED))


def _write_gguf_header(path: Path, source: Checkpoint, formats: Mapping[str, Format], file_type: int) -> None:
    """Everything before the tensors' data, as the gguf package writes it."""
    writer = gguf.GGUFWriter(path, source.metadata.get_str("general.architecture"))
    try:
        _add_keys(writer, source.metadata, file_type, {target.name for target in formats.values()})
        for name, info in source.tensors.items():
            n_bytes = formats[name].nbytes(math.prod(info.shape))
            kind = gguf.GGMLQuantizationType(formats[name].ggml_type)
            # not bytes: the writer takes the shape as elements then
            writer.add_tensor_info(name, info.shape, np.dtype(np.float32), n_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add_keys(writer: gguf.GGUFWriter, metadata: Metadata, file_type: int, formats: set[str]) -> None:
    writer.add_file_type(file_type)
    if not formats <= set(FLOATS):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    skipped = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
    for key, value, type_name in metadata.items_with_types():
        if key in skipped or key.startswith("split."):
            continue
        element = type_name.removeprefix("array of ")
        kind = gguf.GGUFValueType[element.upper()]
        if element == type_name:
            writer.add_key_value(key, value, kind)
        elif len(value):  # the writer refuses an empty array
            plain = value.tolist() if isinstance(value, StringArray | np.ndarray) else list(value)
            writer.add_key_value(key, plain, gguf.GGUFValueType.ARRAY, sub_type=kind)


def _safetensors_header(source: Checkpoint, formats: Mapping[str, Format]) -> bytes:
    text = encode_metadata(source.metadata, _file_type(source, formats, None))
    entries: dict[str, object] = {"__metadata__": {"format": "pt", METADATA_NAME: text}}
    end = 0
    for name, target in formats.items():
        shape = source.tensors[name].shape
        begin, end = end, end + target.nbytes(math.prod(shape))
        entries[name] = {"dtype": DTYPE_OF_FORMAT[target.name], "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    raw += b" " * (-(8 + len(raw)) % _DTYPE_ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw
