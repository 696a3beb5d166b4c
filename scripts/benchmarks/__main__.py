"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import arrival, backlog, calls, draining, experiment, growth, report, starting
from benchmarks.machine import describe
from benchmarks.peers import install
from benchmarks.plan import Plan, Stores
from servers import forget_mlflow_variables

_ROOT = Path(__file__).resolve().parent.parent.parent
_MEASUREMENTS = {
    "calls": calls.measure,
    "starting": starting.measure,
    "experiment": experiment.measure,
    "draining": draining.measure,
    "arrival": arrival.measure,
    "backlog": backlog.measure,
    "growth": growth.measure,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure the outbox beside other trackers.")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller backlogs: about five minutes")
    parser.add_argument("--only", action="append", choices=[*_MEASUREMENTS], help="one measurement; may be repeated")
    parser.add_argument("--no-peers", action="store_true", help="compare with MLflow alone; nothing is installed")
    parser.add_argument("--rounds", type=int, help="repetitions of each comparison (2; quick 1)")
    parser.add_argument("--loop-seconds", type=float, help="seconds of the experiment's loop (30; quick 4)")
    parser.add_argument("--points", type=int, help="metric points of a backlog (100,000; quick 20,000)")
    parser.add_argument("--pending", type=int, help="events in the largest waiting outbox (10,000,000; quick 100,000)")
    parser.add_argument("--output", type=Path, default=_ROOT / "docs" / "bench", help="where figures and plots go")
    parser.add_argument("--peers", type=Path, default=Path(sys.prefix) / "peers", help="where peers are installed")
    return parser.parse_args()


def main() -> int:
    """Measure, write results.json and the plots, and print the tables."""
    given = _arguments()
    forget_mlflow_variables()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}"[:200], file=sys.stderr, flush=True)

    found, versions, missing = ({}, {}, {}) if given.no_peers else install(given.peers, say)
    results: dict[str, Any] = {"machine": describe(Path(tempfile.gettempdir())), "quick": given.quick}
    results["peers"] = {"versions": versions, "not installed": missing}
    stores = Stores()
    try:
        plan = Plan(
            stores,
            found,
            say,
            given.quick,
            rounds=given.rounds or (1 if given.quick else 2),
            calls=1500 if given.quick else 10_000,
            call_seconds=0.2 if given.quick else 0.7,
            loop_seconds=given.loop_seconds or (4.0 if given.quick else 30.0),
            points=given.points or (20_000 if given.quick else 100_000),
            pending=given.pending or (100_000 if given.quick else 10_000_000),
            waiting_runs=1000 if given.quick else 10_000,
            arrivals=3.0 if given.quick else 10.0,
        )
        for name in given.only or _MEASUREMENTS:
            results[name] = _MEASUREMENTS[name](plan)
    finally:
        stores.close()
    results["machine"]["load_at_end"] = [round(load, 1) for load in os.getloadavg()]
    results["seconds"] = round(time.monotonic() - began)
    given.output.mkdir(parents=True, exist_ok=True)
    if given.only and (given.output / "results.json").exists():  # the other measurements stay as they are
        held = json.loads((given.output / "results.json").read_text())
        if given.no_peers:
            del results["peers"]
        results = held | results
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.4g}"))
    (given.output / "results.json").write_text(json.dumps(rounded, indent=1) + "\n")
    report.plot(rounded, given.output)
    report.show(rounded, Console())
    with (given.output / "tables.txt").open("w", encoding="utf-8") as tables:
        report.show(rounded, Console(file=tables, width=130))
    return 0


if __name__ == "__main__":
    sys.exit(main())
