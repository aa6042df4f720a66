"""Models from the Hugging Face hub: `hf:OWNER/REPO[:QUANT]` to a file, found by the huggingface-hub package.

Owns which GGUF file of a repository is meant, and where it lies in the cache: hf/OWNER/REPO/, as in the repository. A
file is there when all of it has arrived and its size and checksum are those on the hub's record. A repository without
GGUF files becomes a folder there, see hub_folder.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from woolly import hub_folder
from woolly.errors import DownloadError
from woolly.terminal import format_bytes, progress_bar

# What a name without a quantisation takes, the first that is there.
_PREFERENCE = ("Q4_K_M", "Q4_0", "Q8_0", "Q5_K_M", "Q6_K", "Q4_K_S", "Q4_1", "BF16", "F16", "F32")
_NAME = re.compile(r"hf:([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w./-]+))?")
_INCOMING = ".incoming"  # where files are until they are whole and checked, named after their checksum
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 60.0
_MAX_FAILURES = 4  # attempts one after the other that bring nothing
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_KINDS = r"(I?Q\d\w*|B?F16|F32|MXFP4\w*|TQ\d\w*)"
_QUANT = re.compile(rf"[-.]{_KINDS}$", re.IGNORECASE)
_IS_QUANTISED = re.compile(rf"[-._]{_KINDS}", re.IGNORECASE)


def pull(name: str, root: Path, *, progress: bool, force: bool) -> Path:
    """The file that `name` means, in the cache; of a model in shards, the first; of one in safetensors, the folder.

    Raises
    ------
    DownloadError
        The name is malformed, the package is missing, no file fits, the hub refuses, or a file is not what it says.
    """
    if not force and (cached_file := find_cached(name, root)):
        return cached_file
    repo, quant = _parse(name)
    folder = root / repo
    try:
        import huggingface_hub
    except ImportError:
        raise DownloadError(f"{name} takes the huggingface-hub package: pip install 'woolly[hub]'") from None
    try:
        info = huggingface_hub.HfApi().model_info(repo, files_metadata=True)
        remote = {sibling.rfilename: sibling for sibling in info.siblings}

        def fetch(files: list[str]) -> None:
            missing = [file for file in files if force or not _is_there(folder / file, remote[file])]
            if progress and missing:
                n_bytes = format_bytes(sum(remote[file].size for file in missing))
                names = ", ".join(missing) if len(missing) < 4 else f"{missing[0]} and {len(missing) - 1} other files"
                source = f"the Hugging Face hub ({repo}, its licence holds)"
                print(f"Fetching {names} from {source} into {folder}: {n_bytes}", file=sys.stderr, flush=True)
            for file in missing:
                url = huggingface_hub.hf_hub_url(repo, file, revision=info.sha)
                _fetch(name, url, folder, remote[file], progress)

        files = list(remote)
        if hub_folder.is_meant(files, quant):
            fetch(hub_folder.settings_files(name, files))
            fetch(hub_folder.weight_files(name, files, folder))
            path = folder
        else:
            chosen = choose(name, files, quant)
            fetch(chosen)
            path = folder / chosen[0]
        shutil.rmtree(folder / _INCOMING, ignore_errors=True)
        return path
    except DownloadError:
        raise
    except Exception as error:  # whatever its HTTP library of the day raises: the first line says it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadError(f"{name}: fetching from the Hugging Face hub failed: {reason}") from error


def _is_there(path: Path, remote: Any) -> bool:
    """Whether an earlier pull, which brought not all files, brought this one, and it is still the hub's."""
    if not path.is_file() or path.stat().st_size != remote.size:
        return False
    return _digest(path, remote) == _on_record(remote)[1]


def find_cached(name: str, root: Path) -> Path | None:
    """What `name` means if all of it is in the cache, so that a pulled model works offline."""
    repo, quant = _parse(name)
    if hub_folder.is_meant([path.name for path in (root / repo).rglob("*")], quant):
        return root / repo if hub_folder.find_files(root / repo) else None
    with contextlib.suppress(DownloadError):
        file = choose(name, _files(root / repo), quant)[0]
        if quant is None or _is_plainly(file, quant):  # the hub may have one that fits better
            return root / repo / file
    return None


