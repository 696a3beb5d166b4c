"""What a logging call accepts and what it makes of it (F66, F67)."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import fractions
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mlflow_outbox.errors import EventRefused, InvalidEvent, InvalidEventType
from mlflow_outbox.spool.events import INT64_MAX, INT64_MIN, Tags, decode, encode
from mlflow_outbox.validation import (
    checked_key,
    checked_mapping,
    checked_status,
    checked_step,
    checked_text,
    checked_time_ms,
    checked_value,
    looks_like_seconds,
)
from spools import Mute


class Colour(str, enum.Enum):
    """An enumeration whose members are strings."""

    RED = "red"


class Tensor:
    """What a framework's scalar looks like: no float of its own, but an item."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __float__(self) -> float:
        msg = "only one element tensors can be converted to Python scalars"
        raise RuntimeError(msg)

    def __index__(self) -> int:
        raise RuntimeError

    def item(self) -> Any:
        """The number."""
        return self.value


class Rude:
    """An object that raises whatever it is asked."""

    def __str__(self) -> str:
        raise MemoryError

    __repr__ = __str__
    __float__ = __str__  # type: ignore[assignment]  # it never returns
    __index__ = __str__  # type: ignore[assignment]  # as above


@pytest.mark.parametrize("key", ["loss", "a/b", "a b", "a.b-c_d:e", "ä", "损失", "x" * 250, "a..b", "0", "...a"])
def test_a_key_that_mlflow_takes_is_taken(key: str) -> None:
    """The same characters come back."""
    if key == "...a":
        with pytest.raises(InvalidEvent):
            checked_key(key, "metric")
    else:
        assert key == checked_key(key, "metric")


@pytest.mark.parametrize(
    "key",
    [
        "",
        "x" * 251,
        "a\n",
        "a\0b",
        "a#b",
        "a@b",
        "a%b",
        "/a",
        "a/",
        "a//b",
        "./a",
        "../a",
        "a/../b",
        ".",
        "..",
        "\ud800",
    ],
)
def test_a_key_that_mlflow_refuses_is_refused_here(key: str) -> None:
    """With a sentence that shows it on one line."""
    with pytest.raises(InvalidEvent) as caught:
        checked_key(key, "metric")
    assert "bad_key" == caught.value.reason
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("key", [None, 5, b"a", ("a",), Rude()])
def test_a_key_that_is_no_string_is_refused_by_type(key: Any) -> None:
    """MLflow would store its repr."""
    with pytest.raises(EventRefused):
        checked_key(key, "param")


@pytest.mark.parametrize(("given", "expected"), [(Colour.RED, "red"), (np.str_("red"), "red")])
def test_a_key_of_a_kind_of_string_is_its_characters(given: str, expected: str) -> None:
    """Not the name of an enumeration's member; and plain, so that it can be encoded."""
    found = checked_key(given, "metric")
    assert (expected, str) == (found, type(found))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, 1.0),
        (True, 1.0),
        (-0.0, -0.0),
        (2**60, float(2**60)),
        (decimal.Decimal("0.5"), 0.5),
        (fractions.Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.float16(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(1), 1.0),
        (np.array(0.5), 0.5),
        (np.array([[0.5]]), 0.5),
        (np.ma.masked_array([0.5], [False]), 0.5),
        (Tensor(0.5), 0.5),
        (math.inf, math.inf),
        (-math.inf, -math.inf),
        (5e-324, 5e-324),
    ],
)
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
def test_a_scalar_of_any_kind_is_a_float(given: Any, expected: float) -> None:
    """Python's, NumPy's, a framework's."""
    found = checked_value("k", given)
    assert (expected, float) == (found, type(found))
    assert math.copysign(1, expected) == math.copysign(1, found)


def test_nan_is_a_value() -> None:
    """MLflow can hold it."""
    assert math.isnan(checked_value("k", math.nan))
    assert math.isnan(checked_value("k", np.float32("nan")))


