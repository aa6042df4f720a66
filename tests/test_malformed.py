"""The regression set of malformed models: what a file may get wrong that shows when the model is built or run.

One entry for each class of bug, named for it. What concerns the container alone, its counts, lengths, types, offsets
and every truncation and bit flip, is in test_gguf_file.py. A case is refused in one short printable line, within a
second of CPU, by an error of ours that names what is wrong; what is not refused runs four tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf_builder import (
    ARRAY,
    F32,
    FLOAT32,
    FLOAT64,
    INT32,
    Q8_0,
    REFUSED_S,
    STRING,
    UINT32,
    UINT64,
    ModelParts,
    array,
    f32,
    string,
    u32,
    u64,
)

import woolly
from woolly.errors import (
    ContextFullError,
    GGUFError,
    NonFiniteError,
    TemplateError,
    UnsupportedModelError,
    WoollyError,
)
from woolly.gguf_file import GGUFFile
from woolly.models import ARCHITECTURES, gguf_config
from woolly.stored_file import StoredFile

ESC = "\x1b[31m"
# A message without a byte's number: of what is not there, has no place, or is told by a token's id or a tensor's name
NO_PLACE = r"is missing|has no place|of type byte as id|frequencies that are not finite|frequency factors above 0"
NAN, INFINITY = float("nan"), float("inf")
TOKENS = "tokenizer.ggml.tokens"


def with_key(key: str, value_type: int, value: bytes, *, tokenizer: str = "llama") -> ModelParts:
    """A sound model but for one key."""
    return ModelParts(tokenizer=tokenizer).set(key, value_type, value)


def integer(key: str, value: int) -> ModelParts:
    return with_key(key, UINT32, u32(value))


def number(key: str, value: float) -> ModelParts:
    return with_key(key, FLOAT32, f32(value))


def matrix(name: str, dims: list[int], ggml_type: int = Q8_0, n_bytes: int = 34 * 32) -> ModelParts:
    return ModelParts().tensor(f"blk.0.{name}.weight", dims, ggml_type, bytes(n_bytes))


def strings(texts: list[str | bytes]) -> bytes:
    return array(STRING, [string(text) for text in texts])


def q8_blocks(scale: bytes, n: int, quants: bytes = b"\1" * 32) -> bytes:
    return (scale + quants) * n


# name: (the model, what the message says)
REFUSED: dict[str, tuple[ModelParts, str]] = {
    # sizes
    "head_count 0": (integer("llama.attention.head_count", 0), "head_count: expected an integer of 1 to 4096, got 0"),
    "head_count_kv 0": (integer("llama.attention.head_count_kv", 0), "head_count_kv: expected an integer of 1 to 4096"),
    "fewer heads than KV heads": (integer("llama.attention.head_count_kv", 4), "2 heads are not a multiple of 4 KV"),
    "heads no multiple of KV heads": (
        integer("llama.attention.head_count", 4).set("llama.attention.head_count_kv", UINT32, u32(3)),
        "4 heads are not a multiple of 3 KV heads",
    ),
    "heads that do not divide the width": (integer("llama.attention.head_count", 3), "32 is not a multiple of 3 heads"),
    "odd rope dimension": (integer("llama.rope.dimension_count", 3), "expected an even number, got 3"),
    "rope dimension 0": (integer("llama.rope.dimension_count", 0), "expected an integer of 2 to 16, got 0"),
    "rope dimension beyond the head": (integer("llama.rope.dimension_count", 18), "expected an integer of 2 to 16"),
    "block_count 0": (integer("llama.block_count", 0), "block_count: expected an integer of 1 to"),
    "block_count of one more": (integer("llama.block_count", 2), "tensor 'blk.1.attn_norm.weight' is missing"),
    "block_count 2^31": (integer("llama.block_count", 2**31), "block_count: expected an integer of 1 to"),
    "block_count 2^63": (with_key("llama.block_count", UINT64, u64(2**63)), "block_count: expected an integer of 1 to"),
    "block_count negative": (with_key("llama.block_count", INT32, b"\xff" * 4), "block_count: .*, got -1"),
    "context_length 0": (integer("llama.context_length", 0), "context_length: expected an integer of 1 to"),
    "context_length 2^32 - 1": (integer("llama.context_length", 2**32 - 1), "context_length: expected an integer of"),
    "embedding_length 0": (integer("llama.embedding_length", 0), "embedding_length: expected an integer of 1 to"),
    "embedding_length huge": (
        integer("llama.embedding_length", 1 << 24).set("llama.attention.key_length", UINT32, u32(16)),
        "token_embd.weight.*the configuration says|needs .* of memory",  # whichever comes first on this machine
    ),
    "feed_forward_length huge": (
        integer("llama.feed_forward_length", 1 << 24),
        "ffn_gate.weight.*configuration|needs .* of memory",
    ),
    "key_length 0": (integer("llama.attention.key_length", 0), "key_length: expected an integer of 1 to 1024, got 0"),
    "key_length 2^31": (integer("llama.attention.key_length", 2**31), "key_length: expected an integer of 1 to 1024"),
    # numbers
    "eps NaN": (number("llama.attention.layer_norm_rms_epsilon", NAN), "epsilon: expected a number above 0"),
    "eps negative": (number("llama.attention.layer_norm_rms_epsilon", -1e-5), "epsilon: expected a number above 0"),
    "eps 0": (number("llama.attention.layer_norm_rms_epsilon", 0), "epsilon: expected a number above 0"),
    "eps infinite": (number("llama.attention.layer_norm_rms_epsilon", INFINITY), "epsilon: expected a number above 0"),
    "rope base 0": (number("llama.rope.freq_base", 0), "freq_base: expected a number above 0"),
    "rope base NaN": (number("llama.rope.freq_base", NAN), "freq_base: expected a number above 0"),
    "rope base negative": (number("llama.rope.freq_base", -1e4), "freq_base: expected a number above 0"),
    "rope base that overflows": (
        ModelParts(hidden=256).set("llama.rope.freq_base", FLOAT64, struct.pack("<d", 1e-320)),
        "freq_base: 1e-320 makes frequencies that are not finite",
    ),
    "rope factors 0": (
        ModelParts().tensor("rope_freqs.weight", [8], F32, bytes(32)),
        "rope_freqs.*frequency factors above 0",
    ),
    "rope factors NaN": (
        ModelParts().tensor("rope_freqs.weight", [8], F32, f32(NAN) * 8),
        "rope_freqs.*frequency factors above 0",
    ),
    "rope factors of another length": (
        ModelParts().tensor("rope_freqs.weight", [9], F32, f32(1) * 9),
        r"'rope_freqs.weight' at offset \d+ has shape \(9,\), the configuration says \(8,\)",
    ),
    # types of values
    "architecture of the wrong type": (integer("general.architecture", 1), "expected a string, got uint32 1"),
    "sizes of the wrong type": (number("llama.block_count", 1), "block_count.*expected an integer, got float32 1.0"),
    "eps of the wrong type": (integer("llama.attention.layer_norm_rms_epsilon", 1), "expected a float, got uint32 1"),
    "template of the wrong type": (integer("tokenizer.chat_template", 1), "expected a string, got uint32 1"),
    # vocabulary
    "bos beyond the vocabulary": (integer("tokenizer.ggml.bos_token_id", 12), "bos_token_id is 12, outside the vocab"),
    "eos beyond the vocabulary": (integer("tokenizer.ggml.eos_token_id", 2**32 - 1), "eos_token_id is 4294967295, out"),
    "eot beyond the vocabulary": (integer("tokenizer.ggml.eot_token_id", 12), "eot_token_id is 12, outside the vocab"),
    "separator beyond the vocabulary": (
        integer("tokenizer.ggml.seperator_token_id", 12),
        "seperator_token_id is 12, outside",
    ),
    "bos negative": (with_key("tokenizer.ggml.bos_token_id", INT32, b"\xff" * 4), "bos_token_id is -1, outside"),
    "no tokens": (with_key(TOKENS, ARRAY, strings([])), "tokens is empty"),
    "tokens of the wrong type": (with_key(TOKENS, STRING, string("x")), "expected an array of strings, got string 'x'"),
    "tokens that are numbers": (with_key(TOKENS, ARRAY, array(INT32, [u32(1)] * 12)), "expected an array of strings"),
    "a token twice": (with_key(TOKENS, ARRAY, strings(["a"] * 12)), "tokens has 'a' twice, as ids 0 and 11"),
    "fewer tokens than rows": (
        with_key(TOKENS, ARRAY, strings(["<unk>", "<s>", "</s>", "a"])).drop(
            "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
        ),
        r"'token_embd.weight' at offset \d+ has shape \(12, 32\), the configuration says \(4, 32\)",
    ),
    "a million tokens": (
        with_key(TOKENS, ARRAY, strings([f"t{i}" for i in range(10**6)])),
        r"'token_embd.weight' at offset \d+ has shape \(12, 32\), the configuration says \(1000000, 32\)",
    ),
    "a million tokens and no embedding": (
        with_key(TOKENS, ARRAY, strings([f"t{i}" for i in range(10**6)])).drop("token_embd.weight"),
        r"vocabulary would take 2\d\d MB, too much for 0 MB of weights: the limit is 64 MiB and four times these \(",
    ),
    "a million tokens and no more": (
        with_key(TOKENS, ARRAY, strings([f"t{i}" for i in range(10**6)])).drop(
            "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
        ),
        r"'token_embd.weight' at offset \d+ has shape \(12, 32\), the configuration says \(1000000, 32\)",
    ),
    "more tokens than any model has": (
        with_key(TOKENS, ARRAY, strings([""] * (2**20 + 1))).drop("token_embd.weight"),
        r"the vocabulary would take 252 MB, too much for 0 MB of weights",
    ),
    "more merges than any model has": (
        with_key("tokenizer.ggml.merges", ARRAY, strings([""] * (2**20 + 1)), tokenizer="gpt2"),
        r"the vocabulary would take 73 MB, too much for 0 MB of weights",
    ),
    "tokens alike once decoded": (with_key(TOKENS, ARRAY, strings([b"\xff", b"\xfe"] * 6)), "tokens has '.+' twice"),
    "scores of the wrong type": (
        with_key("tokenizer.ggml.scores", ARRAY, strings(["1"] * 12)),
        "scores has 12 values of type .*, expected 12 numbers, one for each token",
    ),
    "scores of another length": (
        with_key("tokenizer.ggml.scores", ARRAY, array(FLOAT32, [f32(1)] * 11)),
        "scores has 11 values of type float32, expected 12 numbers",
    ),
    "scores NaN": (
        with_key("tokenizer.ggml.scores", ARRAY, array(FLOAT32, [f32(NAN)] * 12)),
        "scores has nan for token 0, expected a finite number",
    ),
    "token types out of range": (
        with_key("tokenizer.ggml.token_type", ARRAY, array(INT32, [u32(7)] * 12)),
        "token_type has values from 7 to 7, expected 0 to 6",
    ),
    "byte tokens that are none": (
        with_key("tokenizer.ggml.token_type", ARRAY, array(INT32, [u32(6)] * 12)),
        "tokens has '<unk>' of type byte as id 0, expected <0x00> to <0xFF>",
    ),
    "merges naming absent tokens": (
        with_key("tokenizer.ggml.merges", ARRAY, strings(["x y"]), tokenizer="gpt2"),
        "merges has 'x y' as number 0, expected the two parts of a token",
    ),
    "merges of three parts": (
        with_key("tokenizer.ggml.merges", ARRAY, strings(["a b c"]), tokenizer="gpt2"),
        "merges has 'a b c' as number 0",
    ),
    "merges that are empty": (
        with_key("tokenizer.ggml.merges", ARRAY, strings([""]), tokenizer="gpt2"),
        "merges has '' as number 0",
    ),
    "merges missing": (ModelParts(tokenizer="gpt2").drop("tokenizer.ggml.merges"), "merges is missing"),
    # tensors that disagree with the configuration
    "matrix with a row less": (matrix("attn_q", [32, 31], n_bytes=34 * 31), r"has shape \(31, 32\)"),
    "matrix of one dimension": (matrix("attn_q", [1024]), r"has shape \(1024,\), the configuration says \(32, 32\)"),
    "matrix of three dimensions": (matrix("attn_q", [32, 32, 1]), r"has shape \(1, 32, 32\), the configuration says"),
    "norm of another length": (ModelParts().tensor("output_norm.weight", [31], F32, bytes(124)), r"has shape \(31,\)"),
    "integers for weights": (matrix("attn_q", [32, 32], 26, 4096), "is stored as i32, which has no kernels"),
    "activations' format for weights": (matrix("attn_q", [32, 32], 9, 40 * 32), "is stored as q8_1, which has no kern"),
    "tensor with no place": (ModelParts().tensor("extra", [32], F32, bytes(128)), "'extra' has no place"),
    # arrays where a message or a comparison expects one value
    "array for a key of other arithmetic": (
        with_key("llama.logit_scale", ARRAY, array(INT32, [u32(2**24 + i) for i in range(300)])),
        r"llama\.logit_scale: \[16777216, 16777217, .*… is not supported",
    ),
    "array for the pre-tokenizer": (
        with_key("tokenizer.ggml.pre", ARRAY, array(INT32, [u32(1)] * 2)),
        "tokenizer.ggml.pre is of type ndarray, expected str",
    ),
    # names that would take a terminal over
    "ESC in a tensor's name": (ModelParts().tensor("x" + ESC, [32], F32, bytes(128)), r"tensor 'x\\x1b\[31m' has no"),
    "ESC in the architecture": (
        with_key("general.architecture", STRING, string(ESC * 1000)),
        r"architecture '\\x1b\[31m.*… is not supported",
    ),
    "ESC in the tokenizer": (with_key("tokenizer.ggml.model", STRING, string(ESC)), r"tokenizer '\\x1b\[31m' in"),
    "ESC in the pre-tokenizer": (
        with_key("tokenizer.ggml.pre", STRING, string(ESC * 99), tokenizer="gpt2"),
        r"unknown pre-tokenizer '\\x1b",
    ),
    "ESC in a token": (with_key(TOKENS, ARRAY, strings([ESC * 99] * 12)), r"tokens has '\\x1b\[31m.*' twice"),
    "ESC in a merge": (
        with_key("tokenizer.ggml.merges", ARRAY, strings([ESC * 99]), tokenizer="gpt2"),
        r"merges has '\\x1b",
    ),
}
for _name in ModelParts().tensors:
    REFUSED[f"without {_name}"] = (ModelParts().drop(str(_name)), f"tensor '{_name}' is missing")
# without a gate, the other matrix is taken for both in one, as in files of Phi-3
REFUSED["without blk.0.ffn_gate.weight"] = (
    ModelParts().drop("blk.0.ffn_gate.weight"),
    r"tensor 'blk\.0\.ffn_up\.weight' .* has shape \(32, 32\), the configuration says \(64, 32\)",
)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., woolly.Model]:
    """Open a model from its parts or bytes."""

    def loader(parts: ModelParts | bytes) -> woolly.Model:
        path = tmp_path / "model.gguf"
        path.write_bytes(parts if isinstance(parts, bytes) else parts.build())
        return woolly.load_gguf(path, n_threads=1)

    return loader


@pytest.mark.parametrize("name", REFUSED)
def test_refused(load: Callable[..., woolly.Model], name: str) -> None:
    parts, match = REFUSED[name]
    data = parts.build()
    start_s = time.process_time()
    with pytest.raises(WoollyError, match=match) as caught:
        load(data)
    assert time.process_time() - start_s < REFUSED_S
    message = str(caught.value)
    assert message.isprintable()
    known = message.partition("known:")[0]  # lists of what there is may be longer
    assert len(known) < 500
    if isinstance(caught.value, GGUFError) and not re.search(NO_PLACE, message):
        assert re.search(r"at (byte|offset) \d+", message)


def test_a_refused_model_allocates_little(load: Callable[..., woolly.Model]) -> None:
    """Each of them: 64 MB and four times the file's size, at most."""
    for parts, _ in REFUSED.values():
        data = parts.build()
        if len(data) > 1 << 20:
            continue  # a million tokens, which take seconds where each allocation is counted
        tracemalloc.start()
        try:
            with pytest.raises(WoollyError):
                load(data)
            assert tracemalloc.get_traced_memory()[1] < (64 << 20) + 4 * len(data)
        finally:
            tracemalloc.stop()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="the sanitizer takes memory of its own")
