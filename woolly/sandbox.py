"""A jinja2 sandbox that also bounds time and memory: a template from a stranger is a program.

jinja2's own sandbox keeps a template away from Python; what it does not stop is two nested loops over range(99999), or
'a' * 50_000_000. Here every turn of a loop, call, filter and operator looks at the clock, whatever can grow a text says
beforehand how long the result may be, and all text that is written counts, wherever it goes. This module knows nothing
of chats.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from woolly.errors import TemplateError

MAX_INTEGER_BITS = 4096
MAX_ITEMS = 200_000  # of a list, those of lists in it included: tools and messages have thousands

_CONVERTING = frozenset(
    {"string", "tojson", "pprint", "join", "unique", "sort", "dictsort", "groupby", "sum", "xmlattr"}
)
_GROWING_FILTERS = frozenset({"batch", "center", "format", "indent", "join", "replace", "slice", "tojson", "wordwrap"})
_GROWING_METHODS = frozenset(
    {"center", "expandtabs", "format", "format_map", "join", "ljust", "replace", "rjust", "translate", "zfill"}
)
_LONG_NUMBER = re.compile(r"\d{6}")  # in a format: a width that no prompt has


class Budget:
    """What one rendering may still use.

    Parameters
    ----------
    max_s : float
    max_chars : int
        Of the result, and of any text on the way.
    """

    def __init__(self, max_s: float, max_chars: int) -> None:
        self.max_s, self.max_chars = max_s, max_chars
        self._deadline_s = time.monotonic() + max_s
        self._written = 0

    def tick(self, n_chars: int = 0) -> bool:
        """Count text that is about to be written, and look at the clock; true, so that it can stand in a condition."""
        self._written += n_chars
        if self._written > 4 * self.max_chars:  # some is written several times: into a variable, then out
            raise TemplateError(f"chat template wrote more than {self.max_chars} characters")
        if time.monotonic() > self._deadline_s:
            raise TemplateError(f"chat template ran for more than {self.max_s:g} s")
        return True

    def check_chars(self, n_chars: int) -> None:
        """Refuse a text of this length."""
        if n_chars > self.max_chars:
            raise TemplateError(f"chat template wrote more than {self.max_chars} characters")


class _Current(threading.local):
    budget: Budget | None = None


_current = _Current()


@contextlib.contextmanager
def limited(max_s: float, max_chars: int) -> Iterator[Budget]:
    """Bound what templates do on this thread.

    Raises
    ------
    TemplateError
        From whatever passes a bound; the message names the bound.
    """
    before, _current.budget = _current.budget, Budget(max_s, max_chars)
    try:
        yield _current.budget
    finally:
        _current.budget = before


def _budget() -> Budget:
    budget = _current.budget
    if budget is None:
        raise TemplateError("templates run inside limited() only")
    return budget


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox, bounded by the `limited` that surrounds its use.

    Parameters
    ----------
    filters : mapping of str to callable
        Filters besides jinja2's own, or instead of them.
    **options
        jinja2's.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *, filters: Mapping[str, Callable[..., Any]] | None = None, **options: Any) -> None:
        super().__init__(finalize=self.written, **options)
        del self.globals["lipsum"]  # writes any number of paragraphs
        for name, function in {**self.filters, **(filters or {})}.items():
            self.filters[name] = _bounded_filter(name, function)

    def tick(self, n_chars: int = 0) -> bool:
        """See `Budget.tick`; the compiled template calls it."""
        return _budget().tick(n_chars)

    def written(self, value: Any) -> Any:
        """Count a value that the template writes."""
        self.bounded(value)
        _budget().tick(len(value) if isinstance(value, str) else 0)
        return value

    def bounded(self, value: Any) -> Any:
        """Pass a value on unless it is too long to be written or compared."""
        if isinstance(value, str):
            _budget().check_chars(len(value))
        elif isinstance(value, list | tuple | Mapping):
            _budget().check_chars(_text_size(value))
        return value

    def joined(self, *values: Any) -> str:
        """values[0] ~ values[1] ~ …"""
        _budget().check_chars(sum(_text_size(value) for value in values))
        return "".join(map(str, values))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator whose result may be much larger than its sides."""
        budget = _budget()
        budget.tick()
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > MAX_INTEGER_BITS:
                raise TemplateError(f"chat template makes an integer of more than {MAX_INTEGER_BITS} bits")
        elif operator == "*":
            for times, value in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, str | list | tuple):
                    budget.check_chars(times * _text_size(value))
        elif operator == "+" and isinstance(left, str | list | tuple):
            budget.check_chars(_length(left) + _length(right))
        elif operator == "%" and isinstance(left, str):
            _check_growth(left, (right,), {})
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call; of a string's methods those that can grow it are asked first."""
        _budget().tick()
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str) and getattr(method, "__name__", "") in _GROWING_METHODS:
            _check_growth(owner, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _instrumented(super()._parse(source, name, filename))


def _instrumented(tree: nodes.Template) -> nodes.Template:
    """The tree with a tick in every turn of a loop and every macro, and bounds where no operator is intercepted."""
    for loop in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.AssignBlock)):
        n_chars = sum(len(data.data) for data in loop.find_all(nodes.TemplateData))
        loop.body.insert(0, nodes.ExprStmt(_call("tick", [nodes.Const(n_chars)])).set_lineno(loop.lineno))
        if isinstance(loop, nodes.For) and loop.test is not None:
            loop.test = nodes.And(_call("tick", []), loop.test).set_lineno(loop.lineno)
    for compare in tree.find_all(nodes.Compare):
        compare.expr = _call("bounded", [compare.expr])
        for operand in compare.ops:
            operand.expr = _call("bounded", [operand.expr])
    return _ConcatReplacer().visit(tree)


