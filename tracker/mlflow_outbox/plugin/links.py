"""Where a run can be looked at in a browser: MLflow says so at the end of a run, but only for its own stores."""

from __future__ import annotations

import sys
from typing import Final

from mlflow.environment_variables import MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT

from mlflow_outbox.spool.events import NAME_TAG
from mlflow_outbox.views import RunView

#: MLflow shows the results of an evaluation itself.
_TYPE, _EVALUATION = "mlflow.runType", "genai_evaluate"
_SCHEMES: Final = ("http://", "https://")


def show(server: str, experiment_id: str, run_id: str, view: RunView) -> None:
    """Print the addresses of a run and its experiment, as MLflow does.

    Args:
        server: the tracking URI, without credentials; nothing is printed when it is none of a server.
        experiment_id: MLflow's id of the experiment.
        run_id: MLflow's id of the run.
        view: the run.
    """
    kind = view.tags.get(_TYPE)
    if not server.startswith(_SCHEMES) or MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.get():
        return
    if kind is not None and kind.value == _EVALUATION:
        return
    name = view.tags.get(NAME_TAG)
    experiment = f"{server.rstrip('/')}/#/experiments/{experiment_id}"
    shown = name.value if name is not None else view.name
    sys.stdout.write(f"🏃 View run {shown} at: {experiment}/runs/{run_id}\n🧪 View experiment at: {experiment}\n")
