"""The same kernels on every instruction set that the machine has, each against its own limits."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from woolly._kernels import available_isas, use_isa
from woolly.bench import kernels
from woolly.bench.harness import Bench, Row
from woolly.bench.limits import Limits
from woolly.bench.sizes import size_named

COLUMNS = [*kernels.COLUMNS[:-2], ("over_scalar", ">× scalar", ",.1f"), *kernels.COLUMNS[-2:]]


def run(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of each kernel by instruction set, the weakest first; over_scalar is the factor over the first."""
    formats, isas = kernels.check_formats(args.formats), available_isas()
    sizes = {name: size_named(name) for name in args.sizes}
    per_size = 5 * len(formats) * len(args.columns) + len(args.contexts) * len(kernels.ATTENTION_TOKENS) + 10
    bench.progress.start("isa", len(isas) * len(sizes) * per_size)
    limits = Limits(repeat=bench.repeat)
    baseline: dict[tuple[object, ...], float] = {}
    for name, size in sizes.items():
        for isa in isas:
            with use_isa(isa):
                for row in kernels.size_rows(bench, limits, size, formats, args.columns, args.contexts):
                    key = (name, *(row.get(part) for part in ("kernel", "format", "shape", "n_columns", "context")))
                    first = baseline.setdefault(key, row["seconds"])
                    factor = {"over_scalar": first / row["seconds"]}
                    yield {"mode": "isa", "size": name, "isa": isa, "n_threads": bench.n_threads, **row, **factor}
