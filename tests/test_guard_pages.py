"""No kernel reads or writes past its buffers: see guard_pages.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def run(code: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *code], capture_output=True, text=True, timeout=300, check=False)


def test_kernels_stay_inside_their_buffers(isa: str) -> None:
    done = run([str(FOLDER / "guard_pages.py"), isa])
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 1000


def test_the_guard_is_there() -> None:
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import guard_pages as g; a = g.guarded(7, 'u1');"
    code += "import ctypes; a[6] = 1; print(ctypes.string_at(a.ctypes.data + %d, 1))"
    assert run(["-c", code % 6]).returncode == 0
    assert run(["-c", code % 7]).returncode == (1 if "ASAN_OPTIONS" in os.environ else -11)  # or the sanitizer tells it
