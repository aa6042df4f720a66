"""What `woolly.show_config` says."""

import numpy as np
import pytest

import woolly
from woolly import environment
from woolly._kernels import available_isas, compiled_isas, default_threads, kernel_formats


def test_describe_tells_the_facts(isa: str) -> None:
    facts = environment.describe()
    assert facts["isa"] == isa
    assert facts["isas available"] == list(available_isas())
    assert facts["isas compiled"] == list(compiled_isas())
    assert facts["threads"] == default_threads()
    assert facts["formats"] == list(kernel_formats())
    assert (facts["woolly"], facts["numpy"]) == (woolly.__version__, np.__version__)


def test_show_config_prints_a_line_a_fact(capsys: pytest.CaptureFixture[str]) -> None:
    woolly.show_config()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:15].strip() for line in lines] == list(environment.describe())
    assert any("scalar" in line for line in lines)


def test_cpu_has_a_name_even_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.cpu_name()

    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr("builtins.open", refuse)
    assert environment.cpu_name()


def test_public_names_are_what_the_package_lists() -> None:
    assert set(woolly.__all__) <= set(dir(woolly))
    for name in woolly.__all__:
        assert getattr(woolly, name) is not None
    with pytest.raises(AttributeError, match="module 'woolly' has no attribute 'nonsense'"):
        _ = woolly.nonsense