@pytest.mark.parametrize("name", [name for name in REFUSED if re.search("million|than any", name)])
def test_a_large_refused_model_allocates_little(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(REFUSED[name][0].build())
    code = """
import sys, woolly
from woolly.gguf_file import GGUFFile
from woolly.memory import proc_bytes, resident_bytes
import woolly.loading, woolly.tokenizer, woolly.sampling, woolly.sandbox
before = resident_bytes()
try:
    woolly.load_gguf(sys.argv[1], n_threads=1)
except woolly.WoollyError:
    print(proc_bytes("self/status", "VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < (64 << 20) + 4 * path.stat().st_size


SOUND = {
    "llama": ModelParts(),
    "gpt2": ModelParts(tokenizer="gpt2"),
    "f32": ModelParts(matrix_type=F32),
    "tokens that are empty": with_key(TOKENS, ARRAY, strings([""] * 12)),
    "tokens with ESC": with_key(TOKENS, ARRAY, strings([f"{ESC}{i}" for i in range(12)])),
    "tokens that are not UTF-8": with_key(TOKENS, ARRAY, strings([b"\xff" * (i + 1) for i in range(12)])),
    "every token a control token": with_key("tokenizer.ggml.token_type", ARRAY, array(INT32, [u32(3)] * 12)),
    "norm of zeros": ModelParts().tensor("output_norm.weight", [32], F32, bytes(128)),
    "context of 2^24": integer("llama.context_length", 1 << 24),
    "eps that vanishes": number("llama.attention.layer_norm_rms_epsilon", 1e-45),
    "norm in Q8_0": ModelParts().tensor("output_norm.weight", [32], Q8_0, q8_blocks(b"\0\x3c", 1)),
    "no template": ModelParts().drop("tokenizer.chat_template"),
    "a context of five": integer("llama.context_length", 5),
}


@pytest.mark.parametrize("name", SOUND)
def test_odd_but_sound_models_run(load: Callable[..., woolly.Model], name: str) -> None:
    with load(SOUND[name]) as model:
        ids = model.session().generate([1, 4, 5] if name != "a context of five" else [1], max_tokens=4).tokens
        assert all(0 <= token < 12 for token in ids)


def test_a_template_that_is_none_says_so_when_it_is_used(load: Callable[..., woolly.Model]) -> None:
    with load(with_key("tokenizer.chat_template", STRING, string("{% for"))) as model:
        assert model.generate([1, 4], max_tokens=1).prompt_tokens == 2
        with pytest.raises(TemplateError, match="chat template, line 1: unexpected"):
            model.encode_chat([{"role": "user", "content": "a"}])


def test_a_context_that_is_full_says_so(load: Callable[..., woolly.Model]) -> None:
    with load(integer("llama.context_length", 3)) as model:
        with pytest.raises(ContextFullError, match="the prompt has 4 tokens, n_ctx is 3"):
            model.generate([4, 4, 4, 4])
        session = model.session()
        session.feed([4, 4])
        with pytest.raises(ContextFullError, match="2 tokens in the context and 2 new ones do not fit into n_ctx = 3"):
            session.feed([4, 4])


# Numbers that are none: such a file is well formed, so it loads; what it computes is refused with the place

LARGE = b"\x7f" * 32
F16_INF, F16_NAN, F16_MAX = b"\0\x7c", b"\0\x7e", b"\xff\x7b"
NOT_FINITE = {
    "scales Inf in the embedding": ("token_embd", [32, 12], Q8_0, q8_blocks(F16_INF, 12), "embd"),
    "scales NaN in the embedding": ("token_embd", [32, 12], Q8_0, q8_blocks(F16_NAN, 12), "embd"),
    "scales Inf in ffn_up": ("blk.0.ffn_up", [32, 32], Q8_0, q8_blocks(F16_INF, 32), "blk.0.ffn_gate_up.up"),
    "scales Inf of zeros": ("blk.0.ffn_up", [32, 32], Q8_0, q8_blocks(F16_INF, 32, bytes(32)), "blk.0.ffn_gate_up.up"),
    "scales NaN in ffn_down": ("blk.0.ffn_down", [32, 32], Q8_0, q8_blocks(F16_NAN, 32), "blk.0.ffn_residual"),
    "scales NaN in the keys": ("blk.0.attn_k", [32, 16], Q8_0, q8_blocks(F16_NAN, 16), "blk.0.attn_qkv.k"),
    "scales NaN in the values": ("blk.0.attn_v", [32, 16], Q8_0, q8_blocks(F16_NAN, 16), "blk.0.attn_qkv.v"),
    "values beyond an f16 cache": ("blk.0.attn_v", [32, 16], Q8_0, q8_blocks(F16_MAX, 16, LARGE), "blk.0.attn_heads"),
    "norm NaN": ("output_norm", [32], F32, f32(NAN) * 32, "output_norm"),
    "norm Inf": ("output_norm", [32], F32, f32(INFINITY) * 32, "output_norm"),
    "norm that overflows": ("blk.0.ffn_norm", [32], F32, f32(3e38) * 32, "blk.0.ffn_norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_FINITE)
def test_the_operation_that_is_not_finite_is_named(load: Callable[..., woolly.Model], name: str) -> None:
    tensor, dims, ggml_type, data, operation = NOT_FINITE[name]
    with load(ModelParts().tensor(f"{tensor}.weight", dims, ggml_type, data)) as model:
        message = f"logits are not finite: the first number that is not is .* in the output of '{operation}'"
        session = model.session()
        with pytest.raises(NonFiniteError, match=message):
            session.feed([1, 4, 5], chunk=2)
        assert session.n_past == 0
        with pytest.raises(NonFiniteError, match=message):
            model.generate([1, 4, 5])
        with pytest.raises(NonFiniteError, match=message):
            model.forward([1, 4, 5])


# Keys that nobody reads


def keys_that_are_read(path: Path) -> set[str]:
    """Keys that the architecture asks a file for, without its name."""
    path.write_bytes(ModelParts().build())
    with GGUFFile.open(path) as file:
        ARCHITECTURES["llama"].read_config(file.metadata)
        return {key.removeprefix("llama.") for key in file.metadata.asked if key.startswith("llama.")}


def test_keys_that_change_the_arithmetic_are_refused(load: Callable[..., woolly.Model], tmp_path: Path) -> None:
    unread = set(gguf_config.ARITHMETIC) - keys_that_are_read(tmp_path / "sound.gguf")
    assert len(unread) > 20
    for key in sorted(unread):
        with pytest.raises(UnsupportedModelError, match=re.escape(f"llama.{key}")):
            load(integer(f"llama.{key}", 7))


# Files that change while they are open


def test_a_model_needs_its_file_no_more(tmp_path: Path) -> None:
    """Packing copies: what happens to the file after loading changes nothing, and ends nothing by SIGBUS."""
    path = tmp_path / "model.gguf"
    path.write_bytes(ModelParts().build())
    with woolly.load_gguf(path, n_threads=1) as model:
        expected = model.forward([1, 4, 5]).tobytes()
        size = path.stat().st_size
        path.write_bytes(b"\xff" * size)
        assert model.forward([1, 4, 5]).tobytes() == expected
        os.truncate(path, 0)
        assert model.forward([1, 4, 5]).tobytes() == expected
        assert model.generate("a b", max_tokens=4, temperature=0).tokens
        path.unlink()
        assert model.forward([1, 4, 5]).tobytes() == expected


def at_read(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object], number: int) -> Callable[[], int]:
    """Have something happen between the file's opening and its read of that number; returned is a count of reads."""
    reading, n_reads = StoredFile.reading, itertools.count(1)

    def changed(file: StoredFile) -> contextlib.AbstractContextManager[object]:
        if next(n_reads) == number:
            change()
        return reading(file)

    monkeypatch.setattr(StoredFile, "reading", changed)
    return lambda: next(n_reads) - 1


@pytest.mark.parametrize("n_left", [0, 1, 4096])
def test_a_file_that_is_shortened_while_it_is_loaded_is_refused(tmp_path: Path, n_left: int) -> None:
    """At each read: what comes is an error, and not SIGBUS."""
    path, data = tmp_path / "model.gguf", ModelParts(hidden=128, matrix_type=F32).build()
    for number in range(1, 100):
        path.write_bytes(data)
        with pytest.MonkeyPatch.context() as patch:
            n_reads = at_read(patch, lambda: os.truncate(path, n_left), number)
            try:
                woolly.load_gguf(path, n_threads=1).close()
            except GGUFError as error:
                assert f"the file was shortened while it was open, to {n_left} bytes" in str(error)  # noqa: PT017
            else:
                break
    assert number == n_reads() + 1 > 8  # it was read so many times, and once more it was not


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_file_may_be_shortened_at_any_moment(tmp_path: Path, n_threads: int) -> None:
    """While another thread cuts it off, sooner or later: it loads, or is refused."""
    path = tmp_path / "model.gguf"
    data = ModelParts(hidden=512, matrix_type=F32).build()
    path.write_bytes(data)
    started = time.perf_counter()
    woolly.load_gguf(path, n_threads=n_threads).close()
    seconds = time.perf_counter() - started
    n_refused = 0
    for delay in np.linspace(0, seconds, 20):
        path.write_bytes(data)
        cutting = threading.Timer(delay, os.truncate, (path, len(data) // 2))
        cutting.start()
        try:
            woolly.load_gguf(path, n_threads=n_threads).close()
        except GGUFError as error:
            n_refused += 1
            assert re.search("the file was shortened while it was open|end past the file's", str(error))  # noqa: PT017
        finally:
            cutting.join()
    assert n_refused > 0


@pytest.mark.parametrize("name", ["overwritten", "replaced", "removed"])
def test_a_file_that_changes_while_it_is_loaded(tmp_path: Path, name: str) -> None:
    """At each read: a model of other weights, or the same; numbers that are none are refused when they come up."""
    path, data = tmp_path / "model.gguf", ModelParts().build()
    path.write_bytes(data)
    with woolly.load_gguf(path, n_threads=1) as model:
        expected = model.forward([1, 4, 5]).tobytes()

    def change() -> None:
        if name == "overwritten":
            with path.open("r+b", buffering=0) as file:
                file.write(b"\xff" * len(data))
        elif name == "replaced":
            (tmp_path / "new").write_bytes(b"GGUF")
            (tmp_path / "new").replace(path)
        else:
            path.unlink()

    for number in range(2, 12):  # the first reads the header
        path.write_bytes(data)
        with pytest.MonkeyPatch.context() as patch:
            at_read(patch, change, number)
            with woolly.load_gguf(path, n_threads=1) as model:
                if name != "overwritten":
                    assert model.forward([1, 4, 5]).tobytes() == expected
                else:
                    with contextlib.suppress(NonFiniteError):
                        assert 0 <= model.generate([1, 4, 5], max_tokens=1).tokens[0] < 12


def test_a_part_of_a_split_model_is_refused(load: Callable[..., woolly.Model]) -> None:
    with pytest.raises(GGUFError, match=r"output_norm\.weight' is missing"):
        load(ModelParts().drop("output_norm.weight"))
    for count in (2, 2**31, 2**32 - 1):
        with pytest.raises(GGUFError, match=r"split\.no|must be named"):
            load(with_key("split.count", UINT32, u32(count)))
