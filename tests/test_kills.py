"""Commands that write model files: kill -9 at any moment, a full disk, two at once. A name stands for a whole file."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from make_folder import folder_from_gguf
from make_gguf import write_tiny_llama

from woolly import cli

N_KILLS = int(os.environ.get("WOOLLY_KILLS", "20"))
SIZES = {"n_layers": 4, "hidden": 256, "head_dim": 64, "intermediate": 1024, "vocab": 1024}
OPTIONS = {"convert": ["--dtype", "q8_0"], "quantize": ["q4_0"], "dequantize": ["--dtype", "f32"]}

# of fork, where there are threads; and of the child, that it computes on one thread
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each command reads."""
    folder = tmp_path_factory.mktemp("kills")
    gguf = write_tiny_llama(folder / "source.gguf", **SIZES, tied=False)
    return {"convert": folder_from_gguf(gguf, folder / "folder"), "quantize": gguf, "dequantize": gguf}


@pytest.fixture(params=OPTIONS)
def command(request: pytest.FixtureRequest, sources: dict[str, Path], tmp_path: Path) -> list[str]:
    """The words of a command; the third is the file that it writes, in a folder of its own."""
    out = tmp_path / "out" / ("out.safetensors" if request.param == "dequantize" else "out.gguf")
    out.parent.mkdir()
    return [request.param, str(sources[request.param]), str(out), *OPTIONS[request.param]]


def expected_bytes(command: list[str]) -> bytes:
    """What the command writes where nothing disturbs it."""
    out = Path(command[2])
    assert cli.main(command) == 0
    data = out.read_bytes()
    out.unlink()
    return data


def start(action: Callable[[], int]) -> int:
    """A child process that exits with what the action returns."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = action()
        finally:
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_kills_leave_no_half_written_file(command: list[str]) -> None:
    """Many times (WOOLLY_KILLS): the name has the whole file or what it had before, and the next run cleans up."""
    out, forced = Path(command[2]), [*command, "--force", "--threads", "1"]
    whole, old = expected_bytes(command), b"what was there before"
    started = time.perf_counter()
    assert exit_code(start(lambda: cli.main(forced))) == 0
    whole_s = time.perf_counter() - started
    rng, n_runs, n_killed, most_left = random.Random(0), 0, 0, 0
    while n_killed < N_KILLS:
        n_runs += 1
        out.unlink(missing_ok=True)
        if n_runs % 2:
            out.write_bytes(old)
        child = start(lambda: cli.main(forced))
        time.sleep(rng.uniform(0, whole_s))
        os.kill(child, signal.SIGKILL)
        code = exit_code(child)
        assert code in (0, -signal.SIGKILL)
        n_killed += code != 0
        if n_runs % 2 or code == 0:
            assert out.read_bytes() in ((whole,) if code == 0 else (old, whole))
        else:
            assert not out.exists() or out.read_bytes() == whole
        left = [path for path in out.parent.iterdir() if path != out]
        most_left = max(most_left, len(left))
        assert len(left) <= 1  # each one cleans up after the one before
        assert n_runs < 5 * N_KILLS + 20  # others were done before they could be killed
    assert most_left == 1  # some were killed while they wrote
    assert cli.main(forced) == 0
    assert out.read_bytes() == whole
    assert list(out.parent.iterdir()) == [out]


def test_two_at_once_both_write_the_whole_file(command: list[str]) -> None:
    out, whole = Path(command[2]), expected_bytes(command)
    for _ in range(5):
        children = [start(lambda: cli.main([*command, "--force", "--threads", "1"])) for _ in range(2)]
        assert [exit_code(child) for child in children] == [0, 0]
        assert out.read_bytes() == whole
        assert list(out.parent.iterdir()) == [out]


def in_a_small_disk(folder: Path, *arguments: str, size: str = "1m") -> subprocess.CompletedProcess[str]:
    """Run `woolly` with a file system of this size at the folder, in name spaces of its own."""
    script = f'mount -t tmpfs -o size={size} none "$0" && cd "$0" && "$@"; code=$?; ls -A "$0"; exit $code'
    names = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    return subprocess.run([*names, str(folder), *arguments], capture_output=True, text=True, check=False)


def test_a_full_disk_is_one_line(command: list[str], tmp_path: Path) -> None:
    if shutil.which("unshare") is None or in_a_small_disk(tmp_path, "true").returncode:
        pytest.skip("no file system can be mounted here")
    done = in_a_small_disk(Path(command[2]).parent, sys.executable, "-m", "woolly", *command)
    assert done.returncode == 1
    assert done.stderr.startswith(f"woolly: error: {command[2]}: ")
    assert "bytes do not fit on the disk, which has " in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""  # nothing is left


def test_a_disk_that_fills_up_while_writing_is_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill_up(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill_up)
    assert cli.main(command) == 1
    assert capsys.readouterr().err == f"woolly: error: {command[2]}: No space left on device\n"
    assert not list(Path(command[2]).parent.iterdir())
