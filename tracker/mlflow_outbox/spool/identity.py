"""Whose events these are: the run that everything of one writer belongs to."""

from __future__ import annotations

from typing import NamedTuple


class RunIdentity(NamedTuple):
    """The run that a writer's events belong to.

    Attributes:
        run_id: the outbox's id of it, or MLflow's.
        experiment: name of its experiment.
        remote: whether the id is one that MLflow gave.
    """

    run_id: str
    experiment: str
    remote: bool = False
