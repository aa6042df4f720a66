"""Reading a model's configuration: each value that no model can have is refused by its key."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from woolly.config import ExpertConfig, ModelConfig, RopeScaling
from woolly.errors import GGUFError, UnsupportedModelError
from woolly.metadata import Entry, Metadata, StringArray
from woolly.models import ARCHITECTURES, architecture, gguf_config, llama

GOOD: dict[str, Any] = {
    "block_count": 2,
    "context_length": 2048,
    "embedding_length": 64,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "vocab_size": 320,
}


AT = r" \(key at byte 8\)"
MIXTURES = ("qwen3moe", "gpt-oss")  # which are nothing without experts


def spelt(arch: str, key: str) -> str:
    """The key as the architecture has it: LayerNorms have another epsilon."""
    return key.replace("layer_norm_rms_epsilon", "layer_norm_epsilon") if arch == "starcoder2" else key


def metadata(arch: str, **changes: Any) -> Metadata:
    """A valid configuration with some values changed, or taken out where None; `__` stands for a dot."""
    values = {"general.architecture": arch, **{f"{arch}.{spelt(arch, key)}": value for key, value in GOOD.items()}}
    values |= {f"{arch}.expert_count": 8, f"{arch}.expert_used_count": 2} if arch in MIXTURES else {}
    values |= {f"{arch}.{key.replace('__', '.')}": value for key, value in changes.items()}
    return Metadata("x.gguf", {k: Entry(v, type(v).__name__, 8) for k, v in values.items() if v is not None})


def read(arch: str = "llama", **changes: Any) -> ModelConfig:
    return architecture(arch).read_config(metadata(arch, **changes))


def test_llama() -> None:
    assert read(attention__head_count_kv=2, attention__key_length=32, rope__freq_base=5e5) == ModelConfig(
        architecture="llama",
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        n_ctx_train=2048,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_dim=32,
        rope_scaling=RopeScaling(n_ctx_original=2048),
        attention_scale=32**-0.5,
    )


def test_llama_defaults() -> None:
    config = read()
    assert (config.n_kv_heads, config.head_dim, config.rope_dim, config.rope_theta) == (4, 16, 16, 10_000.0)
    assert (config.activation, config.embedding_scale, config.sliding_window) == ("silu", 1.0, 0)
    assert read(rope__dimension_count=8).rope_dim == 8


def test_gemma3() -> None:
    config = read("gemma3", attention__sliding_window=512)
    assert (config.sliding_window, config.rope_theta, config.rope_theta_local) == (512, 1e6, 1e4)
    assert (config.activation, config.embedding_scale) == ("gelu_tanh", 8.0)
    assert read("gemma3").sliding_window == 0


def test_the_tokenizers_list_is_the_vocabulary() -> None:
    values = dict(metadata("llama", vocab_size=None))
    tokens = StringArray(np.frombuffer(b"abc", np.uint8), np.array([0, 1]), np.array([1, 2]))
    values["tokenizer.ggml.tokens"] = tokens
    entries = {key: Entry(value, "array of strings", 8) for key, value in values.items()}
    assert llama.read_config(Metadata("x.gguf", entries)).vocab_size == 2


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().n_layers = 3


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("block_count", (0, -1, 1025, 2**40)),
        ("embedding_length", (0, -4, 2**25)),
        ("feed_forward_length", (0, -1, 2**25)),
        ("context_length", (0, -1, 2**25)),
        ("attention.head_count", (0, -1, 5000)),
        ("attention.head_count_kv", (0, -1, 5000)),
        ("attention.key_length", (0, -1, 1025)),
        ("attention.value_length", (0, -1, 1025)),
        ("rope.dimension_count", (0, 1, -2, 18)),
        ("vocab_size", (0, -1, 2**25)),
    ],
)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_integers_out_of_range_are_refused(arch: str, key: str, bad: tuple[int, ...]) -> None:
    for value in bad:
        with pytest.raises(GGUFError, match=rf"^{arch}\.{key}: expected an integer of \d+ to \d+, got {value}{AT}$"):
            read(arch, **{key.replace(".", "__"): value})


@pytest.mark.parametrize("key", ["attention.layer_norm_rms_epsilon", "rope.freq_base"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e13])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_numbers_out_of_range_are_refused(arch: str, key: str, value: float) -> None:
    key = spelt(arch, key)
    with pytest.raises(GGUFError, match=rf"^{arch}\.{key}: expected a number above 0 and at most .*, got {value}{AT}$"):
        read(arch, **{key.replace(".", "__"): value})


@pytest.mark.parametrize("value", [-1, 2**25])
def test_gemma_windows_out_of_range_are_refused(value: int) -> None:
    message = rf"gemma3\.attention\.sliding_window: expected an integer of 0 to \d+, got {value}"
    with pytest.raises(GGUFError, match=message):
        read("gemma3", attention__sliding_window=value)
    with pytest.raises(GGUFError, match=r"gemma3\.rope\.freq_base_swa: expected a number above 0"):
        read("gemma3", rope__freq_base_swa=0.0)


@pytest.mark.parametrize("key", GOOD)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_missing_keys_are_named(arch: str, key: str) -> None:
    key = spelt(arch, key)
    with pytest.raises(GGUFError, match=rf"metadata has no key '{arch}\.{key}'"):
        read(arch, **{key.replace(".", "__"): None})


@pytest.mark.parametrize("key", GOOD)
@pytest.mark.parametrize("value", ["2", True, [1]])
def test_values_of_other_types_are_refused(key: str, value: object) -> None:
    with pytest.raises(GGUFError, match=rf"key 'llama\.{key}' at byte 8: expected an? (integer|float), got "):
        read(**{key.replace(".", "__"): value})


def test_heads_must_fit() -> None:
    with pytest.raises(GGUFError, match=r"llama\.attention\.head_count: 4 heads are not a multiple of 3 KV heads"):
        read(attention__head_count_kv=3)
    with pytest.raises(GGUFError, match=r"llama\.embedding_length: 64 is not a multiple of 5 heads"):
        read(attention__head_count=5)
    assert read(attention__head_count=5, attention__key_length=16).head_dim == 16
    with pytest.raises(UnsupportedModelError, match=r"llama\.attention\.value_length: 8 differs from the keys' 16"):
        read(attention__value_length=8)
    with pytest.raises(GGUFError, match=r"llama\.rope\.dimension_count: expected an even number, got 7"):
        read(rope__dimension_count=7)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rope_scaling(arch: str) -> None:
    assert read(arch, rope__scaling__type="none", rope__scale_linear=1.0).rope_scaling == RopeScaling("none", 1, 2048)
    assert read(arch, rope__scale_linear=4.0).rope_scaling == RopeScaling("linear", 4, 2048)
    assert read(arch, rope__scaling__factor=8.0).rope_scaling == RopeScaling("linear", 8, 2048)
    given = {"type": "yarn", "factor": 4.0, "original_context_length": 512, "attn_factor": 0.5}
    given |= {"yarn_beta_fast": 30.0, "yarn_beta_slow": 2.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}
    config = read(arch, **{f"rope__scaling__{key}": value for key, value in given.items()})
    assert config.rope_scaling == RopeScaling("yarn", 4, 512, 0.5, 30, 2)


def test_rope_scaling_that_is_incomplete_or_not_implemented_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"rope\.scaling\.type: 'dynamic' is not supported; those that are: l"
    ):
        read(rope__scaling__type="dynamic")
    for kind in ("linear", "yarn"):
        message = rf"rope\.scaling\.factor: expected a number for scaling of type '{kind}', the key is missing"
        with pytest.raises(GGUFError, match=message):
            read(rope__scaling__type=kind)
    for key, value in (("yarn_ext_factor", 0.5), ("yarn_log_multiplier", 0.1)):
        with pytest.raises(UnsupportedModelError, match=rf"{key}: values other than \d are not supported yet"):
            read(rope__scaling__type="yarn", rope__scaling__factor=2.0, **{f"rope__scaling__{key}": value})
    with pytest.raises(GGUFError, match=r"llama\.rope\.freq_base: YaRN needs a base above 1, got 1\.0"):
        read(rope__scaling__type="yarn", rope__scaling__factor=2.0, rope__freq_base=1.0)
    for factor in (-1.0, math.nan, 1e7):
        with pytest.raises(GGUFError, match=r"rope\.scaling\.factor: expected a number above 0 and at most 1e\+06"):
            read(rope__scaling__factor=factor)
    with pytest.raises(GGUFError, match=r"rope\.scaling\.original_context_length: expected an integer of 1 to"):
        read(rope__scaling__original_context_length=0)


@pytest.mark.parametrize(
    ("written", "ours"), [(1.0, 1.0), (1 + 0.1 * math.log(4), 1.0), (0.8, 0.8 / (1 + 0.1 * math.log(4)))]
)
def test_an_attention_factor_stands_for_the_usual_one(written: float, ours: float) -> None:
    given = {"type": "yarn", "factor": 4.0, "yarn_attn_factor": float(np.float32(written))}
    config = read(**{f"rope__scaling__{key}": value for key, value in given.items()})
    assert config.rope_scaling.attention_factor == pytest.approx(ours, rel=1e-7)


@pytest.mark.parametrize("key", ["attention__head_count", "attention__head_count_kv", "feed_forward_length"])
def test_a_number_may_be_given_for_each_layer(key: str) -> None:
    n_layers, value = read().n_layers, {"attention__head_count": 4, "attention__head_count_kv": 2}.get(key, 96)
    assert read(**{key: np.full(n_layers, value, np.int32)}) == read(**{key: value})
    with pytest.raises(UnsupportedModelError, match="layers that differ are not supported"):
        read(**{key: np.append(np.full(n_layers - 1, value, np.int32), np.int32(1))})
    with pytest.raises(GGUFError, match=f"expected an array of {n_layers} integers"):
        read(**{key: np.full(n_layers + 1, value, np.int32)})
    with pytest.raises(GGUFError, match="expected integers of 1 to"):
        read(**{key: np.zeros(n_layers, np.int32)})


def test_layers_that_slide_have_a_period() -> None:
    def period(slides: list[bool] | int) -> int:
        pattern = slides if isinstance(slides, int) else np.array(slides)
        return read("gemma3", block_count=6, attention__sliding_window_pattern=pattern).global_every

    assert period(4) == period([True, True, True, False, True, True]) == 4
    assert period([True] * 5 + [False]) == 6
    assert period([True] * 6) > 6
    assert period([False] * 6) == 1
    for slides in ([True, True, False, True, False, True], [False, True, False, True, False, True]):
        with pytest.raises(UnsupportedModelError, match="layers slide without a period"):
            period(slides)


@pytest.mark.parametrize("key", gguf_config.ARITHMETIC)
def test_keys_of_other_arithmetic_are_refused(key: str) -> None:
    neutral = gguf_config.ARITHMETIC[key]
    for value in neutral:
        assert read("qwen3", **{key: value}) == read("qwen3", **{key: np.array([value])}) == read("qwen3")
    for value in (0 if key == "attention.causal" else 2.5, np.array([0, 3]), "relu"):
        with pytest.raises(UnsupportedModelError, match=rf"qwen3\.{key}: .* is not supported for this architecture"):
            read("qwen3", **{key: value})


def test_models_of_other_shapes_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"rope\.scaling\.finetuned: models without RoPE are not supported"):
        read("granite", rope__scaling__finetuned=False)
    message = f"architecture 'mamba' is not supported; those that are: {', '.join(ARCHITECTURES)}"
    with pytest.raises(UnsupportedModelError, match=message):
        architecture("mamba")


def test_experts() -> None:
    assert read().experts is read(expert_count=0, expert_used_count=0).experts is None
    assert read(expert_count=8, expert_used_count=2).experts == ExpertConfig(8, 2, 128, "softmax", True, 1.0)
    given = {"expert_feed_forward_length": 96, "expert_weights_norm": False, "expert_weights_scale": 2.5}
    assert read("qwen3moe", **given).experts == ExpertConfig(8, 2, 96, "softmax", False, 2.5)
    assert read("gpt-oss").experts == ExpertConfig(8, 2, 128, "softmax_chosen", False, 1.0)
    for func, gating, normalise in ((0, "softmax", True), (1, "softmax", True), (3, "softmax_chosen", False)):
        assert read("qwen3moe", expert_gating_func=func).experts == ExpertConfig(8, 2, 128, gating, normalise)
    assert read("gpt-oss", expert_gating_func=1).experts == ExpertConfig(8, 2, 128, "softmax", True)


def test_experts_that_do_not_fit_are_refused() -> None:
    for key, bad, least, most in (
        ("expert_count", (-1, 5000), 0, 4096),
        ("expert_used_count", (0, -1, 9), 1, 8),
        ("expert_feed_forward_length", (0, 2**25), 1, 2**24),
    ):
        for value in bad:
            message = rf"llama\.{key}: expected an integer of {least} to {most}, got {value}"
            with pytest.raises(GGUFError, match=message):
                read(**{"expert_count": 8, "expert_used_count": 2, key: value})
    with pytest.raises(GGUFError, match=r"expert_weights_scale: expected a number above 0 and at most 1e\+06, got nan"):
        read("qwen3moe", expert_weights_scale=math.nan)
    for arch in MIXTURES:
        with pytest.raises(GGUFError, match=rf"{arch}\.expert_count: expected an integer of 1 to 4096, got 0"):
            read(arch, expert_count=0)
    message = r"expert_gating_func: 2 is not supported; those that are: 1 \(softmax\), 3 \(softmax_chosen\)"
    with pytest.raises(UnsupportedModelError, match=message):
        read("qwen3moe", expert_gating_func=2)
    for key in ("expert_shared_count", "expert_group_count", "leading_dense_block_count", "moe_every_n_layers"):
        with pytest.raises(UnsupportedModelError, match=f"{key}: 3 is not supported for this architecture"):
            read("qwen3moe", **{key: 3})


def test_granite() -> None:
    scales = {"embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0, "attention__scale": 0.0078125}
    config = read("granite", **scales)
    assert (config.embedding_scale, config.residual_scale) == (12, 0.22)
    assert (config.attention_scale, config.logit_scale) == (0.0078125, 0.125)
    assert read("granite").attention_scale == 0.25


@pytest.mark.parametrize(("arch", "n_layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_attention_scale_of_the_27b_models(arch: str, n_layers: int) -> None:
    assert read(arch, attention__key_length=32).attention_scale == 32**-0.5
    assert read(arch, attention__key_length=32, block_count=n_layers).attention_scale == 0.25
