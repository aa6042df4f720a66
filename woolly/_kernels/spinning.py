"""How long threads of libgomp spin before they sleep. Must come before whatever loads libgomp.

By default they spin for some 15 ms at the end of a parallel region and in wait of the next one. On a machine with other
work that takes the cores from those that would end the waiting: beside busy processes decode was twice as fast without.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

SPINS = "20000"  # 0.3 to 1.2 ms, as long as a pause takes: more than what lies between two steps of an answer


@contextmanager
def bounded_spinning() -> Iterator[None]:
    """Have a libgomp that is loaded meanwhile spin for a short time only, unless the user has chosen one."""
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = SPINS
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]
