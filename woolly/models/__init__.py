"""One module per architecture, named as GGUF files name it.

Each has `read_config(metadata) -> ModelConfig` and `record(program, config, weights, n_ctx)`, which records its forward
pass as operations. `ARCHITECTURES` is the list of those that are known.
"""

from types import ModuleType

from woolly.errors import UnsupportedModelError
from woolly.metadata import show
from woolly.models import (
    ernie4_5,
    gemma,
    gemma2,
    gemma3,
    glm4,
    gpt_oss,
    granite,
    llama,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3moe,
    seed_oss,
    smollm3,
    starcoder2,
)

ARCHITECTURES: dict[str, ModuleType] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "phi3": phi3,
    "olmo2": olmo2,
    "granite": granite,
    "smollm3": smollm3,
    "starcoder2": starcoder2,
    "qwen3moe": qwen3moe,
    "gpt-oss": gpt_oss,
    "ernie4_5": ernie4_5,
    "seed_oss": seed_oss,
    "glm4": glm4,
}


def architecture(name: str) -> ModuleType:
    """The module of an architecture.

    Raises
    ------
    UnsupportedModelError
        It is unknown; the message lists those that are not.
    """
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModelError(f"architecture {show(name)} is not supported; those that are: {known}")
    return ARCHITECTURES[name]
