"""Mutation fuzzing of model files: `python tests/fuzz_gguf.py --mutants 200000`.

Mutant number i is a small model with a few things changed, all drawn from the seed i: values, types, lengths and names
of keys; dimensions, types, offsets and contents of tensors; counts; bytes. A worker process, limited in memory and CPU
time, opens each and runs four tokens of what opens. The only errors allowed are Woolly's own; a crash, a kill by a
limit, a warning or any other exception is a find, and is told with its number: `--only I` repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import mmap
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf_builder as build
import oracle_models
from gguf_builder import GGUFBuilder, ModelParts, array, f32, string, u32, u64

import woolly
from woolly import cli_models, quantizing
from woolly.gguf_file import GGUFFile
from woolly.models import ARCHITECTURES
from woolly.tokenizer import Tokenizer

MARGIN_BYTES = 256 << 20  # that a worker may take beyond what it has after its first model
MAX_CPU_S = 5  # for one mutant
BATCH = 500  # mutants of one worker process

INTEGERS = (0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 255, 256, 4096, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
WIDE = (*INTEGERS, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-8, 0.5, 1e4, 1e12, 1e38, float("inf"), float("-inf"), float("nan"))
TEXTS = (b"", b"a", b"llama", b"gemma3", b"gpt2", b"bert", b"t5", b"\xff\xfe", b"\x1b[31m", b"none", b"yarn", b"\0",
         b"<0x41>", "▁".encode(), b"a b", b"{{ messages }}", b"{% for", b"{{ 'a' * 10 ** 9 }}",
         b"x" * 70_000)  # fmt: skip
KEYS = ("llama.expert_count", "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.attention.key_length",
        "llama.attention.value_length", "llama.vocab_size", "llama.logit_scale", "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.pre", "tokenizer.ggml.unknown_token_id",
        "tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.remove_extra_whitespaces", "split.count")  # fmt: skip
WIDTHS = {build.UINT8: "B", build.INT8: "b", build.UINT16: "H", build.INT16: "h", build.UINT32: "I", build.INT32: "i",
          build.FLOAT32: "f", build.BOOL: "B", build.UINT64: "Q", build.INT64: "q", build.FLOAT64: "d"}  # fmt: skip


def mutant(number: int) -> bytes:
    """The file of this number."""
    rng = random.Random(number)
    if rng.random() < 0.1:
        data, n_header = tiny_model(rng.choice(sorted(ARCHITECTURES)))
        return change_bytes(rng, data, n_header)
    tokenizer = rng.choice(("llama", "llama", "gpt2", "t5", "bert"))
    parts = ModelParts(tokenizer=tokenizer, matrix_type=rng.choice((build.F32, build.Q8_0)), seed=number)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
        rng.choice((change_value, change_value, change_array, change_key, change_tensor, *[change_data] * 3))(
            rng, parts
        )
    if rng.random() < 0.15:
        data = with_lies(rng, parts)
    else:
        data = parts.build()
    return change_bytes(rng, data) if rng.random() < 0.3 else data


@functools.cache
def tiny_model(arch: str) -> tuple[bytes, int]:
    """The file that make_gguf.py writes for an architecture, and where its tensors begin."""
    with tempfile.TemporaryDirectory() as folder:
        path = oracle_models.write_tiny(arch, Path(folder) / "tiny.gguf")
        with woolly.GGUFFile.open(path) as file:
            n_header = min(info.offset for info in file.tensors.values())
        return path.read_bytes(), n_header


def scalar(rng: random.Random, value_type: int) -> bytes:
    """A value of a type of fixed size."""
    code = WIDTHS[value_type]
    if code in "fd":
        value = rng.choice(FLOATS)
        return struct.pack("<" + code, value)
    n_bytes = struct.calcsize(code)
    return (rng.choice(WIDE) % 2 ** (8 * n_bytes)).to_bytes(n_bytes, "little")


def value_of(rng: random.Random, value_type: int) -> bytes:
    """A value of any type."""
    if value_type == build.STRING:
        return string(rng.choice(TEXTS))
    if value_type != build.ARRAY:
        return scalar(rng, value_type)
    element_type, length = rng.choice((*WIDTHS, build.STRING, build.ARRAY)), rng.choice((0, 1, 2, 11, 12, 13, 300))
    if element_type == build.ARRAY:
        return array(element_type, [])
    elements = [value_of(rng, element_type) for _ in range(length)]
    return array(element_type, elements, length=rng.choice(WIDE) if rng.random() < 0.2 else None)


def change_value(rng: random.Random, parts: ModelParts) -> None:
    """Another value of the same type, mostly, for one key."""
    key = rng.choice(list(parts.keys))
    value_type = parts.keys[key][0]
    if rng.random() < 0.2:
        value_type = rng.choice((*WIDTHS, build.STRING, build.ARRAY))
    if value_type != build.ARRAY or rng.random() < 0.3:
        parts.keys[key] = (value_type, value_of(rng, value_type))


def change_array(rng: random.Random, parts: ModelParts) -> None:
    """One array of the tokenizer, made anew with a few odd elements."""
    n = rng.choice((12, 12, 12, 12, 11, 13, 0))
    name = rng.choice(("tokens", "scores", "token_type", "merges", "precompiled_charsmap"))
    if name == "tokens":
        value = array(build.STRING, [string(f"t{i}" if rng.random() < 0.9 else rng.choice(TEXTS)) for i in range(n)])
    elif name == "scores":
        value = array(build.FLOAT32, [f32(rng.choice(FLOATS)) for _ in range(n)])
    elif name == "token_type":
        value = array(build.INT32, [u32(rng.choice((1, 1, 2, 3, 4, 5, 6, 7))) for _ in range(n)])
    elif name == "merges":
        merges = ("a b", "b a", "▁ a", "a", "", "a b c", "x y")
        value = array(build.STRING, [string(rng.choice(merges)) for _ in range(n)])
    else:
        value = array(build.UINT8, [rng.randbytes(1) for _ in range(rng.choice((0, 3, 4, 40)))])
    parts.set(f"tokenizer.ggml.{name}", build.ARRAY, value)


def change_key(rng: random.Random, parts: ModelParts) -> None:
    """Remove, add or rename a key or a tensor."""
    names = rng.choice((parts.keys, parts.tensors))
    name = rng.choice(list(names))
    action = rng.randrange(3)
    if action == 0:
        del names[name]
    elif action == 1:
        names[rng.choice(TEXTS)] = names.pop(name)
    else:
        value_type = rng.choice((*WIDTHS, build.STRING, build.ARRAY))
        parts.keys[rng.choice(KEYS)] = (value_type, value_of(rng, value_type))


def change_tensor(rng: random.Random, parts: ModelParts) -> None:
    """Other dimensions or another type."""
    name = rng.choice(list(parts.tensors))
    dims, ggml_type, data = parts.tensors[name]
    dims = list(dims)
    action = rng.randrange(4)
    if action == 0:
        dims[rng.randrange(len(dims))] = rng.choice(WIDE)
    elif action == 1:
        dims = dims[::-1] if rng.random() < 0.5 else [*dims, rng.choice(WIDE)]
    elif action == 2:
        ggml_type = rng.choice((*range(42), 2**31, 2**32 - 1))
    else:
        ggml_type = rng.choice((0, 1, 2, 3, 6, 8, 30))
        data = data * 8
    parts.tensor(name, dims, ggml_type, data)


def change_data(rng: random.Random, parts: ModelParts) -> None:
    """Other numbers: any bytes, or scales and values that are infinite or no number."""
    name = rng.choice(list(parts.tensors))
    dims, ggml_type, data = parts.tensors[name]
    action = rng.randrange(4)
    if action == 0:
        data = rng.randbytes(len(data))
    elif action == 1:
        data = data[: rng.randrange(len(data) + 1)]
    else:
        raw = bytearray(data)
        for _ in range(rng.choice((1, 3, 30))):
            block = 34 if ggml_type == build.Q8_0 else 4
            at = rng.randrange(len(raw) or 1) // block * block
            odd = rng.choice((b"\0\x7c", b"\0\xfc", b"\0\x7e", b"\xff\x7b", b"\1\0"))
            if ggml_type != build.Q8_0:
                odd = f32(rng.choice((*FLOATS, 3e38, -3e38)))
            raw[at : at + len(odd)] = odd
        data = bytes(raw[: len(data)])
    parts.tensor(name, dims, ggml_type, data)


def with_lies(rng: random.Random, parts: ModelParts) -> bytes:
    """Counts, lengths and offsets that are not true, or something twice."""
    builder = GGUFBuilder(version=rng.choice((1, 2, 3, 3, 3, 4)), alignment=rng.choice((32, 32, 8, 64)))
    odd_key, odd_tensor = rng.choice(list(parts.keys)), rng.choice(list(parts.tensors))
    for key, (value_type, value) in parts.keys.items():
        builder.key(
            key, value_type, value, key_length=rng.choice(WIDE) if key == odd_key and rng.random() < 0.2 else None
        )
        if key == odd_key and rng.random() < 0.3:
            builder.key(key, value_type, value)
    for name, (dims, ggml_type, data) in parts.tensors.items():
        lies = {}
        if name == odd_tensor:
            lies = rng.choice(({"offset": rng.choice(WIDE)}, {"n_dims": rng.choice((0, 1, 3, 4, 5, 2**32 - 1))}, {}))
        builder.tensor(name, dims, ggml_type, data, **lies)
    counts = rng.choice(({}, {"n_tensors": rng.choice(WIDE)}, {"n_keys": rng.choice(WIDE)}))
    return builder.build(**counts)


def change_bytes(rng: random.Random, data: bytes, n_header: int = 2500) -> bytes:
    """Flip, overwrite, insert, remove, cut."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(min(len(raw), n_header))
        action = rng.randrange(5)
        if action == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            raw[at : at + 8] = u64(rng.choice(WIDE))
        elif action == 2:
            raw[at : at + 4] = u32(rng.choice(INTEGERS))
        elif action == 3:
            raw[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
        else:
            del raw[at : at + rng.choice((1, 4, 8, 100))]
    return bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.1 else raw)


