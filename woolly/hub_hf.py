"""Models from the Hugging Face hub: `hf:OWNER/REPO[:QUANT]` to a GGUF file, fetched by the huggingface-hub package.

Owns which file of a repository is meant, and where it lies in the cache: hf/OWNER/REPO/, as in the repository.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from woolly.errors import DownloadError

# What a name without a quantisation takes, the first that is there.
_PREFERENCE = ("Q4_K_M", "Q4_0", "Q8_0", "Q5_K_M", "Q6_K", "Q4_K_S", "Q4_1", "BF16", "F16", "F32")
_NAME = re.compile(r"hf:([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.-]+))?")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_QUANT = re.compile(r"[-.](I?Q\d\w*|B?F16|F32|MXFP4\w*|TQ\d\w*)$", re.IGNORECASE)


def pull(name: str, root: Path, *, progress: bool, force: bool) -> Path:
    """The file that `name` means, in the cache; of a model in shards, the first.

    Raises
    ------
    DownloadError
        The name is malformed, the package is missing, no file fits, or the hub refuses.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise DownloadError(f"{name!r} is not of the form hf:OWNER/REPO[:QUANT]")
    repo, quant = match[1], match[2]
    folder = root / repo
    if not force and (cached_file := _choose_cached(folder, name, quant)):
        return cached_file
    try:
        import huggingface_hub
    except ImportError:
        raise DownloadError(f"{name} takes the huggingface-hub package: pip install 'woolly[hub]'") from None
    try:
        chosen = choose(name, huggingface_hub.list_repo_files(repo), quant)
        if progress:
            source = f"the Hugging Face hub ({repo}, its licence holds)"
            print(f"Fetching {', '.join(chosen)} from {source} into {folder}", file=sys.stderr, flush=True)
        else:
            huggingface_hub.utils.disable_progress_bars()
        for file in chosen:
            huggingface_hub.hf_hub_download(repo, file, local_dir=folder, force_download=force)
    except DownloadError:
        raise
    except Exception as error:  # whatever its HTTP library of the day raises: the first line says it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadError(f"{name}: fetching from the Hugging Face hub failed: {reason}") from error
    return folder / chosen[0]


def choose(name: str, files: list[str], quant: str | None) -> list[str]:
    """The file to take out of a repository's, as the list of its shards in order.

    Parameters
    ----------
    name : str
        As the user wrote it, for messages.
    files : list of str
        Paths in the repository, of any kind.
    quant : str or None
        A quantisation, as a word of the file's name or of its folder's, in any case. None takes the preferred one.
    """
    files = sorted(file for file in files if file.lower().endswith(".gguf") and "mmproj" not in file.lower())
    if not files:
        raise DownloadError(f"{name}: the repository holds no GGUF model")
    for candidate in (quant,) if quant else _PREFERENCE:
        word = re.compile(rf"(?:^|[-._/]){re.escape(candidate)}(?=[-./])", re.IGNORECASE)
        if matching := [file for file in files if word.search(file)]:
            return _shards(matching[0])
    if quant or len({shards[0] for shards in map(_shards, files)}) > 1:
        raise DownloadError(f"{name}: name one of its files by the quantisation: {', '.join(files)}")
    return _shards(files[0])


def cached(root: Path) -> Iterator[tuple[str, Path, int]]:
    """The whole models in the cache: name, first file, size in bytes."""
    for folder in sorted(root.glob("*/*")):
        for file in _files(folder):
            shards = [folder / shard for shard in _shards(file)]
            if shards[0] != folder / file or not all(shard.is_file() for shard in shards):
                continue
            stem = _SHARD.sub("", shards[0].name).removesuffix(".gguf")
            quant = _QUANT.search(stem)
            name = f"hf:{folder.relative_to(root).as_posix()}" + (f":{quant[1]}" if quant else "")
            yield name, shards[0], sum(shard.stat().st_size for shard in shards)


def _choose_cached(folder: Path, name: str, quant: str | None) -> Path | None:
    """What the cache has is enough, so that a pulled model works offline."""
    with contextlib.suppress(DownloadError):
        chosen = choose(name, _files(folder), quant)
        if all((folder / file).is_file() for file in chosen):
            return folder / chosen[0]
    return None


def _files(folder: Path) -> list[str]:
    found = sorted(path.relative_to(folder) for path in folder.rglob("*.gguf"))
    return [path.as_posix() for path in found if path.parts[0] != ".cache"]  # huggingface-hub's own notes


def _shards(file: str) -> list[str]:
    shard = _SHARD.search(file)
    if shard is None:
        return [file]
    return [f"{file[: shard.start()]}-{i:05d}-of-{shard[2]}.gguf" for i in range(1, int(shard[2]) + 1)]
