"""The plugin's tests: MLflow pointed at an outbox, and what it holds then in a form that can be compared."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from contents import client
from mlflow_outbox.testing.proxy import FaultProxy
from servers import MlflowServer

if sys.version_info >= (3, 11):
    import tomllib
else:  # a dependency of pytest there
    import tomli as tomllib

_ROOT = Path(__file__).parent.parent
#: Ids, addresses and times differ from run to run; what they stand for does not.
_HEX = re.compile(r"(?:m-|tr-)?[0-9a-f]{32}|[0-9a-z]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_OWN_TAGS = ("mlflow_outbox.",)
#: A server that refuses connections: nothing listens on the discard port.
NOWHERE = "outbox+http://127.0.0.1:9"
#: Without an outbox; with the server there; with it away from the start; with it going away in the middle.
WAYS = ("plain", "up", "away", "killed")


def entry_points() -> dict[str, dict[str, str]]:
    """Return the entry points that pyproject.toml declares for MLflow."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    return {group: names for group, names in project["entry-points"].items() if group.startswith("mlflow.")}


def register() -> None:
    """Register the plugin with MLflow as its entry points do, for a checkout that is not installed."""
    from mlflow.genai.labeling import stores as labeling
    from mlflow.genai.scorers import registry as scorers
    from mlflow.store.artifact import artifact_repository_registry
    from mlflow.tracking._model_registry import utils as models
    from mlflow.tracking._tracking_service import utils as tracking

    registries = {
        "mlflow.tracking_store": tracking._tracking_store_registry,
        "mlflow.model_registry_store": models._get_store_registry(),
        "mlflow.artifact_repository": artifact_repository_registry._artifact_repository_registry,
        "mlflow.scorer_store": scorers._scorer_store_registry,
        "mlflow.labeling_store": labeling._labeling_store_registry,
    }
    for group, names in entry_points().items():
        for scheme, target in names.items():
            module, _, attribute = target.partition(":")
            registries[group].register(scheme, getattr(importlib.import_module(module), attribute))


def environment_with_plugin(folder: Path) -> dict[str, str]:
    """Return the environment of a program in which MLflow finds the plugin by its entry points, and no other setting.

    Args:
        folder: where what an installation would write is put, for a checkout that is on the path alone.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    installed = {point.name for point in metadata.entry_points(group="mlflow.tracking_store")}
    if "outbox+sqlite" not in installed:
        written = folder / "site" / "mlflow_outbox-0.dist-info"
        written.mkdir(parents=True)
        (written / "METADATA").write_text("Metadata-Version: 2.1\nName: mlflow-outbox\nVersion: 0\n")
        groups = [
            f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in names.items())
            for group, names in entry_points().items()
        ]
        (written / "entry_points.txt").write_text("\n".join(groups))
        here = [path for path in sys.path if path.endswith(("tracker", "worker"))]
        environment["PYTHONPATH"] = os.pathsep.join([str(written.parent), *here])
    return environment


@contextmanager
def tracking(uri: str, outbox: Path, **settings: object) -> Iterator[Any]:
    """Point MLflow at a tracking URI, with an outbox directory and settings of the test's own; yield mlflow."""
    import mlflow

    register()
    with pytest.MonkeyPatch.context() as patch:
        options = {"dir": outbox, "exit_timeout": 20, "poll_interval": 0.02, "retry_initial": 0.02, "retry_max": 0.2}
        for name, value in {**options, **settings}.items():
            patch.setenv(f"MLFLOW_OUTBOX_{name.upper()}", str(value))
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        # MLflow 3.9's server answers 500 for a file that is not there, and MLflow asks again seven times, for minutes.
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        forget()
        mlflow.set_tracking_uri(uri)
        try:
            yield mlflow
        finally:
            while mlflow.active_run() is not None:
                mlflow.end_run()
            if uri.startswith("outbox+"):
                store(uri).outbox.close(0)  # its worker would go on trying after the test
            mlflow.set_tracking_uri(None)
            forget()


