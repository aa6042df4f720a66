"""Every architecture against `transformers`: the logits that it computed once, and where it is installed, computes now.

The error of a position is the largest difference between logits, in units of the largest logit there. Everything is
float32 on both sides; what is measured is 7e-6 at most, after 62 layers.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import oracle_models as oracle
import pytest

import woolly
from woolly._kernels import available_isas, use_isa
from woolly.model import Model
from woolly.models import ARCHITECTURES

TOLERANCE = 1e-4
N_CTX = len(oracle.TOKENS)


def load(path: Path, *, n_threads: int = 1) -> Model:
    return woolly.load_gguf(path, n_ctx=N_CTX, n_threads=n_threads, cache_dtype="f32")


def logits_of(model: Model) -> np.ndarray:
    """Logits of the prompt at once, then token by token with the cache."""
    sequence = model.engine.new_sequence()
    logits = model.engine.step([(sequence, oracle.TOKENS[: oracle.N_PROMPT])], logits="all")
    for token in oracle.TOKENS[oracle.N_PROMPT :]:
        logits += model.engine.step([(sequence, [token])])
    return np.concatenate(logits)


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of a position."""
    return float((np.abs(actual - expected).max(axis=1) / np.abs(expected).max(axis=1)).max())


def golden(name: str) -> np.ndarray:
    return np.load(oracle.golden_path(name))


def kept(logits: np.ndarray) -> np.ndarray:
    """The part of the logits that the goldens hold."""
    return logits[np.ix_(oracle.POSITIONS, oracle.IDS)]


def test_every_architecture_has_an_oracle() -> None:
    assert {model.arch for model in oracle.MODELS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", oracle.MODELS)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    with load(oracle.write_gguf(oracle.MODELS[name], tmp_path / "tiny.gguf")) as model:
        logits = logits_of(model)
        assert error(kept(logits), golden(name)) < TOLERANCE
        # the bits do not depend on the instruction set, on threads, or on how the tokens came in
        for isa in available_isas():
            with use_isa(isa):
                assert model.forward(oracle.TOKENS[:12]).tobytes() == logits[:12].tobytes(), isa
    with load(tmp_path / "tiny.gguf", n_threads=2) as model:
        assert model.forward(oracle.TOKENS).tobytes() == logits.tobytes()


def test_q_k_and_v_may_be_one_tensor_with_one_bias(tmp_path: Path) -> None:
    model = oracle.MODELS["qwen2"]
    with load(oracle.write_gguf(model, tmp_path / "apart.gguf")) as apart:
        logits = apart.forward(oracle.TOKENS)
    with load(oracle.write_gguf(model, tmp_path / "fused.gguf", fuses_qkv=True)) as fused:
        assert fused.forward(oracle.TOKENS).tobytes() == logits.tobytes()


KEYS = [(name, key, value) for name, model in oracle.MODELS.items() for key, value in model.matters.items()]


@pytest.mark.parametrize(("name", "key", "value"), KEYS)
def test_every_key_changes_the_logits(tmp_path: Path, name: str, key: str, value: Any) -> None:
    path = oracle.write_gguf(oracle.MODELS[name], tmp_path / "tiny.gguf", changes={key: value})
    with load(path) as model:
        assert error(kept(model.forward(oracle.TOKENS)), golden(name)) > 10 * TOLERANCE


@pytest.mark.parametrize("name", oracle.MODELS)
@pytest.mark.filterwarnings("ignore")
def test_transformers_says_so(tmp_path: Path, name: str) -> None:
    """The goldens are what this version of `transformers` computes, and all other logits agree too."""
    pytest.importorskip("torch")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    pytest.importorskip("transformers")
    expected = oracle.transformers_logits(oracle.MODELS[name])
    # Torch's own results were seen to differ by 5e-5 from one process to the next.
    assert error(kept(expected), golden(name)) < TOLERANCE
    with load(oracle.write_gguf(oracle.MODELS[name], tmp_path / "tiny.gguf")) as model:
        assert error(logits_of(model), expected) < TOLERANCE
