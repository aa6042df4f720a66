"""The experts of gpt-oss: gate and up rows taken apart, and MXFP4 blocks written in ggml's order.

Published checkpoints hold 32 weights as 16 bytes, each with weights 2 i and 2 i + 1, and their scales apart; a ggml
block is the scale followed by 16 bytes with weights i and i + 16. Checkpoints in floats hold the matrices transposed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from woolly.convert.tensors import Array, Made, Part, Transform, made

_HALVES = (("ffn_gate_exps", 0), ("ffn_up_exps", 1))


def make_experts(layer: str, parts: dict[str, Part]) -> Iterator[Made]:
    """The tensors of a layer's experts; what they are made of is taken out of `parts`.

    Parameters
    ----------
    layer : str
        Prefix of the tensors' names, such as "blk.3.".
    parts : dict
        The layer's tensors by their names in it.

    Raises
    ------
    CheckpointError
        Shapes do not fit.
    """
    experts = {name[len("mlp.experts.") :]: parts.pop(name) for name in list(parts) if name.startswith("mlp.experts.")}
    if "gate_up_proj_bias" in experts:
        bias = experts.pop("gate_up_proj_bias")
        for name, first in _HALVES:
            yield made(f"{layer}{name}.bias", [bias], _every_other(first, axis=1))
    if "down_proj_bias" in experts:
        yield made(f"{layer}ffn_down_exps.bias", [experts.pop("down_proj_bias")])
    if "gate_up_proj_blocks" in experts:
        yield from _make_of_blocks(layer, experts)
    elif "gate_up_proj" in experts:
        gate_up = experts.pop("gate_up_proj")
        for name, first in _HALVES:
            yield made(f"{layer}{name}.weight", [gate_up], _transposed(first, 2))
        yield made(f"{layer}ffn_down_exps.weight", [experts.pop("down_proj")], _transposed(0, 1))
    parts.update({f"mlp.experts.{name}": part for name, part in experts.items()})


def _make_of_blocks(layer: str, experts: dict[str, Part]) -> Iterator[Made]:
    for source, targets, step in (("gate_up_proj", _HALVES, 2), ("down_proj", (("ffn_down_exps", 0),), 1)):
        blocks, scales = experts.pop(f"{source}_blocks"), experts.pop(f"{source}_scales")
        if blocks.tensor.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != 16 or blocks.shape[1] % step:
            raise blocks.fail(f"expected U8 of shape (experts, rows, blocks, 16), found {blocks.shape}")
        if scales.tensor.dtype != "U8" or scales.shape != blocks.shape[:3]:
            raise scales.fail(f"expected U8 of shape {blocks.shape[:3]}, found {scales.shape}")
        n_experts, n_rows, n_blocks, _ = blocks.shape
        shape = (n_experts, n_rows // step, 32 * n_blocks)
        for name, first in targets:
            yield Made(f"{layer}{name}.weight", shape, "mxfp4", [blocks, scales], _ggml_blocks(first, step))


def _ggml_blocks(first: int, step: int) -> Transform:
    """Rows first, first + step … as ggml's MXFP4 blocks of 17 bytes."""

    def apply(arrays: list[Array]) -> Array:
        pairs, scales = (array[:, first::step] for array in arrays)
        weights = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], 32)
        return np.concatenate([scales[..., None], weights[..., :16] | weights[..., 16:] << 4], axis=-1)

    return Transform(apply)


def _transposed(first: int, step: int) -> Transform:
    """(experts, columns, rows) to (experts, rows, columns), every step-th row from `first`."""

    def shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        if len(shapes[0]) != 3 or shapes[0][2] % step:
            raise ValueError(f"expected three dimensions, the last a multiple of {step}")
        n_experts, n_cols, n_rows = shapes[0]
        return n_experts, n_rows // step, n_cols

    return Transform(lambda arrays: arrays[0][:, :, first::step].swapaxes(1, 2), shape)


def _every_other(first: int, *, axis: int) -> Transform:
    def shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        if len(shapes[0]) != 2 or shapes[0][axis] % 2:
            raise ValueError("expected two dimensions, the last an even number")
        return shapes[0][0], shapes[0][1] // 2

    return Transform(lambda arrays: arrays[0][:, first::2], shape)
