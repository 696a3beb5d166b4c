"""Files of a run: where its ``artifact_uri`` points decides how they travel.

``mlflow-artifacts:`` goes through the tracking server, one PUT in one attempt. Everything else (a directory,
``s3:``, ``gs:`` and so on) goes through MLflow's repository for that scheme, which is told a file by its local
name; ours are called by their hash, so the repository gets a link with the right name in a private directory.

Two limits are the server's: it decodes percent escapes until none are left, so that ``a%20b`` is stored as ``a b``, and
it refuses names with ``#`` and finds no handler for those with a line break. Other characters are quoted here and
arrive.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import io
import mimetypes
import os
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from mlflow.protos.service_pb2 import ListArtifacts
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.utils.proto_json_utils import message_to_json
from mlflow.utils.uri import add_databricks_profile_info_to_artifact_uri

from mlflow_outbox.counters import printable
from mlflow_outbox.errors import InvalidEvent
from mlflow_outbox.interrupts import forward
from mlflow_outbox.spool.artifact_path import checked_artifact_path
from mlflow_outbox_worker.mlflow_sink.boundary import Refused, translate
from mlflow_outbox_worker.mlflow_sink.credentials import REFUSALS
from mlflow_outbox_worker.mlflow_sink.rest import Host, ServerStore, checked
from mlflow_outbox_worker.sink import SinkError

#: Bytes per second below which an upload is given up: it is slower than any link that is of use for artifacts.
LEAST_UPLOAD_RATE = 256 * 1024
#: Bytes by which a file may have grown since it was looked at; what is read back of it goes to a temporary directory.
_GROWN = 64 * 1024 * 1024
#: Where MLflow's server lists the files that it serves.
_SERVED = "/mlflow-artifacts/artifacts"
#: The name of a file that is uploaded to see whether files are taken, and deleted again.
PROBE = ".mlflow-outbox-probe"
_PROBE_TEXT = b"mlflow-outbox looks whether files are taken here. This one can be deleted.\n"
#: Characters of a path in a message, which has to have room for what the server said too.
_SHOWN = 120
#: Errors of a file system that the path of what is stored can cause.
_OF_PATHS = frozenset({errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST})
#: What boto3 raises for any answer to an upload; the answer is its context.
_BOTO_S_OWN = "S3UploadFailedError"
#: What S3 says with status 400 of a login that is over, and what its library raises where there is none.
_TOKENS = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired"})
_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError"})


class Artifacts:
    """Uploads and lists the files of runs of one tracking URI.

    Args:
        uri: the tracking URI, without credentials.
        host: the tracking server; None for embedded stores and Databricks.
        store: the store of the tracking server; None when there is none.
    """

    def __init__(self, uri: str, host: Host | None = None, store: ServerStore | None = None) -> None:
        self._uri = uri
        self._host = host
        self._store = store

    def upload(
        self, artifact_uri: str, file: Path, artifact_path: str, is_replaced: Callable[[Path], bool] = lambda _: False
    ) -> None:
        """Store a file under a run's artifact URI.

        Args:
            artifact_uri: of the run, model or trace.
            file: the content.
            artifact_path: relative POSIX path below the URI.
            is_replaced: asked where a file here has another content, with its path: whether that is a later one.
        """
        scheme = urlsplit(artifact_uri).scheme
        served = self._host is not None and scheme in {"mlflow-artifacts", "http", "https"}
        folder, name = posixpath.split(_checked_path(artifact_path, served=served))
        _readable(file)
        if self._host is not None and scheme == "mlflow-artifacts":
            self._put(MlflowArtifactsRepository.resolve_uri(artifact_uri, self._host.uri), file, artifact_path)
        elif self._host is not None and scheme in {"http", "https"}:
            with _of_storage():
                self._put(artifact_uri.rstrip("/"), file, artifact_path, mlflows=False)
        else:
            repository = self._repository(artifact_uri)
            place = None
            if isinstance(repository, LocalArtifactRepository):
                place = Path(repository.artifact_dir, folder, name)
            root = Path(repository.artifact_dir) if place is not None else None
            with _blaming_path(artifact_path, root), _named(file, name) as alias:
                if place is None or not _same(place, file):
                    if place is not None and place.is_file() and is_replaced(place):
                        return
                    if place is not None and place.is_dir():  # some of MLflow's versions would put it into that
                        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(place))
                    with _of_storage() if place is None else contextlib.nullcontext():
                        repository.log_artifact(str(alias), folder or None)
                if place is not None and _mode(place) == _mode(file):
                    # Our copy is private (0600) and the repository keeps modes; others read artifacts as a rule.
                    _default_mode(place, alias.parent)

    def takes(self, artifact_uri: str, file: Path | None) -> bool:
        """Return whether the server takes a file (None is a few bytes) under a name of its own; it is deleted again.

        Raises:
            SinkError: the server could not be asked.
        """
        if self._host is None or self._store is None or urlsplit(artifact_uri).scheme != "mlflow-artifacts":
            return False  # a place that says what it has against a file
        url = MlflowArtifactsRepository.resolve_uri(artifact_uri, self._host.uri)
        try:
            _twice(lambda: self._put(url, file, PROBE))
        except Refused:
            return False
        with contextlib.suppress(Refused, SinkError):  # then it stays there, and the next one takes its place
            creds = self._host.host_creds(url)
            checked(self._store.transport.request(creds, "DELETE", f"/{PROBE}"), f"DELETE {PROBE}")
        return True

    def download(self, artifact_uri: str, artifact_path: str, target: Path, size: int) -> None:
        """Store the content of an artifact as a new file; the size in bytes that it should have bounds the time."""
        path = _checked_path(artifact_path, served=False)
        scheme = urlsplit(artifact_uri).scheme
        if self._host is not None and self._store is not None and scheme in {"mlflow-artifacts", "http", "https"}:
            uri = artifact_uri.rstrip("/")
            url = uri if scheme != "mlflow-artifacts" else MlflowArtifactsRepository.resolve_uri(uri, self._host.uri)
            with target.open("xb") as file:
                answer = self._store.transport.request(
                    self._host.host_creds(url),
                    "GET",
                    "/" + quote(path, safe="/"),
                    allowance=size / LEAST_UPLOAD_RATE,
                    into=file,
                    most=size + _GROWN,
                )
            if not 200 <= answer.status < 300:  # noqa: PLR2004 - success, in whatever words
                checked(answer, f"GET {printable(path, _SHOWN)}")
            return
        with tempfile.TemporaryDirectory(prefix="mlflow-outbox-") as private:
            found = self._repository(artifact_uri).download_artifacts(path, private)
            shutil.copyfile(found, target)

    def list_folder(self, run_id: str, artifact_uri: str, folder: str) -> dict[str, int | None]:
        """Return path and size in bytes of the files directly in a folder."""
        if self._store is not None and urlsplit(artifact_uri).scheme == "mlflow-artifacts":
            return self._ask_server(self._store, run_id, folder)
        files = self._repository(artifact_uri).list_artifacts(folder or None)
        return {file.path: file.file_size for file in files if not file.is_dir}

    def size_of(self, artifact_uri: str, name: str) -> int | None:
        """Return the size in bytes of a file directly below an artifact URI; None when there is none of that name."""
        if self._host is not None and self._store is not None and urlsplit(artifact_uri).scheme == "mlflow-artifacts":
            url = MlflowArtifactsRepository.resolve_uri(artifact_uri, self._host.uri)
            root, _, folder = url.partition(_SERVED)
            answer = self._store.transport.request(
                self._host.host_creds(root), "GET", _SERVED, params={"path": folder.strip("/")}
            )
            files = checked(answer, f"GET {_SERVED}").get("files") or ()
            sizes = {file.get("path"): int(file.get("file_size") or 0) for file in files}
        else:
            sizes = {file.path: int(file.file_size or 0) for file in self._repository(artifact_uri).list_artifacts()}
        return sizes.get(name)

    def _put(self, url: str, file: Path | None, artifact_path: str, *, mlflows: bool = True) -> None:
        host, store = self._host, self._store
        if host is None or store is None:
            msg = "artifacts behind a tracking server need its URI"
            raise SinkError(msg, kind="not_mlflow", sent=False)
        endpoint = "/" + quote(artifact_path, safe="/")
        kind = mimetypes.guess_type(artifact_path)[0] or "application/octet-stream"
        with io.BytesIO(_PROBE_TEXT) if file is None else _opened(file) as content:
            size = content.seek(0, os.SEEK_END)
            content.seek(0)
            answer = store.transport.request(
                host.host_creds(url),
                "PUT",
                endpoint,
                allowance=size / LEAST_UPLOAD_RATE,
                # requests sends an empty file in chunks, which some servers wait for in vain.
                data=content if size else b"",
                extra_headers={"Content-Type": kind},
            )
        if mlflows or not 200 <= answer.status < 300:  # noqa: PLR2004 - success, in whatever words
            checked(answer, f"PUT {printable(artifact_path, _SHOWN)}", empty_is_success=True)

    @staticmethod
    def _ask_server(store: ServerStore, run_id: str, folder: str) -> dict[str, int | None]:
        files: dict[str, int | None] = {}
        token: str | None = None
        while True:
            request = ListArtifacts(run_id=run_id, run_uuid=run_id, path=folder or None, page_token=token)
            answer = store._call_endpoint(ListArtifacts, message_to_json(request))  # noqa: SLF001 - no public way to ask
            files.update({file.path: int(file.file_size) for file in answer.files if not file.is_dir})
            if not answer.next_page_token or answer.next_page_token == token:
                return files
            token = answer.next_page_token

    def _repository(self, artifact_uri: str) -> Any:
        uri = add_databricks_profile_info_to_artifact_uri(artifact_uri, self._uri)
        return get_artifact_repository(uri, tracking_uri=self._uri)


def _checked_path(path: str, *, served: bool) -> str:
    try:
        if path and path == checked_artifact_path(path, served=served) and path != ".":
            return path
        msg = f"the artifact path {printable(path)!r} is not a plain relative path"
    except InvalidEvent as error:
        msg = str(error)
    raise SinkError(msg, kind="answer", status=400, code="INVALID_PARAMETER_VALUE", sent=False)


def _readable(file: Path) -> None:
    if not file.is_file():
        msg = "the outbox's copy of the file is gone"
        raise SinkError(msg, kind="answer", status=400, code="INVALID_PARAMETER_VALUE", sent=False)


def _opened(file: Path) -> io.BufferedReader:
    """Open a file, and no link that was put in its place since it was looked at: the outbox may be somebody else's."""
    return os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")


