"""What a path of an artifact may be, whoever keeps it: inside of its run, on every system, and as MLflow takes it."""

from __future__ import annotations

import os
import posixpath
import re
from typing import Final
from urllib.parse import unquote

from mlflow_outbox.counters import printable
from mlflow_outbox.errors import InvalidEvent, InvalidEventType

#: Bytes of a path: what file systems take (4096), less room for the folder of a run.
_MAX_PATH: Final = 3500
#: Bytes of one part of a path that file systems take; a server that keeps artifacts in one would answer 500 for ever.
_MAX_PART: Final = 255
#: Times that a path is decoded; nobody encodes a name so often.
_MOST_DECODED: Final = 10
#: What leads to another place on a Windows machine too, where a colon ends a drive's name.
_ABSOLUTE: Final = re.compile(r"[/\\]|[A-Za-z]:[/\\]")
_SEPARATORS: Final = re.compile(r"[/\\:]")
#: What MLflow's server refuses in the path of a file, however it is encoded, or finds no handler for.
_NOT_SERVED: Final = re.compile(r"[#\n]")


def checked_artifact_path(path: str | os.PathLike[str], *, what: str = "artifact path", served: bool = True) -> str:
    """Return an artifact path in MLflow's form, checked to stay inside the run's artifacts.

    The checks are made at the call and again before delivery, because the journal may come from another machine.
    Percent signs are decoded as often as they decode to something else, since a server may do so too
    (mlflow/utils/uri.py, validate_path_is_safe), and what comes of it is checked as it is and in MLflow's form. A
    backslash counts as a slash there, and a letter with a colon before either as absolute, as MLflow's server has it:
    the files may be kept, or be fetched, by a machine with Windows. Such characters alone are a name like any other,
    and so are invisible ones: MLflow takes them.

    Args:
        path: relative.
        what: it is called so in an error.
        served: the file goes through MLflow's server, or may do so; storage that is written to itself takes more names.

    Raises:
        InvalidEvent: it is absolute, climbs out, is too long, or has characters that MLflow's servers refuse.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    shown = printable(text)
    if not isinstance(text, str):
        msg = f"the {what} {shown!r} must be text, not {type(text).__name__}"
        raise InvalidEventType("bad_path", msg)
    found = posixpath.normpath(text) if text else ""
    for start in dict.fromkeys((text, found)):
        problem = _problem_decoded(start, served=served)
        if problem:
            msg = f"the {what} {shown!r} {problem}; use a relative path such as 'plots/loss.png'"
            raise InvalidEvent("bad_path", msg)
    if found.startswith("..") and "/" in found:  # mlflow/utils/validation.py, path_not_unique: of the folder, as it is
        msg = f"the {what} {shown!r} is in a folder whose name begins with '..', which MLflow does not take; rename it"
        raise InvalidEvent("bad_path", msg)
    return found


def stored_names(path: str) -> list[str]:
    """Return the names that a file may have where it is stored: its own, and those of which a server has decoded it."""
    found = [path]
    while (text := unquote(found[-1])) != found[-1]:
        found.append(text)
    return found


def _problem_decoded(text: str, *, served: bool) -> str | None:
    for _ in range(_MOST_DECODED):
        for form in dict.fromkeys((text, posixpath.normpath(text))):
            problem = _path_problem(form, served=served)
            if problem:
                return problem
        text, before = unquote(text), text
        if text == before:
            return None
    return "is encoded too often"


def _path_problem(text: str, *, served: bool) -> str | None:
    try:
        size, longest = len(text.encode()), max(len(part.encode()) for part in text.split("/"))
    except UnicodeEncodeError:
        return "is no Unicode"
    if size > _MAX_PATH:
        return f"has {size} bytes, more than {_MAX_PATH}"
    if longest > _MAX_PART:
        return f"has a part of {longest} bytes, more than {_MAX_PART}"
    if "\0" in text:
        return "holds a NUL"
    if served and _NOT_SERVED.search(text):
        return "holds a '#' or a line break, which MLflow's server does not take"
    if _ABSOLUTE.match(text):
        return "is absolute"
    if any(part.strip(" ") == ".." for part in _SEPARATORS.split(text)):
        return "climbs out of the run's artifacts"
    return None
