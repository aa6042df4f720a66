"""What every test may ask for: hypothesis profiles, the instruction sets of the machine, models and shared data.

Tests that use a real model are marked `model` here, and skip with the reason where it cannot be had.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Fixtures such as isa are the same for all examples of a test: hypothesis need not warn that it makes them once.
settings.register_profile(
    "default", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("quick", settings.get_profile("default"), max_examples=5)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

MODEL_FIXTURES = {"smollm2_path", "gemma3_path"}

# A shell that runs the tests in the background has them ignore Ctrl-C, which some of them send
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def subprocesses_import_the_same_woolly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run the tests in a folder of their own: in a clone, `python -c` would import the source tree, built or not."""
    import woolly

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        patch.setenv("PYTHONPATH", str(Path(woolly.__file__).parents[1]))
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `isa` once for every instruction set of the machine, or for WOOLLY_ISA alone."""
    if "isa" in metafunc.fixturenames:
        from woolly._kernels import active_isa, available_isas

        isas = (active_isa(),) if os.environ.get("WOOLLY_ISA") else available_isas()
        metafunc.parametrize("isa", isas, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a real model."""
    for item in items:
        if MODEL_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.model)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the instruction set that is active during the test."""
    from woolly._kernels import use_isa

    with use_isa(request.param):
        yield request.param


def _resolve(name: str) -> Path:
    from woolly import hub
    from woolly.errors import DownloadError

    try:
        return Path(hub.resolve(name))
    except DownloadError as error:
        pytest.skip(f"{name} cannot be fetched: {error}")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct: `llama`, Q4_1 matrices, Q8_0 tied embedding, adds no BOS."""
    return _resolve("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M: `gemma3`, Q5_0, Q4_K, Q6_K and Q8_0 matrices, Q8_0 tied embedding, adds BOS."""
    return _resolve("gemma3-270m")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real vocabularies and chat templates that lies beside a checkout."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the shared test data is not at {folder}")
    return folder
