"""Files: copied into the outbox when they are logged, read from the server with what has not arrived in front.

Three kinds of URI lead here.

* ``outbox-artifacts:/<outbox>/<kind>/<id>/artifacts`` is the outbox's own, for what has no address at the server yet.
* ``mlflow-artifacts:`` stays as the server gave it, so that what user code writes down is right; its repository is
  only ours while the tracking URI is an outbox, and MLflow's own otherwise.
* Everything else (``s3:``, a directory) stays as it is too. MLflow's client writes to such storage itself, so each
  scheme is claimed when the first URI of it is shown: below the places of this outbox's runs and models the repository
  is ours, elsewhere the one that was registered. Programs open what is in a directory: there a file is copied into
  the outbox, for replays, and in its place at once; the worker makes sure of it (``placement``).
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.store.artifact.artifact_repo import ArtifactRepository, verify_artifact_path
from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry, get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.utils.async_logging.run_operations import RunOperations
from mlflow.utils.uri import get_uri_scheme

from mlflow_outbox import delivery
from mlflow_outbox.errors import ArtifactRefused, InvalidEvent
from mlflow_outbox.interrupts import forward
from mlflow_outbox.plugin.journals import now_ms
from mlflow_outbox.plugin.places import LOCAL, owner_by_look, root_of
from mlflow_outbox.plugin.wrapped import Away
from mlflow_outbox.spool import placement, provisional
from mlflow_outbox.spool.artifact_path import checked_artifact_path
from mlflow_outbox.spool.directory import is_outbox
from mlflow_outbox.spool.events import Artifact, Event, FileFor
from mlflow_outbox.spool.snapshot import IN_USE, NO_ROOM, Snapshot, size_of

if TYPE_CHECKING:
    from mlflow_outbox.plugin.tracking_store import OutboxStore
    from mlflow_outbox.views import File

_PREFIX: Final = "outbox+"
#: Schemes of artifact URIs that lead through MLflow's server.
_SERVED: Final = frozenset({"mlflow-artifacts", "http", "https"})
#: Why a file is refused that is as it should be: trouble of the outbox's, for which no training is to end.
_OF_THE_OUTBOX: Final = frozenset({NO_ROOM, IN_USE})


class StagedArtifacts(ArtifactRepository):  # type: ignore[misc]  # mlflow is not followed by mypy
    """The files of one run, model or trace.

    Args:
        artifact_uri: as it was shown to readers.
        tracking_uri: the ``outbox+`` URI; None means MLflow's current one.
        registry_uri: not used.
    """

    def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        super().__init__(artifact_uri, tracking_uri, registry_uri)
        from mlflow.tracking._tracking_service.utils import _get_store

        self._store: OutboxStore = _get_store(tracking_uri if str(tracking_uri).startswith(_PREFIX) else None)
        owner: tuple[str, str, str] = self._store.places.owner_of(artifact_uri) or owner_by_look(artifact_uri)
        self._kind, self._id, self._below = owner
        scheme = get_uri_scheme(artifact_uri)
        self._place = LocalArtifactRepository(artifact_uri) if scheme in LOCAL else None
        destination = self._store.outbox.destination.scheme
        self._served = scheme in _SERVED or (scheme == provisional.ARTIFACT_SCHEME and destination in _SERVED)

    # -- writing

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        """Copy a file into the outbox; one for which that has no room is refused as an event is, counted and said.

        Raises:
            MlflowException: the path is none that MLflow takes, or the file cannot be copied.
            OSError: the file cannot be read.
        """
        verify_artifact_path(artifact_path)
        self._stage(local_file, artifact_path or "")
        self._store.arrivals.wait()

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Copy all files of a directory into the outbox, also those behind one that cannot be.

        Raises:
            MlflowException: the path is none that MLflow takes, or a file cannot be copied.
            OSError: a file cannot be read.
        """
        verify_artifact_path(artifact_path)
        refused: list[Exception] = []
        for folder, folders, names in os.walk(local_dir):
            folders[:] = sorted(name for name in folders if not is_outbox(os.path.join(folder, name)))
            below = Path(os.path.relpath(folder, local_dir)).as_posix()
            target = posixpath.normpath(posixpath.join(artifact_path or "", below))
            if self._place is not None:
                with contextlib.suppress(OSError):  # empty ones too, which the worker does not make
                    os.makedirs(os.path.join(self._place.artifact_dir, target), exist_ok=True)
            for name in sorted(names):
                try:
                    self._stage(os.path.join(folder, name), "" if target == "." else target)
                except (MlflowException, OSError) as error:
                    forward(error)
                    refused.append(error)
        self._store.arrivals.wait()
        if refused:
            raise refused[0]

    def _stage(self, file: str, folder: str) -> None:
        try:
            path = posixpath.join(self._below, folder, os.path.basename(file))
            path = checked_artifact_path(path, served=self._served)
            run = self._store.home_of(self._kind, self._id)
            limit = self._store.outbox.settings.artifact_bytes
            is_kept = run.append_with(
                min(size_of(file), limit),
                lambda store, hold: store.add_file(file, limit=limit, hold=hold),
                lambda kept: self._event(path, kept, file, folder),
            )
            if not is_kept:
                self._put_in_place(file, folder)  # the program may open it there all the same
        except (ArtifactRefused, InvalidEvent, OSError) as error:
            forward(error)
            if isinstance(error, ArtifactRefused) and error.__cause__ is not None:
                raise error.__cause__ from None  # it cannot be read, which is told as MLflow tells it
            if self._is_passed_over(error):
                self._put_in_place(file, folder)  # as above
                return
            raise MlflowException.invalid_parameter_value(f"the file {file!r} cannot be logged: {error}") from error

    def _is_passed_over(self, error: Exception) -> bool:
        """Return whether a file is refused for the outbox's sake, which is counted and said: the program goes on."""
        outbox = self._store.outbox
        if outbox.settings.strict or not isinstance(error, ArtifactRefused) or error.reason not in _OF_THE_OUTBOX:
            return False
        outbox.counters.add(f"refused_{error.reason}")
        outbox.counters.warn_once((error.reason, ""), f"mlflow-outbox: not logged: {error}")
        return True

    def _event(self, path: str, kept: Snapshot, file: str, folder: str) -> Event:
        placed = self._put_in_place(file, folder)  # first: an event that says so is true whenever the program dies
        if self._kind == "run":
            return Artifact(path, kept.sha256, kept.size, now_ms(), placed)
        return FileFor(self._owner_name(), path, kept.sha256, kept.size, now_ms(), placed)

    def _put_in_place(self, file: str, folder: str) -> str:
        """Copy a file to a directory where others open it; return which one, "" when the worker is to do it."""
        if self._place is None:
            return ""
        try:
            self._place.log_artifact(file, folder or None)
            return placement.identity(os.path.join(self._place.artifact_dir, folder))
        except (OSError, MlflowException) as error:
            forward(error)
            self._store.outbox.counters.add("files_not_placed")  # the worker will do it, or say why it cannot
            return ""

    def _owner_name(self) -> str:
        return f"model:{self._id}" if self._kind == "model" else f"uri:{root_of(self.artifact_uri, self._below)}"

    def _log_artifact_async(
        self, filename: str, artifact_path: str | None = None, artifact: Any = None
    ) -> RunOperations:
        """Copy an image into the outbox now: MLflow's own queue is memory."""
        with tempfile.TemporaryDirectory(prefix="mlflow-outbox-") as private:
            path = os.path.join(private, filename)
            if artifact is not None and hasattr(artifact, "save"):
                artifact.save(path)
            verify_artifact_path(artifact_path)
            self._stage(path, artifact_path or "")
        return RunOperations([])

    # -- reading

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        """Return files and folders directly in a folder.

        Raises:
            MlflowException: the path climbs or is absolute; the server is away, and the outbox has no file of it and
                did not see it begin; or the server said no.
        """
        folder = self._folder(path) if path else self._below
        local, pending = self._local()
        found: dict[str, FileInfo] = {}
        try:
            for info in self._remote_list(folder):
                found[info.path] = info
        except Away as away:
            if not local and not self._store.began_here(self._kind, self._id):
                raise self._store.server.needed("the list of artifacts", away) from None
            pending = local
        above = f"{folder}/" if folder not in {"", "."} else ""
        for name, file in pending.items():
            if not name.startswith(above):
                continue
            rest = name[len(above) :]
            head, _, below = rest.partition("/")
            shown = posixpath.join(folder, head)
            if self._place is not None and shown in found:
                continue  # as it is in its place, where the program may have gone on writing to it
            found[shown] = FileInfo(shown, is_dir=bool(below), file_size=None if below else file.size)
        cut = len(self._below) + 1 if self._below else 0
        infos = [FileInfo(info.path[cut:], info.is_dir, info.file_size) for info in found.values()]
        return sorted(infos, key=lambda info: info.path)

    def _folder(self, path: str) -> str:
        """Return the folder that a path names; a directory takes one that climbs within, MLflow's server none."""
        folder = posixpath.normpath(path)
        if folder.startswith("/") or ".." in (path if self._served else folder).split("/"):
            msg = f"Invalid path: {path!r}"
            raise MlflowException.invalid_parameter_value(msg)
        return posixpath.normpath(posixpath.join(self._below, folder))

    def download_artifacts(self, artifact_path: str, dst_path: str | None = None) -> str:
        """Return the local path of a file or folder: in its place where that is a directory, else of a copy.

        Args:
            artifact_path: relative to the URI.
            dst_path: where a copy is wanted; None leaves it to MLflow.

        Raises:
            MlflowException: the path climbs, there is no such file, or the server is away.
        """
        if self._place is not None and self._is_in_place(artifact_path):
            return str(self._place.download_artifacts(artifact_path, dst_path))
        return str(super().download_artifacts(artifact_path, dst_path))

    def _is_in_place(self, path: str) -> bool:
        """Return whether a file, or all that the outbox has of a folder, is where programs open it."""
        assert self._place is not None  # noqa: S101 - for the type checker; the caller asked
        root, folder = self._place.artifact_dir, self._folder(path) if path else self._below
        if not os.path.exists(os.path.join(root, path)):
            return False
        local, _ = self._local()
        below = [name for name in local if name == folder or not folder or name.startswith(f"{folder}/")]
        return all(os.path.isfile(os.path.join(root, posixpath.relpath(name, self._below or "."))) for name in below)

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        if self._place is not None and os.path.isfile(os.path.join(self._place.artifact_dir, remote_file_path)):
            self._place._download_file(remote_file_path, local_path)
            return
        path = posixpath.join(self._below, remote_file_path)
        local, pending = self._local()
        if path in pending and self._copied(pending[path], local_path):
            return
        try:
            self._download(path, local_path, quick=path in local)
        except Away as away:
            if path in local and self._copied(local[path], local_path):
                return
            if path not in local and self._store.began_here(self._kind, self._id):
                msg = f"No such artifact: {path!r}"
                raise MlflowException(msg, error_code=RESOURCE_DOES_NOT_EXIST) from None
            raise self._store.server.needed(f"the artifact {path!r}", away) from None

    def _download(self, path: str, local_path: str, *, quick: bool) -> None:
        repository = self._repository(quick=quick)
        try:
            repository._download_file(path, local_path)
        except (MlflowException, OSError) as error:
            forward(error)
            _check_silence(error)
            raise

    def _copied(self, file: File, target: str) -> bool:
        directory = self._store.outbox.directory
        home = self._store.home_of(self._kind, self._id).run_id
        for parent in (directory.runs, directory.delivered):
            copy = parent / home / "files" / file.sha256
            if copy.is_file():
                shutil.copyfile(copy, target)
                return True
        return False

    def delete_artifacts(self, artifact_path: str | None = None) -> None:
        """Delete artifacts at the server, which has to be there.

        Raises:
            MlflowException: the server is away, or said no.
        """
        self._store.settle()  # a file that arrives later would be there again
        try:
            self._repository().delete_artifacts(posixpath.join(self._below, artifact_path or "") or None)
        except Away as away:
            raise self._store.server.needed("deleting artifacts", away, call="delete_artifacts") from None

    def _local(self) -> tuple[dict[str, File], dict[str, File]]:
        """Return the files that the outbox knows of, and those of them that the server does not have yet."""
        home = self._store.home_of_files(self._kind, self._id)
        if home is None:
            return {}, {}
        return self._store.files(home, "" if self._kind == "run" else self._owner_name())

    def _remote_list(self, folder: str) -> list[FileInfo]:
        repository = self._repository(quick=self._store.began_here(self._kind, self._id))
        try:
            return list(repository.list_artifacts(folder or None))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return []
            _check_silence(error)
            raise
        except OSError as error:  # requests' errors are OSErrors too
            forward(error)
            raise Away(str(error), sent=False) from None

    def _repository(self, *, quick: bool = False) -> Any:
        """Return MLflow's own repository for these files, after the server has answered one question.

        Args:
            quick: wait for that no longer than ``create_timeout``, because the disk can answer.

        Raises:
            Away: it did not, or does not know the owner yet.
        """
        root = root_of(self.artifact_uri, self._below)
        uri = self._store.remote_location(self._kind, self._id, root, quick=quick)
        return get_artifact_repository(
            uri, tracking_uri=self._store.outbox.destination.secret_uri or self._store.server.uri
        )


