"""The merges of a BPE in tokenizer.json: as GGUF's texts, and as SentencePiece's scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from woolly.convert.config_json import JsonObject
from woolly.errors import CheckpointError, UnsupportedModelError
from woolly.metadata import show


def merge_pairs(model: JsonObject) -> list[tuple[str, str]]:
    """The merges in their order; files write a pair as a list of two, or as text with a space between.

    Raises
    ------
    CheckpointError
        One is neither.
    """
    pairs = []
    for merge in model.get_list("merges"):
        parts: Any = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise CheckpointError(f"{model.path}: model.merges: expected two parts, got {show(merge)}")
        pairs.append((parts[0], parts[1]))
    return pairs


def merge_texts(model: JsonObject) -> list[str]:
    """The merges as "left right".

    Raises
    ------
    UnsupportedModelError
        A part holds a space, which the text cannot express.
    """
    texts = [f"{left} {right}" for left, right in merge_pairs(model)]
    for text in texts:
        if text.count(" ") != 1:
            raise UnsupportedModelError(f"{model.path}: model.merges: {show(text)} has a space in a part")
    return texts


def scores_of_merges(model: JsonObject, texts: Sequence[str]) -> NDArray[np.float32]:
    """SentencePiece's scores, which choose the same merge at each step as the order of the merges does.

    SentencePiece merges the pair whose result has the highest score, so the result of the n-th different merge gets -n.

    Parameters
    ----------
    model : JsonObject
        "model" of tokenizer.json.
    texts : sequence of str
        The tokens by id.

    Returns
    -------
    float32, (n_tokens,)

    Raises
    ------
    UnsupportedModelError
        Scores cannot express the merges: those of one result do not stand together.
    """
    ranks: dict[str, int] = {}
    last = None
    for left, right in merge_pairs(model):
        result = left + right
        if result != last and result in ranks:
            raise UnsupportedModelError(
                f"{model.path}: model.merges: those that make {show(result)} do not stand together, which scores "
                "cannot express"
            )
        ranks.setdefault(result, len(ranks))
        last = result
    return np.array([-ranks.get(text, len(ranks)) for text in texts], np.float32)
