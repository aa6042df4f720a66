"""The report's pictures. Each is drawn from rows alone, and only where there are such rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from woolly.bench.harness import Row
from woolly.bench.layer import WORDS
from woolly.bench.limits import quantised_limit

# Okabe and Ito's colours, which colour-blind people can tell apart
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#332288", "#999999", "#8B4513")
INK, FAINT = "#222222", "#bbbbbb"
DPI = 130


def draw(mode: str, rows: list[Row], path: Path) -> bool:
    """Draw a mode's picture; False where its rows are missing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [row for row in rows if row["mode"] == mode and row.get("table") != "failed"]
    drawers: dict[str, Callable[[Any, list[Row], list[Row]], Any]] = {
        "kernels": _roofline,
        "layer": _layer,
        "model": _depth,
        "stack": _stack,
        "loading": _loading,
    }
    if not chosen:
        return False
    style = {"font.size": 10, "axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure = drawers[mode](plt, chosen, rows)
        if figure is not None:
            figure.savefig(path, dpi=DPI, bbox_inches="tight", facecolor="white")
            plt.close(figure)
    return figure is not None


def _limit(rows: list[Row], kind: str, isa: str, n_threads: int) -> float:
    """A peak in Gop/s, or the bandwidth of the largest buffer in GB/s; 0 where it was not measured."""
    values = [
        (row.get("bytes", 0), row["value"])
        for row in rows
        if row["mode"] == "limits" and (row.get("kind"), row.get("isa"), row.get("n_threads")) == (kind, isa, n_threads)
    ]
    return max(values, default=(0, 0.0))[1]


def _roofline(plt: Any, kernels: list[Row], rows: list[Row]) -> Any:
    """Matmuls and attention: rate over intensity, below what memory and arithmetic allow."""
    facts = rows[0]
    isa, n_threads = facts["isa"], facts["n_threads"]
    read, fma = (_limit(rows, kind, isa, n_threads) for kind in ("read", "fma_f32"))
    kind, reachable = quantised_limit(isa)
    name = ("half of " if reachable == 0.5 else "") + f"{kind.removeprefix('dot_').upper()} dot"
    ceilings = {"FP32 FMA": fma, name: reachable * _limit(rows, kind, isa, n_threads)}
    points = [row for row in kernels if row["ops"] and row["gops"]]
    if not points or not read or not fma:
        return None
    figure, axes = plt.subplots(figsize=(8.6, 5.2))
    intensities = [row["ops"] / row["bytes"] for row in points]
    left, right = min(intensities) / 1.6, max(6 * max(intensities), 4 * max(ceilings.values()) / read)
    for colour, (name, peak) in zip((COLOURS[7], COLOURS[8]), ceilings.items(), strict=False):
        xs = [left, peak / read, right]
        axes.plot(xs, [left * read, peak, peak], color=colour, linewidth=1.6, zorder=1)
        axes.annotate(
            f"{name}: {peak:,.0f} Gop/s", (right, peak), (-4, 4), textcoords="offset points", ha="right", color=colour
        )
    axes.annotate(
        f"memory: {read:,.1f} GB/s",
        (left, left * read),
        (6, -2),
        textcoords="offset points",
        va="top",
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        zorder=3,
    )
    names = dict.fromkeys("attention" if row["kernel"] == "attention" else row["format"] for row in points)
    for colour, name in zip(COLOURS, names, strict=False):
        chosen = [row for row in points if name == ("attention" if row["kernel"] == "attention" else row["format"])]
        marker = "D" if name == "attention" else "o"
        xs = [row["ops"] / row["bytes"] for row in chosen]
        axes.scatter(
            xs, [row["gops"] for row in chosen], s=26, color=colour, marker=marker, alpha=0.75, label=name, zorder=2
        )
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(None, 4 * max(ceilings.values())))
    axes.set_xlabel("operations for each byte of weights (or cache) read")
    axes.set_ylabel("Gop/s")
    axes.set_title(f"Kernels against the limits: {isa}, {n_threads} thread(s)", loc="left")
    axes.grid(True, which="major", color="#eeeeee", zorder=0)
    axes.legend(title="weights", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    text = "points above the memory line come from a cache: a matrix smaller than the buffer it was measured with"
    figure.text(0.01, -0.02, text, fontsize=8, color="#666666")
    return figure


def _layer(plt: Any, layer: list[Row], rows: list[Row]) -> Any:
    """One bar for each model and phase, cut into the parts of a layer."""
    parts = [row for row in layer if row["table"] == "one layer" and row["part"] != "layer"]
    bars = list(dict.fromkeys((row["model"], row["phase"]) for row in parts))
    if not bars:
        return None
    names = sorted({row["part"] for row in parts}, key=lambda name: list(WORDS).index(name) if name in WORDS else 99)
    colour_of = {name: (*COLOURS, *COLOURS)[i] for i, name in enumerate(names)}
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.75 * len(bars)))
    for y, bar in enumerate(reversed(bars)):
        left = 0.0
        for row in (row for row in parts if (row["model"], row["phase"]) == bar):
            share = 100 * row["of_whole"]
            axes.barh(y, share, left=left, color=colour_of[row["part"]], edgecolor="white", height=0.62)
            if share >= 5:
                axes.text(
                    left + share / 2, y, f"{share:.0f} %", ha="center", va="center", color=_on(colour_of[row["part"]])
                )
            left += share
    totals = {
        (r["model"], r["phase"]): r["seconds"] for r in layer if r["table"] == "one layer" and r["part"] == "layer"
    }
    labels = [f"{model}\n{phase}, {1e6 * totals[model, phase]:,.0f} µs" for model, phase in reversed(bars)]
    axes.set_yticks(range(len(bars)), labels)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of a layer's time, %")
    axes.set_title("Where one layer's time goes", loc="left")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour_of[name]) for name in names]
    axes.legend(handles, names, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return figure


def _depth(plt: Any, model: list[Row], rows: list[Row]) -> Any:
    """tokens/s of generation and of prompts over the tokens before them."""
    tests = [row for row in model if row.get("n_depth") is not None and row.get("avg_ts")]
    if not tests:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.9))
    for panel, (key, title) in zip(panels, {"n_gen": "generation", "n_prompt": "prompt"}.items(), strict=True):
        series = dict.fromkeys((row["model"], row[key]) for row in tests if row[key])
        most, least = 0.0, float("inf")
        for colour, (name, n) in zip(COLOURS, series, strict=False):
            chosen = sorted((r for r in tests if (r["model"], r[key]) == (name, n)), key=lambda row: row["n_depth"])
            rates = [row["median_ts"] for row in chosen]
            errors = [row["stddev_ts"] for row in chosen]
            xs = [row["n_depth"] for row in chosen]
            panel.errorbar(xs, rates, yerr=errors, marker="o", color=colour, capsize=3, label=f"{name}, {n} tokens")
            least = min(least, *rates)
            most = max(most, *(rate + error for rate, error in zip(rates, errors, strict=True)))
        panel.set_title(title, loc="left")
        panel.set_xlabel("tokens in the context before")
        panel.set_ylabel("tokens/s")
        if least and most / least > 10:
            panel.set(yscale="log", ylim=(least / 2, 5 * most))
        else:
            panel.set_ylim(0, 1.3 * most or 1)  # room for the legend
        panel.grid(True, color="#eeeeee")
        if series:
            panel.legend(frameon=False, fontsize=8, loc="upper right")
    figure.tight_layout(w_pad=3)
    return figure


