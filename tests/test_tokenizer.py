"""Tokenizers: real vocabularies with known ids, small made ones for each kind and rule, and malformed metadata."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from woolly.errors import GGUFError, UnsupportedModelError
from woolly.gguf_file import GGUFFile
from woolly.pretokenizers import PRE_TOKENIZERS
from woolly.subwords import BYTE_TO_CHAR, merge
from woolly.tokenizer import Tokenizer
from woolly.vocabulary import TokenType

NORMAL, UNKNOWN, CONTROL, USER, BYTE = (
    TokenType.NORMAL,
    TokenType.UNKNOWN,
    TokenType.CONTROL,
    TokenType.USER_DEFINED,
    TokenType.BYTE,
)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]

# --- small vocabularies ---


def metadata(kind: str, types: dict[str, int], /, **keys: object) -> dict[str, object]:
    """The metadata of a vocabulary given as types by text; keys are those under tokenizer.ggml."""
    values = {"model": kind, "tokens": list(types), "token_type": np.array(list(types.values()), np.int32), **keys}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def byte_level(pairs: str = "", special: dict[str, int] | None = None, /, **keys: object) -> dict[str, object]:
    """Byte-level BPE: 256 bytes as ids 0 to 255, what the merges make ("a b,c d"), special tokens."""
    merges = [pair for pair in pairs.split(",") if pair]
    tokens = dict.fromkeys(BYTE_TO_CHAR[byte] for byte in range(256))
    tokens |= dict.fromkeys(pair.replace(" ", "") for pair in merges)
    types = dict.fromkeys(tokens, NORMAL) | (special or {})
    return metadata("gpt2", types, **{"pre": "gpt-2", "merges": merges, **keys})


def sentencepiece(
    scored: dict[str, float], special: dict[str, int] | None = None, /, **keys: object
) -> dict[str, object]:
    """SentencePiece BPE: <unk>, <s>, </s>, 256 bytes as ids 3 to 258, tokens with their scores, special tokens."""
    types = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, **dict.fromkeys(BYTE_TOKENS, BYTE)}
    types |= dict.fromkeys(scored, NORMAL) | (special or {})
    values = np.array([scored.get(token, 0.0) for token in types], np.float32)
    return metadata("llama", types, **{"scores": values, **keys})


def pieces(tokenizer: Tokenizer, text: str, **options: bool) -> list[str]:
    """The tokens of a text as the vocabulary writes them, without BOS and EOS."""
    return [tokenizer.id_to_token(i) for i in tokenizer.encode(text, add_special=False, **options)]


CHATML = {"<|endoftext|>": CONTROL, "<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<think>": USER, "<|pad|>": UNKNOWN}
BYTE_LEVEL = Tokenizer.from_metadata(byte_level("h e,l l,he ll,Ġ Ġ,Ġ w,Ċ Ċ,Ã ©", CHATML, eos_token_id=263))
SCORES = {"▁": -1.0, "h": -2.0, "e": -3.0, "l": -4.0, "he": -5.0, "ll": -6.0, "▁h": -7.0, "hell": -8.0, "▁hell": -9.0}
SPACE_PREFIX = Tokenizer.from_metadata(sentencepiece(SCORES, {"<|x|>": CONTROL, "<tool>": USER}))
WORDPIECE = metadata(
    "bert",
    {"[PAD]": CONTROL, "[UNK]": CONTROL, "[CLS]": CONTROL, "[SEP]": CONTROL}
    | dict.fromkeys(["▁hello", "▁un", "aff", "able", "▁,", "▁naive", "▁你"], NORMAL),
    bos_token_id=2,
    unknown_token_id=1,
    seperator_token_id=3,
)
UNIGRAM = metadata(
    "t5",
    {"<pad>": CONTROL, "</s>": CONTROL, "<unk>": UNKNOWN, **dict.fromkeys(["▁", "▁ab", "▁a", "b", "c", "bc"], NORMAL)},
    scores=np.array([0, 0, 0, -3, -2, -1, -4, -4, -1.5], np.float32),
    add_space_prefix=True,
    remove_extra_whitespaces=True,
)

# --- real vocabularies ---

VOCABULARIES = ("gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2")


def real(shared_data: Path, name: str) -> Path:
    return shared_data / "vocab" / f"ggml-vocab-{name}.gguf"


def read_cases(path: Path) -> list[tuple[str, list[int]]]:
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [[int(token_id) for token_id in line.split()] for line in Path(f"{path}.out").read_text().split("\n")]
    return list(zip(texts, ids, strict=True))


@pytest.mark.parametrize("name", VOCABULARIES)
def test_real_vocabulary_gives_the_expected_ids(shared_data: Path, name: str) -> None:
    path = real(shared_data, name)
    tokenizer = Tokenizer.from_gguf(path)
    cases = read_cases(path)
    assert len(cases) > 40
    for text, expected in cases:
        assert tokenizer.encode(text, add_special=False) == expected, text
        assert tokenizer.decode(expected) == text


@pytest.mark.parametrize("name", VOCABULARIES)
def test_real_vocabulary_opens_fast(shared_data: Path, name: str) -> None:
    start = time.perf_counter()
    Tokenizer.from_gguf(real(shared_data, name)).encode("Hello world")
    # Measured: 10 to 190 ms, llama-bpe the slowest. The bound leaves room for a busy machine.
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("name", "bos", "ends"),
    [
        ("gpt-2", None, {"<|endoftext|>"}),
        ("llama-bpe", "<|begin_of_text|>", {"<|end_of_text|>", "<|eot_id|>"}),
        ("llama-spm", "<s>", {"</s>"}),
        ("phi-3", "<s>", {"</s>", "<|endoftext|>", "<|end|>"}),
        ("qwen2", None, {"</s>", "<|endoftext|>", "<|im_end|>"}),
    ],
)
def test_real_vocabulary_knows_begin_and_ends(shared_data: Path, name: str, bos: str | None, ends: set[str]) -> None:
    tokenizer = Tokenizer.from_gguf(real(shared_data, name))
    added = tokenizer.encode("a")[: len(tokenizer.encode("a")) - len(tokenizer.encode("a", add_special=False))]
    assert added == ([] if bos is None else [tokenizer.token_to_id(bos)])
    assert tokenizer.eog_ids == {tokenizer.token_to_id(token) for token in ends}


def test_phi3_swallows_white_space_after_its_special_tokens(shared_data: Path) -> None:
    tokenizer = Tokenizer.from_gguf(real(shared_data, "phi-3"))
    parsed = pieces(tokenizer, "<|user|>\n hi<|end|>\n<s> a", parse_special=True)
    assert parsed == ["<|user|>", "▁hi", "<|end|>", "<s>", "▁", "▁a"]


def test_gemma_opens_fast(gemma3_path: Path) -> None:
    start = time.perf_counter()
    tokenizer = Tokenizer.from_gguf(gemma3_path)
    assert tokenizer.encode("Hello world") == [2, 9259, 1902]
    # Measured: 150 ms in all for 262,144 tokens. The bound leaves room for a busy machine.
    assert time.perf_counter() - start < 2
    assert [tokenizer.id_to_token(i) for i in sorted(tokenizer.eog_ids)] == ["<eos>", "<end_of_turn>", "</s>"]


# --- merging ---


def test_merge_takes_the_lowest_rank_then_the_leftmost() -> None:
    ranks = {("a", "b"): 1, ("b", "c"): 0, ("x", "x"): 0}
    assert merge(list("abc"), lambda left, right: ranks.get((left, right))) == ["a", "bc"]
    assert merge(list("xxx"), lambda left, right: ranks.get((left, right))) == ["xx", "x"]
    assert merge([], lambda left, right: 0) == []


def naive_merge(symbols: list[str], rank: Callable[[str, str], float | None]) -> list[str]:
    while True:
        ranks = [(rank(left, right), i) for i, (left, right) in enumerate(itertools.pairwise(symbols))]
        ranks = [(r, i) for r, i in ranks if r is not None]
        if not ranks:
            return symbols
        i = min(ranks)[1]
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


@given(
    text=st.text("abc ", max_size=40),
    ranks=st.dictionaries(st.text("abc▁", min_size=2, max_size=4), st.integers(0, 5), max_size=30),
)
def test_sentencepiece_equals_merging_the_whole_text_at_once(text: str, ranks: dict[str, int]) -> None:
    scores = {token: -float(rank) for token, rank in ranks.items()} | dict.fromkeys("abc▁", -9.0)
    tokenizer = Tokenizer.from_metadata(sentencepiece(scores, add_space_prefix=False))
    expected = naive_merge(list(text.replace(" ", "▁")), lambda left, right: ranks.get(left + right))
    assert pieces(tokenizer, text) == expected


@given(text=st.text("abc", max_size=30), merges=st.permutations(["a b", "b c", "a a", "ab c", "c c", "a bc"]))
def test_byte_level_equals_merging_by_rank(text: str, merges: list[str]) -> None:
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    expected = naive_merge(list(text), lambda left, right: ranks.get(f"{left} {right}"))
    assert pieces(Tokenizer.from_metadata(byte_level(",".join(merges))), text) == expected


def test_byte_level_merges_words_apart() -> None:
    assert pieces(BYTE_LEVEL, "hell  well\n\né") == ["hell", "Ġ", "Ġw", "e", "ll", "Ċ", "Ċ", "Ã©"]
    assert pieces(BYTE_LEVEL, "\n\n") == ["ĊĊ"]
    assert pieces(BYTE_LEVEL, "") == []


def test_ignore_merges_takes_whole_words() -> None:
    keys = byte_level("a b", {"abc": NORMAL})
    assert pieces(Tokenizer.from_metadata(keys), "abc") == ["ab", "c"]
    keys["tokenizer.ggml.pre"] = "llama-bpe"
    assert pieces(Tokenizer.from_metadata(keys), "abc") == ["abc"]


def test_sentencepiece_spells_unknown_characters_as_bytes() -> None:
    assert pieces(SPACE_PREFIX, "hellé") == ["▁hell", "<0xC3>", "<0xA9>"]
    assert SPACE_PREFIX.decode(SPACE_PREFIX.encode("hellé", add_special=False)) == "hellé"


def test_sentencepiece_without_bytes_fuses_unknown_characters() -> None:
    tokens = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "▁": NORMAL, "a": NORMAL}
    tokenizer = Tokenizer.from_metadata(metadata("llama", tokens))
    assert pieces(tokenizer, "axyaz") == ["▁", "a", "<unk>", "a", "<unk>"]


def test_sentencepiece_removes_extra_white_space_when_asked() -> None:
    tokenizer = Tokenizer.from_metadata(sentencepiece(SCORES, remove_extra_whitespaces=True))
    assert tokenizer.encode("  hell   hell ") == tokenizer.encode("hell hell")
    assert tokenizer.encode("  ", add_special=False) == []


def test_gemma4_merges_raw_text_and_keeps_runs_of_line_feeds() -> None:
    tokens = {"<bos>": CONTROL, **dict.fromkeys(BYTE_TOKENS, BYTE)}
    tokens |= dict.fromkeys(["h", "i", "▁", "hi", "▁hi", "\n", "\n\n"], NORMAL)
    keys = metadata("gemma4", tokens, merges=["h i", "▁ hi"], bos_token_id=0, add_bos_token=False)
    tokenizer = Tokenizer.from_metadata(keys)
    assert pieces(tokenizer, "hi hi\n\né") == ["hi", "▁hi", "\n\n", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("hi hi\n\né", add_special=False)) == "hi hi\n\né"
    assert tokenizer.encode("h")[0] == 0


# --- WordPiece and Unigram ---


def test_wordpiece_takes_the_longest_tokens() -> None:
    tokenizer = Tokenizer.from_metadata(WORDPIECE)
    assert pieces(tokenizer, "Hello, UNaffable naïve 你x") == [
        *("▁hello", "▁,", "▁un", "aff", "able", "▁naive", "▁你", "[UNK]"),
    ]
    assert tokenizer.encode("hello") == [2, 4, 3]
    assert tokenizer.decode(tokenizer.encode("hello unaffable"), skip_special=True) == "hello unaffable"
    assert pieces(tokenizer, "un" + "able" * 30) == ["[UNK]"]


def test_wordpiece_keeps_case_when_asked() -> None:
    tokenizer = Tokenizer.from_metadata({**WORDPIECE, "tokenizer.ggml.normalizer.lowercase": False})
    assert pieces(tokenizer, "Hello hello naïve") == ["[UNK]", "▁hello", "[UNK]"]


def test_unigram_finds_the_best_sum() -> None:
    tokenizer = Tokenizer.from_metadata(UNIGRAM)
    assert pieces(tokenizer, "abc") == ["▁a", "bc"]
    assert pieces(tokenizer, "  ab   ab ") == ["▁ab", "▁ab"]
    assert pieces(tokenizer, " ") == []
    assert tokenizer.encode("abc")[-1] == tokenizer.eos_id == 1
    assert tokenizer.decode(tokenizer.encode("abc ab", add_special=False)) == "abc ab"


def test_unigram_weighs_the_unknown_by_what_text_may_become() -> None:
    scores = {"▁": -3.0, "a": -14.0, "b": -14.0, "c": -14.0, "bc": -13.0, "abc": -1.0, "xa": -14.0}
    types = {"<pad>": CONTROL, "</s>": CONTROL, "<unk>": UNKNOWN, **dict.fromkeys(scores, NORMAL)}

    def cut(text: str, padding: float) -> list[str]:
        values = np.array([scores.get(token, 0.0) for token in types] + [padding], np.float32)
        keys = metadata("t5", {**types, "[PAD10]": TokenType.UNUSED}, scores=values, unknown_token_id=2)
        return pieces(Tokenizer.from_metadata(keys), text)

    for padding in (-14.0, -10000.0):
        assert cut("xabc", padding) == ["<unk>", "abc"]
        assert "[PAD10]" not in cut("[PAD10]", padding)


def charsmap(entries: dict[str, str]) -> bytes:
    """A compiled table of one-byte sequences: unit 0 is the root, a node's children are at 256 + their label."""
    units = np.zeros(1024, np.uint32)
    units[0] = 256 << 10
    replacements = b""
    for i, (text, replacement) in enumerate(entries.items()):
        label = ord(text)
        leaf = 512 + i
        units[256 ^ label] = label | 0x100 | (256 ^ label ^ leaf) << 10
        units[leaf] = 0x80000000 | len(replacements)
        replacements += replacement.encode() + b"\0"
    return len(units.tobytes()).to_bytes(4, "little") + units.tobytes() + replacements


