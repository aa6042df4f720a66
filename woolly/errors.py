"""The exceptions that Woolly raises. Everything else in the package may import this module; it imports nothing."""


class WoollyError(Exception):
    """Root of every error that Woolly raises on purpose."""


class GGUFError(WoollyError):
    """A GGUF file is malformed: the message names the field, its offset and the value found."""


class CheckpointError(WoollyError):
    """A model folder or a safetensors file is malformed: the message names the file, the field and the value found."""


class UnsupportedModelError(WoollyError):
    """A well-formed model uses an architecture, tokenizer or option that this version does not implement."""


class UnsupportedFormatError(UnsupportedModelError):
    """A tensor is stored in a format that this version cannot read."""


class UnsupportedISAError(WoollyError):
    """The requested instruction set is unknown, or this machine does not have it."""


class ContextFullError(WoollyError):
    """A sequence does not fit into the context: the message gives both lengths in tokens."""


class NonFiniteError(WoollyError):
    """Logits are NaN or infinite: the message names the operation in which the first such number appeared."""


class CancelledError(WoollyError):
    """A step was ended by `cancel` or its deadline; the session holds what was computed before, and can go on."""


class NotEnoughMemoryError(WoollyError):
    """A model will not fit: the message gives the bytes needed and available, and what would fit."""


class TemplateError(WoollyError):
    """A chat template failed to render; the message carries the template's own words."""


class DownloadError(WoollyError):
    """A model could not be fetched, or what arrived is not what was pinned."""
