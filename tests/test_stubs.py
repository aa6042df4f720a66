"""The kernels' stubs say what the kernels are: the same names, the same signatures."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import woolly._kernels

KERNELS = Path(woolly._kernels.__file__).parent
STUBS = {path.stem: ast.parse(path.read_text()) for path in sorted(KERNELS.glob("*.pyi"))}
Function = ast.FunctionDef


def functions(body: list[ast.stmt]) -> dict[str, Function]:
    return {node.name: node for node in body if isinstance(node, Function)}


def classes(stub: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}


def is_property(node: Function) -> bool:
    return any(ast.unparse(decorator) == "property" for decorator in node.decorator_list)


def without_annotations(node: Function) -> str:
    """The parameters of a stub as text, as in "x, /, *, eps, out=None"."""
    for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
        argument.annotation = None
    return ast.unparse(node.args)


def real_parameters(function: object) -> str:
    """The parameters of a compiled function, written the same way."""
    parameters = inspect.signature(function).parameters.values()
    text = str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))[1:-1]
    return ast.unparse(ast.parse(f"def f({text}): ...").body[0].args)


def class_parameters(cls: type) -> str | None:
    """The parameters of a compiled class's constructor, from where Cython embeds them; None where it does not."""
    found = re.match(rf"{cls.__name__}\((.*)\)", cls.__doc__ or "")
    return found and found[1]


@pytest.mark.parametrize("module", STUBS)
def test_functions_have_the_signatures_of_their_stubs(module: str) -> None:
    compiled = importlib.import_module(f"woolly._kernels.{module}")
    for name, node in functions(STUBS[module].body).items():
        function = getattr(compiled, name)
        function = inspect.unwrap(function)
        assert without_annotations(node) == real_parameters(function), name


@pytest.mark.parametrize("module", STUBS)
def test_classes_have_the_members_of_their_stubs(module: str) -> None:
    compiled = importlib.import_module(f"woolly._kernels.{module}")
    for name, stub in classes(STUBS[module]).items():
        cls = getattr(compiled, name)
        members = functions(stub.body)
        attributes = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
        public = {member for member in vars(cls) if not member.startswith("_")}
        assert public == (set(members) | attributes) - {"__init__"}, name
        for member, node in members.items():
            if member == "__init__":
                continue
            if is_property(node):
                assert not callable(vars(cls)[member]), f"{name}.{member}"
            else:
                assert without_annotations(node) == real_parameters(vars(cls)[member]), f"{name}.{member}"


@pytest.mark.parametrize("cls", [woolly._kernels.KVCache, woolly._kernels.PackedMatrix, woolly._kernels.Program])
def test_constructors_take_the_parameters_of_their_stubs(cls: type) -> None:
    stub = classes(STUBS[cls.__module__.rpartition(".")[2]])[cls.__name__]
    arguments = functions(stub.body)["__init__"].args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)][1:]
    embedded = class_parameters(cls)
    if embedded is not None:  # Cython writes the star of keyword-only parameters last
        assert [re.split(r"[=:]", part)[0].strip() for part in embedded.split(",") if part.strip(" */")] == names
    with pytest.raises(TypeError):
        cls(*[1] * (len(arguments.posonlyargs) + len(arguments.args)))


def test_every_public_name_has_a_stub() -> None:
    stubbed: set[str] = set()
    for stub in STUBS.values():
        constants = (node.target.id for node in stub.body if isinstance(node, ast.AnnAssign))
        stubbed.update(functions(stub.body), classes(stub), constants)
    assert set(woolly._kernels.__all__) <= stubbed