def test_unigram_replaces_characters() -> None:
    table = np.frombuffer(charsmap({"B": "b", "\t": " ", "x": "", "q": "ab"}), np.int8)
    tokenizer = Tokenizer.from_metadata(UNIGRAM | {"tokenizer.ggml.precompiled_charsmap": table})
    assert pieces(tokenizer, "aBc\txq") == ["▁a", "bc", "▁ab"]
    assert pieces(tokenizer, "€") == ["▁", "<unk>"]


@given(units=st.lists(st.integers(0, 2**32 - 1), max_size=64), replacements=st.binary(max_size=20), text=st.text())
def test_malformed_replacements_do_no_harm(units: list[int], replacements: bytes, text: str) -> None:
    table = (4 * len(units)).to_bytes(4, "little") + np.array(units, "<u4").tobytes() + replacements
    tokenizer = Tokenizer.from_metadata(
        UNIGRAM | {"tokenizer.ggml.precompiled_charsmap": np.frombuffer(table, np.uint8)}
    )
    assert tokenizer.encode(text)[-1] == tokenizer.eos_id


def test_unigram_text_never_becomes_a_special_token() -> None:
    tokenizer = Tokenizer.from_metadata(UNIGRAM)
    assert set(tokenizer.encode("<pad></s>\ufdd00", add_special=False)).isdisjoint({0, 1})