def _check_silence(error: Exception) -> None:
    """Look whether an error of MLflow's client says that the server has gone away since the question before.

    Raises:
        Away: it does.
    """
    found = delivery.translate(error)
    if found.kind in {"connection", "timeout"}:
        raise Away(str(found), sent=False) from None


class _Claimed:
    """What makes the repositories of a scheme: ours for the runs of an outbox, the one registered for all else."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def __call__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> Any:
        from mlflow.tracking import get_tracking_uri
        from mlflow.tracking._tracking_service.utils import _get_store

        uri = str(tracking_uri or get_tracking_uri())
        places = getattr(_get_store(uri), "places", None) if uri.startswith(_PREFIX) else None  # none when switched off
        if places is not None and places.owner_of(artifact_uri):
            return StagedArtifacts(artifact_uri, uri, registry_uri)
        if places is not None and get_uri_scheme(artifact_uri) not in LOCAL:  # where programs open the files
            from mlflow_outbox.plugin import folders  # it imports this module

            if places.owner_of(folders.files_in(artifact_uri)):
                return folders.FolderOfFiles(artifact_uri, uri, registry_uri)
        return self._theirs(artifact_uri, tracking_uri, registry_uri)


def claim(scheme: str) -> None:
    """Let MLflow ask here for the repositories of a scheme; one that it does not know it goes on not knowing."""
    schemes = _artifact_repository_registry._registry
    theirs = schemes.get(scheme)
    if theirs is not None and not isinstance(theirs, _Claimed):
        schemes[scheme] = _Claimed(theirs)
