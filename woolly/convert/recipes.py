"""What each architecture of transformers is in GGUF's words: names of tensors, changes to them, and keys.

Owns one `Recipe` for each name under "architectures" in config.json. The keys and names are those of llama.cpp, whose
files other engines read. A setting that GGUF files cannot express is refused: it would be a different model.

To add an architecture, add a row to `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from woolly.convert import mxfp4
from woolly.convert.config_json import JsonObject
from woolly.convert.rope import rope_keys, rope_parameters
from woolly.convert.tensors import PLUS_ONE, STACK, Made, Part, Transform, interleave_halves
from woolly.errors import UnsupportedModelError

Keys = dict[str, Any]
# What is above no model has, and some of it would take long to refuse otherwise.
_LIMITS = {"num_hidden_layers": 256, "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 1024}
EXPERT = "{e}"  # stands for the expert's number in the name of a tensor


@dataclass(frozen=True)
class Recipe:
    """How checkpoints of an architecture become GGUF keys and tensors.

    Attributes
    ----------
    arch : str
        `general.architecture`.
    layer : mapping of str to str
        Tensors of a layer, without `.weight` or `.bias`: Hugging Face's name to GGUF's. One with {e} is an expert's.
    outer : mapping of str to str
        The other tensors, likewise.
    keys : callable
        More keys, without the architecture's prefix; it raises for what it cannot express.
    transforms : callable
        Changes by GGUF name, for a configuration.
    defaults : mapping
        What a configuration means where it is silent.
    activations : tuple of str
        The activation functions that the architecture's GGUF files imply.
    is_tied : bool
        Whether the head is the embedding where config.json is silent.
    rotates_part : bool
        Whether RoPE may rotate less than whole heads: elsewhere transformers does not heed partial_rotary_factor.
    make_more : callable, optional
        Makes tensors that are no one-to-one matter, and takes what it used out of the layer's tensors.
    """

    arch: str
    layer: Mapping[str, str]
    outer: Mapping[str, str] = field(default_factory=lambda: OUTER)
    keys: Callable[[JsonObject], Keys] = lambda config: {}
    transforms: Callable[[JsonObject], Mapping[str, Transform]] = lambda config: {}
    defaults: Mapping[str, Any] = field(default_factory=dict)
    activations: tuple[str, ...] = ("silu",)
    is_tied: bool = False
    rotates_part: bool = False
    make_more: Callable[[str, dict[str, Part]], Iterable[Made]] | None = None


OUTER = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_QK_NORM = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_FFN_NORM = {"post_attention_layernorm": "ffn_norm"}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_LLAMA = _ATTENTION | _FFN_NORM | _MLP
_POST_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_GEMMA2 = _ATTENTION | _POST_NORMS | {"pre_feedforward_layernorm": "ffn_norm"} | _MLP
_PHI3 = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
} | _FFN_NORM
_GLM4 = _ATTENTION | {
    "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_mlp_layernorm": "post_ffw_norm",
}
_MIXTRAL_EXPERTS = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.{e}.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.{e}.w2": "ffn_down_exps",
    "block_sparse_moe.experts.{e}.w3": "ffn_up_exps",
}
_QWEN_EXPERTS = {"mlp.gate": "ffn_gate_inp"} | {
    f"mlp.experts.{{e}}.{name}_proj": f"ffn_{name}_exps" for name in ("gate", "up", "down")
}
_OLMO2 = {key: name for key, name in (_ATTENTION | _QK_NORM | _POST_NORMS | _MLP).items() if name != "attn_norm"}
_GPT_OSS = _ATTENTION | {
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.sinks": "attn_sinks",
    "mlp.router": "ffn_gate_inp",
}


# --- sizes and constants ---


def head_dim(config: JsonObject) -> int:
    """Dimensions of a head: hidden_size / heads where nothing else is said."""
    return config.get_int("head_dim", config.get_int("hidden_size") // config.get_int("num_attention_heads"))


def n_kv_heads(config: JsonObject) -> int:
    """KV heads: as many as heads where nothing else is said."""
    return config.get_int("num_key_value_heads", config.get_int("num_attention_heads"))


def common_keys(config: JsonObject, recipe: Recipe) -> tuple[Keys, dict[str, Any]]:
    """The keys that all architectures share and the recipe's own, with their prefix; and tensors that RoPE takes."""
    check_activation(config, recipe)
    for key, most in _LIMITS.items():
        if key in config and not 1 <= config.get_int(key) <= most:
            config.refuse(key, f"expected 1 to {most}")
    share = rope_parameters(config).get_float("partial_rotary_factor", _partial(config))
    if share != 1 and not recipe.rotates_part:
        refuse(config, "partial_rotary_factor", "1, as other values are not heeded for this architecture")
    n_rot = int(head_dim(config) * share)
    if not 2 <= n_rot <= min(head_dim(config), _LIMITS["head_dim"]):
        config.refuse(
            "partial_rotary_factor", f"expected 2 to {head_dim(config)} dimensions to rotate, these are {n_rot}"
        )
    layer_type = "full_attention" if "layer_types" in config else None
    parameters = rope_parameters(config, layer_type)
    rope, tensors = rope_keys(config, parameters, n_rot, truncates=recipe.arch != "gpt-oss")
    keys: Keys = {
        "block_count": config.get_int("num_hidden_layers"),
        "context_length": config.get_int("max_position_embeddings"),
        "embedding_length": config.get_int("hidden_size"),
        "feed_forward_length": config.get_int("intermediate_size"),
        "attention.head_count": config.get_int("num_attention_heads"),
        "attention.head_count_kv": n_kv_heads(config),
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "rope.dimension_count": n_rot,
        "vocab_size": config.get_int("vocab_size"),
    }
    if "rms_norm_eps" in config:
        keys["attention.layer_norm_rms_epsilon"] = config.get_float("rms_norm_eps")
    keys |= rope | recipe.keys(config)
    return {f"{recipe.arch}.{key}": value for key, value in keys.items()}, tensors


