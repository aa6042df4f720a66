"""Rotary position embedding: from a model's config.json to GGUF keys and tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from woolly.config import yarn_attention_factor
from woolly.convert.config_json import JsonObject
from woolly.errors import UnsupportedModelError


def rope_parameters(config: JsonObject, layer_type: str | None = None) -> JsonObject:
    """The parameters, of layers of one type where types differ: base, kind of scaling and its constants.

    transformers 5 writes `rope_parameters`; before, it was `rope_theta` and `rope_scaling`.
    """
    parameters = config.get_object("rope_parameters", None)
    if parameters is not None:
        return parameters.get_object(layer_type, parameters) if layer_type else parameters
    scaling = config.get_object("rope_scaling", None) or JsonObject(config.path, {})
    base = {"rope_theta": config.fields.get("rope_theta")}
    return JsonObject(config.path, base | dict(scaling.fields), f"{config.prefix}rope_scaling.")


def rope_keys(
    config: JsonObject, parameters: JsonObject, n_rot: int, *, truncates: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys under the architecture's prefix, and tensors, that make other engines rotate as this model does.

    truncates : whether engines round the ends of YaRN's ramp to whole dimensions for this architecture.

    Returns
    -------
    keys : dict
        Such as ``rope.freq_base``.
    tensors : dict of str to float32 array

    Raises
    ------
    UnsupportedModelError
        The kind of scaling is none that GGUF files express.
    """
    theta = parameters.get_float("rope_theta", 10000.0)
    keys: dict[str, Any] = {"rope.freq_base": theta}
    kind = parameters.get_str("rope_type", None) or parameters.get_str("type", "default")
    if kind in ("default", "dynamic"):  # which is the same within the positions of the training
        return keys, {}
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": _factor(parameters)}, {}
    if kind == "llama3":
        return keys, {"rope_freqs.weight": llama3_factors(parameters, theta, n_rot)}
    if kind == "yarn":
        return keys | _yarn_keys(config, parameters, truncates=truncates), {}
    if kind in ("longrope", "su"):
        return _longrope(config, parameters, keys, n_rot)
    raise UnsupportedModelError(
        f"{config.path}: rope_type {kind!r} is not supported; those that are: "
        "default, dynamic, linear, llama3, yarn, longrope"
    )


def llama3_factors(parameters: JsonObject, theta: float, n_rot: int) -> NDArray[np.float32]:
    """What Llama 3.1 divides each frequency by: 1 for short waves, `factor` for long ones, a blend between.

    blend: 1 / ((1 - s) / factor + s), s = (n_ctx / wavelength - low) / (high - low). float32, (n_rot / 2,).
    """
    factor = parameters.get_float("factor")
    low, high = parameters.get_float("low_freq_factor"), parameters.get_float("high_freq_factor")
    n_ctx = parameters.get_float("original_max_position_embeddings")
    if not (factor > 0 and 0 < low < high and n_ctx > 0 and theta > 0):
        parameters.refuse("low_freq_factor", "expected positive factors, the low one below the high one")
    waves = n_ctx * theta ** (-np.arange(0, n_rot, 2, dtype=np.float64) / n_rot) / (2 * math.pi)
    share = np.clip((waves - low) / (high - low), 0, 1)
    return (1 / ((1 - share) / factor + share)).astype(np.float32)


def _factor(parameters: JsonObject) -> float:
    factor = parameters.get_float("factor")
    if factor <= 0:
        parameters.refuse("factor", "expected a number above 0")
    return factor


def _yarn_keys(config: JsonObject, parameters: JsonObject, *, truncates: bool) -> dict[str, Any]:
    factor = _factor(parameters)
    if parameters.get_bool("truncate", True) != truncates:
        raise UnsupportedModelError(f"{parameters.path}: {parameters.prefix}truncate is not {truncates} for this model")
    n_ctx = parameters.get_int("original_max_position_embeddings", None) or config.get_int("max_position_embeddings")
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": n_ctx,
        "rope.scaling.yarn_beta_fast": parameters.get_float("beta_fast", 32.0),
        "rope.scaling.yarn_beta_slow": parameters.get_float("beta_slow", 1.0),
    }
    for name in ("mscale", "mscale_all_dim"):
        if name in parameters:
            raise UnsupportedModelError(f"{parameters.path}: {parameters.prefix}{name} is not supported")
    usual = yarn_attention_factor(factor)
    attention_factor = parameters.get_float("attention_factor", usual)
    # Engines multiply by the usual factor themselves.
    return keys if attention_factor == usual else keys | {"rope.scaling.attn_factor": attention_factor / usual}


def _longrope(
    config: JsonObject, parameters: JsonObject, keys: dict[str, Any], n_rot: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    n_ctx = config.get_int("max_position_embeddings")
    trained = config.get_int("original_max_position_embeddings", None)
    trained = trained or parameters.get_int("original_max_position_embeddings")
    scale = n_ctx / max(trained, 2)
    usual = math.sqrt(1 + math.log(scale) / math.log(max(trained, 2))) if scale > 1 else 1.0
    keys |= {
        "rope.scaling.original_context_length": trained,
        "rope.scaling.attn_factor": parameters.get_float("attention_factor", usual),
    }
    tensors = {}
    for name in ("long", "short"):
        factors = parameters.get_floats(f"{name}_factor", n_rot // 2)
        tensors[f"rope_factors_{name}.weight"] = np.array(factors, np.float32)
    return keys, tensors
