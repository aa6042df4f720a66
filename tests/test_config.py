"""Reading a model's configuration: each value that no model can have is refused by its key."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from woolly.config import ModelConfig
from woolly.errors import GGUFError, UnsupportedModelError
from woolly.metadata import Entry, Metadata, StringArray
from woolly.models import ARCHITECTURES, architecture, gemma3, llama

GOOD: dict[str, Any] = {
    "block_count": 2,
    "context_length": 2048,
    "embedding_length": 64,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "vocab_size": 320,
}


def metadata(arch: str, **changes: Any) -> Metadata:
    """A valid configuration with some values changed, or taken out where None; `__` stands for a dot."""
    values = {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in GOOD.items()}}
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
        with pytest.raises(GGUFError, match=rf"^{arch}\.{key}: expected an integer of \d+ to \d+, got {value}$"):
            read(arch, **{key.replace(".", "__"): value})


@pytest.mark.parametrize("key", ["attention.layer_norm_rms_epsilon", "rope.freq_base"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e13])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_numbers_out_of_range_are_refused(arch: str, key: str, value: float) -> None:
    with pytest.raises(GGUFError, match=rf"^{arch}\.{key}: expected a number above 0 and at most .*, got {value}$"):
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
def test_arithmetic_that_is_not_implemented_is_refused(arch: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"{arch}\.rope\.scaling\.type: 'yarn' is not supported yet"):
        read(arch, rope__scaling__type="yarn")
    with pytest.raises(UnsupportedModelError, match=rf"{arch}\.rope\.scale_linear: scaled RoPE is not supported yet"):
        read(arch, rope__scale_linear=4.0)
    assert read(arch, rope__scaling__type="none", rope__scale_linear=1.0)


def test_models_of_other_shapes_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"llama\.expert_count: mixtures of experts are not supported yet"):
        llama.read_config(metadata("llama", expert_count=8))
    with pytest.raises(UnsupportedModelError, match="the 27B model's attention scale is not supported yet"):
        gemma3.read_config(metadata("gemma3", block_count=62))
    with pytest.raises(
        UnsupportedModelError, match="architecture 'mamba' is not supported; those that are: llama, gemma3"
    ):
        architecture("mamba")
