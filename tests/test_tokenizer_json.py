"""tokenizer.json to a GGUF vocabulary: the ids are those that the `tokenizers` library gives."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_folder import added_token, byte_level_tokenizer, write_json
from tokenizers import Tokenizer as Oracle

from woolly.convert.chat_templates import read_chat_templates
from woolly.convert.config_json import JsonObject
from woolly.convert.tokenizer_json import find_name, read_tokenizer
from woolly.errors import CheckpointError, UnsupportedModelError
from woolly.pretokenizers import PRE_TOKENIZERS
from woolly.prompts import Prompts, TemplateSet
from woolly.tokenizer import Tokenizer
from woolly.vocabulary import TokenType

TEXTS = ["the hen and the rein", "  two  spaces\n\n a tab\t", "Déjà vu, 東京 2024 👩‍👩‍👧 don't", "", " ", "12345 x1"]


def read(folder: Path, tokenizer: dict[str, Any], *, vocab_size: int = 320, **settings: Any) -> dict[str, Any]:
    """The keys of a folder that holds this tokenizer.json and tokenizer_config.json."""
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", settings)
    return read_tokenizer(folder, JsonObject("config.json", {"eos_token_id": [2, 0]}), vocab_size)


def check_ids(keys: dict[str, Any], tokenizer: dict[str, Any]) -> Tokenizer:
    """Compare ids with those of the library, special tokens left out."""
    ours, oracle = Tokenizer.from_metadata({k: v for k, v in keys.items() if v is not None}), oracle_of(tokenizer)
    for text in TEXTS:
        expected = oracle.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special=False) == expected, text
        assert ours.decode(expected) == oracle.decode(expected, skip_special_tokens=False), text
    return ours


def oracle_of(tokenizer: dict[str, Any]) -> Oracle:
    return Oracle.from_str(json.dumps({"version": "1.0", **tokenizer}))


def test_byte_level(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    keys = read(tmp_path, tokenizer, bos_token="<|im_start|>", eos_token={"content": "<|im_end|>"})
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    ours = check_ids(keys, tokenizer)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.add_bos) == (320, 1, 2, False)
    assert ours.encode("<|im_end|>", parse_special=True) == [2]
    assert ours.token_type(319) is TokenType.UNUSED


def test_merges_as_text_and_added_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    del tokenizer["model"]["type"]
    tokenizer["added_tokens"] += [added_token(300, "<tool>", special=False), added_token(1000, "<image>")]
    ours = check_ids(read(tmp_path, tokenizer), tokenizer)
    assert ours.eos_id == 2  # config.json's first
    assert ours.encode("a<tool>b", add_special=False)[1] == 300
    assert ours.token_type(300) is TokenType.USER_DEFINED


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **changes}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
LLAMA3, QWEN2, GPT4O = (PRE_TOKENIZERS[name].patterns[0] for name in ("llama-bpe", "qwen2", "gpt-4o"))


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        ([split(LLAMA3), BYTES], True, "llama-bpe"),
        ([split(LLAMA3), BYTES], False, "dbrx"),
        ([split(LLAMA3, behavior="Removed", invert=True), BYTES], False, "dbrx"),
        ([split(QWEN2), BYTES], False, "qwen2"),
        ([split(GPT4O), BYTES], False, "gpt-4o"),
        ([{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}], False, "starcoder"),
        ([split(pattern) for pattern in PRE_TOKENIZERS["deepseek-v3"].patterns] + [BYTES], False, "deepseek-v3"),
    ],
)
def test_pretokenizers_are_known_by_their_patterns(tmp_path: Path, steps: Any, ignore_merges: bool, name: str) -> None:
    tokenizer = byte_level_tokenizer() | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    tokenizer["model"]["ignore_merges"] = ignore_merges
    tokenizer["normalizer"] = {"type": "NFC"}
    keys = read(tmp_path, tokenizer)
    assert keys["tokenizer.ggml.pre"] == name
    check_ids(keys, tokenizer)


def test_every_name_of_bytes_is_found() -> None:
    for row in PRE_TOKENIZERS.values():
        if row.byte_level:
            name = find_name("x", row.patterns, ignore_merges=row.ignore_merges)
            assert PRE_TOKENIZERS[name].patterns == row.patterns


def template(*pieces: dict[str, Any], **ids: int) -> dict[str, Any]:
    special = {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in ids.items()}
    return {"type": "TemplateProcessing", "single": list(pieces), "pair": [], "special_tokens": special}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def special(text: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": text, "type_id": 0}}


@pytest.mark.parametrize(
    ("processor", "settings", "adds"),
    [
        (None, {}, (False, False)),
        (None, {"add_bos_token": True}, (True, False)),
        (template(special("b"), TEXT, b=1), {"add_bos_token": False}, (True, False)),
        (template(special("b"), TEXT, special("e"), b=1, e=2), {}, (True, True)),
        (template(TEXT), {"add_bos_token": True}, (False, False)),
        (
            {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template(special("b"), TEXT, b=1)]},
            {},
            (True, False),
        ),
    ],
)
def test_bos_and_eos(tmp_path: Path, processor: Any, settings: dict[str, Any], adds: tuple[bool, bool]) -> None:
    tokenizer = byte_level_tokenizer() | {"post_processor": processor}
    keys = read(tmp_path, tokenizer, bos_token="<|im_start|>", **settings)
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == adds


# --- SentencePiece's kinds ---

WORDS = ["▁", "t", "h", "e", "n", "a", "d", "x", "1", "2", "▁t", "he", "▁the", "▁a", "an", "▁an", "▁and", "▁▁"]
MERGES = [
    ("▁", "t"),
    ("h", "e"),
    ("▁t", "he"),
    ("▁", "a"),
    ("a", "n"),
    ("▁a", "n"),
    ("▁", "an"),
    ("▁an", "d"),
    ("▁", "▁"),
]


def sentencepiece_tokenizer(**changes: Any) -> dict[str, Any]:
    """tokenizer.json as Llama 2's: specials, bytes, pieces."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    return {
        "added_tokens": [added_token(i, tokens[i]) for i in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": template(special("<s>"), TEXT, **{"<s>": 1}),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in MERGES],
        },
    } | changes


