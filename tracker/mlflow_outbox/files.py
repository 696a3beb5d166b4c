"""Files of a run, as the experiment gives them: a path, a directory, a text, an object or a figure.

Each is copied into the run's directory as it is now, under the digest of its content, and becomes an ``Artifact``
event. What can be no artifact is an ``EventRefused``. While new events are refused nothing is copied, and the copy of
an event that is refused all the same is removed: what no event names would take room for nothing.
"""

from __future__ import annotations

import io
import os
import posixpath
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_outbox.counters import printable, shown
from mlflow_outbox.errors import ArtifactRefused, InvalidEvent, InvalidEventType
from mlflow_outbox.interrupts import forward
from mlflow_outbox.jsontext import Reader
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.artifact_path import checked_artifact_path
from mlflow_outbox.spool.directory import is_outbox
from mlflow_outbox.spool.enclosure import append_enclosing
from mlflow_outbox.spool.events import Artifact
from mlflow_outbox.spool.snapshot import Hold, Snapshot, SnapshotStore, size_of

if TYPE_CHECKING:
    from mlflow_outbox.spool.journal import Journal


class RunFiles:
    """Copies the files of one run, and logs them; the methods return whether a file was kept.

    Args:
        journal: the run's; None keeps nothing. What it refuses it has counted.
        settings: sync level, and bytes that all copies together may have.
        now_ms: wall-clock milliseconds since the epoch, for the event.
        unreadable: told what is left out of a document, and why.
    """

    def __init__(
        self,
        journal: Journal | None,
        settings: Settings,
        now_ms: Callable[[], int],
        unreadable: Callable[[str, str], object],
    ) -> None:
        self._journal = journal
        self._settings = settings
        self._now_ms = now_ms
        self._unreadable = unreadable

    def copy(self, path: str | os.PathLike[str], artifact_path: str | None) -> bool:
        """Copy a regular file.

        Raises:
            EventRefused: it is none, cannot be read, or there is no room for it.
        """
        folder = checked_artifact_path(artifact_path or "")
        name = os.path.basename(os.path.abspath(_path_text(path)))
        target = checked_artifact_path(posixpath.join(folder, name), what="file name")
        limit = self._settings.artifact_bytes
        return self._log(
            target, min(size_of(path), limit), lambda store, hold: store.add_file(path, limit=limit, hold=hold)
        )

    def text(self, text: object, artifact_file: object) -> bool:
        """Copy a string, as UTF-8.

        Raises:
            EventRefused: it is none, or there is no room for it.
        """
        if not isinstance(text, str):
            msg = f"log_text takes a string for {printable(artifact_file)!r}, not a {type(text).__name__}"
            raise InvalidEventType("bad_value", msg)
        return self._bytes(text.encode("utf-8", "surrogatepass"), artifact_file)

    def document(self, content: Any, artifact_file: object) -> bool:
        """Copy a mapping or list, as JSON, or as YAML when the name ends so.

        Raises:
            EventRefused: it cannot be written so, or there is no room for it.
        """
        reader = Reader()
        text = reader.json_text(content, _path_text(artifact_file), whole=True)
        if text is None:
            msg = f"the object for {printable(artifact_file)!r} cannot be written as JSON: {reader.refused[-1][1]}"
            raise InvalidEventType("bad_value", msg)
        for thing, reason in reader.refused:
            self._unreadable(thing, reason)
        if str(artifact_file).lower().endswith((".yaml", ".yml")):
            import json

            import yaml  # a dependency of mlflow; nobody pays for it who does not ask for YAML

            text = yaml.safe_dump(json.loads(text), sort_keys=False, allow_unicode=True)
        return self._bytes(text.encode("utf-8", "surrogatepass"), artifact_file)

    def figure(self, figure: Any, artifact_file: object) -> bool:
        """Copy a figure, rendered in the format that the name's extension says.

        Raises:
            EventRefused: it cannot be rendered, or there is no room for it.
        """
        return self._bytes(_rendered(figure, artifact_file), artifact_file)

    def _bytes(self, data: bytes, artifact_file: object) -> bool:
        target = checked_artifact_path(_path_text(artifact_file), what="artifact file")
        if target in {"", "."}:
            msg = "the artifact file has no name; give one such as 'notes.txt'"
            raise InvalidEvent("bad_path", msg)
        limit = self._settings.artifact_bytes
        return self._log(
            target, len(data), lambda store, hold: store.add_bytes(data, limit=limit, name=target, hold=hold)
        )

    def _log(self, target: str, size: int, copy: Callable[[SnapshotStore, Hold], Snapshot]) -> bool:
        if self._journal is None:
            return False
        return append_enclosing(
            *(self._journal, self._settings.sync, size, copy),
            lambda kept: Artifact(target, kept.sha256, kept.size, self._now_ms()),
        )


