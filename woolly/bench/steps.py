"""Steps of a model with the time of every stage: what `layer` shows, and what a projection is made from."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from woolly.bench.subjects import Subject


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step.

    Attributes
    ----------
    total_s : float
        By the clock outside.
    stages : dict of str to float
        By name, in order. What is missing to the total is outside the program: Python, and entering the region.
    """

    total_s: float
    stages: dict[str, float]

    def by_layer(self) -> dict[int, dict[str, float]]:
        """Stages of each layer, by the name without the layer's number."""
        layers: dict[int, dict[str, float]] = {}
        for name, seconds in self.stages.items():
            match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
            if match:
                layers.setdefault(int(match[1]), {})[match[2]] = seconds
        return layers

    @property
    def layers_s(self) -> float:
        """Seconds of all the layers' stages."""
        return sum(sum(stages.values()) for stages in self.by_layer().values())


def token_ids(n: int, vocab_size: int, *, seed: int = 0) -> NDArray[np.int32]:
    """Random tokens: what they mean changes no time."""
    return np.random.default_rng(seed).integers(0, vocab_size, n, dtype=np.int32)


def timed_step(subject: Subject, *, n_tokens: int, depth: int, repeat: int) -> list[StepTimes]:
    """Steps of n_tokens after `depth` others, with logits for the last; one more before warms up."""
    engine = subject.model.engine
    vocab_size = engine.config.vocab_size
    sequence = engine.new_sequence()
    if depth:
        engine.step([(sequence, token_ids(depth, vocab_size))])
    ids = token_ids(n_tokens, vocab_size, seed=1)
    steps = [_one_step(subject, sequence.cache, ids, depth) for _ in range(repeat + 1)]
    return steps[1:]


def _one_step(subject: Subject, cache: object, ids: NDArray[np.int32], depth: int) -> StepTimes:
    program = subject.model.engine.program
    times = np.zeros(len(program.stage_names))
    logits = np.empty((1, program.vocab_size), dtype=np.float32)
    started = time.perf_counter()
    for begin in range(0, len(ids), program.max_tokens):
        part = ids[begin : begin + program.max_tokens]
        is_last = begin + len(part) == len(ids)
        outputs = np.array([len(part) - 1] if is_last else [], dtype=np.int32)
        program.run(part, [(cache, depth + begin, len(part))], outputs, logits[: len(outputs)], times=times)
    total = time.perf_counter() - started
    return StepTimes(total, dict(zip(program.stage_names, times.tolist(), strict=True)))


def projected_s(steps: StepTimes, n_layers: int, all_layers: int) -> float:
    """Seconds of a step with all layers, from n_layers of them: each further one costs what those did."""
    return steps.total_s + (all_layers - n_layers) * steps.layers_s / n_layers


PROJECTION_RULE = (
    "projected: embedding, head and the rest once as measured, plus the mean of the measured layers times all layers"
)