# Workers


def limit(what: int, soft: int) -> None:
    resource.setrlimit(what, (soft, resource.getrlimit(what)[1]))


def virtual_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * mmap.PAGESIZE


def try_one(path: Path, data: bytes) -> str:
    """Open it and run four tokens: "refused", "ran" or "not finite"; anything else raises."""
    path.write_bytes(data)
    look_at(path)
    try:
        model = woolly.load_gguf(path, n_threads=1)
    except woolly.WoollyError as error:
        if not str(error).isprintable():
            raise AssertionError(f"the message is not printable: {error!r}") from error
        return "refused"
    n_ctx = model.n_ctx
    try:
        tokens = model.generate([i % model.config.vocab_size for i in range(3)][:n_ctx], max_tokens=4, seed=0).tokens
        model.tokenizer.decode(model.tokenizer.encode("a b ab"))
        if model.chat_template is not None:
            model.encode_chat([{"role": "user", "content": "a"}])
    except woolly.NonFiniteError:
        return "not finite"
    except (woolly.ContextFullError, woolly.TemplateError):
        return "ran"
    if not all(0 <= token < model.config.vocab_size for token in tokens):
        raise AssertionError(f"tokens {tokens} are not in the vocabulary")
    return "ran"


def look_at(path: Path) -> None:
    """Do what needs no model that runs: read the tokenizer, list what the file holds, write it in another format."""
    options = argparse.Namespace(model=path, json=True, tensors=True)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        for action in (
            lambda: Tokenizer.from_gguf(path),
            lambda: cli_models.inspect(options),
            lambda: quantize(path, path.with_suffix(".out")),
        ):
            check(action)


