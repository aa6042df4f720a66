"""The tokenizer of a GGUF file: text to token ids and back, built from the file's metadata and nothing else.

Owns where special tokens are found in a text, what is put around it, and decoding. The parts that tokens play are
`woolly.vocabulary`'s business; how plain text becomes ids is that of `woolly.subwords`.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from woolly.errors import GGUFError, UnsupportedModelError
from woolly.subwords import CHAR_TO_BYTE, SPACE, RankedBPE, SentencePieceBPE, Unigram, WordPiece
from woolly.vocabulary import PREFIX, Keys, TokenType, Vocabulary, read_charsmap, read_merges, read_scores

_ASCII_SPACE = " \t\n\v\f\r"
_ASCII_SPACES = re.compile(f"[{_ASCII_SPACE}]*")


class StreamDecoder:
    """Turns token ids into text one by one, cutting between code points and never inside one.

    What all calls of `feed` and the last `flush` return, joined, equals `Tokenizer.decode` of the same ids. One object
    per stream; not for several threads at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, continuation: bool) -> None:
        self._tokenizer = tokenizer
        self._special_ids = tokenizer.special_ids
        self._skipped_ids = tokenizer.hidden_ids if skip_special else frozenset()
        self._strips_space = tokenizer.adds_space_prefix
        self._at_start = self._strips_space and not continuation
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """Take one token and return the text that is complete by now, possibly none."""
        return self._utf8.decode(self.next_bytes(token_id))

    def flush(self) -> str:
        """Return what is left: U+FFFD for a code point whose last bytes never came, else nothing."""
        return self._utf8.decode(b"", final=True)

    def next_bytes(self, token_id: int) -> bytes:
        """Take one token and return its bytes as they are; `feed` decodes these. Use one of the two, not both."""
        piece = self._tokenizer.token_bytes(token_id)
        if token_id in self._special_ids:
            # encode() puts a space before the text that follows a special token: take it away again.
            self._at_start = self._strips_space
            return b"" if token_id in self._skipped_ids else piece
        if self._at_start:
            self._at_start = False
            return piece.removeprefix(b" ")
        return piece


