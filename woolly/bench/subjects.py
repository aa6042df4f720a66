"""The models that modes run: from a GGUF file or generated, whole or only their first layers.

A subject is a model with what its matrices weigh, so that a measured time can be held against the hardware.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from woolly import hub
from woolly._kernels import Program, kernel_formats
from woolly.bench.sizes import size_of
from woolly.engine import Engine
from woolly.errors import WoollyError
from woolly.gguf_file import GGUFFile
from woolly.loading import DEFAULT_N_CTX, MAX_BATCH_TOKENS, load_gguf
from woolly.model import Model
from woolly.models import architecture
from woolly.tokenizer import Tokenizer
from woolly.weights import Weights

# What the matmul operations of a layer multiply by, by the end of the operation's name: those of them that the file has
STAGE_TENSORS = {
    "attn_qkv": ("attn_qkv", "attn_q", "attn_k", "attn_v"),
    "attn_residual": ("attn_output",),
    "attn_out": ("attn_output",),
    "ffn_gate_up": ("ffn_gate", "ffn_up"),
    "ffn_up": ("ffn_up",),
    "ffn_residual": ("ffn_down",),
    "ffn_out": ("ffn_down",),
}


@dataclass(frozen=True)
class Matrix:
    """What one weight matrix is: its shape, format, and bytes."""

    n_rows: int
    n_cols: int
    format: str
    nbytes: int


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes
    ----------
    name : str
    model : Model
        With the first layers only where n_layers is less than all.
    path : Path or None
    matrices : dict of str to Matrix
        By the tensors' names, of the whole model.
    n_params : int
        Of the whole model.
    all_layers : int
        Layers of the whole model.
    """

    name: str
    model: Model
    path: Path | None
    matrices: dict[str, Matrix]
    n_params: int
    all_layers: int

    @property
    def is_partial(self) -> bool:
        """Whether only the first layers run."""
        return self.model.config.n_layers < self.all_layers

    def stage_matrices(self, stage: str) -> list[Matrix]:
        """The matrices of a program's stage, none for one that is no matmul."""
        if stage == "logits":
            return [self.matrices.get("output.weight", self.matrices["token_embd.weight"])]
        match = re.fullmatch(r"(blk\.\d+\.)(.+)", stage)
        names = [f"{match[1]}{name}.weight" for name in STAGE_TENSORS.get(match[2], ())] if match else []
        return [self.matrices[name] for name in names if name in self.matrices]

    def read_bytes(self) -> int:
        """Bytes of weights that a token reads: all matrices, but for an embedding that is not the head as well."""
        skipped = "token_embd.weight" if "output.weight" in self.matrices else None
        return sum(matrix.nbytes for name, matrix in self.matrices.items() if name != skipped)


@contextlib.contextmanager
def opened(args: argparse.Namespace, *, n_threads: int, n_ctx: int | None = None) -> Iterator[Subject]:
    """The model that the arguments name, closed afterwards; only `args.measure_layers` layers where that is given."""
    n_layers = getattr(args, "measure_layers", None)
    if args.model is None:
        subject = _open_generated(args, n_layers, n_threads, n_ctx)
    else:
        check_no_sizes(args)
        compute = getattr(args, "compute", "exact")
        subject = open_gguf(args.model, n_layers=n_layers, n_threads=n_threads, n_ctx=n_ctx, compute=compute)
    with contextlib.closing(subject.model):
        yield subject


def check_no_sizes(args: argparse.Namespace) -> None:
    """Refuse sizes beside a file, which has its own.

    Raises
    ------
    WoollyError
        Names the option.
    """
    from woolly.bench.__main__ import FAST_SIZES

    for option in (*FAST_SIZES, "dtype"):
        if getattr(args, option.replace("-", "_"), None) is not None:
            raise WoollyError(f"--{option} is of a model without a file, it does not go with --model")


def fast_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `load_fast_fp32`: the small model's, but for those that were given."""
    from woolly.bench.__main__ import FAST_SIZES

    options: dict[str, Any] = {}
    for option, (argument, default) in FAST_SIZES.items():
        given = getattr(args, option.replace("-", "_"), None)
        options[argument] = default if given is None else given
    return {**options, "dtype": getattr(args, "dtype", None) or "f32"}


