"""Templates that would take all time or memory are ended; those that chats use are not bothered."""

from __future__ import annotations

import time
import tracemalloc

import pytest

import woolly.chat
from woolly.chat import ChatTemplate
from woolly.errors import TemplateError
from woolly.sandbox import BoundedEnvironment

HI = [{"role": "user", "content": "Hi"}]

TOO_LONG = {
    "product": "{{ 'a' * 50_000_000 }}",
    "product that is thrown away": "{% set x = 'a' * 50_000_000 %}",
    "product from the left": "{% set x = 50_000_000 * 'a' %}",
    "product of lists": "{% set x = [1] * 100_000_000 %}",
    "sum": "{% set ns = namespace(x='a' * 9_000_000) %}{% set y = ns.x + ns.x %}",
    "doubling": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "concatenation": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "set block": "{% set x = 'a' * 9_000_000 %}{% set y %}" + "{{ x }}" * 99 + "{% endset %}",
    "macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set y = " + "f(" * 40 + "'a'" + ")" * 40 + " %}",
    "constant text in a loop": "{% set y %}{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}{% endset %}",
    "replace": "{% set x = 'a' * 99999 %}{% set y = x.replace('a', x) %}",
    "replace filter": "{% set x = 'a' * 99999 %}{% set y = x | replace('a', x) %}",
    "mapped filter": "{% set y = ['a'] | map('center', 10 ** 9) | list %}",
    "join": "{% set x = 'a' * 99999 %}{% set y = x.join(['b'] * 99999) %}",
    "join filter": "{% set y = (['a' * 99999] * 99999) | join %}",
    "ljust": "{% set y = 'a'.ljust(10 ** 10) %}",
    "zfill": "{% set y = 'a'.zfill(width=10 ** 10) %}",
    "expandtabs": "{% set y = '\t'.expandtabs(10 ** 9) %}",
    "center": "{% set y = 'a' | center(10 ** 9) %}",
    "indent": "{% set y = ('\n' * 99999) | indent(10 ** 6) %}",
    "batch": "{% set y = [1] | batch(10 ** 9, 0) | list %}",
    "slice": "{% set y = [1] | slice(10 ** 9) | list %}",
    "percent format": "{% set y = '%1000000000d' % 1 %}",
    "percent format with a star": "{% set y = '%*d' % (10 ** 9, 1) %}",
    "format filter": "{% set y = '%1000000000d' | format(1) %}",
    "format": "{% set y = '{:1000000000}'.format(1) %}",
    "format with a width": "{% set y = '{:{}}'.format(1, 10 ** 9) %}",
    "tojson": "{% set y = [[1]] | tojson(indent=10 ** 9) %}",
    "lists of the same list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "text of such lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{% set y = ns.x | string %}",
    "comparing such lists": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
}  # fmt: skip

TOO_SLOW = {
    "two loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "two loops with a condition": "{% for i in range(99999) if false %}{% endfor %}" * 2
    + "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "a slow condition": "{% for i in range(99999) if range(99999) | list | length == 0 %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    "a recursive loop": "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "no loop": "{% set x = range(99999) | list | length %}" * 1000,
    "sorting": "{% for i in range(99999) %}{% set x = range(99999) | sort | list %}{% endfor %}",
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_long_texts_are_refused_before_they_are_made(name: str) -> None:
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(TemplateError, match="chat template wrote more than 16777216 characters"):
            ChatTemplate(TOO_LONG[name]).render(HI)
        assert tracemalloc.get_traced_memory()[1] < 400 << 20
        assert time.process_time() - started < 5
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", TOO_SLOW)
def test_endless_templates_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(woolly.chat, "MAX_RENDER_S", 0.2)
    started = time.perf_counter()
    with pytest.raises(TemplateError, match=r"ran for more than 0\.2 s|RecursionError"):
        ChatTemplate(TOO_SLOW[name]).render(HI)
    assert time.perf_counter() - started < 5  # compiling is not a part of it


def test_integers_are_bounded() -> None:
    with pytest.raises(TemplateError, match="chat template makes an integer of more than 4096 bits"):
        ChatTemplate("{% set x = 10 ** (10 ** 8) %}").render(HI)
    assert ChatTemplate("{{ 2 ** 10 }} {{ 2.0 ** -1 }}").render(HI) == "1024 0.5"


def test_usual_things_work() -> None:
    source = """{%- set ns = namespace(found=false, parts=[]) -%}
{%- for m in messages if m.role != 'system' -%}
{%- set ns.parts = ns.parts + [m.content | trim] -%}
{{ loop.index ~ '/' ~ loop.length }}: {{ m.role | upper }}{{ ' ' * 2 }}{{ m.content.split('i')[0] }}{{ '%03d' % 7 }}
{%- endfor -%}
{{ ns.parts | join(', ') }} {{ 'a{}'.format(3) }} {{ 'ab'.replace('a', 'cd') | indent(2) }} {{ messages == messages }}
{%- set x %}{{ 1 + 2 }}{% endset %} {{ x }} {{ [3, 1] | sort | list }} {{ {'a': [1]} | tojson(indent=1) | length }}
{%- macro f(a, b='z') %}<{{ a }}{{ b }}>{% endmacro %} {{ f(1) }} {{ f(1, b=caller) }} {{ 'x'.center(5) }}|"""
    expected = "1/1: USER  H007Hi a3 cdb True 3 [1, 3] 18 <1z> <1>   x  |"
    assert ChatTemplate(source).render(HI) == expected
    assert "lipsum" not in BoundedEnvironment().globals


def test_templates_run_inside_bounds_only() -> None:
    with pytest.raises(TemplateError, match=r"templates run inside limited\(\) only"):
        BoundedEnvironment().from_string("{% for i in [1] %}{% endfor %}").render()
