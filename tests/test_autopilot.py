"""What sessions hand over becomes what the tracker logs: names, values, times, artifacts, and what was unreadable."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import importlib.util
import json
import math
import sys
import types
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_outbox import autopilot, jsontext
from mlflow_outbox.autopilot import RunContent, of_experiment, of_profile, of_summary, time_ms
from mlflow_outbox.jsontext import json_text

UTC = dt.timezone.utc
NOON = dt.datetime(2024, 5, 1, 12, 0, 0, 250_000, tzinfo=UTC)
NOON_MS = 1_714_564_800_250

PROFILE: dict[str, Any] = {
    "n_rows": 442,
    "n_columns": 11,
    "columns": ["age", "sex", "bmi", "target"],
    "numeric_columns": ["age", "bmi", "target"],
    "categorical_columns": ["sex"],
    "column_types": {"age": "float64", "sex": "category"},
    "target_column": "target",
    "target_type": "numeric",
    "missing_values": {"age": 3, "sex": 0, "bmi": 4},
    "numeric_stats": {"age": {"mean": 0.5, "std": math.nan, "max": math.inf}},
}

RESULT: dict[str, Any] = {
    "experiment_name": "forest_3",
    "iteration": 3,
    "model_type": "RandomForestRegressor",
    "model_params": {"n_estimators": 200, "max_depth": None, "criterion": "squared_error"},
    "preprocessing": {
        "missing_values": "median",
        "scaling": "standard",
        "encoding": "onehot",
        "target_transform": "log",
    },
    "metrics": {"rmse": 54.25, "r2": 0.5},
    "hypothesis": "More trees help",
    "reasoning": "The forest of iteration 2 was too small.",
    "execution_time": 45.25,
    "success": True,
    "error_message": None,
    "code_path": "/session/forest_3.py",
    "model_path": "/session/forest_3.joblib",
    "timestamp": NOON,
}

STATE: dict[str, Any] = {
    "session_id": "abc",
    "experiments": [RESULT, {**RESULT, "success": False}],
    "current_iteration": 2,
    "phase": "done",
    "best_metric": 54.25,
    "best_experiment": "forest_3",
    "termination_reason": "max iterations",
    "start_time": NOON,
    "end_time": NOON + dt.timedelta(seconds=90),
}


class Scaling(enum.Enum):
    """A choice as sessions keep it."""

    STANDARD = "standard"


class Level(enum.IntEnum):
    """An enum that is a number, too."""

    HIGH = 3


def throw(error: Exception) -> Any:
    """Fail as code of a session's class may."""
    raise error


class Angry:
    """An object that has no text."""

    def __str__(self) -> str:
        return str(throw(ValueError("no text here")))

    def __repr__(self) -> str:
        return "Angry()"


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """Leave out fields."""
    return {name: value for name, value in fields.items() if name not in names}


def strict(text: str) -> Any:
    """Parse JSON that has neither NaN nor Infinity."""
    return json.loads(text, parse_constant=lambda constant: throw(AssertionError(f"{constant} is not JSON")))


def nested_dataclass(fields: dict[str, Any]) -> Any:
    """A dataclass that holds a plain object."""
    kind = dataclasses.make_dataclass("Result", list(fields))
    inner = fields.get("preprocessing")
    return kind(**{**fields, **({"preprocessing": types.SimpleNamespace(**inner)} if inner else {})})


def named_tuple(fields: dict[str, Any]) -> Any:
    """A named tuple."""
    return collections.namedtuple("Result", list(fields))(**fields)  # noqa: PYI024 - made from a table


def pydantic_model(fields: dict[str, Any]) -> Any:
    """A pydantic model."""
    kind = pydantic.create_model("Result", __config__={"protected_namespaces": ()}, **dict.fromkeys(fields, (Any, ...)))
    return kind(**fields)


def msgspec_struct(fields: dict[str, Any]) -> Any:
    """A msgspec struct."""
    return msgspec.defstruct("Result", list(fields))(**fields)


def plain_object(fields: dict[str, Any]) -> Any:
    """An object with attributes."""
    thing = type("Result", (), {})()
    vars(thing).update(fields)
    return thing


