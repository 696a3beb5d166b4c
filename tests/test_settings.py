"""The options: defaults, the environment, and what is refused."""

from __future__ import annotations

import dataclasses
import re
import threading
from pathlib import Path
from typing import Any

import pytest

import mlflow_outbox.settings
from mlflow_outbox.errors import InvalidSettings
from mlflow_outbox.settings import Settings

NAMES = [field.name for field in dataclasses.fields(Settings)]
NUMBERS = [name for name in NAMES if type(getattr(Settings, name)) in {int, float}]


def test_code_wins_over_the_environment_which_wins_over_the_defaults() -> None:
    """As the module says."""
    environ = {"MLFLOW_OUTBOX_SYNC": "always", "MLFLOW_OUTBOX_PARALLEL_RUNS": " 7 ", "MLFLOW_OUTBOX_LINGER": "1.5"}
    found = Settings.from_environment(environ, parallel_runs=2)
    assert ("always", 2, 1.5, 0.5) == (found.sync, found.parallel_runs, found.linger, found.sync_interval)
    assert Settings() == Settings.from_environment({})


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_its_variable(name: str) -> None:
    """By one rule, but for the directory."""
    values = {"sync": "os", "worker": "none", "verify": "off"}
    kind = type(getattr(Settings, name))
    text = values.get(name) or {bool: "yes", int: "1024", float: "17.5"}.get(kind, "/tmp/x")
    if name == "batch_points":
        text = "10"
    variable = "MLFLOW_OUTBOX_DIR" if name == "root" else f"MLFLOW_OUTBOX_{name.upper()}"
    found = Settings.from_environment({variable: text})
    assert getattr(found, name) != getattr(Settings(), name) or text == str(getattr(Settings(), name))
    assert getattr(Settings(), name) == getattr(Settings.from_environment({variable: " "}), name)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), float("-inf"), "5", None, True, 10**400])
def test_a_number_outside_its_range_is_refused_by_name(name: str, value: Any) -> None:
    """NaN and infinities too: a clock that waits for them never wakes."""
    with pytest.raises(InvalidSettings, match=name):
        Settings(**{name: value})


@pytest.mark.parametrize("name", [name for name in NUMBERS if type(getattr(Settings, name)) is float])
def test_no_time_is_longer_than_a_thread_can_wait(name: str) -> None:
    """A thread of the background would end by an OverflowError; two centuries are taken."""
    assert getattr(Settings(**{name: 200 * 365 * 86_400}), name) < threading.TIMEOUT_MAX
    with pytest.raises(InvalidSettings, match=name):
        Settings(**{name: threading.TIMEOUT_MAX + 1})


@pytest.mark.parametrize("name", [name for name in NUMBERS if type(getattr(Settings, name)) is int])
def test_a_count_or_size_must_be_whole(name: str) -> None:
    """A half of a run cannot be delivered."""
    with pytest.raises(InvalidSettings, match="whole"):
        Settings(**{name: getattr(Settings, name) + 0.5})


@pytest.mark.parametrize(
    "given",
    [
        {"sync": "sometimes"},
        {"verify": True},
        {"worker": "gpu"},
        {"batch_points": 1001},
        {"strict": "no"},
        {"disabled": 1},
        {"root": 5},
        {"ledger_dir": b"x"},
    ],
)
def test_a_choice_that_is_none_is_refused_by_name(given: dict[str, Any]) -> None:
    """The message names the option."""
    with pytest.raises(InvalidSettings, match=next(iter(given))):
        Settings(**given)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("MLFLOW_OUTBOX_STRICT", "maybe"),
        ("MLFLOW_OUTBOX_PARALLEL_RUNS", "1.5"),
        ("MLFLOW_OUTBOX_OUTBOX_BYTES", "8GB"),
        ("MLFLOW_OUTBOX_LINGER", "soon"),
        ("MLFLOW_OUTBOX_LINGER", "nan"),
        ("MLFLOW_OUTBOX_SYNC", "ALWAYS"),
    ],
)
def test_a_variable_that_cannot_be_read_is_refused(variable: str, text: str) -> None:
    """At the start, not in the middle of a night, and by the name under which it was set."""
    with pytest.raises(InvalidSettings, match=variable):
        Settings.from_environment({variable: text})


@pytest.mark.parametrize(("text", "value"), [("1", True), ("YES", True), ("on", True), ("0", False), ("False", False)])
def test_the_usual_words_for_yes_and_no_are_read(text: str, value: bool) -> None:
    """In any case of letters."""
    assert value == Settings.from_environment({"MLFLOW_OUTBOX_STRICT": text}).strict


def test_a_path_may_be_text() -> None:
    """It is a Path afterwards, for who reads it."""
    assert Path("/tmp/x") == Settings(root="/tmp/x").root  # type: ignore[arg-type]  # bad input
    assert Path("/tmp/x") == Settings(ledger_dir=Path("/tmp/x")).ledger_dir


def test_a_directory_for_ledgers_stays_where_it_is_when_the_program_leaves_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush would wait for the ledger of another directory; one whose own is gone is told so."""
    monkeypatch.chdir(tmp_path)
    assert tmp_path / "ledgers" == Settings.from_environment({"MLFLOW_OUTBOX_LEDGER_DIR": "ledgers"}).ledger_dir
    assert Path.home() / "ledgers" == Settings(ledger_dir=Path("~/ledgers")).ledger_dir
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(InvalidSettings, match="ledger_dir='ledgers' depends on what is not there"):
        Settings(ledger_dir=Path("ledgers"))


def test_settings_are_frozen_and_hashable() -> None:
    """Two parts of a program cannot disagree about an option."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().sync = "os"  # type: ignore[misc]  # frozen
    assert hash(Settings()) == hash(Settings())


def test_only_the_settings_read_the_environment() -> None:
    """As the module promises."""
    root = Path(mlflow_outbox.settings.__file__).parent
    readers = {path.name for path in root.rglob("*.py") if re.search(r"os\.environ|getenv", path.read_text())}
    assert readers <= {"settings.py"}
