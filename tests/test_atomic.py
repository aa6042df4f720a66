"""A name stands for the whole of a file, whatever happens while it is written."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from woolly.atomic import replacing

WRITER = """
import sys, time
from pathlib import Path
from woolly.atomic import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start_writer(path: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of writing the file."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_the_name_appears_at_the_end(tmp_path):
    path = tmp_path / "a.bin"
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]
    assert path.stat().st_mode & 0o400


def test_what_was_there_stays_where_writing_fails(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(IsADirectoryError), replacing(path) as temporary:
        temporary.write_bytes(tmp_path.read_bytes())
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with start_writer(path) as process:
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
    assert names(tmp_path) == ["a.bin"]
    assert path.read_bytes() == b"new"


def test_what_another_process_is_writing_stays(tmp_path):
    path, other = tmp_path / "a.bin", tmp_path / ".a.bin.notes"
    other.write_bytes(b"not ours")
    with start_writer(path) as process:
        with replacing(path) as temporary:
            temporary.write_bytes(b"new")
        assert len(names(tmp_path)) == 3
        process.kill()
    assert other.exists()


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "missing" / "a.bin"):
        pass
