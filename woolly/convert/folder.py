"""A Hugging Face model folder as a checkpoint: GGUF's keys and names over the safetensors files.

Owns which files of a folder belong to the model, and that every tensor in them has its place. The folder is untrusted:
opening it succeeds or raises an error that names the file, what in it, and the value found. What an architecture's
tensors and settings are called is in `woolly.convert.recipes`.

    config.json · model.safetensors, or model.safetensors.index.json and its shards · tokenizer.json ·
    tokenizer_config.json, generation_config.json, chat_template.jinja where there are any
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from woolly.convert.config_json import JsonObject, read_json
from woolly.convert.recipes import EXPERT, Recipe, common_keys, find_recipe
from woolly.convert.tensors import Made, Part, made
from woolly.convert.tokenizer_json import read_tokenizer
from woolly.errors import CheckpointError, UnsupportedModelError
from woolly.formats import FORMATS
from woolly.gguf_file import TensorInfo
from woolly.metadata import Metadata, show
from woolly.safetensors_file import SafetensorsFile
from woolly.stored_file import ByteSource, Closing, HeldBytes

MAX_FILES = 4096
INDEX = "model.safetensors.index.json"
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_OF_IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_LAYER = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.(.+)")
_EXPERT = re.compile(r"(?<=\.experts\.)(0|[1-9][0-9]{0,4})(?=\.)")
_BIASES = {"attention_bias": "self_attn.q_proj.bias", "mlp_bias": "mlp.up_proj.bias"}  # that settings promise
_STEP_BYTES = 1 << 24


class ModelFolder(Closing):
    """An open model folder; see `open`. A `woolly.checkpoint.Checkpoint`.

    Attributes
    ----------
    path : str
    n_bytes : int
        Of the files that hold weights.
    metadata : Metadata
    tensors : dict of str to TensorInfo
    """

    def __init__(
        self,
        path: str,
        files: list[SafetensorsFile],
        metadata: Metadata,
        makers: dict[str, Made],
        added: dict[str, Any],
    ) -> None:
        self.path = path
        self.n_bytes = sum(file.n_bytes for file in files)
        self.metadata = metadata
        self._files = files
        self._makers = makers
        self._added: dict[str, NDArray[np.float32]] = added
        self.tensors = {name: _info(maker) for name, maker in makers.items()}
        for name, array in added.items():
            self.tensors[name] = TensorInfo(name, array.shape, FORMATS["f32"], 0, array.nbytes)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ModelFolder:
        """Open a folder's files and check everything but the tensors' contents.

        Raises
        ------
        CheckpointError
            A file is missing or malformed, or a tensor has no place in the architecture.
        UnsupportedModelError
            The architecture, tokenizer or a setting has no equivalent in GGUF files.
        """
        folder = Path(path)
        config = read_json(folder / "config.json")
        recipe = find_recipe(config)
        text_config = _text_config(config, recipe)
        index = _read_index(folder)
        files = [SafetensorsFile.open(file) for file in _weight_files(folder, index)]
        _check_quantization(config, recipe)
        if index is not None:
            _check_index(index, files)
        parts = _collect(files, skips_images="vision_config" in config)
        _check_promises(config, text_config, recipe, parts)
        if "lm_head.weight" in parts and _is_tied(config, text_config, recipe):
            head, embedding = parts["lm_head.weight"], parts.get("embed_tokens.weight")
            if embedding is None or _is_same(head, embedding):
                del parts["lm_head.weight"]  # otherwise it is a head of its own, whatever the settings say
        keys, added = common_keys(text_config, recipe)
        makers = arrange(recipe, text_config, parts)
        vocab_size = makers["token_embd.weight"].shape[0]
        if vocab_size != text_config.get_int("vocab_size"):
            text_config.refuse("vocab_size", f"the embedding has {vocab_size} rows")
        general = {
            "general.architecture": recipe.arch,
            "general.type": "model",
            "general.name": folder.resolve().name,
        }
        metadata = general | keys | read_tokenizer(folder, text_config, vocab_size)
        return cls(os.fspath(path), files, Metadata.from_values(os.fspath(path), metadata), makers, added)

    def bytes_of(self, name: str) -> ByteSource:
        """The bytes of a tensor as GGUF has them: those of a file where nothing changes."""
        if name in self._added:
            return HeldBytes(self._added[name].view(np.uint8))
        return self._makers[name].bytes()

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files:
            file.close()

    def __repr__(self) -> str:
        return f"<ModelFolder {self.path!r}: {len(self.metadata)} keys, {len(self.tensors)} tensors>"


def _read_index(folder: Path) -> JsonObject | None:
    """Which file each tensor is in, where the folder says so."""
    return read_json(folder / INDEX).get_object("weight_map") if (folder / INDEX).is_file() else None


def _weight_files(folder: Path, index: JsonObject | None) -> list[Path]:
    """The safetensors files of a folder: those that the index names, else model.safetensors, else the only one.

    Raises
    ------
    CheckpointError
        There are none, several without an index, or the index is malformed.
    """
    if index is not None:
        names = {index.get_str(tensor) for tensor in index.fields}
        for name in names:
            if name != os.path.basename(name) or not name.endswith(".safetensors"):
                raise CheckpointError(f"{folder / INDEX}: expected names of safetensors files, found {show(name)}")
        if not 0 < len(names) <= MAX_FILES:
            raise CheckpointError(f"{folder / INDEX}: expected 1 to {MAX_FILES} files, found {len(names)}")
        return [folder / name for name in sorted(names)]
    found = sorted(folder.glob("*.safetensors"))
    whole = [path for path in found if path.name == "model.safetensors"] or found
    if len(whole) != 1:
        others = "" if found else "; weights in pytorch_model.bin are not read" * any(folder.glob("*.bin"))
        raise CheckpointError(f"{folder}: expected model.safetensors or {INDEX}, found {len(found)} files{others}")
    return whole


def _check_index(index: JsonObject, files: list[SafetensorsFile]) -> None:
    """Refuse an index that has tensors which no file has."""
    there = {name for file in files for name in file.tensors}
    for name in index.fields:
        if name not in there:
            raise CheckpointError(f"{index.path}: no file has the tensor {show(name)}")


def _check_promises(config: JsonObject, text_config: JsonObject, recipe: Recipe, parts: dict[str, Part]) -> None:
    """Refuse weights without what the settings say that they have."""
    for key, tensor in _BIASES.items():
        if text_config.get_bool(key, False) and f"layers.0.{tensor}" not in parts:
            raise CheckpointError(f"{config.path}: {key} is true, but no file has layers.0.{tensor}")
    is_said = "tie_word_embeddings" in text_config or "tie_word_embeddings" in config
    if is_said and not _is_tied(config, text_config, recipe) and "lm_head.weight" not in parts:
        raise CheckpointError(f"{config.path}: tie_word_embeddings is false, but no file has lm_head.weight")


def _is_same(a: Part, b: Part) -> bool:
    """Whether two tensors are the same, byte for byte."""
    if (a.tensor.dtype, a.shape) != (b.tensor.dtype, b.shape):
        return False
    sources, n_bytes = (a.bytes, b.bytes), a.tensor.n_bytes
    for begin in range(0, n_bytes, _STEP_BYTES):
        first, second = (source.read(begin, min(begin + _STEP_BYTES, n_bytes)) for source in sources)
        if not np.array_equal(first, second):
            return False
    return True


def arrange(recipe: Recipe, config: JsonObject, parts: dict[str, Part]) -> dict[str, Made]:
    """How to make each tensor of the GGUF model, by its name there.

    Parameters
    ----------
    recipe : Recipe
    config : JsonObject
    parts : dict
        All tensors of the model, by their names without the prefix.

    Raises
    ------
    CheckpointError
        A tensor has no place in the architecture, or one is missing in a layer that others have.
    """
    n_layers = config.get_int("num_hidden_layers")
    layers: list[dict[str, Part]] = [{} for _ in range(n_layers)]
    outer = {}
    for name, part in parts.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            outer[name] = part
        elif int(match[1]) < n_layers:
            layers[int(match[1])][match[2]] = part
        else:
            raise part.fail(f"config.json says num_hidden_layers is {n_layers}")
    transforms = recipe.transforms(config)
    makers = {made.name: made for made in _make(recipe.outer, "", outer, transforms)}
    if "token_embd.weight" not in makers:
        raise CheckpointError(f"{config.path}: its weights have no embedding (embed_tokens.weight)")
    expected: set[str] = set()
    for i, layer in enumerate(layers):
        prefix = f"blk.{i}."
        made = [*(recipe.make_more(prefix, layer) if recipe.make_more else ())]
        made += _make(recipe.layer, prefix, layer, transforms)
        names = {tensor.name.removeprefix(prefix) for tensor in made}
        expected = expected or names
        if missing := sorted(names ^ expected):
            raise CheckpointError(f"{config.path}: layers 0 and {i} differ: {missing[0]} is in one of them only")
        makers |= {tensor.name: tensor for tensor in made}
    return makers


def _make(table: dict[str, str], prefix: str, parts: dict[str, Part], transforms: Any) -> Iterator[Made]:
    """Tensors after a recipe's table, in the table's order; every part must be in it."""
    groups: dict[tuple[str, str], dict[int, Part]] = {}
    for name, part in parts.items():
        stem, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, suffix = name, "weight"
        expert = _EXPERT.search(stem)
        stem = _EXPERT.sub(EXPERT, stem)
        if stem not in table:
            raise part.fail("it has no place in this architecture")
        group, number = groups.setdefault((stem, suffix), {}), int(expert[1]) if expert else 0
        if number in group:
            raise part.fail(f"it is what {show(group[number].tensor.name)} is, too")
        group[number] = part
    for stem, target in table.items():
        for suffix in ("weight", "bias"):
            group = groups.get((stem, suffix))
            if group is None:
                continue
            if sorted(group) != list(range(len(group))):
                raise group[min(group)].fail(f"of {max(group) + 1} experts' tensors {len(group)} are there")
            name = f"{prefix}{target}.{suffix}"
            yield made(name, [group[i] for i in sorted(group)], transforms.get(target))


def _collect(files: list[SafetensorsFile], *, skips_images: bool) -> dict[str, Part]:
    """All tensors by name, without the prefix of the language model and without what is no weight."""
    parts: dict[str, Part] = {}
    for file in files:
        for tensor in file.tensors.values():
            part = Part(file, tensor)
            if tensor.name.endswith("rotary_emb.inv_freq") or (skips_images and tensor.name.startswith(_OF_IMAGES)):
                continue
            prefix = next((prefix for prefix in _PREFIXES if tensor.name.startswith(prefix)), "")
            name = tensor.name.removeprefix(prefix)
            if name in parts:
                raise part.fail(f"it is in {parts[name].file.path!r} too")
            parts[name] = part
    return parts


def _text_config(config: JsonObject, recipe: Recipe) -> JsonObject:
    """The settings of the language model, with the recipe's defaults."""
    text = config.get_object("text_config", config)
    given = {key: value for key, value in text.fields.items() if value is not None}
    return JsonObject(config.path, {**recipe.defaults, **given}, text.prefix)


def _is_tied(config: JsonObject, text_config: JsonObject, recipe: Recipe) -> bool:
    default = text_config.get_bool("tie_word_embeddings", recipe.is_tied)
    return config.get_bool("tie_word_embeddings", default)


def _check_quantization(config: JsonObject, recipe: Recipe) -> None:
    """Refuse weights that are quantised in a way that these files have of their own."""
    settings = config.get_object("quantization_config", None)
    if settings is None:
        return
    method = settings.get_str("quant_method", "unknown")
    if method != "mxfp4" or recipe.make_more is None:
        raise UnsupportedModelError(
            f"{config.path}: quantization_config.quant_method {method!r} is not supported, F32, F16 and BF16 are"
        )


def _info(maker: Made) -> TensorInfo:
    tensor_format = FORMATS[maker.format]
    n_elements = int(np.prod(maker.shape, dtype=np.int64))
    return TensorInfo(
        maker.name, maker.shape, tensor_format, maker.parts[0].tensor.offset, tensor_format.nbytes(n_elements)
    )
