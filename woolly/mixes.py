"""Mixes: which tensor of a model is stored in which format, for a name such as ``q4_k_m``.

The names and their meaning are llama.cpp's, as of 2026 and without an importance matrix: users of `q4_k_m` expect more
bits in part of attn_v and ffn_down, and in the output matrix. Knows names, shapes and metadata; reads no weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from woolly.errors import GGUFError, WoollyError
from woolly.formats import FLOATS, FORMATS, Format
from woolly.gguf_file import TensorInfo
from woolly.metadata import show


@dataclass(frozen=True)
class Mix:
    """What a name stands for.

    Attributes
    ----------
    name : str
    base : str
        The format of every matrix that no rule treats otherwise.
    file_type : int
        The value of ``general.file_type``.
    """

    name: str
    base: str
    file_type: int

    @property
    def is_searched(self) -> bool:
        """Whether its formats are searched for, and so those that rows fall back to: see `quantize_rows`."""
        return self.base.endswith("_k") or self.base.startswith("iq")


MIXES = {
    name: Mix(name, base, file_type)
    for name, base, file_type in [
        ("f32", "f32", 0),
        ("f16", "f16", 1),
        ("bf16", "bf16", 32),
        ("q8_0", "q8_0", 7),
        ("q6_k", "q6_k", 18),
        ("q5_k_m", "q5_k", 17),
        ("q5_k_s", "q5_k", 16),
        ("q5_1", "q5_1", 9),
        ("q5_0", "q5_0", 8),
        ("q4_k_m", "q4_k", 15),
        ("q4_k_s", "q4_k", 14),
        ("q4_1", "q4_1", 3),
        ("q4_0", "q4_0", 2),
        ("iq4_nl", "iq4_nl", 25),
        ("iq4_xs", "iq4_xs", 30),
        ("mxfp4", "mxfp4", 38),
        ("mxfp4_moe", "mxfp4", 38),
        ("q3_k_l", "q3_k", 13),
        ("q3_k_m", "q3_k", 12),
        ("q3_k_s", "q3_k", 11),
        ("q2_k", "q2_k", 10),
        ("q2_k_s", "q2_k", 21),
    ]
}
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

# What a row takes that is no whole number of its format's blocks; where this does not fit either, f16. For Q2_K and
# Q3_K llama.cpp has had Q4_0 since 2026, which takes as many bits as IQ4_NL and loses more.
FALLBACKS = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}

# Matrices that stay as they are: small, or of a kind that loses too much.
_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|altup|laurel|per_layer_model_proj|ssm_conv1d|shortconv\.conv\.weight"
    r"|^position_embd\.weight|^token_types\.weight|attn_rel_b\.weight|time_mix_(first|lerp_fused|[wvag]\d|decay_w\d)\.weight"
)
_PARTS = (
    ("attn_v", re.compile(r"attn_(v|qkv|kv_b)\.weight")),
    ("attn_k", re.compile(r"attn_k\.weight")),
    ("attn_output", re.compile(r"attn_output\.weight")),
    ("ffn_down", re.compile(r"ffn_down")),
)
_BLOCK = re.compile(r"blk\.(\d+)\.")


def resolve_mix(name: str) -> Mix:
    """The mix of a name, in any case; ``q4_k`` is ``q4_k_m``, as for llama.cpp.

    Raises
    ------
    WoollyError
        There is none of this name.
    """
    if not isinstance(name, str):
        raise WoollyError(f"expected the name of a type, such as 'q4_k_m', got {name!r}")
    lower = name.lower()
    try:
        return MIXES[ALIASES.get(lower, lower)]
    except KeyError:
        raise WoollyError(f"type {name!r} is unknown; expected one of {', '.join(MIXES)}") from None


def is_quantizable(info: TensorInfo) -> bool:
    """Whether a tensor is a matrix of weights, and none of those that are always kept."""
    is_matrix = math.prod(info.shape[:-1]) > 1
    return is_matrix and info.name.endswith("weight") and not _KEPT.search(info.name)


def plan_formats(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, Any],
    mix: Mix,
    *,
    output_type: str | None = None,
    token_embd_type: str | None = None,
    pure: bool = False,
) -> dict[str, Format]:
    """The format that each tensor gets.

    Parameters
    ----------
    tensors : mapping of str to TensorInfo
    metadata : mapping
    mix : Mix
    output_type, token_embd_type : str, optional
        Formats of these two; a model without output.weight has its token embedding for an output.
    pure : bool
        All matrices in the mix's base format, without its rules.

    Returns
    -------
    dict of str to Format
        In the order of `tensors`.
    """
    model = _Model.of(tensors, metadata)
    plan = {}
    for name, info in tensors.items():
        if not is_quantizable(info):
            plan[name] = info.format
            continue
        is_output = name == "output.weight" or (model.is_tied and _is_embedding(name))
        if _is_embedding(name) and token_embd_type is not None:
            wanted = token_embd_type
        elif is_output and output_type is not None:
            wanted = output_type
        elif pure or mix.base in FLOATS:
            wanted = mix.base
        elif is_output:
            wanted = _output_format(mix, info.shape[-1])
        else:
            wanted = _block_format(mix, info, model)
        plan[name] = _fitting(wanted, info.shape[-1])
    return plan


@dataclass(frozen=True)
class _Model:
    """What the rules ask about the whole model."""

    n_layers: int
    n_experts: int
    n_gqa: int  # query heads for each key and value head
    is_large: bool  # a 70B model, whose attn_v are eight times smaller than their attn_q
    is_tied: bool
    ranks: Mapping[str, tuple[str, int]]  # which part of a layer a tensor is, and how many come before it in the model
    counts: Mapping[str, int]

    @classmethod
    def of(cls, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any]) -> _Model:
        architecture = metadata.get("general.architecture", "")
        if not isinstance(architecture, str):
            raise GGUFError(f"general.architecture: expected a string, got {show(architecture)}")
        heads = _first(metadata, f"{architecture}.attention.head_count")
        kv_heads = _first(metadata, f"{architecture}.attention.head_count_kv", heads)
        n_layers = _first(metadata, f"{architecture}.block_count")
        ranks: dict[str, tuple[str, int]] = {}
        counts: dict[str, int] = {}
        for name in sorted(tensors, key=lambda name: (_layer_of(name), name)):
            part = _part_of(name)
            if part and is_quantizable(tensors[name]):
                ranks[name] = part, counts.get(part, 0)
                counts[part] = counts.get(part, 0) + 1
        return cls(
            n_layers=n_layers,
            n_experts=_first(metadata, f"{architecture}.expert_count"),
            n_gqa=heads // kv_heads if kv_heads else 1,
            is_large=architecture in ("llama", "qwen2") and n_layers == 80 and heads != kv_heads,
            is_tied="output.weight" not in tensors,
            ranks=ranks,
            counts=counts,
        )


def _first(metadata: Mapping[str, Any], key: str, default: int = 0) -> int:
    """An integer of the metadata; of one for each layer, the first."""
    value = metadata.get(key)
    if isinstance(value, np.ndarray):
        value = value[0].item() if len(value) else None
    if value is None:
        return default
    if type(value) is not int:
        raise GGUFError(f"{key}: expected an integer, got {show(value)}")
    return value


def _layer_of(name: str) -> int:
    match = _BLOCK.match(name)
    return int(match[1]) if match else -1


def _part_of(name: str) -> str | None:
    return next((part for part, pattern in _PARTS if pattern.search(name)), None)


def _is_embedding(name: str) -> bool:
    return name in ("token_embd.weight", "per_layer_token_embd.weight")


def _fitting(wanted: str, n_cols: int) -> Format:
    """The format, or its fallback for rows that are no whole number of its blocks."""
    for name in (wanted, FALLBACKS.get(wanted, "f16"), "f16"):
        if n_cols % FORMATS[name].block_size == 0:
            break
    return FORMATS[name]


def _output_format(mix: Mix, n_cols: int) -> str:
    if mix.base == "q8_0" or mix.name == "mxfp4_moe" or n_cols % FORMATS[mix.base].block_size:
        return "q8_0"
    return "q6_k"


def _block_format(mix: Mix, info: TensorInfo, model: _Model) -> str:
    """The rules for everything but the output."""
    if mix.name == "mxfp4_moe":
        return "mxfp4" if len(info.shape) == 3 and info.shape[0] > 1 else "q8_0"
    part, rank = model.ranks.get(info.name, (None, 0))
    if part == "attn_v":
        return _attn_v_format(mix, rank, model)
    if part == "ffn_down":
        return _ffn_down_format(mix, _layer_of(info.name) if model.n_experts > 1 else rank, model.n_layers)
    if part == "attn_k" and model.n_experts == 8:
        return "q8_0"  # a little more for a matrix that is small beside eight experts
    if part == "attn_output":
        if model.n_experts == 8:
            return "q5_k" if mix.name in _MORE_BESIDE_EXPERTS else mix.base
        return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(mix.name, mix.base)
    return mix.base


# Mixes whose attn_output, small beside eight experts, takes more bits there
_MORE_BESIDE_EXPERTS = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")


def _attn_v_format(mix: Mix, rank: int, model: _Model) -> str:
    if model.n_experts == 8:
        return "q8_0"
    grouped = model.n_gqa >= 4  # attn_v is that much smaller than attn_q
    wanted = {
        "q2_k": "q4_k" if grouped else "q3_k",
        "q2_k_s": "q4_k" if grouped else "q2_k",
        "q3_k_m": "q5_k" if rank < 2 else "q4_k",
        "q3_k_l": "q5_k",
        "q4_k_s": "q5_k" if rank < 4 else "q4_k",
        "q4_k_m": "q6_k" if _takes_more_bits(rank, model.counts["attn_v"]) else "q4_k",
        "q5_k_m": "q6_k" if _takes_more_bits(rank, model.counts["attn_v"]) else "q5_k",
        "iq4_nl": "q5_k" if grouped else "iq4_nl",
        "iq4_xs": "q5_k" if grouped else "iq4_xs",
    }.get(mix.name, mix.base)
    return "q5_k" if model.is_large and wanted in ("q3_k", "q4_k") else wanted


def _ffn_down_format(mix: Mix, layer: int, n_layers: int) -> str:
    is_early = layer < n_layers // 8
    return {
        "q2_k": "q3_k",
        "q2_k_s": "q4_k" if is_early else "q2_k",
        "q3_k_m": "q5_k" if layer < n_layers // 16 else "q4_k",
        "q3_k_l": "q5_k",
        "q4_k_s": "q5_k" if is_early else "q4_k",
        "q4_k_m": "q6_k" if _takes_more_bits(layer, n_layers) else "q4_k",
        "q5_k_m": "q6_k" if _takes_more_bits(layer, n_layers) else "q5_k",
        "iq4_nl": "q5_k" if is_early else "iq4_nl",
        "iq4_xs": "q5_k" if is_early else "iq4_xs",
    }.get(mix.name, mix.base)


def _takes_more_bits(i: int, n: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