@contextmanager
def away(server: MlflowServer, outbox: Path, **settings: object) -> Iterator[tuple[Any, FaultProxy, str]]:
    """Point MLflow at an outbox whose server is away until ``proxy.up()``; yield mlflow, the proxy and the URI."""
    with FaultProxy(server.url) as proxy:
        proxy.down()
        uri = f"outbox+{proxy.url}"
        with tracking(uri, outbox, **settings) as mlflow:
            yield mlflow, proxy, uri


class World(NamedTuple):
    """MLflow pointed at a server in one of the ways that must not be told apart."""

    way: str
    uri: str
    mlflow: Any
    proxy: FaultProxy

    def kill(self) -> None:
        """Take the server away from here on, in the way that this happens in."""
        if self.way == "killed":
            self.proxy.down()

    def come_back(self) -> None:
        """Have the server there again, and everything in it."""
        self.proxy.up()
        deliver(self.uri)


@contextmanager
def world(way: str, server: MlflowServer, outbox: Path) -> Iterator[World]:
    """Point MLflow at a server in one of ``WAYS``; what was logged has arrived at the end."""
    with FaultProxy(server.url) as proxy:
        if way == "away":
            proxy.down()
        uri = server.url if way == "plain" else f"outbox+{proxy.url}"
        with tracking(uri, outbox) as mlflow:
            made = World(way, uri, mlflow, proxy)
            yield made
            made.come_back()


def forget() -> None:
    """Let MLflow forget the stores, experiments and artifact repositories that it remembers for the whole process."""
    from mlflow.tracking import fluent
    from mlflow.tracking._tracking_service import utils

    utils._tracking_store_registry._get_store_with_resolved_uri.cache_clear()
    utils._artifact_repos_cache.clear()
    fluent._active_experiment_id = None


def store(uri: str) -> Any:
    """Return the plugin's store of a tracking URI."""
    from mlflow.tracking._tracking_service.utils import _get_store

    return _get_store(uri)


def deliver(uri: str, timeout: float = 60.0) -> None:
    """Deliver all that was logged through a tracking URI; for others there is nothing to do."""
    if not uri.startswith("outbox+"):
        return
    result = store(uri).outbox.flush(timeout)
    assert result, (result, store(uri).outbox.counters.snapshot())
    assert 0 == result.dead, result


def the_runs(uri: str, experiment: str) -> list[Any]:
    """Return all runs of an experiment, deleted ones too."""
    from mlflow.entities import ViewType

    with client(uri) as api:
        found = api.get_experiment_by_name(experiment)
        return list(api.search_runs([found.experiment_id], run_view_type=ViewType.ALL)) if found else []


def picture(uri: str, experiment: str) -> dict[str, Any]:
    """Return all that MLflow holds of an experiment, with ids replaced by names, so that two of them can be compared.

    Args:
        uri: a plain tracking URI.
        experiment: its name.
    """
    from mlflow import MlflowClient

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        # MLflow 3.9's server answers 500 for a file that is not there, and MLflow asks again seven times, for minutes.
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        assert found is not None, experiment
        number = found.experiment_id
        runs = sorted(client.search_runs([number]), key=lambda run: str(run.info.run_name))
        names = {run.info.run_id: f"<{run.info.run_name}>" for run in runs}
        models = sorted(client.search_logged_models([number]), key=lambda model: str(model.name))
        names.update({model.model_id: f"<{model.name}>" for model in models})
        traces = client.search_traces(locations=[number])
        names.update({trace.info.trace_id: "<trace>" for trace in traces})
        shown = {
            "tags": dict(found.tags),
            "stage": found.lifecycle_stage,
            "runs": [_run(client, run) for run in runs],
            "models": [_model(client, model) for model in models],
            # By what was traced: the rest has ids in it, and a server gives metadata in an order of its own.
            "traces": sorted((_trace(trace) for trace in traces), key=lambda trace: repr(trace["spans"])),
        }
    return _renamed(shown, names, number)  # type: ignore[no-any-return]  # of the type that it was given