def slotted_object(fields: dict[str, Any]) -> Any:
    """An object with slots."""
    thing = type("Result", (), {"__slots__": list(fields)})()
    for name, value in fields.items():
        setattr(thing, name, value)
    return thing


SHAPES = [dict, types.MappingProxyType, nested_dataclass, named_tuple, pydantic_model, msgspec_struct]
SHAPES += [plain_object, slotted_object, lambda fields: types.SimpleNamespace(**fields)]
if importlib.util.find_spec("attrs"):  # comes with some versions of MLflow
    import attrs

    def attrs_object(fields: dict[str, Any]) -> Any:
        """An attrs class with slots."""
        return attrs.make_class("Result", list(fields), slots=True)(**fields)

    SHAPES.append(attrs_object)
if sys.version_info < (3, 14):  # pydantic's version 1 ends there
    import pydantic.v1

    def pydantic_v1_model(fields: dict[str, Any]) -> Any:
        """Make a model of pydantic's version 1."""
        return pydantic.v1.create_model("Result", **dict.fromkeys(fields, (Any, ...)))(**fields)

    SHAPES.append(pydantic_v1_model)

any_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: getattr(shape, "__name__", "?").strip("<>"))


@any_shape
def test_a_profile_is_read_from_any_shape(shape: Any) -> None:
    """Params, the sum of missing values and the whole profile as JSON, whatever class holds them."""
    content = of_profile(shape(PROFILE))
    assert content.run_name == "data_profile"
    params = {
        "n_rows": "442",
        "n_columns": "11",
        "n_numeric_features": "3",
        "n_categorical_features": "1",
        "target_column": "target",
        "target_type": "numeric",
    }
    assert params == content.params
    assert {"total_missing_values": 7} == content.metrics
    assert ({}, [], []) == (content.tags, content.files, content.refused)
    assert ("FINISHED", None, None) == (content.status, content.start_time_ms, content.end_time_ms)
    document = strict(content.texts["data_profile.json"])
    assert list(PROFILE) == list(document)
    assert {"mean": 0.5, "std": None, "max": None} == document["numeric_stats"]["age"]


@any_shape
def test_a_successful_experiment_is_read_from_any_shape(shape: Any) -> None:
    """A run of the experiment's name with its params, metrics, tags, code and reasoning."""
    content = of_experiment(shape(RESULT))
    expected = RunContent(
        run_name="forest_3",
        params={
            "model_type": "RandomForestRegressor",
            "iteration": "3",
            "model_n_estimators": "200",
            "model_max_depth": "None",
            "model_criterion": "squared_error",
            "preprocessing_missing": "median",
            "preprocessing_scaling": "standard",
            "preprocessing_encoding": "onehot",
        },
        metrics={"rmse": 54.25, "r2": 0.5, "execution_time": 45.25, "success": 1},
        tags={"hypothesis": "More trees help", "success": "True"},
        texts={"reasoning.txt": "The forest of iteration 2 was too small."},
        files=[("/session/forest_3.py", None)],
        status="FINISHED",
        start_time_ms=NOON_MS - 45_250,
        end_time_ms=NOON_MS,
    )
    assert expected == content


@any_shape
def test_a_state_is_read_from_any_shape(shape: Any) -> None:
    """Counts, times and the whole state as JSON, with results of another shape nested in it."""
    content = of_summary(shape({**STATE, "experiments": [shape(one) for one in STATE["experiments"]]}))
    assert "final_summary" == content.run_name
    metrics = {"total_iterations": 2, "successful_experiments": 1, "total_time_seconds": 90.0, "best_metric": 54.25}
    assert metrics == content.metrics
    assert {"best_experiment": "forest_3", "termination_reason": "max iterations", "phase": "done"} == content.tags
    assert [] == content.refused
    document = strict(content.texts["final_state.json"])
    assert list(STATE) == list(document)
    assert ["forest_3", "forest_3"] == [one["experiment_name"] for one in document["experiments"]]


def test_a_failed_experiment_ends_failed_without_metrics() -> None:
    """Its metrics are not logged, its error message is, and success is 0."""
    content = of_experiment({**RESULT, "success": False, "error_message": "ValueError: max_depth=-3"})
    assert "FAILED" == content.status
    assert {"execution_time": 45.25, "success": 0} == content.metrics
    assert "False" == content.tags["success"]
    assert "ValueError: max_depth=-3" == content.texts["error.txt"]
    assert [("/session/forest_3.py", None)] == content.files


