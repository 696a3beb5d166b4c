"""What delivery needs of a tracking store, and the one error it may raise.

``mlflow_sink`` implements it for every store that MLflow reaches. Each method is one request, made once: a sink never
retries, never sleeps and never reads the wall clock, because ``retry`` decides about attempts and the journal about
times. All methods may be called from several threads at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, Protocol

#: The tag by which a run of an outbox is found in MLflow, whoever created it.
RUN_ID_TAG = "mlflow_outbox.run_id"

#: The methods of MLflow's tracking store that ``Sink.call`` makes: each concerns what its arguments name, and nothing
#: else.
OPERATIONS: Final = frozenset(
    {"delete_tag", "update_run_info", "delete_run", "restore_run", "log_inputs", "log_outputs", "log_batch"}
    | {"set_experiment_tag", "delete_experiment_tag", "delete_experiment", "restore_experiment", "rename_experiment"}
    | {"create_logged_model", "finalize_logged_model", "set_logged_model_tags", "delete_logged_model_tag"}
    | {"log_logged_model_params", "delete_logged_model"}
    | {"start_trace", "log_spans", "set_trace_tag", "delete_trace_tag", "link_traces_to_run", "unlink_traces_from_run"}
)

#: How an attempt failed: no answer at all, an answer with a status, or an answer that no MLflow server gives.
FailureKind = Literal["connection", "timeout", "answer", "not_mlflow"]


class SinkError(Exception):
    """Raised when a request was refused, or when it is not known whether it was carried out.

    Attributes:
        kind: "connection" (refused, reset, DNS, TLS), "timeout", "answer" (the store said no) or "not_mlflow" (a
            login page, a redirect, a body that is not MLflow's).
        status: HTTP status, or the one that MLflow's server would give; None without an answer.
        code: MLflow's error code, for instance "RESOURCE_DOES_NOT_EXIST"; "" without one.
        retry_after: seconds that the server asked to wait; None when it did not.
        sent: False when the request certainly never reached the store, so that it cannot have been carried out.
        login: which credentials went with a request whose login was refused, or none; "" for all other errors.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: FailureKind,
        status: int | None = None,
        code: str = "",
        retry_after: float | None = None,
        sent: bool = True,
        login: str = "",
    ) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind
        self.status = status
        self.code = code
        self.retry_after = retry_after
        self.sent = sent
        self.login = login

    @property
    def described(self) -> str:
        """The message, with what the store was told of who asks where that is the matter."""
        return f"{str(self).rstrip('.')}; {self.login}" if self.login else str(self)


class MetricPoint(NamedTuple):
    """One metric point: key, value, wall-clock time in ms, step."""

    key: str
    value: float
    time_ms: int
    step: int


@dataclasses.dataclass(frozen=True)
class RemoteRun:
    """What MLflow holds of one run.

    Attributes:
        metrics: the latest point of each key, as MLflow defines latest (largest step, then time, then value).
        lifecycle: "active" or "deleted".
        start_time_ms: milliseconds since the epoch; end_time_ms is None while the run goes on.
    """

    run_id: str
    experiment_id: str
    run_name: str
    status: str
    start_time_ms: int
    end_time_ms: int | None
    lifecycle: str
    artifact_uri: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, MetricPoint]


class RemoteModel(NamedTuple):
    """What MLflow holds of a logged model: its status, and the run that it is of ("" for none)."""

    status: str
    source_run_id: str


