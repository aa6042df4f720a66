"""What each optimisation brings: generation measured with one more of them switched on each time.

numpy FP32 that computes everything again for every token → with a KV cache → on Woolly's FP32 matmul → the fused
program → BF16, Q8_0 and Q4_0 weights. The weights are the same numbers, quantised; nothing is multiplied together from
elsewhere: a factor is this row's rate over the rate of the row before, both measured in this run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from woolly import hub
from woolly._kernels import KVCache, PackedMatrix, Program, dequantize, kernel_formats, matmul
from woolly.bench.harness import Bench, Row, median, spread
from woolly.bench.numpy_llama import Array, NumpyLlama
from woolly.bench.steps import token_ids
from woolly.bench.subjects import check_no_sizes, fast_options
from woolly.config import ModelConfig
from woolly.engine import Engine
from woolly.errors import UnsupportedModelError
from woolly.gguf_file import GGUFFile
from woolly.models import llama

FORMATS = {"f32": "fused program, FP32", "bf16": "BF16 weights", "q8_0": "Q8_0 weights", "q4_0": "Q4_0 weights"}

COLUMNS = [
    ("model", "model", ""),
    ("variant", "switched on", ""),
    ("weights_bytes", ">weights GB", "GB"),
    ("avg_ts", ">tokens/s", ",.2f"),
    ("stddev_ts", ">±", ",.2f"),
    ("factor", ">× the row before", ",.2f"),
    ("total_factor", ">× the first", ",.1f"),
]

Decode = Callable[[], None]  # generates gen_tokens after the prompt


class ArrayWeights:
    """What a model's `record` asks of `Weights`, from float32 arrays: matrices are quantised to one format."""

    def __init__(self, tensors: dict[str, Array], format: str, *, n_threads: int) -> None:
        self._tensors = tensors
        self._format = format
        self._n_threads = n_threads
        self.nbytes = 0

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def matrix(self, name: str, shape: tuple[int, int], /) -> PackedMatrix:
        """The matrix, quantised by the package gguf and packed."""
        packed = pack(self._tensors[name], self._format, n_threads=self._n_threads)
        self.nbytes += packed.nbytes
        return packed

    def vector(self, name: str, n: int, /) -> Array:
        """The vector, as it is."""
        return self._tensors[name]


def pack(values: Array, format: str, *, n_threads: int) -> PackedMatrix:
    """Values in a format, packed for the kernels."""
    rows = values
    if format != "f32":
        rows = gguf.quants.quantize(values, gguf.GGMLQuantizationType[format.upper()])
    rows = np.ascontiguousarray(rows).view(np.uint8).reshape(len(values), -1)
    return PackedMatrix(*values.shape, format).pack(rows, n_threads=n_threads)


