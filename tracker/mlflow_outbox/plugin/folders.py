"""The folder that the files of a run, a model or a trace are in, under the name of ``artifacts``.

MLflow downloads what a URI names by its last part, from the folder before that. So whoever asks for all files of a
run by their URI, ``download_artifacts(artifact_uri=run.info.artifact_uri)``, asks in a place that is nobody's.
"""

from __future__ import annotations

import contextlib
import posixpath
from typing import Any, Final

from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.store.artifact.artifact_repo import ArtifactRepository

from mlflow_outbox.plugin.artifacts import StagedArtifacts
from mlflow_outbox.plugin.base import UNKNOWN

_NAME: Final = "artifacts"


class FolderOfFiles(ArtifactRepository):  # type: ignore[misc]  # mlflow is not followed by mypy
    """The folder of one run, model or trace; the arguments are those of ``StagedArtifacts``.

    Raises:
        MlflowException: there are no files of anybody's in it.
    """

    def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        super().__init__(artifact_uri, tracking_uri, registry_uri)
        self._files = StagedArtifacts(files_in(artifact_uri), tracking_uri, registry_uri)

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        """Copy a file into the outbox."""
        self._files.log_artifact(local_file, _below(artifact_path) or None)

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Copy all files of a directory into the outbox."""
        self._files.log_artifacts(local_dir, _below(artifact_path) or None)

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        """Return files and folders directly in a folder."""
        if not path:
            return [FileInfo(_NAME, is_dir=True, file_size=None)]
        found = self._files.list_artifacts(_below(path) or None)
        return [FileInfo(posixpath.join(_NAME, info.path), info.is_dir, info.file_size) for info in found]

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        self._files._download_file(_below(remote_file_path), local_path)


def files_in(uri: str) -> str:
    """Return the URI of the files that are in a folder."""
    return f"{uri.rstrip('/')}/{_NAME}"


def repository(artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> Any:
    """Return the repository of a place, or of the folder that one is in.

    Raises:
        MlflowException: it is neither.
    """
    try:
        return StagedArtifacts(artifact_uri, tracking_uri, registry_uri)
    except MlflowException as error:
        if error.error_code == UNKNOWN:
            with contextlib.suppress(MlflowException):
                return FolderOfFiles(artifact_uri, tracking_uri, registry_uri)
        raise


def _below(path: str | None) -> str:
    """Return a path in the folder as one among the files.

    Raises:
        MlflowException: nothing else is there.
    """
    head, _, rest = posixpath.normpath(path or "").partition("/")
    if head != _NAME:
        msg = f"No such artifact: {path!r}"
        raise MlflowException(msg, error_code=RESOURCE_DOES_NOT_EXIST)
    return rest