def _partial(config: JsonObject) -> float:
    return config.get_float("partial_rotary_factor", 1.0)


def check_activation(config: JsonObject, recipe: Recipe) -> None:
    """Refuse an activation function that the architecture's GGUF files do not mean."""
    key = "hidden_activation" if "hidden_activation" in config else "hidden_act"
    if config.get_str(key, recipe.activations[0]) not in recipe.activations:
        refuse(config, key, " or ".join(map(repr, recipe.activations)))


def refuse(config: JsonObject, key: str, supported: str) -> None:
    """Raise UnsupportedModelError for a setting that GGUF files of the architecture cannot express."""
    raise UnsupportedModelError(
        f"{config.path}: {config.prefix}{key} is {config.fields.get(key)!r}, what is supported is {supported}"
    )


def _check_layer_types(config: JsonObject, is_full: Callable[[int], bool]) -> None:
    expected = [
        "full_attention" if is_full(i) else "sliding_attention" for i in range(config.get_int("num_hidden_layers"))
    ]
    if "layer_types" in config and config.get_list("layer_types") != expected:
        refuse(config, "layer_types", "the pattern that the architecture was published with")


def _no_window(config: JsonObject) -> Keys:
    n_full = config.get_int("max_window_layers", 0)  # the first of them do not slide
    if config.get_bool("use_sliding_window", False) and n_full < config.get_int("num_hidden_layers"):
        refuse(config, "use_sliding_window", "false")
    return {}


def _window(config: JsonObject) -> Keys:
    return {"attention.sliding_window": config.get_int("sliding_window")} if "sliding_window" in config else {}


def _phi3_keys(config: JsonObject) -> Keys:
    # 0 tells Phi 4, which has no window, from files that do not say.
    return {"attention.sliding_window": config.get_int("sliding_window", 0)}


def _gemma2_keys(config: JsonObject) -> Keys:
    _check_layer_types(config, lambda i: i % 2 == 1)
    _check_attention_scale(config, layers_of_27b=46)
    return {
        "attention.sliding_window": config.get_int("sliding_window"),
        "attn_logit_softcapping": config.get_float("attn_logit_softcapping"),
        "final_logit_softcapping": config.get_float("final_logit_softcapping"),
    }


def _gemma3_keys(config: JsonObject) -> Keys:
    every = config.get_int("sliding_window_pattern", 6)
    if every == 0:
        config.refuse("sliding_window_pattern", "expected at least 1")
    _check_layer_types(config, lambda i: i % every == every - 1)
    _check_attention_scale(config, layers_of_27b=62)
    if "attn_logit_softcapping" in config:
        refuse(config, "attn_logit_softcapping", "null")
    if config.get_bool("use_bidirectional_attention", False):
        refuse(config, "use_bidirectional_attention", "false")
    keys: Keys = {"attention.sliding_window": config.get_int("sliding_window")}
    if every != 6:
        keys["attention.sliding_window_pattern"] = every
    if "final_logit_softcapping" in config:
        keys["final_logit_softcapping"] = config.get_float("final_logit_softcapping")
    local = _local_rope_theta(config, config.get_float("rope_local_base_freq", 10000.0))
    return keys if local == 10000.0 else keys | {"rope.freq_base_swa": local}