def check(action: Callable[[], object]) -> None:
    """Errors of Woolly's pass, if one can print them."""
    try:
        action()
    except woolly.WoollyError as error:
        if not str(error).isprintable():
            raise AssertionError(f"the message is not printable: {error!r}") from error


def quantize(source: Path, target: Path) -> None:
    with GGUFFile.open(source) as file:
        plan = quantizing.plan_quantization(file, "q4_k_m", allow_requantize=True)
        quantizing.quantize_file(file, target, plan, n_threads=1)


def work(first: int, last: int, state: Path) -> None:
    """Try mutants first to last - 1; each outcome is a line on stdout, the number in hand is in the file `state`."""
    warnings.simplefilter("error")
    os.fsync = lambda handle: None  # nothing is to outlive a power cut
    path = state.with_suffix(".gguf")
    try_one(path, ModelParts().build())
    if "ASAN_OPTIONS" not in os.environ:  # AddressSanitizer counts on terabytes of addresses
        limit(resource.RLIMIT_AS, virtual_bytes() + MARGIN_BYTES)
    with state.open("r+b") as file, mmap.mmap(file.fileno(), 8) as current:
        for number in range(first, last):
            current[:] = u64(number)
            data = mutant(number)
            started = time.process_time()
            limit(resource.RLIMIT_CPU, int(started) + 1 + MAX_CPU_S)
            try:
                outcome = try_one(path, data)
            except BaseException:
                outcome = "find"
                print(json.dumps({"number": number, "find": traceback.format_exc(limit=-3)}), flush=True)
            print(json.dumps({"outcome": outcome, "cpu_s": time.process_time() - started}))
        current[:] = u64(last)