def open_gguf(
    model: str,
    *,
    n_layers: int | None = None,
    n_threads: int | None = None,
    n_ctx: int | None = None,
    compute: str = "exact",
) -> Subject:
    """A GGUF file as a subject, by path or name; of n_layers where given, to stand for all of them."""
    path = Path(hub.resolve(model))
    with GGUFFile.open(path) as file:
        matrices = {
            name: Matrix(*info.shape, info.format.name, info.format.nbytes(info.shape[0] * info.shape[1]))
            for name, info in file.tensors.items()
            if len(info.shape) == 2
        }
        n_params = sum(_product(info.shape) for info in file.tensors.values())
        arch = file.metadata.get_str("general.architecture")
        config = architecture(arch).read_config(file.metadata)
    name = path.stem
    if n_layers is None or n_layers >= config.n_layers:
        loaded = load_gguf(
            path, n_ctx=_n_ctx(n_ctx, config.n_ctx_train), n_threads=n_threads, compute=compute, name=name
        )
    else:
        loaded = _load_layers(path, n_layers, _n_ctx(n_ctx, config.n_ctx_train), n_threads, compute)
    return Subject(name, loaded, path, matrices, n_params, config.n_layers)


def _load_layers(path: Path, n_layers: int, n_ctx: int, n_threads: int | None, compute: str) -> Model:
    """`load_gguf` of the first layers; the others are not read."""
    with GGUFFile.open(path) as file:
        arch = architecture(file.metadata.get_str("general.architecture"))
        config = replace(arch.read_config(file.metadata), n_layers=n_layers)
        program = Program(min(MAX_BATCH_TOKENS, n_ctx), n_threads, compute=compute)
        weights = Weights(file, n_threads=program.n_threads)
        arch.record(program, config, weights, n_ctx)
        tokenizer = Tokenizer.from_metadata(file.metadata)
    engine = Engine(program, config, n_ctx)
    return Model(path.stem, engine, tokenizer, None, weights_bytes=weights.nbytes, load_s=0.0)


def _open_generated(args: argparse.Namespace, n_layers: int | None, n_threads: int, n_ctx: int | None) -> Subject:
    from woolly.loading import load_fast_fp32

    options = fast_options(args)
    all_layers = int(options["n_layers"])
    options["n_layers"] = min(n_layers or all_layers, all_layers)
    if n_ctx is not None:
        options["n_ctx"] = max(n_ctx, 16)
    model = load_fast_fp32(**options, compute=getattr(args, "compute", "exact"), n_threads=n_threads)
    model.wait_ready()
    matrices = generated_matrices(model, str(options["dtype"]), all_layers)
    n_norms = (2 * all_layers + 1) * model.config.hidden_size
    n_params = sum(matrix.n_rows * matrix.n_cols for matrix in matrices.values()) + n_norms
    name = f"generated-{options['hidden_size']}x{all_layers}-{options['dtype']}"
    return Subject(name, model, None, matrices, n_params, all_layers)


def generated_matrices(model: Model, dtype: str, n_layers: int) -> dict[str, Matrix]:
    """The matrices of a generated model, all of one format, with an output of its own."""
    size = size_of(model.config)
    q_size, kv_size = size.n_heads * size.head_dim, size.n_kv_heads * size.head_dim
    shapes = {
        "attn_q": (q_size, size.hidden_size),
        "attn_k": (kv_size, size.hidden_size),
        "attn_v": (kv_size, size.hidden_size),
        "attn_output": (size.hidden_size, q_size),
        "ffn_gate": (size.intermediate_size, size.hidden_size),
        "ffn_up": (size.intermediate_size, size.hidden_size),
        "ffn_down": (size.hidden_size, size.intermediate_size),
    }
    _, block_size, block_bytes = kernel_formats()[dtype]

    def matrix(n_rows: int, n_cols: int) -> Matrix:
        return Matrix(n_rows, n_cols, dtype, n_rows * n_cols // block_size * block_bytes)

    matrices = {name: matrix(size.vocab_size, size.hidden_size) for name in ("token_embd.weight", "output.weight")}
    for layer in range(n_layers):
        matrices |= {f"blk.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
    return matrices


def _n_ctx(wanted: int | None, n_ctx_train: int) -> int:
    if wanted is not None and wanted > n_ctx_train:
        raise WoollyError(f"{wanted} tokens are asked for, the model was trained for {n_ctx_train}")
    return min(max(wanted or DEFAULT_N_CTX, 16), n_ctx_train)


def _product(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