def test_nothing_at_all_still_makes_runs() -> None:
    """Missing fields are not logged; only what the rules always log is there."""
    assert RunContent("data_profile", texts={"data_profile.json": "{}"}) == of_profile({})
    assert RunContent("experiment", metrics={"success": 1}, tags={"success": "True"}) == of_experiment({})
    summary = RunContent(
        "final_summary",
        tags={"best_experiment": "none", "termination_reason": "completed"},
        texts={"final_state.json": "{}"},
    )
    assert summary == of_summary({})
    assert summary.tags == of_summary(types.SimpleNamespace()).tags
    assert "experiment_7" == of_experiment({"iteration": 7}).run_name
    assert [] == of_experiment(None).refused


@pytest.mark.parametrize("missing", sorted(RESULT))
def test_one_missing_field_costs_only_itself(missing: str) -> None:
    """Everything else of a result is logged as before."""
    whole, content = of_experiment(RESULT), of_experiment(without(RESULT, missing))
    assert [] == content.refused
    assert content.params.items() <= whole.params.items()
    lost = (set(whole.params) - set(content.params)) | (set(whole.metrics) - set(content.metrics))
    lost |= (set(whole.tags) - set(content.tags)) | (set(whole.texts) - set(content.texts))
    expected = {
        "iteration": {"iteration"},
        "model_type": {"model_type"},
        "model_params": {"model_n_estimators", "model_max_depth", "model_criterion"},
        "preprocessing": {"preprocessing_missing", "preprocessing_scaling", "preprocessing_encoding"},
        "metrics": {"rmse", "r2"},
        "hypothesis": {"hypothesis"},
        "reasoning": {"reasoning.txt"},
        "execution_time": {"execution_time"},
    }
    assert expected.get(missing, set()) == lost


@pytest.mark.parametrize("broken", sorted(without(RESULT, "model_path")))
def test_one_unreadable_field_costs_only_itself(broken: str) -> None:
    """A property that raises is listed with its reason, and the rest is what it is without the field."""

    def fail(self: Any) -> Any:
        return throw(OSError("disk gone"))

    thing = type("Result", (), {broken: property(fail)})()
    vars(thing).update(without(RESULT, broken))
    content = of_experiment(thing)
    assert [(broken, "OSError: disk gone")] == content.refused
    assert dataclasses.replace(content, refused=[]) == of_experiment(without(RESULT, broken))


def test_a_property_that_raises_attribute_error_is_unreadable_not_missing() -> None:
    """The mistake inside the property is listed."""

    class Result:
        @property
        def metrics(self) -> Any:
            return self.scores  # type: ignore[attr-defined]

    ((what, reason),) = of_experiment(Result()).refused
    assert "metrics" == what
    assert reason.startswith("AttributeError: ")


def test_an_unreadable_tag_is_not_replaced_by_its_default() -> None:
    """The word none would be wrong when the best experiment cannot be read."""

    class State:
        @property
        def best_experiment(self) -> Any:
            return throw(RuntimeError("broken"))

    content = of_summary(State())
    assert {"termination_reason": "completed"} == content.tags
    assert ("best_experiment", "RuntimeError: broken") in content.refused


def test_unprintable_params_are_listed_and_the_others_logged() -> None:
    """One bad model param does not lose its neighbours."""
    content = of_experiment({**RESULT, "model_params": {"a": Angry(), "b": 2}})
    assert [("model_params.a", "ValueError: no text here")] == content.refused
    assert "2" == content.params["model_b"]
    assert "model_a" not in content.params


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (True, "True"),
        (0.1, "0.1"),
        (np.float64(0.1), "0.1"),
        (np.int32(5), "5"),
        ([1, 2], "[1, 2]"),
        ({"a": 1}, "{'a': 1}"),
        (Scaling.STANDARD, "standard"),
        (Level.HIGH, "3"),
        (Path("/a/b"), "/a/b"),
        ("half \ud83d", "half \\ud83d"),
    ],
    ids=repr,
)
def test_model_params_become_text_as_mlflow_writes_it(value: object, text: str) -> None:
    """str(value), an enum's value, and nothing that UTF-8 cannot hold."""
    assert text == of_experiment({"model_params": {"p": value}}).params["model_p"]


