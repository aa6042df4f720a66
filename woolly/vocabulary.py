"""What a GGUF file says of its tokens: their texts and types, and which of them play a part.

Owns the keys under `tokenizer.ggml.`, their defaults and their checks, and which tokens end a generation. Knows nothing
of how text becomes tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from woolly._kernels.scan import find_bad_merge
from woolly.errors import GGUFError, UnsupportedModelError
from woolly.metadata import Metadata
from woolly.pretokenizers import PreTokenizer, find_pretokenizer
from woolly.subwords import CharacterMap

PREFIX = "tokenizer.ggml."


class TokenType(IntEnum):
    """What a token is for (the values of `tokenizer.ggml.token_type`)."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Kind:
    """What holds for a value of `tokenizer.ggml.model` where the file is silent."""

    unk_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    sep_id: int | None = None
    pad_id: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    add_sep: bool = False
    add_space_prefix: bool = False
    pre: str | None = None  # the pre-tokenizer, where the file's own name for it does not count


# The usual ids are those of the models that each kind was first written for. Byte-level BPE has no usual ids.
KINDS: dict[str, Kind] = {
    "llama": Kind(unk_id=0, bos_id=1, eos_id=2, add_bos=True, add_space_prefix=True),
    "gpt2": Kind(),
    "gemma4": Kind(pre="gemma4"),
    "bert": Kind(unk_id=100, bos_id=101, sep_id=102, pad_id=0, add_bos=True, add_sep=True, add_space_prefix=True),
    "t5": Kind(unk_id=2, eos_id=1, pad_id=0, add_eos=True),
}