class Sink(Protocol):
    """One tracking store. Every method raises SinkError and nothing else."""

    #: True when the store keeps a metric point once however often it is sent (SQL stores do, file stores do not).
    deduplicates_metrics: bool
    #: True when points that the store has cost it no more than new ones.
    takes_repeats: bool
    #: True when requests for several runs may be in flight at once (a tracking server; not an embedded file or
    #: SQLite).
    parallel: bool

    def admits(self) -> bool:
        """Return whether the store answers who asks for nothing in particular, and can be written to as a whole.

        Where it does, a refusal is about what was asked for.
        """
        ...

    def experiment_id(self, name: str) -> str:
        """Return the id of the experiment called name, which is created when there is none."""
        ...

    def find_experiment(self, name: str) -> str | None:
        """Return the id of the experiment called name, or None; never creates one."""
        ...

    def create_run(
        self, experiment_id: str, *, run_name: str | None, start_time_ms: int, user: str, tags: Mapping[str, str]
    ) -> str:
        """Create a run and return its id; twice called, two runs."""
        ...

    def find_runs(self, experiment_id: str, local_id: str) -> list[str]:
        """Return the ids of all runs whose RUN_ID_TAG is local_id: first the oldest that is not deleted, nor empty."""
        ...

    def get_run(self, run_id: str) -> RemoteRun:
        """Return what the store holds of a run."""
        ...

    def search_runs(self, experiment_id: str) -> list[RemoteRun]:
        """Return every active run of an experiment, newest first."""
        ...

    def log_batch(
        self, run_id: str, points: Sequence[MetricPoint], params: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        """Send at most 1000 points, 100 params and 100 tags (1000 in all) in one request."""
        ...

    def update_run(self, run_id: str, *, status: str, end_time_ms: int | None) -> None:
        """Set a run's status and its end time."""
        ...

    def upload(
        self, run_id: str, file: Path, artifact_path: str, *, is_replaced: Callable[[Path], bool] = lambda _: False
    ) -> None:
        """Store the content of file as artifact_path (file name included), replacing what was there.

        Args:
            run_id: MLflow's id of the run.
            file: the content.
            artifact_path: relative POSIX path.
            is_replaced: asked where something else is seen in the place, with its path: whether that stays.
        """
        ...

    def create_experiment(self, name: str, artifact_location: str | None, tags: Mapping[str, str]) -> str:
        """Return the id of the experiment called name, which is created with location and tags when there is none."""
        ...

    def call(self, operation: str, arguments: str) -> str:
        """Call a method of MLflow's tracking store with arguments in JSON; return the id of what it created, or ""."""
        ...

    def find_models(self, experiment_id: str, local_id: str) -> dict[str, RemoteModel]:
        """Return by their ids the logged models whose ``mlflow_outbox.model_id`` tag is local_id."""
        ...

    def model_params(self, model_id: str) -> Mapping[str, str]:
        """Return the params of a logged model."""
        ...

    def artifact_location(self, kind: str, subject: str) -> str:
        """Return MLflow's artifact URI of a "run", a "model" or an "experiment"."""
        ...

    def upload_for(
        self,
        kind: str,
        owner: str,
        file: Path,
        artifact_path: str,
        *,
        is_replaced: Callable[[Path], bool] = lambda _: False,
    ) -> None:
        """Store the content of file under a model's artifacts (kind "model") or an artifact URI (kind "uri")."""
        ...

    def takes(self, kind: str, owner: str, file: Path | None) -> bool:
        """Return whether a file is taken now beside the artifacts of a "run", a "model" or an artifact URI ("uri").

        It gets a name of its own, and is deleted again.

        Args:
            kind: what the owner is.
            owner: its id in MLflow, or the URI.
            file: the content; None for a few bytes.

        Returns:
            False when it is refused, and where this cannot be found out.
        """
        ...

    def metric_history(self, run_id: str, key: str) -> list[MetricPoint]:
        """Return every point of one metric."""
        ...

    def metric_page(self, run_id: str, key: str, token: str | None) -> tuple[list[MetricPoint], str | None]:
        """Return some points of one metric, and what to ask for the next ones with; None when these are the last.

        Args:
            run_id: MLflow's.
            key: the metric's.
            token: what came with the page before; None asks for the first.
        """
        ...

    def download(self, run_id: str, artifact_path: str, target: Path, size: int) -> None:
        """Store the content of an artifact, which should have a size in bytes, as the new file target."""
        ...

    def list_artifacts(self, run_id: str, folder: str) -> dict[str, int | None]:
        """Return path and size in bytes of the files directly in one folder ("" is the root) of a run's artifacts."""
        ...

    def delete_run(self, run_id: str) -> None:
        """Mark a run deleted; used only for an empty second run left by a create whose answer was lost."""
        ...

    def close(self) -> None:
        """Give back connections; the sink is not used afterwards."""
        ...
