"""Writes tiny Hugging Face folders for tests: safetensors by hand, config, tokenizer. Imports nothing of woolly.

`folder_from_gguf` turns a GGUF file of `make_gguf` into the folder that it would have been converted from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from make_gguf import CHAT_TEMPLATE, MERGES, SPECIAL_TOKENS, byte_alphabet

Array = npt.NDArray[Any]
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3 = _LAYER | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


# Safetensors


def to_bf16(values: Array) -> Array:
    """The upper halves of float32 values, as uint16: cut, not rounded."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype("<u2")


def encode(values: Array, dtype: str) -> tuple[str, list[int], bytes]:
    """A tensor for `safetensors_bytes`."""
    stored = {"F32": lambda: values.astype("<f4"), "F16": lambda: values.astype("<f2"), "BF16": lambda: to_bf16(values)}
    return dtype, list(values.shape), stored[dtype]().tobytes()


def safetensors_bytes(
    tensors: Mapping[str, tuple[str, list[int], bytes]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """A safetensors file of (dtype, shape, bytes) by name."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(raw)]}
        end += len(raw)
    return with_header(header, b"".join(raw for _, _, raw in tensors.values()))


def with_header(header: Any, data: bytes) -> bytes:
    """A safetensors file of a header, as JSON or as the bytes that stand for it, and data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


# Tokenizers


def byte_level_tokenizer() -> dict[str, Any]:
    """tokenizer.json of make_gguf's vocabulary."""
    merged = [merge.replace(" ", "") for merge in MERGES]
    return {
        "added_tokens": [added_token(i, token) for i, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate([*SPECIAL_TOKENS, *byte_alphabet(), *merged])},
            "merges": [merge.split(" ") for merge in MERGES],
        },
    }


def added_token(token_id: int, text: str, *, special: bool = True) -> dict[str, Any]:
    """An entry of added_tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": text, "special": special, **flags}


# Folders


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    *,
    dtype: str = "F32",
    n_shards: int = 1,
    tokenizer: Mapping[str, Any] | None = None,
) -> Path:
    """Write all files of a folder and return it."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", byte_level_tokenizer() if tokenizer is None else tokenizer)
    settings = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", settings | {"chat_template": CHAT_TEMPLATE})
    encoded = {name: encode(values, dtype) for name, values in tensors.items()}
    if n_shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(encoded, {"format": "pt"}))
        return folder
    weight_map = {}
    for shard, names in enumerate(np.array_split(list(encoded), n_shards), start=1):
        file = f"model-{shard:05d}-of-{n_shards:05d}.safetensors"
        (folder / file).write_bytes(safetensors_bytes({str(name): encoded[str(name)] for name in names}))
        weight_map |= {str(name): file for name in names}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value), encoding="utf-8")


def folder_from_gguf(path: Path, folder: Path, *, dtype: str = "F32", n_shards: int = 1, **changes: Any) -> Path:
    """The folder of a GGUF model of `make_gguf` in F32; `changes` go into config.json."""
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    config = {**config_from_gguf(reader, arch), **changes}
    n_heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        values = np.array(tensor.data).reshape(tensor.shape[::-1])
        name = tensor.name
        if name == "rope_freqs.weight":
            continue
        if arch == "gemma3" and values.ndim == 1:
            values = values - np.float32(1)
        if name in _OUTER:
            tensors[_OUTER[name]] = values
            continue
        _, layer, stem, suffix = name.split(".")
        if arch == "llama" and stem in n_heads:  # GGUF pairs adjacent rows of a head, Hugging Face halves of it
            pairs = values.reshape(n_heads[stem], -1, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        table = _GEMMA3 if arch == "gemma3" else _LAYER
        tensors[f"model.layers.{layer}.{table[stem]}.{suffix}"] = values
    return write_folder(folder, config, tensors, dtype=dtype, n_shards=n_shards)


def config_from_gguf(reader: gguf.GGUFReader, arch: str) -> dict[str, Any]:
    """config.json as transformers wrote it before version 5."""

    def key(name: str) -> Any:
        return reader.fields[f"{arch}.{name}"].contents()

    config: dict[str, Any] = {
        "architectures": [{"llama": "LlamaForCausalLM", "gemma3": "Gemma3ForCausalLM"}[arch]],
        "vocab_size": key("vocab_size"),
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": key("attention.head_count"),
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": key("attention.key_length"),
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": float(key("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(key("rope.freq_base")),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in [tensor.name for tensor in reader.tensors],
    }
    if arch == "gemma3":
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": config["head_dim"],
            "sliding_window": key("attention.sliding_window"),
        }
    return config
