"""Results as tables on the terminal, and as plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.trackers import PEERS

_SIZE = (7.5, 4.5)
_OURS, _OTHERS = "#1a7f5a", "#8a8f98"


def show(results: dict[str, Any], console: Console) -> None:
    """Print every measurement that was taken as a table."""
    console.print(results["machine"])
    for name, reason in results["peers"]["not installed"].items():
        console.print(f"not installed: {name}: {reason}", markup=False)
    if "calls" in results:
        _calls(console, results["calls"])
    if "experiment" in results:
        columns = {
            "whole process": "slowdown",
            "its loop": "loop_slowdown",
            "its loop, by turns": "alternating",
            "error of that": "alternating_error",
            "its CPU": "cpu_slowdown",
            "calls, % of its steps": "calls_percent",
            "longest step, ms": "longest_step_ms",
        }
        _plain(console, "What the experiment pays (1 is no tracking)", results["experiment"], columns)
    if "starting" in results:
        columns = {"ready, ms": "ready_ms", "first call done, ms": "first_call_ms"}
        _plain(console, "Starting: import and creation; with the first call", results["starting"], columns)
    if "draining" in results:
        _draining(console, results["draining"])
    if "arrival" in results:
        columns = {"median, s": "median_s", "p99, s": "p99_s", "arrived": "arrived"}
        _plain(console, "From the call to the server", results["arrival"], columns)
    if "backlog" in results:
        columns = {
            "open, s": "open_s",
            "status, s": "status_s",
            "worker, MB": "rss_mb",
            "threads": "threads",
            "fds": "fds",
            "idle CPU, %": "idle_cpu_percent",
            "bytes/event": "bytes_per_event",
        }
        _plain(console, "Much that waits", results["backlog"], columns)
    if "growth" in results:
        rows = {f"{row[name]:,} {name}": row for name, found in results["growth"].items() for row in found}
        _plain(console, "Growth, us per event", rows, {"logging": "log_us", "delivering, CPU": "deliver_cpu_us"})


def called(subject: str) -> str:
    """Return what a subject is called in tables and plots."""
    parts = subject.split()
    if parts[0] == "outbox":
        sync, worker = parts[1], parts[2]
        return f"outbox, sync={sync}" + ("" if worker == "none" else f", {worker} delivering")
    if parts[0] == "mlflow":
        return f"MLflow {parts[1]}, {parts[2]}"
    if parts[0] == "plugin":
        return f"MLflow, outbox+http, {parts[1]} delivering"
    controls = {
        "write": "bare os.write",
        "write spaced": "bare os.write, spaced",
        "write posting": "bare os.write, spaced, another process posting",
        "diskcache": "diskcache push",
    }
    return controls.get(subject, PEERS.get(subject, subject))


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return "-"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"  # noqa: PLR2004 - three digits say enough


def _cell(row: dict[str, Any], name: str) -> str:
    spread = row.get("spread", {}).get(name)
    text = _number(row.get(name))
    return f"{text} ({_number(spread[0])}-{_number(spread[1])})" if spread and spread[0] != spread[1] else text


def _plain(console: Console, title: str, rows: dict[str, Any], columns: dict[str, str]) -> None:
    table = Table("", *columns, title=title)
    for subject, row in rows.items():
        if "error" in row:
            table.add_row(called(subject), str(row["error"]), *[""] * (len(columns) - 1))
        else:
            table.add_row(called(subject), *[_cell(row, name) for name in columns.values()])
    console.print(table)


def _calls(console: Console, found: dict[str, Any]) -> None:
    shapes = dict.fromkeys(shape for row in found.values() if "error" not in row for shape in row)
    for shape in shapes:
        rows = {subject: row.get(shape, row) for subject, row in found.items() if shape in row or "error" in row}
        columns = {"p50, us": "p50", "p99": "p99", "p99.9": "p99.9", "largest": "max"}
        if shape == "one metric":
            columns |= {"a bare write beside it, p50": "write", "times as long": "times"}
            columns |= {"p99.9 in that loop": "p99.9 later", "of the writes": "write p99.9"}
        _plain(console, f"A logging call: {shape}", rows, columns)


def _draining(console: Console, found: dict[str, Any]) -> None:
    names = (
        "",
        "points",
        "by hand, points/s",
        "outbox, points/s",
        "ratio",
        "kept of the rate without",
        "CPU, hand/outbox s",
    )
    table = Table(*names, title="Draining")
    for name, row in found.items():
        if name in {"counted", "again"}:
            continue
        hand, ours = row["by hand"], row["outbox"]
        if "error" in hand or "error" in ours:
            table.add_row(name, "", str(hand.get("error", "")), str(ours.get("error", "")))
            continue
        cpu = f"{hand['cpu_s']:.2f} / {ours['cpu_s']:.2f}"
        rates = (_cell(hand, "points_per_s"), _cell(ours, "points_per_s"), _cell(row, "ratio"))
        table.add_row(name, f"{row['points']:,}", *rates, _cell(row, "kept") if "kept" in row else "", cpu)
    console.print(table)
    console.print({"20,000 points in 10 runs": found.get("counted")})
    columns = {"first, s": "first_seconds", "again, s": "seconds", "ratio": "ratio"}
    _plain(console, "Batches that have arrived already, sent once more", found.get("again", {}), columns)


def plot(results: dict[str, Any], directory: Path) -> None:
    """Write one picture for each measurement that has one."""
    import matplotlib as mpl

    mpl.use("Agg")
    if "calls" in results:
        rows = {s: row["one metric"] for s, row in results["calls"].items() if "one metric" in row}
        _bars(
            rows,
            ("p50", "p99.9"),
            "One metric: microseconds of a logging call (dark p50, light p99.9)",
            directory / "calls.png",
        )
    if "experiment" in results:
        rows = {s: row for s, row in results["experiment"].items() if "loop_slowdown" in row}
        title = "The experiment's loop, times as long as without tracking"
        _bars(rows, ("loop_slowdown",), title, directory / "experiment.png", least=0.5)
    if "starting" in results:
        rows = {s: row for s, row in results["starting"].items() if "ready_ms" in row}
        _bars(rows, ("first_call_ms",), "Milliseconds from import to the first call done", directory / "starting.png")
    if "draining" in results:
        _draining_bars(results["draining"], directory / "draining.png")
    if "arrival" in results:
        rows = {s: row for s, row in results["arrival"].items() if "median_s" in row}
        _bars(
            rows,
            ("median_s", "p99_s"),
            "Seconds from the call to the server (dark median, light p99)",
            directory / "arrival.png",
        )
    if "growth" in results:
        _growth(results["growth"], results.get("backlog", {}), directory / "growth.png")


def _bars(rows: dict[str, Any], names: tuple[str, ...], title: str, path: Path, *, least: float | None = None) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if not rows:
        return
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    ordered = sorted(rows, key=lambda subject: -rows[subject][names[0]])
    for place, subject in enumerate(ordered):
        ours = subject.startswith(("outbox", "plugin")) or ", worker " in subject
        colour = _OURS if ours else _OTHERS
        for name, alpha in zip(names, (1.0, 0.35), strict=False):
            axes.barh(place, rows[subject][name], color=colour, alpha=alpha, zorder=2 - alpha)
    axes.set_yticks(range(len(ordered)), [called(subject) for subject in ordered], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(left=least)
    left, right = axes.get_xlim()
    # Matplotlib labels every step of a short axis, one label over the other.
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if right < 300 * left else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number_on_axis(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _number_on_axis(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value:,g}"  # noqa: PLR2004 - a million


def _draining_bars(found: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    rows = {name: row for name, row in found.items() if "ratio" in row and "outbox" in row}  # not the counted requests
    if not rows:
        return
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    for place, row in enumerate(reversed(rows.values())):
        axes.barh(place + 0.2, row["outbox"]["points_per_s"], 0.4, color=_OURS, label="" if place else "outbox")
        axes.barh(place - 0.2, row["by hand"]["points_per_s"], 0.4, color=_OTHERS, label="" if place else "by hand")
    axes.set_yticks(range(len(rows)), list(reversed(rows)), fontsize=8)
    axes.set_title("Draining a backlog: points per second, beside hand-written batches of 1,000", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _growth(found: dict[str, Any], waiting: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, rows in found.items():
        good = [row for row in rows if "error" not in row]
        left.plot([row[name] for row in good], [row["log_us"] for row in good], "o--", label=f"logging, by {name}")
        left.plot(
            [row[name] for row in good], [row["deliver_cpu_us"] for row in good], "s-", label=f"delivering, by {name}"
        )
    left.set(xscale="log", yscale="log", ylabel="us per event", title="One event, as everything grows")
    left.legend(fontsize=7)
    good = [row for row in waiting.values() if "rss_mb" in row and row["runs"] == 1]
    right.plot([row["events"] for row in good], [row["rss_mb"] for row in good], "o-", label="worker's memory, MB")
    right.plot([row["events"] for row in good], [1000 * row["status_s"] for row in good], "s-", label="status, ms")
    right.plot([row["events"] for row in good], [1000 * row["open_s"] for row in good], "^-", label="opening, ms")
    right.set(xlabel="pending events", title="An outbox that waits")
    if good:
        right.set(xscale="log", yscale="log")
        right.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)
