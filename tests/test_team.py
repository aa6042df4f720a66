"""The turns that threads take together (team.h), under ThreadSanitizer: no race, and weaker orders would be seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
HEADERS = FOLDER.parent / "woolly/_kernels/c"
FLAGS = ["-std=gnu11", "-O1", "-g", "-fsanitize=thread", f"-I{HEADERS}"]
RACE = 66  # what ThreadSanitizer exits with

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or not sys.platform.startswith("linux") or not HEADERS.is_dir(),
    reason="needs gcc, Linux and the sources",
)


def build(folder: Path, *flags: str) -> Path:
    """The program that goes through turns; skips where there is no ThreadSanitizer."""
    program = folder / "stress"
    command = ["gcc", *FLAGS, *flags, str(FOLDER / "team_stress.c"), "-o", str(program), "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no program with ThreadSanitizer can be built here: {done.stderr[-300:]}")
    return program


def run(program: Path, n_threads: int, n_turns: int) -> subprocess.CompletedProcess[str]:
    # A sanitizer that is loaded already, as .ci/sanitize does, would be in this one's way
    env = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"} | {"TSAN_OPTIONS": "halt_on_error=1"}
    command = [str(program), str(n_threads), str(n_turns)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_turns_are_free_of_races(tmp_path: Path) -> None:
    program = build(tmp_path)
    for n_threads in (1, 2, 3, 5, 16):
        done = run(program, n_threads, 2000)
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("ThreadSanitizer does not run on this kernel")
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("order", ["ACQ_REL", "RELEASE"])
def test_weaker_orders_would_be_found(tmp_path: Path, order: str) -> None:
    program = build(tmp_path, f"-U__ATOMIC_{order}", f"-D__ATOMIC_{order}=__ATOMIC_RELAXED")
    codes = [run(program, 5, 2000).returncode for _ in range(3)]
    assert RACE in codes
