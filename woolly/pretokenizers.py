"""How a BPE vocabulary cuts text into words before it merges: one row for each name of `tokenizer.ggml.pre`.

The patterns are those of the models' own tokenizer.json where it is one regular expression, else those that llama.cpp
uses for the same name. They are in Oniguruma's syntax and run in the `tokenizers` library, one after the other: each
cuts the pieces that the one before it left. This file knows nothing of vocabularies.
"""

import re
import sys
import unicodedata
from dataclasses import dataclass
from functools import cache

from tokenizers import NormalizedString, PreTokenizedString, Regex, pre_tokenizers

from woolly.errors import UnsupportedModelError


@dataclass(frozen=True)
class PreTokenizer:
    """The cuts and flags that belong to one value of `tokenizer.ggml.pre`.

    Parameters
    ----------
    patterns
        Regular expressions in the order in which they cut; matches and the text between them become pieces.
    ignore_merges
        A word that is in the vocabulary as it stands is one token, whatever the merges say.
    add_bos
        Whether BOS precedes a text when the file has no `tokenizer.ggml.add_bos_token`.
    byte_level
        Whether the vocabulary spells bytes as printable characters, as GPT-2 does. Otherwise it spells text as it is,
        with spaces written ▁ and unknown characters as <0xXX> tokens.
    newline_runs
        A run of line feeds that is in the vocabulary is one token: Gemma 4 has no merges for them.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    byte_level: bool = True
    newline_runs: bool = False

    def compile(self) -> pre_tokenizers.PreTokenizer:
        """Build the cutter: its `pre_tokenize_str(text)` lists (piece, (start, end)) and loses no character."""
        steps = []
        for pattern in self.patterns:
            pattern, runs = _IN_THREES.get(pattern, (pattern, None))
            if pattern is not None:
                steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
            if runs is not None:
                runs = runs.replace("{N}", _numbers() if "{N}" in runs else "")
                steps.append(pre_tokenizers.PreTokenizer.custom(_ThreesFromEnd(re.compile(runs))))
        return pre_tokenizers.Sequence(steps)


# Patterns that cut numbers into threes counted from the end (1 234 567) look ahead to the end at every digit, which
# takes quadratic time. They run as another pattern that isolates the number, where one does, and as an expression of
# Python's `re` for the runs that are then cut; {N} in it stands for all characters of the category N.
_IN_THREES: dict[str, tuple[str | None, str]] = {
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))": (r"\p{N}+", r"\A{N}+\Z"),
    r"\d{1,3}(?=(?:\d{3})*\b)": (r"(?<!\d)\d++\b", r"\A\d+\Z"),
    r"(?=(\d{3})+(?!\d))": (None, r"\d+"),
}


class _ThreesFromEnd:
    """Cuts runs into threes from their end."""

    def __init__(self, runs: re.Pattern[str]) -> None:
        self._runs = runs

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        """Cut the pieces of a text (what `tokenizers` calls)."""
        text.split(self._cut)

    def _cut(self, _: int, piece: NormalizedString) -> list[NormalizedString]:
        text = str(piece.normalized)
        cuts = [0]
        for run in self._runs.finditer(text):
            start, end = run.span()
            cuts += range(end - (end - start) // 3 * 3, end, 3)
        return _slices(piece, [*dict.fromkeys([*cuts, len(text)])])


def _slices(piece: NormalizedString, bounds: list[int]) -> list[NormalizedString]:
    """Cut a piece at all of `bounds`, by halves: a slice takes time in proportion to the piece that it is of."""
    if len(bounds) <= 2:
        return [piece]
    middle = len(bounds) // 2
    at = bounds[middle] - bounds[0]
    return _slices(piece[:at], bounds[: middle + 1]) + _slices(piece[at:], bounds[middle:])


@cache
def _numbers() -> str:
    """Return a character class of all numbers: category N."""
    return "[" + "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] == "N") + "]"


def find_pretokenizer(name: str) -> PreTokenizer:
    """Return the row of a `tokenizer.ggml.pre` name; an unknown one raises UnsupportedModelError."""
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModelError(
            f"unknown pre-tokenizer {name[:80]!r} in tokenizer.ggml.pre; known: {known}"
        ) from None


# English contractions, then words, numbers, punctuation and white space: the building blocks of the GPT family.
_APOSTROPHE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_APOSTROPHE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")

# Words that also split where a lower-case letter is followed by an upper-case one (tiktoken's o200k and after).
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


def _cased_words(suffix: str, upper: str = _UPPER, lower: str = _LOWER) -> str:
    return rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{suffix}"


_TEKKEN = rf"{_cased_words('')}|\p{{N}}|{_PUNCTUATION}|{_SPACES}"
_GPT4O = rf"{_cased_words(_APOSTROPHE + '?')}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
_YOUTU = _GPT4O.replace("{1,3}", "")
_NOT_HAN = r"&&[^\p{Han}]]"
_KIMI_WORDS = _cased_words(_APOSTROPHE + "?", _UPPER[:-1] + _NOT_HAN, _LOWER[:-1] + _NOT_HAN)
_KIMI = rf"\p{{Han}}+|{_KIMI_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"

# DeepSeek V3 and its relatives: numbers first, then runs of Chinese and Japanese, then everything else.
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_CJK = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
_DEEPSEEK_WORDS = rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
_DEEPSEEK_V3 = rf"{_DEEPSEEK_WORDS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"

# The letters with case that DeepSeek's first tokenizers list; escapes where Unicode normalisation would change them.
_CASED_LETTERS = (
    r"A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\x{1F7D}ᾀ-ᾴᾶ-ᾼ\x{1FBE}ῂ-ῄῆ-ῌῐ-\x{1FD3}ῖ-\x{1FDB}ῠ-Ῥῲ-ῴῶ-ῼ"
    r"ℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212A}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CJK_HANGUL = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
_WIDE_PUNCTUATION = r"[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+"

_AFMOE_SCRIPTS = (
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{F900}-\x{FAFF}\x{3040}-\x{309F}\x{30A0}-\x{30FF}\x{FF65}-\x{FF9F}"
    r"\x{2F00}-\x{2FDF}\x{0E40}-\x{0E7F}\x{0E80}-\x{0EFF}\x{1780}-\x{17FF}\x{1000}-\x{109F}\x{AA60}-\x{AA7F}"
    r"\x{A9E0}-\x{A9FF}\x{AC00}-\x{D7AF}\x{1100}-\x{11FF}]+"
)
_YOUTU_SCRIPTS = (
    r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+|[\x{FF01}\x{2026}\x{201C}\x{201D}\x{2018}\x{2019}\x{2014}\x{FF1A}\x{FF1B}"
    r"\x{FF0C}\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+|[\x{3105}-\x{312F}]+|" + _CJK
)

_DIGIT = r"\p{N}"
_LINES = r"[^\n]+|\n+"
_JAIS2_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")) + r"|\s"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_EXAONE_MOE = (
    rf"{_APOSTROPHE}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)

_ROWS: tuple[tuple[str, PreTokenizer], ...] = (
    # What llama.cpp does for a file that names no pre-tokenizer.
    ("default", PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    (
        "gpt-2 phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe gigachat a.x-4.0 mellum"
        " modern-bert mpt olmo jais trillion granite-docling exaone4",
        PreTokenizer((_GPT2,)),
    ),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2 granite", PreTokenizer((_DIGIT, _GPT2))),
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", PreTokenizer((_LLAMA3,))),
    ("glm4 glm5", PreTokenizer((_LLAMA3,), ignore_merges=True)),
    ("k2-horizon", PreTokenizer((_LLAMA3.replace(r"?\p{L}+", r"?[\p{L}\p{M}\x{200C}\x{200D}]+"),))),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", PreTokenizer((_QWEN2,))),
    ("qwen35", PreTokenizer((_QWEN35,))),
    ("ufakzeka", PreTokenizer((_QWEN2.removeprefix(_APOSTROPHE + "|"),))),
    ("seed-coder", PreTokenizer((_QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+"),))),
    ("laguna", PreTokenizer((_LINES, _QWEN2))),
    ("minicpm5", PreTokenizer((r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")), ignore_merges=True)),
    ("jais-2", PreTokenizer((_LLAMA3.replace(r"\s+(?!\S)|\s+", _JAIS2_SPACES),))),
    ("tekken", PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2 minimax", PreTokenizer((_GPT4O,))),
    ("granite-embed-multi-97m", PreTokenizer((_GPT4O,), ignore_merges=True)),
    ("tiny_aya cohere2moe", PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))),
    ("kimi-k2", PreTokenizer((_KIMI,))),
    ("youtu", PreTokenizer((_YOUTU_SCRIPTS, _YOUTU), ignore_merges=True)),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK_V3))),
    (
        "spark2_5",
        PreTokenizer(
            (r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK_WORDS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+", _DIGIT),
        ),
    ),
    ("afmoe", PreTokenizer((r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _AFMOE_SCRIPTS, _DEEPSEEK_V3))),
    (
        "deepseek-llm",
        PreTokenizer(
            (r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", rf"\s?{_WIDE_PUNCTUATION}", r"\s+$", _CJK_HANGUL, r"\p{N}+"),
        ),
    ),
    ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_HANGUL, _DIGIT))),
    ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    ("poro-chat bloom gpt3-finnish", PreTokenizer((_BLOOM,))),
    ("viking", PreTokenizer((_BLOOM, _DIGIT))),
    ("bailingmoe bailingmoe2 llada-moe", PreTokenizer((_BAILING,))),
    ("exaone-moe", PreTokenizer((_EXAONE_MOE,))),
    ("superbpe", PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))),
    (
        "chameleon",
        PreTokenizer(
            (
                r"<sentinel:[0-9]+>",
                r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                _DIGIT,
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
    ),
    (
        "gemma4 granite-embed-multi-311m",
        PreTokenizer((_LINES,), add_bos=True, byte_level=False, newline_runs=True),
    ),
    ("sarvam-moe", PreTokenizer((_LINES,), byte_level=False)),
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: row for names, row in _ROWS for name in names.split()}