def test_a_model_param_never_replaces_the_model_type() -> None:
    """A hyperparameter called "type" is listed, because model_type has its name."""
    content = of_experiment({"model_type": "SVR", "model_params": {"type": "nu"}})
    assert {"model_type": "SVR"} == content.params
    assert ["model_params.type"] == [what for what, _ in content.refused]


def test_model_params_of_an_object_leave_out_unreadable_ones() -> None:
    """A settings object with a failing field gives the others, and no "None" for that one."""

    class Params:
        __slots__ = ("depth", "never_set")

        def __init__(self) -> None:
            self.depth = 3

    content = of_experiment({"model_params": Params()})
    assert {"model_depth": "3"} == content.params
    assert ["model_params.never_set"] == [what for what, _ in content.refused]


def test_preprocessing_enums_are_logged_by_value() -> None:
    """The value, not the name of the class."""
    content = of_experiment({"preprocessing": types.SimpleNamespace(scaling=Scaling.STANDARD)})
    assert {"preprocessing_scaling": "standard"} == content.params


def test_metric_values_are_passed_on_as_they_are() -> None:
    """What is no number is refused by the Run, under the metric's own name; None is no value."""
    odd = {"rmse": np.float32(1.5), "note": "high", "nan": math.nan, "none": None}
    metrics = of_experiment({"success": True, "metrics": odd}).metrics
    assert isinstance(metrics["rmse"], np.float32)
    assert "high" == metrics["note"]
    assert "none" not in metrics


def test_execution_time_and_success_win_over_metrics_of_that_name() -> None:
    """The result's own fields are what the rules name."""
    content = of_experiment({"metrics": {"success": 0.2, "execution_time": 1}, "execution_time": 9.0, "success": True})
    assert {"success": 1, "execution_time": 9.0} == content.metrics


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"success": np.True_}, True),
        ({"success": np.False_}, False),
        ({"success": 1}, True),
        ({"success": "False"}, False),
        ({"success": "true"}, True),
        ({}, True),
        ({"error_message": ""}, True),
        ({"error_message": "boom"}, False),
        ({"success": np.array([1, 0]), "error_message": "boom"}, False),
    ],
    ids=repr,
)
def test_success_is_read_from_any_bool(fields: dict[str, Any], expected: bool) -> None:
    """NumPy's, a number, the word; without any, whether there is no error message."""
    content = of_experiment(fields)
    assert (expected, int(expected)) == (content.status == "FINISHED", content.metrics["success"])
    assert str(expected) == content.tags["success"]


def test_a_hypothesis_is_cut_at_250_characters() -> None:
    """The tag shows the first 250 characters."""
    assert "é" * 250 == of_experiment({"hypothesis": "é" * 251}).tags["hypothesis"]


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


def test_durations_may_be_timedeltas() -> None:
    """An execution time and an elapsed time given as timedelta are seconds."""
    content = of_experiment({**RESULT, "execution_time": dt.timedelta(seconds=2.5)})
    assert 2.5 == content.metrics["execution_time"]
    assert NOON_MS - 2500 == content.start_time_ms
    state = types.SimpleNamespace(get_elapsed_time=lambda: dt.timedelta(minutes=1))
    assert 60.0 == of_summary(state).metrics["total_time_seconds"]


def test_the_states_own_clock_comes_first_and_its_failure_is_listed() -> None:
    """get_elapsed_time() is used, else end less start."""
    state = types.SimpleNamespace(**STATE, get_elapsed_time=lambda: 77.5)
    assert 77.5 == of_summary(state).metrics["total_time_seconds"]

    state.get_elapsed_time = lambda: throw(RuntimeError("no clock"))
    content = of_summary(state)
    assert 90.0 == content.metrics["total_time_seconds"]
    assert ("get_elapsed_time", "RuntimeError: no clock") in content.refused
    assert "total_time_seconds" not in of_summary(without(STATE, "end_time")).metrics


