"""The parts of the oracle's models that are mixtures of experts: tensors in `transformers` and in GGUF files, and keys.

`transformers` keeps the gates and ups of a layer's experts in one tensor (gpt-oss's interleaved and transposed), GGUF
files in two. Imports nothing of woolly, and of `oracle_models` the types only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from oracle_models import OracleModel

Array = npt.NDArray[np.float32]

ROUTERS = {"Mixtral": "mlp.gate", "Qwen3Moe": "mlp.gate", "GptOss": "mlp.router"}


def n_experts(model: OracleModel) -> int:
    """Experts of a layer; 0 in a dense model."""
    return model.get("num_local_experts") or model.get("num_experts") or 0


def shapes(model: OracleModel) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's router and experts, by their names in `transformers`."""
    n, hidden = n_experts(model), model["hidden_size"]
    wide = model.get("moe_intermediate_size") or model["intermediate_size"]
    router = ROUTERS[model.hf_class]
    if model.arch != "gpt-oss":
        return {
            f"{router}.weight": (n, hidden),
            "mlp.experts.gate_up_proj": (n, 2 * wide, hidden),
            "mlp.experts.down_proj": (n, hidden, wide),
        }
    return {
        f"{router}.weight": (n, hidden),
        f"{router}.bias": (n,),
        "mlp.experts.gate_up_proj": (n, hidden, 2 * wide),
        "mlp.experts.gate_up_proj_bias": (n, 2 * wide),
        "mlp.experts.down_proj": (n, wide, hidden),
        "mlp.experts.down_proj_bias": (n, hidden),
        "self_attn.sinks": (model["num_attention_heads"],),
    }


def gguf_tensors(model: OracleModel, name: str, values: Array) -> dict[str, Array] | None:
    """The tensors of a GGUF file that hold one of `transformers`; None where it is no part of a mixture."""
    if not name.startswith("model.layers."):
        return None
    _, _, layer, tensor = name.split(".", 3)
    blk = f"blk.{layer}."
    if tensor == "self_attn.sinks":
        return {blk + "attn_sinks.weight": values}
    if not n_experts(model) or not tensor.startswith("mlp."):
        return None
    if tensor.startswith(ROUTERS[model.hf_class]):
        return {f"{blk}ffn_gate_inp.{tensor.rpartition('.')[2]}": values}
    suffix = "bias" if tensor.endswith("bias") else "weight"
    if model.arch == "gpt-oss" and suffix == "weight":
        values = np.ascontiguousarray(values.swapaxes(1, 2))
    if "down_proj" in tensor:
        return {f"{blk}ffn_down_exps.{suffix}": values}
    n = values.shape[1] // 2
    gate, up = (values[:, ::2], values[:, 1::2]) if model.arch == "gpt-oss" else (values[:, :n], values[:, n:])
    return {
        f"{blk}ffn_gate_exps.{suffix}": np.ascontiguousarray(gate),
        f"{blk}ffn_up_exps.{suffix}": np.ascontiguousarray(up),
    }


def options(model: OracleModel) -> dict[str, str]:
    """Of the configuration in `transformers`: one matmul an expert, as its other ways are less exact."""
    return {"experts_implementation": "eager"} if n_experts(model) else {}


def keys(model: OracleModel) -> dict[str, int]:
    """Keys of the file."""
    values: dict[str, int] = {"expert_count": n_experts(model), "expert_used_count": model["num_experts_per_tok"]}
    if model.get("norm_topk_prob") is False:
        values["expert_weights_norm"] = False
    if model.arch != "llama":
        values["expert_feed_forward_length"] = model.get("moe_intermediate_size") or model["intermediate_size"]
    return values


def fan_in(model: OracleModel, name: str, shape: tuple[int, ...]) -> float:
    """Values that one output of a matrix sums; fewer where gpt-oss clamps what comes out, so that it does."""
    if model.arch == "gpt-oss" and "gate_up" in name:
        return shape[1] / 16
    return shape[1] if len(shape) == 2 or model.arch == "gpt-oss" else shape[2]