def test_sentencepiece(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    keys = read(tmp_path, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    ours = check_ids(keys, tokenizer)
    assert (ours.bos_id, ours.unk_id, ours.add_bos) == (1, 0, True)
    assert ours.token_type(0) is TokenType.UNKNOWN
    assert ours.token_type(3) is TokenType.BYTE
    assert ours.encode("the") == [1, ours.token_to_id("▁the")]


@pytest.mark.parametrize(
    ("changes", "adds_space"),
    [
        ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}, False),  # Gemma's
        ({"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first", "split": False}}, True),
        ({"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}}, False),
        ({"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "add_prefix_space": True}}, True),
    ],
)
def test_prefix_of_a_space(tmp_path: Path, changes: dict[str, Any], adds_space: bool) -> None:
    keys = read(tmp_path, sentencepiece_tokenizer(**changes))
    assert keys["tokenizer.ggml.add_space_prefix"] is adds_space


def test_unigram(tmp_path: Path) -> None:
    pieces = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], *([word, -float(i)] for i, word in enumerate(WORDS))]
    pieces += [[character, -30.0] for character in "rivwospctby,'Dj24è3gu5M\n"]
    tokenizer = {
        "added_tokens": [added_token(i, pieces[i][0]) for i in range(3)],
        "normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "post_processor": None,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces},
    }
    keys = read(tmp_path, tokenizer, pad_token="<pad>", eos_token="</s>")
    ours, oracle = Tokenizer.from_metadata({k: v for k, v in keys.items() if v is not None}), oracle_of(tokenizer)
    for text in ("the hen and the", "an  and", "a x12"):
        assert ours.encode(text, add_special=False) == oracle.encode(text, add_special_tokens=False).ids
    tokenizer["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(8)).decode()}
    keys = read(tmp_path, tokenizer)
    assert keys["tokenizer.ggml.precompiled_charsmap"].dtype == np.uint8
    tokenizer["normalizer"]["precompiled_charsmap"] = "?"
    with pytest.raises(CheckpointError, match=r"normalizer\.precompiled_charsmap is no base64"):
        read(tmp_path, tokenizer)


# --- what is refused ---


def changed(path: str, value: Any, tokenizer: dict[str, Any] | None = None) -> dict[str, Any]:
    tokenizer = tokenizer or byte_level_tokenizer()
    *parents, last = path.split(".")
    inner = tokenizer
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (changed("model.type", "WordPiece"), "model.type 'WordPiece' is not supported; BPE and Unigram are"),
        (changed("model", None), "model: expected an object, it is missing"),
        (changed("model.vocab", [1]), "model.vocab: expected pairs of a token and its score"),
        (changed("model.vocab", {"a": -1}), "token 'a' has id -1, expected 0 to"),
        (changed("model.vocab", {"a": 320}), "token 'a' has id 320, the embedding has 320 rows"),
        (changed("model.vocab", {"a": 1, "b": 1}), "model.vocab: two tokens have the same id"),
        (changed("model.merges", [["a"]]), r"model.merges: expected two parts, got \['a'\]"),
        (changed("model.merges", [["a ", "b"]]), "model.merges: 'a  b' has a space in a part"),
        (changed("model.dropout", 0.1), "model.dropout is not supported"),
        (changed("model.end_of_word_suffix", "</w>"), "model.end_of_word_suffix is not supported"),
        (changed("normalizer", {"type": "Lowercase"}), "normalizer 'Lowercase' is not supported"),
        (changed("pre_tokenizer", {"type": "Whitespace"}), "a BPE without bytes in it is not supported"),
        (changed("pre_tokenizer", None), "a BPE without bytes in it is not supported"),
        (changed("pre_tokenizer.add_prefix_space", True), "add_prefix_space is not supported"),
        (
            changed("pre_tokenizer", {"type": "Sequence", "pretokenizers": [split("x"), BYTES]}),
            "no pre-tokenizer is kno",
        ),
        (
            changed("pre_tokenizer", {"type": "Sequence", "pretokenizers": [3]}),
            "pretokenizers: expected objects, got 3",
        ),
        (
            changed("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, BYTES]}),
            "pre_tokenizer 'Punctuation' is not supported",
        ),
        (
            changed("pre_tokenizer", {"type": "Sequence", "pretokenizers": [split("x", behavior="Contiguous"), BYTES]}),
            r"behavior \('Contiguous', False\) is not supported",
        ),
        (changed("added_tokens", [{"id": 1}]), r"added_tokens\[0\].content: expected a string, it is missing"),
        (changed("post_processor", template(special("b"))), "post_processor.special_tokens: 'b' has no ids"),
        (
            changed("model.merges", [["h", "e"], ["a", "n"], ["h", "e"]], sentencepiece_tokenizer()),
            "those that make 'he' do not stand together",
        ),
        (
            changed("normalizer", {"type": "Lowercase"}, sentencepiece_tokenizer()),
            "normalizer.type 'Lowercase' is not supported for a BPE of text|type 'Lowercase' is not supported",
        ),
        (
            {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0]]}, "normalizer": {"type": "Lowercase"}},
            "type 'Lowercase' is not supported for Unigram",
        ),
    ],
)
def test_what_cannot_be_expressed(tmp_path: Path, tokenizer: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message) as error:
        read(tmp_path, tokenizer)
    assert "tokenizer.json" in str(error.value)