def _parse(name: str) -> tuple[str, str | None]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise DownloadError(f"{name!r} is not of the form hf:OWNER/REPO[:QUANT]")
    return match[1], match[2]


def _fetch(name: str, url: str, folder: Path, remote: Any, progress: bool) -> None:
    """Fetch one file, from where an earlier pull was cut off; it gets its name when it is whole and checked."""
    part = folder / _INCOMING / f"{Path(remote.rfilename).name}.{_on_record(remote)[1][:16]}"
    part.parent.mkdir(parents=True, exist_ok=True)
    bar = progress_bar(Path(remote.rfilename).name, remote.size) if progress else contextlib.nullcontext(lambda n: None)
    with bar as show_bytes, part.open("ab") as out:
        n_failures = 0
        while out.tell() < remote.size:
            before = out.tell()
            try:
                _continue(url, out, show_bytes)
            except (OSError, http.client.HTTPException):
                n_failures = 0 if out.tell() > before else n_failures + 1
                if n_failures == _MAX_FAILURES:
                    raise
            else:
                break
        out.flush()
        os.fsync(out.fileno())
    _check(name, part, remote)
    target = folder / remote.rfilename
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)


def _continue(url: str, out: IO[bytes], show_bytes: Callable[[int], None]) -> None:
    """Append the rest of a file to what is there of it."""
    import huggingface_hub

    # The hub redirects to where the file is, which must not get the user's token.
    location = huggingface_hub.get_hf_file_metadata(url).location
    same_host = urllib.parse.urlsplit(location).netloc == urllib.parse.urlsplit(url).netloc
    headers = huggingface_hub.utils.build_hf_headers() if same_host else {}
    if out.tell():
        headers["Range"] = f"bytes={out.tell()}-"
    with urllib.request.urlopen(urllib.request.Request(location, headers=headers), timeout=_TIMEOUT_S) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            out.truncate(0)
            out.seek(0)
        left = int(response.headers.get("Content-Length", -1))
        while chunk := response.read(_CHUNK_BYTES):
            out.write(chunk)
            left -= len(chunk)
            show_bytes(out.tell())
        if left > 0:  # a connection that ends early reads like the end of the file
            raise http.client.IncompleteRead(b"", left)


def _on_record(remote: Any) -> tuple[str, str]:
    """The checksum that the hub has of a file, and its kind: SHA-256 of large ones, git's SHA-1 of others."""
    if sha256 := getattr(getattr(remote, "lfs", None), "sha256", None):
        return "SHA-256", sha256
    return "git SHA-1", getattr(remote, "blob_id", None) or ""


def _digest(path: Path, remote: Any) -> str:
    """A file's checksum of the kind that the hub has; "" where it has none."""
    kind, expected = _on_record(remote)
    if not expected:
        return ""
    is_git = kind != "SHA-256"  # git hashes a header too
    digest = hashlib.sha1(b"blob %d\0" % remote.size, usedforsecurity=False) if is_git else hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _check(name: str, part: Path, remote: Any) -> None:
    """Compare a file with the size and the checksum that the hub has on record; one that differs is removed."""
    file, size = Path(remote.rfilename).name, part.stat().st_size
    if size != remote.size:
        part.unlink()
        raise DownloadError(f"{name}: {file} has {size} bytes, the hub says {remote.size}; nothing was kept")
    kind, expected = _on_record(remote)
    if (found := _digest(part, remote)) != expected:
        part.unlink()
        raise DownloadError(
            f"{name}: the checksum of {file} is wrong ({kind} {found}, the hub says {expected}); nothing was kept"
        )