# --- special tokens ---


def test_control_tokens_in_text_are_text_unless_asked() -> None:
    text = "<|im_start|>he<|im_end|>"
    assert BYTE_LEVEL.special_ids.isdisjoint(BYTE_LEVEL.encode(text))
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text
    assert pieces(BYTE_LEVEL, text, parse_special=True) == ["<|im_start|>", "he", "<|im_end|>"]


def test_merges_never_spell_a_control_token() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level("< /,</ s,</s >", pre="superbpe"))
    assert tokenizer.token_type(tokenizer.token_to_id("</s>")) is CONTROL
    assert pieces(tokenizer, "a</s>") == ["a", "</s", ">"]
    scores = {"<": -1.0, "s": -1.0, ">": -1.0, "<s": -2.0}
    assert pieces(Tokenizer.from_metadata(sentencepiece(scores, add_space_prefix=False)), "<s>") == ["<s", ">"]


def test_user_defined_tokens_are_always_found() -> None:
    assert pieces(BYTE_LEVEL, "he<think>he") == ["he", "<think>", "he"]


def test_the_longest_special_token_wins() -> None:
    special = {"<a": USER, "<a>": USER, "<": USER, "<b>": CONTROL}
    tokenizer = Tokenizer.from_metadata(byte_level("", special))
    assert pieces(tokenizer, "<<a><ax<b>") == ["<", "<a>", "<a", "x", "<", "b", ">"]
    assert pieces(tokenizer, "<b>", parse_special=True) == ["<b>"]


