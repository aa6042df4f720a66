"""Pulling with the huggingface-hub package from a server on this machine that answers as the hub does."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import make_folder
import make_gguf
import numpy as np
import pytest

import woolly
from woolly import hub, hub_folder

pytest.importorskip("huggingface_hub")

WRONG = "m-Q4_0.gguf"  # what the hub says of it is not so
FILES = {
    "m-Q8_0-00001-of-00002.gguf": np.random.default_rng(0).bytes(3_000_000),
    "m-Q8_0-00002-of-00002.gguf": b"GGUF second shard",
    WRONG: b"GGUF altered on the way",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves `files` as the repository o/r; cuts the connection after `cut_after` bytes of a file, once.

    Those that end in .gguf or .safetensors are large ones (LFS), the rest are git's own.
    """

    files = FILES
    wrong = WRONG
    cut_after: int | None = None
    has_ranges = True
    ranges: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        if self.path.startswith("/api/models/o/r"):
            siblings = [self._sibling(name) for name in self.files]
            self._send(json.dumps({"id": "o/r", "sha": COMMIT, "siblings": siblings}).encode(), 200, {}, with_body)
            return
        match = re.fullmatch(r"/o/r/resolve/\w+/(.+)", self.path)
        if match is None or match[1] not in self.files:
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound"}, with_body)
            return
        raw, status = self.files[match[1]], 200
        headers = {"ETag": f'"{digest(match[1])}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if (asked := self.headers.get("Range")) and with_body and self.has_ranges:
            type(self).ranges.append(asked)
            first = int(re.match(r"bytes=(\d+)-", asked)[1])
            headers["Content-Range"] = f"bytes {first}-{len(raw) - 1}/{len(raw)}"
            raw, status = raw[first:], 206
        self._send(raw, status, headers, with_body)

    def _sibling(self, name: str) -> dict[str, object]:
        size, checksum = len(self.files[name]), digest(name)
        if name.endswith((".gguf", ".safetensors")):
            return {"rfilename": name, "size": size, "lfs": {"sha256": checksum, "size": size, "pointerSize": 9}}
        return {"rfilename": name, "size": size, "blobId": checksum}

    def _send(self, raw: bytes, status: int, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(raw))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not with_body:
            return
        cut, cls = type(self).cut_after, type(self)
        if cut is not None and len(raw) > cut:
            cls.cut_after = None
            raw = raw[:cut]
            self.close_connection = True
        self.wfile.write(raw)


def digest(name: str) -> str:
    """What the hub says of a file: wrong for one of them."""
    raw = Hub.files[name] + b"!" * (name == Hub.wrong)
    if name.endswith((".gguf", ".safetensors")):
        return hashlib.sha256(raw).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(Hub.files[name]) + raw).hexdigest()


@pytest.fixture
def hub_url() -> Iterator[str]:
    Hub.files, Hub.wrong, Hub.cut_after, Hub.ranges = FILES, WRONG, None, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def pull(url: str, cache: Path, name: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": url, "WOOLLY_CACHE": str(cache), "HF_HOME": str(cache / "home")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "woolly", "pull", name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_shards_are_pulled_and_a_cut_download_goes_on(hub_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf" / "o" / "r"
    Hub.cut_after = 2_000_000
    done = pull(hub_url, tmp_path, "hf:o/r:Q8_0")
    assert done.returncode == 0, done.stderr
    first = folder / "m-Q8_0-00001-of-00002.gguf"
    assert done.stdout == f"{first}\n"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: raw for name, raw in FILES.items() if "Q8_0" in name
    }
    assert Hub.ranges == ["bytes=2000000-"]
    assert "Fetching m-Q8_0-00001-of-00002.gguf, m-Q8_0-00002-of-00002.gguf from the Hugging Face hub" in done.stderr


def test_a_pull_goes_on_where_a_killed_one_was(hub_url: str, tmp_path: Path) -> None:
    name = "m-Q8_0-00001-of-00002.gguf"
    part = tmp_path / "hf" / "o" / "r" / ".incoming" / f"{name}.{digest(name)[:16]}"
    part.parent.mkdir(parents=True)
    part.write_bytes(FILES[name][:1_234_567])
    done = pull(hub_url, tmp_path, "hf:o/r:q8_0")
    assert done.returncode == 0, done.stderr
    assert Hub.ranges == ["bytes=1234567-"]
    assert (tmp_path / "hf" / "o" / "r" / name).read_bytes() == FILES[name]
    assert not part.parent.exists()


def test_a_server_without_ranges(hub_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "has_ranges", False)
    Hub.cut_after = 2_000_000
    done = pull(hub_url, tmp_path, "hf:o/r:Q8_0")
    assert done.returncode == 0, done.stderr
    assert Hub.ranges == []


