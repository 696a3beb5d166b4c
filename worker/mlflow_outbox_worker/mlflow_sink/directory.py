"""MLflow's file store, in which everything is there wholly or not at all.

MLflow's own makes a directory, then a description in it, then the tags one by one. A process that is killed in between
leaves a run without the tag by which the next process looks for it, so that a second one is made, or an empty
description, which makes every later look at the experiment fail. Here

* an experiment, a run or a logged model is written by MLflow's own code into a *draft*, a directory beside its later
  place that no version of MLflow takes for any of them, and then renamed;
* a param is written elsewhere and renamed, and so is a run's description when it changes;
* the points of a batch go to the file of their metric in one write (MLflow's own opens, writes and closes for each
  point, which takes ten times as long); what is torn there is no point (``point_lines``);
* a point of a model, or of a dataset, that is there already is not added again: it comes as a request of MLflow's own,
  which nobody compares with a run's history before it is sent;
* a run is searched for by the outbox's tag without reading the others (``tagged``);
* what another process left torn (a run or an experiment whose description is missing, empty or cut, a metric without
  a point, an empty param) is no run, no experiment, no metric and no param;
* an id of a trace, a model or an assessment is the name of one file or folder: a journal may be one that somebody else
  wrote, and MLflow's own makes a path of whatever it is given;
* a name that needs a directory where another has its file, or the reverse (``val`` and ``val/acc``), is refused for
  good: a database keeps both, a file store has no place for the second.

**Drafts.** Their name ends like that of MLflow's trash, which keeps them out of the list of experiments; they have no
description, which keeps them out of the list of runs. Whoever writes one holds a shared lock on the directory that it
is in, until the draft is gone. The first time a store looks into a directory it asks for the exclusive lock: if it gets
it, nobody is writing there, and what drafts there are belong to processes that were killed; they are removed. On file
systems that cannot lock they stay, and do no harm.

Nothing is synced, as in MLflow's own: a power cut can take what a file store has taken.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml
from mlflow.entities import Metric, RunInfo
from mlflow.exceptions import MissingConfigException, MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST
from mlflow.store.tracking import file_store
from mlflow.store.tracking.file_store import FileStore
from mlflow.utils.yaml_utils import write_yaml

from mlflow_outbox.counters import printable
from mlflow_outbox_worker.mlflow_sink import point_lines
from mlflow_outbox_worker.mlflow_sink.point_lines import Lines, Unusual, locked, plain
from mlflow_outbox_worker.mlflow_sink.tagged import TaggedRuns
from mlflow_outbox_worker.sink import MetricPoint

#: What reading a description raises that is not there, torn, or saved by a person in another encoding.
_NO_DESCRIPTION: Final = (
    *(MissingConfigException, FileNotFoundError, AttributeError, KeyError, TypeError, UnicodeDecodeError),
    yaml.YAMLError,
)
_DRAFT_PREFIX = ".mlflow_outbox-"
_DRAFT_SUFFIX = FileStore.TRASH_FOLDER_NAME
#: Of a file's name, in file systems.
_NAME_BYTES = 255


class Directory(FileStore):  # type: ignore[misc]  # MLflow has no type information
    """A file store whose writers may be killed at any time.

    Args:
        root: URI of the directory.
        artifact_root: URI under which new experiments keep their artifacts.
    """

    def __init__(self, root: str, artifact_root: str) -> None:
        self._swept: set[str] = set()
        self._batch = threading.local()
        self._tagged = TaggedRuns()
        self._lines = Lines()
        super().__init__(root, artifact_root)
        self._sweep(self.root_directory)

    # -- all or nothing

    def create_run(self, experiment_id: Any, user_id: Any, start_time: Any, tags: Any, run_name: Any) -> Any:
        """Create a run; the arguments are those of MLflow's method."""
        home = self._get_experiment_path(experiment_id or self.DEFAULT_EXPERIMENT_ID)
        if home is None:  # MLflow finds the words
            return super().create_run(experiment_id, user_id, start_time, tags, run_name)
        with self._draft(home, like=home) as (draft, folder):
            with _tags_beside_each_other():
                run = draft.create_run(experiment_id, user_id, start_time, tags, run_name)
            (folder / run.info.run_id).rename(Path(home, run.info.run_id))
            return run

    def create_logged_model(self, experiment_id: str = FileStore.DEFAULT_EXPERIMENT_ID, **named: Any) -> Any:
        """Create a logged model; the arguments are those of MLflow's method."""
        home = self._get_experiment_path(experiment_id)
        if home is None:
            return super().create_logged_model(experiment_id, **named)
        with self._draft(home, like=home) as (draft, folder):
            model = draft.create_logged_model(experiment_id, **named)
            models = Path(home, self.MODELS_FOLDER_NAME)
            models.mkdir(exist_ok=True)
            (folder / self.MODELS_FOLDER_NAME / model.model_id).rename(models / model.model_id)
            return model

    def _create_experiment_with_id(self, name: Any, experiment_id: str, artifact_uri: Any, tags: Any) -> str:
        with self._draft(self.root_directory) as (draft, folder):
            draft._create_experiment_with_id(name, experiment_id, artifact_uri, tags)  # noqa: SLF001 - its own
            (folder / experiment_id).rename(Path(self.root_directory, experiment_id))
        return experiment_id

    def log_batch(self, run_id: str, metrics: Any, params: Any, tags: Any) -> None:
        """Log points, params and tags of a run; the arguments are those of MLflow's method."""
        held: dict[str, list[str]] = {}  # by metric: the path of its file, and its lines
        self._batch.lines, self._batch.places = held, _Places()
        if any(metric.model_id or metric.dataset_name for metric in metrics):
            info = self._get_run_info(run_id)
            metrics = [rest for metric in metrics if (rest := self._lacking(info, metric)) is not None]
        try:
            super().log_batch(run_id, metrics, params, tags)
        finally:
            self._batch.lines = None
        for path, *lines in held.values():
            point_lines.append(path, "".join(lines).encode())

    def _lacking(self, info: RunInfo, metric: Metric) -> Metric | None:
        """Return what of a point of a model, or of a dataset, is not there yet; all of any other."""
        dataset = _dataset(metric)
        if not metric.model_id and not dataset:
            return metric
        line = f"{metric.timestamp} {metric.value} {metric.step}"
        if metric.model_id:
            place = self._get_model_metric_path(info.experiment_id, metric.model_id, metric.key)
            # A model has its point first. The run may have had the same one before, as one that is of no model.
            if not self._lines.has(place, f"{line} {info.run_id}{dataset}\n"):
                return metric
        if self._lines.has(self._get_metric_path(info.experiment_id, info.run_id, metric.key), f"{line}{dataset}\n"):
            return None
        rest = copy.copy(metric)
        rest._model_id = None  # noqa: SLF001 - MLflow's, as its own property reads it
        return rest

    def _set_run_tag(self, run_info: Any, tag: Any) -> None:
        path = self._get_tag_path(run_info.experiment_id, run_info.run_id, tag.key)
        _Places().check(path, self._get_run_dir(run_info.experiment_id, run_info.run_id))
        super()._set_run_tag(run_info, tag)

    def _log_run_metric(self, run_info: Any, metric: Any) -> None:
        held = getattr(self._batch, "lines", None)
        if held is None:
            super()._log_run_metric(run_info, metric)
            return
        lines = held.get(metric.key)
        if lines is None:  # finding the path takes longer than all else
            path = self._get_metric_path(run_info.experiment_id, run_info.run_id, metric.key)
            # Before a point of the batch is written: it is sent again without what is refused.
            self._batch.places.check(path, self._get_run_dir(run_info.experiment_id, run_info.run_id))
            lines = held[metric.key] = [path]
        lines.append(f"{metric.timestamp} {metric.value} {metric.step}{_dataset(metric)}\n")

    def _log_run_param(self, run_info: Any, param: Any) -> None:
        path = Path(self._get_param_path(run_info.experiment_id, run_info.run_id, param.key))
        run = Path(self._get_run_dir(run_info.experiment_id, run_info.run_id))
        _Places().check(str(path), str(run))
        value = self._writeable_value(param.value)
        if path.exists() and (path.stat().st_size or not value):
            super()._log_run_param(run_info, param)  # which refuses it when the value is another one
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = run / f".param-{os.getpid()}-{threading.get_ident()}"
        try:
            draft.write_text(value, encoding="utf-8")
            os.replace(draft, path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise

    def _overwrite_run_info(self, run_info: Any, deleted_time: int | None = None) -> None:
        folder = self._get_run_dir(run_info.experiment_id, run_info.run_id)
        info = file_store._make_persisted_run_info_dict(run_info)  # noqa: SLF001 - what the method replaced here uses
        if deleted_time is not None:
            info["deleted_time"] = deleted_time
        draft = f".meta-{os.getpid()}-{threading.get_ident()}.yaml"
        write_yaml(folder, draft, info, overwrite=True)
        os.replace(os.path.join(folder, draft), os.path.join(folder, self.META_DATA_FILE_NAME))

    def _list_run_infos(self, experiment_id: Any, *view: Any, **named: Any) -> Any:
        home = self._get_experiment_path(experiment_id)
        if home is not None:
            self._sweep(home)
        return super()._list_run_infos(experiment_id, *view, **named)

    def tagged_runs(self, experiment_id: str, local_id: str) -> list[RunInfo]:
        """Return the runs of an experiment, deleted ones too, that have the outbox's tag of one run.

        Their params, tags and points, of which a run can have millions, are not read.
        """
        home = self._get_experiment_path(experiment_id)
        if home is None:
            return []
        self._sweep(home)
        infos = []
        for run_id in self._tagged.find(home, local_id):
            with contextlib.suppress(MissingConfigException):  # it is gone, or torn
                infos.append(self._get_run_info_from_dir(os.path.join(home, run_id)))
        return infos

    # -- ids that are parts of paths

    def start_trace(self, trace_info: Any) -> Any:
        """Create a trace; the argument is that of MLflow's method."""
        _checked_id(trace_info.trace_id)
        return super().start_trace(trace_info)

    def log_outputs(self, run_id: str, models: Any) -> None:
        """Log the models that a run has made; the arguments are those of MLflow's method."""
        for model in models or ():
            _checked_id(model.model_id)
        super().log_outputs(run_id, models)

    def _get_model_dir(self, experiment_id: str, model_id: str) -> Any:
        return super()._get_model_dir(experiment_id, _checked_id(model_id))

    def _get_assessment_path(self, trace_id: str, assessment_id: str) -> Any:
        return super()._get_assessment_path(trace_id, _checked_id(assessment_id))

    # -- what others left torn

    def _get_run_info_from_dir(self, run_dir: str) -> Any:
        with _described(run_dir):
            return super()._get_run_info_from_dir(run_dir)

    def _get_model_info_from_dir(self, model_dir: str) -> Any:
        with _described(model_dir):
            return super()._get_model_info_from_dir(model_dir)

    def _get_experiment(self, experiment_id: Any, *view: Any, **named: Any) -> Any:
        # Raised to MLflow, it would be written to the host's root logger at each look.
        with contextlib.suppress(MissingConfigException), _described(f"{self.root_directory}/{experiment_id}"):
            return super()._get_experiment(experiment_id, *view, **named)

    def _get_run_files(self, run_info: Any, resource_type: str) -> tuple[str, list[str]]:
        folder, names = super()._get_run_files(run_info, resource_type)
        if resource_type == "metric":  # one without a point would make the run unreadable
            names = [name for name in names if point_lines.mended(os.path.join(folder, name))]
        return folder, names

    # -- points, without an object of MLflow's for each, which takes most of the time

    def points(self, run_id: str, key: str) -> list[MetricPoint] | None:
        """Return every point of one metric; None when MLflow's own code is needed to read them."""
        info = self._get_run_info(run_id)
        folder, names = self._get_run_files(info, "metric")
        if key not in names:
            return []
        try:
            return [MetricPoint(key, value, when, step) for step, when, value in plain(os.path.join(folder, key))]
        except Unusual:
            return None

    @staticmethod
    def _get_metric_from_file(parent_path: str, metric_name: str, run_id: str, exp_id: str) -> Metric:
        try:
            last = max(plain(os.path.join(parent_path, metric_name)), default=None)
        except Unusual:
            last = None
        if last is None:
            return FileStore._get_metric_from_file(parent_path, metric_name, run_id, exp_id)  # noqa: SLF001 - overridden
        step, when, value = last
        return Metric(metric_name, value, when, step, run_id=run_id)

    # -- drafts

    @contextlib.contextmanager
    def _draft(self, parent: str, like: str | None = None) -> Iterator[tuple[FileStore, Path]]:
        """Yield a plain file store in a new directory under parent, and where in it the new thing appears.

        Args:
            parent: the directory to which that will be renamed.
            like: the experiment's directory that the store has a copy of, without runs; None for an empty store.
        """
        folder = Path(parent, f"{_DRAFT_PREFIX}{uuid.uuid4().hex}{_DRAFT_SUFFIX}")
        place = folder if like is None else folder / os.path.basename(like)
        draft = FileStore.__new__(FileStore)  # a new one would ask whether file stores are allowed, and make a trash
        vars(draft).update(vars(self), root_directory=str(folder))
        with _opened(parent) as fd:
            if not locked(fd, fcntl.LOCK_SH, unless_unsupported=True):
                raise BlockingIOError(parent)  # somebody removes drafts, which takes a moment: retried
            place.mkdir(parents=True)
            try:
                if like is not None:
                    with _described(like):
                        shutil.copyfile(Path(like, self.META_DATA_FILE_NAME), place / self.META_DATA_FILE_NAME)
                yield draft, place
            finally:
                shutil.rmtree(folder, ignore_errors=True)  # what stays is swept by a later store

    def _sweep(self, parent: str) -> None:
        """Remove the drafts of killed processes from a directory, once."""
        if parent in self._swept:
            return
        with _opened(parent) as fd:
            if not locked(fd, fcntl.LOCK_EX):
                return
            for name in os.listdir(parent):
                if name.startswith(_DRAFT_PREFIX) and name.endswith(_DRAFT_SUFFIX):
                    shutil.rmtree(Path(parent, name), ignore_errors=True)
        self._swept.add(parent)


class _Places:
    """The files that a batch is going to make in a run's directory."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def check(self, path: str, folder: str) -> None:
        """Refuse a name whose file cannot be there: it is too long, or another's, there or of the batch, is in its way.

        Args:
            path: of its file.
            folder: the run's directory, in which that is.

        Raises:
            MlflowException: there is no place for it.
        """
        name = os.path.relpath(path, folder)
        if any(len(os.fsencode(part)) > _NAME_BYTES for part in name.split(os.sep)):
            msg = f"a file store has no place for {name!r}: a file's name has {_NAME_BYTES} bytes at most"
            raise MlflowException(msg, error_code=INVALID_PARAMETER_VALUE)
        above = [str(parent) for parent in Path(path).parents if len(str(parent)) > len(folder)]
        taken = path in self._folders or os.path.isdir(path)
        if taken or any(place in self._files or os.path.isfile(place) for place in above):
            raise _no_place(name)
        self._files.add(path)
        self._folders.update(above)


def _checked_id(given: str) -> str:
    """Return an id that is the name of one file or folder.

    Raises:
        MlflowException: it is none; what it leads to may be anywhere.
    """
    if given in {"", ".", ".."} or "/" in given or "\0" in given:
        msg = f"the id {printable(given)!r} would lead to another place"
        raise MlflowException(msg, error_code=INVALID_PARAMETER_VALUE)
    return given


def _dataset(metric: Metric) -> str:
    """Return what stands behind a point's line for its dataset."""
    is_whole = metric.dataset_name is not None and metric.dataset_digest is not None
    return f" {metric.dataset_name} {metric.dataset_digest}" if is_whole else ""


@contextlib.contextmanager
def _tags_beside_each_other() -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise _no_place(os.path.basename(str(error.filename))) from error


def _no_place(name: str) -> MlflowException:
    msg = f"a file store has no place for {name!r}: of it and another name, one would be a file and one a directory"
    return MlflowException(msg, error_code=INVALID_PARAMETER_VALUE)


@contextlib.contextmanager
def _opened(folder: str) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _described(folder: str) -> Iterator[None]:
    """Turn every failure to read a description into one that means "there is none", for MLflow and for ``boundary``."""
    try:
        yield
    except _NO_DESCRIPTION as error:
        msg = (
            f"{folder} has no readable {FileStore.META_DATA_FILE_NAME}: a process that wrote it was killed, or is at it"
        )
        raise MissingConfigException(msg, error_code=RESOURCE_DOES_NOT_EXIST) from error