def test_skip_special_leaves_out_control_tokens_only() -> None:
    ids = BYTE_LEVEL.encode("<|im_start|><think>he<|im_end|>", parse_special=True)
    assert BYTE_LEVEL.decode(ids) == "<|im_start|><think>he<|im_end|>"
    assert BYTE_LEVEL.decode(ids, skip_special=True) == "<think>he"


def test_space_prefix_is_added_after_special_tokens_and_taken_away_again() -> None:
    text = "hell<|x|> hell<tool>e"
    ids = SPACE_PREFIX.encode(text, add_special=False, parse_special=True)
    assert [SPACE_PREFIX.id_to_token(i) for i in ids] == ["▁hell", "<|x|>", "▁", "▁hell", "<tool>", "▁", "e"]
    assert SPACE_PREFIX.decode(ids) == text


def test_masks_swallow_the_white_space_before_them() -> None:
    keys = byte_level("", {"<mask>": CONTROL}, pre="jina-v2-de")
    assert pieces(Tokenizer.from_metadata(keys), "a \n<mask> <mask>b", parse_special=True) == [
        *("a", "<mask>", "<mask>", "b"),
    ]
    keys["tokenizer.ggml.pre"] = "modern-bert"
    assert pieces(Tokenizer.from_metadata(keys), "a <mask>", parse_special=True) == ["a", "Ġ", "<mask>"]
    keys = byte_level("", {"[MASK]": CONTROL}, pre="modern-bert")
    assert pieces(Tokenizer.from_metadata(keys), "a [MASK] a", parse_special=True) == ["a", "[MASK]", "Ġ", "a"]


