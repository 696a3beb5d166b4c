"""Quantiles of many small durations, and the median of some rounds with its spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def quantiles(nanoseconds: Sequence[int]) -> dict[str, float]:
    """Return p50, p99, p99.9 and the largest of some durations, in microseconds.

    Args:
        nanoseconds: the durations in any order.

    Raises:
        ValueError: there are none, because every call failed.
    """
    if not nanoseconds:
        msg = "no call was made"
        raise ValueError(msg)
    ordered = sorted(nanoseconds)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] / 1000

    return {"p50": at(0.5), "p99": at(0.99), "p99.9": at(0.999), "max": ordered[-1] / 1000, "calls": len(ordered)}


def median(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each number over the rounds, and under ``spread`` its least and largest value.

    Args:
        rounds: one result per round, all with the same names; what is no number is taken from the first.
    """
    result: dict[str, Any] = {"rounds": len(rounds), "spread": {}}
    for name, first in rounds[0].items():
        values = [one[name] for one in rounds if isinstance(one.get(name), (int, float))]
        if values and not isinstance(first, bool):
            result[name] = statistics.median(values)
            result["spread"][name] = [min(values), max(values)]
        else:
            result[name] = first
    return result