def run_batch(first: int, last: int) -> tuple[dict[str, int], float, list[str]]:
    """Mutants first to last - 1 in worker processes: a fresh one after each that died."""
    counts: dict[str, int] = {}
    slowest, finds = 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        while first < last:
            state.write_bytes(u64(first))
            command = [sys.executable, __file__, "--worker", str(first), str(last), str(state)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            for line in done.stdout.splitlines():
                record = json.loads(line)
                if "find" in record:
                    finds.append(f"mutant {record['number']}: {record['find']}")
                else:
                    counts[record["outcome"]] = counts.get(record["outcome"], 0) + 1
                    slowest = max(slowest, record["cpu_s"])
            reached = struct.unpack("<Q", state.read_bytes())[0]
            if reached < last:
                counts["find"] = counts.get("find", 0) + 1
                finds.append(f"mutant {reached}: the process ended with {done.returncode}: {done.stderr[-2000:]}")
                reached += 1
            first = reached
    return counts, slowest, finds


def fuzz(n_mutants: int, *, first: int = 0, jobs: int = 1) -> dict[str, object]:
    """Try mutants, and sum up."""
    started = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    last = first + n_mutants
    ranges = [(begin, min(last, begin + BATCH)) for begin in range(first, last, BATCH)]
    counts: dict[str, int] = {}
    slowest, finds = 0.0, []
    with ThreadPoolExecutor(jobs) as pool:
        for part, seconds, found in pool.map(lambda pair: run_batch(*pair), ranges):
            for outcome, n in part.items():
                counts[outcome] = counts.get(outcome, 0) + n
            slowest = max(slowest, seconds)
            finds += found
            for find in found:
                print(find, file=sys.stderr, flush=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "mutants": n_mutants,
        "first": first,
        **{outcome.replace(" ", "_"): n for outcome, n in sorted(counts.items())},
        "finds": finds,
        "slowest_s": round(slowest, 3),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time")
    parser.add_argument("--only", type=int, help="repeat one mutant in this process")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(int(args.worker[0]), int(args.worker[1]), Path(args.worker[2]))
        return 0
    if args.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(try_one(Path(folder) / "mutant.gguf", mutant(args.only)))
        return 0
    report = fuzz(args.mutants, first=args.first, jobs=args.jobs)
    print(json.dumps(report))
    return 1 if report["finds"] else 0


if __name__ == "__main__":
    sys.exit(main())
