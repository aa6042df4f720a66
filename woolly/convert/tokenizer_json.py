"""tokenizer.json to the keys of a GGUF vocabulary.

Owns which vocabularies can be expressed there: byte-level BPE whose way of cutting words has a name in
`woolly.pretokenizers`, BPE over text with ▁ for spaces and bytes to fall back on (SentencePiece's), and Unigram.
Anything else is refused with what is in the way. The ids of special tokens are read here too.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from woolly.convert.chat_templates import read_chat_templates
from woolly.convert.config_json import JsonObject, read_json, read_json_if_there
from woolly.convert.merges import merge_texts, scores_of_merges
from woolly.errors import CheckpointError, UnsupportedModelError
from woolly.metadata import show
from woolly.pretokenizers import PRE_TOKENIZERS
from woolly.vocabulary import TokenType

MAX_TOKENS = 1 << 22
PREFIX = "tokenizer.ggml."
SPACE = "▁"
# What ByteLevel cuts by where its use_regex is not false, and what Digits does.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT_PATTERN, NUMBER_PATTERN = r"\p{N}", r"\p{N}+"
# The name by which most engines know a way of cutting that has several.
_USUAL_NAMES = ("llama-bpe", "gpt-2", "starcoder", "dbrx", "qwen2", "gpt-4o", "deepseek-v3")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
}


def read_tokenizer(folder: Path, config: JsonObject, vocab_size: int) -> dict[str, Any]:
    """The keys of a folder's tokenizer and chat template.

    Parameters
    ----------
    folder : Path
    config : JsonObject
        config.json.
    vocab_size : int
        Rows of the embedding; ids without a token become unused ones.

    Raises
    ------
    CheckpointError
        tokenizer.json is missing or malformed.
    UnsupportedModelError
        A GGUF vocabulary cannot express it.
    """
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(_advice(folder))
    tokenizer = read_json(folder / "tokenizer.json")
    if vocab_size > MAX_TOKENS:
        raise CheckpointError(f"{folder}: the embedding has {vocab_size} rows, the limit is {MAX_TOKENS}")
    settings = read_json_if_there(folder / "tokenizer_config.json")
    tokens = Tokens(tokenizer, vocab_size)
    keys = _model_keys(tokenizer, tokens)
    keys[PREFIX + "tokens"] = tokens.texts
    keys[PREFIX + "token_type"] = tokens.types
    keys |= _special_ids(folder, config, settings, tokens)
    keys |= _additions(tokenizer, settings, keys)
    return keys | read_chat_templates(folder, settings)


class Tokens:
    """The tokens of a tokenizer.json by id, and their types.

    Attributes
    ----------
    model : JsonObject
        Its "model".
    vocab : dict of str to int
        The model's own tokens.
    added : dict of str to JsonObject
        Those that were added, by text.
    texts : list of str
    types : int32, (n_tokens,)
    """

    def __init__(self, tokenizer: JsonObject, vocab_size: int) -> None:
        self.model = tokenizer.get_object("model")
        self.vocab = _read_vocab(self.model)
        self.added = {}
        self.texts = [f"[PAD{i}]" for i in range(vocab_size)]
        self.types = np.full(vocab_size, TokenType.UNUSED, np.int32)
        for text, token_id in self.vocab.items():
            if token_id >= vocab_size:
                raise CheckpointError(
                    f"{tokenizer.path}: token {show(text)} has id {token_id}, the embedding has {vocab_size} rows"
                )
            self._set(token_id, text, TokenType.NORMAL)
        byte_fallback = self.model.get_bool("byte_fallback", False)
        if byte_fallback:
            for text in filter(_BYTE_TOKEN.fullmatch, self.vocab):
                self.types[self.vocab[text]] = TokenType.BYTE
        for entry in tokenizer.get_objects("added_tokens"):
            self._add(entry, vocab_size)

    def id_of(self, text: str) -> int | None:
        """The id of a token."""
        if text in self.added:
            return self.added[text].get_int("id")
        return self.vocab.get(text)

    def _add(self, entry: JsonObject, vocab_size: int) -> None:
        text, token_id = entry.get_str("content"), entry.get_int("id")
        if token_id >= vocab_size:
            return  # a token that the model has no row for, such as an image's mark in a model of text alone
        is_special = entry.get_bool("special", False)
        self.added[text] = entry
        self._set(token_id, text, TokenType.CONTROL if is_special else TokenType.USER_DEFINED)

    def _set(self, token_id: int, text: str, token_type: TokenType) -> None:
        self.texts[token_id] = text
        self.types[token_id] = token_type


def _read_vocab(model: JsonObject) -> dict[str, int]:
    """The model's tokens by text: an object for BPE, a list of (text, score) for Unigram."""
    if isinstance(model.fields.get("vocab"), list):
        pairs = model.get_list("vocab")
        if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise CheckpointError(f"{model.path}: model.vocab: expected pairs of a token and its score")
        return {pair[0]: token_id for token_id, pair in enumerate(pairs)}
    vocab = dict(model.get_object("vocab").fields)
    for text, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id < MAX_TOKENS:
            raise CheckpointError(
                f"{model.path}: model.vocab: token {show(text)} has id {show(token_id)}, expected 0 to {MAX_TOKENS - 1}"
            )
    if len(set(vocab.values())) != len(vocab):
        raise CheckpointError(f"{model.path}: model.vocab: two tokens have the same id")
    return vocab


