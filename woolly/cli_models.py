"""`woolly inspect`, `woolly pull` and `woolly list`: what is known of models without running them."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from woolly import hub
from woolly.terminal import format_bytes, print_facts, print_table


def pull(args: argparse.Namespace) -> int:
    """Fetch a model and print its path."""
    print(hub.pull(args.model, force=args.force))
    return 0


def list_models(args: argparse.Namespace) -> int:
    """Print the models in the cache, then those that could be pulled."""
    cached = hub.list_models()
    known = [model for name, model in hub.CATALOGUE.items() if name not in {entry.name for entry in cached}]
    if args.json:
        models = [{"name": entry.name, "path": str(entry.path), "bytes": entry.n_bytes} for entry in cached]
        print(json.dumps({"cache": str(hub.cache_dir()), "models": models, "known": list(hub.CATALOGUE)}))
        return 0
    rows = [(entry.name, format_bytes(entry.n_bytes), str(entry.path)) for entry in cached]
    rows += [
        (model.name, format_bytes(model.n_bytes), f"not in the cache: woolly pull {model.name}") for model in known
    ]
    print_table(("Name", ">Size", "File"), rows)
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Print a summary of a model file, and its tensors where asked."""
    from woolly.convert.opening import open_checkpoint

    path = hub.resolve(args.model)
    with open_checkpoint(path) as file:
        summary = _summarise(file) | {"path": str(path), "file_bytes": file.n_bytes}
        if args.json:
            if args.tensors:
                summary["tensors"] = [_tensor_facts(tensor) for tensor in file.tensors.values()]
            print(json.dumps(_finite(summary), allow_nan=False))
            return 0
        print_facts(_summary_lines(summary))
        if args.tensors:
            print()
            rows = [
                (tensor.name, " × ".join(map(str, tensor.shape)), tensor.format.name, format_bytes(tensor.n_bytes))
                for tensor in file.tensors.values()
            ]
            print_table(("Tensor", ">Shape", "Format", ">Size"), rows)
    return 0


def _summarise(file: Any) -> dict[str, Any]:
    """What JSON shows; a key that the file lacks is None."""
    metadata, tensors = _plain_metadata(file.metadata), file.tensors.values()
    architecture = metadata.get("general.architecture")
    formats: dict[str, dict[str, int]] = {}
    for name, count in Counter(tensor.format.name for tensor in tensors).most_common():
        n_bytes = sum(tensor.n_bytes for tensor in tensors if tensor.format.name == name)
        formats[name] = {"tensors": count, "bytes": n_bytes}
    words = file.metadata.get("tokenizer.ggml.tokens")
    return {
        "name": metadata.get("general.name"),
        "architecture": architecture,
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "tensor_bytes": sum(tensor.n_bytes for tensor in tensors),
        "n_tensors": len(tensors),
        "formats": formats,
        "n_layers": metadata.get(f"{architecture}.block_count"),
        "hidden_size": metadata.get(f"{architecture}.embedding_length"),
        "context_length": metadata.get(f"{architecture}.context_length"),
        "tokenizer": {
            "model": metadata.get("tokenizer.ggml.model"),
            "pre": metadata.get("tokenizer.ggml.pre"),
            "vocab_size": len(words) if hasattr(words, "__len__") else None,
        },
        "chat_template": isinstance(metadata.get("tokenizer.chat_template"), str),
        "gguf_version": getattr(file, "version", None),
        "metadata": metadata,
    }


def _summary_lines(summary: Mapping[str, Any]) -> list[tuple[str, object]]:
    tokenizer = summary["tokenizer"]
    formats = ", ".join(f"{name} {count['tensors']}" for name, count in summary["formats"].items())
    tokenizer_words = " ".join(str(part) for part in (tokenizer["model"], tokenizer["pre"]) if part is not None)
    n_words = "" if tokenizer["vocab_size"] is None else f", {tokenizer['vocab_size']:,} tokens"
    lines = [
        ("File", summary["path"]),
        ("Name", summary["name"]),
        ("Architecture", summary["architecture"]),
        ("Parameters", f"{summary['parameters']:,}"),
        ("File size", format_bytes(summary["file_bytes"])),
        ("Tensors", f"{summary['n_tensors']} ({formats}), {format_bytes(summary['tensor_bytes'])}"),
        ("Layers", summary["n_layers"]),
        ("Hidden size", summary["hidden_size"]),
        ("Context", summary["context_length"]),
        ("Tokenizer", (tokenizer_words or "none") + n_words),
        ("Chat template", "yes" if summary["chat_template"] else "no"),
        ("GGUF version", summary["gguf_version"]),
    ]
    return [(name, "not said" if value is None else value) for name, value in lines]


def _tensor_facts(tensor: Any) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "format": tensor.format.name,
        "offset": tensor.offset,
        "bytes": tensor.n_bytes,
    }


def _plain_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The scalars, and of an array its length: a vocabulary would bury the rest."""
    return {
        key: value if isinstance(value, (str, bool, int, float)) else {"length": len(value)}
        for key, value in metadata.items()
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
