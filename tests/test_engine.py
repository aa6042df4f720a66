"""The engine: the same bits however a prompt is fed, and nothing changed when a step is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import strategies as sts
from hypothesis import given
from hypothesis import strategies as st
from make_gguf import write_tiny_gemma3, write_tiny_llama

import woolly
from woolly._kernels import available_isas, use_isa
from woolly.engine import Engine, _batches
from woolly.errors import ContextFullError, WoollyError

N_CTX = 256
VOCAB = 320
PROMPT = [int(t) for t in np.random.default_rng(0).integers(0, VOCAB, 200)]

WRITERS = {
    "llama": lambda path: write_tiny_llama(path, dtype="q4_0", n_heads=6, n_kv_heads=2, head_dim=32),
    "gemma3": lambda path: write_tiny_gemma3(path, dtype="q5_0", sliding_window=20),
    "floats": lambda path: write_tiny_llama(path, dtype="bf16", head_dim=20),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    for name, write in WRITERS.items():
        write(folder / f"{name}.gguf")
    return folder


def load(folder: Path, name: str, n_threads: int = 2, cache_dtype: str = "f16") -> Engine:
    return woolly.load_gguf(folder / f"{name}.gguf", n_threads=n_threads, cache_dtype=cache_dtype).engine


@pytest.fixture(scope="module", params=WRITERS)
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    return load(folder, request.param)


def whole(engine: Engine, tokens: list[int]) -> np.ndarray:
    return engine.step([(engine.new_sequence(), tokens)], logits="all")[0]


# The same bits


@pytest.mark.parametrize("chunk", [1, 7, 64, 200, 1000])
def test_chunks(engine: Engine, isa: str, chunk: int) -> None:
    sequence = engine.new_sequence()
    logits = engine.step([(sequence, PROMPT)], logits="all", chunk=chunk)[0]
    assert logits.tobytes() == whole(engine, PROMPT).tobytes()
    assert sequence.n_past == len(PROMPT)


@pytest.mark.parametrize("cache_dtype", ["f16", "f32"])
@pytest.mark.parametrize("name", WRITERS)
def test_threads_and_isas(folder: Path, name: str, cache_dtype: str) -> None:
    hashes = set()
    for n_threads in (1, 2, 3):
        engine = load(folder, name, n_threads, cache_dtype)
        for isa in available_isas():
            with use_isa(isa):
                logits = [whole(engine, PROMPT)]
                sequence = engine.new_sequence()
                logits += engine.step([(sequence, PROMPT[:120])])
                logits += [engine.step([(sequence, [token])])[0] for token in PROMPT[120:150]]
                hashes.add(np.concatenate(logits).tobytes())
    assert len(hashes) == 1
    logits = np.concatenate(logits)
    assert logits[119:150].tobytes() == logits[200:].tobytes()
    assert np.isfinite(logits).all()


@given(sts.token_batches(VOCAB), st.sampled_from([None, 1, 3, 8]), st.sampled_from(["all", "last"]))
def test_ragged_batches(engine: Engine, batch: list[list[int]], chunk: int | None, logits: str) -> None:
    items = [(engine.new_sequence(), tokens) for tokens in batch]
    results = engine.step(items, logits=logits, chunk=chunk)
    for (sequence, tokens), result in zip(items, results, strict=True):
        expected = whole(engine, tokens)
        assert sequence.n_past == len(tokens)
        assert result.tobytes() == (expected if logits == "all" else expected[-1:]).tobytes()


def test_batch_of_three_at_different_positions(engine: Engine) -> None:
    expected = whole(engine, PROMPT)
    sequences = [engine.new_sequence() for _ in range(3)]
    starts = (0, 130, 40)
    for sequence, start in zip(sequences, starts, strict=True):
        if start:
            engine.step([(sequence, PROMPT[:start])])
    for i in range(60):
        results = engine.step([(s, [PROMPT[s.n_past]]) for s in sequences])
        for start, result in zip(starts, results, strict=True):
            assert result[0].tobytes() == expected[start + i].tobytes()


@given(sts.chunkings(len(PROMPT)))
def test_prompts_fed_in_parts(engine: Engine, lengths: list[int]) -> None:
    sequence, start = engine.new_sequence(), 0
    for length in lengths:
        last = engine.step([(sequence, PROMPT[start : start + length])])[0]
        start += length
    assert last.tobytes() == whole(engine, PROMPT)[-1:].tobytes()


def test_rewind_and_replay(engine: Engine) -> None:
    expected = whole(engine, PROMPT)
    sequence = engine.new_sequence()
    engine.step([(sequence, PROMPT[:150] + [7] * 50)])
    for n in (150, 127, 1, 0):
        sequence.rewind(n)
        assert sequence.n_past == n
        replayed = engine.step([(sequence, PROMPT[n:])], logits="all")[0]
        assert replayed.tobytes() == expected[n:].tobytes()


def test_capture_does_not_depend_on_chunks(engine: Engine) -> None:
    names = ["embd", "blk.1.attn_norm", "blk.1.attn_heads", "output_norm", "logits"]
    captures: list[dict] = [dict.fromkeys(names), dict.fromkeys(names)]
    results = [
        engine.step([(engine.new_sequence(), PROMPT)], logits="all", chunk=chunk, capture=capture)[0]
        for chunk, capture in zip((None, 7), captures, strict=True)
    ]
    assert results[0].tobytes() == results[1].tobytes() == captures[0]["logits"].tobytes()
    for name in names:
        assert captures[0][name].tobytes() == captures[1][name].tobytes()
        assert len(captures[0][name]) == len(PROMPT)
    last: dict = dict.fromkeys(["logits", "embd"])
    engine.step([(engine.new_sequence(), PROMPT)], chunk=64, capture=last)
    assert (last["logits"].shape, last["embd"].shape) == ((1, VOCAB), (len(PROMPT), 64))


# Refusals


def test_context_full_changes_nothing(engine: Engine) -> None:
    full, other = engine.new_sequence(), engine.new_sequence()
    engine.step([(full, PROMPT), (other, PROMPT[:5])])
    message = "200 tokens in the context and 57 new ones do not fit into n_ctx = 256"
    with pytest.raises(ContextFullError, match=message):
        engine.step([(other, [1]), (full, PROMPT[:57])])
    assert (full.n_past, other.n_past) == (200, 5)
    follow = engine.step([(other, PROMPT[5:9]), (full, PROMPT[:56])])
    assert follow[0].tobytes() == whole(engine, PROMPT[:9])[-1:].tobytes()
    assert follow[1].tobytes() == whole(engine, PROMPT + PROMPT[:56])[-1:].tobytes()
    with pytest.raises(ContextFullError, match="256 tokens in the context and 1 new ones"):
        engine.step([(full, [1])])


@pytest.mark.parametrize("ids", [[], [[1, 2]], [1.0], ["1"], [True], None, [2**70]])
def test_what_is_no_token_list_is_refused(engine: Engine, ids: object) -> None:
    sequence = engine.new_sequence()
    with pytest.raises(WoollyError, match="expected at least one token id in a vector of integers, got "):
        engine.step([(sequence, ids)])
    assert sequence.n_past == 0


@pytest.mark.parametrize("token", [-1, VOCAB, 2**40, -(2**62)])
def test_tokens_out_of_range_are_refused(engine: Engine, token: int) -> None:
    sequence = engine.new_sequence()
    with pytest.raises(WoollyError, match=f"token id {token} is not in the vocabulary of 320"):
        engine.step([(sequence, [1, token])])
    assert sequence.n_past == 0


def test_unknown_options_are_refused(engine: Engine) -> None:
    sequence = engine.new_sequence()
    with pytest.raises(ValueError, match='step: logits must be "last" or "all", got \'none\''):
        engine.step([(sequence, [1])], logits="none")
    for chunk in (0, -1):
        with pytest.raises(ValueError, match=f"step: chunk must be at least 1, got {chunk}"):
            engine.step([(sequence, [1])], chunk=chunk)
    with pytest.raises(ValueError, match="step: a sequence may be in a step only once"):
        engine.step([(sequence, [1]), (sequence, [2])])
    with pytest.raises(ValueError, match="capture: no operation named nonsense"):
        engine.step([(sequence, [1])], capture={"nonsense": None})
    with pytest.raises(ValueError, match='cache_dtype must be "f16" or "f32", got \'q8_0\''):
        Engine(engine.program, engine.config, 10, cache_dtype="q8_0")
    assert sequence.n_past == 0


def test_no_items_are_no_work(engine: Engine) -> None:
    assert engine.step([]) == []


def test_rewind_refuses_positions_that_are_not_there(engine: Engine) -> None:
    sequence = engine.new_sequence()
    engine.step([(sequence, [1, 2])])
    for n in (-1, 3):
        with pytest.raises(ValueError, match=f"rewind: cannot go to {n}, the sequence has 2 positions"):
            sequence.rewind(n)


def test_numpy_ids_of_any_width(engine: Engine) -> None:
    expected = whole(engine, PROMPT[:5]).tobytes()
    for dtype in (np.int32, np.int64, np.uint16, np.uint64):
        sequence = engine.new_sequence()
        assert engine.step([(sequence, np.array(PROMPT[:5], dtype))], logits="all")[0].tobytes() == expected


def test_cache_bytes_are_those_of_a_sequence(engine: Engine) -> None:
    assert engine.kv_cache_bytes == engine.new_sequence().cache.nbytes


@given(st.lists(st.integers(1, 30), max_size=6), st.integers(1, 20))
def test_batches_cover_every_token_once_in_order(lengths: list[int], limit: int) -> None:
    batches = _batches(lengths, limit)
    covered = [(p.item, t) for batch in batches for p in batch for t in range(p.begin, p.end)]
    assert covered == [(item, t) for item, length in enumerate(lengths) for t in range(length)]
    sizes = [sum(p.end - p.begin for p in batch) for batch in batches]
    assert all(size == limit for size in sizes[:-1])
    assert all(1 <= size <= limit for size in sizes[-1:])
