"""The second promise, by hash: the logits of a token are the same bits however they are computed.

Every format that has kernels, on `llama`, and every architecture: both come from the registries, so that a new one
joins by itself (its `write_tiny_NAME` in make_gguf.py must be there). The SHA-256 of all logits of a prompt is
compared over threads, batch sizes, chunks and instruction sets, after `rewind`, and after another prompt with the same
beginning.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import make_gguf
import numpy as np
import oracle_models
import pytest

import woolly
from woolly._kernels import available_isas, kernel_formats, use_isa
from woolly.engine import Engine
from woolly.formats import FLOATS
from woolly.gguf_file import GGUFFile
from woolly.models import ARCHITECTURES
from woolly.quantizing import plan_quantization, quantize_file

N_THREADS = (1, 2, 3, 4, 8)
BATCHES = (1, 2, 3, 7, 16)
CHUNKS = (1, 3, 32, 64, 100, 512, None)
N_TOKENS = 137  # a tile of keys and a few, no multiple of anything
FORMATS = [name for name in kernel_formats() if name in (*make_gguf.FLOATS, *make_gguf.RANDOM_BLOCKS)]
SIZES = {"n_layers": 1, "hidden": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "intermediate": 96, "n_ctx": 160}
K_SIZES = SIZES | {"hidden": 256, "head_dim": 64, "intermediate": 256}  # for formats with blocks of 256


def write_model(folder: Path, arch: str, dtype: str) -> Path:
    """A tiny model of an architecture in a format, of the sizes that its writer lets be chosen."""
    sizes = K_SIZES if kernel_formats()[dtype][1] > 64 else SIZES
    path = oracle_models.write_tiny(arch, folder / "tiny.gguf", dtype=dtype, **sizes)
    with GGUFFile.open(path) as file:
        if dtype == "f32" or any(tensor.format.name not in FLOATS for tensor in file.tensors.values()):
            return path
        quantised = folder / "quantised.gguf"  # a writer that knows F32 only
        quantize_file(file, quantised, plan_quantization(file, dtype, pure=True))
        return quantised


def digest(logits: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()


def prompts(vocab_size: int) -> list[list[int]]:
    """The prompt that counts, and others to share its batches."""
    rng = np.random.default_rng(0)
    lengths = [N_TOKENS, *rng.integers(1, 9, max(BATCHES))]
    return [[int(token) for token in rng.integers(3, min(vocab_size, 300), n)] for n in lengths]


def ways(case: str) -> Iterator[tuple[str, int, int, int | None]]:
    """(ISA, threads, batch, chunk): every value of each comes up once or more, in another order for each case.

    With WOOLLY_WAYS=all, every combination.
    """
    rng = random.Random(case)
    choices = [list(available_isas()), list(N_THREADS), list(BATCHES), list(CHUNKS)]
    if os.environ.get("WOOLLY_WAYS") == "all":
        yield from itertools.product(*choices)
        return
    for values in choices:
        rng.shuffle(values)
    for i in range(max(map(len, choices))):
        yield tuple(values[i % len(values)] for values in choices)


def digest_in_batch(engine: Engine, texts: list[list[int]], batch: int, chunk: int | None) -> str:
    """Logits of the first text in a batch of that many; it stands in the middle."""
    chosen = texts[1:batch]
    chosen.insert(batch // 2, texts[0])
    items = [(engine.new_sequence(), ids) for ids in chosen]
    return digest(engine.step(items, logits="all", chunk=chunk)[batch // 2])


def check(path: Path, case: str, compute: str = "exact") -> None:
    """Compare ways of computing one model."""
    models = {n: woolly.load_gguf(path, n_threads=n, compute=compute) for n in N_THREADS}
    texts = prompts(models[1].config.vocab_size)
    expected = digest(models[1].forward(texts[0]))
    for isa, n_threads, batch, chunk in ways(case):
        with use_isa(isa):
            found = digest_in_batch(models[n_threads].engine, texts, batch, chunk)
        assert found == expected, f"{isa}, {n_threads} threads, batch {batch}, chunk {chunk}"
    for n_threads in (1, 2):
        check_session(models[n_threads], texts[0], expected)


def check_session(model: woolly.Model, ids: list[int], expected: str) -> None:
    """One token at a time, after rewinding, and after another text with the same beginning."""
    session = model.session()
    parts = [session.feed(ids[:50], logits="all", chunk=7)]
    parts += [session.feed([token], logits="all") for token in ids[50:60]]
    kept = np.concatenate(parts)
    session.feed([5, 6, 7, 8])
    session.rewind(60)
    rest = session.feed(ids[60:], logits="all")
    assert digest(np.concatenate([kept, rest])) == expected
    session.rewind(33)
    rest = session.feed(ids[33:], logits="all", chunk=32)
    assert digest(np.concatenate([kept[:33], rest])) == expected
    check_prefix(model, ids)


def check_prefix(model: woolly.Model, ids: list[int]) -> None:
    """What a session answers where it held another text with the same beginning, and where it held none."""
    session = model.session()
    session.generate([*ids[:40], 5, 6, 7], max_tokens=1)
    session.generate(ids[:-1], max_tokens=1)
    assert session.tokens[: len(ids) - 1] == ids[:-1]
    session.rewind(len(ids) - 1)
    assert digest(session.feed(ids[-1:])) == digest(model.session().feed(ids))


def test_formats_are_all_known() -> None:
    assert set(kernel_formats()) == set(FORMATS), "make_gguf.py cannot write a format that has kernels"


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path: Path, name: str) -> None:
    check(write_model(tmp_path, "llama", name), name)


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0"])
def test_int8(tmp_path: Path, arch: str, name: str) -> None:
    check(write_model(tmp_path, arch, name), arch + name, compute="int8")


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "llama"])
def test_architectures(tmp_path: Path, arch: str) -> None:
    check(write_model(tmp_path, arch, "q8_0"), arch)