def test_what_is_not_on_record_is_not_kept(hub_url: str, tmp_path: Path) -> None:
    done = pull(hub_url, tmp_path, "hf:o/r:Q4_0")
    assert done.returncode == 1
    assert "hf:o/r:Q4_0: the checksum of m-Q4_0.gguf is wrong (SHA-256 " in done.stderr
    assert not list((tmp_path / "hf").rglob("*.gguf"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a repository of safetensors, with what no one needs beside them."""
    folder = tmp_path_factory.mktemp("made")
    model = make_gguf.write_tiny_llama(folder / "tiny.gguf")
    made = make_folder.folder_from_gguf(model, folder / "made", n_shards=3)
    files = {path.name: path.read_bytes() for path in sorted(made.iterdir())}
    more = {"README.md": b"# Tiny", "pytorch_model.bin": b"no", "onnx/model.onnx": b"no", "onnx/x.safetensors": b"no"}
    more |= {"additional_chat_templates/tool_use.jinja": b"{{ tools | length }} tools", "chat_template.jinja": b"Hi"}
    return files | more


def test_safetensors_are_pulled_as_a_folder(
    hub_url: str, tmp_path: Path, sharded: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub.files, Hub.cut_after = sharded, len(sharded["model-00002-of-00003.safetensors"]) - 100
    done = pull(hub_url, tmp_path, "hf:o/r")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "hf" / "o" / "r"
    assert done.stdout == f"{folder}\n"
    assert len(Hub.ranges) == 1, "the shard that was cut goes on"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == sharded.keys() - {"README.md", "pytorch_model.bin", "onnx/model.onnx", "onnx/x.safetensors"}
    assert all((folder / name).read_bytes() == sharded[name] for name in names)

    monkeypatch.setenv("WOOLLY_CACHE", str(tmp_path))
    n_bytes = sum(len(raw) for name, raw in sharded.items() if name.startswith("model-"))
    assert hub.list_models() == [hub.CachedModel("hf:o/r", folder, n_bytes)]
    with woolly.load("hf:o/r", n_threads=1) as model:  # from the cache: this process knows no hub
        assert model.forward([1, 5, 6]).shape[0] == 3
        assert list(model.chat_templates) == ["default", "tool_use"]
    (folder / "model-00003-of-00003.safetensors").unlink()
    assert hub.list_models() == []


def test_a_folder_is_completed_with_files_of_one_revision(
    hub_url: str, tmp_path: Path, sharded: dict[str, bytes]
) -> None:
    Hub.files = sharded
    folder = tmp_path / "hf" / "o" / "r"
    folder.mkdir(parents=True)
    first, second = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
    (folder / first).write_bytes(sharded[first])
    (folder / second).write_bytes(bytes(len(sharded[second])))  # another revision's, of the same size
    (folder / "config.json").write_bytes(sharded["config.json"])
    done = pull(hub_url, tmp_path, "hf:o/r:safetensors")
    assert done.returncode == 0, done.stderr
    assert (folder / second).read_bytes() == sharded[second]
    lines = [line for line in done.stderr.splitlines() if line.startswith("Fetching")]
    assert "config.json" not in lines[0]
    assert lines[1].startswith(f"Fetching {second}, model-00003-of-00003.safetensors from the Hugging Face hub")


def test_small_files_are_checked_too(hub_url: str, tmp_path: Path, sharded: dict[str, bytes]) -> None:
    Hub.files, Hub.wrong = sharded, "config.json"
    done = pull(hub_url, tmp_path, "hf:o/r")
    assert done.returncode == 1
    assert "hf:o/r: the checksum of config.json is wrong (git SHA-1 " in done.stderr
    assert not list((tmp_path / "hf").rglob("config.json"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hf:o/r", {"tokenizer.json": None}, "the repository has no tokenizer.json, which a model in safetensors"),
        ("hf:o/r", {"model-00002-of-00003.safetensors": None}, "hf:o/r: model-00002-of-00003.safetensors is missing"),
        ("hf:o/r", {hub_folder.INDEX: b'{"weight_map": {"x": "../x"}}'}, "does not name safetensors files"),
        ("hf:o/r", {hub_folder.INDEX: None}, f"expected model.safetensors or {hub_folder.INDEX}, found 3 safetensors"),
        ("hf:o/r:Q8_0", {}, "holds no GGUF model; its safetensors are fetched without a quantisation"),
    ],
)
def test_repositories_that_are_no_folder(
    hub_url: str, tmp_path: Path, sharded: dict[str, bytes], name: str, changes: dict[str, bytes | None], message: str
) -> None:
    Hub.files = {file: raw for file, raw in (sharded | changes).items() if raw is not None}
    done = pull(hub_url, tmp_path, name)
    assert done.returncode == 1
    assert message in done.stderr
