"""Imports run one way: every module of the package may import only what stands before it here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "woolly"

# A module may import modules of earlier rows. Those of one row do not know each other.
ORDER = (
    ("errors", "control_groups"),
    ("config", "_kernels.spinning", "_kernels.threads", "_kernels.scan", "atomic"),
    ("_kernels.dispatch", "_kernels.quantize"),
    ("_kernels.matmul",),
    ("_kernels.pages",),
    ("_kernels.rows", "_kernels.attention", "_kernels.experts", "_kernels.generate", "_kernels.limits"),
    ("_kernels.operations",),
    ("_kernels.executor",),
    ("_kernels.program",),
    ("_kernels",),
    ("formats",),
    ("metadata", "stored_file"),
    ("gguf_file", "safetensors_file", "base_logits"),
    ("gguf_split", "checkpoint"),
    ("weights", "mixes"),
    ("quantizing",),
    ("layers",),
    ("models.gguf_config",),
    ("models.llama",),
    ("models.qwen2", "models.qwen3", "models.gemma", "models.phi3", "models.olmo2", "models.granite"),
    ("models.ernie4_5", "models.seed_oss", "models.glm4"),
    ("models.smollm3", "models.starcoder2", "models.gemma2", "models.gemma3", "models.qwen3moe", "models.gpt_oss"),
    ("models",),
    ("sandbox",),
    ("engine", "planning", "pretokenizers", "chat", "sampling", "terminal", "materialise"),
    ("memory", "hub_folder"),
    ("hub_hf",),
    ("subwords",),
    ("vocabulary",),
    ("tokenizer",),
    ("prompts",),
    ("convert.config_json",),
    ("convert.merges", "convert.rope", "convert.tensors", "convert.chat_templates"),
    ("convert.mxfp4", "convert.tokenizer_json", "convert.quantized", "convert.self_contained"),
    ("convert.recipes",),
    ("convert.folder", "convert.writing"),
    ("convert.opening",),
    ("convert",),
    ("byte_tokenizer",),
    ("synthetic",),
    ("session",),
    ("model",),
    ("hub", "measuring"),
    ("loading",),
    ("",),  # the package's own names, which it imports at first use
    ("environment",),
    ("cli_run", "cli_models", "cli_synth", "cli_convert", "cli_quantize", "cli_measure"),
    ("cli",),
    ("__main__",),
)
RANK = {module: rank for rank, row in enumerate(ORDER) for module in row}

# Some know less than their row allows: what they may import of the package, at most
NARROW = {
    "config": set(),
    "control_groups": set(),
    "atomic": {"errors"},
    "formats": {"errors"},
    "mixes": {"errors", "formats", "gguf_file", "metadata"},
    "metadata": {"errors", "_kernels.scan"},
    "stored_file": {"errors"},
    "pretokenizers": {"errors"},
    "subwords": {"errors", "pretokenizers"},
    "vocabulary": {"errors", "metadata", "pretokenizers", "subwords", "_kernels.scan"},
    "tokenizer": {"errors", "vocabulary", "subwords", "gguf_file"},
    "sandbox": {"errors"},
    "chat": {"errors", "sandbox"},
    "prompts": {"errors", "chat", "tokenizer"},
    "sampling": {"errors"},
    "engine": {"errors", "config", "_kernels"},
    "session": {"errors", "sampling", "_kernels"},
    "hub": {"errors", "hub_hf", "terminal"},
    "hub_folder": {"errors"},
    "hub_hf": {"errors", "hub_folder", "terminal"},
    "terminal": {"errors"},
    "materialise": {"errors"},
    "planning": {"config", "metadata", "_kernels"},
    "memory": {"control_groups", "errors", "terminal"},
    "byte_tokenizer": {"subwords", "tokenizer", "vocabulary"},
    "synthetic": {"errors", "config", "memory", "planning", "byte_tokenizer", "_kernels", "_kernels.generate"},
}


def modules() -> dict[str, Path]:
    """Every module by its name inside the package, without those of the benchmarks, which may import all."""
    found = {}
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyx"), *PACKAGE.rglob("*.pxd")]:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "bench":
            name = ".".join(part for part in parts if part != "__init__")
            found[f"{name}{path.suffix if path.suffix == '.pxd' else ''}"] = path
    return found


MODULES = modules()


def full_names(module: str, names: list[str]) -> Iterator[str]:
    """Modules that `from module import names` reads: the names themselves where they are modules."""
    for name in names:
        # the package of kernels exports functions that are named as their modules: matmul, generate
        inner = module if module == "_kernels" else f"{module}.{name}".strip(".")
        yield inner if inner in MODULES else module


def python_imports(path: Path) -> set[str]:
    """Modules of the package that a Python file imports anywhere but under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("woolly").strip(".") for alias in node.names if is_ours(alias.name)}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if is_ours(node.module):
                found |= set(full_names(node.module[6:].strip("."), [alias.name for alias in node.names]))
    return found


def cython_imports(path: Path) -> set[str]:
    """Modules of the package that a Cython file imports or cimports."""
    text = path.read_text()
    found: set[str] = set()
    for module, bracketed, names in re.findall(r"^from (woolly[\w.]*) c?import (?:\(([^)]*)\)|(.*))$", text, re.M):
        listed = [name.strip().split(" as ")[0] for name in (bracketed or names).split(",") if name.strip()]
        found |= set(full_names(module[6:].strip("."), listed))
    assert not re.search(r"^c?import woolly", text, re.M)
    return found - {"_kernels.kernels"}  # declarations of the C table


def is_ours(module: str | None) -> bool:
    return module is not None and (module == "woolly" or module.startswith("woolly."))


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name: str) -> None:
    path = MODULES[name]
    module = name.removesuffix(".pxd")
    if module == "_kernels.kernels":
        assert not cython_imports(path)
        return
    assert module in RANK, f"{name} has no place in the order of imports: give it one in {Path(__file__).name}"
    imports = python_imports(path) if path.suffix == ".py" else cython_imports(path) - {module}
    for imported in imports:
        assert imported in RANK, f"{name} imports {imported}, which has no place in the order"
        assert RANK[imported] < RANK[module], f"{name} imports {imported}, which comes after it"
    assert imports <= NARROW.get(module, imports), f"{name} is to import {NARROW[module]} only"


def test_the_order_lists_no_module_that_is_not_there() -> None:
    assert set(RANK) - {"_kernels.limits"} <= set(MODULES)


def test_openmp_is_known_to_threads_and_parallel_regions_alone() -> None:
    users = {path.stem for path in PACKAGE.rglob("*.pyx") if re.search(r"\bopenmp\b", path.read_text())}
    assert users <= {"threads", "executor", "limits"}


def test_public_names_come_from_where_the_package_says() -> None:
    import woolly

    for name, home in woolly._HOME.items():
        assert home in MODULES, name
