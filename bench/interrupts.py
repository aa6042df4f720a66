"""How soon a prefill ends when it is asked to: python bench/interrupts.py --model smollm2 [--threads N] [--times 50]

Each time, a prompt of 256 to 1,024 random tokens is being read, and after a random share of the time that it takes, a
cancel from another thread, a Ctrl-C or a deadline ends it. What is measured is from the request to the exception in
the thread that reads. Beside it stands the time of one layer, for 1,024 tokens at once. The last line is one JSON
object. Not part of the package.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import threading
import time
from typing import Any

import woolly
from woolly import hub
from woolly.session import Session

LENGTHS = (256, 512, 1024)
WAYS = ("cancel", "ctrl-c", "deadline")


def main() -> int:
    """Measure each way on each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2", "gemma3-270m"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--times", type=int, default=50)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rows = []
    for name in args.model:
        with woolly.load(hub.resolve(name), n_ctx=2048, n_threads=args.threads) as model:
            rng = random.Random(0)
            prompts = {n: [rng.randrange(model.config.vocab_size) for _ in range(n)] for n in LENGTHS}
            whole_s = {n: min(time_of(model.session(), prompt) for _ in range(3)) for n, prompt in prompts.items()}
            layer_s = whole_s[max(LENGTHS)] / model.config.n_layers
            for way in WAYS:
                seconds: list[float] = []
                for n in rng.choices(LENGTHS, k=10 * args.times):
                    late = interrupted(model.session(), prompts[n], way, rng.uniform(0.05, 0.8) * whole_s[n])
                    seconds += [] if late is None else [late]
                    if len(seconds) == args.times:
                        break
                rows.append(row(name, way, seconds, layer_s))
                print(rows[-1], flush=True)
    print(json.dumps(rows))
    return 0


def time_of(session: Session, prompt: list[int]) -> float:
    started = time.perf_counter()
    session.feed(prompt)
    return time.perf_counter() - started


def interrupted(session: Session, prompt: list[int], way: str, after_s: float) -> float | None:
    """Seconds from the request to the exception; None where the prompt was read before the thread that asks woke up."""
    asked = [time.perf_counter() + after_s]

    def ask() -> None:
        asked[0] = time.perf_counter()
        if way == "cancel":
            session.cancel()
        else:
            os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(after_s, ask)
    try:
        if way != "deadline":
            timer.start()
        session.feed(prompt, timeout_s=after_s if way == "deadline" else None)
    except (woolly.CancelledError, KeyboardInterrupt):
        return time.perf_counter() - asked[0]
    finally:
        timer.cancel()
    return None


def row(name: str, way: str, seconds: list[float], layer_s: float) -> dict[str, Any]:
    return {
        "model": name,
        "way": way,
        "times": len(seconds),
        "median_ms": round(1e3 * statistics.median(seconds), 1),
        "worst_ms": round(1e3 * max(seconds), 1),
        "layer_ms": round(1e3 * layer_s, 1),
    }


if __name__ == "__main__":
    raise SystemExit(main())
