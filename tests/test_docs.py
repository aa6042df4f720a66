"""The README says what the registries say, and its Python runs."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from oracle_models import MODELS

from woolly import cli
from woolly._kernels import QUANTIZED_FORMATS, PackedMatrix, compiled_isas, converted_formats, kernel_formats
from woolly.convert.recipes import RECIPES
from woolly.mixes import MIXES
from woolly.models import ARCHITECTURES
from woolly.pretokenizers import PRE_TOKENIZERS
from woolly.vocabulary import KINDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The rows of the table under a bold heading, cells without backquotes."""
    lines = README.partition(f"**{heading}**")[2].partition("\n\n")[2].splitlines()
    rows = [line for line in lines[: lines.index("")] if line.startswith("|")][2:]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


def first_column(heading: str) -> list[str]:
    return [row[0] for row in table(heading)]


def test_formats():
    has = kernel_formats()
    rows = {name.lower(): (*map(float, sizes), memory, made) for name, *sizes, memory, made in table("Weight formats")}
    assert set(rows) == set(has)
    searched = {mix.base for mix in MIXES.values() if mix.is_searched}
    assert {name for name, (*_, made) in rows.items() if made != "no"} == set(QUANTIZED_FORMATS)
    assert {name for name, (*_, made) in rows.items() if "searched" in made} == searched | {"q5_0", "q5_1"}
    for name, (*sizes, memory, _) in rows.items():
        _, block, n_bytes = has[name]
        assert sizes == [block, n_bytes, 8 * n_bytes / block]
        stored_bits = 8 * PackedMatrix(16, block, name).nbytes / (16 * block)
        assert memory.endswith(f"{stored_bits:.3g} bits" if name in converted_formats() else "as in the file"), name


def test_architectures():
    assert first_column("Architectures") == list(ARCHITECTURES)
    for arch, _, checked in table("Architectures"):
        counts = Counter(model.hf_class for model in MODELS.values() if model.arch == arch)
        assert checked == ", ".join(f"{count} × {name}" for name, count in counts.items())


def test_folders():
    said = {name: row[1] for row in table("Folders") for name in re.findall(r"\w+For\w+", row[0])}
    assert said == {name: recipe.arch for name, recipe in RECIPES.items()}


def test_tokenizers():
    assert set(first_column("Tokenizers")) == set(KINDS)
    assert f"{len(PRE_TOKENIZERS)} names" in README


@pytest.mark.skipif(len(compiled_isas()) == 1, reason="the README lists the instruction sets of x86")
def test_instruction_sets():
    assert set(first_column("Machines")) == set(compiled_isas())


def test_every_command_and_option_is_named():
    (commands,) = (action for action in cli.make_parser()._actions if action.dest == "command_name")
    for name, command in commands.choices.items():
        assert f"woolly {name}" in README
        options = {option for action in command._actions for option in action.option_strings}
        for option in options - {"-h", "--help", "--force"}:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", README), f"woolly {name} {option}"


def test_links_and_pictures():
    for name in re.findall(r"\]\(([^):]+)\)", README):
        assert (ROOT / name).is_file(), name
    for picture in (ROOT / "docs").glob("*.svg"):
        ElementTree.parse(picture)


def test_python_runs(smollm2_path, capsys):
    """All blocks in order, in one namespace, as a reader would type them."""
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), namespace)
    out = capsys.readouterr().out
    assert "Paris" in out
    assert "(5, 576)" in out
