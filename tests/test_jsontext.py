"""Any object as strict JSON: what each kind of value becomes, serialisers, and bounds."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import json
import math
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_outbox import jsontext
from mlflow_outbox.autopilot import of_profile
from mlflow_outbox.jsontext import Reader, json_text
from sessions import (
    NOON,
    Angry,
    Bare,
    Level,
    Point,
    Scaling,
    Unit,
    nests,
    pydantic_model,
    strict,
    throw,
)


class Model(pydantic.BaseModel):
    """A pydantic model with a NaN."""

    when: dt.datetime = NOON
    score: float = math.nan


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (-math.inf, None),
        (np.float64(2.5), 2.5),
        (np.float32("nan"), None),
        (np.int8(3), 3),
        (np.True_, True),
        (np.str_("a"), "a"),
        (np.array([[1.0, np.nan], [np.inf, 2.0]]), [[1.0, None], [None, 2.0]]),
        (np.array(3.5), 3.5),
        (np.dtype("float64"), "float64"),
        (np.datetime64("2024-05-01T12:00:00", "ns"), "2024-05-01T12:00:00.000000000"),
        (np.array(["2024-05-01", "NaT"], "datetime64[D]"), ["2024-05-01", None]),
        (pd.Timestamp("2024-05-01T12:00:00"), "2024-05-01T12:00:00"),
        (pd.NaT, None),
        (pd.NA, None),
        (pd.Series({"a": 1.5, "b": math.nan}), {"a": 1.5, "b": None}),
        (pd.DataFrame({"a": [1, 2]}), {"a": {"0": 1, "1": 2}}),
        (pd.Index(["a", "b"]), ["a", "b"]),
        (NOON, "2024-05-01T12:00:00.250000+00:00"),
        (NOON.date(), "2024-05-01"),
        (dt.timedelta(minutes=1), 60.0),
        (decimal.Decimal("0.10"), "0.10"),
        (decimal.Decimal("NaN"), None),
        (Scaling.STANDARD, "standard"),
        (Level.HIGH, 3),
        (PurePosixPath("/a/b"), "/a/b"),
        ({"b", "a"}, ["a", "b"]),
        (frozenset({2}), [2]),
        ((1, 2), [1, 2]),
        (range(2), [0, 1]),
        (collections.deque([1]), [1]),
        ({"a": 1}.values(), [1]),
        (b"caf\xc3\xa9 \xff", "café \\xff"),
        (Point(1, math.nan), {"x": 1, "y": None}),
        (Unit("cm"), {"name": "cm"}),
        (Model(), {"when": "2024-05-01T12:00:00.250000Z", "score": None}),
        (Bare(), {"shown": 1}),
        (float, "float"),
        (complex(1, 2), "(1+2j)"),
        (10**5000, hex(10**5000)),
        ({2: "a", None: "b", True: "c"}, {"2": "a", "null": "b", "true": "c"}),
        ({Scaling.STANDARD: 1, NOON.date(): 2, (1, 2): 3}, {"standard": 1, "2024-05-01": 2, "(1, 2)": 3}),
        ("half \ud83d", "half \ud83d"),
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_values_become_plain_json(value: object, expected: object) -> None:
    """NaN and infinities are null; numbers, times, names and containers of all libraries are what they mean."""
    text = json_text({"value": value})
    assert {"value": expected} == strict(text)
    text.encode()


def test_json_is_indented_keeps_the_order_of_keys_and_shows_letters() -> None:
    """Two spaces, as inserted, UTF-8."""
    assert '{\n  "z": [\n    1\n  ],\n  "a": "é"\n}' == json_text({"z": [1], "a": "é"})


def test_two_keys_of_one_name_keep_the_first_and_are_listed() -> None:
    """1 and "1" are one key in JSON."""
    content = of_profile({"numeric_stats": {1: "a", "1": "b"}})
    assert {"numeric_stats": {"1": "a"}} == strict(content.texts["data_profile.json"])
    assert ["data_profile.json.numeric_stats.1"] == [what for what, _ in content.refused]


def test_a_series_of_polars_is_a_list() -> None:
    """It has no ``tolist``, and an ``item`` that raises unless there is one value."""

    class Series:
        def to_list(self) -> list[int]:
            return [1, 2]

        def item(self) -> Any:
            return throw(ValueError("can only call '.item()' if the Series is of length 1"))

    assert {"value": [1, 2]} == strict(json_text({"value": Series()}))


@dataclasses.dataclass
class WithSerialiser:
    """A class with a serialiser of its own."""

    n_rows: int = 3
    answer: Any = None

    def to_json(self) -> Any:
        """Return what the test says."""
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"own": NaN, "inf": [-Infinity, 1e999]}', {"own": None, "inf": [None, None]}),
        (b'{"own": 1}', {"own": 1}),
        ({"own": math.nan}, {"own": None}),
    ],
    ids=["text with NaN", "bytes", "dict"],
)
def test_the_objects_own_serialiser_is_used_and_made_strict(answer: object, expected: object) -> None:
    """Also when it printed NaN and Infinity, or returned something already parsed."""
    content = of_profile(WithSerialiser(answer=answer))
    assert expected == strict(content.texts["data_profile.json"])
    assert [] == content.refused


@pytest.mark.parametrize("answer", [RuntimeError("broken"), "no json", None, 5], ids=repr)
def test_a_serialiser_that_fails_falls_back_to_the_fields(answer: object) -> None:
    """The failure is listed."""
    content = of_profile(WithSerialiser(answer=answer))
    assert 3 == strict(content.texts["data_profile.json"])["n_rows"]
    assert ["data_profile.json: to_json()"] == [what for what, _ in content.refused]


def test_numbers_and_times_of_pandas_lose_nothing() -> None:
    """Its own JSON has ten digits, and times in milliseconds."""
    values = {"tiny": 1e-12, "third": 1 / 3}
    frame = pd.DataFrame({"x": [1e-12, 1 / 3], "t": pd.to_datetime(["2024-01-01T12:00", None])})
    assert values == json.loads(json_text(pd.Series(values)))
    expected = {"x": {"0": 1e-12, "1": 1 / 3}, "t": {"0": "2024-01-01T12:00:00", "1": None}}
    assert expected == json.loads(json_text(frame))


def test_pydantic_models_serialise_themselves() -> None:
    """model_dump_json() writes what the model says, an alias or a computed field for instance."""

    class Profile(pydantic.BaseModel):
        n_rows: int
        ratio: float = math.inf

        @pydantic.computed_field  # type: ignore[prop-decorator]  # pydantic's way
        @property
        def doubled(self) -> int:
            return 2 * self.n_rows

    content = of_profile(Profile(n_rows=4))
    assert {"n_rows": 4, "ratio": None, "doubled": 8} == strict(content.texts["data_profile.json"])


def test_a_pydantic_model_that_cannot_serialise_itself_gives_its_fields() -> None:
    """Any object may sit in a field of type Any."""
    content = of_profile(pydantic_model({"n_rows": 4, "numeric_stats": {"estimator": Bare()}}))
    assert {"n_rows": 4, "numeric_stats": {"estimator": {"shown": 1}}} == strict(content.texts["data_profile.json"])
    assert ["data_profile.json: model_dump_json()"] == [what for what, _ in content.refused]


def test_an_unreadable_value_inside_is_null_and_listed() -> None:
    """The rest of the document is whole."""

    class Broken(dict[str, int]):
        def items(self) -> Any:
            return throw(RuntimeError("no items"))

    content = of_profile({"a": Broken(), "b": Angry(), "n_rows": 1})
    assert {"a": None, "b": None, "n_rows": 1} == strict(content.texts["data_profile.json"])
    assert {"data_profile.json.a", "data_profile.json.b"} == {what for what, _ in content.refused}


def test_cycles_depth_and_size_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A marker stands where something was left out, and each is listed."""
    monkeypatch.setattr(jsontext, "MAX_VALUES", 500)
    ring: list[Any] = []
    ring.append(ring)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    shared: list[Any] = [1]
    for _ in range(40):
        shared = [shared, shared]
    content = of_profile({"ring": ring, "deep": deep, "shared": shared, "n_rows": 1, "more": {"a": 1}})
    text = content.texts["data_profile.json"]
    document = strict(text)
    assert ["<contains itself>"] == document["ring"]
    assert "<nested too deep>" in text
    assert (1, "<left out>") == (document["n_rows"], document["more"])
    assert ["ring", "deep", "shared"] == [what.rpartition(".")[2] for what, _ in content.refused]