def _stack(plt: Any, stack: list[Row], rows: list[Row]) -> Any:
    """A bar for each step on a logarithmic scale, with the factor over the step before."""
    figure, axes = plt.subplots(figsize=(8.6, 0.9 + 0.55 * len(stack)))
    rates = [row["avg_ts"] for row in stack]
    ys = range(len(stack) - 1, -1, -1)
    axes.barh(list(ys), rates, color=[FAINT if row["factor"] is None else COLOURS[0] for row in stack], height=0.62)
    for y, row in zip(ys, stack, strict=True):
        factor = "" if row["factor"] is None else f"   × {row['factor']:.2f}"
        axes.text(row["avg_ts"] * 1.08, y, f"{row['avg_ts']:,.2f} tokens/s{factor}", va="center")
    axes.set_yticks(list(ys), [row["variant"] for row in stack])
    axes.set(xscale="log", xlim=(min(rates) / 2, max(rates) * 12))
    axes.set_xlabel("tokens/s (logarithmic); × is over the row above")
    axes.set_title(
        f"What each optimisation brings: {stack[0]['model']}, {stack[0]['n_gen']} tokens after "
        f"{stack[0]['n_prompt']}, {stack[0]['n_threads']} thread(s)",
        loc="left",
        x=-0.28,
    )
    return figure


def _loading(plt: Any, loading: list[Row], rows: list[Row]) -> Any:
    """Seconds to the first token, by what they are spent on; and peak memory beside the file's size."""
    figure, (times, memory) = plt.subplots(1, 2, figsize=(9.5, 1.4 + 0.55 * len(loading)), sharey=True)
    ys = range(len(loading) - 1, -1, -1)
    for y, row in zip(ys, loading, strict=True):
        first = row.get("ttft_s") or 0.0
        # generating happens while the first step waits for it: it is a part of the time to the first token
        made = (row.get("materialise_s") or 0.0) if not first else 0.0
        left = 0.0
        spent = zip((row["open_s"], made, first), (COLOURS[0], COLOURS[3], COLOURS[2]), strict=True)
        for seconds, colour in spent:
            times.barh(y, seconds, left=left, color=colour, height=0.6)
            left += seconds
        times.text(left, y, f"  {left:.2f} s", va="center")
        memory.barh(y, row["memory_bytes"] / 1e9, color=COLOURS[8], height=0.6)
        memory.text(row["memory_bytes"] / 1e9, y, f"  {row['memory_bytes'] / 1e9:.2f} GB", va="center")
    file_gb = loading[0]["file_bytes"] / 1e9
    memory.axvline(file_gb, color=COLOURS[3], linewidth=1)
    memory.set_title(f"peak memory (line: the file, {file_gb:.2f} GB)", loc="left", fontsize=10)
    memory.set_xlim(0, 1.35 * max(row["memory_bytes"] for row in loading) / 1e9)
    memory.set_xlabel("GB")
    times.set_yticks(list(ys), [row["step"] for row in loading])
    times.set_xlim(0, 1.35 * max(row["total_s"] for row in loading))
    times.set_xlabel("seconds")
    times.set_title(f"{loading[0]['model']}: from the file in the page cache", loc="left", fontsize=10)
    names = {"open": COLOURS[0], "everything to FP32": COLOURS[3], "first token": COLOURS[2]}
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in names.values()]
    figure.legend(handles, names, loc="lower center", ncols=3, frameon=False, bbox_to_anchor=(0.5, -0.09))
    figure.tight_layout(w_pad=2)
    return figure


def _on(colour: str) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
