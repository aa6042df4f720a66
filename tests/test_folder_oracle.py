"""Folders as transformers writes them, tiny random models of every architecture: the same logits as there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_folder import byte_level_tokenizer, write_json

from woolly.convert.folder import ModelFolder
from woolly.convert.recipes import RECIPES
from woolly.loading import load_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "hidden_activation": "gelu_pytorch_tanh"}
MULTIPLIERS = {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
OLMO3_ROPE = {
    "full_attention": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": False}),
    "llama, tied, long": ("Llama", {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3moe": ("Qwen3Moe", {"head_dim": 32, **EXPERTS}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", GEMMA | {"num_hidden_layers": 7}),
    "gemma3, every third, capped": (
        "Gemma3",
        GEMMA | {"num_hidden_layers": 4, "sliding_window_pattern": 3, "final_logit_softcapping": 2.0},
    ),
    "qwen2, no layer slides": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen2, dynamic": ("Qwen2", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 5, "sliding_window": 8, "rope_parameters": OLMO3_ROPE}),
    "granite": ("Granite", {"attention_multiplier": 0.2, **MULTIPLIERS}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "starcoder2": ("Starcoder2", {"sliding_window": None}),
    "seed_oss": ("SeedOss", {"head_dim": 16}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 16, "use_bias": True}),
    "gpt-oss": ("GptOss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
}
TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 270, 100)]


def save(folder: Path, model: str, options: dict[str, Any]) -> Any:
    """Save a random model and return it."""
    torch.manual_seed(0)
    suffix = "TextConfig" if model == "Gemma3" else "Config"
    config = getattr(transformers, model + suffix)(**{**SIZES, **options})
    oracle = getattr(transformers, model + "ForCausalLM")(config).float().eval()
    for parameter in oracle.parameters():
        if parameter.ndim == 1:  # norms of 1 and biases of 0 would hide mistakes
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    oracle.save_pretrained(folder)
    write_json(folder / "tokenizer.json", byte_level_tokenizer())
    return oracle


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    model, options = MODELS[name]
    oracle = save(tmp_path, model, options)
    with ModelFolder.open(tmp_path) as folder:
        arch = folder.metadata["general.architecture"]
        assert arch == RECIPES[f"{model}ForCausalLM"].arch
        assert all(folder.bytes_of(tensor).read().size == info.n_bytes for tensor, info in folder.tensors.items())
    with torch.no_grad():
        expected = oracle(torch.tensor([TOKENS])).logits[0].numpy()
    with load_folder(tmp_path, cache_dtype="f32", n_threads=1) as ours:
        found = ours.forward(TOKENS)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_every_recipe_is_tried() -> None:
    tried = {f"{model}ForCausalLM" for model, _ in MODELS.values()}
    assert tried | {"Gemma3ForConditionalGeneration", "Ernie4_5_ForCausalLM"} == set(RECIPES)