def test_best_metric_and_phase_take_their_forms() -> None:
    """No best metric, no metric; the phase's value; the name of a best experiment kept as a whole result."""
    content = of_summary({**STATE, "best_metric": None, "phase": Scaling.STANDARD, "best_experiment": RESULT})
    assert "best_metric" not in content.metrics
    assert ("standard", "forest_3") == (content.tags["phase"], content.tags["best_experiment"])


@pytest.mark.parametrize(
    ("counts", "total"),
    [
        ({}, 0),
        ({"a": np.int64(2), "b": 3}, 5),
        (pd.Series({"a": 2, "b": 3}), 5),
    ],
    ids=["empty", "numpy", "series"],
)
def test_missing_values_are_summed(counts: object, total: int) -> None:
    """Over a dict or what isna().sum() returns."""
    content = of_profile({"missing_values": counts})
    assert {"total_missing_values": total} == content.metrics
    assert type(content.metrics["total_missing_values"]) is int


def test_missing_values_that_are_no_counts_are_listed() -> None:
    """They cost the metric, not the profile."""
    content = of_profile({"n_rows": 3, "missing_values": {"a": "many"}})
    assert ({"n_rows": "3"}, {}) == (content.params, content.metrics)
    assert ["missing_values"] == [what for what, _ in content.refused]


class Point(NamedTuple):
    """A named tuple."""

    x: int
    y: float


@dataclasses.dataclass
class Unit:
    """A dataclass."""

    name: str


class Bare:
    """A class that declares nothing."""

    def __init__(self) -> None:
        self.shown, self._hidden = 1, 2


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


def test_pydantic_models_serialise_themselves() -> None:
    """model_dump_json() writes what the model says, an alias or a computed field for instance."""

    class Profile(pydantic.BaseModel):
        n_rows: int
        ratio: float = math.inf

        @pydantic.computed_field  # type: ignore[prop-decorator]
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


def test_the_list_of_refusals_is_bounded_and_counts_the_rest() -> None:
    """Fifty reasons, then a number."""
    refused = of_experiment({"model_params": {f"p{i}": Angry() for i in range(60)}}).refused
    assert 51 == len(refused)
    assert ("...", "10 more") == refused[-1]


def test_an_exception_without_words_is_listed_by_its_class() -> None:
    """Even when its own text fails."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    class Result:
        @property
        def metrics(self) -> Any:
            raise Mute

    assert [("metrics", "Mute")] == of_experiment(Result()).refused


def test_keyboard_interrupt_is_not_swallowed() -> None:
    """The user's Ctrl-C inside a property still ends the program."""

    class Result:
        @property
        def metrics(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        of_experiment(Result())


def test_no_heavy_library_is_imported() -> None:
    """The module costs the training process nothing but itself."""
    import subprocess

    code = (
        "import sys, mlflow_outbox.autopilot as a; a.of_summary({'experiments': [{}]}); "
        "print([m for m in ('mlflow', 'numpy', 'pandas', 'pydantic', 'diskcache') if m in sys.modules])"
    )
    root = str(Path(autopilot.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": root}, capture_output=True, text=True, check=True
    )
    assert "[]" == done.stdout.strip()


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary(max_size=8)
    | st.datetimes()
    | st.decimals()
    | st.sampled_from([np.float64("nan"), pd.NaT, Scaling.STANDARD, Point(1, math.inf), object, Angry()])
)
keys = st.text(st.characters()) | st.integers() | st.none() | st.floats() | st.tuples(st.integers()) | st.dates()
nests = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4)
        | st.tuples(inner, inner)
        | st.builds(types.SimpleNamespace, a=inner)
        | st.builds(Unit, inner)
    ),
    max_leaves=20,
)


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


@given(st.dictionaries(st.sampled_from([*PROFILE, *RESULT, *STATE]), nests))
def test_no_object_makes_a_function_raise(fields: dict[str, Any]) -> None:
    """Any values in any field give a run, with text for text."""
    for function in (of_profile, of_experiment, of_summary):
        content = function(types.SimpleNamespace(**fields))
        assert content.run_name
        for text in (*content.tags.values(), *content.texts.values(), *content.params.values()):
            assert isinstance(text, str)
            text.encode()
