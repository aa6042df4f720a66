"""What every mode shares: taking times, statistics, rows for people and for programs, a progress bar.

A mode is a generator of rows, dicts that JSON can hold. It knows nothing of how they are shown; Ctrl-C ends it and
what it has given is kept.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

Row = dict[str, Any]

MIN_SAMPLE_S = 0.004  # a sample repeats what is faster than this: clocks and interrupts cost some microseconds


@dataclass
class Bench:
    """What a mode is given beside its own options.

    Attributes
    ----------
    n_threads : int
    repeat : int
        Samples of each measurement.
    progress : Progress
    """

    n_threads: int
    repeat: int = 5
    progress: Progress = field(default_factory=lambda: Progress(is_shown=False))


def sample(call: Callable[[], object], *, repeat: int, min_s: float = MIN_SAMPLE_S) -> list[float]:
    """Seconds that a call takes, `repeat` times, each over as many calls as fill min_s; one call before warms up."""
    call()
    started = time.perf_counter()
    call()
    once_s = max(time.perf_counter() - started, 1e-9)
    n = max(1, math.ceil(min_s / once_s))
    samples = []
    for _ in range(repeat):
        started = time.perf_counter()
        for _ in range(n):
            call()
        samples.append((time.perf_counter() - started) / n)
    return samples


def median(samples: Sequence[float]) -> float:
    """The middle sample."""
    return statistics.median(samples)


def spread(samples: Sequence[float]) -> float:
    """Standard deviation, 0 for a single sample."""
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


class Progress:
    """A bar on stderr while a mode runs, where that is a terminal.

    Parameters
    ----------
    is_shown : bool, optional
        By default whether stderr is a terminal.
    """

    def __init__(self, *, is_shown: bool | None = None) -> None:
        self._bar: Any = None
        self._task: Any = None
        if sys.stderr.isatty() if is_shown is None else is_shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)

    def start(self, mode: str, total: int) -> None:
        """Begin a mode of `total` measurements."""
        if self._bar is not None:
            self._task = self._bar.add_task(mode, total=total)

    def step(self, what: str) -> None:
        """Say what is measured now; what was before counts as done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=what, advance=1)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def collect(rows: Iterator[Row], *, as_json: bool) -> tuple[list[Row], bool]:
    """All rows of a mode, each printed at once for a program to read if asked for; and whether Ctrl-C ended it."""
    done: list[Row] = []
    try:
        for row in rows:
            done.append(row)
            if as_json:
                print(json.dumps(row, allow_nan=False), flush=True)
    except KeyboardInterrupt:
        return done, True
    return done, False


def print_rows(rows: Sequence[Row], columns: Sequence[tuple[str, str, str]], *, title: str | None = None) -> None:
    """A table of rows: columns are (key, heading, format spec); a heading that begins with `>` is to the right."""
    from woolly.terminal import print_table

    keys = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    cells = [[format_cell(row.get(key), spec) for key, _, spec in keys] for row in rows]
    print_table([heading for _, heading, _ in keys], cells, title=title)


def format_cell(value: Any, spec: str) -> str:
    """A value by a format spec, or "us" or "ms" for seconds, "MB" or "GB" for bytes; empty for None."""
    if value is None:
        return ""
    if spec == "us":
        return f"{value * 1e6:,.1f}"
    if spec == "ms":
        return f"{value * 1e3:,.2f}"
    if spec == "MB":
        return f"{value / (1 << 20):,.0f}"
    if spec == "GB":
        return f"{value / 1e9:.3f}"
    return format(value, spec)
