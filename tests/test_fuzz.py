"""Two thousand mutants of model files: see fuzz_gguf.py."""

from __future__ import annotations

import fuzz_gguf


def test_two_thousand_mutants(capsys) -> None:
    report = fuzz_gguf.fuzz(2000)
    with capsys.disabled():
        print(f" {report['mutants']} mutants, {report['cpu_s']} s of CPU, slowest {report['slowest_s']} s ", end="")
    assert report["finds"] == []
    assert report["refused"] > 500
    assert report["ran"] > 100
    assert report["not_finite"] > 100


def test_mutants_are_the_same_every_time() -> None:
    assert [fuzz_gguf.mutant(i) for i in range(50)] == [fuzz_gguf.mutant(i) for i in range(50)]
