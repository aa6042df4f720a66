"""Ending a computation from outside: cancel, deadlines, Ctrl-C, closing the model; and what is left after it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from make_gguf import write_tiny_llama

import woolly
from woolly._kernels import Stop
from woolly.errors import CancelledError, WoollyError
from woolly.model import Model
from woolly.session import Session

PROMPT = [3 + i % 250 for i in range(6000)]
PROMISED_S = 0.05
SLACK_S = 0.35  # a busy machine may not run the thread that asks, or the one that is asked, at once
SIZES = {"hidden": 512, "head_dim": 64, "n_heads": 8, "intermediate": 2048, "n_layers": 12}
DECODE_S = 0.8 if not {"ASAN_OPTIONS", "TSAN_OPTIONS"} & set(os.environ) else 8  # for a few tokens
if "TSAN_OPTIONS" in os.environ:  # which computes some hundred times as slowly
    SLACK_S, SIZES = 10, {"hidden": 64, "head_dim": 32, "n_heads": 2, "intermediate": 64, "n_layers": 4}
ANOTHER_USES_IT = "the session is in use by another thread: give each thread a session of its own"


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A model that takes seconds to read its prompt, in layers of a few milliseconds."""
    path = write_tiny_llama(tmp_path_factory.mktemp("interrupt") / "slow.gguf", **SIZES, n_ctx=8192)
    with woolly.load_gguf(path, n_ctx=8192, n_threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def expected(slow: Model) -> list[int]:
    return slow.generate(PROMPT[:40], max_tokens=6, temperature=0).tokens


def later(action: Callable[[], object], after_s: float = 0.15) -> list[float]:
    """Do something after a while on another thread; the list gets the time at which it was done."""
    done: list[float] = []

    def act() -> None:
        done.append(time.perf_counter())
        action()

    threading.Timer(after_s, act).start()
    return done


def check_latency(asked: list[float]) -> None:
    assert time.perf_counter() - asked[0] < PROMISED_S + SLACK_S


def check_usable(session: Session, expected: list[int]) -> None:
    """What it says it holds is true, and the next answer is what it would have been."""
    held = session.tokens
    assert held == PROMPT[: len(held)]
    assert session.generate(PROMPT[:40], max_tokens=6, temperature=0).tokens == expected


def test_cancel_ends_prefill(slow: Model, expected: list[int]) -> None:
    session = slow.session()
    asked = later(session.cancel)
    with pytest.raises(CancelledError, match="the step was cancelled"):
        session.generate(PROMPT, max_tokens=2)
    check_latency(asked)
    check_usable(session, expected)


def test_cancel_ends_feed(slow: Model, expected: list[int]) -> None:
    session = slow.session()
    asked = later(session.cancel)
    with pytest.raises(CancelledError, match="the step was cancelled"):
        session.feed(PROMPT)
    check_latency(asked)
    assert 0 <= session.n_past < len(PROMPT)
    session.rewind(0)
    assert session.feed(PROMPT[:40]).tobytes() == slow.forward(PROMPT[:40])[-1].tobytes()
    check_usable(session, expected)


def test_cancel_ends_decode(slow: Model, expected: list[int]) -> None:
    session = slow.session()
    stream = session.stream(PROMPT[:40], max_tokens=6, temperature=0)
    tokens = [next(stream).token for _ in range(3)]
    session.cancel()
    with pytest.raises(CancelledError, match="the step was cancelled"):
        list(stream)
    assert tokens == expected[:3]
    assert session.generate(PROMPT[:40], max_tokens=6, temperature=0).tokens == expected


def test_cancel_does_not_reach_later_requests(slow: Model, expected: list[int]) -> None:
    session = slow.session()
    session.cancel()
    assert session.generate(PROMPT[:40], max_tokens=6, temperature=0).tokens == expected
    session.cancel()
    assert session.feed([5]).shape == (320,)


def test_deadline_ends_prefill(slow: Model, expected: list[int]) -> None:
    session = slow.session()
    for ask in (
        lambda: session.generate(PROMPT, max_tokens=2, timeout_s=0.2),
        lambda: session.feed(PROMPT[:2000], timeout_s=0.1),
    ):
        session.rewind(0)
        started = time.perf_counter()
        with pytest.raises(CancelledError, match="the step was ended at its deadline"):
            ask()
        assert time.perf_counter() - started < 0.2 + PROMISED_S + SLACK_S
        check_usable(session, expected)


def test_deadline_ends_decode(slow: Model, expected: list[int]) -> None:
    session = slow.session()
    stream = session.stream(PROMPT[:40], max_tokens=6, temperature=0, timeout_s=DECODE_S)
    assert [next(stream).token for _ in range(3)] == expected[:3]
    time.sleep(DECODE_S)
    with pytest.raises(CancelledError, match="the step was ended at its deadline"):
        next(stream)
    assert session.generate(PROMPT[:40], max_tokens=6, temperature=0, timeout_s=60).tokens == expected


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), True, "1"])
def test_deadlines_are_positive(slow: Model, timeout_s: object) -> None:
    with pytest.raises(ValueError, match="timeout_s must be a number of seconds above 0, got"):
        slow.generate(PROMPT[:4], timeout_s=timeout_s)


