"""A child of a process that has already generated works, on one thread, or says what is wrong; it never hangs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from make_gguf import write_tiny_llama

SETUP = """
import hashlib, multiprocessing, os, sys, threading, time, warnings
import woolly
from woolly._kernels.threads import FORK_WARNING

path = sys.argv[1]

def digest(model):
    return hashlib.sha256(model.forward(list(range(3, 40))).tobytes()).hexdigest()

def in_child(task):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = task()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + 30
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            return "it hung"
        time.sleep(0.005)
    return os.read(reader, 1 << 16).decode()
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("fork") / "tiny.gguf", dtype="q8_0", n_layers=3)


def run(code: str, path: Path) -> None:
    """Run code in a process of its own; its assertions must hold."""
    program = SETUP + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, str(path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_child_computes_the_same_bits_on_one_thread(path: Path) -> None:
    run(
        """
        model = woolly.load_gguf(path, n_threads=4)
        expected = digest(model)
        def task():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                digests = {digest(model), digest(model)}
                assert digests == {expected}, digests
            assert [str(w.message) for w in caught] == [FORK_WARNING], caught
            return model.generate("Hello", max_tokens=5, temperature=0).text
        assert in_child(task) == model.generate("Hello", max_tokens=5, temperature=0).text
        assert in_child(lambda: in_child(task)) == model.generate("Hello", max_tokens=5, temperature=0).text
        assert digest(model) == expected
        """,
        path,
    )


def test_a_child_can_load_and_the_parent_goes_on(path: Path) -> None:
    run(
        """
        warnings.simplefilter("ignore")
        model = woolly.load_gguf(path, n_threads=2)
        expected = digest(model)
        def task():
            mine = woolly.load_gguf(path, n_threads=2)
            return f"{digest(mine)} {mine.n_threads}"
        assert in_child(task) == f"{expected} 1"
        assert digest(model) == expected
        """,
        path,
    )


def test_a_child_of_a_parent_that_never_computed_has_all_threads(path: Path) -> None:
    run(
        """
        warnings.simplefilter("error")
        def task():
            mine = woolly.load_gguf(path, n_threads=2)
            return f"{digest(mine)} {mine.n_threads}"
        first, second = in_child(task), in_child(task)
        assert first == second and first.endswith(" 2"), (first, second)
        """,
        path,
    )


def test_a_fork_while_another_thread_computes(path: Path) -> None:
    """The lock that the other thread holds, and its threads, are not there in the child."""
    run(
        """
        warnings.simplefilter("ignore")
        model = woolly.load_gguf(path, n_threads=2)
        expected = digest(model)
        stop = False
        def compute():
            while not stop:
                model.forward([5] * 200)
        thread = threading.Thread(target=compute)
        thread.start()
        answers = {in_child(lambda: digest(model)) for _ in range(10)}
        stop = True
        thread.join()
        assert answers == {expected}, answers
        """,
        path,
    )


def test_a_session_that_computes_in_another_thread_is_refused_in_the_child(path: Path) -> None:
    run(
        """
        warnings.simplefilter("ignore")
        model = woolly.load_gguf(path, n_threads=2)
        session, ready, go_on = model.session(), threading.Event(), threading.Event()
        def hold():
            with session._alone():
                ready.set()
                go_on.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        ready.wait()
        answer = in_child(lambda: str(session.feed([5])))
        go_on.set()
        thread.join()
        assert answer.startswith("WoollyError: the session is in use by another thread"), answer
        """,
        path,
    )


def test_a_model_that_is_being_generated_says_so(path: Path) -> None:
    run(
        """
        model = woolly.load_fast_fp32(hidden_size=2048, n_layers=8, n_heads=16, vocab_size=1000, intermediate_size=4096,
                                      n_ctx=64)
        answer = in_child(lambda: str(model.generate("a", max_tokens=1)))
        model.close()
        assert "the process was forked while the weights were being generated" in answer, answer
        """,
        path,
    )


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_processes_work(path: Path, tmp_path: Path, method: str) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        SETUP
        + textwrap.dedent(
            f"""
            def task(path):
                return digest(woolly.load_gguf(path, n_threads=2))

            if __name__ == "__main__":
                expected = task(path)
                with multiprocessing.get_context({method!r}).Pool(1) as pool:
                    assert pool.apply(task, (path,)) == expected
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script), str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