class _ConcatReplacer(jinja2.visitor.NodeTransformer):
    def visit_Concat(self, node: nodes.Concat, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", node.nodes).set_lineno(node.lineno)


def _call(method: str, args: list[nodes.Expr]) -> nodes.Call:
    """A call of the environment's method, which no template can replace by a variable."""
    return nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passes_context = hasattr(function, "jinja_pass_arg")

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _budget().tick()
        value, *rest = args[1:] if passes_context else args
        if name in _CONVERTING:
            _budget().check_chars(_text_size(value))
        if name in _GROWING_FILTERS:
            _check_growth(value, tuple(rest), kwargs)
        return function(*args, **kwargs)

    return bounded


def _check_growth(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse an operation on a value whose result may be too long: each character or item may become an argument."""
    items = [item for arg in (*args, *kwargs.values()) for item in (arg if isinstance(arg, tuple) else (arg,))]
    if isinstance(value, str) and ("{" in value or "%" in value) and _LONG_NUMBER.search(value):
        items.append(_budget().max_chars)
    widths = [abs(item) if isinstance(item, int) else _text_size(item) for item in items]
    n_places = _length(value) + 1
    _budget().check_chars(_text_size(value) + n_places * max(widths, default=0))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | Mapping) else 1


def _text_size(value: Any) -> int:
    """Characters of a value's text, about; stops counting where it is too much for any bound.

    Lists may hold one list many times over, and that many times the same: what counts is what writing it would give.
    """
    if isinstance(value, str):
        return len(value)
    limit = _budget().max_chars
    size, n_items, todo = 0, 0, [value]
    while todo:
        item = todo.pop()
        n_items += 1
        if isinstance(item, str):
            size += len(item) + 4
        elif isinstance(item, Mapping):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            todo += item
        else:
            size += 8 + (item.bit_length() // 3 if isinstance(item, int) else 0)
        if n_items + len(todo) > MAX_ITEMS or size > limit:
            return limit + 1
    return size + n_items if n_items > 1 else size
