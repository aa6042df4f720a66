"""Plain text to token ids: the four algorithms that vocabularies are made for.

- `SentencePieceBPE` merges the neighbours whose concatenation is the token with the highest score.
- `RankedBPE` merges the neighbours that come first in a list of merges.
- `WordPiece` takes the longest token from the left of each word.
- `Unigram` takes the tokens whose scores have the highest sum.

Each has `encode(text) -> ids`. They know nothing of GGUF, of special tokens or of decoding.

The first two are ours, because no library opens fast enough: `tokenizers` needs 0.4 s for the 280,147 merges of Llama
3, and SentencePiece 0.4 s for a model made of Gemma's 262,144 tokens. These index nothing ahead but two dictionaries,
and merge word by word: most words of a text have come before, and what they became is remembered.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush

import numpy as np
from tokenizers import models, normalizers, pre_tokenizers

from woolly.pretokenizers import PreTokenizer

SPACE = "▁"  # how SentencePiece vocabularies write a space

# GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the other 68 for the characters from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHER = [b for b in range(256) if b not in frozenset(_PRINTABLE)]
BYTE_TO_CHAR: dict[int, str] = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_OTHER)}
CHAR_TO_BYTE: dict[str, int] = {char: byte for byte, char in BYTE_TO_CHAR.items()}

_MAX_CACHED_WORDS = 1 << 16
_MAX_CACHED_LENGTH = 64  # characters; longer pieces (lines of digits, base64) hardly come twice


def merge(symbols: list[str], rank: Callable[[str, str], float | None]) -> list[str]:
    """Join neighbours, the pair with the lowest rank first and the leftmost among equals, until no pair has a rank.

    Parameters
    ----------
    symbols
        What to join, in order. Overwritten.
    rank
        The rank of the pair (left, right), or None if they must stay apart.

    Notes
    -----
    A heap of candidate pairs: n log n for n symbols.
    """
    n = len(symbols)
    following = list(range(1, n + 1))
    preceding = list(range(-1, n - 1))
    # A candidate is (rank, left index, right index, length of both); it is stale once either side has grown or gone.
    candidates = []
    for i in range(n - 1):
        if (r := rank(symbols[i], symbols[i + 1])) is not None:
            candidates.append((r, i, i + 1, len(symbols[i]) + len(symbols[i + 1])))
    heapify(candidates)

    def offer(i: int, j: int) -> None:
        if (r := rank(symbols[i], symbols[j])) is not None:
            heappush(candidates, (r, i, j, len(symbols[i]) + len(symbols[j])))

    while candidates:
        _, i, j, length = heappop(candidates)
        left, right = symbols[i], symbols[j]
        if not left or not right or len(left) + len(right) != length:
            continue
        symbols[i] = left + right
        symbols[j] = ""
        after = following[i] = following[j]
        if after < n:
            preceding[after] = i
            offer(i, after)
        if preceding[i] >= 0:
            offer(preceding[i], i)
    return [symbol for symbol in symbols if symbol]


class _WordBPE:
    """What both kinds of BPE share: the cache of words, and what becomes of characters that the vocabulary lacks.

    Parameters
    ----------
    ids
        The tokens that text may become, by text: no control tokens, no byte tokens.
    byte_ids
        The 256 tokens of single bytes, or nothing if the vocabulary has none.
    unk_id
        The token for what cannot be spelt; None drops it.
    """

    def __init__(self, ids: dict[str, int], byte_ids: Sequence[int], unk_id: int | None) -> None:
        self._ids = ids
        self._byte_ids = byte_ids
        self._unk_id = unk_id
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, every character of which is plain text."""
        cache = self._cache
        ids: list[int] = []
        for word in self._words(text):
            word_ids = cache.get(word)
            if word_ids is None:
                word_ids = self._look_up(self._pieces(word))
                if len(word) <= _MAX_CACHED_LENGTH:
                    if len(cache) >= _MAX_CACHED_WORDS:
                        cache.clear()
                    cache[word] = word_ids
            ids += word_ids
        return ids

    def _words(self, text: str) -> Iterable[str]:
        raise NotImplementedError

    def _pieces(self, word: str) -> list[str]:
        raise NotImplementedError

    def _look_up(self, pieces: list[str]) -> list[int]:
        ids: list[int] = []
        unknown_before = False  # a run of unknown characters is one unknown token
        for piece in pieces:
            token_id = self._ids.get(piece)
            if token_id is not None:
                ids.append(token_id)
            elif self._byte_ids:
                ids += [self._byte_ids[byte] for byte in piece.encode()]
            elif self._unk_id is not None and not unknown_before:
                ids.append(self._unk_id)
            unknown_before = token_id is None
        return ids