def run(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of every variant, in the order that they build on one another."""
    bench.progress.start("stack", 4 + len(FORMATS))
    bench.progress.step("opening the model")
    name, config, tensors = read_tensors(args, bench.n_threads)
    before = first = None
    for variant, decode, n_bytes in variants(bench, config, tensors, args.prompt_tokens, args.gen_tokens):
        bench.progress.step(variant)
        decode()
        samples = []
        for _ in range(bench.repeat):
            started = time.perf_counter()
            decode()
            samples.append(args.gen_tokens / (time.perf_counter() - started))
        rate = median(samples)
        first = first or rate
        yield {
            "mode": "stack",
            "model": name,
            "variant": variant,
            "n_threads": bench.n_threads,
            "weights_bytes": n_bytes,
            "n_prompt": args.prompt_tokens,
            "n_gen": args.gen_tokens,
            "avg_ts": rate,
            "stddev_ts": spread(samples),
            "samples_ts": samples,
            "factor": rate / before if before else None,
            "total_factor": rate / first,
        }
        before = rate


def variants(
    bench: Bench, config: ModelConfig, tensors: dict[str, Array], n_prompt: int, n_gen: int
) -> Iterator[tuple[str, Decode, int]]:
    """(name, generation, bytes of weights) of each; the model of one is let go before the next is made."""
    n_ctx = n_prompt + n_gen
    ids = token_ids(n_ctx, config.vocab_size)
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    plain = NumpyLlama(config, tensors, n_ctx)

    def again() -> None:
        for end in range(n_prompt + 1, n_ctx + 1):
            plain.forward(ids[:end], 0)

    yield "numpy FP32, no KV cache", again, n_bytes
    yield "KV cache", _cached(plain, ids, n_prompt), n_bytes
    packed = {key: pack(w, "f32", n_threads=bench.n_threads) for key, w in tensors.items() if w.ndim == 2}

    def ours(key: str, x: Array) -> Array:
        return matmul(packed[key], np.ascontiguousarray(x), n_threads=bench.n_threads)

    fast = NumpyLlama(config, tensors, n_ctx, matmul=ours)
    yield "Woolly's FP32 matmul", _cached(fast, ids, n_prompt), n_bytes
    packed.clear()
    for format, name in FORMATS.items():
        decode, weights_bytes = _program(bench, config, tensors, format, ids, n_prompt)
        yield name, decode, weights_bytes


def _cached(model: NumpyLlama, ids: np.ndarray, n_prompt: int) -> Decode:
    model.forward(ids[:n_prompt], 0)

    def decode() -> None:
        for pos in range(n_prompt, len(ids)):
            model.forward(ids[pos : pos + 1], pos)

    return decode


def _program(
    bench: Bench, config: ModelConfig, tensors: dict[str, Array], format: str, ids: np.ndarray, n_prompt: int
) -> tuple[Decode, int]:
    """The engine over weights of one format."""
    program = Program(min(len(ids), 256), bench.n_threads)
    weights = ArrayWeights(tensors, format, n_threads=bench.n_threads)
    llama.record(program, config, weights, len(ids))  # type: ignore[arg-type]
    engine = Engine(program, config, len(ids))
    sequence = engine.new_sequence()
    assert isinstance(sequence.cache, KVCache)
    engine.step([(sequence, ids[:n_prompt])])

    def decode() -> None:
        sequence.rewind(n_prompt)
        for pos in range(n_prompt, len(ids)):
            engine.step([(sequence, ids[pos : pos + 1])])

    return decode, weights.nbytes


def read_tensors(args: argparse.Namespace, n_threads: int) -> tuple[str, ModelConfig, dict[str, Array]]:
    """Name, configuration and float32 tensors of the llama that the arguments name.

    Raises
    ------
    UnsupportedModelError
        It is no llama.
    """
    if args.model is not None:
        check_no_sizes(args)
        return _read_gguf(Path(hub.resolve(args.model)))
    return _generate(fast_options(args), n_threads)


def _generate(options: dict[str, Any], n_threads: int) -> tuple[str, ModelConfig, dict[str, Array]]:
    """The tensors that `load_fast_fp32` makes, as plain arrays."""
    from woolly import synthetic

    spec = synthetic.resolve(**{**options, "dtype": "f32"})
    tensors: dict[str, Array] = {}
    for name, shape in spec.shapes.items():
        if len(shape) == 1:
            tensors[name] = synthetic.generate_vector(name, shape[0], seed=spec.seed)
            continue
        matrix = PackedMatrix(*shape, "f32")
        tensors[name] = synthetic.generate_matrix(name, matrix, seed=spec.seed, n_threads=n_threads).dequantize()
    return spec.name, spec.config, tensors


def _read_gguf(path: Path) -> tuple[str, ModelConfig, dict[str, Array]]:
    with GGUFFile.open(path) as file:
        arch = file.metadata.get_str("general.architecture")
        if arch != "llama":
            raise UnsupportedModelError(f"{path}: stack has a numpy form of llama only, this is {arch!r}")
        config = llama.read_config(file.metadata)
        tensors = {}
        for name, info in file.tensors.items():
            if info.format.name not in kernel_formats():
                raise UnsupportedModelError(f"{path}: tensor {name!r} is stored as {info.format.name}, without kernels")
            rows = file.tensor_bytes(name).reshape(info.shape[0] if len(info.shape) == 2 else 1, -1)
            values = dequantize(rows, info.format.name)
            tensors[name] = values if len(info.shape) == 2 else values[0]
    return path.stem, config, tensors
