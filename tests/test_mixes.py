"""Which tensor gets which format: the rules of llama.cpp's names, as facts."""

from __future__ import annotations

from collections import Counter

import gguf
import numpy as np
import pytest

from woolly._kernels import QUANTIZED_FORMATS
from woolly.errors import GGUFError, WoollyError
from woolly.formats import FORMATS
from woolly.gguf_file import GGUFFile, TensorInfo
from woolly.mixes import ALIASES, FALLBACKS, MIXES, is_quantizable, plan_formats, resolve_mix


def tensor(name: str, *shape: int, format: str = "f16") -> TensorInfo:
    return TensorInfo(name, shape, FORMATS[format], 0, 0)


def model(
    *, n_layers=32, hidden=4096, mlp=14336, heads=32, kv_heads=8, experts=0, tied=False, architecture="llama"
) -> tuple[dict[str, TensorInfo], dict[str, object]]:
    """Tensors and metadata of a model of Llama's shape; Llama 3 8B by default."""
    kv = hidden // heads * kv_heads
    shapes = {"token_embd": (128256, hidden), "output_norm": (hidden,)}
    for i in range(n_layers):
        ffn = {"gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp)}
        if experts:
            ffn = {f"{name}_exps": (experts, *shape) for name, shape in ffn.items()} | {"gate_inp": (experts, hidden)}
        shapes |= {f"blk.{i}.ffn_{name}": shape for name, shape in ffn.items()}
        shapes |= {
            f"blk.{i}.attn_norm": (hidden,),
            f"blk.{i}.attn_q": (hidden, hidden),
            f"blk.{i}.attn_k": (kv, hidden),
            f"blk.{i}.attn_v": (kv, hidden),
            f"blk.{i}.attn_output": (hidden, hidden),
        }
    if not tied:
        shapes["output"] = (128256, hidden)
    names = {f"{name}.weight": shape for name, shape in shapes.items()}
    metadata: dict[str, object] = {
        "general.architecture": architecture,
        f"{architecture}.block_count": n_layers,
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": kv_heads,
    }
    if experts:
        metadata[f"{architecture}.expert_count"] = experts
    return {name: tensor(name, *shape) for name, shape in names.items()}, metadata


def formats_of(name: str, options: dict[str, object] | None = None, **sizes: object) -> dict[str, str]:
    tensors, metadata = model(**sizes)
    plan = plan_formats(tensors, metadata, resolve_mix(name), **(options or {}))
    assert list(plan) == list(tensors)
    return {name.removesuffix(".weight"): format.name for name, format in plan.items()}


def by_part(formats: dict[str, str]) -> dict[str, dict[str, int]]:
    """How many layers have each part in each format."""
    parts: dict[str, Counter[str]] = {}
    for name, format in formats.items():
        parts.setdefault(name.rpartition(".")[2], Counter())[format] += 1
    return {part: dict(counts) for part, counts in parts.items()}


# Llama 3 8B: 32 layers, four query heads a key head. Parts that are not named here are all in the base format.
EXPECTED = {
    "q2_k": {"attn_v": {"q4_k": 32}, "attn_output": {"q3_k": 32}, "ffn_down": {"q3_k": 32}},
    "q2_k_s": {"attn_v": {"q4_k": 32}, "ffn_down": {"q4_k": 4, "q2_k": 28}},
    "q3_k_s": {},
    "q3_k_m": {
        "attn_v": {"q5_k": 2, "q4_k": 30},
        "attn_output": {"q4_k": 32},
        "ffn_down": {"q5_k": 2, "q4_k": 30},
    },
    "q3_k_l": {"attn_v": {"q5_k": 32}, "attn_output": {"q5_k": 32}, "ffn_down": {"q5_k": 32}},
    "q4_k_s": {"attn_v": {"q5_k": 4, "q4_k": 28}, "ffn_down": {"q5_k": 4, "q4_k": 28}},
    "q4_k_m": {"attn_v": {"q6_k": 16, "q4_k": 16}, "ffn_down": {"q6_k": 16, "q4_k": 16}},
    "q5_k_s": {},
    "q5_k_m": {"attn_v": {"q6_k": 16, "q5_k": 16}, "ffn_down": {"q6_k": 16, "q5_k": 16}},
    "q6_k": {},
    "iq4_nl": {"attn_v": {"q5_k": 32}, "ffn_down": {"q5_k": 4, "iq4_nl": 28}},
    "iq4_xs": {"attn_v": {"q5_k": 32}, "ffn_down": {"q5_k": 4, "iq4_xs": 28}},
    "q4_0": {},
    "q4_1": {},
    "q5_0": {},
    "q5_1": {},
    "mxfp4": {},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_llama_3_8b(name):
    formats = formats_of(name)
    parts = by_part(formats)
    base = MIXES[name].base
    assert formats["output"] == "q6_k"
    assert formats["token_embd"] == base
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        assert parts[part] == EXPECTED[name].get(part, {base: 32}), part
    assert parts["attn_norm"] == {"f16": 32}  # as it was


def test_layers_that_take_more_bits():
    """The first and last eighth of the layers, and every third between."""
    formats = formats_of("q4_k_m")
    more = [i for i in range(32) if formats[f"blk.{i}.ffn_down"] == "q6_k"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert more == [i for i in range(32) if formats[f"blk.{i}.attn_v"] == "q6_k"]


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0"])
def test_one_format_for_all(name):
    formats = formats_of(name)
    assert {format for part, format in formats.items() if "norm" not in part} == {name}


def test_tied_embedding_is_the_output():
    formats = formats_of("q4_k_m", tied=True)
    assert formats["token_embd"] == "q6_k"
    assert "output" not in formats


def test_query_heads_without_groups():
    assert by_part(formats_of("q2_k", kv_heads=32))["attn_v"] == {"q3_k": 32}
    assert by_part(formats_of("q2_k_s", kv_heads=32))["attn_v"] == {"q2_k": 32}
    assert by_part(formats_of("iq4_xs", kv_heads=32))["attn_v"] == {"iq4_xs": 32}


def test_70b_takes_more_for_its_small_attn_v():
    large = {"n_layers": 80, "hidden": 8192, "mlp": 28672, "heads": 64}
    assert by_part(formats_of("q3_k_s", **large))["attn_v"] == {"q5_k": 80}
    assert by_part(formats_of("q4_k_m", **large))["attn_v"] == {"q6_k": 40, "q5_k": 40}
    assert by_part(formats_of("q3_k_s", **large, architecture="qwen3"))["attn_v"] == {"q3_k": 80}


def test_eight_experts():
    formats = by_part(formats_of("q4_k_m", experts=8))
    assert formats["attn_v"] == formats["attn_k"] == {"q8_0": 32}
    assert formats["attn_output"] == {"q5_k": 32}
    assert formats["ffn_down_exps"] == {"q6_k": 16, "q4_k": 16}
    assert formats["ffn_gate_exps"] == {"q4_k": 32}
    assert formats["ffn_gate_inp"] == {"f16": 32}  # the router is kept
    assert by_part(formats_of("q5_k_m", experts=8))["attn_output"] == {"q5_k": 32}
    assert by_part(formats_of("q3_k_l", experts=8))["attn_output"] == {"q3_k": 32}
    other = by_part(formats_of("q4_k_m", experts=32))
    assert other["attn_k"] == other["attn_output"] == {"q4_k": 32}


def test_mxfp4_for_experts_alone():
    formats = by_part(formats_of("mxfp4_moe", experts=32))
    assert formats["ffn_up_exps"] == formats["ffn_down_exps"] == {"mxfp4": 32}
    assert formats["attn_q"] == {"q8_0": 32}
    assert formats["output"] == formats["token_embd"] == {"q8_0": 1}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("q2_k", "iq4_nl"),
        ("q3_k_s", "iq4_nl"),
        ("q4_k_s", "q5_0"),
        ("q5_k_s", "q5_1"),
        ("q6_k", "q8_0"),
        ("iq4_xs", "iq4_nl"),
    ],
)
def test_rows_that_are_no_whole_blocks(name, expected):
    formats = formats_of(name, hidden=576, mlp=1536, heads=9, kv_heads=3, n_layers=30)
    assert formats["blk.10.attn_q"] == formats["blk.10.ffn_up"] == expected
    assert formats["output"] == "q8_0"
    assert FORMATS[formats["blk.10.ffn_down"]].block_size == 256  # its rows have 1536


def test_rows_that_fit_nothing_are_f16():
    tensors = {"blk.0.attn_q.weight": tensor("blk.0.attn_q.weight", 8, 100, format="f32")}
    for name in ("q4_k_m", "q8_0", "mxfp4"):
        assert plan_formats(tensors, {}, MIXES[name])["blk.0.attn_q.weight"].name == "f16"


def test_options_choose_output_and_embedding():
    options = {"output_type": "q8_0", "token_embd_type": "q3_k"}
    formats = formats_of("q4_k_m", options)
    assert (formats["output"], formats["token_embd"]) == ("q8_0", "q3_k")
    assert formats_of("q4_k_m", options, tied=True)["token_embd"] == "q3_k"
    assert formats_of("q4_k_m", {"output_type": "f16"}, tied=True)["token_embd"] == "f16"
    assert formats_of("f16", {"output_type": "q8_0"})["output"] == "q8_0"
    assert set(formats_of("q4_k_m", {"pure": True}).values()) == {"q4_k", "f16"}


def test_heads_may_be_given_by_layer():
    tensors, metadata = model()
    metadata["llama.attention.head_count_kv"] = np.full(32, 32, np.uint32)
    assert plan_formats(tensors, metadata, MIXES["q2_k"])["blk.0.attn_v.weight"].name == "q3_k"
    metadata["llama.attention.head_count_kv"] = np.empty(0, np.uint32)
    assert plan_formats(tensors, metadata, MIXES["q2_k"])["blk.0.attn_v.weight"].name == "q3_k"


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_q.weight", (64, 64), True),
        ("blk.0.ffn_up_exps.weight", (4, 64, 64), True),
        ("blk.0.attn_q.bias", (64, 64), False),
        ("blk.0.attn_norm.weight", (64,), False),
        ("blk.0.attn_q_norm.weight", (4, 64), False),
        ("rope_freqs.weight", (1, 64), False),
        ("blk.0.ffn_gate_inp.weight", (8, 64), False),
        ("blk.0.ssm_conv1d.weight", (64, 4), False),
        ("position_embd.weight", (512, 64), False),
    ],
)
def test_what_is_quantised_at_all(name, shape, expected):
    assert is_quantizable(tensor(name, *shape)) is expected