# --- the three kinds of model ---


def _model_keys(tokenizer: JsonObject, tokens: Tokens) -> dict[str, Any]:
    kind = tokens.model.get_str("type", "BPE")  # the first files did not say
    if kind == "Unigram":
        return _unigram_keys(tokenizer, tokens)
    if kind != "BPE":
        raise UnsupportedModelError(f"{tokenizer.path}: model.type {kind!r} is not supported; BPE and Unigram are")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if tokens.model.fields.get(key):
            raise UnsupportedModelError(f"{tokenizer.path}: model.{key} is not supported")
    if tokens.model.get_bool("byte_fallback", False):
        return _sentencepiece_keys(tokenizer, tokens)
    return _byte_level_keys(tokenizer, tokens)


def _byte_level_keys(tokenizer: JsonObject, tokens: Tokens) -> dict[str, Any]:
    for step in _steps(tokenizer, "normalizer", "normalizers"):
        if step.get_str("type") != "NFC":  # which other engines leave out, and no text on a computer lacks
            raise UnsupportedModelError(f"{tokenizer.path}: normalizer {step.get_str('type')!r} is not supported")
    patterns = tuple(_patterns(tokenizer))
    ignore_merges = tokens.model.get_bool("ignore_merges", False)
    return {
        PREFIX + "model": "gpt2",
        PREFIX + "pre": find_name(tokenizer.path, patterns, ignore_merges=ignore_merges),
        PREFIX + "merges": merge_texts(tokens.model),
    }


def find_name(path: str, patterns: tuple[str, ...], *, ignore_merges: bool) -> str:
    """The name in `woolly.pretokenizers` of a way of cutting text into words.

    Raises
    ------
    UnsupportedModelError
        None is the same.
    """
    names = [
        name
        for name, row in PRE_TOKENIZERS.items()
        if row.byte_level and row.patterns == patterns and row.ignore_merges == ignore_merges
    ]
    if not names:
        raise UnsupportedModelError(
            f"{path}: no pre-tokenizer is known that cuts by {show(patterns)} with ignore_merges {ignore_merges}"
        )
    return next((name for name in _USUAL_NAMES if name in names), names[0])


