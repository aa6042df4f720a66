"""Opening models, and everything that keeps one from being opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle_models as oracle
import pytest
from make_gguf import write_tiny_llama

import woolly
from woolly._kernels import default_threads
from woolly.errors import GGUFError, NotEnoughMemoryError, UnsupportedModelError, WoollyError
from woolly.models import ARCHITECTURES


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf", n_ctx=6000)


def test_defaults(tiny: Path) -> None:
    with woolly.load_gguf(tiny) as model:
        assert (model.name, model.n_ctx, model.engine.cache_dtype) == ("tiny", 4096, "f16")
        assert model.n_threads == default_threads()
        assert model.load_s > 0
    with woolly.load_gguf(str(tiny), n_ctx=6000, n_threads=3, cache_dtype="f32", name="mine") as model:
        assert (model.name, model.n_ctx, model.n_threads, model.engine.cache_dtype) == ("mine", 6000, 3, "f32")


def test_load_takes_a_path(tiny: Path) -> None:
    for path in (tiny, str(tiny)):
        with woolly.load(path, n_ctx=64, n_threads=1) as model:
            assert (model.name, model.n_ctx) == ("tiny", 64)


def test_load_takes_a_cached_name(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woolly.hub.resolve", lambda name: tiny)
    with woolly.load("smollm2") as model:
        assert model.name == "smollm2"
    with woolly.load() as model:
        assert model.name == "tiny"


@pytest.mark.parametrize("n_ctx", [0, -1, True, 1.5, "64"])
def test_bad_context_lengths_are_refused(tiny: Path, n_ctx: object) -> None:
    with pytest.raises(WoollyError, match=f"n_ctx: expected a positive integer, got {n_ctx!r}"):
        woolly.load_gguf(tiny, n_ctx=n_ctx)


def test_contexts_beyond_training_are_refused(tiny: Path) -> None:
    with pytest.raises(WoollyError, match="n_ctx: 6001 tokens asked for, the model was trained for 6000"):
        woolly.load_gguf(tiny, n_ctx=6001)


def test_bad_options_are_refused(tiny: Path) -> None:
    with pytest.raises(WoollyError, match="n_threads: expected an integer of 1 to 256, got 0"):
        woolly.load_gguf(tiny, n_threads=0)
    with pytest.raises(ValueError, match="cache_dtype must be"):
        woolly.load_gguf(tiny, cache_dtype="bf16")
    with pytest.raises(TypeError, match="unexpected keyword argument 'threads'"):
        woolly.load_gguf(tiny, threads=1)


def test_a_model_opens_where_no_thread_can_be_had(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("woolly.loading.ThreadPoolExecutor.submit", refuse)
    with woolly.load_gguf(tiny) as model:
        assert model.tokenizer.vocab_size == model.config.vocab_size


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        woolly.load_gguf(tmp_path / "nothing.gguf")
    text = tmp_path / "text.gguf"
    text.write_text("Once upon a time")
    with pytest.raises(GGUFError, match=r"text\.gguf"):
        woolly.load_gguf(text)


def test_every_truncation_is_refused(tiny: Path) -> None:
    raw = tiny.read_bytes()
    rng = np.random.default_rng(0)
    for end in [0, 3, 4, 23, *rng.integers(24, len(raw), 40), len(raw) - 1]:
        tiny.write_bytes(raw[:end])
        with pytest.raises(GGUFError):
            woolly.load_gguf(tiny)


def test_unknown_architectures_are_refused_with_the_known(tiny: Path) -> None:
    tiny.write_bytes(tiny.read_bytes().replace(b"llama", b"lloma"))
    message = f"architecture 'lloma' is not supported; those that are: {', '.join(ARCHITECTURES)}"
    with pytest.raises(UnsupportedModelError, match=message):
        woolly.load_gguf(tiny)


def test_flipped_bytes_load_or_are_refused(tiny: Path) -> None:
    """Any byte of the header may be wrong: no crash, and no error that is not ours."""
    raw = bytearray(tiny.read_bytes())
    header = raw.index(b"output_norm.weight") + 64
    rng = np.random.default_rng(1)
    outcomes = set()
    for _ in range(150):
        changed = raw.copy()
        for at in rng.integers(0, header, rng.integers(1, 4)):
            changed[at] = rng.integers(0, 256)
        tiny.write_bytes(changed)
        try:
            woolly.load_gguf(tiny, n_ctx=16, n_threads=1).forward([1, 2])
            outcomes.add("loads")
        except WoollyError:
            outcomes.add("refused")
    assert outcomes == {"loads", "refused"}


def test_what_will_not_fit_is_refused_before_anything_is_allocated(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woolly.memory.available_bytes", lambda: 2_000_000)
    message = (
        r"tiny with n_ctx 6000 needs .* of memory \(weights .*, KV cache .*, scratch .*\), 2\.00 MB are "
        r"available .*what would fit: n_ctx=\d+"
    )
    with pytest.raises(NotEnoughMemoryError, match=message) as caught:
        woolly.load_gguf(tiny, n_ctx=6000)
    n_ctx = int(str(caught.value).rpartition("=")[2])
    woolly.load_gguf(tiny, n_ctx=n_ctx).close()
    with pytest.raises(NotEnoughMemoryError):
        woolly.load_gguf(tiny, n_ctx=n_ctx + 16)
    monkeypatch.setattr("woolly.memory.available_bytes", lambda: 1000)
    with pytest.raises(NotEnoughMemoryError, match=r"\(\d[\d,]* and 1,000 bytes\)$"):
        woolly.load_gguf(tiny)


@pytest.mark.parametrize("name", ["f32", "q8_0", "qwen3moe"])
def test_the_estimate_holds_what_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    parts: dict[str, int] = {}
    monkeypatch.setattr("woolly.loading.check_fits", lambda _, found, **__: parts.update(found))
    if name == "qwen3moe":
        path = oracle.write_tiny(name, tmp_path / "m.gguf")
    else:
        path = write_tiny_llama(tmp_path / "m.gguf", dtype=name, tied=False, freq_factors=True)
    with woolly.load_gguf(path) as model:
        plan = model.memory_plan()
    assert parts["weights"] == pytest.approx(plan.weights_bytes, rel=0.05)
    assert parts["KV cache"] == plan.kv_cache_bytes
    assert plan.scratch_bytes <= parts["scratch"] < 1.6 * plan.scratch_bytes