@contextlib.contextmanager
def _named(file: Path, name: str) -> Iterator[Path]:
    """Give a file another name, in a directory that nobody else can read, without copying where that is possible.

    It leads to what was opened: to the file's path would be to a link, once one is put there (``_opened``).
    """
    with _opened(file) as content, tempfile.TemporaryDirectory(prefix="mlflow-outbox-") as private:
        alias = Path(private, name)
        try:
            alias.symlink_to(f"/proc/{os.getpid()}/fd/{content.fileno()}")
            if not os.path.samestat(alias.stat(), os.fstat(content.fileno())):  # another one's processes
                raise FileNotFoundError
        except OSError:
            alias.unlink(missing_ok=True)
            with alias.open("xb") as copy:
                shutil.copyfileobj(content, copy)
        yield alias


def _twice(attempt: Callable[[], None]) -> None:
    """Make a request again that got no answer: a server that said no may have dropped the connection with it."""
    try:
        attempt()
    except SinkError as error:
        if error.kind != "connection":
            raise
        attempt()


@contextlib.contextmanager
def _of_storage() -> Iterator[None]:
    """Let a storage's refusal be about the files that go there, and the run alone wait for a person.

    A login that it refuses is not the tracking server's, which may well admit who asks. What S3 refuses looks like a
    failure that passes, since boto3 puts an error of its own, without a status, in the place of the answer.
    """
    try:
        yield
    except Exception as error:
        forward(error)
        cause = error.__context__ if type(error).__name__ == _BOTO_S_OWN and error.__context__ is not None else error
        said = translate(cause)
        held = getattr(cause, "response", None)
        code = str(held.get("Error", {}).get("Code", "")) if isinstance(held, dict) else ""
        if said.status in REFUSALS or code in _TOKENS or type(cause).__name__ in _NO_CREDENTIALS:
            msg = f"the storage refuses the file: {said.described}"
            raise SinkError(msg, kind="answer", status=HTTPStatus.FORBIDDEN, code="PERMISSION_DENIED") from None
        if said.status == HTTPStatus.NOT_FOUND and cause is not error:  # the bucket
            raise said from None
        raise