class Tokenizer:
    """Text to token ids and back, as the model of a GGUF file was trained to read it.

    Build one with `from_gguf` or `from_metadata`.

    Attributes
    ----------
    vocab_size : int
        The number of tokens; ids are below it.
    bos_id, eos_id, eot_id, unk_id, sep_id, pad_id : int or None
        Begin of sequence, end of sequence, end of turn, unknown, separator, padding; None where the file has none.
    eog_ids : frozenset of int
        Every token that ends a generation.
    hidden_ids : frozenset of int
        Control and unknown tokens: what ``skip_special`` leaves out.
    special_ids : frozenset of int
        The hidden ones, and user-defined tokens.
    add_bos, add_eos, add_sep : bool
        What `encode` puts around a text: BOS before it, SEP and EOS after it.
    adds_space_prefix : bool
        Whether `encode` puts a space before a text (SentencePiece's dummy prefix), which `decode` takes away again.

    Notes
    -----
    Encoding and decoding may run in several threads at once.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        keys = Keys(metadata)
        self._vocabulary = vocabulary = Vocabulary(keys)
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id, self.eos_id, self.eot_id = vocabulary.bos_id, vocabulary.eos_id, vocabulary.eot_id
        self.unk_id, self.sep_id, self.pad_id = vocabulary.unk_id, vocabulary.sep_id, vocabulary.pad_id
        self.add_bos, self.add_eos, self.add_sep = vocabulary.add_bos, vocabulary.add_eos, vocabulary.add_sep
        self.eog_ids = vocabulary.eog_ids
        self.hidden_ids = vocabulary.hidden_ids
        self.special_ids = vocabulary.special_ids

        strips = _mask_strippers(vocabulary, keys), _phi3_strippers(vocabulary, keys)
        self._special_text = _SpecialText(vocabulary.tokens, self.special_ids, *strips)
        self._user_defined_text = _SpecialText(vocabulary.tokens, self.special_ids - self.hidden_ids, *strips)
        self.adds_space_prefix = _reads_space_prefix(keys, vocabulary.kind)
        self._charsmap = read_charsmap(keys) if vocabulary.kind == "t5" else None
        self._removes_extra_spaces = keys.get("remove_extra_whitespaces", bool, False)
        self._model = _build_model(keys, vocabulary)
        self._byte_level = vocabulary.pretokenizer is not None and vocabulary.pretokenizer.byte_level
        self._pieces: dict[int, bytes] = {}

    @classmethod
    def from_gguf(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read the tokenizer of a GGUF file; its tensors are not touched, and there need be none.

        Raises
        ------
        GGUFError
            If the file is malformed or holds no tokenizer.
        UnsupportedModelError
            If its tokenizer or pre-tokenizer is unknown.
        """
        from woolly.gguf_file import GGUFFile

        with GGUFFile.open(path) as file:
            return cls(file.metadata)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build a tokenizer from GGUF key-value pairs: `tokenizer.ggml.model`, `.tokens` and so on.

        Values are Python or numpy scalars, numpy arrays or sequences of str. Raises as `from_gguf` does.
        """
        return cls(metadata)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Return the token ids of `text`.

        Parameters
        ----------
        text
            Any string. Lone surrogates, which no UTF-8 text holds, become U+FFFD.
        add_special
            Put BOS before, SEP and EOS after, where the file asks for them (`add_bos` and so on). A text that starts
            with BOS already, as chat templates make it, gets no second one.
        parse_special
            Read the text of control tokens, such as ``<|im_end|>``, as these tokens. Otherwise it is plain text: leave
            it so for what users type. User-defined tokens are found either way.
        """
        special_text = self._special_text if parse_special else self._user_defined_text
        ids: list[int] = []
        for part in special_text.split(_to_unicode(text)):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._model.encode(self._normalize(part))
        return self._framed(ids) if add_special else ids

    @property
    def control_spellings(self) -> list[str]:
        """The texts of control tokens, such as ``<|im_end|>``: what `encode` with `parse_special` looks for."""
        return [self._vocabulary.tokens[i] for i in sorted(self.hidden_ids) if self._vocabulary.tokens[i]]

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Return the token ids of a text whose control tokens count unless they hold a mark.

        BOS comes before, where the file asks for it and the text has none. Nothing comes after: it is to be continued.

        Parameters
        ----------
        text
            As a chat template writes it.
        mark
            A character that is in `text` only where it breaks up the text of a control token that somebody typed. It is
            taken out again before the text around it is encoded.
        """
        ids: list[int] = []
        for part in self._special_text.split(_to_unicode(text)):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._model.encode(self._normalize(part.replace(mark, "")))
        return self._begun(ids)

    def _begun(self, ids: list[int]) -> list[int]:
        """Ids with BOS as the file asks; it is never doubled."""
        if self.add_bos and (not ids or ids[0] != self.bos_id):
            ids.insert(0, self.bos_id)
        return ids

    def _framed(self, ids: list[int]) -> list[int]:
        """Ids with BOS, SEP and EOS as the file asks."""
        self._begun(ids)
        if self.add_sep:
            ids.append(self.sep_id)
        if self.add_eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Parameters
        ----------
        ids
            Token ids; one outside the vocabulary raises ValueError.
        skip_special
            Leave out control and unknown tokens, which otherwise show as their text.
        """
        pieces = StreamDecoder(self, skip_special=skip_special, continuation=False)
        return b"".join([pieces.next_bytes(token_id) for token_id in ids]).decode("utf-8", "replace")

    def stream_decoder(self, *, skip_special: bool = False, continuation: bool = False) -> StreamDecoder:
        """Return a decoder that takes token ids one at a time.

        Parameters
        ----------
        skip_special
            As in `decode`.
        continuation
            The text continues another, so that a space before its first word is part of it. Otherwise vocabularies
            with `adds_space_prefix` lose that space, as in `decode`.
        """
        return StreamDecoder(self, skip_special=skip_special, continuation=continuation)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a text; they need not be whole code points.

        Control, unknown and user-defined tokens give their own text in UTF-8.
        """
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._spell(self._check_id(token_id))
        return piece

    def id_to_token(self, token_id: int) -> str:
        """Return a token as the vocabulary writes it, such as ``Ġthe`` or ``▁the``."""
        return self._vocabulary.tokens[self._check_id(token_id)]

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary writes it, or None if there is none."""
        return self._vocabulary.ids.get(token)

    def token_type(self, token_id: int) -> TokenType:
        """Return what a token is for; ends of generation are control tokens, whatever the file says."""
        return TokenType(self._vocabulary.types[self._check_id(token_id)])

    def _check_id(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens")
        return token_id

    def _spell(self, token_id: int) -> bytes:
        token = self._vocabulary.tokens[token_id]
        if token_id in self.special_ids:
            return token.encode()
        if self.token_type(token_id) is TokenType.BYTE:
            return bytes([self._vocabulary.byte_value(token_id)])
        if not self._byte_level:
            return token.replace(SPACE, " ").encode()
        # Characters outside the alphabet of bytes occur in tokens that were added after training.
        return b"".join(bytes([CHAR_TO_BYTE[c]]) if c in CHAR_TO_BYTE else c.encode() for c in token)

    def _normalize(self, text: str) -> str:
        if self._charsmap is not None:
            text = self._charsmap.replace(text)
        if self._removes_extra_spaces:
            text = re.sub(" +", " ", text.strip(" "))
            if not text:
                return ""
        # A text part comes first or after a special token, and there SentencePiece puts a space.
        return " " + text if self.adds_space_prefix else text


class _SpecialText:
    """Finds the texts of special tokens in a string: the leftmost first, the longest where several begin.

    Parameters
    ----------
    tokens
        The vocabulary.
    ids
        The tokens to look for.
    strips_before, strips_after
        Those of them that swallow the white space before them, or after them.
    """

    def __init__(
        self, tokens: Sequence[str], ids: Iterable[int], strips_before: frozenset[int], strips_after: frozenset[int]
    ) -> None:
        self._ids = {tokens[i]: i for i in ids}
        self._strips_before = strips_before
        self._strips_after = strips_after
        # Thousands of alternatives make a slow regular expression; the few ways in which they begin make a fast one.
        lengths: dict[str, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        for start, sizes in lengths.items():
            if start[0] in self._ids:
                sizes.add(1)
        self._lengths = {start: sorted(sizes, reverse=True) for start, sizes in lengths.items()}
        starts = sorted(lengths, key=len, reverse=True)
        self._start = re.compile("|".join(map(re.escape, starts))) if starts else None

    def split(self, text: str) -> Iterator[str | int]:
        """Yield the ids of special tokens and the non-empty texts between them, in order."""
        start = pos = 0
        while self._start is not None and (candidate := self._start.search(text, pos)):
            pos = candidate.start()
            length = next((n for n in self._lengths[candidate[0]] if text[pos : pos + n] in self._ids), None)
            if length is None:
                pos += 1
                continue
            token_id = self._ids[text[pos : pos + length]]
            before = text[start:pos].rstrip(_ASCII_SPACE) if token_id in self._strips_before else text[start:pos]
            if before:
                yield before
            yield token_id
            pos += length
            if token_id in self._strips_after:
                pos = _ASCII_SPACES.match(text, pos).end()
            start = pos
        if start < len(text):
            yield text[start:]


def _build_model(keys: Keys, vocabulary: Vocabulary) -> SentencePieceBPE | RankedBPE | WordPiece | Unigram:
    """Choose and build what turns plain text into ids."""
    plain_ids = vocabulary.plain_ids()
    if vocabulary.pretokenizer is not None:
        merges = read_merges(keys, vocabulary.ids)
        byte_ids = [] if vocabulary.pretokenizer.byte_level else vocabulary.byte_ids
        # No unknown token: it is often a control token, and the bytes that a vocabulary lacks are in no usual text.
        return RankedBPE(plain_ids, merges, vocabulary.pretokenizer, byte_ids, None)
    if vocabulary.kind == "bert":
        lowercase = keys.get("normalizer.lowercase", bool, True)
        strip_accents = keys.get("normalizer.strip_accents", bool, lowercase)
        return WordPiece(plain_ids, vocabulary.unk_id, lowercase=lowercase, strip_accents=strip_accents)
    scores = read_scores(keys, len(vocabulary.tokens))
    if vocabulary.kind == "llama":
        return SentencePieceBPE(plain_ids, scores, vocabulary.byte_ids, vocabulary.unk_id)
    if vocabulary.unk_id is None:
        raise GGUFError(f"{PREFIX}unknown_token_id is missing, which a vocabulary of kind {vocabulary.kind} needs")
    # What cannot be spelt scores 10 less than the least likely text, which padding and unused tokens are not.
    least = min((scores[i] for i in vocabulary.of_types(TokenType.NORMAL)), default=0.0)
    unused = vocabulary.of_types(TokenType.UNUSED)
    pieces = [
        (token, score) if token in plain_ids and i not in unused else ("", least)
        for i, (token, score) in enumerate(zip(vocabulary.tokens, scores, strict=True))
    ]
    return Unigram(pieces, vocabulary.unk_id)


def _reads_space_prefix(keys: Keys, kind: str) -> bool:
    if kind in ("gpt2", "gemma4"):
        return False
    if keys.get("treat_whitespace_as_suffix", bool, False):
        raise UnsupportedModelError(f"{PREFIX}treat_whitespace_as_suffix is true, which is not supported")
    # WordPiece's words all begin with one.
    return kind == "bert" or keys.get("add_space_prefix", bool, kind == "llama")


def _phi3_strippers(vocabulary: Vocabulary, keys: Keys) -> frozenset[int]:
    """Return the tokens after which white space is lost: a property of Phi 3 that its files do not record."""
    if vocabulary.kind != "llama" or keys.architecture != "phi3":
        return frozenset()
    return frozenset(i for i in vocabulary.special_ids if vocabulary.tokens[i] not in ("<unk>", "<s>", "<|endoftext|>"))


def _mask_strippers(vocabulary: Vocabulary, keys: Keys) -> frozenset[int]:
    """Return the mask tokens before which white space is lost: a property of some encoders, not recorded either."""
    pre = keys.get("pre", str, None)
    encoder = pre in ("jina-v2-de", "jina-v2-es", "jina-v2-code", "modern-bert")
    if encoder or keys.architecture in ("nomic-bert-moe", "jina-bert-v3"):
        mask = vocabulary.ids.get("[MASK]" if pre == "modern-bert" else "<mask>")
        return frozenset() if mask is None else frozenset({mask})
    return frozenset()


def _to_unicode(text: str) -> str:
    """Return `text` without lone surrogates: pairs become their character, the rest U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