class Column:
    """A series of Polars: it has a shape, and no size."""

    dtype = "Float64"

    def __init__(self, length: int) -> None:
        self.shape = (length,)

    def to_list(self) -> list[float]:
        """Return its values."""
        return [0.0] * self.shape[0]


class Table:
    """A table of Polars."""

    dtypes = ("Float64",) * 10
    shape = (51, 10)

    def to_dict(self) -> dict[str, Column]:
        """Return its columns."""
        return {f"c{number}": Column(51) for number in range(10)}


@pytest.mark.parametrize(
    "large",
    [
        *(Column(501), Table()),
        *(np.zeros((10, 51)), np.zeros((51, 10)), pd.DataFrame(np.zeros((51, 10)))),
        *(pd.Series(np.zeros(501)), pd.RangeIndex(501), range(10**12)),
    ],
    ids=lambda large: type(large).__name__,
)
def test_the_data_set_itself_is_left_out_of_what_describes_it(large: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile that keeps it would take the experiment's memory and seconds; whoever logs it as a document gets it."""
    monkeypatch.setattr(jsontext, "MAX_VALUES", 500)
    content = of_profile({"data": large, "more": {"a": np.zeros(20)}})
    assert {"data": "<left out>", "more": {"a": [0.0] * 20}} == strict(content.texts["data_profile.json"])
    assert [f"a {type(large).__name__} of more than 500 values was left out"] == [why for _, why in content.refused]
    if not isinstance(large, range):
        text = Reader().json_text({"data": large}, "document", whole=True)
        assert text is not None
        assert "<left out>" not in text


@given(nests)
def test_any_nest_is_written_as_strict_json(nest: Any) -> None:
    """Whatever a session nests, the artifact can be read by any JSON parser."""
    text = json_text(nest)
    strict(text)
    text.encode()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_plain_json_comes_back_as_it_was(document: Any) -> None:
    """Strict JSON loses nothing on the way."""
    assert document == strict(json_text(document))
