"""What runs: versions, instruction sets, threads."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np

import woolly
from woolly._kernels import active_isa, available_isas, compiled_isas, default_threads, kernel_formats


def describe() -> dict[str, Any]:
    """The facts that `show_config` prints, as a dict."""
    return {
        "woolly": woolly.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {cpu_name()}",
        "isa": active_isa(),
        "isas available": list(available_isas()),
        "isas compiled": list(compiled_isas()),
        "threads": default_threads(),
        "formats": list(kernel_formats()),
    }


def show_config() -> None:
    """Print what runs: version, machine, the instruction set in use and those available, threads, formats."""
    for key, value in describe().items():
        print(f"{key:15} {', '.join(value) if isinstance(value, list) else value}")


def cpu_name() -> str:
    """The processor's own name, or its architecture where the system does not tell."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