class _SpaceCutter:
    """Cuts text before its ▁ wherever no token reaches across, so that merging the pieces merges the whole."""

    def __init__(self, ids: dict[str, int]) -> None:
        # NUL separates the tokens here, so a NUL before ▁ cannot be told from a token's end: never cut there.
        before = set(re.findall(rf"([^{SPACE}\0]){SPACE}", "\0".join(ids)))
        uncut = re.escape(SPACE + "\0" + "".join(sorted(before)))
        self._cut = re.compile(f"(?<=[^{uncut}])(?={SPACE})")

    def __call__(self, text: str) -> list[str]:
        return self._cut.split(text)


class SentencePieceBPE(_WordBPE):
    """Merges by score: the pair whose concatenation is the token with the highest score goes first.

    Parameters
    ----------
    scores
        One for each token id; higher merges earlier.
    """

    def __init__(
        self, ids: dict[str, int], scores: Sequence[float], byte_ids: Sequence[int], unk_id: int | None
    ) -> None:
        super().__init__(ids, byte_ids, unk_id)
        self._scores = scores
        self._cutter: _SpaceCutter | None = None

    def _words(self, text: str) -> list[str]:
        # Reading every token takes 30 ms for 262,144 of them: only who encodes pays.
        if self._cutter is None:
            self._cutter = _SpaceCutter(self._ids)
        return self._cutter(text.replace(" ", SPACE))

    def _pieces(self, word: str) -> list[str]:
        return merge(list(word), self._rank)

    def _rank(self, left: str, right: str) -> float | None:
        token_id = self._ids.get(left + right)
        return None if token_id is None else -self._scores[token_id]


class RankedBPE(_WordBPE):
    """Merges by list: the pair that comes first in `merges` goes first.

    Parameters
    ----------
    merges
        Pairs written "left right", in the order of their rank.
    pretokenizer
        How text is cut into words, and how a word is spelt.
    """

    def __init__(
        self,
        ids: dict[str, int],
        merges: Sequence[str],
        pretokenizer: PreTokenizer,
        byte_ids: Sequence[int],
        unk_id: int | None,
    ) -> None:
        super().__init__(ids, byte_ids, unk_id)
        self._merges = merges
        self._pretokenizer = pretokenizer
        self._split = pretokenizer.compile().pre_tokenize_str
        self._cutter: _SpaceCutter | None = None

    def _words(self, text: str) -> Iterable[str]:
        if self._pretokenizer.byte_level:
            return (word for word, _ in self._split(text))
        if self._cutter is None:
            self._cutter = _SpaceCutter(self._ids)
        return (word for line, _ in self._split(text.replace(" ", SPACE)) for word in self._cutter(line))

    def _pieces(self, word: str) -> list[str]:
        if self._pretokenizer.byte_level:
            word = "".join([BYTE_TO_CHAR[byte] for byte in word.encode()])
            whole = self._pretokenizer.ignore_merges
        else:
            whole = self._pretokenizer.newline_runs and not word.strip("\n")
        return [word] if whole and word in self._ids else merge(list(word), self._rank)

    @functools.cached_property
    def _ranks(self) -> dict[str, int]:
        # Takes 40 ms for the 280,147 merges of Llama 3: only who encodes pays.
        return dict(zip(reversed(self._merges), range(len(self._merges) - 1, -1, -1), strict=True))

    def _rank(self, left: str, right: str) -> int | None:
        rank = self._ranks.get(f"{left} {right}")
        # Merges may spell a control token, which plain text must not become.
        return rank if rank is not None and left + right in self._ids else None