def test_names():
    assert resolve_mix("Q4_K_M") is MIXES["q4_k_m"]
    for alias, name in ALIASES.items():
        assert resolve_mix(alias) is MIXES[name]
    with pytest.raises(WoollyError, match=r"^type 'q4_k_x' is unknown; expected one of f32, f16, bf16, q8_0"):
        resolve_mix("q4_k_x")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", np.arange(3), r"^general.architecture: expected a string, got \[0, 1, 2\]$"),
        ("llama.block_count", "32", r"^llama.block_count: expected an integer, got '32'$"),
        ("llama.expert_count", np.array([0.5]), r"^llama.expert_count: expected an integer, got 0.5$"),
        ("llama.attention.head_count", np.array(["a"]), r"head_count: expected an integer, got 'a'$"),
    ],
)
def test_odd_metadata_are_refused(key, value, message):
    tensors, metadata = model()
    with pytest.raises(GGUFError, match=message):
        plan_formats(tensors, metadata | {key: value}, MIXES["q4_k_m"])


@pytest.mark.parametrize("mix", MIXES.values(), ids=str)
def test_names_are_those_of_the_gguf_package(mix):
    name = {"mxfp4": "MXFP4_MOE"}.get(mix.name, mix.name.upper())
    expected = "ALL_F32" if mix.name == "f32" else f"MOSTLY_{name}"
    known = {member.name: member.value for member in gguf.LlamaFileType}
    assert known.get(expected, mix.file_type) == mix.file_type


def test_the_plan_is_that_of_a_published_file(gemma3_path):
    """Gemma 3 270M as llama.cpp wrote it: fallbacks to Q5_0 and Q8_0, Q6_K in half of the layers' ffn_down."""
    with GGUFFile.open(gemma3_path) as file:
        published = {name: info.format.name for name, info in file.tensors.items()}
        plan = plan_formats(file.tensors, file.metadata, MIXES["q4_k_m"])
    assert {name: format.name for name, format in plan.items()} == published
    assert set(published.values()) == {"f32", "q4_k", "q5_0", "q6_k", "q8_0"}


def test_mixes_that_are_searched_for():
    """Those without a format that gguf quantises too; what their rows fall back to is searched for as well."""
    plain = {name for name, mix in MIXES.items() if not mix.is_searched}
    assert plain == {"f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4", "mxfp4_moe"}


def test_all_formats_of_the_rules_can_be_made():
    assert {mix.base for mix in MIXES.values()} | set(FALLBACKS) | set(FALLBACKS.values()) <= set(QUANTIZED_FORMATS)
