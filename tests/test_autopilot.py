"""What sessions hand over becomes what the tracker logs: names, values, times, artifacts, and what was unreadable."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_outbox import autopilot
from mlflow_outbox.autopilot import RunContent, of_experiment, of_profile, of_summary
from sessions import (
    NOON_MS,
    PROFILE,
    RESULT,
    SHAPES,
    STATE,
    Angry,
    Level,
    Scaling,
    nests,
    strict,
    throw,
    without,
)

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


async def forgotten() -> dict[str, Any]:
    """Return a result to whoever awaits it."""
    return RESULT


@pytest.mark.parametrize("thing", [None, "{}", 5, [RESULT, RESULT], dict, forgotten, (n for n in ())])
def test_what_has_no_fields_is_no_success(thing: Any) -> None:
    """A run of nothing would say that an experiment succeeded."""
    for read in (of_profile, of_experiment, of_summary):
        with pytest.raises(TypeError, match=f"it is a {type(thing).__name__}; give an object"):
            read(thing)


def test_a_result_that_nobody_awaited_is_no_success() -> None:
    """It is a coroutine, which has no fields."""
    result = forgotten()
    with pytest.raises(TypeError, match="coroutine"):
        of_experiment(result)
    result.close()


def test_fields_of_another_kind_are_taken_as_they_are_meant_or_listed() -> None:
    """Pairs are a mapping, a number is a sum; neither vanishes, nor becomes another number."""
    content = of_experiment(RESULT | {"metrics": [("f1", 0.9)], "model_params": [("depth", 3)]})
    assert (0.9, "3") == (content.metrics["f1"], content.params["model_depth"])
    assert [] == content.refused
    content = of_experiment(RESULT | {"metrics": [0.9], "model_params": 5})
    assert ["metrics", "model_params"] == sorted(what for what, _ in content.refused)
    for counts, total in ((7, 7), (np.int64(7), 7), ({"a": 3, "b": 4}, 7), ([("a", 3)], 3), ({}, 0)):
        assert {"total_missing_values": total} == of_profile({"missing_values": counts}).metrics
    content = of_profile({"missing_values": [1, 2, 3]})
    assert ({}, ["missing_values"]) == (content.metrics, [what for what, _ in content.refused])


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
            return self.scores  # type: ignore[attr-defined]  # it is missing: that is the mistake

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


def test_an_empty_text_is_no_best_experiment_and_no_reason() -> None:
    """Sessions begin with one; a tag without a text says nothing."""
    content = of_summary({"best_experiment": "", "termination_reason": ""})
    assert {"best_experiment": "none", "termination_reason": "completed"} == content.tags


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


@given(st.dictionaries(st.sampled_from([*PROFILE, *RESULT, *STATE]), nests))
def test_no_object_makes_a_function_raise(fields: dict[str, Any]) -> None:
    """Any values in any field give a run, with text for text."""
    for function in (of_profile, of_experiment, of_summary):
        content = function(types.SimpleNamespace(**fields))
        assert content.run_name
        for text in (*content.tags.values(), *content.texts.values(), *content.params.values()):
            assert isinstance(text, str)
            text.encode()
