"""Sessions: text in and out, stop strings, prefix reuse, and what a broken-off answer leaves behind."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_gguf import write_tiny_llama

import woolly
from woolly.errors import ContextFullError, WoollyError
from woolly.model import Model
from woolly.session import Session, _StopText

PROMPT = [int(t) for t in np.random.default_rng(0).integers(3, 259, 60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("session") / "tiny.gguf"
    return woolly.load_gguf(write_tiny_llama(path, dtype="q8_0"), n_threads=2)


def scripted(model: Model, text: str, *, vocab: int = 320) -> Session:
    """A session whose model says exactly this text, byte by byte, and then its end-of-sequence token."""
    session = model.session()
    script = [*model.tokenizer.encode(text), model.tokenizer.eos_id]
    plain_feed, said = session.feed, iter(script)

    def feed(ids: list[int], **options: object) -> np.ndarray:
        plain_feed(ids, **options)
        logits = np.zeros(vocab, np.float32)
        logits[next(said)] = 100
        return logits

    session.feed = feed  # type: ignore[method-assign]
    return session


# Feeding


def test_feed_gives_the_logits_of_forward(model: Model) -> None:
    expected = model.forward(PROMPT)
    session = model.session()
    assert session.feed(PROMPT[:20], logits="all").tobytes() == expected[:20].tobytes()
    assert session.feed(PROMPT[20:50], chunk=7).tobytes() == expected[49].tobytes()
    assert (session.n_past, session.tokens) == (50, PROMPT[:50])
    assert session.feed(np.array(PROMPT[50:])).tobytes() == expected[-1].tobytes()


def test_rewind_and_replay(model: Model) -> None:
    session = model.session()
    expected = session.feed(PROMPT)
    session.feed([5, 6, 7])
    session.rewind(40)
    assert session.tokens == PROMPT[:40]
    assert session.feed(PROMPT[40:]).tobytes() == expected.tobytes()
    for n in (-1, 61):
        with pytest.raises(ValueError, match=f"rewind: cannot go to {n}, the sequence has 60 positions"):
            session.rewind(n)
    assert session.tokens == PROMPT


def test_refused_tokens_change_nothing(model: Model) -> None:
    session = model.session()
    session.feed(PROMPT)
    with pytest.raises(WoollyError, match="token id 320 is not in the vocabulary of 320"):
        session.feed([1, 320])
    with pytest.raises(WoollyError, match="expected at least one token id"):
        session.feed([])
    with pytest.raises(ValueError, match="logits must be"):
        session.feed([1], logits="none")
    with pytest.raises(ContextFullError, match="60 tokens in the context and 200 new ones do not fit into n_ctx = 256"):
        session.feed([1] * 200)
    assert session.tokens == PROMPT
    assert session.feed([9]).tobytes() == model.forward([*PROMPT, 9])[-1].tobytes()


# Answers


def test_streamed_text_is_the_completions_text(model: Model) -> None:
    pieces = list(model.stream("Hello there", max_tokens=40, temperature=1.5, seed=3))
    *rest, last = pieces
    completion = last.completion
    assert completion is not None
    assert "".join(piece.text for piece in pieces) == completion.text
    assert [piece.token for piece in rest] == completion.tokens
    assert all(piece.completion is piece.finish_reason is None for piece in rest)
    assert last.token is None
    assert last.finish_reason == completion.finish_reason
    assert completion.text == model.tokenizer.decode(completion.tokens)
    again = model.generate("Hello there", max_tokens=40, temperature=1.5, seed=3)
    assert (again.text, again.tokens) == (completion.text, completion.tokens)


@pytest.mark.parametrize("max_tokens", [1, 2, 17])
def test_max_tokens(model: Model, max_tokens: int) -> None:
    completion = model.generate(PROMPT, max_tokens=max_tokens, temperature=0)
    assert (completion.completion_tokens, completion.finish_reason) == (max_tokens, "length")
    assert completion.prompt_tokens == len(PROMPT)


def test_greedy_follows_forward(model: Model) -> None:
    tokens = model.generate(PROMPT, max_tokens=12, temperature=0).tokens
    logits = model.forward(PROMPT + tokens)[len(PROMPT) - 1 : -1]
    assert logits.argmax(axis=1).tolist() == tokens


def test_the_end_of_generation_stops(model: Model) -> None:
    pieces = list(scripted(model, "Yes.").stream("Is it?", temperature=0))
    assert "".join(piece.text for piece in pieces) == "Yes."
    assert pieces[-1].completion.finish_reason == "stop"
    assert pieces[-1].completion.tokens == model.tokenizer.encode("Yes.")
    nothing = scripted(model, "").generate("Is it?", temperature=0)
    assert (nothing.text, nothing.tokens, nothing.finish_reason) == ("", [], "stop")


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("lazy", "The quick brown fox ", "stop"),
        (["zzz", "fox l", "quick"], "The ", "stop"),
        ("x lazy d", "The quick brown fo", "stop"),
        ("dogs", "The quick brown fox lazy dog", "stop"),  # it only begins: nothing is lost at the end
        ("T", "", "stop"),
        ("The quick brown fox lazy dog", "", "stop"),
        ((), "The quick brown fox lazy dog", "stop"),
    ],
)
def test_stop_strings_across_tokens(model: Model, stop: str | list[str], text: str, reason: str) -> None:
    pieces = list(scripted(model, "The quick brown fox lazy dog").stream("Say it", stop=stop, temperature=0))
    assert "".join(piece.text for piece in pieces) == text
    assert pieces[-1].completion.text == text
    assert pieces[-1].finish_reason == reason
    for piece in pieces:
        assert not piece.text or not any(s in piece.text for s in ([stop] if isinstance(stop, str) else stop))


def test_text_is_cut_at_code_points(model: Model) -> None:
    text = "naïve 😀 日本"
    pieces = list(scripted(model, text).stream("Say it", temperature=0))
    assert "".join(piece.text for piece in pieces) == text
    assert all("\ufffd" not in piece.text for piece in pieces)
    stopped = scripted(model, text).generate("Say it", stop="日本", temperature=0)
    assert stopped.text == "naïve 😀 "


@pytest.mark.parametrize("stop", ["\ufffd", "a\ufffd"])
def test_a_stop_string_may_come_with_the_last_bytes(model: Model, stop: str) -> None:
    """An answer that breaks off inside a character ends with U+FFFD, which a stop string may hold."""
    first_byte = model.tokenizer.encode("😀")[:1]
    session = model.session()
    plain_feed, said = session.feed, iter([*model.tokenizer.encode("bba"), *first_byte])

    def feed(ids: list[int]) -> np.ndarray:
        plain_feed(ids)
        return np.eye(320, dtype=np.float32)[next(said)]

    session.feed = feed  # type: ignore[method-assign]
    pieces = list(session.stream("Say it", stop=stop, max_tokens=4, temperature=0))
    text = "bba\ufffd".split(stop)[0]
    assert pieces[-1].completion.text == text
    assert "".join(piece.text for piece in pieces) == text
    assert pieces[-1].finish_reason == "stop"


def test_bad_options_are_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        model.generate("Hi", max_tokens=0)
    for stop in (["a", ""], [1], ""):
        with pytest.raises(ValueError, match="stop strings must be strings of at least one character, got "):
            model.generate("Hi", stop=stop)
    with pytest.raises(TypeError, match="temprature"):
        model.generate("Hi", temprature=1)
    with pytest.raises(WoollyError, match="the prompt is empty: there is nothing to continue"):
        model.generate("")
    with pytest.raises(ContextFullError, match="the prompt has 300 tokens, n_ctx is 256"):
        model.generate([1] * 300)


def test_an_answer_that_outgrows_the_context_is_an_error(model: Model) -> None:
    session, pieces = model.session(), []
    with pytest.raises(ContextFullError, match="256 tokens in the context and 1 new ones do not fit"):
        pieces.extend(session.stream(PROMPT * 4, max_tokens=100, temperature=0))
    assert session.n_past == 256


# What the cache already holds


def test_a_shared_prefix_gives_the_same_bits(model: Model) -> None:
    session, expected = model.session(), model.generate(PROMPT, max_tokens=10, temperature=0)
    first = session.generate(PROMPT[:50], max_tokens=5, temperature=0)
    fed: list[int] = []
    plain_feed = session.feed

    def feed(ids: list[int], **options: object) -> np.ndarray:
        fed.append(len(ids))
        return plain_feed(ids, **options)

    session.feed = feed  # type: ignore[method-assign]
    assert session.generate(PROMPT, max_tokens=10, temperature=0).tokens == expected.tokens
    n_shared = 50 + int(first.tokens[0] == PROMPT[50])
    assert fed[0] == len(PROMPT) - n_shared
    fed.clear()
    assert session.generate(PROMPT, max_tokens=10, temperature=0).tokens == expected.tokens
    assert fed[0] == 1  # the last token's logits are wanted, all else is there
    other = [5, *PROMPT]
    assert session.generate(other, max_tokens=3, temperature=0).tokens == (
        model.generate(other, max_tokens=3, temperature=0).tokens
    )


def test_a_refused_prompt_keeps_the_cache(model: Model) -> None:
    session = model.session()
    session.generate(PROMPT, max_tokens=3, temperature=0)
    before = session.tokens
    with pytest.raises(ContextFullError):
        session.generate([*PROMPT, *[1] * 300])
    assert session.tokens == before


def test_a_closed_stream_leaves_a_usable_session(model: Model) -> None:
    expected = model.generate(PROMPT, max_tokens=10, temperature=0).tokens
    session = model.session()
    stream = session.stream(PROMPT, max_tokens=10, temperature=0)
    assert [next(stream).token for _ in range(3)] == expected[:3]
    stream.close()
    assert session.tokens == [*PROMPT, *expected[:2]]
    assert session.generate(PROMPT, max_tokens=10, temperature=0).tokens == expected


def test_ctrl_c_leaves_a_usable_session(tmp_path: Path) -> None:
    path = write_tiny_llama(
        tmp_path / "slow.gguf", hidden=512, head_dim=64, n_heads=8, intermediate=2048, n_layers=12, n_ctx=8192
    )
    with woolly.load_gguf(path, n_ctx=8192, n_threads=2) as model:
        prompt = [3 + i % 250 for i in range(8000)]
        session = model.session()
        session.feed(prompt[:5])
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            session.feed(prompt[5:])
        # whole batches may have been done: what the session says it holds is true
        assert session.tokens == prompt[: session.n_past]
        assert 5 <= session.n_past < 8000
        session.rewind(5)
        assert session.feed(prompt[5:40]).tobytes() == model.forward(prompt[:40])[-1].tobytes()


def test_timing_tells_what_was_computed(model: Model) -> None:
    session = model.session()
    timing = session.generate(PROMPT, max_tokens=5, temperature=0).timing
    assert (timing.threads, timing.isa, timing.load_s) == (2, model.isa, model.load_s)
    assert 0 < timing.ttft_s < 10
    assert timing.prefill_tokens_per_s > 0
    assert timing.decode_tokens_per_s > 0
    assert session.generate(PROMPT, max_tokens=1, temperature=0).timing.decode_tokens_per_s == 0


# Text held back


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_text_does_not_depend_on_how_text_comes(whole: str, stops: list[str], data: st.DataObject) -> None:
    text, out, start = _StopText(tuple(stops)), "", 0
    while start < len(whole) and not text.stopped:
        end = data.draw(st.integers(start + 1, len(whole)))
        out += text.add(whole[start:end])
        start = end
    out += text.flush()
    assert out == text.whole
    found = [at for at in (whole.find(stop) for stop in stops) if at >= 0]
    assert text.stopped == bool(found)
    # the stop string that is complete first ends the text; of those, the one that begins first
    if found:
        end = min(at + len(stop) for stop in stops if (at := whole.find(stop)) >= 0)
        assert whole.startswith(out)
        assert len(out) < end
        assert not any(stop in out for stop in stops)
    else:
        assert out == whole
