"""What MLflow takes for granted and a process of ours may lack: a current directory, a home, warnings that only warn.

The current directory may be deleted under it, as the scratch directory of a job is. Nothing that a worker does needs
it, but MLflow's stores and Python's ``tempfile`` ask for it as they are opened. It is left only where it is gone: an
environment variable may name a file relative to it, such as a certificate.

A user without an entry in ``/etc/passwd``, as in a container, may have no ``HOME``; MLflow cannot be imported then.

NumPy's OpenBLAS starts a thread for each processor as MLflow imports it, and where there is none left, as when data
loaders have used up a limit, it ends the process by a SIGINT. Nothing is computed here, so it is told to start none.

``PYTHONWARNINGS=error`` is meant for a program's own code. Such a process inherits it, and MLflow's libraries warn.

The process of an experiment is not ours to change in any of these ways.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mlflow_outbox_worker.sink import Sink

_ROOT = "/"
#: What a process of ours has in its environment before it imports MLflow.
NO_THREADS: Final = {"OPENBLAS_NUM_THREADS": "1"}


def settle() -> None:
    """Let this process have what it lacks: the root directory, as both, and Python's own treatment of warnings."""
    if any(action == "error" for action, *_ in warnings.filters):
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
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
