"""Artifact URIs, and whose they are.

Where an experiment keeps its files is for its maker to choose, so the places of runs and models look like anything:
what has been shown to readers is remembered, and a URI below it belongs to who it was shown for. One that comes from
elsewhere, a notebook's cell or another process, is told by its look: of an ``mlflow-artifacts:`` URI the ids in it
count, which are MLflow's, and never the folders around them, which are not.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.utils.uri import get_uri_scheme

from mlflow_outbox.spool import provisional

#: Schemes of artifact URIs that are directories.
LOCAL: Final = frozenset({"", "file"})
#: The tail of an artifact URI of MLflow's server: a run's, a model's, or a trace's behind the experiment's, if that is
#: where the files of experiments are by default.
_PROXIED: Final = re.compile(
    r"/(?:(?P<run>[0-9a-f]{32})|models/(?P<model>m-[^/]+)|(?:(?P<experiment>\d+)/)?traces/(?P<trace>tr-[^/]+))"
    r"/artifacts(?:/(?P<below>.*))?$",
    re.DOTALL,
)


class Places:
    """The places that were shown to readers as those of runs and models."""

    def __init__(self) -> None:
        self._roots: dict[str, tuple[str, str]] = {}

    def show(self, uri: str, kind: str, subject: str) -> None:
        """Remember a URI as that of a "run" or "model", by its id here."""
        self._roots[_path_of(uri)] = (kind, subject)

    def owner_of(self, uri: str) -> tuple[str, str, str] | None:
        """Return kind, id and folder of a place that was shown, or below one."""
        root, below = _path_of(uri), ""
        while root:
            owner = self._roots.get(root)
            if owner is not None:
                return (*owner, below)
            root, slash, last = root.rpartition("/")
            if not slash:
                break
            below = f"{last}/{below}" if below else last
        return None


def owner_by_look(uri: str) -> tuple[str, str, str]:
    """Return kind, id and folder of a place by its URI; a trace is kind "uri", and its id that of its experiment.

    Raises:
        MlflowException: it is neither of the outbox's own scheme nor one of MLflow's server.
    """
    if get_uri_scheme(uri) == provisional.ARTIFACT_SCHEME:
        found = provisional.URI_PATTERN.match(uri)
        if found and found[0].endswith("/artifacts"):
            below = uri[found.end() :].strip("/")
            return ("uri", found[2], "") if found[1] == "experiment" else (found[1], found[2], below)
    else:
        proxied = _PROXIED.search(_path_of(uri))
        if proxied and proxied["trace"]:
            return "uri", proxied["experiment"] or "", ""
        if proxied:
            below = proxied["below"] or ""
            return ("run", proxied["run"], below) if proxied["run"] else ("model", proxied["model"], below)
    msg = f"{uri} is no place for artifacts that this outbox knows"
    raise MlflowException(msg, error_code=RESOURCE_DOES_NOT_EXIST)


def root_of(uri: str, below: str) -> str:
    """Return a URI without the folder at its end."""
    return uri.rstrip("/").removesuffix(below).rstrip("/") if below else uri.rstrip("/")


def _path_of(uri: str) -> str:
    """Return an artifact URI without what may stand behind the path; a directory's name may have such characters."""
    if get_uri_scheme(uri) not in LOCAL:
        uri = urlsplit(uri)._replace(query="", fragment="").geturl()
    return uri.rstrip("/")