def test_special_tokens_are_known_by_id_and_text() -> None:
    assert BYTE_LEVEL.eos_id == BYTE_LEVEL.token_to_id("<|endoftext|>") == 263
    assert BYTE_LEVEL.eot_id == BYTE_LEVEL.token_to_id("<|im_end|>")
    assert BYTE_LEVEL.eog_ids == {BYTE_LEVEL.eos_id, BYTE_LEVEL.eot_id}
    assert (BYTE_LEVEL.bos_id, BYTE_LEVEL.unk_id, BYTE_LEVEL.pad_id) == (None, None, None)
    assert BYTE_LEVEL.token_to_id("nothing like it") is None
    assert BYTE_LEVEL.vocab_size == 256 + 7 + 5
    assert BYTE_LEVEL.token_bytes(BYTE_LEVEL.token_to_id("Ã©")) == "é".encode()
    assert BYTE_LEVEL.token_bytes(263) == b"<|endoftext|>"


def test_ends_of_generation_of_code_completion_and_of_gpt_oss() -> None:
    special = dict.fromkeys(["<|return|>", "<|call|>", "<|end|>", "<|channel|>", "<|file_sep|>"], CONTROL)
    tokenizer = Tokenizer.from_metadata(byte_level("", special, eom_token_id=7))
    ends = {tokenizer.id_to_token(i) for i in tokenizer.eog_ids}
    assert ends == {"<|return|>", "<|call|>", "<|file_sep|>", BYTE_TO_CHAR[7]}
    assert tokenizer.token_type(tokenizer.token_to_id("<|end|>")) is USER
    assert tokenizer.token_type(tokenizer.token_to_id("<|channel|>")) is USER


def test_gemma4_keeps_the_html_tag_out_of_the_ends() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level("", {"<|tool_response>": CONTROL, "</s>": NORMAL}))
    assert {tokenizer.id_to_token(i) for i in tokenizer.eog_ids} == {"<|tool_response>"}


# --- BOS and EOS ---


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (byte_level(bos_token_id=1, eos_token_id=2), [97]),
        (byte_level(bos_token_id=1, eos_token_id=2, pre="llama-bpe"), [1, 97]),
        (byte_level(bos_token_id=1, eos_token_id=2, pre="llama-bpe", add_bos_token=False), [97]),
        (byte_level(bos_token_id=1, eos_token_id=2, add_bos_token=True, add_eos_token=np.bool_(True)), [1, 97, 2]),
        (byte_level(bos_token_id=np.uint32(1), pre="tekken"), [1, 97]),
        (byte_level(pre="llama-bpe"), [97]),
        (sentencepiece({"a": 0.0}, add_space_prefix=False), [1, 259]),
        (sentencepiece({"a": 0.0}, add_space_prefix=False, add_bos_token=False, add_eos_token=True), [259, 2]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(keys: dict[str, object], expected: list[int]) -> None:
    tokenizer = Tokenizer.from_metadata(keys)
    assert tokenizer.encode("a") == expected
    assert tokenizer.encode("a", add_special=False) == [i for i in expected if i > 2]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [2, 4, 3]),
        ({"add_sep_token": False, "add_eos_token": True, "eos_token_id": 3}, [2, 4, 3]),
        ({"add_sep_token": True, "add_eos_token": True, "eos_token_id": 3}, [2, 4, 3]),
        ({"add_eos_token": True, "eos_token_id": 3}, [2, 4, 3]),
        ({"add_sep_token": False}, [2, 4]),
    ],
)
def test_one_separator_follows_a_text_of_bert(keys: dict[str, object], expected: list[int]) -> None:
    keys = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    assert Tokenizer.from_metadata(WORDPIECE | keys).encode("hello") == expected


def test_separator_of_a_pair_does_not_follow_a_single_text() -> None:
    added = {"bos_token_id": 1, "eos_token_id": 2, "seperator_token_id": 2}
    flags = {"add_bos_token": True, "add_eos_token": True, "add_sep_token": True}
    assert Tokenizer.from_metadata(byte_level(pre="roberta-bpe", **added, **flags)).encode("a") == [1, 97, 2]


def test_bos_is_not_doubled() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level("", {"<s>": CONTROL}, bos_token_id=256, add_bos_token=True))
    assert tokenizer.encode("<s>a", parse_special=True) == [256, 97]
    assert tokenizer.encode("<s>") == [256, *b"<s>"]


# --- decoding ---


