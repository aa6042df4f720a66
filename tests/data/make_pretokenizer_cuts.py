"""Writes pretokenizer_cuts.json: where llama.cpp cuts a text into words, for each name of `tokenizer.ggml.pre`.

Run as `python tests/data/make_pretokenizer_cuts.py`. Needs xllamacpp, which holds llama.cpp's C functions. It looks
for the places of the cuts one by one: two bytes merge, in a vocabulary with no other merge, unless there is a cut
between them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import tempfile
from pathlib import Path

import gguf

from woolly.pretokenizers import PRE_TOKENIZERS
from woolly.subwords import BYTE_TO_CHAR

# No byte stands three times in a row: there one merge would hide the next.
TEXT = (
    "I'm here, we'LL see: 1234567 fooBar  12!\n\n你好 caf\u00e9 \tx\r\n  !?..<tag>/$3.50 кот १२ ²한글 𝟘 "
    "'Tis \t\n\n end_of 日本カナ、ไทย HTTPServer i18n 😀😀 "
)
# Names where llama.cpp does not do what the model's own tokenizer.json says: it takes upper and lower case for the same
# (\p{Lu} for \p{L}), or looks ahead past a cut; and names that it does not know.
LEFT_OUT = {"kimi-k2", "youtu", "tiny_aya", "cohere2moe", "afmoe", "granite", "minimax"}
VOCAB_ONLY = 72  # offset of llama_model_params.vocab_only in xllamacpp 2026.10


class _Params(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * 256)]


def load_library() -> ctypes.CDLL:
    """Return llama.cpp, silenced."""
    folder = importlib.util.find_spec("xllamacpp").submodule_search_locations[0]
    library = ctypes.CDLL(str(next(Path(folder).glob("*.so"))))
    library.llama_model_default_params.restype = _Params
    library.llama_model_load_from_file.restype = ctypes.c_void_p
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Params]
    library.llama_model_get_vocab.restype = ctypes.c_void_p
    library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    library.llama_model_free.argtypes = [ctypes.c_void_p]
    ids, flag = ctypes.POINTER(ctypes.c_int32), ctypes.c_bool
    library.llama_tokenize.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_int32,
        ids,
        ctypes.c_int32,
        flag,
        flag,
    ]
    library.silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    library.llama_log_set(library.silence, None)
    return library


def write_vocabulary(path: Path, pre: str, merge: str) -> None:
    """Write a vocabulary of the 256 bytes and one merge."""
    tokens = [*BYTE_TO_CHAR.values(), merge.replace(" ", "")]
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (
        ("context_length", 8),
        ("embedding_length", 32),
        ("block_count", 1),
        ("feed_forward_length", 32),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges([merge])
    writer.add_bos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def is_cut(library: ctypes.CDLL, path: Path, data: bytes) -> list[bool]:
    """Say for each place between two bytes whether the merge in the vocabulary's file stayed undone there."""
    params = library.llama_model_default_params()
    params.bytes[VOCAB_ONLY] = 1
    model = library.llama_model_load_from_file(str(path).encode(), params)
    ids = (ctypes.c_int32 * (len(data) + 8))()
    n = library.llama_tokenize(library.llama_model_get_vocab(model), data, len(data), ids, len(ids), False, False)
    library.llama_model_free(model)
    merged, at = [False] * len(data), 0
    for token_id in ids[:n]:
        if token_id == 256:
            merged[at] = True
        at += 2 if token_id == 256 else 1
    return [not m for m in merged]


def cuts(library: ctypes.CDLL, pre: str, folder: Path) -> list[str]:
    """Return the words into which llama.cpp cuts TEXT."""
    data = TEXT.encode()
    cut_after = [True] * len(data)
    for pair in sorted({data[i : i + 2] for i in range(len(data) - 1)}):
        path = folder / "vocabulary.gguf"
        write_vocabulary(path, pre, " ".join(BYTE_TO_CHAR[byte] for byte in pair))
        cut = is_cut(library, path, data)
        for i in range(len(data) - 1):
            if data[i : i + 2] == pair:
                cut_after[i] = cut[i]
    words, start = [], 0
    for i, cut in enumerate(cut_after):
        if cut:
            words.append(data[start : i + 1].decode())
            start = i + 1
    return words


def main() -> None:
    """Write the file."""
    library = load_library()
    names_of: dict[tuple[str, ...], list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, row in sorted(PRE_TOKENIZERS.items()):
            if row.byte_level and name not in LEFT_OUT:
                names_of.setdefault(tuple(cuts(library, name, Path(folder))), []).append(name)
    data = {"text": TEXT, "cuts": [{"names": names, "words": list(words)} for words, names in names_of.items()]}
    Path(__file__).with_suffix("").with_name("pretokenizer_cuts.json").write_text(
        json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
