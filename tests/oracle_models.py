"""Tiny random models that Hugging Face `transformers` and GGUF files hold alike: the oracle of the architectures.

A model is a `transformers` configuration; its weights follow from their names, by numpy alone. From there it goes two
ways: into `transformers` (where that is installed), and into a GGUF file, with the names, permutations and metadata
that llama.cpp's converter gives it. Some of the logits that `transformers` computes lie in `data/oracle`, so that the
files can be tested without it. Run as a script, this file makes them:

    python tests/oracle_models.py [NAME ...]

Imports nothing of woolly.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import make_gguf
import numpy as np
import numpy.typing as npt
import oracle_experts
from make_gguf import add_tokenizer

Array = npt.NDArray[np.float32]

GOLDENS = Path(__file__).parent / "data" / "oracle"

VOCAB = 288
N_PROMPT = 100
N_DECODED = 20
TOKENS = [int(t) for t in np.random.default_rng(7).integers(3, VOCAB, N_PROMPT + N_DECODED)]

# What is kept of the logits
POSITIONS = [0, 1, 7, 31, 63, *range(N_PROMPT - 1, N_PROMPT + N_DECODED)]
IDS = list(range(5, VOCAB, 18))


@dataclass(frozen=True)
class OracleModel:
    """One model.

    arch : `general.architecture` of its GGUF file.
    hf_class : what the names of its classes in `transformers` begin with.
    config : what differs from `BASE`, by the names of `config.json`.
    matters : keys of the file (behind the architecture's name), and other values that change the logits; None stands
        for a missing key.
    """

    name: str
    arch: str
    hf_class: str
    config: dict[str, Any] = field(default_factory=dict)
    matters: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return {**BASE, **self.config}[key]

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the configuration."""
        return {**BASE, **self.config}.get(key, default)

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return self.get("head_dim") or self["hidden_size"] // self["num_attention_heads"]

    @property
    def rope(self) -> dict[str, Any]:
        """The rotations of the layers that see everything."""
        rope = self["rope_parameters"]
        return rope.get("full_attention", rope)


BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS_OF_80 = {"hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
HALF = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_KEYS = {"rope.scaling.type": "linear", "rope.scaling.original_context_length": 32}


def longrope(n_rot: int, n_ctx_original: int) -> dict[str, Any]:
    """LongRoPE with factors for so many rotated dimensions."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1 + 0.05 * i for i in range(n_rot // 2)],
        "long_factor": [1 + 0.8 * i for i in range(n_rot // 2)],
        "original_max_position_embeddings": n_ctx_original,
    }


def gemma3_rope(**full: Any) -> dict[str, Any]:
    """Rotations of the two kinds of layers."""
    return {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6, **full},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }


GEMMA = {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 24}
GEMMA2 = {
    **GEMMA,
    "sliding_window": 24,
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 6.0,
    "query_pre_attn_scalar": 24,
}
OF_27B = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 128,
}
GRANITE = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "tie_word_embeddings": True,
}
GRANITE_KEYS = dict.fromkeys(("embedding_scale", "attention.scale", "residual_scale", "logit_scale"))
GEMMA3 = {**GEMMA, "query_pre_attn_scalar": 24, "sliding_window": 24, "num_hidden_layers": 7}

QWEN3MOE = {"head_dim": 40, "num_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 40}
GPT_OSS = {
    "head_dim": 32,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "sliding_window": 30,
    "rope_parameters": {**YARN, "truncate": False},
    "swiglu_limit": 7.0,
}

MODELS = {
    model.name: model
    for model in (
        OracleModel("llama", "llama", "Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        OracleModel("llama-3", "llama", "Llama", {"rope_parameters": LLAMA3}),
        OracleModel(
            "llama-biases-linear",
            "llama",
            "Llama",
            {**HEADS_OF_80, "attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR},
            {"rope.scaling.type": "none", "rope.scaling.factor": 3.0},
        ),
        OracleModel("llama-yarn", "llama", "Llama", {"rope_parameters": YARN}, YARN_KEYS),
        OracleModel(
            "mistral",
            "llama",
            "Mistral",
            {"head_dim": 16, "num_key_value_heads": 1, "sliding_window": 40},
            {"attention.sliding_window": None},
        ),
        OracleModel("qwen2", "qwen2", "Qwen2"),
        OracleModel("qwen2-yarn", "qwen2", "Qwen2", {**HEADS_OF_80, "rope_parameters": YARN}, YARN_KEYS),
        OracleModel("qwen3", "qwen3", "Qwen3", {"head_dim": 40, "tie_word_embeddings": True}),
        OracleModel("qwen3-80", "qwen3", "Qwen3", {**HEADS_OF_80, "head_dim": 80, "tie_word_embeddings": False}),
        OracleModel("gemma", "gemma", "Gemma", {**GEMMA, "num_key_value_heads": 1}),
        OracleModel("gemma-80", "gemma", "Gemma", {**HEADS_OF_80, **GEMMA, "head_dim": 80, "num_key_value_heads": 2}),
        OracleModel(
            "gemma2",
            "gemma2",
            "Gemma2",
            {**GEMMA2, "num_hidden_layers": 3},
            {"attention.sliding_window": None, "attn_logit_softcapping": None, "final_logit_softcapping": None},
        ),
        OracleModel("gemma2-27b", "gemma2", "Gemma2", {**GEMMA2, **OF_27B, "num_hidden_layers": 46}),
        OracleModel(
            "gemma3",
            "gemma3",
            "Gemma3",
            {**GEMMA3, "rope_parameters": gemma3_rope(rope_type="linear", factor=8.0), "num_key_value_heads": 1},
            {"attention.sliding_window": None, "rope.scaling.factor": 4.0},
        ),
        OracleModel(
            "gemma3-27b",
            "gemma3",
            "Gemma3",
            {
                **GEMMA3,
                **OF_27B,
                "num_hidden_layers": 62,
                "rope_parameters": gemma3_rope(),
                "final_logit_softcapping": 9.0,
            },
        ),
        OracleModel(
            "phi3", "phi3", "Phi3", {"sliding_window": 50, "num_key_value_heads": 1}, {"attention.sliding_window": None}
        ),
        OracleModel(
            "phi3-short-factors",
            "phi3",
            "Phi3",
            {
                "hidden_size": 128,
                "max_position_embeddings": 1024,
                "original_max_position_embeddings": 256,
                "rope_parameters": {**longrope(24, 256), "partial_rotary_factor": 0.75},
                "tie_word_embeddings": True,
            },
            {"rope.scaling.attn_factor": None},
        ),
        OracleModel(
            "phi3-long-factors",
            "phi3",
            "Phi3",
            {"original_max_position_embeddings": 64, "rope_parameters": longrope(24, 64)},
            {"rope.scaling.attn_factor": None, "rope.scaling.original_context_length": None},
        ),
        OracleModel("olmo2", "olmo2", "Olmo2"),
        OracleModel("olmo2-80", "olmo2", "Olmo2", HEADS_OF_80),
        OracleModel(
            "olmo3",
            "olmo2",
            "Olmo3",
            {
                "num_hidden_layers": 5,
                "sliding_window": 30,
                "rope_parameters": {"full_attention": YARN, "sliding_attention": BASE["rope_parameters"]},
            },
            {
                "attention.sliding_window": None,
                "attention.sliding_window_pattern": 2,
                "rope.freq_base_swa": 500.0,
                "rope.scaling.yarn_attn_factor": 0.9,
                **YARN_KEYS,
            },
        ),
        OracleModel("granite", "granite", "Granite", GRANITE, GRANITE_KEYS),
        OracleModel("granite-biases", "granite", "Granite", {**GRANITE, **HEADS_OF_80, "attention_bias": True}),
        OracleModel("smollm3", "smollm3", "SmolLM3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
        OracleModel(
            "smollm3-80", "smollm3", "SmolLM3", {**HEADS_OF_80, "num_hidden_layers": 4, "tie_word_embeddings": False}
        ),
        OracleModel(
            "starcoder2",
            "starcoder2",
            "Starcoder2",
            {"sliding_window": 45, "norm_epsilon": 1e-5, "use_bias": True},
            {"attention.sliding_window": None},
        ),
        OracleModel(
            "starcoder2-80", "starcoder2", "Starcoder2", {**HEADS_OF_80, "norm_epsilon": 1e-5, "sliding_window": None}
        ),
        OracleModel(
            "mixtral", "llama", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, {"expert_used_count": 3}
        ),
        OracleModel(
            "qwen3moe",
            "qwen3moe",
            "Qwen3Moe",
            {**QWEN3MOE, "norm_topk_prob": True},
            {"expert_used_count": 3, "expert_weights_norm": False, "expert_weights_scale": 2.0},
        ),
        OracleModel(
            "mixtral-best",
            "llama",
            "Mixtral",
            {**HEADS_OF_80, "num_local_experts": 5, "num_experts_per_tok": 1, "sliding_window": 40},
        ),
        OracleModel("qwen3moe-80", "qwen3moe", "Qwen3Moe", {**HEADS_OF_80, **QWEN3MOE, "norm_topk_prob": False}),
        OracleModel(
            "gpt-oss-80",
            "gpt-oss",
            "GptOss",
            {**HEADS_OF_80, **GPT_OSS, "head_dim": 80, "num_local_experts": 3, "num_experts_per_tok": 3},
        ),
        OracleModel(
            "gpt-oss",
            "gpt-oss",
            "GptOss",
            GPT_OSS,
            {"attention.sliding_window": None, **YARN_KEYS},
        ),
        OracleModel("ernie4_5", "ernie4_5", "Ernie4_5", {"head_dim": 24, "tie_word_embeddings": True}),
        OracleModel(
            "ernie4_5-80",
            "ernie4_5",
            "Ernie4_5",
            {**HEADS_OF_80, "head_dim": 80, "use_bias": True, "tie_word_embeddings": False},
        ),
        OracleModel("seed_oss", "seed_oss", "SeedOss", {"head_dim": 40}),
        OracleModel("seed_oss-80", "seed_oss", "SeedOss", {**HEADS_OF_80, "head_dim": 80}),
        OracleModel("glm4", "glm4", "Glm4", {"head_dim": 24, "rope_parameters": HALF}, {"rope.dimension_count": None}),
        OracleModel("glm4-80", "glm4", "Glm4", {**HEADS_OF_80, "head_dim": 80, "rope_parameters": HALF}),
    )
}

PERMUTED = ("llama", "granite", "smollm3")  # RoPE pairs adjacent dimensions in their files
SANDWICHED = ("gemma2", "gemma3")

# The tensors of a layer, in `transformers` and in GGUF files
TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.c_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_mlp_layernorm": "post_ffw_norm",
}


# Weights


def layer_shapes(model: OracleModel) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors by their names in `transformers`, without the layer's prefix."""
    hidden, wide, dim = model["hidden_size"], model["intermediate_size"], model.head_dim
    q, kv = model["num_attention_heads"] * dim, model["num_key_value_heads"] * dim
    parts = {"q": q, "k": kv, "v": kv}
    matrices: dict[str, tuple[int, ...]] = {f"self_attn.{i}_proj": (n, hidden) for i, n in parts.items()}
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    matrices |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
    if model.arch == "phi3":
        matrices = {"self_attn.qkv_proj": (q + 2 * kv, hidden), "mlp.gate_up_proj": (2 * wide, hidden)}
        matrices["mlp.down_proj"] = (hidden, wide)
    elif model.arch == "starcoder2":
        matrices = {name: shape for name, shape in matrices.items() if "attn" in name}
        matrices |= {"mlp.c_fc": (wide, hidden), "mlp.c_proj": (hidden, wide)}
    elif model.arch == "glm4":
        matrices = {name: shape for name, shape in matrices.items() if "attn" in name}
        matrices |= {"mlp.gate_up_proj": (2 * wide, hidden), "mlp.down_proj": (hidden, wide)}
        norms |= {"post_self_attn_layernorm": hidden, "post_mlp_layernorm": hidden}
    elif model.arch in SANDWICHED:
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    elif model.arch == "olmo2":
        norms = {"post_attention_layernorm": hidden, "post_feedforward_layernorm": hidden}
        norms |= {"self_attn.q_norm": q, "self_attn.k_norm": kv}
    if model.arch in ("qwen3", "qwen3moe", "gemma3"):
        norms |= {"self_attn.q_norm": dim, "self_attn.k_norm": dim}
    if oracle_experts.n_experts(model):
        matrices = {name: shape for name, shape in matrices.items() if "attn" in name}
    matrices["self_attn.o_proj"] = (hidden, q)
    shapes = {f"{name}.weight": shape for name, shape in matrices.items()}
    shapes |= {f"{name}.weight": (n,) for name, n in norms.items()}
    biased = [name for name in matrices if has_bias(model, name)]
    biased += list(norms) if model.arch == "starcoder2" else []
    shapes |= {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in biased}
    return shapes | (oracle_experts.shapes(model) if oracle_experts.n_experts(model) else {})


def has_bias(model: OracleModel, name: str) -> bool:
    """Whether a matrix of a layer has a bias."""
    if model.arch in ("qwen2", "seed_oss", "glm4"):
        return name[-6:] in ("q_proj", "k_proj", "v_proj")
    return (
        model.arch in ("starcoder2", "gpt-oss")
        or model.get("use_bias", False)
        or bool(model.get("attention_bias" if "attn" in name else "mlp_bias"))
    )


def hf_weights(model: OracleModel) -> dict[str, Array]:
    """The state dict of the model in `transformers`."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, model["hidden_size"])}
    for layer in range(model["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(model).items()}
    shapes["model.norm.weight"] = (model["hidden_size"],)
    if model.arch == "starcoder2":
        shapes["model.norm.bias"] = (model["hidden_size"],)
    if not model["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, model["hidden_size"])
    return {name: random_tensor(model, name, shape) for name, shape in shapes.items()}


def random_tensor(model: OracleModel, name: str, shape: tuple[int, ...]) -> Array:
    """Normal values that follow from the names: matrices keep the variance of their input, norms are near 1."""
    rng = np.random.default_rng(zlib.crc32(f"{model.name} {name}".encode()))
    values = rng.standard_normal(shape)
    if name.endswith("bias"):
        values *= 0.3
    elif len(shape) == 1:
        values = 0.2 * values + (0 if model.arch.startswith("gemma") else 1)
    elif "embed_tokens" not in name:
        values *= oracle_experts.fan_in(model, name, shape) ** -0.5
    return values.astype(np.float32)


# The GGUF file


def write_gguf(
    model: OracleModel, path: str | Path, *, changes: dict[str, Any] | None = None, fuses_qkv: bool = False
) -> Path:
    """Write the model as llama.cpp's converter would, but for keys whose values are others, or None: missing."""
    writer = gguf.GGUFWriter(path, model.arch)
    for key, value in {**metadata(model), **(changes or {})}.items():
        if value is not None:
            adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
            add = adders.get(type(value), writer.add_array)
            add(f"{model.arch}.{key}", value)
    add_tokenizer(writer, VOCAB)
    written: dict[str, Array] = {}
    for name, values in hf_weights(model).items():
        tensors = oracle_experts.gguf_tensors(model, name, values)
        written |= tensors or {gguf_name(model, name): gguf_values(model, name, values)}
    for name in [name for name in written if fuses_qkv and ".attn_q." in name]:
        parts = [written.pop(name.replace("attn_q", f"attn_{i}")) for i in "qkv"]
        written[name.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
    for name, values in written.items():
        writer.add_tensor(name, values)
    for name, factors in frequency_factors(model).items():
        writer.add_tensor(f"{name}.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def write_tiny(arch: str, path: str | Path, **options: Any) -> Path:
    """Write a tiny model of an architecture: make_gguf.py's, which takes options, or else the first one here in F32."""
    writer = getattr(make_gguf, f"write_tiny_{arch}", None)
    if writer is not None:
        known = inspect.signature(writer).parameters
        return writer(path, **{name: value for name, value in options.items() if name in known})
    return write_gguf(next(model for model in MODELS.values() if model.arch == arch), path)


def metadata(model: OracleModel) -> dict[str, Any]:
    """Keys behind the architecture's name, and their values."""
    eps = "norm_epsilon" if model.arch == "starcoder2" else "rms_norm_eps"
    values: dict[str, Any] = {
        "block_count": model["num_hidden_layers"],
        "context_length": model["max_position_embeddings"],
        "embedding_length": model["hidden_size"],
        "feed_forward_length": model["intermediate_size"],
        "attention.head_count": model["num_attention_heads"],
        "attention.head_count_kv": model["num_key_value_heads"],
        f"attention.layer_norm_{'epsilon' if model.arch == 'starcoder2' else 'rms_epsilon'}": model[eps],
        "rope.freq_base": model.rope["rope_theta"],
    }
    if model.get("head_dim"):
        values |= {"attention.key_length": model.head_dim, "attention.value_length": model.head_dim}
    if model.get("sliding_window"):
        values["attention.sliding_window"] = model["sliding_window"]
    if model.hf_class == "Olmo3":
        values["attention.sliding_window_pattern"] = [i % 4 != 3 for i in range(model["num_hidden_layers"])]
        values["rope.freq_base_swa"] = model["rope_parameters"]["sliding_attention"]["rope_theta"]
        values["rope.scaling.yarn_attn_factor"] = 0.1 * math.log(model.rope["factor"]) + 1
    if model.arch == "granite":  # as of dense models of Granite 4
        values["attention.head_count_kv"] = [model["num_key_value_heads"]] * model["num_hidden_layers"]
        values |= {"expert_count": 0, "expert_shared_feed_forward_length": model["intermediate_size"]}
    if model.arch in (*PERMUTED, "phi3", "glm4"):
        values["rope.dimension_count"] = int(model.head_dim * model.rope.get("partial_rotary_factor", 1.0))
    for key, name in {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "embedding_multiplier": "embedding_scale",
        "attention_multiplier": "attention.scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }.items():
        if model.get(key) is not None:
            values[name] = model[key]
    return values | rope_scaling(model) | (oracle_experts.keys(model) if oracle_experts.n_experts(model) else {})


def rope_scaling(model: OracleModel) -> dict[str, int | float | str]:
    """Keys of scaled RoPE; Llama 3's is in its frequency factors."""
    rope, kind = model.rope, model.rope["rope_type"]
    values: dict[str, int | float | str] = {}
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind in ("yarn", "longrope"):
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if kind == "longrope":
        n_ctx = rope["original_max_position_embeddings"]
        ratio = model["max_position_embeddings"] / n_ctx
        values["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(ratio) / math.log(n_ctx))
    return values


def frequency_factors(model: OracleModel) -> dict[str, list[float]]:
    """Tensors that divide the frequencies."""
    rope = model.rope
    if rope["rope_type"] == "longrope":
        return {f"rope_factors_{kind}": rope[f"{kind}_factor"] for kind in ("long", "short")}
    if rope["rope_type"] != "llama3":
        return {}
    low, high, n_ctx = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for i in range(model.head_dim // 2):
        turns = n_ctx * rope["rope_theta"] ** (-2 * i / model.head_dim) / (2 * math.pi)
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs": factors}


def gguf_name(model: OracleModel, name: str) -> str:
    """The tensor's name in GGUF files."""
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")):
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    layer, tensor, suffix = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name).groups()
    has_post_norm = tensor == "post_attention_layernorm" and model.arch in (*SANDWICHED, "olmo2", "gpt-oss", "seed_oss")
    return f"blk.{layer}.{'post_attention_norm' if has_post_norm else TENSORS[tensor]}.{suffix}"


def gguf_values(model: OracleModel, name: str, values: Array) -> Array:
    """The tensor's values in GGUF files: q and k permuted for adjacent pairs, 1 added to Gemma's norms."""
    if model.arch.startswith("gemma") and name.endswith("norm.weight"):
        return values + np.float32(1)
    if model.arch in PERMUTED and re.search(r"\.[qk]_proj\.", name):
        halves = values.reshape(-1, 2, model.head_dim // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
    return values


# transformers


def transformers_logits(model: OracleModel) -> Array:
    """Logits (n_tokens, vocab) of TOKENS: a prompt at once, then token by token with the cache."""
    import torch
    import transformers

    classes = {"Gemma3": "Gemma3Text"}
    make_config = getattr(transformers, f"{classes.get(model.hf_class, model.hf_class)}Config")
    config = make_config(**{**BASE, **model.config}, attn_implementation="eager", **oracle_experts.options(model))
    network = getattr(transformers, f"{model.hf_class}ForCausalLM")(config).float().eval()
    state = {name: torch.from_numpy(values) for name, values in hf_weights(model).items()}
    if model["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    network.load_state_dict(state, strict=True)
    with torch.no_grad():
        answer = network(torch.tensor([TOKENS[:N_PROMPT]]), use_cache=True)
        logits = [answer.logits[0]]
        for token in TOKENS[N_PROMPT:]:
            answer = network(torch.tensor([[token]]), past_key_values=answer.past_key_values, use_cache=True)
            logits.append(answer.logits[0])
    return torch.cat(logits).numpy()


def golden_path(name: str) -> Path:
    """Where a model's logits lie: float32 (POSITIONS, IDS)."""
    return GOLDENS / f"{name}.npy"


if __name__ == "__main__":
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for chosen in sys.argv[1:] or MODELS:
        np.save(golden_path(chosen), transformers_logits(MODELS[chosen])[np.ix_(POSITIONS, IDS)])