def _local_rope_theta(config: JsonObject, default: float) -> float:
    """RoPE's base on layers that slide, which have no scaling."""
    if "rope_parameters" not in config:
        return default
    parameters = rope_parameters(config, "sliding_attention")
    if parameters.get_str("rope_type", "default") != "default":
        refuse(config, "rope_parameters", "RoPE without scaling on layers that slide")
    return parameters.get_float("rope_theta")


def _olmo3_keys(config: JsonObject) -> Keys:
    _check_layer_types(config, lambda i: i % 4 == 3)
    theta = rope_parameters(config, "full_attention").get_float("rope_theta", 10000.0)
    local = _local_rope_theta(config, theta)
    keys: Keys = {"attention.sliding_window": config.get_int("sliding_window")}
    return keys if local == theta else keys | {"rope.freq_base_swa": local}


def _check_attention_scale(config: JsonObject, *, layers_of_27b: int) -> None:
    """Gemma's GGUF files do not hold query_pre_attn_scalar: engines know it by the number of layers."""
    usual = head_dim(config)
    if config.get_int("num_hidden_layers") == layers_of_27b:
        usual = config.get_int("hidden_size") // config.get_int("num_attention_heads")
    if config.get_float("query_pre_attn_scalar", float(usual)) != usual:
        refuse(config, "query_pre_attn_scalar", str(usual))


def _granite_keys(config: JsonObject) -> Keys:
    return {
        "attention.scale": config.get_float("attention_multiplier"),
        "embedding_scale": config.get_float("embedding_multiplier"),
        "residual_scale": config.get_float("residual_multiplier"),
        "logit_scale": config.get_float("logits_scaling"),
    }


def _smollm3_keys(config: JsonObject) -> Keys:
    n_layers = config.get_int("num_hidden_layers")
    has_rope = [int((i + 1) % 4 != 0) for i in range(n_layers)]
    if config.get_list("no_rope_layers", has_rope) != has_rope:
        refuse(config, "no_rope_layers", "RoPE on all layers but every fourth")
    return _no_window(config)


def _starcoder2_keys(config: JsonObject) -> Keys:
    return _window(config) | {"attention.layer_norm_epsilon": config.get_float("norm_epsilon")}


def _expert_keys(config: JsonObject) -> Keys:
    n_experts = config.get_int("num_local_experts", None) or config.get_int("num_experts")
    return {"expert_count": n_experts, "expert_used_count": config.get_int("num_experts_per_tok")}


def _qwen3moe_keys(config: JsonObject) -> Keys:
    if not config.get_bool("norm_topk_prob", False):
        refuse(config, "norm_topk_prob", "true")
    if config.get_int("decoder_sparse_step", 1) != 1:
        refuse(config, "decoder_sparse_step", "1, experts in every layer")
    if config.get_list("mlp_only_layers", []):
        refuse(config, "mlp_only_layers", "none, experts in every layer")
    expert_size = config.get_int("moe_intermediate_size")
    return _no_window(config) | _expert_keys(config) | {"expert_feed_forward_length": expert_size}


def _gpt_oss_keys(config: JsonObject) -> Keys:
    _check_layer_types(config, lambda i: i % 2 == 1)
    for key, usual in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        if config.get_float(key, usual) != usual:
            refuse(config, key, str(usual))
    window = {"attention.sliding_window": config.get_int("sliding_window")}
    return window | _expert_keys(config) | {"expert_feed_forward_length": config.get_int("intermediate_size")}


# --- changes to tensors ---


def _paired_heads(config: JsonObject) -> Mapping[str, Transform]:
    return {
        "attn_q": interleave_halves(config.get_int("num_attention_heads")),
        "attn_k": interleave_halves(n_kv_heads(config)),
    }


def _stacked(config: JsonObject) -> Mapping[str, Transform]:
    return dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), STACK)