@given(text=st.text())
def test_byte_level_round_trip(text: str) -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text, parse_special=True)) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_sentencepiece_round_trip(text: str) -> None:
    assert SPACE_PREFIX.decode(SPACE_PREFIX.encode(text), skip_special=True) == text


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
@given(text=st.text())
def test_every_pretokenizer_loses_nothing(name: str, text: str) -> None:
    assert "".join(word for word, _ in PRE_TOKENIZERS[name].compile().pre_tokenize_str(text)) == text


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SPACE_PREFIX, *map(Tokenizer.from_metadata, (WORDPIECE, UNIGRAM))])
@given(data=st.data(), skip_special=st.booleans())
def test_streaming_equals_decoding_the_whole(tokenizer: Tokenizer, data: st.DataObject, skip_special: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    decoder = tokenizer.stream_decoder(skip_special=skip_special)
    parts = [decoder.feed(token_id) for token_id in ids]
    assert "".join(parts) + decoder.flush() == tokenizer.decode(ids, skip_special=skip_special)


def test_stream_holds_back_half_a_code_point() -> None:
    decoder = BYTE_LEVEL.stream_decoder()
    assert [decoder.feed(byte) for byte in "€".encode()] == ["", "", "€"]
    assert decoder.feed(0xF0) == ""
    assert decoder.flush() == "\ufffd"


def test_stream_that_continues_a_text_keeps_the_space() -> None:
    ids = SPACE_PREFIX.encode("hell hell", add_special=False)
    assert SPACE_PREFIX.stream_decoder().feed(ids[0]) == "hell"
    assert SPACE_PREFIX.stream_decoder(continuation=True).feed(ids[0]) == " hell"


def test_surrogates_become_what_they_stand_for() -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode("a\ud83d\ude00b\udc00")) == "a😀b\ufffd"


@pytest.mark.parametrize("token_id", [-1, 268, 10**12])
def test_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    for function in (BYTE_LEVEL.token_bytes, BYTE_LEVEL.id_to_token, BYTE_LEVEL.token_type):
        with pytest.raises(ValueError, match=f"token id {token_id} is outside the vocabulary of 268 tokens"):
            function(token_id)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        BYTE_LEVEL.decode([0, token_id])


def test_long_words_take_time_in_proportion() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level("a a,aa aa,aaaa aaaa"))
    start = time.perf_counter()
    assert len(tokenizer.encode("a" * 200_000)) == 25_000
    # Measured: 1.2 s. One scan of the word for each merge would take hours.
    assert time.perf_counter() - start < 30


# --- pre-tokenizers ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", ["I", "'m", " 1234567", " fooBar", " ", " 12", "!", "\n", "\n", "你好"]),
        ("smollm", ["I", "'m", " ", *"1234567", " fooBar", "  ", *"12", "!", "\n", "\n", "你好"]),
        ("llama-bpe", ["I", "'m", " ", "123", "456", "7", " fooBar", " ", " ", "12", "!\n\n", "你好"]),
        ("qwen2", ["I", "'m", " ", *"1234567", " fooBar", " ", " ", *"12", "!\n\n", "你好"]),
        ("gpt-4o", ["I'm", " ", "123", "456", "7", " foo", "Bar", " ", " ", "12", "!\n\n", "你好"]),
        ("deepseek-v3", ["I", "'m", " ", "123", "456", "7", " fooBar", "  ", "12", "!\n\n", "你好"]),
        ("afmoe", ["I", "'m", " ", "1", "234", "567", " fooBar", "  ", "12", "!\n\n", "你好"]),
        ("gemma4", ["I'm 1234567 fooBar  12!", "\n\n", "你好"]),
        ("default", ["I", "'", "m", " ", "123", "456", "7", " fooBar", " ", " ", "12", "!", "\n", "\n", "你好"]),
    ],
)
def test_pretokenizer_cuts(name: str, expected: list[str]) -> None:
    words = PRE_TOKENIZERS[name].compile().pre_tokenize_str("I'm 1234567 fooBar  12!\n\n你好")
    assert [word for word, _ in words] == expected