def _run(client: Any, run: Any) -> dict[str, Any]:
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "stage": run.info.lifecycle_stage,
        "user": (run.info.user_id, run.data.tags.get("mlflow.user")),
        "ended": run.info.end_time is not None,
        "params": dict(run.data.params),
        "tags": {key: value for key, value in run.data.tags.items() if not key.startswith(_OWN_TAGS)},
        "metrics": {
            key: sorted((p.step, repr(p.value)) for p in client.get_metric_history(run.info.run_id, key))
            for key in run.data.metrics
        },
        "datasets": sorted(
            (d.dataset.name, d.dataset.digest, d.dataset.schema, sorted((t.key, t.value) for t in d.tags))
            for d in run.inputs.dataset_inputs
        ),
        "read": sorted(model.model_id for model in run.inputs.model_inputs or ()),
        "made": sorted((m.model_id, m.step) for m in (run.outputs.model_outputs if run.outputs else ())),
        "files": _files(lambda path: client.list_artifacts(run.info.run_id, path)),
    }


def _model(client: Any, model: Any) -> dict[str, Any]:
    import mlflow.artifacts

    files = _files(lambda path: client.list_logged_model_artifacts(model.model_id, path))
    return {
        "name": model.name,
        "status": str(model.status),
        "source": model.source_run_id,
        "type": model.model_type,
        "params": dict(model.params),
        "tags": {key: value for key, value in model.tags.items() if not key.startswith(_OWN_TAGS)},
        "metrics": sorted((m.key, m.value, m.step) for m in model.metrics or ()),
        "files": sorted(name for name, _ in files),
        "MLmodel": [
            line
            for line in mlflow.artifacts.load_text(f"{model.artifact_location}/MLmodel").splitlines()
            if "utc_time" not in line and "size_bytes" not in line
        ]
        if files
        else [],
    }


def _trace(trace: Any) -> dict[str, Any]:
    return {
        "state": str(trace.info.state),
        "metadata": {k: v for k, v in trace.info.trace_metadata.items() if "size" not in k.lower()},
        "tags": dict(trace.info.tags),
        "spans": sorted((s.name, repr(s.inputs), repr(s.outputs), s.parent_id is None) for s in trace.data.spans),
    }


#: What MLflow adds to the directory of a model that it loads from where it lies.
_OF_LOADING = "registered_model_meta"


def _files(listing: Any, path: str | None = None) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for info in listing(path):
        found += _files(listing, info.path) if info.is_dir else [(info.path, info.file_size)]
    return sorted((name, size) for name, size in found if name.rpartition("/")[2] != _OF_LOADING)


def _renamed(value: Any, names: dict[str, str], experiment: str) -> Any:
    if isinstance(value, dict):
        return {_renamed(k, names, experiment): _renamed(v, names, experiment) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_renamed(item, names, experiment) for item in value]
    if not isinstance(value, str):
        return value
    text = _HEX.sub(lambda found: names.get(found.group(), "<unknown id>"), value)
    return re.sub(rf"(mlflow-artifacts:|mlruns|artifacts)/{experiment}/", r"\1/<experiment>/", text)


def differences(expected: Any, found: Any, path: str = "") -> list[str]:
    """Return what differs between two pictures, one line each."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return [
            line
            for key in sorted({*expected, *found})
            for line in differences(expected.get(key), found.get(key), f"{path}/{key}")
        ]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return [
            line
            for i, pair in enumerate(zip(expected, found, strict=True))
            for line in differences(*pair, f"{path}/{i}")
        ]
    return [] if expected == found else [f"{path}: {expected!r} became {found!r}"]