@pytest.mark.parametrize(
    "value",
    ["0.5", b"1", bytearray(b"1"), None, 1j, [1.0], {}, object(), 10**400, np.array([1.0, 2.0]), np.array([]),
     np.array(["x"]), np.datetime64("2020-01-01"), dt.datetime.now(dt.timezone.utc), Tensor("x"), Tensor([1]), Rude()],
)  # fmt: skip
def test_what_is_no_single_number_is_refused(value: Any) -> None:
    """Whatever its methods raise."""
    with pytest.raises(EventRefused) as caught:
        checked_value("k", value)
    assert "bad_value" == caught.value.reason


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, 0),
        (0, 0),
        (-5, -5),
        (3.0, 3),
        (True, 1),
        (np.int32(7), 7),
        (np.uint64(7), 7),
        (np.float64(7), 7),
        (np.array(7), 7),
        (decimal.Decimal(3), 3),
        (INT64_MAX, INT64_MAX),
        (INT64_MIN, INT64_MIN),
    ],
)
def test_a_whole_step_is_an_int(given: Any, expected: int) -> None:
    """As MLflow holds it."""
    found = checked_step("k", given)
    assert (expected, int) == (found, type(found) if type(found) is not bool else int)


@pytest.mark.parametrize(
    "step", [3.5, "3", b"3", math.nan, math.inf, 2**63, -(2**63) - 1, float(2**63), 1e300, [1], Tensor(3.5), Rude()]
)
def test_a_step_that_is_not_whole_or_too_large_is_refused(step: Any) -> None:
    """F67: MLflow's server would take it and store something else."""
    with pytest.raises(InvalidEvent) as caught:
        checked_step("k", step)
    assert "bad_step" == caught.value.reason


UTC = dt.timezone.utc


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0, 0),
        (1_700_000_000_000, 1_700_000_000_000),
        (1_700_000_000_000.9, 1_700_000_000_000),
        (np.int64(5), 5),
        (INT64_MAX, INT64_MAX),
        (dt.datetime(2023, 11, 14, 22, 13, 20, 999_999, tzinfo=UTC), 1_700_000_000_999),
        (dt.datetime(2023, 11, 15, 0, 13, 20, tzinfo=dt.timezone(dt.timedelta(hours=2))), 1_700_000_000_000),
        (dt.datetime(1970, 1, 1, tzinfo=UTC), 0),
    ],
)
def test_a_time_is_milliseconds_since_the_epoch(given: Any, expected: int) -> None:
    """Rounded down; a datetime by its own zone."""
    assert expected == checked_time_ms("k", given)


def test_a_datetime_without_a_zone_is_local() -> None:
    """As everywhere in Python."""
    naive = dt.datetime(2023, 11, 14, 22, 13, 20)  # noqa: DTZ001 - the point
    assert int(naive.timestamp() * 1000) == checked_time_ms("k", naive)


@pytest.mark.parametrize(
    "time",
    [-1, 2**63, math.nan, math.inf, "now", None, dt.date(2020, 1, 1), dt.datetime(1969, 12, 31, tzinfo=UTC),
     dt.datetime.min, Rude()],  # noqa: DTZ901 - in local time it has no time stamp
)  # fmt: skip
def test_a_time_outside_mlflows_is_refused(time: Any) -> None:
    """The year 1 in local time too, which has no time stamp."""
    with pytest.raises(InvalidEvent) as caught:
        checked_time_ms("k", time)
    assert "bad_time" == caught.value.reason


@pytest.mark.parametrize(
    "moment",
    [
        pd.Timestamp(2024, 1, 1, 12),
        *(np.datetime64("2024-01-01T12:00", unit) for unit in ("h", "s", "ms", "us", "ns")),
        np.array(["2024-01-01T12:00"], "datetime64[ns]")[0],
    ],
)
def test_a_time_of_pandas_or_numpy_is_that_of_the_wall_clock(moment: Any) -> None:
    """Without a zone it is local, as a datetime is, in whatever unit it is counted."""
    assert checked_time_ms("k", dt.datetime(2024, 1, 1, 12).astimezone()) == checked_time_ms("k", moment)


@pytest.mark.parametrize("value", [np.datetime64("2024-01-01", "ns"), np.timedelta64(5, "s"), np.complex128(1 + 2j)])
def test_what_numpy_makes_a_number_of_that_it_is_not_is_refused(value: Any) -> None:
    """A time counts its units, whichever they are; a complex number loses a part."""
    for check in (checked_value, checked_step):
        with pytest.raises(InvalidEventType, match=r"'k' has the (value|step) "):
            check("k", value)


