"""What a process of ours may lack of what MLflow takes for granted: a current directory, and a home.

The current directory may be deleted under it, as the scratch directory of a job is. Nothing that a worker does needs
it, but MLflow's stores and Python's ``tempfile`` ask for it as they are opened. It is left only where it is gone: an
environment variable may name a file relative to it, such as a certificate.

A user without an entry in ``/etc/passwd``, as in a container, may have no ``HOME``; MLflow cannot be imported then.

The process of an experiment is not ours to change in either way.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow_outbox_worker.sink import Sink

_ROOT = "/"


def settle() -> None:
    """Let this process have the root directory in place of what it lacks."""
    try:
        os.getcwd()
    except OSError:
        with contextlib.suppress(OSError):
            os.chdir(_ROOT)
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = _ROOT


def open_sink(*arguments: Any, **named: Any) -> Sink:
    """Settle, as often as MLflow's sink is opened (``mlflow_sink.open_sink``), and open it."""
    settle()
    from mlflow_outbox_worker.mlflow_sink import open_sink as mlflow  # imports nothing of mlflow yet

    return mlflow(*arguments, **named)