def choose(name: str, files: list[str], quant: str | None) -> list[str]:
    """The file to take out of a repository's, as the list of its shards in order.

    Parameters
    ----------
    name : str
        As the user wrote it, for messages.
    files : list of str
        Paths in the repository, of any kind.
    quant : str or None
        A quantisation, as a word of the file's name or of its folder's, in any case, or the name itself. Where several
        files have it, the one that ends in it is meant, and not one of a kind of its own, such as UD-Q4_K_M; otherwise
        more of the name has to be given. None takes the preferred one.

    Raises
    ------
    DownloadError
        No file or more than one is meant, or a shard is not there; the message lists the names.
    """
    has_folder = hub_folder.is_meant(files, None)
    files = sorted(file for file in files if _is_model(file))
    if not files:
        advice = "; its safetensors are fetched without a quantisation" * has_folder
        raise DownloadError(f"{name}: the repository holds no GGUF model{advice}")
    for candidate in (quant,) if quant else _PREFERENCE:
        word = re.compile(rf"(?:^|[-._/]){re.escape(candidate)}(?=[-./]|$)", re.IGNORECASE)
        models = _models([file for file in files if word.search(file)])
        if len(models) > 1 and len(plain := [first for first in models if _is_plainly(first, candidate)]) == 1:
            models = {plain[0]: models[plain[0]]}
        if len(models) > 1:
            raise DownloadError(f"{name}: several files are {candidate}, give more of the name: {', '.join(models)}")
        if models:
            break
    else:
        models = _models(files)
        if quant or len(models) > 1:
            raise DownloadError(f"{name}: name one of its files by the quantisation: {', '.join(files)}")
    (shards,) = models.values()
    for shard in shards:
        if shard not in files:
            raise DownloadError(f"{name}: {shard} is missing")
    return shards


def _is_model(file: str) -> bool:
    """Whether a repository's file is a model in GGUF, and none of what goes with one, and lies below its folder."""
    *folders, name = file.lower().split("/")
    is_below = not {"", ".", ".."} & {*folders, name} and (*folders, name)[0] != _INCOMING and "\\" not in file
    goes_with_one = "mmproj" in file.lower() or ("imatrix" in name and not _IS_QUANTISED.search(name))
    return is_below and name.endswith(".gguf") and not goes_with_one


def _is_plainly(file: str, quant: str) -> bool:
    """Whether a quantisation is all that a file's name says of its kind, or is its name, with or without folders."""
    stem = _SHARD.sub("", file).removesuffix(".gguf").lower()
    wanted = quant.lower().removesuffix(".gguf")
    if wanted in (stem, stem.rpartition("/")[2], file.lower().removesuffix(".gguf")):
        return True
    return re.search(rf"(?<!\bud)[-._/]{re.escape(wanted)}$", stem) is not None or wanted in stem.split("/")[:-1]


def _models(files: list[str]) -> dict[str, list[str]]:
    """The shards of each model by the name of the first."""
    return {shards[0]: shards for shards in map(_shards, files)}


def cached(root: Path) -> Iterator[tuple[str, Path, int]]:
    """The whole models in the cache: name, first file or folder, size of the weights in bytes."""
    for folder in sorted(root.glob("*/*")):
        repo, files = f"hf:{folder.relative_to(root).as_posix()}", _files(folder)
        for file in files:
            shards = [folder / shard for shard in _shards(file)]
            if shards[0] != folder / file or not all(shard.is_file() for shard in shards):
                continue
            stem = _SHARD.sub("", shards[0].name).removesuffix(".gguf")
            quant = _QUANT.search(stem)
            yield repo + (f":{quant[1]}" if quant else ""), shards[0], _size(shards)
        if weights := hub_folder.find_files(folder):
            name = f"{repo}:{hub_folder.WORD}" if files else repo
            yield name, folder, _size(folder / file for file in weights)


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _files(folder: Path) -> list[str]:
    found = sorted(path.relative_to(folder) for path in folder.rglob("*.gguf"))
    return [path.as_posix() for path in found if path.parts[0] != _INCOMING]


def _shards(file: str) -> list[str]:
    shard = _SHARD.search(file)
    if shard is None or not 1 <= int(shard[1]) <= int(shard[2]):
        return [file]
    return [f"{file[: shard.start()]}-{i:05d}-of-{shard[2]}.gguf" for i in range(1, int(shard[2]) + 1)]