_GEMMA_NORMS = (
    "attn_norm",
    "attn_q_norm",
    "attn_k_norm",
    "ffn_norm",
    "post_attention_norm",
    "post_ffw_norm",
    "output_norm",
)


def _norms_plus_one(config: JsonObject) -> Mapping[str, Transform]:
    return dict.fromkeys(_GEMMA_NORMS, PLUS_ONE)


# --- the table ---

_GEMMA = Recipe(
    "gemma",
    _LLAMA,
    transforms=_norms_plus_one,
    # "gelu" is what the first files said, and transformers has read it as the approximation ever since.
    activations=("gelu_pytorch_tanh", "gelu"),
    is_tied=True,
)
_GEMMA3_DEFAULTS = {  # the published files of the larger sizes leave out what transformers has as default
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_LLAMA_RECIPE = Recipe("llama", _LLAMA, transforms=_paired_heads)

RECIPES: dict[str, Recipe] = {
    "LlamaForCausalLM": _LLAMA_RECIPE,
    "MistralForCausalLM": replace(_LLAMA_RECIPE, keys=_window),
    "MixtralForCausalLM": Recipe(
        "llama",
        _ATTENTION | _FFN_NORM | _MIXTRAL_EXPERTS,
        keys=lambda config: _window(config) | _expert_keys(config),
        transforms=lambda config: {**_paired_heads(config), **_stacked(config)},
    ),
    "Qwen2ForCausalLM": Recipe("qwen2", _LLAMA, keys=_no_window),
    "Qwen3ForCausalLM": Recipe("qwen3", _LLAMA | _QK_NORM, keys=_no_window),
    "Qwen3MoeForCausalLM": Recipe(
        "qwen3moe",
        _ATTENTION | _QK_NORM | _FFN_NORM | _QWEN_EXPERTS,
        keys=_qwen3moe_keys,
        transforms=_stacked,
    ),
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": replace(_GEMMA, arch="gemma2", layer=_GEMMA2, keys=_gemma2_keys),
    "Gemma3ForCausalLM": replace(
        _GEMMA, arch="gemma3", layer=_GEMMA2 | _QK_NORM, keys=_gemma3_keys, defaults=_GEMMA3_DEFAULTS
    ),
    "Phi3ForCausalLM": Recipe("phi3", _PHI3, keys=_phi3_keys, rotates_part=True),
    "Olmo2ForCausalLM": Recipe("olmo2", _OLMO2),
    "Olmo3ForCausalLM": Recipe("olmo2", _OLMO2, keys=_olmo3_keys),
    "GraniteForCausalLM": Recipe("granite", _LLAMA, keys=_granite_keys, transforms=_paired_heads),
    "SmolLM3ForCausalLM": Recipe("smollm3", _LLAMA, keys=_smollm3_keys, transforms=_paired_heads),
    "Starcoder2ForCausalLM": Recipe(
        "starcoder2",
        _ATTENTION | _FFN_NORM | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
        keys=_starcoder2_keys,
        activations=("gelu_pytorch_tanh",),
        is_tied=True,
    ),
    "SeedOssForCausalLM": Recipe("seed_oss", _ATTENTION | {"post_attention_layernorm": "post_attention_norm"} | _MLP),
    "Glm4ForCausalLM": Recipe("glm4", _GLM4, defaults={"partial_rotary_factor": 0.5}, rotates_part=True),
    "Ernie4_5ForCausalLM": Recipe("ernie4_5", _LLAMA, is_tied=True),
    "GptOssForCausalLM": Recipe("gpt-oss", _GPT_OSS, keys=_gpt_oss_keys, make_more=mxfp4.make_experts),
}
# Models that also see: their text part is one of the above.
RECIPES["Gemma3ForConditionalGeneration"] = RECIPES["Gemma3ForCausalLM"]
RECIPES["Ernie4_5_ForCausalLM"] = RECIPES["Ernie4_5ForCausalLM"]  # as the first files say


def find_recipe(config: JsonObject) -> Recipe:
    """The recipe of a config.json.

    Raises
    ------
    UnsupportedModelError
        No recipe has its architecture; the message lists those that have.
    """
    names: Sequence[Any] = config.get_list("architectures", [])
    for name in names:
        if isinstance(name, str) and name in RECIPES:
            return RECIPES[name]
    known = ", ".join(RECIPES)
    raise UnsupportedModelError(f"{config.path}: architectures {names!r} is not supported; those that are: {known}")
