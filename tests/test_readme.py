"""The README says what the code does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mlflow_outbox.settings import Settings, variable_name

README = Path(__file__).parent.parent / "README.md"


def test_every_setting_stands_in_the_table_with_its_variable_and_default() -> None:
    """One row per option, in the order of the class."""
    rows = [
        tuple(cell.strip() for cell in line.strip().strip("|").split("|"))[:3]
        for line in README.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `") and "`MLFLOW_OUTBOX_" in line
    ]
    expected = [
        (f"`{field.name}`", f"`{variable_name(field.name)}`", f"`{field.default!r}`")
        for field in dataclasses.fields(Settings)
    ]
    assert expected == rows
