"""Every example, as a user runs it: plain, with the outbox, with the server away, and killed in the middle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox.testing.proxy import Action, Exchange, FaultProxy
from plugin_world import deliver, differences, picture, tracking
from servers import MlflowServer

_EXAMPLES = Path(__file__).parent.parent.parent / "examples"
#: Experiments by example.
_EXPERIMENTS = {
    "sklearn_autolog": "sklearn example",
    "xgboost_autolog": "xgboost example",
    "lightgbm_autolog": "lightgbm example",
    "optuna_study": "optuna example",
    "lightning_trainer": "lightning example",
    "hf_trainer": "transformers example",
    "keras_fit": "keras example",
}


#: Metrics that tell the time.
_OF_THE_CLOCK = ("runtime", "per_second")


def run(example: str, uri: str, outbox: Path) -> None:
    """Run one example; its working directory is a new one."""
    outbox.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(_EXAMPLES / f"{example}.py")],
        cwd=outbox,
        env={
            **os.environ,
            "MLFLOW_TRACKING_URI": uri,
            "MLFLOW_OUTBOX_DIR": str(outbox),
            "MLFLOW_OUTBOX_EXIT_TIMEOUT": "5",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert 0 == done.returncode, done.stdout + done.stderr


def shape(server: MlflowServer, example: str) -> dict[str, Any]:
    """Return what a training of an example left behind: all but measured times, sizes, and names of directories."""
    shown = picture(server.url, _EXPERIMENTS[example])
    for one in shown["runs"]:
        one["metrics"] = {
            key: [step if key.endswith(_OF_THE_CLOCK) else (step, value) for step, value in points]
            for key, points in one["metrics"].items()
        }
        one["files"] = [name for name, _ in one["files"]]
        one["params"] = {key: value for key, value in one["params"].items() if "dir" not in key}
        one["tags"] = _without_history(one["tags"])
    for model in shown["models"]:
        model["tags"] = _without_history(model["tags"])
    return shown


def _without_history(tags: dict[str, str]) -> dict[str, str]:
    """Return tags without those that a commit made meanwhile, or a second model, changes."""
    return {key: value for key, value in tags.items() if ".git." not in key and key != "mlflow.log-model.history"}


_plain: dict[str, dict[str, Any]] = {}


def plain_shape(server: MlflowServer, example: str, directory: Path) -> dict[str, Any]:
    """Return what an example leaves behind without an outbox; trained once."""
    if example not in _plain:
        run(example, server.url, directory)
        _plain[example] = shape(server, example)
    return _plain[example]


def killing(server: MlflowServer) -> Action:
    """Return what a proxy does to a request: the server carries it out, and is killed before anybody hears of it."""

    def kill(exchange: Exchange) -> None:
        exchange.fetch()
        server.kill()
        exchange.proxy.down()

    return Action("kill", kill)


@pytest.mark.parametrize("example", list(_EXPERIMENTS))
@pytest.mark.parametrize("mode", ["up", "away", "killed in the middle"])
def test_an_example_leaves_the_same_behind_with_an_outbox(
    mode: str, example: str, mlflow_server: MlflowServer, own_mlflow_server: Any, tmp_path: Path
) -> None:
    """Field by field: runs, points and their values, params, tags, files, datasets, models, traces."""
    expected = plain_shape(mlflow_server, example, tmp_path / "plain")
    through = own_mlflow_server()
    with FaultProxy(through.url) as proxy:
        uri = f"outbox+{proxy.url}"
        if mode == "away":
            proxy.down()
        elif "killed" in mode:
            proxy.on("runs/log-batch", killing(through))
        run(example, uri, tmp_path / "outbox")
        if "killed" in mode:
            assert not through.is_alive()
            through.start()
        proxy.up()
        with tracking(uri, tmp_path / "outbox"):
            deliver(uri)
    assert [] == differences(expected, shape(through, example))
