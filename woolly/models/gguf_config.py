"""Reading the configuration that all architectures share from GGUF metadata, with every value checked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from woolly.config import ExpertConfig, ModelConfig, RopeScaling, yarn_attention_factor
from woolly.errors import GGUFError, UnsupportedModelError
from woolly.metadata import Metadata, show

MAX_LAYERS = 192  # times 21, more operations than a layer has, is what a program holds
MAX_SIZE = 1 << 24  # of a hidden, intermediate or context size
MAX_HEAD_DIM = 1024
MAX_SCALE = 1e6
MAX_EXPERTS = 4096

# Of expert_gating_func; 0 is "as the architecture has it", and 2, a sigmoid, has no kernels
GATINGS = {1: "softmax", 3: "softmax_chosen"}

NORM_EPS = {False: "layer_norm_rms_epsilon", True: "layer_norm_epsilon"}

# Keys that change what some architecture computes, and the values that change nothing: where an architecture does not
# read such a key, the file asks for arithmetic that this version does not know
ARITHMETIC: dict[str, tuple[float, ...]] = {
    "activation_sparsity_scale": (),
    "attention.causal": (1,),
    "attention.clamp_kqv": (0,),
    "attention.key_length_mla": (0,),
    "attention.key_length_swa": (),
    "attention.kv_lora_rank": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.q_lora_rank": (0,),
    "attention.relative_buckets_count": (0,),
    "attention.scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attention.sliding_window_pattern": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attention.value_length_swa": (),
    "attn_logit_softcapping": (0, 50),  # 50, and 30 below, are what some writers give models that have none
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "final_logit_softcapping": (0, 30),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "moe_every_n_layers": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.dimension_count_swa": (),
    "rope.dimension_sections": (0,),
    "rope.freq_base_swa": (),
    "rope.scaling.alpha": (0, 1),
    "swiglu_clamp_exp": (0,),
    "swiglu_clamp_shexp": (0,),
    "swin_norm": (0,),
    "use_parallel_residual": (0,),
}


def read_config(metadata: Metadata, **differences: Any) -> ModelConfig:
    """The configuration under `general.architecture`'s keys; `differences` override what an architecture does its way.

    Raises
    ------
    GGUFError
        A key is missing, has the wrong type, or a value that no model can have.
    UnsupportedModelError
        A key asks for arithmetic that is not implemented.
    """
    arch = metadata.get_str("general.architecture")
    has_layer_norm = differences.get("has_layer_norm", False)
    n_layers = read_int(metadata, f"{arch}.block_count", 1, MAX_LAYERS)
    hidden_size = read_int(metadata, f"{arch}.embedding_length", 1, MAX_SIZE)
    n_heads = read_same(metadata, f"{arch}.attention.head_count", n_layers, 4096)
    n_kv_heads = read_same(metadata, f"{arch}.attention.head_count_kv", n_layers, 4096, n_heads)
    if n_heads % n_kv_heads:
        key, problem = f"{arch}.attention.head_count", f"{n_heads} heads are not a multiple of {n_kv_heads} KV heads"
        raise metadata.error(key, problem)
    key_length = f"{arch}.attention.key_length"
    if key_length not in metadata and hidden_size % n_heads:
        raise metadata.error(f"{arch}.embedding_length", f"{hidden_size} is not a multiple of {n_heads} heads")
    head_dim = read_int(metadata, key_length, 1, MAX_HEAD_DIM, hidden_size // n_heads)
    value_dim = read_int(metadata, f"{arch}.attention.value_length", 1, MAX_HEAD_DIM, head_dim)
    if value_dim != head_dim:
        raise UnsupportedModelError(f"{arch}.attention.value_length: {value_dim} differs from the keys' {head_dim}")
    rope_dim = read_int(metadata, f"{arch}.rope.dimension_count", 2, head_dim, head_dim)
    if rope_dim % 2:
        raise metadata.error(f"{arch}.rope.dimension_count", f"expected an even number, got {rope_dim}")
    n_ctx_train = read_int(metadata, f"{arch}.context_length", 1, MAX_SIZE)
    fields: dict[str, Any] = {
        "architecture": arch,
        "vocab_size": read_vocab_size(metadata, arch),
        "hidden_size": hidden_size,
        "intermediate_size": read_same(metadata, f"{arch}.feed_forward_length", n_layers, MAX_SIZE),
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "n_ctx_train": n_ctx_train,
        "rms_norm_eps": read_positive(metadata, f"{arch}.attention.{NORM_EPS[has_layer_norm]}", 1.0),
        "rope_theta": read_positive(metadata, f"{arch}.rope.freq_base", 1e12, 10000.0),
        "rope_dim": rope_dim,
        "rope_scaling": read_rope_scaling(metadata, arch, n_ctx_train),
        "attention_scale": head_dim**-0.5,
    }
    config = ModelConfig(**{**fields, **differences})
    if config.rope_scaling.kind == "yarn" and config.rope_theta <= 1:
        raise metadata.error(f"{arch}.rope.freq_base", f"YaRN needs a base above 1, got {config.rope_theta}")
    refuse_unread(metadata, arch)
    return config


def read_int(metadata: Metadata, key: str, least: int, most: int, *default: int) -> int:
    """An integer within bounds."""
    value = metadata.get_int(key, *default)
    if not least <= value <= most:
        raise metadata.error(key, f"expected an integer of {least} to {most}, got {value}")
    return value


def read_same(metadata: Metadata, key: str, n_layers: int, most: int, *default: int) -> int:
    """An integer of 1 to `most`, or an array with one for each layer, all the same."""
    if not isinstance(metadata.get(key), np.ndarray):
        return read_int(metadata, key, 1, most, *default)
    values = metadata.get_array(key, "int", length=n_layers)
    if (values != values[0]).any():
        raise UnsupportedModelError(f"{key}: layers that differ are not supported, these are {show(values)}")
    if not 1 <= values[0] <= most:
        raise metadata.error(key, f"expected integers of 1 to {most}, got {values[0]}")
    return int(values[0])


def read_positive(metadata: Metadata, key: str, most: float, *default: float) -> float:
    """A finite number above zero."""
    value = metadata.get_float(key, *default)
    if not (math.isfinite(value) and 0 < value <= most):
        raise metadata.error(key, f"expected a number above 0 and at most {most:g}, got {value}")
    return value


def read_vocab_size(metadata: Metadata, arch: str) -> int:
    """The number of tokens: of the tokenizer's list, which the embedding must fit."""
    if "tokenizer.ggml.tokens" in metadata:
        return len(metadata.get_array("tokenizer.ggml.tokens", "string"))
    return read_int(metadata, f"{arch}.vocab_size", 1, MAX_SIZE)