CUTS = json.loads((Path(__file__).parent / "data" / "pretokenizer_cuts.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", CUTS["cuts"], ids=lambda row: row["names"][0])
def test_pretokenizer_cuts_as_llama_cpp_does(row: dict[str, list[str]]) -> None:
    for name in row["names"]:
        words = PRE_TOKENIZERS[name].compile().pre_tokenize_str(CUTS["text"])
        assert [word for word, _ in words] == row["words"], name


def test_pretokenizers_that_llama_cpp_shows_otherwise() -> None:
    def cuts(name: str, text: str) -> list[str]:
        return [word for word, _ in PRE_TOKENIZERS[name].compile().pre_tokenize_str(text)]

    assert cuts("kimi-k2", "你好fooBar we'LL 1234") == ["你好", "foo", "Bar", " we'LL", " ", "123", "4"]
    assert cuts("youtu", "你好、fooBar 12") == ["你好", "、", "foo", "Bar", " ", "1", "2"]
    assert cuts("tiny_aya", "fooBar 1234567 1234a") == ["foo", "Bar", " ", "1", "234", "567", " ", "123", "4", "a"]
    assert cuts("granite", "12 a") == cuts("refact", "12 a") == ["1", "2", " a"]
    assert cuts("minimax", "fooBar") == cuts("minimax-m2", "fooBar") == ["foo", "Bar"]


THREES = ("afmoe", "tiny_aya", "superbpe")


@pytest.mark.parametrize("name", THREES)
@given(text=st.text(st.sampled_from("123²１ a_\u0301你\n।."), max_size=20))
def test_digits_are_grouped_as_the_pattern_says(name: str, text: str) -> None:
    pattern = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(p), "isolated") for p in PRE_TOKENIZERS[name].patterns]
    )
    words = PRE_TOKENIZERS[name].compile().pre_tokenize_str(text)
    assert [word for word, _ in words] == [word for word, _ in pattern.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", THREES)
def test_a_long_number_takes_time_in_proportion(name: str) -> None:
    start = time.perf_counter()
    assert len(PRE_TOKENIZERS[name].compile().pre_tokenize_str("1" * 50_000)) == 16_667
    # Measured: 0.15 s. The models' patterns take 2 to 30 s.
    assert time.perf_counter() - start < 2


def as_tokenizers_does(tokenizer: Tokenizer, keys: Mapping[str, object]) -> tokenizers.Tokenizer:
    """The same vocabulary in the `tokenizers` library's own BPE."""
    row = PRE_TOKENIZERS[str(keys["tokenizer.ggml.pre"])]
    vocab = {tokenizer.id_to_token(i): i for i in range(tokenizer.vocab_size)}
    merges = [tuple(pair.split(" ")) for pair in keys["tokenizer.ggml.merges"]]
    oracle = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=row.ignore_merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    oracle.pre_tokenizer = pre_tokenizers.Sequence([row.compile(), byte_level])
    return oracle


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_equals_the_tokenizers_library(shared_data: Path, name: str) -> None:
    with GGUFFile.open(real(shared_data, name)) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
        oracle = as_tokenizers_does(tokenizer, file.metadata)

    @given(text=st.text())
    def check(text: str) -> None:
        ids = tokenizer.encode(text, add_special=False)
        assert ids == oracle.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text

    check()
    ids = tokenizer.encode(CUTS["text"], add_special=False)
    assert ids == oracle.encode(CUTS["text"], add_special_tokens=False).ids


def test_absent_pretokenizer_is_the_default() -> None:
    absent = Tokenizer.from_metadata(byte_level("1 2,12 3,123 4", pre=None))
    assert pieces(absent, "1234") == ["123", "4"]
    named = Tokenizer.from_metadata(byte_level("1 2,12 3,123 4", pre="default"))
    assert pieces(named, "1234") == ["123", "4"]


# --- refusals ---


def broken(**keys: object) -> dict[str, object]:
    return byte_level("h e", **keys)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({}, GGUFError, "tokenizer.ggml.model is missing: the file has no tokenizer"),
        (sentencepiece({}, pre=np.arange(3)), GGUFError, "tokenizer.ggml.pre is of type ndarray, expected str"),
        (broken(model=7), GGUFError, "tokenizer.ggml.model is of type int, expected str"),
        (
            broken(model="rwkv"),
            UnsupportedModelError,
            "unknown tokenizer 'rwkv' in tokenizer.ggml.model; known: bert, ",
        ),
        (
            broken(pre="new"),
            UnsupportedModelError,
            "unknown pre-tokenizer 'new' in tokenizer.ggml.pre; known: a.x-4.0, ",
        ),
        (broken(tokens=None), GGUFError, "tokenizer.ggml.tokens is missing"),
        (broken(tokens=[]), GGUFError, "tokenizer.ggml.tokens is empty"),
        (broken(tokens="abc"), GGUFError, "tokenizer.ggml.tokens is not an array of strings"),
        (broken(tokens=np.arange(3)), GGUFError, "tokenizer.ggml.tokens is not an array of strings"),
        (
            broken(tokens=["a", "b", "a"], token_type=None),
            GGUFError,
            "tokenizer.ggml.tokens has 'a' twice, as ids 0 and 2",
        ),
        (broken(token_type=np.ones(3, np.int32)), GGUFError, "has 3 values of type int32, expected 257 numbers"),
        (broken(token_type=np.full(257, 9)), GGUFError, "token_type has values from 9 to 9, expected 0 to 6"),
        (broken(token_type=np.full(257, 6)), GGUFError, "has 'Ā' of type byte as id 0, expected <0x00> to <0xFF>"),
        (broken(merges=None), GGUFError, "tokenizer.ggml.merges is missing"),
        (broken(merges=["h e", "h o"]), GGUFError, "merges has 'h o' as number 1, expected the two parts of a token"),
        (broken(merges=["he"]), GGUFError, "merges has 'he' as number 0, expected the two parts of a token"),
        (broken(merges=["h e", "h  e"]), GGUFError, "merges has 'h  e' as number 1, expected the two parts"),
        (broken(eos_token_id=257), GGUFError, "eos_token_id is 257, outside the vocabulary of 257 tokens"),
        (broken(eos_token_id="2"), GGUFError, "eos_token_id is of type str, expected int"),
        (broken(add_bos_token=1), GGUFError, "add_bos_token is of type int, expected bool"),
        (broken(add_bos_token=True), GGUFError, "add_bos_token is true, but tokenizer.ggml.bos_token_id is missing"),
        (
            sentencepiece({}, scores=np.zeros(3, np.float32)),
            GGUFError,
            "scores has 3 values of type float32, expected 259",
        ),
        (
            sentencepiece({}, scores=np.full(259, np.nan)),
            GGUFError,
            "scores has nan for token 0, expected a finite number",
        ),
        (
            sentencepiece({}, treat_whitespace_as_suffix=True),
            UnsupportedModelError,
            "treat_whitespace_as_suffix is true, which is not supported",
        ),
        (
            UNIGRAM | {"tokenizer.ggml.precompiled_charsmap": np.full(8, 99, np.uint8)},
            GGUFError,
            "precompiled_charsmap is no table: 8 bytes, of which 1667457891 the trie",
        ),
        (metadata("t5", {"a": NORMAL}), GGUFError, "unknown_token_id is missing, which a vocabulary of kind t5 needs"),
    ],
)
def test_malformed_metadata_is_refused(keys: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        Tokenizer.from_metadata(keys)
    assert message in str(caught.value)


def test_bytes_are_found_by_their_text() -> None:
    keys = sentencepiece({"▁": -1.0, "a": -2.0, "▁a": -1.5})
    expected = Tokenizer.from_metadata(keys).encode("aé<0x41>", add_special=False)
    for types in (None, np.where(keys["tokenizer.ggml.token_type"] == BYTE, NORMAL, keys["tokenizer.ggml.token_type"])):
        tokenizer = Tokenizer.from_metadata({**keys, "tokenizer.ggml.token_type": types})
        assert tokenizer.encode("aé<0x41>", add_special=False) == expected
        assert tokenizer.decode(expected) == "aé<0x41>"
    types = {"<unk>": UNKNOWN, "<bos>": CONTROL, **dict.fromkeys(["a", "▁", "b", "ab", *BYTE_TOKENS], NORMAL)}
    tokenizer = Tokenizer.from_metadata(metadata("gpt2", types, pre="sarvam-moe", merges=["a b"], bos_token_id=1))
    assert pieces(tokenizer, "a éb") == ["a", "▁", "<0xC3>", "<0xA9>", "b"]
    assert tokenizer.decode(tokenizer.encode("a éb", add_special=False)) == "a éb"


def test_arrays_and_padding_that_go_beyond_the_tokens() -> None:
    keys = sentencepiece(SCORES)
    longer = {
        key: np.append(keys[key], keys[key][:2]) for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")
    }
    tokenizer = Tokenizer.from_metadata({**keys, **longer, "tokenizer.ggml.padding_token_id": -1})
    assert tokenizer.encode("hell") == Tokenizer.from_metadata(keys).encode("hell")


def test_whole_words_of_glm4_are_not_merged() -> None:
    keys = byte_level("a b", {"abc": NORMAL})
    for pre, words in {"glm4": ["abc"], "glm5": ["abc"], "chatglm-bpe": ["ab", "c"]}.items():
        assert pieces(Tokenizer.from_metadata({**keys, "tokenizer.ggml.pre": pre}), "abc") == words


def test_k2_horizon_has_marks_in_words() -> None:
    def cut(pre: str) -> list[str]:
        return [word for word, _ in PRE_TOKENIZERS[pre].compile().pre_tokenize_str("e\u0301a b\u200dc 1234")]

    assert cut("k2-horizon") == ["e\u0301a", " b\u200dc", " ", "123", "4"]
    assert cut("dbrx") == ["e", "\u0301a", " b", "\u200dc", " ", "123", "4"]


@pytest.mark.parametrize("mark", ["<|fim_prefix|>", "<fim-suffix>", "<｜fim▁end｜>", "▁<MID>", "<|code_prefix|>"])
@pytest.mark.parametrize("kind", [NORMAL, USER])
def test_marks_of_a_gap_are_no_text(mark: str, kind: int) -> None:
    tokenizer = Tokenizer.from_metadata(byte_level("", {mark: kind}))
    assert len(tokenizer.encode(mark, add_special=False)) > 1
    assert tokenizer.encode(mark, add_special=False, parse_special=True) == [256]


def test_empty_tokens_are_placeholders() -> None:
    keys = byte_level()
    keys["tokenizer.ggml.tokens"] += ["", ""]
    del keys["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer.from_metadata(keys)
    assert [tokenizer.id_to_token(i) for i in (256, 257)] == ["[EMPTY_256]", "[EMPTY_257]"]


def test_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in byte_level("h e", CHATML, eos_token_id=257).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, [v if isinstance(v, str) else int(v) for v in value])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = Tokenizer.from_gguf(path)
    assert pieces(tokenizer, "hehe<|im_end|>", parse_special=True) == ["he", "he", "<|im_end|>"]
    assert tokenizer.eos_id == 257
