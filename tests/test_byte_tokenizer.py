"""The tokenizer that needs no file, held against the one that reads the same vocabulary from GGUF metadata."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from woolly import Tokenizer
from woolly.byte_tokenizer import BOS_ID, EOS_ID, UNK_ID, ByteTokenizer, gguf_metadata

SIZE = 400
OURS, FILES = ByteTokenizer(SIZE), Tokenizer.from_metadata(gguf_metadata(SIZE))

texts = st.text(st.characters() | st.sampled_from(" ▁\n<s>/unk#123é😀"))


@given(texts, st.booleans(), st.booleans())
def test_ids_are_those_of_the_file(text, add_special, parse_special):
    options = {"add_special": add_special, "parse_special": parse_special}
    assert OURS.encode(text, **options) == FILES.encode(text, **options)


@given(st.lists(st.integers(0, SIZE - 1)), st.booleans())
def test_text_is_that_of_the_file(ids, skip_special):
    assert OURS.decode(ids, skip_special=skip_special) == FILES.decode(ids, skip_special=skip_special)


@given(texts)
def test_text_comes_back(text):
    plain = text.replace("▁", " ").encode("utf-8", "replace").decode()
    if plain == text:
        assert OURS.decode(OURS.encode(text, add_special=False)) == text


@given(texts)
def test_marked_text_as_the_file_has_it(text):
    assert OURS.encode_marked(text, "\ufdd0") == FILES.encode_marked(text, "\ufdd0")
    assert OURS.encode_marked("<\ufdd0s>", "\ufdd0") == [BOS_ID, *b"<s>"]


def test_facts():
    assert OURS.encode("A b") == [BOS_ID, 65, 259, 98]
    assert OURS.encode("<s>x", parse_special=True) == [BOS_ID, 120]
    assert OURS.decode([300, BOS_ID, 65]) == " #300<s>A"
    assert OURS.decode([300, EOS_ID, 65], skip_special=True) == " #300A"
    assert [OURS.id_to_token(i) for i in (65, 259, UNK_ID, 300)] == ["<0x41>", "▁", "<unk>", "▁#300"]
    assert OURS.control_spellings == ["<s>", "</s>", "<unk>"]
    assert (OURS.bos_id, OURS.eos_id, OURS.vocab_size) == (FILES.bos_id, FILES.eos_id, FILES.vocab_size)
    assert OURS.eog_ids == frozenset()


def test_stream_is_cut_at_code_points():
    decoder = OURS.stream_decoder()
    pieces = [decoder.feed(byte) for byte in "é".encode()]
    assert pieces == ["", "é"]
    decoder.feed(0xC3)
    assert decoder.flush() == "\ufffd"


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match=r"^ByteTokenizer: vocab_size must be at least 260, got 259$"):
        ByteTokenizer(259)
    for token_id in (-1, SIZE):
        with pytest.raises(ValueError, match=rf"^token id {token_id} is outside the vocabulary of 400 tokens$"):
            OURS.decode([token_id])
        with pytest.raises(ValueError, match=rf"^token id {token_id} is outside"):
            OURS.id_to_token(token_id)
