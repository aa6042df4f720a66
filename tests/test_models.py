"""Whole models against the float64 oracle: tiny random ones in many shapes, and the two real ones.

The oracle that quantises activations as the engine does differs from it by float32 rounding alone, which the layers
amplify a little; a rounding that falls the other way in the activations' 16 bits or the cache's halves adds to that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import reference
import strategies as sts
from make_gguf import write_tiny_gemma3, write_tiny_llama
from reference import ReferenceModel

import woolly
from woolly._kernels import available_isas, use_isa
from woolly.errors import GGUFError, UnsupportedFormatError
from woolly.measuring import ModelDistributions, cut_windows, measure
from woolly.model import Model

WRITERS = {"llama": write_tiny_llama, "gemma3": write_tiny_gemma3}
K_SHAPE = {"hidden": 256, "head_dim": 64, "intermediate": 256}
TOKENS = [int(t) for t in np.random.default_rng(0).integers(0, 320, 40)]

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, untied": ("llama", {"tied": False, "embedding_dtype": "bf16"}),
    "llama, some dimensions rotate": ("llama", {"rope_dims": 8, "rope_theta": 500.0}),
    "llama, frequency factors": ("llama", {"freq_factors": True}),
    "llama, one KV head for nine": ("llama", {"n_heads": 9, "n_kv_heads": 1, "head_dim": 16}),
    "llama, a KV head for each": ("llama", {"n_heads": 4, "n_kv_heads": 4}),
    "llama, 30 heads a KV head": ("llama", {"n_heads": 30, "n_kv_heads": 1, "head_dim": 8}),
    "llama, odd sizes": ("llama", {"hidden": 50, "head_dim": 10, "n_heads": 3, "n_kv_heads": 3, "intermediate": 37}),
    "llama, one layer": ("llama", {"n_layers": 1, "vocab": 333, "dtype": "f16"}),
    "gemma3": ("gemma3", {}),
    "gemma3, untied": ("gemma3", {"tied": False}),
    "gemma3, short window": ("gemma3", {"sliding_window": 1, "n_kv_heads": 2, "n_layers": 6}),
    "gemma3, odd sizes": ("gemma3", {"hidden": 45, "head_dim": 18, "n_heads": 5, "intermediate": 19}),
    "gemma3, thirteen layers": ("gemma3", {"n_layers": 13, "n_heads": 2}),
}


def deviation(path: Path, *, cache_dtype: str = "f32", **simulate: bool) -> float:
    """The largest difference between the engine's logits and the oracle's, in standard deviations of the logits."""
    with woolly.load_gguf(path, cache_dtype=cache_dtype, n_threads=2) as model:
        actual = model.forward(TOKENS)
    oracle = ReferenceModel.from_gguf(path, cache_dtype=cache_dtype.replace("f", "float"), **simulate)
    expected = oracle.forward(TOKENS)
    assert (actual.dtype, actual.shape) == (np.float32, expected.shape)
    return float(np.abs(actual - expected).max() / expected.std())


@pytest.mark.parametrize("shape", SHAPES)
def test_tiny_models_of_floats(tmp_path: Path, shape: str) -> None:
    arch, options = SHAPES[shape]
    assert deviation(WRITERS[arch](tmp_path / "tiny.gguf", **options)) < 2e-5


@pytest.mark.parametrize("arch", WRITERS)
@pytest.mark.parametrize("name", sts.FORMATS)
def test_tiny_models_of_every_format(tmp_path: Path, arch: str, name: str) -> None:
    path = WRITERS[arch](tmp_path / "tiny.gguf", dtype=name, **(K_SHAPE if sts.block_shape(name)[0] == 256 else {}))
    assert deviation(path, simulate_activation_quantisation=True) < 2e-3  # a value near a half may be rounded otherwise
    assert deviation(path) < 2e-3  # what 16 bits lose
    assert deviation(path, cache_dtype="f16", simulate_activation_quantisation=True) < 1e-2


@pytest.mark.parametrize("arch", WRITERS)
def test_capture_equals_the_oracles_activations(tmp_path: Path, arch: str) -> None:
    path = WRITERS[arch](tmp_path / "tiny.gguf", n_layers=7)
    oracle: dict[str, np.ndarray] = {}
    ReferenceModel.from_gguf(path).forward(TOKENS, capture=oracle)
    names = {"embd": "embd", "output_norm": "result_norm"}
    for i in range(7):
        same = ("attn_norm", "attn_heads", "ffn_norm", *(("attn_out", "ffn_out") if arch == "gemma3" else ()))
        names |= {f"blk.{i}.{name}": f"blk.{i}.{name}" for name in same}
        names[f"blk.{i}.{'post_ffw_norm' if arch == 'gemma3' else 'ffn_residual'}"] = f"blk.{i}.out"
    with woolly.load_gguf(path, cache_dtype="f32") as model:
        capture: dict[str, np.ndarray | None] = dict.fromkeys(names)
        logits = model.forward(TOKENS, capture=capture)
        assert logits.tobytes() == model.forward(TOKENS).tobytes()
        assert set(names) < set(model.operations)
    for ours, theirs in names.items():
        largest = np.abs(oracle[theirs]).max()
        np.testing.assert_allclose(capture[ours], oracle[theirs], atol=2e-5 * largest, err_msg=ours)


@pytest.mark.parametrize("arch", WRITERS)
def test_missing_misshapen_and_unknown_tensors_are_refused(tmp_path: Path, arch: str) -> None:
    path = WRITERS[arch](tmp_path / "tiny.gguf")
    raw = path.read_bytes()
    for name, to, message in (
        ("blk.0.attn_q.weight", "blk.0.attn_q.weighs", "tensor 'blk.0.attn_q.weight' is missing"),
        ("blk.1.ffn_norm.weight", "blk.9.ffn_norm.weight", "tensor 'blk.1.ffn_norm.weight' is missing"),
    ):
        path.write_bytes(raw.replace(name.encode(), to.encode()))
        with pytest.raises(GGUFError, match=message):
            woolly.load_gguf(path)


def test_tensors_that_have_no_place_are_refused(tmp_path: Path) -> None:
    class WithNorm(gguf.GGUFWriter):
        def write_header_to_file(self, path: Path | None = None) -> None:
            self.add_tensor("blk.0.attn_q_norm.weight", np.ones(16, np.float32))
            super().write_header_to_file(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", WithNorm)
        path = write_tiny_llama(tmp_path / "norm.gguf")
    with pytest.raises(GGUFError, match=r"tensor 'blk.0.attn_q_norm.weight' has no place in this architecture"):
        woolly.load_gguf(path)


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    key = b"llama.feed_forward_length" + np.uint32(4).tobytes()
    raw = path.read_bytes()
    assert key in raw
    path.write_bytes(raw.replace(key + np.uint32(128).tobytes(), key + np.uint32(1 << 23).tobytes()))
    message = r"'blk.0.ffn_gate.weight' at offset \d+ has shape \(128, 64\), the configuration says \(8388608, 64\)"
    with pytest.raises(GGUFError, match=message):
        woolly.load_gguf(path)


def test_a_format_without_kernels_is_refused(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", dtype="q5_0")
    entry = b"blk.0.attn_q.weight" + np.uint32(2).tobytes() + np.uint64([64, 64]).tobytes()
    raw = path.read_bytes()
    assert entry + np.uint32(6).tobytes() in raw
    path.write_bytes(raw.replace(entry + np.uint32(6).tobytes(), entry + np.uint32(40).tobytes()))  # NVFP4
    with pytest.raises(UnsupportedFormatError, match=r"'blk\.0\.attn_q\.weight' is stored as nvfp4, which has no kern"):
        woolly.load_gguf(path)


# The real ones

GPL = Path("/usr/share/common-licenses/GPL-3")
PROMPTS = {
    "smollm2": (
        "The capital of France is",
        "Once upon a time, in a small village by the sea,",
        "def fibonacci(n):\n",
        "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
        "In 1969, Neil Armstrong became the first person to",
    ),
    "gemma3": (
        "The capital of France is",
        "Water boils at a temperature of",
        "<start_of_turn>user\nWrite a haiku about rain.<end_of_turn>\n<start_of_turn>model\n",
    ),
}
# The engine's perplexity after windows 1, 2 and 3 of 512 tokens
GPL_PERPLEXITY = {"smollm2": [16.2612, 17.6832, 16.2881], "gemma3": [12.8699, 13.8063, 13.7367]}


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Model:
    return woolly.load_gguf(smollm2_path, n_ctx=1024, n_threads=2)


@pytest.fixture(scope="module")
def gemma3(gemma3_path: Path) -> Model:
    return woolly.load_gguf(gemma3_path, n_ctx=1024, n_threads=2)


@pytest.fixture(params=["smollm2", "gemma3"])
def real(request: pytest.FixtureRequest) -> tuple[str, Model]:
    request.getfixturevalue(f"{request.param}_path")
    return request.param, request.getfixturevalue(request.param)


def test_smollm2_knows_the_capital_of_france(smollm2: Model) -> None:
    assert smollm2.generate("The capital of France is", max_tokens=8, temperature=0).text.startswith(" Paris")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = smollm2.chat(question, max_tokens=32, temperature=0)
    assert "Paris" in answer.text


def test_gemma3_writes_english_about_the_capital_of_france(gemma3: Model) -> None:
    text = gemma3.generate("The capital of France is", max_tokens=24, temperature=0).text
    assert text.isascii()
    assert sum(word in text.split() for word in ("the", "is", "of", "and", "a", "in", "to")) >= 2, text


@pytest.mark.slow
@pytest.mark.model
def test_perplexity_of_the_gpl(real: tuple[str, Model]) -> None:
    if not GPL.is_file():
        pytest.skip(f"the text is not at {GPL}")
    name, model = real
    running: list[float] = []
    windows = cut_windows(model.tokenizer, GPL.read_text(), 512, 3)
    measure(ModelDistributions(model, windows), windows, on_window=running.append)
    assert running == pytest.approx(GPL_PERPLEXITY[name], rel=1e-3)


@pytest.mark.slow
@pytest.mark.model
def test_greedy_tokens_agree_with_the_oracle(real: tuple[str, Model], request: pytest.FixtureRequest) -> None:
    name, model = real
    oracle = ReferenceModel.from_gguf(request.getfixturevalue(f"{name}_path"))
    for prompt in PROMPTS[name]:
        ids = model.tokenizer.encode(prompt, parse_special=True)
        chosen = model.generate(ids, max_tokens=24, temperature=0).tokens
        logits = oracle.forward(ids + chosen)[len(ids) - 1 : -1]
        assert reference.greedy_disagreements(logits, chosen) == [], prompt


@pytest.mark.slow
@pytest.mark.model
def test_real_logits_are_the_same_however_they_are_computed(
    real: tuple[str, Model], request: pytest.FixtureRequest
) -> None:
    name, model = real
    ids = model.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 10)[:70]
    logits = model.forward(ids)
    expected = logits.tobytes()
    for chunk in (1, 7, 64):
        assert model.session().feed(ids, logits="all", chunk=chunk).tobytes() == expected, chunk
    batch = [(model.engine.new_sequence(), part) for part in (ids[5:40], ids, ids[:3])]
    assert model.engine.step(batch, logits="all")[1].tobytes() == expected
    with woolly.load_gguf(request.getfixturevalue(f"{name}_path"), n_ctx=1024, n_threads=1) as one_thread:
        assert one_thread.forward(ids).tobytes() == expected
    for isa in available_isas():
        with use_isa(isa):
            assert model.forward(ids[:12]).tobytes() == logits[:12].tobytes(), isa
