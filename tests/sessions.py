"""What autopilot sessions hand over: profiles, results and states, in every shape, and what may be nested in them."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import enum
import importlib.util
import json
import math
import sys
import types
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd
import pydantic
from hypothesis import strategies as st

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
