"""`woolly quantize`: the file written, what is refused, and what is left when it is stopped."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_builder import F32, STRING, UINT16, UINT32, GGUFBuilder, string, u32
from make_gguf import write_tiny_gemma3, write_tiny_llama

import woolly
from woolly import cli, quantizing
from woolly._kernels import QUANTIZED_FORMATS, kernel_formats
from woolly.errors import UnsupportedFormatError, WoollyError
from woolly.gguf_file import GGUFFile
from woolly.mixes import MIXES
from woolly.quantizing import plan_quantization, quantize_file

SIZES = {"n_layers": 2, "hidden": 256, "n_heads": 4, "n_kv_heads": 2, "intermediate": 512, "vocab": 320}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("source") / "source.gguf", **SIZES, tied=False)


def quantize(source: Path, target: Path, type: str, *, n_threads: int | None = None, **options: object) -> Path:
    with GGUFFile.open(source) as file:
        quantize_file(file, target, plan_quantization(file, type, **options), n_threads=n_threads)
    return target


def formats_of(path: Path) -> dict[str, str]:
    with GGUFFile.open(path) as file:
        return {name: info.format.name for name, info in file.tensors.items()}


def dequantized(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("type", MIXES)
def test_every_type_writes_what_was_planned(source, tmp_path, type):
    path = quantize(source, tmp_path / "out.gguf", type)
    with GGUFFile.open(source) as before, GGUFFile.open(path) as after:
        plan = plan_quantization(before, type)
        assert {t.source.name: t.format.name for t in plan.tensors} == formats_of(path)
        assert plan.bytes_after == sum(info.n_bytes for info in after.tensors.values())
        assert list(after.tensors) == list(before.tensors)
        for name, info in before.tensors.items():
            assert after.tensors[name].shape == info.shape
    bound = {"q2": 0.4, "q3": 0.2, "mx": 0.15}.get(type[:2], 0.1)
    exact = dequantized(source)
    for name, values in dequantized(path).items():
        error = np.sqrt(np.mean((values - exact[name]) ** 2) / np.mean(exact[name] ** 2))
        assert error <= (bound if values.ndim == 2 else 0), name


@pytest.mark.parametrize("write", [write_tiny_llama, write_tiny_gemma3])
def test_quantised_model_runs(tmp_path, write):
    source = write(tmp_path / "source.gguf", hidden=256, intermediate=512)
    path = quantize(source, tmp_path / "out.gguf", "q6_k")
    ids = [1, 70, 71, 72, 90]
    with woolly.load_gguf(source, n_ctx=64) as before, woolly.load_gguf(path, n_ctx=64) as after:
        expected, logits = before.forward(ids), after.forward(ids)
    assert np.corrcoef(expected.ravel(), logits.ravel())[0, 1] > 0.99


def test_metadata_are_kept_byte_for_byte(tmp_path):
    builder = GGUFBuilder(version=2)
    builder.key("general.architecture", STRING, string("llama"))
    builder.key("general.file_type", UINT32, u32(0))
    builder.key("odd.text", STRING, string(b"no UTF-8: \xff\xfe"))
    builder.key("split.count", UINT32, u32(1))
    builder.key("general.alignment", UINT32, u32(64))
    builder.key("last", STRING, string("the last one"))
    builder.alignment = 64
    weights = np.arange(64, dtype=np.float32).tobytes()
    builder.tensor("blk.0.attn_q.weight", [32, 2], F32, weights).tensor("odd", [3], F32, bytes(12))
    source = tmp_path / "source.gguf"
    source.write_bytes(builder.build())
    path = quantize(source, tmp_path / "out.gguf", "q8_0")
    with GGUFFile.open(path) as file:
        assert file.version == 3
        assert file.alignment == 64
        keys = dict(file.metadata.items())
        assert keys.pop("general.file_type") == MIXES["q8_0"].file_type
        assert keys.pop("general.quantization_version") == gguf.GGML_QUANT_VERSION
        assert list(keys) == ["general.architecture", "odd.text", "general.alignment", "last"]
        assert b"no UTF-8: \xff\xfe" in path.read_bytes()
    assert formats_of(path) == {"blk.0.attn_q.weight": "q8_0", "odd": "f32"}
    assert path.stat().st_size % 64 == 0


def test_parts_become_one_file(tmp_path, capsys):
    parts = [tmp_path / f"x-0000{i}-of-00002.gguf" for i in (1, 2)]
    for i, path in enumerate(parts):
        builder = GGUFBuilder().key("split.no", UINT16, struct.pack("<H", i)).key("split.count", UINT16, b"\2\0")
        weights = np.full((2, 32), i + 1, np.float32).tobytes()
        path.write_bytes(builder.tensor(f"blk.{i}.attn_q.weight", [32, 2], F32, weights).build())
    target = tmp_path / "out.gguf"
    assert cli.main(["quantize", str(parts[0]), str(target), "q8_0"]) == 0
    with GGUFFile.open(target) as file:
        assert not [key for key in file.metadata if key.startswith("split.")]
    values = dequantized(target)
    for i in range(2):
        np.testing.assert_allclose(values[f"blk.{i}.attn_q.weight"], i + 1, rtol=1e-3)


def test_same_bytes_for_any_number_of_threads_and_chunk(source, tmp_path, monkeypatch):
    written = {quantize(source, tmp_path / f"{n}.gguf", "q4_k_m", n_threads=n).read_bytes() for n in (1, 2, 3)}
    monkeypatch.setattr(quantizing, "CHUNK_OF_ALL_THREADS", 1000)
    written.add(quantize(source, tmp_path / "chunks.gguf", "q4_k_m").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("format", sorted(set(kernel_formats()) & set(QUANTIZED_FORMATS) - {"f32"}))
def test_quantised_sources_when_asked(source, tmp_path, format):
    first = quantize(source, tmp_path / "first.gguf", "f32" if format == "f32" else "q8_0", output_type=format)
    if format not in ("f16", "bf16", "q8_0"):
        with pytest.raises(
            WoollyError, match=rf"tensor '.*' is quantised already \((q8_0|{format})\).*--allow-requantize"
        ):
            quantize(first, tmp_path / "second.gguf", "q4_0")
    path = quantize(first, tmp_path / "second.gguf", "q4_0", allow_requantize=True)
    exact, values = dequantized(source)["output.weight"], dequantized(path)["output.weight"]
    assert np.sqrt(np.mean((values - exact) ** 2) / np.mean(exact**2)) < (0.4 if format == "q2_k" else 0.2)


def test_what_is_in_its_format_already_is_copied(source, tmp_path):
    first = quantize(source, tmp_path / "first.gguf", "q4_k_m")
    again = quantize(first, tmp_path / "again.gguf", "q4_k_m")
    assert again.read_bytes() == first.read_bytes()


def test_float_sources_give_the_same(source, tmp_path):
    half = quantize(source, tmp_path / "half.gguf", "bf16")
    single = quantize(half, tmp_path / "single.gguf", "f32")
    assert (
        quantize(half, tmp_path / "a.gguf", "q5_k_m").read_bytes()
        == quantize(single, tmp_path / "b.gguf", "q5_k_m").read_bytes()
    )


@pytest.mark.parametrize(("value", "text"), [(np.nan, "nan"), (np.inf, "inf"), (1e30, r"1e\+30")])
def test_bad_weights_name_the_tensor(tmp_path, value, text):
    weights = np.ones((4, 64), np.float32)
    weights[2, 9] = value
    source = tmp_path / "source.gguf"
    source.write_bytes(GGUFBuilder().tensor("blk.0.attn_q.weight", [64, 4], F32, weights.tobytes()).build())
    expected = (
        rf"source\.gguf: tensor 'blk\.0\.attn_q\.weight', rows from 0: weight {text} in row 2, column 9: q4_0 holds"
    )
    with pytest.raises(WoollyError, match=expected):
        quantize(source, tmp_path / "out.gguf", "q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_formats_that_cannot_be_read_or_written(tmp_path):
    source = tmp_path / "source.gguf"
    source.write_bytes(GGUFBuilder().tensor("blk.0.attn_q.weight", [2, 64], 27, bytes(1024)).build())
    with GGUFFile.open(source) as file:
        with pytest.raises(UnsupportedFormatError, match="is stored as i64, which cannot be read"):
            plan_quantization(file, "q8_0")
        with pytest.raises(UnsupportedFormatError, match=r"^output type 'iq1_s': expected one of f32, f16"):
            plan_quantization(file, "q8_0", output_type="iq1_s")
        with pytest.raises(UnsupportedFormatError, match=r"^token embedding type 'x': expected one of f32, f16"):
            plan_quantization(file, "q8_0", token_embd_type="x")
        with pytest.raises(WoollyError, match="type 'q9' is unknown"):
            plan_quantization(file, "q9")


def test_empty_files_are_files(tmp_path):
    source = tmp_path / "source.gguf"
    source.write_bytes(GGUFBuilder().build())
    with GGUFFile.open(source) as file:
        plan = plan_quantization(file, "q8_0")
        assert plan.bits_per_weight == 0
        quantize_file(file, tmp_path / "out.gguf", plan)
    assert formats_of(tmp_path / "out.gguf") == {}


def test_killed_in_the_middle_leaves_what_was_there(source, tmp_path):
    target = tmp_path / "out.gguf"
    target.write_bytes(b"old")
    slow = (
        "import sys, time; from woolly import cli, quantizing; inner = quantizing.quantize_rows\n"
        "def quantize_rows(*args, **options):\n"
        "    print('quantising', flush=True); time.sleep(30); return inner(*args, **options)\n"
        "quantizing.quantize_rows = quantize_rows; cli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", slow, "quantize", str(source), str(target), "q8_0", "--force"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "quantising\n"
        process.send_signal(signal.SIGKILL)
    assert target.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    assert cli.main(["quantize", str(source), str(target), "q8_0", "--force"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert formats_of(target)["output.weight"] == "q8_0"


# --- the command ---


def test_command(source, tmp_path, capsys):
    target = tmp_path / "out.gguf"
    assert cli.main(["quantize", str(source), str(target), "Q4_K_M", "--threads", "2"]) == 0
    out = capsys.readouterr().out
    assert "q4_k_m" in out
    assert "Bits a weight" in out
    assert "before" in out
    assert formats_of(target)["output.weight"] == "q6_k"
    with woolly.load_gguf(target, n_ctx=64) as model:
        assert np.isfinite(model.forward([1, 70, 71])).all()


def test_existing_files_need_force(source, tmp_path, capsys):
    target = tmp_path / "out.gguf"
    target.write_bytes(b"old")
    assert cli.main(["quantize", str(source), str(target), "q8_0"]) == cli.EXIT_FAILURE
    assert "out.gguf: the file exists; --force replaces it" in capsys.readouterr().err
    assert target.read_bytes() == b"old"
    assert cli.main(["quantize", str(source), str(target), "q8_0", "--force"]) == 0
    assert formats_of(target)["output.weight"] == "q8_0"
    assert cli.main(["quantize", str(source), str(tmp_path), "q8_0", "--force"]) == cli.EXIT_FAILURE
    assert "is a folder, expected the name of a file to write" in capsys.readouterr().err


def test_dry_run_writes_nothing(source, tmp_path, capsys):
    target = tmp_path / "out.gguf"
    assert cli.main(["quantize", str(source), str(target), "q4_k_s", "--dry-run", "--output-type", "Q5_K"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == "output.weight" and "q5_k" in line for line in lines)
    assert any(line.split()[:1] == ["blk.1.attn_v.weight"] and "q5_k" in line for line in lines)
    assert not list(tmp_path.iterdir())
    assert cli.main(["quantize", str(source), str(target), "q4_k_s", "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["plan"]["output.weight"]["after"] == "q6_k"
    assert answer["bits_per_weight"] < 32
    assert not list(tmp_path.iterdir())


def test_json(source, tmp_path, capsys):
    target = tmp_path / "out.gguf"
    options = ["--pure", "--token-embd-type", "q8_0", "--json"]
    assert cli.main(["quantize", str(source), str(target), "q3_k", *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["type"] == "q3_k_m"
    assert answer["tensors"] == {"q3_k": 15, "f32": 5, "q8_0": 1}
    assert answer["path"] == str(target)
    assert answer["bytes_after"] < answer["bytes_before"]


def test_requantising_is_said(source, tmp_path, capsys):
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    assert cli.main(["quantize", str(source), str(first), "q8_0"]) == 0
    assert cli.main(["quantize", str(first), str(second), "q4_0"]) == cli.EXIT_FAILURE
    assert "--allow-requantize takes this one" in capsys.readouterr().err
    assert not second.exists()
    assert cli.main(["quantize", str(first), str(second), "q4_0", "--allow-requantize"]) == 0
    assert "quantised before" in capsys.readouterr().err


def test_errors_of_the_command(source, tmp_path, capsys):
    for arguments, message in (
        ([str(source), str(tmp_path / "out.gguf"), "q9"], "type 'q9' is unknown"),
        ([str(tmp_path / "missing.gguf"), str(tmp_path / "out.gguf"), "q8_0"], "missing.gguf"),
        ([str(source), str(tmp_path / "no" / "out.gguf"), "q8_0"], "No such file or directory"),
    ):
        assert cli.main(["quantize", *arguments]) == cli.EXIT_FAILURE
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_llama_cpp_opens_it(source, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    path = quantize(source, tmp_path / "out.gguf", "q4_k_m")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_predict, params.warmup = 64, 4, False
    server = xllamacpp.Server(params)
    answer = server.handle_completions({"prompt": "Hello", "n_predict": 4, "temperature": 0.0})
    assert "error" not in answer


@pytest.mark.slow
def test_smollm2_takes_seconds(smollm2_path, tmp_path):
    began = time.perf_counter()
    path = quantize(smollm2_path, tmp_path / "out.gguf", "q4_k_m", allow_requantize=True)
    assert time.perf_counter() - began < 30
    with woolly.load_gguf(path, n_ctx=64) as model:
        assert "Paris" in model.generate("The capital of France is", max_tokens=4, temperature=0).text