def _patterns(tokenizer: JsonObject) -> Iterator[str]:
    """The regular expressions that cut a text, one after the other."""
    steps = list(_steps(tokenizer, "pre_tokenizer", "pretokenizers"))
    if "ByteLevel" not in [step.get_str("type") for step in steps]:
        raise UnsupportedModelError(f"{tokenizer.path}: pre_tokenizer: a BPE without bytes in it is not supported")
    for step in steps:
        kind = step.get_str("type")
        if kind == "Split":
            yield _split_pattern(step)
        elif kind == "Digits":
            yield DIGIT_PATTERN if step.get_bool("individual_digits", False) else NUMBER_PATTERN
        elif kind != "ByteLevel":
            raise UnsupportedModelError(f"{tokenizer.path}: pre_tokenizer {kind!r} is not supported")
        else:
            if step.get_bool("add_prefix_space", True):
                raise UnsupportedModelError(f"{tokenizer.path}: add_prefix_space is not supported")
            if step.get_bool("use_regex", True):
                yield GPT2_PATTERN


def _split_pattern(step: JsonObject) -> str:
    behaviour = (step.get_str("behavior"), step.get_bool("invert", False))
    pattern = step.get_object("pattern")
    # Removing what is between the matches is keeping the matches: the same, as the patterns match everything.
    if behaviour not in (("Isolated", False), ("Removed", True)):
        raise UnsupportedModelError(f"{step.path}: {step.prefix}behavior {behaviour} is not supported")
    text = pattern.get_str("Regex", None)
    return re.escape(pattern.get_str("String")) if text is None else text


def _sentencepiece_keys(tokenizer: JsonObject, tokens: Tokens) -> dict[str, Any]:
    added_space = False
    for step in [
        *_steps(tokenizer, "normalizer", "normalizers"),
        *_steps(tokenizer, "pre_tokenizer", "pretokenizers"),
    ]:
        kind = step.get_str("type")
        if kind == "Prepend" and step.get_str("prepend") == SPACE:
            added_space = True
        elif kind == "Metaspace":
            added_space = _adds_space(step)
        elif not _is_replaced_space(step):
            raise UnsupportedModelError(f"{step.path}: {step.prefix}type {kind!r} is not supported for a BPE of text")
    return {
        PREFIX + "model": "llama",
        PREFIX + "pre": "default",
        PREFIX + "scores": scores_of_merges(tokens.model, tokens.texts),
        PREFIX + "add_space_prefix": added_space,
    }


def _is_replaced_space(step: JsonObject) -> bool:
    """Whether a step writes ▁ for a space, or cuts at spaces when there are none left."""
    if step.get_object("pattern", JsonObject("", {})).fields.get("String") != " ":
        return False
    return step.get_str("type") == "Split" or (step.get_str("type") == "Replace" and step.get_str("content") == SPACE)


def _adds_space(step: JsonObject) -> bool:
    scheme = step.get_str("prepend_scheme", "always" if step.get_bool("add_prefix_space", True) else "never")
    return scheme != "never"


def _unigram_keys(tokenizer: JsonObject, tokens: Tokens) -> dict[str, Any]:
    unknown = tokens.model.get_int("unk_id")
    pairs = tokens.model.get_list("vocab")
    scores = np.zeros(len(tokens.texts), np.float32)
    scores[: len(pairs)] = [score if type(score) in (int, float) and abs(score) < 1e30 else 0 for _, score in pairs]
    if unknown < len(tokens.types):
        tokens.types[unknown] = TokenType.UNKNOWN
    keys: dict[str, Any] = {
        PREFIX + "model": "t5",
        PREFIX + "pre": "default",
        PREFIX + "scores": scores,
        PREFIX + "unknown_token_id": unknown,
        PREFIX + "add_space_prefix": False,
        PREFIX + "remove_extra_whitespaces": False,
    }
    for step in [
        *_steps(tokenizer, "normalizer", "normalizers"),
        *_steps(tokenizer, "pre_tokenizer", "pretokenizers"),
    ]:
        kind = step.get_str("type")
        if kind == "Precompiled":
            keys[PREFIX + "precompiled_charsmap"] = _charsmap(step)
        elif kind == "Metaspace":
            keys[PREFIX + "add_space_prefix"] = _adds_space(step)
        elif kind == "Replace" and step.get_object("pattern").fields.get("Regex") == " {2,}":
            keys[PREFIX + "remove_extra_whitespaces"] = True
        elif kind not in ("WhitespaceSplit", "Strip"):
            raise UnsupportedModelError(f"{step.path}: {step.prefix}type {kind!r} is not supported for Unigram")
    return keys


