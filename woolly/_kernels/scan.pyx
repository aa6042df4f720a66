"""Walks over the string arrays of a GGUF file: a vocabulary of 262,144 words in about a millisecond.

Owns the bytes of one string array: for each string a little-endian uint64 length, then that many bytes. It knows
nothing of keys or types; `woolly.gguf_file` puts those into its error messages.
"""

from cpython.unicode cimport PyUnicode_Concat, PyUnicode_DecodeUTF8, PyUnicode_FindChar, PyUnicode_Substring
from libc.stdint cimport int64_t, uint8_t, uint64_t

import numpy as np

cdef uint64_t load_u64(const uint8_t *at) noexcept nogil:
    """Read a little-endian uint64 at any address; compilers make it one load."""
    cdef uint64_t value = 0
    cdef int i
    for i in range(8):
        value |= <uint64_t>at[i] << (8 * i)
    return value


cdef Py_ssize_t walk(
    const uint8_t *data, Py_ssize_t size, Py_ssize_t *pos, Py_ssize_t count, int64_t *starts, int64_t *lengths
) noexcept nogil:
    """Step over up to `count` strings from `pos[0]` on; return how many lie within the data.

    `pos[0]` is left after the last good string. Where `starts` is not NULL, each string's place is written down.
    """
    cdef Py_ssize_t i
    cdef uint64_t length
    for i in range(count):
        if size - pos[0] < 8:
            return i
        length = load_u64(data + pos[0])
        if length > <uint64_t>(size - pos[0] - 8):
            return i
        if starts != NULL:
            starts[i] = pos[0] + 8
            lengths[i] = <int64_t>length
        pos[0] += 8 + <Py_ssize_t>length
    return count


def scan_strings(const uint8_t[::1] data not None, Py_ssize_t offset, Py_ssize_t count, /):
    """Find `count` strings that follow one another from `offset` on.

    Parameters
    ----------
    data : uint8, (n_bytes,), C-contiguous
        The bytes of the file, or of its beginning.
    offset : int
        Byte at which the first string's length stands.
    count : int
        Strings to find.

    Returns
    -------
    starts, lengths : int64, (count,)
        Each string's first byte within `data`, and its bytes.
    end : int
        The byte after the last string.

    Raises
    ------
    ValueError
        If a string does not lie within `data`, or an argument is negative or past its end. Nothing has been allocated
        then.

    Notes
    -----
    Runs without the GIL.
    """
    cdef Py_ssize_t size = data.shape[0], pos = offset, found
    cdef int64_t[::1] starts_view, lengths_view
    if not 0 <= offset <= size:
        raise ValueError(f"offset {offset} is not within the {size} bytes")
    if not 0 <= count <= (size - offset) // 8:
        raise ValueError(f"{count} strings at byte {offset} do not fit into {size - offset} bytes")
    if count == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64), offset

    # The first walk only checks, so that a false count costs no memory.
    with nogil:
        found = walk(&data[0], size, &pos, count, NULL, NULL)
    if found == count:
        starts, lengths = np.empty(count, np.int64), np.empty(count, np.int64)
        starts_view, lengths_view = starts, lengths
        pos = offset
        with nogil:
            found = walk(&data[0], size, &pos, count, &starts_view[0], &lengths_view[0])
    if found < count:
        place = f"string {found} at byte {pos}"
        if size - pos < 8:
            raise ValueError(f"{place} needs 8 bytes for its length, {size - pos} are left")
        raise ValueError(f"{place} has length {load_u64(&data[pos])}, {size - pos - 8} bytes are left")
    return starts, lengths, pos


def decode_strings(
    const uint8_t[::1] data not None, const int64_t[::1] starts not None, const int64_t[::1] lengths not None, /
):
    """Decode strings from UTF-8; bytes that are not UTF-8 become U+FFFD.

    Parameters
    ----------
    data : uint8, (n_bytes,), C-contiguous
        The bytes that `starts` points into.
    starts, lengths : int64, (n,), C-contiguous
        As `scan_strings` returns them.

    Returns
    -------
    list of str
        One for each start.

    Raises
    ------
    ValueError
        If the two arrays differ in length, or a string does not lie within `data`.
    """
    cdef Py_ssize_t size = data.shape[0], i
    cdef int64_t start, length
    cdef list strings = []
    if starts.shape[0] != lengths.shape[0]:
        raise ValueError(f"there are {starts.shape[0]} starts and {lengths.shape[0]} lengths")
    for i in range(starts.shape[0]):
        start, length = starts[i], lengths[i]
        if start < 0 or start > size or length < 0 or length > size - start:
            raise ValueError(f"string {i} at byte {start} has length {length}, there are {size} bytes")
        strings.append(PyUnicode_DecodeUTF8(<const char *>&data[0] + start, length, "replace") if length else "")
    return strings


def find_bad_merge(list merges not None, dict ids not None, /):
    """Find the first merge that is not the two parts of a token with a space between them.

    Parameters
    ----------
    merges : list of str
        Such as "th e".
    ids : dict of str to int
        The tokens.

    Returns
    -------
    int
        Its number, or -1 if there is none.
    """
    cdef Py_ssize_t i, at, length
    cdef str merge
    for i in range(len(merges)):
        merge = merges[i]
        length = len(merge)
        at = PyUnicode_FindChar(merge, ord(" "), 0, length, 1)
        if at < 0 or PyUnicode_FindChar(merge, ord(" "), at + 1, length, 1) >= 0:
            return i
        if PyUnicode_Concat(PyUnicode_Substring(merge, 0, at), PyUnicode_Substring(merge, at + 1, length)) not in ids:
            return i
    return -1