def read_scale(metadata: Metadata, key: str, default: float = 1.0) -> float:
    """A finite number above zero; the default where the key is missing or 0, which stands for "not set"."""
    return default if metadata.get_float(key, 0.0) == 0 else read_positive(metadata, key, MAX_SCALE)


def read_window(metadata: Metadata, arch: str, default: int = 0) -> int:
    """The sliding window, in keys; 0 where there is none."""
    return read_int(metadata, f"{arch}.attention.sliding_window", 0, MAX_SIZE, default)


def read_period(metadata: Metadata, arch: str, default: int) -> int:
    """Every how many layers one does not slide: a number, or an array that says of each layer whether it does.

    Raises
    ------
    UnsupportedModelError
        The layers of the array have no such period.
    """
    key = f"{arch}.attention.sliding_window_pattern"
    if not isinstance(metadata.get(key), np.ndarray):
        return read_int(metadata, key, 1, MAX_LAYERS, default)
    slides = metadata.get_array(key, "bool", length=read_int(metadata, f"{arch}.block_count", 1, MAX_LAYERS))
    period = int(np.argmin(np.append(slides, False))) + 1
    if (slides != (np.arange(1, len(slides) + 1) % period != 0)).any():
        raise UnsupportedModelError(f"{key}: layers slide without a period, which is not supported: {show(slides)}")
    return period


