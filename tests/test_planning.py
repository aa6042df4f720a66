"""What a model will take in memory: the plan against the process that follows it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_gguf import write_tiny_llama

from woolly.metadata import Metadata
from woolly.planning import vocabulary_bytes

# Fills the context, in batches of every size up to the largest, and draws a token
RUN = """
import json, sys
import numpy as np
import woolly

model = woolly.load_gguf(sys.argv[1], n_ctx=int(sys.argv[2]), n_threads=2)
plan = model.memory_plan()
ids = np.arange(model.n_ctx - 1) % 199 + 3
piece = model.generate(ids.tolist(), max_tokens=1, seed=1)
status = open("/proc/self/status").read()
peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
print(json.dumps({"planned": plan.total_bytes, "runtime": plan.runtime_bytes, "peak": peak}))
"""
# What varies from run to run: arenas of malloc, stacks, pages of libraries that the first step reads
FLOOR_BYTES = 6 << 20

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")


def measure(path: Path, n_ctx: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(n_ctx)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_proc
@pytest.mark.parametrize("n_ctx", [512, 8192])
def test_the_plan_is_the_peak(tmp_path: Path, n_ctx: int) -> None:
    path = write_tiny_llama(
        tmp_path / "m.gguf", dtype="q8_0", n_layers=2, hidden=512, n_heads=8, n_kv_heads=8, intermediate=2048,
        vocab=2048, n_ctx=8192, tied=False,
    )  # fmt: skip
    found = measure(path, n_ctx)
    assert found["planned"] == pytest.approx(found["peak"], rel=0.05, abs=FLOOR_BYTES), found


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("n_ctx", [512, 2048])
def test_the_plan_is_the_peak_of_smollm2(smollm2_path: Path, n_ctx: int) -> None:
    found = measure(smollm2_path, n_ctx)
    assert found["planned"] == pytest.approx(found["peak"], rel=0.05), found


def test_vocabularies_are_estimated_by_their_strings() -> None:
    tokens, merges = ["a", "bc", "", "ß"], ["a b", "c d"]
    keys = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges, "tokenizer.ggml.scores": np.zeros(4)}
    metadata = Metadata.from_values("m", keys)
    assert vocabulary_bytes(metadata) == 4 * 240 + 5 + 2 * 70 + 6
    assert metadata["tokenizer.ggml.tokens"].n_bytes == 5
    assert vocabulary_bytes({}) == vocabulary_bytes({"tokenizer.ggml.tokens": "abc"}) == 0
