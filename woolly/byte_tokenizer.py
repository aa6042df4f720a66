"""A tokenizer without a vocabulary file: bytes are tokens. It stands in where weights are generated.

Ids 0 to 255 are bytes, then come BOS, EOS, an unknown token that no text makes, and the space, which SentencePiece
vocabularies do not count among the bytes. Every id above is a word made of it, " #300": harmless to print, and plainly
noise. `gguf_metadata` says the same as a GGUF file would.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from woolly.subwords import SPACE
from woolly.tokenizer import StreamDecoder
from woolly.vocabulary import TokenType

_SPACE_BYTE = ord(" ")
BOS_ID, EOS_ID, UNK_ID = 256, 257, 258
_SPECIAL = {BOS_ID: "<s>", EOS_ID: "</s>", UNK_ID: "<unk>"}
SPACE_ID = 259
MIN_VOCAB_SIZE = SPACE_ID + 1


class ByteTokenizer:
    """The interface of `woolly.Tokenizer`, over bytes.

    Parameters
    ----------
    vocab_size : int
        At least 260.

    Notes
    -----
    No token ends a generation: noise has no end, and a measurement should run as long as it was told to.
    """

    bos_id, eos_id, unk_id = BOS_ID, EOS_ID, UNK_ID
    eot_id = sep_id = pad_id = None
    add_bos, add_eos, add_sep = True, False, False
    adds_space_prefix = False
    eog_ids: frozenset[int] = frozenset()
    hidden_ids = special_ids = frozenset(_SPECIAL)

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(f"ByteTokenizer: vocab_size must be at least {MIN_VOCAB_SIZE}, got {vocab_size}")
        self.vocab_size = vocab_size

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The bytes of a text, after BOS; with `parse_special`, "<s>" and its like are the tokens they spell."""
        ids = _split_special(text) if parse_special else _bytes_of(text)
        return [BOS_ID, *ids] if add_special and ids[:1] != [BOS_ID] else ids

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """As `Tokenizer.encode_marked`: special tokens count unless they hold the mark."""
        ids = _split_special(text, mark)
        return ids if ids[:1] == [BOS_ID] else [BOS_ID, *ids]

    @property
    def control_spellings(self) -> list[str]:
        """The texts of the special tokens."""
        return list(_SPECIAL.values())

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        pieces = self.stream_decoder(skip_special=skip_special)
        return b"".join([pieces.next_bytes(token_id) for token_id in ids]).decode("utf-8", "replace")

    def stream_decoder(self, *, skip_special: bool = False, continuation: bool = False) -> StreamDecoder:
        """A decoder that takes ids one at a time."""
        return StreamDecoder(self, skip_special=skip_special, continuation=continuation)  # type: ignore[arg-type]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens")
        if token_id < 256:
            return bytes([token_id])
        return b" " if token_id == SPACE_ID else _SPECIAL.get(token_id, f" #{token_id}").encode()

    def id_to_token(self, token_id: int) -> str:
        """A token as a vocabulary writes it, such as "<0x41>" or "▁#300"."""
        self.token_bytes(token_id)
        return _token(token_id)


def gguf_metadata(vocab_size: int) -> dict[str, Any]:
    """The same vocabulary as GGUF key-value pairs: a SentencePiece one whose only words are bytes.

    Nothing merges, since no two characters make a token.
    """
    types = [_token_type(i) for i in range(vocab_size)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [_token(i) for i in range(vocab_size)],
        "tokenizer.ggml.scores": [0.0] * vocab_size,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.bos_token_id": BOS_ID,
        "tokenizer.ggml.eos_token_id": EOS_ID,
        "tokenizer.ggml.unknown_token_id": UNK_ID,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _token(token_id: int) -> str:
    if token_id < 256:
        return f"<0x{token_id:02X}>"
    if token_id == SPACE_ID:
        return SPACE
    return _SPECIAL.get(token_id, f"{SPACE}#{token_id}")


def _token_type(token_id: int) -> TokenType:
    if token_id < 256:
        return TokenType.BYTE
    if token_id == UNK_ID:
        return TokenType.UNKNOWN
    return TokenType.CONTROL if token_id in _SPECIAL else TokenType.NORMAL


def _bytes_of(text: str) -> list[int]:
    # SentencePiece cannot tell its mark of a space from a space; lone surrogates are in no UTF-8 text.
    plain = text.replace(SPACE, " ").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return [SPACE_ID if byte == _SPACE_BYTE else byte for byte in plain.encode()]


def _split_special(text: str, mark: str = "") -> list[int]:
    """Ids of a text in which special tokens count; a mark is taken out of the text between them."""
    ids: list[int] = []
    while text:
        at, token_id = min(((text.find(token), i) for i, token in _SPECIAL.items() if token in text), default=(-1, 0))
        plain = text if at < 0 else text[:at]
        ids += _bytes_of(plain.replace(mark, "") if mark else plain)
        if at < 0:
            break
        ids.append(token_id)
        text = text[at + len(_SPECIAL[token_id]) :]
    return ids
