"""What the commands share in writing to a terminal: escaping, tables, sizes in words. Knows nothing of models."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

# C0 and C1 controls but for newline and tab, which could move the cursor or worse; lone surrogates, which no stream
# can encode; the bidirectional overrides, which make a line read other than it is.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_PIPE_COLUMNS = 240


def escape_controls(text: str) -> str:
    """`text` with what could take control of a terminal written out as escapes; newline and tab stay."""
    return _UNSAFE.sub(lambda match: _escape(ord(match[0])), text)


def one_line(text: str) -> str:
    """`text` escaped and on one line."""
    return escape_controls(" ".join(text.split()))


def write(text: str) -> None:
    """Write model output to stdout at once; escaped where stdout is a terminal, as it is where it is a pipe."""
    sys.stdout.write(escape_controls(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """A line for the user on stderr."""
    print(one_line(text), file=sys.stderr, flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """A table on stdout; a column whose name begins with `>` is aligned to the right."""
    from rich.table import Table

    table = Table(title=None if title is None else _safe(title), title_justify="left", box=None, pad_edge=False)
    for column in columns:
        is_right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if is_right else "left", no_wrap=is_right)
    for row in rows:
        table.add_row(*(_safe(str(cell)) for cell in row))
    _console().print(table)


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Names and values in two columns on stdout."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(_safe(name), _safe(str(value)))
    _console().print(table)


@contextlib.contextmanager
def progress_bar(name: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the bytes done so far; the bar is drawn on stderr, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda n_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), DownloadColumn()]
    columns += [TransferSpeedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(one_line(name), total=total_bytes)
        yield lambda n_bytes: bar.update(task, completed=n_bytes)


def format_bytes(n_bytes: int) -> str:
    """A size with three significant digits or so: 812 B, 98.4 MB, 1.25 GB (powers of 1000)."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    size = float(n_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.95 or unit == "TB":
            break
    return f"{size:.2f} {unit}" if size < 10 else f"{size:.1f} {unit}"


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _safe(text: str) -> Any:
    from rich.text import Text  # plain text: brackets in it are not rich's markup

    return Text(one_line(text))


def _console() -> Any:
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process
            raise BrokenPipeError

    width = None if sys.stdout.isatty() else _PIPE_COLUMNS  # a pipe has no width to fit into
    return PipeConsole(file=sys.stdout, highlight=False, width=width)