def files_below(
    directory: str | os.PathLike[str], artifact_path: str | None, unreadable: Callable[[ArtifactRefused, str], object]
) -> Iterator[tuple[str, str]]:
    """Yield every file of a directory and those below it, with its folder among the artifacts, in a stable order.

    Args:
        directory: the directory; links to directories in it are not followed, and outboxes in it are left out: the
            program's own may be in its current directory.
        artifact_path: folder for its content; None is their root.
        unreadable: called with the reason and the path of each directory that cannot be read.

    Raises:
        EventRefused: it is no directory, or the folder is no path.
    """
    target = checked_artifact_path(artifact_path or "")
    root = _path_text(directory)
    if not os.path.isdir(root):
        msg = f"{printable(root)!r} is not a directory; use log_artifact for a file"
        raise ArtifactRefused("bad_file", msg)

    def report(error: OSError) -> None:
        forward(error)
        msg = f"the directory {printable(error.filename)!r} cannot be read: {error.strerror}"
        unreadable(ArtifactRefused("bad_file", msg), shown_path(error.filename))

    for folder, folders, files in os.walk(root, onerror=report):
        folders[:] = sorted(name for name in folders if not is_outbox(os.path.join(folder, name)))
        below = os.path.relpath(folder, root)
        place = target if below == "." else posixpath.join(target, Path(below).as_posix())
        for name in sorted(files):
            yield os.path.join(folder, name), place


def shown_path(path: object) -> str:
    """Return what a message can show of something given as a path."""
    try:
        return printable(os.fspath(path))  # type: ignore[call-overload]  # what is no path is told below
    # __fspath__ of a host's object may raise anything; what refuses the path says and counts that.
    except Exception as error:  # noqa: BLE001
        forward(error)
        return type(path).__name__


def _path_text(path: object) -> str:
    try:
        text = os.fspath(path)  # type: ignore[call-overload]  # what is no path is refused below
    except TypeError:
        msg = f"{printable(repr(path))} is no path but a {type(path).__name__}"
        raise InvalidEventType("bad_path", msg) from None
    return os.fsdecode(text)


def _rendered(figure: Any, artifact_file: object) -> bytes:
    """Return a figure as bytes in the format that the name's extension says."""
    kind = os.path.splitext(_path_text(artifact_file))[1].lower().lstrip(".")
    target = io.BytesIO()
    try:
        if hasattr(figure, "savefig"):
            figure.savefig(target, format=kind or "png", bbox_inches="tight")
            return target.getvalue()
        if kind in {"html", "htm"} and hasattr(figure, "to_html"):
            return str(figure.to_html(include_plotlyjs="cdn")).encode()
        if hasattr(figure, "to_image"):
            return bytes(figure.to_image(format=kind or "png"))
        if hasattr(figure, "save"):
            figure.save(target, format=_format_of(figure, kind or "png"))
            return target.getvalue()
    except Exception as error:  # noqa: BLE001 - any plotting library may raise anything; refused and counted
        msg = f"the figure for {printable(artifact_file)!r} could not be rendered: {shown(error, 200)}"
        raise InvalidEvent("bad_figure", msg) from None
    msg = f"the figure for {printable(artifact_file)!r} is a {type(figure).__name__}; use a matplotlib or plotly figure"
    raise InvalidEventType("bad_figure", msg)


def _format_of(image: Any, extension: str) -> str:
    """Return what PIL calls the format of files with an extension; of another library's image, the extension."""
    pil = sys.modules.get("PIL.Image") if type(image).__module__.partition(".")[0] == "PIL" else None
    known: dict[str, str] = pil.registered_extensions() if pil is not None else {".jpg": "jpeg"}
    return known.get(f".{extension}", extension)
