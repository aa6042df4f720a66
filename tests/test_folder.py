"""Hugging Face folders: they run as the GGUF file of the same weights does, and what is wrong with one is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_folder import (
    byte_level_tokenizer,
    encode,
    folder_from_gguf,
    safetensors_bytes,
    write_folder,
    write_json,
)
from make_gguf import write_tiny_gemma3, write_tiny_llama

import woolly
from woolly import cli
from woolly.convert.config_json import JsonObject
from woolly.convert.folder import ModelFolder
from woolly.convert.recipes import RECIPES
from woolly.convert.rope import rope_keys
from woolly.errors import CheckpointError, GGUFError, UnsupportedModelError, WoollyError
from woolly.gguf_file import GGUFFile
from woolly.stored_file import FileRange

TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 270, 40)]


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    gguf = write_tiny_llama(tmp_path / "tiny.gguf", tied=False)
    return gguf, folder_from_gguf(gguf, tmp_path / "folder")


def change_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text()) | changes
    write_json(path, value)


def logits(path: Path, **options: Any) -> np.ndarray:
    with woolly.load(path, n_threads=2, **options) as model:
        return model.forward(TOKENS)


@pytest.mark.parametrize("n_shards", [1, 3])
def test_a_folder_has_the_logits_of_its_gguf_file(tmp_path: Path, n_shards: int) -> None:
    gguf = write_tiny_llama(tmp_path / "tiny.gguf", tied=n_shards == 1, n_heads=6, n_kv_heads=3, head_dim=10)
    folder = folder_from_gguf(gguf, tmp_path / "folder", n_shards=n_shards)
    expected = logits(gguf)
    assert logits(folder).tobytes() == expected.tobytes()
    if n_shards == 1:
        assert logits(folder / "model.safetensors").tobytes() == expected.tobytes()
    with ModelFolder.open(folder) as ours, GGUFFile.open(gguf) as theirs:
        assert set(ours.tensors) == set(theirs.tensors)
        for name, info in theirs.tensors.items():
            assert (ours.tensors[name].shape, ours.tensors[name].format) == (info.shape, info.format)
            assert ours.bytes_of(name).read().tobytes() == theirs.tensor_bytes(name).tobytes(), name
        assert "folder" in repr(ours)


def test_unchanged_matrices_stay_in_their_file(llama: tuple[Path, Path]) -> None:
    with ModelFolder.open(llama[1]) as folder:
        assert isinstance(folder.bytes_of("blk.0.ffn_down.weight"), FileRange)
        assert not isinstance(folder.bytes_of("blk.0.attn_q.weight"), FileRange)


def test_gemma3(tmp_path: Path) -> None:
    gguf = write_tiny_gemma3(tmp_path / "tiny.gguf")
    folder = folder_from_gguf(gguf, tmp_path / "folder")
    np.testing.assert_allclose(logits(folder), logits(gguf), atol=1e-4)
    # as published, with the vision tower beside it, and as transformers 5 writes RoPE
    config = json.loads((folder / "config.json").read_text())
    theta = {"full_attention": config.pop("rope_theta"), "sliding_attention": 10000.0}
    rope = {kind: {"rope_theta": base, "rope_type": "default"} for kind, base in theta.items()}
    config["layer_types"] = ["full_attention" if i == 5 else "sliding_attention" for i in range(7)]
    text = {key: value for key, value in config.items() if key != "architectures"} | {"rope_parameters": rope}
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}, "text_config": text}
    before = logits(folder)
    write_json(folder / "config.json", outer)
    rewrite(folder, lambda name: "language_model." + name, {"vision_tower.x": np.zeros((2, 2))})
    assert logits(folder).tobytes() == before.tobytes()


def rewrite(folder: Path, rename: Any, more: dict[str, np.ndarray] | None = None) -> None:
    """Write model.safetensors again with other names and more tensors."""
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        if (new := rename(name)) is not None:
            tensors[new] = (entry["dtype"], entry["shape"], raw[begin:end])
    tensors |= {name: encode(values, "F32") for name, values in (more or {}).items()}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_narrow_floats_widen_exactly(tmp_path: Path, dtype: str) -> None:
    gguf = write_tiny_llama(tmp_path / "tiny.gguf")
    narrow = folder_from_gguf(gguf, tmp_path / "narrow", dtype=dtype)
    with ModelFolder.open(narrow) as folder:
        assert folder.tensors["blk.0.attn_q.weight"].format.name == dtype.lower()
        assert folder.tensors["blk.0.attn_norm.weight"].format.name == "f32"
    raw = (narrow / "model.safetensors").read_bytes()
    wide = shutil.copytree(narrow, tmp_path / "wide")
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        bits = np.frombuffer(raw[begin:end], "<u2")
        wider = (bits.astype(np.uint32) << 16).view("<f4") if dtype == "BF16" else bits.view("<f2").astype("<f4")
        tensors[name] = ("F32", entry["shape"], wider.tobytes())
    (wide / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    assert logits(narrow).tobytes() == logits(wide).tobytes()


def test_odd_addresses_are_read(tmp_path: Path) -> None:
    folder = folder_from_gguf(write_tiny_llama(tmp_path / "tiny.gguf"), tmp_path / "folder")
    expected = logits(folder)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    path.write_bytes((size + 1).to_bytes(8, "little") + raw[8 : 8 + size] + b" " + raw[8 + size :])
    assert logits(folder).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q5_1", "q4_k_m", "q5_k_s", "Q6_K", "iq4_xs", "q2_k", "bf16", "f16"])
def test_quantising_while_loading(tmp_path: Path, name: str) -> None:
    shape = {"hidden": 256, "head_dim": 64, "intermediate": 288}  # ffn_down is no whole number of 256-blocks
    gguf = write_tiny_llama(tmp_path / "tiny.gguf", tied=False, **shape)
    folder = folder_from_gguf(gguf, tmp_path / "folder")
    assert cli.main(["quantize", str(gguf), str(tmp_path / "made.gguf"), name]) == 0
    expected = logits(tmp_path / "made.gguf").tobytes()
    assert logits(folder, quantize=name).tobytes() == expected
    assert logits(gguf, quantize=name).tobytes() == expected
    assert cli.main(["convert", str(folder), str(tmp_path / "converted.gguf"), "--dtype", name]) == 0
    assert logits(tmp_path / "converted.gguf").tobytes() == expected


def test_what_cannot_be_quantised_is_refused(llama: tuple[Path, Path]) -> None:
    with pytest.raises(WoollyError, match="type 'q9' is unknown; expected one of f32, f16"):
        woolly.load(llama[1], quantize="q9")
    path = llama[1] / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-64 * 4 - 4 : -64 * 4] = np.float32(np.nan).tobytes()
    raw[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(raw)
    with pytest.raises(WoollyError, match=r"tensor '.*\.weight', rows from 0: weight nan in row"):
        woolly.load(llama[1], quantize="q8_0")


def test_inspect_shows_a_folder(llama: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(llama[1]), "--json", "--tensors"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["architecture"], facts["n_layers"], facts["gguf_version"]) == ("llama", 2, None)
    assert facts["file_bytes"] == (llama[1] / "model.safetensors").stat().st_size
    assert facts["tokenizer"]["pre"] == "gpt-2"


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertModel"]}, r"architectures \['BertModel'\] is not supported; those that are: LlamaFor"),
        ({"architectures": "Llama"}, "architectures: expected a list, got 'Llama'"),
        ({"hidden_size": "64"}, "hidden_size: expected a whole number, got '64'"),
        ({"hidden_size": -1}, "hidden_size: expected a whole number, got -1"),
        ({"num_hidden_layers": None}, "num_hidden_layers: expected a whole number, it is missing"),
        ({"rms_norm_eps": True}, "rms_norm_eps: expected a number, got True"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps: expected a number"),
        ({"vocab_size": 321}, "vocab_size: the embedding has 320 rows, got 321"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', what is supported is 'silu'"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected 1 to 4096, got 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: expected 1 to 4096, got 0"),
        ({"num_hidden_layers": 1 << 30}, "num_hidden_layers: expected 1 to 256, got 1073741824"),
        ({"head_dim": 1 << 30}, "head_dim: expected 1 to 1024, got 1073741824"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, what is supported is 1"),
        ({"attention_bias": True}, "attention_bias is true, but no file has layers.0.self_attn.q_proj.bias"),
        (
            {"num_attention_heads": 3},
            r"'model.layers.0.self_attn.q_proj.weight': shape \(64, 64\): expected a multiple",
        ),
        ({"num_hidden_layers": 1}, r"'model.layers.1.*': config.json says num_hidden_layers is 1"),
        ({"num_hidden_layers": 3}, "layers 0 and 2 differ: attn_k.weight is in one of them only"),
        ({"rope_scaling": {"type": "ntk"}}, "rope_type 'ntk' is not supported; those that are: default, dynamic, lin"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate is not True for this model"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.quant_method 'fp8' is not supported"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config.quant_method 'mxfp4' is not supp"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: expected a number, it is missing"),
        ({"rope_scaling": [1]}, r"rope_scaling: expected an object, got \[1\]"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false, got 'no'"),
    ],
)
def test_bad_settings_are_refused(llama: tuple[Path, Path], changes: dict[str, Any], message: str) -> None:
    _, folder = llama
    change_json(folder / "config.json", **changes)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message) as error:
        woolly.load(folder)
    assert str(folder) in str(error.value)


SLOWED = {"sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "full_attention": {}}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Gemma3ForCausalLM", {"layer_types": ["full_attention"] * 2}, "layer_types is .* the pattern"),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar is 7, what is supported is 16"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0, .* null"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("Gemma3ForCausalLM", {"sliding_window": 8, "rope_parameters": SLOWED}, "without scaling on layers that slide"),
        ("Olmo3ForCausalLM", {"sliding_window": 8, "rope_parameters": SLOWED}, "without scaling on layers that slide"),
        ("Olmo3ForCausalLM", {"layer_types": ["full_attention"] * 2}, "the pattern that the architecture was publis"),
        ("Qwen2ForCausalLM", {"use_sliding_window": True}, "use_sliding_window is True, what is supported is false"),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}, "norm_topk_prob is False, what is supported is true"),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": True, "mlp_only_layers": [1]}, "experts in every layer"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, "no_rope_layers is .* all layers but every fourth"),
        ("GptOssForCausalLM", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0, what is supported is 7.0"),
    ],
)
def test_what_gguf_cannot_express_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    fields = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "head_dim": 16} | changes
    with pytest.raises(UnsupportedModelError, match=message):
        RECIPES[name].keys(JsonObject("config.json", fields))


def test_a_period_of_no_layers_is_refused() -> None:
    fields = {"num_hidden_layers": 2, "sliding_window": 8, "sliding_window_pattern": 0}
    with pytest.raises(CheckpointError, match="sliding_window_pattern: expected at least 1, got 0"):
        RECIPES["Gemma3ForCausalLM"].keys(JsonObject("config.json", fields))


def test_tensors_without_a_place_are_refused(llama: tuple[Path, Path]) -> None:
    _, folder = llama
    rewrite(folder, lambda name: name, {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4)})
    logits(folder)  # a table that old files hold
    rewrite(folder, lambda name: name, {"model.layers.0.mlp.extra.weight": np.zeros((4, 4))})
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.extra.weight': it has no place in this archit"):
        woolly.load(folder)


@pytest.mark.parametrize(
    ("rename", "more", "message"),
    [
        (lambda name: None if "embed" in name else name, {}, "its weights have no embedding"),
        (
            lambda name: None if "lm_head" in name else name,
            {},
            "tie_word_embeddings is false, but no file has lm_head.weight",
        ),
        (
            lambda name: name,
            {"norm.weight": np.ones(64)},
            r"'norm.weight': it is in .* too|'model.norm.weight': it is in",
        ),
        (
            lambda name: None if "norm" in name else name,
            {"model.norm.weight": np.ones((2, 2, 2, 2))},
            "one to three dim",
        ),
        (lambda name: name.replace("layers.1.", "layers.01."), {}, "'model.layers.01.* no place in this architecture"),
        (lambda name: name, {"embed_tokens": np.ones((320, 64))}, "'embed_tokens': it is what 'model.embed_tokens.wei"),
    ],
)
def test_misfitting_tensors_are_refused(llama: tuple[Path, Path], rename: Any, more: Any, message: str) -> None:
    rewrite(llama[1], rename, more)
    with pytest.raises(CheckpointError, match=message):
        woolly.load(llama[1])


def test_an_index_names_what_there_is(llama: tuple[Path, Path]) -> None:
    _, folder = llama
    index = folder / "model.safetensors.index.json"
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"]
    write_json(index, {"weight_map": dict.fromkeys(names, "model.safetensors")})
    logits(folder)
    write_json(index, {"weight_map": dict.fromkeys([*names, "lm_body.weight"], "model.safetensors")})
    with pytest.raises(CheckpointError, match=r"index\.json: no file has the tensor 'lm_body\.weight'"):
        woolly.load(folder)


def test_a_head_that_differs_from_the_embedding_is_not_tied(llama: tuple[Path, Path]) -> None:
    _, folder = llama
    untied = logits(folder)
    change_json(folder / "config.json", tie_word_embeddings=True)
    assert logits(folder).tobytes() == untied.tobytes()
    rewrite(folder, lambda name: None if name == "lm_head.weight" else name)
    tied = logits(folder)
    assert tied.tobytes() != untied.tobytes()
    with ModelFolder.open(folder) as opened:
        embedding = (
            opened.bytes_of("token_embd.weight").read().view("<f4").reshape(opened.tensors["token_embd.weight"].shape)
        )
    rewrite(folder, lambda name: name, {"lm_head.weight": embedding})
    with ModelFolder.open(folder) as opened:
        assert "output.weight" not in opened.tensors
    assert logits(folder).tobytes() == tied.tobytes()


def test_pointers_of_git_lfs_are_named(llama: tuple[Path, Path], tmp_path: Path) -> None:
    for path in (llama[1] / "model.safetensors", tmp_path / "model.gguf"):
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
        with pytest.raises(
            (CheckpointError, GGUFError), match=r"a pointer of Git LFS, not the .* file that it stands for"
        ):
            woolly.load(path if path.suffix == ".gguf" else path.parent)


def test_integers_are_no_weights(llama: tuple[Path, Path]) -> None:
    _, folder = llama
    path = folder / "model.safetensors"
    raw = path.read_bytes().replace(b'"F32", "shape": [128, 64]', b'"I32", "shape": [128, 64]', 1)
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"expected F32, F16 or BF16 weights for blk.0.ffn_.*, found I32"):
        woolly.load(folder)


def test_files_that_are_missing_or_no_json(llama: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = llama
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: the file is missing"):
        woolly.load(tmp_path / "empty")
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    logits(folder)  # model.safetensors it is
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"expected model.safetensors or .*index.json, found 2 files"):
        woolly.load(folder)
    (folder / "other.safetensors").unlink()
    logits(folder)
    (folder / "one.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found 0 files; weights in pytorch_model.bin are not read"):
        woolly.load(folder)
    for text, message in (("{", "no JSON"), ("[1]", r"expected a JSON object, found \[1\]")):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            woolly.load(folder)
    shutil.copy(folder / "pytorch_model.bin", tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match=r"it has no configuration, and there is no config.json beside it"):
        woolly.load(tmp_path / "alone.safetensors")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "expected 1 to 4096 files, found 0"),
        ({"a": "../x.safetensors"}, r"expected names of safetensors files, found '../x.safetensors'"),
        ({"a": "x.bin"}, "expected names of safetensors files, found 'x.bin'"),
        ({"a": 3}, "weight_map.a: expected a string, got 3"),
    ],
)
def test_bad_indices_are_refused(llama: tuple[Path, Path], weight_map: Any, message: str) -> None:
    write_json(llama[1] / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match=message):
        woolly.load(llama[1])


# --- single changes ---


def test_rope_scaling() -> None:
    def keys(**scaling: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        fields = {"max_position_embeddings": 8192, "original_max_position_embeddings": None}
        return rope_keys(JsonObject("config.json", fields), JsonObject("config.json", scaling), 8)

    assert keys() == ({"rope.freq_base": 10000.0}, {})
    assert keys(rope_type="linear", factor=8)[0]["rope.scaling.factor"] == 8.0
    yarn = keys(rope_type="yarn", factor=4.0, attention_factor=1.0)[0]
    assert yarn["rope.scaling.original_context_length"] == 8192
    assert yarn["rope.scaling.attn_factor"] == pytest.approx(1 / (0.1 * np.log(4) + 1))
    with pytest.raises(UnsupportedModelError, match="mscale is not supported"):
        keys(rope_type="yarn", factor=4.0, mscale=1.0)
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factors = keys(type="llama3", rope_theta=500000.0, **llama3)[1]["rope_freqs.weight"]
    assert factors.dtype == np.float32
    np.testing.assert_allclose(factors, [1, 1, 2.69453, 8], rtol=2e-3)
    with pytest.raises(CheckpointError, match="low_freq_factor: expected positive factors"):
        keys(type="llama3", **(llama3 | {"low_freq_factor": 5.0}))
    long = {"long_factor": [1, 2, 3, 4], "short_factor": [1.0] * 4, "original_max_position_embeddings": 4096}
    found, tensors = keys(type="longrope", **long)
    assert tensors["rope_factors_long.weight"].tolist() == [1, 2, 3, 4]
    assert found["rope.scaling.attn_factor"] == pytest.approx(np.sqrt(1 + np.log(2) / np.log(4096)))
    with pytest.raises(CheckpointError, match="long_factor: expected 4 numbers"):
        keys(type="longrope", **(long | {"long_factor": [1]}))


def expert_tensors(rng: np.random.Generator, *, as_blocks: bool) -> dict[str, tuple[str, list[int], bytes]]:
    """A layer of gpt-oss with 2 experts, 64 columns and 32 rows each of gate and up."""
    part = "model.layers.0.mlp.experts."
    tensors = {
        part + "gate_up_proj_bias": encode(rng.standard_normal((2, 64)), "BF16"),
        part + "down_proj_bias": encode(rng.standard_normal((2, 64)), "BF16"),
    }
    for name, n_rows, n_cols in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
        if as_blocks:
            blocks = rng.integers(0, 256, (2, n_rows, n_cols // 32, 16), np.uint8)
            scales = rng.integers(120, 130, blocks.shape[:3], np.uint8)
            tensors[part + name + "_blocks"] = ("U8", list(blocks.shape), blocks.tobytes())
            tensors[part + name + "_scales"] = ("U8", list(scales.shape), scales.tobytes())
        else:
            tensors[part + name] = encode(rng.standard_normal((2, n_cols, n_rows)), "F32")
    return tensors


@pytest.mark.parametrize("as_blocks", [True, False])
def test_experts_of_gpt_oss(tmp_path: Path, as_blocks: bool) -> None:
    import gguf

    tensors = expert_tensors(np.random.default_rng(0), as_blocks=as_blocks)
    config = {
        "architectures": ["GptOssForCausalLM"],
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "vocab_size": 300,
        "sliding_window": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    folder = write_folder(tmp_path / "folder", config, {})
    tensors["model.embed_tokens.weight"] = encode(np.zeros((300, 64)), "BF16")
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    part = "model.layers.0.mlp.experts."

    def array(name: str, dtype: str) -> np.ndarray:
        _, shape, raw = tensors[part + name]
        return np.frombuffer(raw, dtype).reshape(shape)

    with ModelFolder.open(folder) as ours:
        bias = np.frombuffer(ours.bytes_of("blk.0.ffn_up_exps.bias").read(), np.float32).reshape(2, 32)
        wide = (array("gate_up_proj_bias", "<u2").astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(bias, wide[:, 1::2])
        for target, source, step in (("gate", "gate_up_proj", 2), ("up", "gate_up_proj", 2), ("down", "down_proj", 1)):
            info = ours.tensors[f"blk.0.ffn_{target}_exps.weight"]
            raw = ours.bytes_of(info.name).read()
            first = int(target == "up")
            if as_blocks:
                values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
                blocks, scales = array(source + "_blocks", "u1"), array(source + "_scales", "u1")
                pairs = np.stack([values[blocks & 15], values[blocks >> 4]], axis=-1).reshape(*blocks.shape[:3], 32)
                expected = pairs * np.exp2(scales.astype(np.float64) - 127)[..., None]
                found = gguf.quants.dequantize(raw.reshape(-1, 17), gguf.GGMLQuantizationType.MXFP4)
            else:
                expected, found = array(source, "<f4").swapaxes(1, 2), raw.view(np.float32)
            expected = expected.reshape(2, 64, -1)[:, first::step]
            assert info.shape == expected.shape
            np.testing.assert_array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("gate_up_proj_blocks", ("U8", [2, 64, 4, 8]), r"expected U8 of shape \(experts, rows, blocks, 16\), found"),
        ("gate_up_proj_scales", ("U8", [2, 32, 4]), r"expected U8 of shape \(2, 64, 2\), found \(2, 32, 4\)"),
        ("gate_up_proj_bias", ("BF16", [128]), r"shape \(128,\): expected two dimensions, the last an even number"),
    ],
)
def test_misshapen_experts_are_refused(tmp_path: Path, name: str, changed: Any, message: str) -> None:
    tensors = expert_tensors(np.random.default_rng(0), as_blocks=True)
    part = "model.layers.0.mlp.experts."
    tensors[part + name] = (*changed, tensors[part + name][2])
    tensors["model.embed_tokens.weight"] = encode(np.zeros((300, 64)), "BF16")
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(tensors))
    config = {"architectures": ["GptOssForCausalLM"], "num_hidden_layers": 1, "vocab_size": 300, "hidden_size": 64}
    config |= {"num_attention_heads": 4, "max_position_embeddings": 64, "intermediate_size": 32, "sliding_window": 8}
    write_json(tmp_path / "config.json", config | {"num_local_experts": 2, "num_experts_per_tok": 1})
    write_json(tmp_path / "tokenizer.json", byte_level_tokenizer())
    with pytest.raises(CheckpointError, match=message):
        ModelFolder.open(tmp_path)


def test_experts_that_are_missing(tmp_path: Path) -> None:
    part = "model.layers.0.block_sparse_moe.experts."
    tensors = {"model.embed_tokens.weight": np.zeros((300, 64)), f"{part}0.w1.weight": np.zeros((8, 64))}
    config = {"architectures": ["MixtralForCausalLM"], "num_hidden_layers": 1, "vocab_size": 300, "hidden_size": 64}
    config |= {"num_attention_heads": 4, "max_position_embeddings": 64, "intermediate_size": 8}
    config |= {"num_local_experts": 3, "num_experts_per_tok": 2}
    folder = write_folder(tmp_path / "folder", config, tensors | {f"{part}1.w1.weight": np.ones((8, 64))})
    with ModelFolder.open(folder) as ours:
        assert ours.tensors["blk.0.ffn_gate_exps.weight"].shape == (2, 8, 64)
        stacked = ours.bytes_of("blk.0.ffn_gate_exps.weight").read().view(np.float32).reshape(2, -1)
        assert (stacked.min(axis=1).tolist(), stacked.max(axis=1).tolist()) == ([0, 1], [0, 1])
    write_folder(folder, config, tensors | {f"{part}2.w1.weight": np.ones((8, 64))})
    with pytest.raises(CheckpointError, match="of 3 experts' tensors 2 are there"):
        ModelFolder.open(folder)
    write_folder(folder, config, tensors | {f"{part}1.w1.weight": np.ones((9, 64))})
    with pytest.raises(CheckpointError, match=r"expected F32 of shape \(8, 64\) like its like, found \(9, 64\)"):
        ModelFolder.open(folder)
