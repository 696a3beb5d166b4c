"""What ids of the server that runs were logged for are at another one, or in another experiment of the same one.

Unchanged MLflow code sees the ids of its server, and writes them down: in tags, links, traces, ``MLmodel`` files. A
replay to the same place leaves them alone. One to another place makes copies, and so does one that is asked to send
everything again, where the first ones may be gone. There an id of a run or model that
is replayed too stands for its copy's. Experiments are copied by their names. An id of anything else is left as it is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, Final

from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.events import Request, argument_of
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox_worker.sources import Source

#: Ids of runs and models, MLflow's own too, and provisional ones of experiments.
PATTERN: Final = re.compile(rf"(?<![0-9A-Za-z])(?:m-)?[0-9a-f]{{32}}(?![0-9A-Za-z])|{provisional.PATTERN.pattern}")
#: Where MLflow keeps the files of a run or a model, whatever the root of its experiment is, and those of traces.
HOME: Final = re.compile(r"(?:[A-Za-z][\w+.\-]*:)?/[^\s\"'\\]*?/((?:m-)?[0-9a-f]{32})/artifacts(?![\w\-])")
TRACES: Final = re.compile(r"mlflow-artifacts:/(?:/[^/\s]+/)?(\d+)(?=/traces/)")
#: Arguments that hold the id of an experiment, at any depth, and those of single operations that do.
_EXPERIMENT: Final = "experiment_id"
_LOCATIONS: Final = frozenset({"log_spans"})


def copying(source: Source) -> bool:
    """Return whether what is delivered from a source is a copy of what another place has, or had."""
    return source.elsewhere or source.again or bool(source.experiment(""))


class Copies:
    """Knows what of one source is copied.

    Args:
        source: where the runs come from.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def has(self, subject: str) -> bool:
        """Return whether a run or model of this id is copied, or may be."""
        if subject.startswith("m-"):
            return subject in self.models
        return any(folder.is_dir() for folder in self._source.everywhere(subject))

    @functools.cached_property
    def models(self) -> frozenset[str]:
        """The ids of all models that the runs made."""
        return frozenset(
            argument_of(request.arguments, "model_id")
            for run_id in self._source.run_ids()
            for _, request in RunReader(*self._source.folders(run_id)).each(Request, {})
            if request.operation == "create_logged_model"
        )

    def experiment(self, experiment_id: str, run_id: str) -> str:
        """Return the name of the experiment that has an id at the place for which a run was logged; "" if unknown.

        Args:
            experiment_id: the id.
            run_id: the run, or room: another outbox may mean another experiment by the same id.
        """
        roots = {folder.parent.parent for folder in self._source.folders(run_id)}
        others = [
            other
            for other in self._source.run_ids()
            if other != run_id and roots & {folder.parent.parent for folder in self._source.folders(other)}
        ]
        for other in [run_id, *others]:
            reader = RunReader(*self._source.folders(other))
            started, header = reader.started()
            if header is None or not header.experiment:
                continue
            held = provisional.experiment_of(other) if provisional.is_room(other) else started and started.experiment_id
            if held == experiment_id:
                return header.experiment
        return ""

    def placed(self, operation: str, arguments: dict[str, Any], place: Callable[[str], str]) -> dict[str, Any]:
        """Return the arguments of a request with ids of experiments replaced.

        Args:
            operation: the request.
            arguments: its arguments.
            place: returns what an experiment's id has become.
        """

        def walk(value: Any) -> Any:
            if isinstance(value, list):
                return [walk(item) for item in value]
            if not isinstance(value, dict):
                return value
            return {
                key: place(item) if key == _EXPERIMENT and isinstance(item, str) and item else walk(item)
                for key, item in value.items()
            }

        found: dict[str, Any] = walk(arguments)
        if operation in _LOCATIONS:
            found["location"] = place(found["location"])
        return found