def read_experts(metadata: Metadata, *, gating: str = "softmax", required: bool = False) -> ExpertConfig | None:
    """The mixture of experts; None where the model has none and needs none.

    gating : what the architecture does where the file does not say.
    """
    arch = metadata.get_str("general.architecture")
    n_experts = read_int(metadata, f"{arch}.expert_count", int(required), MAX_EXPERTS, *(() if required else (0,)))
    if n_experts == 0:
        return None
    func = metadata.get_int(f"{arch}.expert_gating_func", 0)
    if func and func not in GATINGS:
        known = ", ".join(f"{number} ({name})" for number, name in GATINGS.items())
        raise UnsupportedModelError(f"{arch}.expert_gating_func: {func} is not supported; those that are: {known}")
    gating = GATINGS[func] if func else gating
    n_layers = read_int(metadata, f"{arch}.block_count", 1, MAX_LAYERS)
    dense_size = read_same(metadata, f"{arch}.feed_forward_length", n_layers, MAX_SIZE)
    return ExpertConfig(
        n_experts,
        n_used=read_int(metadata, f"{arch}.expert_used_count", 1, n_experts),
        intermediate_size=read_int(metadata, f"{arch}.expert_feed_forward_length", 1, MAX_SIZE, dense_size),
        gating=gating,
        normalise=metadata.get_bool(f"{arch}.expert_weights_norm", gating == "softmax"),
        scale=read_scale(metadata, f"{arch}.expert_weights_scale"),
    )


def read_rope_scaling(metadata: Metadata, arch: str, n_ctx_train: int) -> RopeScaling:
    """How RoPE is scaled. A factor without a type is linear; a type that needs a factor is refused without one."""
    prefix = f"{arch}.rope.scaling."
    legacy = read_scale(metadata, f"{arch}.rope.scale_linear")
    factor = read_scale(metadata, prefix + "factor", legacy)
    kind = metadata.get_str(prefix + "type", "none" if factor == 1 else "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModelError(f"{prefix}type: {kind!r} is not supported; those that are: linear, yarn, longrope")
    if kind in ("linear", "yarn") and f"{prefix}factor" not in metadata and legacy == 1:
        raise GGUFError(f"{prefix}factor: expected a number for scaling of type {kind!r}, the key is missing")
    for name, as_trained in (("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if metadata.get_float(prefix + name, as_trained) != as_trained:
            raise UnsupportedModelError(f"{prefix}{name}: values other than {as_trained:g} are not supported yet")
    attention_factor = read_scale(metadata, prefix + "attn_factor")
    whole = read_scale(metadata, prefix + "yarn_attn_factor")  # config.json's attention_factor; 1 is "not set", too
    usual = yarn_attention_factor(factor)
    if kind == "yarn" and whole != 1 and not math.isclose(whole, usual, rel_tol=1e-5):
        attention_factor *= whole / usual
    return RopeScaling(
        kind,
        factor,
        n_ctx_original=read_int(metadata, prefix + "original_context_length", 1, MAX_SIZE, n_ctx_train),
        attention_factor=attention_factor,
        beta_fast=read_scale(metadata, prefix + "yarn_beta_fast", 32.0),
        beta_slow=read_scale(metadata, prefix + "yarn_beta_slow", 1.0),
    )


def refuse_unread(metadata: Metadata, arch: str) -> None:
    """Refuse keys that ask for other arithmetic and that nothing has read.

    Raises
    ------
    UnsupportedModelError
        Names the first of them and its value.
    """
    for key in metadata:
        name = key.removeprefix(f"{arch}.")
        if name in ARITHMETIC and key not in metadata.asked and not np.isin(metadata[key], ARITHMETIC[name]).all():
            raise UnsupportedModelError(f"{key}: {show(metadata[key])} is not supported for this architecture")