def test_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    config = JsonObject("config.json", {})
    write_json(tmp_path / "tokenizer.json", byte_level_tokenizer())
    with pytest.raises(CheckpointError, match="the embedding has 4194305 rows, the limit is 4194304"):
        read_tokenizer(tmp_path, config, (1 << 22) + 1)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing: the folder has no tokenizer"):
        read_tokenizer(tmp_path, config, 320)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match=r"tokenizer.model is not read: .*\.save_pretrained\(folder\)"):
        read_tokenizer(tmp_path, config, 320)


def test_chat_templates(tmp_path: Path) -> None:
    def template_of(**settings: Any) -> str | None:
        return keys_of(**settings)["tokenizer.chat_template"]

    def keys_of(**settings: Any) -> dict[str, Any]:
        return read_chat_templates(tmp_path, JsonObject("tokenizer_config.json", settings))

    assert template_of() is None
    assert template_of(chat_template="x") == "x"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert keys_of(chat_template=named) == {
        "tokenizer.chat_template": "d",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "t",
    }
    with pytest.raises(CheckpointError, match=r"chat_template\[0\]\.template: expected a string, it is missing"):
        template_of(chat_template=[{"name": "x"}])
    with pytest.raises(CheckpointError, match="chat_template: expected a string, got 3"):
        template_of(chat_template=3)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    assert template_of() == "of a processor"
    assert template_of(chat_template="x") == "x"


