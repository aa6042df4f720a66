"""One module per architecture, named as GGUF files name it.

Each has `read_config(metadata) -> ModelConfig` and `record(program, config, weights, n_ctx)`, which records its forward
pass as operations. `ARCHITECTURES` is the list of those that are known.
"""

from types import ModuleType

from woolly.errors import UnsupportedModelError
from woolly.metadata import show
from woolly.models import gemma3, llama

ARCHITECTURES: dict[str, ModuleType] = {"llama": llama, "gemma3": gemma3}


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
