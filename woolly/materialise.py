"""Work that goes on after a model has been handed out: recording its operations and generating its weights."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable

from woolly.errors import WoollyError

_running: weakref.WeakSet[Materialisation] = weakref.WeakSet()


class Materialisation:
    """Prepares a model on a thread of its own, which starts at once.

    Parameters
    ----------
    record : callable
        Records the model's operations: memory is reserved, the plan is known afterwards.
    fill_next : callable
        Makes one more matrix; False when all are made.

    Attributes
    ----------
    seconds : float or None
        From the start to the last matrix; None before that.
    """

    def __init__(self, record: Callable[[], None], fill_next: Callable[[], bool]) -> None:
        self.seconds: float | None = None
        self._record, self._fill_next = record, fill_next
        self._recorded, self._ended, self._cancelled = threading.Event(), threading.Event(), threading.Event()
        self._error: BaseException | None = None
        # A daemon, so that leaving does not wait for gigabytes; _cancel_all waits for the matrix in hand.
        self._thread = threading.Thread(target=self._run, name="woolly-materialise", daemon=True)
        _running.add(self)
        self._thread.start()

    def wait_recorded(self) -> None:
        """Wait until the operations are recorded. Raises as `wait` does."""
        if not self._recorded.is_set():
            self._recorded.wait()
        self._raise_error()

    def wait(self) -> None:
        """Wait until everything is there.

        Raises
        ------
        WoollyError
            It failed, or was cancelled.
        """
        if self.seconds is None:
            self._ended.wait()
            self._raise_error()

    def cancel(self) -> None:
        """Stop after the matrix in hand, and wait for that."""
        self._cancelled.set()
        self._thread.join()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self._record()
            self._recorded.set()
            while not self._cancelled.is_set():
                if not self._fill_next():
                    self.seconds = time.perf_counter() - started
                    break
        except BaseException as error:  # told to whoever waits
            self._error = error
        finally:
            self._recorded.set()
            self._ended.set()
            _running.discard(self)

    def _raise_error(self) -> None:
        if self._error is not None:
            kind = type(self._error).__name__
            raise WoollyError(f"generating the weights failed, {kind}: {self._error}") from self._error
        if self._ended.is_set() and self.seconds is None:
            raise WoollyError("the model was closed before its weights were generated")


def _lost_in_fork() -> None:
    """In a child of fork the thread that generates is not there: say so to whoever waits."""
    for materialisation in list(_running):
        materialisation._recorded, materialisation._ended = threading.Event(), threading.Event()
        materialisation._error = WoollyError("the process was forked while the weights were being generated")
        materialisation._recorded.set()
        materialisation._ended.set()
    _running.clear()


os.register_at_fork(after_in_child=_lost_in_fork)


@atexit.register
def _cancel_all() -> None:
    """No thread may still be in a kernel when the interpreter goes."""
    for materialisation in list(_running):
        materialisation.cancel()