def test_chat_templates_in_files(tmp_path: Path) -> None:
    def keys_of(**settings: Any) -> dict[str, Any]:
        return read_chat_templates(tmp_path, JsonObject("tokenizer_config.json", settings))

    default, more = tmp_path / "chat_template.jinja", tmp_path / "additional_chat_templates"
    default.write_text("file é", encoding="utf-8")
    assert keys_of(chat_template="x") == {"tokenizer.chat_template": "file é"}
    more.mkdir()
    for name in ("tool_use", "rag"):
        (more / f"{name}.jinja").write_text(name)
    expected = {
        "tokenizer.chat_template": "file é",
        "tokenizer.chat_templates": ["rag", "tool_use"],
        "tokenizer.chat_template.rag": "rag",
        "tokenizer.chat_template.tool_use": "tool_use",
    }
    assert keys_of(chat_template=[{"name": "x", "template": "y"}]) == expected
    default.unlink()
    assert keys_of(chat_template="x") == expected | {"tokenizer.chat_template": None}
    default.write_bytes(b"ab\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not UTF-8: byte 0xff at 2"):
        keys_of()
    default.write_bytes(bytes(1 << 21))
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: 2097152 bytes, a chat template may have 1048576"):
        keys_of()
    for i in range(63):
        (more / f"{i}.jinja").touch()
    with pytest.raises(CheckpointError, match=r"additional_chat_templates: 65 chat templates, 64 are allowed"):
        keys_of()


def test_chat_templates_are_those_of_transformers(tmp_path: Path) -> None:
    """The same files, read and chosen by transformers' tokenizer."""
    oracle = pytest.importorskip("transformers.tokenization_utils_tokenizers", reason="transformers is not installed")
    named = [{"name": name, "template": name + "{{ messages[0].content }}"} for name in ("default", "tool_use")]

    def check() -> None:
        settings = {"bos_token": "<|im_start|>", "chat_template": named}
        keys = read(tmp_path, {"version": "1.0", **byte_level_tokenizer()}, **settings)
        names = keys.get("tokenizer.chat_templates", [])
        sources = {"default": keys["tokenizer.chat_template"]}
        sources |= {name: keys[f"tokenizer.chat_template.{name}"] for name in names}
        ours = TemplateSet(sources, bos_token=None, eos_token=None)
        chooser = Prompts("m", None, ours)
        theirs = oracle.TokenizersBackend.from_pretrained(tmp_path)
        for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
            source = theirs.get_chat_template(tools=tools)
            assert ours[chooser.choose(None, tools)].source == source

    check()
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    check()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools {{ tools | length }}")
    check()