@contextlib.contextmanager
def _blaming_path(path: str, root: Path | None) -> Iterator[None]:
    """Let an error of the file system that only the artifact's path can cause be an answer about the artifact.

    Such a path stays impossible however often it is tried: a part of it is too long, or is a file where a folder has
    to be, or the other way round. Above the run's own directory the same errors say that the store is broken, which
    passes.

    Args:
        path: of the artifact.
        root: the directory of the run's artifacts; None when they are in none.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_PATHS or root is None or not (root.is_dir() or error.errno == errno.ENAMETOOLONG):
            raise
        msg = f"the artifact {printable(path)!r} cannot be stored: {error.strerror}"
        raise SinkError(msg, kind="answer", status=400, code="INVALID_PARAMETER_VALUE") from None


def _same(place: Path, file: Path) -> bool:
    """Return whether a file is in its place already: a copy over it would be seen half-written by its readers."""
    try:
        return place.is_file() and filecmp.cmp(place, file, shallow=False)
    except OSError:
        return False


def _mode(file: Path) -> int:
    return file.stat().st_mode & 0o777


def _default_mode(artifact: Path, private: Path) -> None:
    """Give a stored artifact the mode that any new file gets here, without touching the umask of the process."""
    probe = private / ".mode"
    os.close(os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666))
    artifact.chmod(probe.stat().st_mode & 0o777)