class WordPiece:
    """The longest token from the left, then the longest that continues it, for each word.

    Parameters
    ----------
    ids
        Tokens by text; those that begin a word start with ▁.
    unk_id
        The token for a word that cannot be spelt; None drops it.
    lowercase, strip_accents
        How text is normalised before.
    """

    # Longer words are unknown, as in every BERT; it also bounds the search.
    MAX_WORD_LENGTH = 100

    def __init__(self, ids: dict[str, int], unk_id: int | None, *, lowercase: bool, strip_accents: bool) -> None:
        self._ids = ids
        self._unknown = [] if unk_id is None else [unk_id]
        self._normalize = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents).normalize_str
        self._split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`."""
        return [token_id for word, _ in self._split(self._normalize(text)) for token_id in self._spell(word)]

    def _spell(self, word: str) -> list[int]:
        if len(word) > self.MAX_WORD_LENGTH:
            return self._unknown
        ids = []
        rest = SPACE + word
        while rest:
            length = next((n for n in range(len(rest), 0, -1) if rest[:n] in self._ids), 0)
            if not length:
                return self._unknown
            ids.append(self._ids[rest[:length]])
            rest = rest[length:]
        return ids


class CharacterMap:
    """SentencePiece's compiled table of replacements: at each place the longest sequence that has one gets it.

    Parameters
    ----------
    table
        The length of a trie in bytes (4 bytes, little-endian), the trie, the replacements, each ending in NUL.

    Notes
    -----
    The trie is a double array of the Darts-clone library: unsigned 32-bit units, of which bits 0 to 7 and 31 are the
    label, bit 8 says that a value follows, bit 9 that the offset in bits 10 to 30 counts in units of 256. Read here
    and not by `tokenizers`, which aborts on a malformed one and replaces whole graphemes where a part has an entry.
    """

    def __init__(self, table: bytes) -> None:
        trie_end = 4 + int.from_bytes(table[:4], "little")
        self._units = np.frombuffer(table[4:trie_end], "<u4").tolist()
        self._replacements = table[trie_end:]

    def replace(self, text: str) -> str:
        """Return `text` with everything replaced that the table has."""
        data = text.encode()
        out = []
        pos = 0
        while pos < len(data):
            length, value = self._longest(data, pos)
            if length:
                out.append(self._replacements[value:].partition(b"\0")[0])
            else:
                lead = data[pos]
                length = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
                out.append(data[pos : pos + length])
            pos += length
        return b"".join(out).decode("utf-8", "replace")

    def _longest(self, data: bytes, start: int) -> tuple[int, int]:
        """Return the length in bytes of the longest entry at `start`, and its value; (0, 0) if there is none."""
        units, n_units = self._units, len(self._units)
        found = (0, 0)
        node = _offset(units[0]) if units else n_units
        for pos in range(start, len(data)):
            child = node ^ data[pos]
            # A malformed trie may point outside itself: nothing is there.
            if child >= n_units or units[child] & 0x800000FF != data[pos]:
                break
            node = child ^ _offset(units[child])
            if units[child] & 0x100 and node < n_units:
                found = (pos - start + 1, units[node] & 0x7FFFFFFF)
        return found


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)


class Unigram:
    """The tokens whose scores, logarithms of probabilities, have the highest sum (Viterbi's algorithm).

    Parameters
    ----------
    pieces
        (text, score) of every token, in the order of the ids; the text is empty where no text becomes this token.
    unk_id
        The token for what cannot be spelt.
    """

    # Stands for tokens that text must not become. A noncharacter, which encode() takes out of every text.
    _NEVER = "\ufdd0"

    def __init__(self, pieces: Iterable[tuple[str, float]], unk_id: int) -> None:
        vocab = [(text or f"{self._NEVER}{i}", score) for i, (text, score) in enumerate(pieces)]
        self._model = models.Unigram(vocab, unk_id, False)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`."""
        return [token.id for token in self._model.tokenize(text.replace(" ", SPACE).replace(self._NEVER, "\ufffd"))]