# Tokens that end a generation, told by their text as llama.cpp does, because files name at most two of them by id.
_END_OF_TURN = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
)
_END_OF_GENERATION = (
    *_END_OF_TURN,
    *("<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "<|eom_id|>", "[EOS]", "<eos>", "<turn|>"),
    *("<|tool_response>", "[e~[", "<|ifm|im_end|>"),
)
# Marks of code completion of which the first in the vocabulary ends a generation too: padding, repository, file.
_CODE_MARKS = (
    ("fim_pad_token_id", ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    ("fim_rep_token_id", ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    ("fim_sep_token_id", ("<|file_sep|>", "<|plamo:file_separator|>")),
)
# Marks around the gap that code completion fills: the first of each kind is no text, whatever type the file gives it.
_GAP_MARKS = tuple(
    tuple(mark.format(*names) for mark in ("<|fim_{0}|>", "<fim-{0}>", "<fim_{0}>", "<｜fim▁{1}｜>", "<{2}>", "▁<{2}>"))
    + tuple(mark.format(names[0]) for mark in ("<|code_{}|>", "<|{}|>", "<|plamo:fim_{}|>"))
    for names in (("prefix", "begin", "PRE"), ("suffix", "hole", "SUF"), ("middle", "end", "MID"))
)
# Marks inside a reply of gpt-oss: part of the text, whatever type the file gives them.
_HARMONY_MARKS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Keys:
    """The keys under `tokenizer.ggml.`, checked for their type.

    Parameters
    ----------
    metadata
        The key-value pairs of a GGUF file: Python or numpy scalars, numpy arrays, sequences of str.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        architecture = metadata.get("general.architecture")
        self.architecture = architecture if isinstance(architecture, str) else None

    def get(self, name: str, kind: type, default: Any) -> Any:
        """Return a scalar, or `default` if the file has none; another type than `kind` raises GGUFError."""
        value = self.metadata.get(PREFIX + name)
        if value is None:
            return default
        if isinstance(value, np.generic):
            value = value.item()
        if type(value) is not kind:
            raise self.error(name, f"is of type {type(value).__name__}, expected {kind.__name__}")
        return value

    def error(self, name: str, problem: str) -> GGUFError:
        """Return what to raise for a key, with its place in the file where the metadata know it."""
        place = self.metadata.at(PREFIX + name) if isinstance(self.metadata, Metadata) else ""
        return GGUFError(f"{PREFIX}{name} {problem}{place}")

    def token_id(self, name: str, default: int | None, vocab_size: int, *, is_used: bool = True) -> int | None:
        """Return a token id; one that the file names must be in the vocabulary, a default that is not becomes None.

        is_used : one that nothing here uses becomes None, too: converters wrote -1 for "none".
        """
        value = self.get(name, int, None)
        if value is None:
            return default if default is not None and default < vocab_size else None
        if 0 <= value < vocab_size:
            return value
        if is_used:
            raise self.error(name, f"is {value}, outside the vocabulary of {vocab_size} tokens")
        return None

    def n_strings(self, name: str) -> int:
        """Return the length of an array of strings, which must be there; makes none of them."""
        value = self.metadata.get(PREFIX + name)
        if value is None:
            raise GGUFError(f"{PREFIX}{name} is missing")
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if not is_list or (len(value) and not isinstance(value[0], str)):
            raise self.error(name, "is not an array of strings")
        return len(value)

    def strings(self, name: str) -> list[str]:
        """Return an array of strings, which must be there."""
        self.n_strings(name)
        return list(self.metadata[PREFIX + name])

    def numbers(self, name: str, length: int, dtype_kinds: str) -> NDArray[Any] | None:
        """Return an array of `length` numbers, of which a file may have more, or None if it has none."""
        value = self.metadata.get(PREFIX + name)
        if value is None:
            return None
        numbers = np.asarray(value)
        if numbers.dtype.kind not in dtype_kinds or numbers.ndim != 1 or len(numbers) < length:
            found = f"has {numbers.size} values of type {numbers.dtype}"
            raise self.error(name, f"{found}, expected {length} numbers, one for each token")
        return numbers[:length]


class Vocabulary:
    """The tokens of a file and the parts they play.

    Attributes
    ----------
    kind : str
        The value of `tokenizer.ggml.model`, one of `KINDS`.
    pretokenizer : PreTokenizer or None
        How text is cut before it is merged; None for the kinds that merge or search by score.
    tokens : list of str
        The texts, in the order of the ids.
    ids : dict of str to int
        The ids, by text.
    types : int32, (n_tokens,)
        `TokenType` values, corrected where a token's text shows that the file is wrong.
    bos_id, eos_id, eot_id, unk_id, sep_id, pad_id : int or None
        Tokens that play a part, None where there is none.
    add_bos, add_eos, add_sep : bool
        What is put around a text.
    eog_ids, hidden_ids, special_ids : frozenset of int
        Tokens that end a generation; control and unknown tokens; these and user-defined ones.
    byte_ids : list of int
        The tokens of the 256 bytes, or nothing.
    """

    def __init__(self, keys: Keys) -> None:
        self.kind = _read_kind(keys)
        kind = KINDS[self.kind]
        self.pretokenizer = self._find_pretokenizer(keys)
        self.types = _read_types(keys, keys.n_strings("tokens"))  # what lengths can tell, before any string is made
        self.tokens = keys.strings("tokens")
        self.ids = _index(keys, self.tokens)
        self._read_ids(keys, kind)
        self._read_additions(keys, kind)
        self.eog_ids = self._find_ends(keys)
        self.hidden_ids = self.of_types(TokenType.CONTROL, TokenType.UNKNOWN)
        self.special_ids = self.hidden_ids | self.of_types(TokenType.USER_DEFINED)
        self.byte_ids = self._find_byte_ids()

    def of_types(self, *types: TokenType) -> frozenset[int]:
        """Return the ids of all tokens of the given types."""
        return frozenset(np.flatnonzero(np.isin(self.types, types)).tolist())

    def plain_ids(self) -> dict[str, int]:
        """Return the tokens that plain text may become, by text: no control, unknown or byte tokens."""
        ids = self.ids.copy()
        for token_id in self.hidden_ids | self.of_types(TokenType.BYTE):
            del ids[self.tokens[token_id]]
        return ids

    def byte_value(self, token_id: int) -> int:
        """Return the byte that a token of type BYTE stands for."""
        match = _BYTE_TOKEN.fullmatch(self.tokens[token_id])
        if match is None:
            token = self.tokens[token_id][:80]
            raise GGUFError(f"{PREFIX}tokens has {token!r} of type byte as id {token_id}, expected <0x00> to <0xFF>")
        return int(match[1], 16)

    def _find_pretokenizer(self, keys: Keys) -> PreTokenizer | None:
        if self.kind not in ("gpt2", "gemma4"):
            return None
        # A file without a name is treated as llama.cpp treats it.
        return find_pretokenizer(KINDS[self.kind].pre or keys.get("pre", str, None) or "default")

    def _read_ids(self, keys: Keys, kind: Kind) -> None:
        n_tokens = len(self.tokens)
        self.bos_id = keys.token_id("bos_token_id", kind.bos_id, n_tokens)
        self.eos_id = keys.token_id("eos_token_id", kind.eos_id, n_tokens)
        self.unk_id = keys.token_id("unknown_token_id", kind.unk_id, n_tokens)
        # The key's first spelling was wrong, and is what most files have.
        separator = keys.token_id("separator_token_id", kind.sep_id, n_tokens)
        self.sep_id = keys.token_id("seperator_token_id", separator, n_tokens)
        self.pad_id = keys.token_id("padding_token_id", kind.pad_id, n_tokens, is_used=False)
        self.eot_id = keys.token_id("eot_token_id", self._first(_END_OF_TURN), n_tokens)

    def _read_additions(self, keys: Keys, kind: Kind) -> None:
        bos = kind.add_bos if self.pretokenizer is None else self.pretokenizer.add_bos
        self.add_bos = _adds(keys, "bos", self.bos_id, bos)
        self.add_eos = _adds(keys, "eos", self.eos_id, kind.add_eos)
        # The separator follows a single text in BERT only, in whose files EOS is the separator again. Elsewhere
        # add_sep_token is about pairs of texts.
        self.add_sep = kind.add_sep and _adds(keys, "sep", self.sep_id, True)
        if self.add_sep and self.eos_id == self.sep_id:
            self.add_eos = False
        if self.kind == "gemma4":
            # Files say false by mistake, and the model needs it.
            self.add_bos = self.bos_id is not None

    def _first(self, tokens: Iterable[str]) -> int | None:
        return next((self.ids[token] for token in tokens if token in self.ids), None)

    def _find_ends(self, keys: Keys) -> frozenset[int]:
        """Collect the tokens that end a generation, and give those among all tokens their right type."""
        n_tokens = len(self.tokens)
        ends = {self.ids[token] for token in _END_OF_GENERATION if token in self.ids}
        ends |= {keys.token_id(name, self._first(marks), n_tokens) for name, marks in _CODE_MARKS} - {None}
        self.types[list(ends)] = TokenType.CONTROL
        gaps = [self._first(marks) for marks in _GAP_MARKS]
        self.types[[token_id for token_id in gaps if token_id is not None]] = TokenType.CONTROL
        ends |= {self.eos_id, self.eot_id, keys.token_id("eom_token_id", None, n_tokens)} - {None}
        for mark in _HARMONY_MARKS:
            if mark in self.ids:
                self.types[self.ids[mark]] = TokenType.USER_DEFINED

        def has(token: str) -> bool:
            return self.ids.get(token) in ends

        # gpt-oss and Solar end only a part of the reply with <|end|>; Gemma 4 has </s> as an HTML tag.
        calls = has("<|call|>") or has("<|calls|>")
        if has("<|end|>") and calls and (has("<|return|>") or has("<|flush|>")):
            ends.remove(self.ids["<|end|>"])
            self.types[self.ids["<|end|>"]] = TokenType.USER_DEFINED
        if has("<|tool_response>") and has("</s>"):
            ends.remove(self.ids["</s>"])
            self.types[self.ids["</s>"]] = TokenType.NORMAL
        return frozenset(ends)

    def _find_byte_ids(self) -> list[int]:
        found = {self.byte_value(token_id): token_id for token_id in self.of_types(TokenType.BYTE)}
        if not found and self.kind != "bert" and not (self.pretokenizer and self.pretokenizer.byte_level):
            # Some files say that they are text, or say nothing.
            found = {byte: self.ids[text] for byte in range(256) if (text := f"<0x{byte:02X}>") in self.ids}
            if len(found) == 256:
                self.types[list(found.values())] = TokenType.BYTE
        return [found[byte] for byte in range(256)] if len(found) == 256 else []


def read_scores(keys: Keys, n_tokens: int) -> list[float]:
    """Return the score of each token, 0 where the file has none."""
    scores = keys.numbers("scores", n_tokens, "fiu")
    if scores is None:
        return [0.0] * n_tokens
    finite = np.isfinite(scores)
    if not finite.all():
        token_id = int(finite.argmin())
        raise keys.error("scores", f"has {scores[token_id]} for token {token_id}, expected a finite number")
    return scores.tolist()


def read_merges(keys: Keys, ids: dict[str, int]) -> list[str]:
    """Return the merges, "left right" each; their concatenation must be a token."""
    merges = keys.strings("merges")
    number = find_bad_merge(merges, ids)  # a vocabulary can have 300,000
    if number >= 0:
        merge = merges[number][:80]
        raise keys.error("merges", f"has {merge!r} as number {number}, expected the two parts of a token")
    return merges


def read_charsmap(keys: Keys) -> CharacterMap | None:
    """Return the character replacements of the file, None if it has none."""
    table = keys.metadata.get(PREFIX + "precompiled_charsmap")
    if table is None:
        return None
    array = np.asarray(table)
    data = array.astype(np.uint8).tobytes() if array.dtype.kind in "iu" else b""
    trie_bytes = int.from_bytes(data[:4], "little")
    if len(data) < 4 or trie_bytes % 4 or trie_bytes > len(data) - 4:
        problem = f"is no table: {array.size} bytes, of which {trie_bytes} the trie"
        raise keys.error("precompiled_charsmap", problem)
    return CharacterMap(data)


def _read_kind(keys: Keys) -> str:
    kind = keys.get("model", str, None)
    if kind is None:
        raise GGUFError(f"{PREFIX}model is missing: the file has no tokenizer")
    if kind not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise UnsupportedModelError(f"unknown tokenizer {kind[:80]!r} in {PREFIX}model; known: {known}")
    return kind


def _adds(keys: Keys, name: str, token_id: int | None, default: bool) -> bool:
    asked = keys.get(f"add_{name}_token", bool, None)
    if asked and token_id is None:
        raise keys.error(f"add_{name}_token", f"is true, but {PREFIX}{name}_token_id is missing")
    return (default and token_id is not None) if asked is None else asked


def _index(keys: Keys, tokens: list[str]) -> dict[str, int]:
    """Map each token to its id; empty ones, which are placeholders, get a name first."""
    if not all(tokens):
        tokens[:] = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) != len(tokens):
        first, token = next((i, token) for i, token in enumerate(tokens) if ids[token] != i)
        raise keys.error("tokens", f"has {token[:80]!r} twice, as ids {first} and {ids[token]}")
    return ids


def _read_types(keys: Keys, n_tokens: int) -> NDArray[np.int32]:
    if n_tokens == 0:
        raise keys.error("tokens", "is empty")
    types = keys.numbers("token_type", n_tokens, "iu")
    if types is None:
        return np.full(n_tokens, TokenType.NORMAL, np.int32)
    if types.min() < TokenType.UNDEFINED or types.max() > TokenType.BYTE:
        raise keys.error("token_type", f"has values from {types.min()} to {types.max()}, expected 0 to 6")
    return types.astype(np.int32)
