"""The current directory of a process of ours, which may be deleted under it, as the scratch directory of a job is.

Nothing that a worker does needs it, but MLflow's stores and Python's ``tempfile`` ask for it as they are opened, and
fail where there is none. It is left only then: an environment variable may name a file relative to it, such as a
certificate. The process of an experiment is not ours to move.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from mlflow_outbox_worker.sink import Sink


def open_sink(*arguments: Any, **named: Any) -> Sink:
    """Open MLflow's sink (``mlflow_sink.open_sink``), from the root directory where the current one is gone."""
    try:
        os.getcwd()
    except OSError:
        with contextlib.suppress(OSError):
            os.chdir("/")
    from mlflow_outbox_worker.mlflow_sink import open_sink as mlflow  # imports nothing of mlflow yet

    return mlflow(*arguments, **named)
