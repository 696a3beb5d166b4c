"""When the runs of a session began and ended, and how long they took, in whatever form the session keeps it."""

from __future__ import annotations

import datetime as dt
import decimal
import math
import types
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mlflow_outbox.autopilot import of_experiment, of_summary, time_ms
from sessions import NOON, NOON_MS, RESULT, STATE, throw, without


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (NOON, NOON_MS),
        (NOON.astimezone(dt.timezone(dt.timedelta(hours=5, minutes=30))), NOON_MS),
        (NOON.astimezone().replace(tzinfo=None), NOON_MS),
        (pd.Timestamp(NOON), NOON_MS),
        (pd.Timestamp(NOON.astimezone().replace(tzinfo=None)), NOON_MS),
        (np.datetime64(NOON.astimezone().replace(tzinfo=None), "ns"), NOON_MS),
        ("2024-05-01T12:00:00.25Z", NOON_MS),
        ("2024-05-01 14:00:00.250000000+0200", NOON_MS),
        ("2024-05-01T07:00:00,250-05", NOON_MS),
        (NOON.astimezone().replace(tzinfo=None).isoformat(), NOON_MS),
        (NOON_MS / 1000, NOON_MS),
        (NOON_MS, NOON_MS),
        (np.int64(NOON_MS), NOON_MS),
        (str(NOON_MS), NOON_MS),
        (decimal.Decimal("1714564800.25"), NOON_MS),
        (0, 0),
        (dt.date(2024, 5, 1), round(dt.datetime(2024, 5, 1).astimezone().timestamp() * 1000)),
    ],
    ids=repr,
)
def test_times_are_read_in_any_form(value: object, expected: int) -> None:
    """Datetimes (without a zone: local time), ISO text, seconds, and milliseconds above 1e11."""
    assert expected == time_ms(value)


@pytest.mark.parametrize("value", ["soon", math.nan, math.inf, -5, 1e300, True, None, [], pd.NaT, "NaT"], ids=repr)
def test_what_is_no_time_is_listed_and_the_run_has_no_times(value: object) -> None:
    """The run then starts and ends when it is logged."""
    content = of_experiment({**RESULT, "timestamp": value})
    assert (None, None) == (content.start_time_ms, content.end_time_ms)
    assert ([] if value is None else ["timestamp"]) == [what for what, _ in content.refused]


@pytest.mark.parametrize("execution_time", [None, math.nan, -1, 1e300])
def test_without_a_usable_execution_time_a_run_starts_when_it_ends(execution_time: object) -> None:
    """The timestamp is all that is known."""
    content = of_experiment({**RESULT, "execution_time": execution_time})
    assert (NOON_MS, NOON_MS) == (content.start_time_ms, content.end_time_ms)


@pytest.mark.parametrize(
    "length",
    [
        dt.timedelta(seconds=2.5),
        pd.Timedelta("2.5s"),
        np.timedelta64(2500, "ms"),
        np.timedelta64(2_500_000_000, "ns"),
        np.datetime64("2024-01-01T00:00:02.5") - np.datetime64("2024-01-01"),
    ],
    ids=repr,
)
def test_durations_may_be_timedeltas(length: Any) -> None:
    """An execution time and an elapsed time given as timedelta are seconds, in whichever unit NumPy counts them."""
    content = of_experiment({**RESULT, "execution_time": length})
    assert 2.5 == content.metrics["execution_time"]
    assert NOON_MS - 2500 == content.start_time_ms
    state = types.SimpleNamespace(get_elapsed_time=lambda: length)
    assert 2.5 == of_summary(state).metrics["total_time_seconds"]


def test_a_duration_without_a_length_in_seconds_is_listed() -> None:
    """It costs the metric, and the run starts when it ends."""
    content = of_experiment({**RESULT, "execution_time": np.timedelta64(1, "M")})
    assert ["execution_time"] == [what for what, _ in content.refused]
    assert "execution_time" not in content.metrics
    assert NOON_MS == content.start_time_ms == content.end_time_ms


def test_the_states_own_clock_comes_first_and_its_failure_is_listed() -> None:
    """get_elapsed_time() is used, else end less start."""
    state = types.SimpleNamespace(**STATE, get_elapsed_time=lambda: 77.5)
    assert 77.5 == of_summary(state).metrics["total_time_seconds"]

    state.get_elapsed_time = lambda: throw(RuntimeError("no clock"))
    content = of_summary(state)
    assert 90.0 == content.metrics["total_time_seconds"]
    assert ("get_elapsed_time", "RuntimeError: no clock") in content.refused
    assert "total_time_seconds" not in of_summary(without(STATE, "end_time")).metrics
