"""`woolly convert` and `woolly dequantize`: files that other readers and engines open, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from make_folder import folder_from_gguf, safetensors_bytes
from make_gguf import write_tiny_gemma3, write_tiny_llama

import woolly
from woolly import cli
from woolly.convert import writing
from woolly.convert.opening import open_checkpoint
from woolly.convert.quantized import round_to_bf16
from woolly.convert.self_contained import METADATA_NAME, decode_metadata, encode_metadata
from woolly.errors import CheckpointError, UnsupportedFormatError, WoollyError

TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 270, 20)]


@pytest.fixture
def gguf_path(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf", tied=False)


@pytest.fixture
def folder(gguf_path: Path, tmp_path: Path) -> Path:
    return folder_from_gguf(gguf_path, tmp_path / "folder", dtype="BF16")


def logits(path: Path, **options: Any) -> bytes:
    with woolly.load(path, n_threads=2, **options) as model:
        return model.forward(TOKENS).tobytes()


def run(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize("dtype", ["auto", "f32", "f16", "bf16", "q8_0"])
def test_convert(folder: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    run("convert", folder, out, "--dtype", dtype, "--threads", 2)
    assert "out.gguf: " in capsys.readouterr().err
    assert logits(out) == logits(folder, quantize=None if dtype == "auto" else dtype)
    reader = gguf.GGUFReader(out)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    assert types["blk.1.attn_q.weight"] == types["token_embd.weight"] == {"auto": "BF16"}.get(dtype, dtype.upper())
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.name"] == "folder"
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.tokens"][1] == "<|im_start|>"
    assert fields["general.file_type"] == {"auto": 32, "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[dtype]
    assert ("general.quantization_version" in fields) == (dtype == "q8_0")


@pytest.mark.parametrize(
    ("dtype", "source"), [("f32", "q4_0"), ("f16", "q8_0"), ("bf16", "f32"), ("f32", "q6_k"), ("f32", "bf16")]
)
def test_dequantize(tmp_path: Path, dtype: str, source: str) -> None:
    shape = {"hidden": 256, "head_dim": 64, "intermediate": 256}
    path = write_tiny_llama(tmp_path / "in.gguf", dtype=source, **shape, vocab=321)
    out = tmp_path / "out.safetensors"
    run("dequantize", path, out, "--dtype", dtype)
    with open_checkpoint(out) as ours:
        assert ours.metadata["llama.block_count"] == 2
        assert list(ours.metadata["tokenizer.ggml.tokens"])[1] == "<|im_start|>"
        for tensor in gguf.GGUFReader(path).tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
            name = "f32" if values.ndim == 1 else dtype
            found = ours.bytes_of(tensor.name).read()
            assert ours.tensors[tensor.name].format.name == name
            assert ours.tensors[tensor.name].shape == values.shape
            expected = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType[name.upper()])
            assert found.tobytes() == expected.tobytes(), tensor.name
    assert len(logits(out)) == 4 * 321 * len(TOKENS)
    run("convert", out, tmp_path / "back.gguf")
    assert logits(tmp_path / "back.gguf") == logits(out)


def test_the_package_reads_what_dequantize_writes(gguf_path: Path, tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    writing_to = tmp_path / "out.safetensors"
    run("dequantize", gguf_path, writing_to)
    tensors = numpy.load_file(writing_to)
    assert tensors["blk.0.ffn_up.weight"].shape == (128, 64)
    assert logits(writing_to) == logits(gguf_path)


def test_rounding_to_bf16() -> None:
    values = np.array([1, 1.00390625, 1.01171875, -0.0, np.inf, -np.inf, 3.4e38, 1e-45, np.nan], np.float32)
    found = (round_to_bf16(values).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(found, [1, 1, 1.015625, -0.0, np.inf, -np.inf, np.inf, 0, np.nan])
    odd_nan = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan((round_to_bf16(odd_nan).astype(np.uint32) << 16).view(np.float32)).all()


# --- whole or not at all ---


def test_files_are_not_overwritten_unasked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    assert cli.main(["convert", str(folder), str(out)]) == 1
    assert "out.gguf: the file exists; --force replaces it" in capsys.readouterr().err
    assert out.read_text() == "mine"
    run("convert", folder, out, "--force")
    assert logits(out) == logits(folder)
    (tmp_path / "dir.gguf").mkdir()
    assert cli.main(["convert", str(folder), str(tmp_path / "dir.gguf"), "--force"]) == 1
    assert "is a folder, expected the name of a file to write" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["convert", "dequantize"])
def test_names_say_what_is_written(
    folder: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, str(folder), str(tmp_path / "out.bin")]) == 1
    assert "out.bin: expected the name of a " in capsys.readouterr().err


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name not in ("folder", "tiny.gguf"))


def test_trouble_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.gguf"
    n_calls = 0

    def fill_up(descriptor: int, data: Any, offset: int) -> int:
        nonlocal n_calls
        n_calls += 1
        if n_calls > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(descriptor, bytes(data)[:10])

    with open_checkpoint(folder) as source:
        with monkeypatch.context() as patch:
            patch.setattr(writing.os, "pwrite", fill_up)
            with pytest.raises(OSError, match=r"No space left on device: '.*out\.gguf'"):
                writing.write_gguf(source, out)
        assert left(tmp_path) == []
        with monkeypatch.context() as patch:
            patch.setattr(writing, "convert_rows", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                writing.write_gguf(source, out)
        assert left(tmp_path) == []
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstatvfs", lambda _: os.statvfs_result((4096, 4096, 9, 1, 1, 0, 0, 0, 0, 255)))
            with pytest.raises(WoollyError, match=r"bytes do not fit on the disk, which has 4,096 free"):
                writing.write_gguf(source, out)
        assert left(tmp_path) == []
        with pytest.raises(WoollyError, match="type 'q9' is unknown; expected one of f32"):
            writing.write_gguf(source, out, type="q9")
        with pytest.raises(FileNotFoundError):
            writing.write_gguf(source, tmp_path / "nowhere" / "out.gguf")


def test_what_a_killed_process_left_is_removed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    script = (
        "import sys, time\nfrom woolly.convert import writing\nfrom woolly.convert.opening import open_checkpoint\n"
        "def slow(n_bytes):\n    print(n_bytes, flush=True)\n    time.sleep(60)\n"
        "writing.write_gguf(open_checkpoint(sys.argv[1]), sys.argv[2], show_bytes=slow)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder), str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    in_progress = left(tmp_path)
    assert len(in_progress) == 1
    assert in_progress != ["out.gguf"]
    run("convert", folder, tmp_path / "other.gguf")
    (tmp_path / "other.gguf").unlink()
    assert left(tmp_path) == in_progress  # another file's, and in use
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert left(tmp_path) == in_progress
    run("convert", folder, out)
    assert left(tmp_path) == ["out.gguf"]
    assert logits(out) == logits(folder)


def test_progress_counts_all_bytes(folder: Path, tmp_path: Path) -> None:
    for name, writes, options in (
        ("a.gguf", writing.write_gguf, {"type": "q8_0"}),
        ("a.safetensors", writing.write_safetensors, {"format": "f16"}),
    ):
        counts = writing.bytes_of_gguf if name.endswith("f") else writing.bytes_of_safetensors
        seen: list[int] = []
        with open_checkpoint(folder) as source:
            writes(source, tmp_path / name, **options, show_bytes=seen.append)
            total = counts(source, *options.values())
        assert seen == sorted(seen)
        assert seen[-1] == total


def test_formats_without_kernels_cannot_be_dequantized(gguf_path: Path, tmp_path: Path) -> None:
    raw = gguf_path.read_bytes()
    entry = b"blk.0.attn_q.weight" + np.uint32(2).tobytes() + np.uint64([64, 64]).tobytes()
    gguf_path.write_bytes(raw.replace(entry + np.uint32(0).tobytes(), entry + np.uint32(24).tobytes()))  # I8
    with (
        open_checkpoint(gguf_path) as source,
        pytest.raises(UnsupportedFormatError, match="stored as i8, which cannot"),
    ):
        writing.write_safetensors(source, tmp_path / "out.safetensors")


# --- the keys in a safetensors file ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "gguf: no JSON"),
        ("[]", r"gguf: expected an object, found \[\]"),
        ('{"a": 1}', "gguf: 'a': expected a type and a value of it, found 1"),
        ('{"a": ["uint32", "x"]}', "'a': expected a type"),
        ('{"a": ["uint33", 1]}', "'a': expected a type"),
        ('{"a": ["bool", 1]}', "'a': expected a type"),
        ('{"a": ["array of uint8", [1, 300]]}', "'a': expected a type"),
        ('{"a": ["array of string", ["x", 1]]}', "'a': expected a type"),
        ('{"a": ["array of uint8", 1]}', "'a': expected a type"),
    ],
)
def test_malformed_keys_are_refused(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        decode_metadata("x.safetensors", text)


def test_keys_survive(gguf_path: Path) -> None:
    with open_checkpoint(gguf_path) as source:
        again = decode_metadata("x", encode_metadata(source.metadata, 1))
        expected = {key: (value, kind) for key, value, kind in source.metadata.items_with_types()}
        found = {key: (value, kind) for key, value, kind in again.items_with_types()}
    assert found.pop("general.file_type") == (1, "uint32")
    expected.pop("general.file_type", None)
    assert found.keys() == expected.keys()
    for key, (value, kind) in expected.items():
        assert found[key][1] == kind
        assert np.array_equal(list(found[key][0]), list(value)) if kind.startswith("array") else found[key][0] == value


def test_only_floats_make_a_model(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"a": ("I32", [1], bytes(4))}, {METADATA_NAME: json.dumps({})}))
    with pytest.raises(CheckpointError, match=r"tensor 'a': expected floats of one to four dimensions, found I32"):
        woolly.load(path)


# --- other engines ---


@pytest.mark.parametrize(
    ("writer", "dtype", "within"),
    # with quantised weights, llama.cpp rounds activations to 8 bits
    [(write_tiny_llama, "auto", 0.02), (write_tiny_gemma3, "auto", 0.02), (write_tiny_llama, "q8_0", 0.3)],
)
def test_llama_cpp_says_the_same(tmp_path: Path, writer: Any, dtype: str, within: float) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    shape = {"hidden": 256, "head_dim": 64, "intermediate": 256}
    folder = folder_from_gguf(writer(tmp_path / "in.gguf", **shape), tmp_path / "folder")
    out = tmp_path / "out.gguf"
    run("convert", folder, out, "--dtype", dtype)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(out), 128, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_gpu_layers, params.verbosity, params.warmup = 0, -1, False
    server = xllamacpp.Server(params)
    with woolly.load(out, n_threads=1) as model:
        ids = list(TOKENS)
        for _ in range(6):
            request = {"prompt": ids, "n_predict": 1, "temperature": 0, "top_k": 1, "logprobs": 5}
            answer = server.handle_completions(request)
            answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
            row = model.forward(ids)[-1].astype(np.float64)
            log_probabilities = row - row.max() - np.log(np.exp(row - row.max()).sum())
            best = int(row.argmax())
            content = (answer["choices"][0]["logprobs"] or {}).get("content")
            if content:  # there is none where the token is a part of a character
                for entry in content[0]["top_logprobs"]:
                    assert log_probabilities[entry["id"]] == pytest.approx(entry["logprob"], abs=within)
                assert dtype != "auto" or content[0]["top_logprobs"][0]["id"] == best
            ids.append(best)