def test_a_refused_time_is_shown_as_it_was_given() -> None:
    """Not as what became of it."""
    with pytest.raises(InvalidEventType, match=r"is numpy\.datetime64|is np\.datetime64"):
        checked_time_ms("k", np.datetime64("NaT"))


def test_pandas_not_a_time_is_refused() -> None:
    """It says of itself that it is a datetime."""
    pandas = pytest.importorskip("pandas")
    with pytest.raises(InvalidEvent):
        checked_time_ms("k", pandas.NaT)
    assert 1_700_000_000_000 == checked_time_ms("k", pandas.Timestamp("2023-11-14T22:13:20Z"))


@pytest.mark.parametrize(("time", "expected"), [(1.7e9, True), (1_700_000_000, False), (1.7e12, False), (5.0, False)])
def test_seconds_are_suspected_where_milliseconds_are_meant(time: Any, expected: bool) -> None:
    """``time.time()`` is the usual mistake."""
    assert expected == looks_like_seconds(time)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("x", "x"),
        ("", ""),
        (None, "None"),
        (0.1, "0.1"),
        (True, "True"),
        ([1], "[1]"),
        (np.str_("x"), "x"),
        ("é\0", "é\0"),
    ],
)
def test_a_param_is_its_text(given: Any, expected: str) -> None:
    """As MLflow makes it: str(value); plain, so that it can be encoded."""
    found = checked_text("k", given, "param")
    assert (expected, str) == (found, type(found))


def test_a_text_that_is_a_kind_of_string_is_made_plain() -> None:
    """``__str__`` may return a subclass, which the encoder does not take."""

    class Text(str):
        __slots__ = ()

        def __str__(self) -> str:
            return self

    assert str is type(checked_text("k", Text("x"), "tag"))
    assert Tags({"k": "x"}, 1) == decode(encode(Tags({"k": checked_text("k", Text("x"), "tag")}, 1)))


@pytest.mark.parametrize("value", ["\ud800", Rude()])
def test_a_value_without_text_is_refused(value: Any) -> None:
    """Lone surrogates cannot be stored, and some objects cannot be shown."""
    with pytest.raises(EventRefused) as caught:
        checked_text("k", value, "tag")
    assert "bad_value" == caught.value.reason


@pytest.mark.parametrize(("given", "expected"), [("FINISHED", "FINISHED"), ("failed", "FAILED")])
def test_a_status_is_one_of_mlflows(given: Any, expected: str) -> None:
    """In any case of letters, and MLflow's own enumeration."""
    assert expected == checked_status(given)
    assert expected == checked_status(enum.Enum("RunStatus", [expected])[expected])


@pytest.mark.parametrize("status", ["DONE", "", None, 3, "FINISHED "])
def test_any_other_status_is_refused(status: Any) -> None:
    """The message lists what there is."""
    with pytest.raises(InvalidEvent, match="FINISHED"):
        checked_status(status)


@pytest.mark.parametrize("values", [None, 5, "ab", [1], Rude()])
def test_what_is_no_mapping_is_refused(values: Any) -> None:
    """With the name of the call."""
    with pytest.raises(InvalidEventType, match="log_params"):
        checked_mapping(values, "log_params")


@pytest.mark.parametrize(
    "check",
    [
        lambda value: checked_value("loss", value),
        lambda value: checked_step("loss", value),
        lambda value: checked_time_ms("loss", value),
        lambda value: checked_text("loss", value, "param"),
        lambda value: checked_mapping(value, "log_params"),
    ],
    ids=["value", "step", "time", "text", "mapping"],
)
@pytest.mark.parametrize(
    ("error", "words"),
    [(MemoryError(), "MemoryError"), (OSError("disk\ngone"), "OSError: disk gone"), (Mute(), "Mute")],
)
def test_a_refusal_names_what_the_object_raised(check: Any, error: Exception, words: str) -> None:
    """What the conversion of a user's object ended with is in the one sentence that is said."""

    class Failing:
        def __float__(self) -> float:
            raise error

        __index__ = __str__ = __iter__ = __float__  # type: ignore[assignment]  # it never returns

    with pytest.raises(InvalidEventType) as caught:
        check(Failing())
    assert words in str(caught.value)
