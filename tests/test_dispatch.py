"""Which instruction set runs: the list, the choice at import, the switch."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import strategies as sts
from make_gguf import FLOATS

from woolly._kernels import active_isa, available_isas, compiled_isas, dispatch, kernel_formats, set_isa, use_isa
from woolly.errors import UnsupportedFormatError, UnsupportedISAError
from woolly.formats import FORMATS


def isa_of_a_new_process(choice: str) -> subprocess.CompletedProcess[str]:
    """Import the kernels with WOOLLY_ISA set, and print what is active."""
    code = "import woolly._kernels as k; print(k.active_isa())"
    env = {**os.environ, "WOOLLY_ISA": choice}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def test_available_are_some_of_the_compiled_in_the_same_order() -> None:
    compiled, available = compiled_isas(), available_isas()
    assert available[0] == compiled[0] == "scalar"
    assert [isa for isa in compiled if isa in available] == list(available)


def test_tiles_are_not_lost_to_the_check_of_their_rounding() -> None:
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    if not {"amx_tile", "amx_bf16"} <= flags or "avx512_amx" not in compiled_isas():
        pytest.skip("no AMX here, or none in this build")
    assert "avx512_amx" in available_isas(), "products round otherwise, or the system refuses tiles"


def test_isa_fixture_switches(isa: str) -> None:
    assert active_isa() == isa


def test_use_isa_restores_what_was_active_even_after_an_error() -> None:
    before = active_isa()
    with use_isa("scalar"):
        assert active_isa() == "scalar"
    assert active_isa() == before
    with pytest.raises(ZeroDivisionError), use_isa("scalar"):
        raise ZeroDivisionError
    assert active_isa() == before


@pytest.mark.parametrize("name", ["", "sse9", "AVX2", None, 512])
def test_unknown_isa_is_refused_and_changes_nothing(name: object) -> None:
    before = active_isa()
    message = f"^ISA {name!r}: there is no such instruction set in this build; available: scalar"
    with pytest.raises(UnsupportedISAError, match=message):
        set_isa(name)
    assert active_isa() == before


def test_isa_that_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if len(compiled_isas()) == 1:
        pytest.skip("this build holds the scalar kernels alone")
    monkeypatch.setattr(dispatch, "available_isas", lambda: ("scalar",))
    best = compiled_isas()[-1]
    with pytest.raises(UnsupportedISAError, match=f"ISA '{best}': this machine cannot run it; available: scalar$"):
        set_isa(best)


@pytest.mark.parametrize("choice", ["scalar", ""])
def test_environment_chooses_at_import(choice: str) -> None:
    done = isa_of_a_new_process(choice)
    assert done.stdout.strip() == (choice or available_isas()[-1]), done.stderr


def test_unknown_name_in_the_environment_is_an_error_that_lists_the_known() -> None:
    done = isa_of_a_new_process("mmx")
    assert done.returncode != 0
    assert f"ISA 'mmx': there is no such instruction set in this build; available: {', '.join(available_isas())}" in (
        done.stderr
    )


def test_formats_are_those_of_the_registry_on_every_isa(isa: str) -> None:
    formats = kernel_formats()
    assert set(formats) == set(sts.FORMATS)
    for name, facts in formats.items():
        known = FORMATS[name]
        assert facts == (known.ggml_type, known.block_size, known.block_bytes)
        assert facts[1:] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(facts[0])]


def test_test_strategies_know_every_format() -> None:
    assert set(sts.FORMATS) == set(kernel_formats())
    assert set(FLOATS) < set(sts.FORMATS)


def test_format_without_kernels_is_refused_by_name() -> None:
    message = "format 'nvfp4' has no kernels; those that have: f32, f16, bf16"
    with pytest.raises(UnsupportedFormatError, match=message):
        dispatch.format_index("nvfp4")