def test_ctrl_c_ends_prefill(slow: Model, expected: list[int]) -> None:
    session = slow.session()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        asked = later(lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            session.generate(PROMPT, max_tokens=2)
        check_latency(asked)
    finally:
        signal.signal(signal.SIGINT, before)
    check_usable(session, expected)


def test_a_session_that_waits_for_another_can_be_cancelled(slow: Model, expected: list[int]) -> None:
    """Steps take turns; who waits for his turn gives up as fast as who computes."""
    first, second = slow.session(), slow.session()
    stop = Stop()
    stop.cancel()
    with pytest.raises(CancelledError, match="the step was cancelled"):
        slow.engine.step([(second._sequence, [1])], stop=stop)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(first.generate, PROMPT, max_tokens=2)
        time.sleep(0.05)
        asked = later(second.cancel, 0.1)
        with pytest.raises(CancelledError, match="the step was cancelled"):
            second.generate(PROMPT, max_tokens=1)
        check_latency(asked)
        first.cancel()
        with pytest.raises(CancelledError, match="the step was cancelled"):
            running.result()
    check_usable(second, expected)


def test_closing_a_model_in_use_raises_in_the_users(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", hidden=256, head_dim=64, n_heads=4, intermediate=1024, n_layers=8,
                            n_ctx=8192)  # fmt: skip
    model = woolly.load_gguf(path, n_ctx=8192, n_threads=2)
    sessions = [model.session() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        users = [pool.submit(session.generate, PROMPT, max_tokens=100) for session in sessions]
        time.sleep(0.2)
        model.close()
        started = time.perf_counter()
        for user in users:
            with pytest.raises(WoollyError, match="the model was closed"):
                user.result()
        assert time.perf_counter() - started < PROMISED_S + SLACK_S
    for use in (model.session, lambda: sessions[0].feed([1]), lambda: model.forward([1])):
        with pytest.raises(WoollyError, match="the model was closed"):
            use()
    with pytest.raises(WoollyError, match="the model was closed"):
        model.engine.step([(model.engine.new_sequence(), [1])])


# One thread and one answer at a time


def test_two_threads_cannot_use_one_session(slow: Model) -> None:
    session = slow.session()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(session.feed, PROMPT)
        time.sleep(0.1)
        for use in (lambda: session.feed([1]), lambda: session.rewind(0), lambda: session.generate("a", max_tokens=1)):
            with pytest.raises(WoollyError, match=ANOTHER_USES_IT):
                use()
        session.cancel()
        with pytest.raises(CancelledError):
            running.result()


def test_interleaved_streams_do_not_mix(slow: Model, expected: list[int]) -> None:
    message = "the session has been used for something else since this answer's last piece"
    session = slow.session()
    for disturb in (
        lambda: next(session.stream(PROMPT[2:20], temperature=0)),
        lambda: session.feed([7]),
        lambda: session.rewind(3),
    ):
        stream = session.stream(PROMPT[:40], max_tokens=6, temperature=0)
        assert [next(stream).token for _ in range(2)] == expected[:2]
        disturb()
        with pytest.raises(WoollyError, match=message):
            next(stream)
    assert session.generate(PROMPT[:40], max_tokens=6, temperature=0).tokens == expected


def test_threads_with_sessions_of_their_own_get_what_one_gets(slow: Model) -> None:
    prompts = [PROMPT[i : i + 9 + 3 * i] for i in range(6)]

    def answer(prompt: list[int]) -> tuple[list[int], str]:
        completion = slow.generate(prompt, max_tokens=4, seed=len(prompt), temperature=0.9)
        return completion.tokens, completion.text

    serial = [answer(prompt) for prompt in prompts]
    logits = [slow.forward(prompt[:20]).tobytes() for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(answer, prompts)) == serial
        assert list(pool.map(lambda prompt: slow.forward(prompt[:20]).tobytes(), prompts)) == logits


def test_other_threads_run_while_kernels_do(slow: Model) -> None:
    """The GIL is free: pure Python gets on while a prompt is read."""
    session = slow.session()
    with ThreadPoolExecutor(1) as pool:
        running, n = pool.submit(session.feed, PROMPT), 0
        started = time.perf_counter()
        while time.perf_counter() - started < 0.5 and not running.done():
            n += 1
        session.cancel()
        with pytest.raises(CancelledError):
            running.result()
    assert n > 10_000


@pytest.mark.parametrize("ids", [["12"], [1.0], [1.7, 2], [True], [None], [np.float32(1)], [[1]], [b"1"]])
def test_ids_are_integers(slow: Model, ids: list[object]) -> None:
    session = slow.session()
    for use in (session.feed, session.generate):
        with pytest.raises(WoollyError, match="token ids are integers, got"):
            use(ids)
    for text in ("12", b"12"):
        with pytest.raises(WoollyError, match=r"expected a sequence of token ids, got (str|bytes)"):
            session.feed(text)
    assert session.feed([np.int64(5), np.uint8(6)]).tobytes() == slow.forward([5, 6])[-1].tobytes()
