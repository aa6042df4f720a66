"""Opening models: from a GGUF file or a folder, by path or by name, or with generated weights."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from woolly import synthetic
from woolly._kernels import Program
from woolly.byte_tokenizer import ByteTokenizer
from woolly.chat import ChatTemplate
from woolly.checkpoint import Checkpoint
from woolly.config import ModelConfig
from woolly.convert.opening import is_gguf, open_checkpoint
from woolly.convert.quantized import QuantizedCheckpoint
from woolly.engine import Engine, check_cache_dtype
from woolly.errors import GGUFError, WoollyError
from woolly.gguf_split import open_gguf
from woolly.materialise import Materialisation
from woolly.memory import check_fits, resident_bytes
from woolly.metadata import Metadata
from woolly.model import Model
from woolly.models import architecture
from woolly.planning import cache_bytes, scratch_bytes, vocabulary_bytes
from woolly.prompts import DEFAULT, TemplateSet
from woolly.tokenizer import Tokenizer
from woolly.weights import Weights, check_shape, packed_bytes

_T = TypeVar("_T")

DEFAULT_N_CTX = 4096
_REFUSED_BYTES = 64 << 20  # what a file may take before it is refused, and four times its size
MAX_BATCH_TOKENS = 256  # of one run: more makes prefill no faster, and takes scratch


def load_gguf(
    path: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    cache_dtype: str = "f16",
    compute: str = "exact",
    name: str | None = None,
) -> Model:
    """Open a GGUF model.

    Parameters
    ----------
    path : path
        Of a model in several files, the first: NAME-00001-of-00003.gguf.
    n_ctx : int, optional
        Most tokens a session may hold; by default what the model was trained for, but at most 4096.
    n_threads : int, optional
        By default one for each physical core that the process may use.
    cache_dtype : {"f16", "f32"}
        Of keys and values.
    compute : {"exact", "int8", "bf16"}
        Others than exact have faster prefill, and logits that are close to the exact ones, not equal. int8: matmuls of
        quantised weights read activations of 8 bits instead of 16, on any CPU. bf16: those of 8 tokens or more round
        weights and activations to bf16, on a CPU with AMX-BF16 or AVX512_BF16.
    name : str, optional
        What the model calls itself in messages; by default the file's name.

    Returns
    -------
    Model

    Raises
    ------
    GGUFError
        The file is malformed, or its tensors do not fit its configuration.
    UnsupportedModelError, UnsupportedFormatError
        It is well-formed, but this version cannot run it.
    UnsupportedISAError
        compute is "bf16" and the machine has no such unit.
    NotEnoughMemoryError
        Weights, one full session and scratch will not fit; nothing has been allocated.
    WoollyError
        n_ctx or n_threads is out of range.
    OSError
        The file cannot be read.

    Notes
    -----
    Weights are packed tensor by tensor as the file is read and stay quantised; nothing refers to the file afterwards.
    """
    started = time.perf_counter()
    return _load(open_gguf(path), started, n_ctx, n_threads, cache_dtype, compute, name or Path(path).stem)


def load_folder(
    path: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    cache_dtype: str = "f16",
    compute: str = "exact",
    name: str | None = None,
    quantize: str | None = None,
) -> Model:
    """Open a Hugging Face folder, or a safetensors file: one of such a folder, or one that `woolly dequantize` wrote.

    Parameters
    ----------
    path : path
        The folder holds config.json, tokenizer.json and the weights as safetensors files, in one or in shards.
    quantize : str, optional
        A type of `woolly quantize`, such as "q8_0" or "q4_k_m": matrices of floats are quantised as they are read.

    Other parameters and errors are those of `load_gguf`; what is wrong with a folder's files raises CheckpointError.

    Notes
    -----
    Tensors are packed one by one as they are read; nothing refers to the files afterwards.
    """
    started = time.perf_counter()
    with open_checkpoint(path) as checkpoint:
        source = checkpoint if quantize is None else QuantizedCheckpoint(checkpoint, quantize, n_threads=n_threads)
        return _load(source, started, n_ctx, n_threads, cache_dtype, compute, name or _name_of(Path(path)))


def _load(
    file: Checkpoint,
    started: float,
    n_ctx: int | None,
    n_threads: int | None,
    cache_dtype: str,
    compute: str,
    name: str,
) -> Model:
    """Read the checkpoint, pack its weights while another thread reads the vocabulary, and close it."""
    with file, ThreadPoolExecutor(1) as pool:
        check_cache_dtype(cache_dtype)
        arch = architecture(file.metadata.get_str("general.architecture"))
        config = arch.read_config(file.metadata)
        n_ctx = _check_n_ctx(n_ctx, config.n_ctx_train)
        program = Program(min(MAX_BATCH_TOKENS, n_ctx), n_threads, compute=compute)
        _check_memory(name, file, config, n_ctx, program, cache_dtype)
        vocabulary = _Background(pool, partial(_read_vocabulary, file, config))
        weights = Weights(file, n_threads=program.n_threads, check=vocabulary.check)
        try:
            arch.record(program, config, weights, n_ctx)
            weights.check_all_taken()
        except WoollyError:
            vocabulary.result()  # where both are bad, it is always the vocabulary that is told
            raise
        tokenizer, templates = vocabulary.result()
    engine = Engine(program, config, n_ctx, cache_dtype=cache_dtype)
    return Model(
        name,
        engine,
        tokenizer,
        templates,
        weights_bytes=weights.nbytes,
        runtime_bytes=max(0, resident_bytes() - weights.nbytes),
        load_s=time.perf_counter() - started,
    )


class _Background(Generic[_T]):
    """A call that another thread makes meanwhile, or this one in the end where no thread can be had."""

    def __init__(self, pool: ThreadPoolExecutor, call: Callable[[], _T]) -> None:
        self._call = call
        self._future: Future[_T] | None = None
        with contextlib.suppress(RuntimeError):
            self._future = pool.submit(call)

    def check(self) -> None:
        """Raise what the call has raised, if it has ended so."""
        if self._future is not None and self._future.done():
            self._future.result()

    def result(self) -> _T:
        """What the call gives; waits for it."""
        return self._call() if self._future is None else self._future.result()


def _read_vocabulary(file: Checkpoint, config: ModelConfig) -> tuple[Tokenizer, TemplateSet]:
    embedding = file.tensors.get("token_embd.weight")
    # before a million strings are made for nothing
    if embedding is not None and embedding.shape[0] < config.vocab_size:
        check_shape(file.path, embedding, (config.vocab_size, config.hidden_size))
    n_bytes, weights = vocabulary_bytes(file.metadata), sum(info.n_bytes for info in file.tensors.values())
    if n_bytes > _REFUSED_BYTES + 4 * weights:
        raise GGUFError(
            f"{file.path}: the vocabulary would take {n_bytes / 1e6:.0f} MB, too much for {weights / 1e6:.0f} MB of "
            f"weights: the limit is 64 MiB and four times these{file.metadata.at('tokenizer.ggml.tokens')}"
        )
    tokenizer = Tokenizer.from_metadata(file.metadata)
    if tokenizer.vocab_size != config.vocab_size:
        raise GGUFError(f"{file.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    return tokenizer, _read_templates(file.metadata, tokenizer)


def load_fast_fp32(
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    n_layers: int | None = None,
    n_heads: int | None = None,
    n_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    n_ctx: int | None = None,
    rope_theta: float = 10000.0,
    seed: int | None = None,
    dtype: str | None = None,
    compute: str = "exact",
    n_threads: int | None = None,
) -> Model:
    """A `llama` model with generated weights, which exists at once: to measure with, and to size a machine.

    Parameters
    ----------
    vocab_size, hidden_size, n_layers, n_heads, n_kv_heads, intermediate_size, n_ctx, seed : int, optional
        Where None, the variables WOOLLY_FAST_VOCAB_SIZE, _HIDDEN_SIZE, _NUM_LAYERS, _NUM_HEADS, _NUM_KV_HEADS,
        _INTERMEDIATE_SIZE, _CONTEXT_LENGTH and _SEED choose; else 32000, 4096, 32, 32, n_heads, 11008, 2048 and 42.
    rope_theta : float
    dtype : str, optional
        The format of every matrix; else WOOLLY_FAST_DTYPE, else "f32". Whatever it is, the numbers are the same,
        rounded to it as they are generated.
    compute : {"exact", "int8", "bf16"}
        As for `load_gguf`.
    n_threads : int, optional
        By default one for each physical core that the process may use.

    Returns
    -------
    Model
        Its tokenizer takes bytes for tokens, and its text is noise.

    Raises
    ------
    NotEnoughMemoryError
        It will not fit; nothing has been allocated. The message says what would.
    WoollyError
        A value breaks a rule; the message names the argument or variable.

    Notes
    -----
    A thread in the background generates the weights; the first step waits for it, as does `Model.wait_ready`.
    """
    started, runtime_bytes = time.perf_counter(), resident_bytes()
    spec = synthetic.resolve(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        intermediate_size=intermediate_size,
        n_ctx=n_ctx,
        rope_theta=rope_theta,
        seed=seed,
        dtype=dtype,
    )
    program = Program(min(MAX_BATCH_TOKENS, spec.n_ctx), n_threads, compute=compute)
    synthetic.check_memory(spec, program.max_tokens, compute=compute)
    weights = synthetic.SyntheticWeights(spec, n_threads=program.n_threads)
    arch = architecture(spec.config.architecture)
    materialisation = Materialisation(lambda: arch.record(program, spec.config, weights, spec.n_ctx), weights.fill_next)
    return Model(
        spec.name,
        Engine(program, spec.config, spec.n_ctx, wait_ready=materialisation.wait),
        ByteTokenizer(spec.config.vocab_size),
        ChatTemplate(synthetic.CHAT_TEMPLATE, bos_token="<s>", eos_token="</s>"),
        weights_bytes=spec.weights_bytes,
        runtime_bytes=runtime_bytes,
        load_s=time.perf_counter() - started,
        materialisation=materialisation,
    )


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    compute: str = "exact",
    quantize: str | None = None,
) -> Model:
    """Open a model by path or by a name that `woolly pull` knows; the default model if none is given.

    A path is that of a GGUF file, a Hugging Face folder or a safetensors file. A known model that is not in the cache
    is fetched first. Where none is given and WOOLLY_FAST_FP32 is 1, it is `load_fast_fp32`'s, of the sizes that the
    variables say. Parameters and errors otherwise as for `load_gguf`; `quantize` is `load_folder`'s.
    """
    from woolly import hub

    if model is None and synthetic.is_requested():
        return load_fast_fp32(n_ctx=n_ctx, compute=compute, n_threads=n_threads)
    path = hub.resolve(model)
    known = isinstance(model, str) and not os.path.exists(model)
    opens = load_gguf if quantize is None and is_gguf(path) else partial(load_folder, quantize=quantize)
    return opens(path, n_ctx=n_ctx, n_threads=n_threads, compute=compute, name=model if known else None)


def _name_of(path: Path) -> str:
    """A folder's name, or a file's without its suffix."""
    return path.resolve().name if path.is_dir() else path.stem


def _check_n_ctx(n_ctx: int | None, n_ctx_train: int) -> int:
    if n_ctx is None:
        return min(DEFAULT_N_CTX, n_ctx_train)
    if isinstance(n_ctx, bool) or not isinstance(n_ctx, int) or n_ctx < 1:
        raise WoollyError(f"n_ctx: expected a positive integer, got {n_ctx!r}")
    if n_ctx > n_ctx_train:
        raise WoollyError(f"n_ctx: {n_ctx} tokens asked for, the model was trained for {n_ctx_train}")
    return n_ctx


def _check_memory(
    name: str, file: Checkpoint, config: ModelConfig, n_ctx: int, program: Program, cache_dtype: str
) -> None:
    """Refuse what will not fit before any of it is allocated; scratch is an estimate, as nothing is recorded yet."""
    quantised = any(info.format.block_size > 1 for info in file.tensors.values())
    parts = {
        "weights": sum(packed_bytes(info) for info in file.tensors.values()),
        "KV cache": cache_bytes(config, n_ctx, cache_dtype),
        "scratch": scratch_bytes(config, program.max_tokens, quantised=quantised, compute=program.compute),
        "vocabulary": vocabulary_bytes(file.metadata),
    }

    def what_fits(available: int) -> str:
        room = available - sum(parts.values()) + parts["KV cache"]
        n = room // (cache_bytes(config, 16, cache_dtype) // 16) // 16 * 16
        return f"n_ctx={n}" if 0 < n < n_ctx else ""

    check_fits(f"{name} with n_ctx {n_ctx}", parts, what_fits=what_fits)


def _read_templates(metadata: Metadata, tokenizer: Tokenizer) -> TemplateSet:
    """Collect the chat templates: one without a name, and further ones that `tokenizer.chat_templates` names."""
    sources = {DEFAULT: metadata.get_str("tokenizer.chat_template", None)}
    names = metadata.get_array("tokenizer.chat_templates", "string", default=())
    sources |= {name: metadata.get_str(f"tokenizer.chat_template.{name}") for name in names}
    sources = {name: source for name, source in sources.items() if source is not None}
    bos, eos = (None if i is None else tokenizer.id_to_token(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
    return TemplateSet(sources, bos_token=bos, eos_token=eos)