def _charsmap(step: JsonObject) -> np.ndarray:
    try:
        return np.frombuffer(base64.b64decode(step.get_str("precompiled_charsmap"), validate=True), np.uint8)
    except (binascii.Error, ValueError):
        raise CheckpointError(f"{step.path}: {step.prefix}precompiled_charsmap is no base64") from None


# --- tokens that play a part ---


def _special_ids(folder: Path, config: JsonObject, settings: JsonObject, tokens: Tokens) -> dict[str, int]:
    """Ids by key: from tokenizer_config.json by text, else from generation_config.json and config.json."""
    generation = read_json_if_there(folder / "generation_config.json")
    keys = {}
    for name, key in _SPECIAL.items():
        token_id = tokens.id_of(_token_text(settings, f"{name}_token"))
        for source in (generation, config):
            value = source.fields.get(f"{name}_token_id")
            value = value[0] if isinstance(value, list) and value else value  # the others are found by their texts
            if token_id is None and type(value) is int and 0 <= value < len(tokens.texts):
                token_id = value
        if token_id is not None:
            keys[PREFIX + key] = token_id
            if tokens.types[token_id] == TokenType.NORMAL and name in ("bos", "eos"):
                tokens.types[token_id] = TokenType.CONTROL
    unknown = keys.get(PREFIX + "unknown_token_id")
    if unknown is not None and tokens.model.get_bool("byte_fallback", False):
        tokens.types[unknown] = TokenType.UNKNOWN
    return keys


def _token_text(settings: JsonObject, key: str) -> str:
    """A token that tokenizer_config.json names, as text or as an object that holds it."""
    value = settings.fields.get(key)
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _additions(tokenizer: JsonObject, settings: JsonObject, keys: Mapping[str, Any]) -> dict[str, bool]:
    """Whether BOS and EOS are put around a text: what the post-processor does, else what tokenizer_config.json says."""
    template = _template_ids(tokenizer)
    found = {}
    for name, at in (("bos", 0), ("eos", -1)):
        token_id = keys.get(f"{PREFIX}{name}_token_id")
        adds = settings.get_bool(f"add_{name}_token", False)
        if template is not None:
            adds = token_id is not None and bool(template) and template[at] == token_id
        found[f"{PREFIX}add_{name}_token"] = adds and token_id is not None
    return found


def _template_ids(tokenizer: JsonObject) -> list[int | None] | None:
    """Ids that the post-processor puts around a text, None for the text; None where it has no template."""
    for step in _steps(tokenizer, "post_processor", "processors"):
        if step.get_str("type") == "TemplateProcessing":
            special = step.get_object("special_tokens").fields
            ids: list[int | None] = []
            for piece in step.get_objects("single"):
                if "SpecialToken" not in piece:
                    ids.append(None)
                    continue
                text = piece.get_object("SpecialToken").get_str("id")
                entry = special.get(text)
                found = entry.get("ids") if isinstance(entry, Mapping) else None
                if not isinstance(found, list) or not found or not all(type(i) is int for i in found):
                    raise CheckpointError(f"{step.path}: post_processor.special_tokens: {show(text)} has no ids")
                ids += found
            return ids
    return None


# --- reading ---


def _steps(tokenizer: JsonObject, key: str, inner: str) -> Iterator[JsonObject]:
    """The steps of a part of the tokenizer, those of sequences one by one."""
    step = tokenizer.get_object(key, None)
    if step is None:
        return
    if step.get_str("type") != "Sequence":
        yield step
        return
    yield from step.get_objects(inner)


def _advice(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file() or (folder / "spiece.model").is_file():
        return (
            f"{folder}: tokenizer.json is missing, and tokenizer.model is not read: transformers writes the former "
            "from the latter, AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return f"{folder}: tokenizer.json is missing: the folder has no tokenizer"
