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

import numpy as np
import pytest

pytest.importorskip("huggingface_hub")

FILES = {
    "m-Q8_0-00001-of-00002.gguf": np.random.default_rng(0).bytes(3_000_000),
    "m-Q8_0-00002-of-00002.gguf": b"GGUF second shard",
    "m-Q4_0.gguf": b"GGUF altered on the way",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves FILES as the repository o/r; cuts the connection after `cut_after` bytes of a file, once."""

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
            siblings = [
                {
                    "rfilename": name,
                    "size": len(raw),
                    "lfs": {"sha256": digest(name), "size": len(raw), "pointerSize": 9},
                }
                for name, raw in FILES.items()
            ]
            self._send(json.dumps({"id": "o/r", "sha": COMMIT, "siblings": siblings}).encode(), 200, {}, with_body)
            return
        match = re.fullmatch(r"/o/r/resolve/\w+/(.+)", self.path)
        if match is None or match[1] not in FILES:
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound"}, with_body)
            return
        raw, status = FILES[match[1]], 200
        headers = {"ETag": f'"{digest(match[1])}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if (asked := self.headers.get("Range")) and with_body and self.has_ranges:
            type(self).ranges.append(asked)
            first = int(re.match(r"bytes=(\d+)-", asked)[1])
            headers["Content-Range"] = f"bytes {first}-{len(raw) - 1}/{len(raw)}"
            raw, status = raw[first:], 206
        self._send(raw, status, headers, with_body)

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
    return hashlib.sha256(FILES[name] + b"!" * name.endswith("Q4_0.gguf")).hexdigest()


@pytest.fixture
def hub_url() -> Iterator[str]:
    Hub.cut_after, Hub.ranges = None, []
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
