"""Everything that can be measured, behind one face: log metrics, a param, a tag; finish.

``open_tracker`` is called in a child process. A peer's own defaults are kept, except that it runs offline (without
an account or a server), without collecting system metrics, git state or terminal output, which the outbox does not
do either.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

#: Peers by the name of their distribution, with what they are called in tables.
PEERS = {
    "wandb": "W&B offline",
    "trackio": "Trackio",
    "swanlab": "SwanLab offline",
    "neptune-scale": "neptune-scale offline",
    "comet_ml": "Comet offline",
    "clearml": "ClearML offline",
    "aim": "Aim",
    "dvclive": "DVCLive",
    "tensorboardX": "tensorboardX",
}


class Tracker(NamedTuple):
    """What a tracker can do; None for what it cannot."""

    metric: Callable[[str, float, int], Any]
    metrics: Callable[[Mapping[str, float], int], Any] | None
    param: Callable[[str, str], Any] | None
    tag: Callable[[str, str], Any] | None
    finish: Callable[[], Any]


def open_tracker(name: str, directory: Path, uris: Mapping[str, str]) -> Tracker:
    """Open a tracker by its name.

    Args:
        name: a peer's, or "write", "write spaced", "write posting", "diskcache",
            "mlflow <sync|async> <http|sqlite>", "plugin <worker>" for MLflow through ``outbox+http``,
            "outbox <sync level> <worker> [destination]".
        directory: an empty directory for what it writes.
        uris: MLflow tracking URIs by "http", "sqlite".
    """
    kind, *rest = name.split()
    return _OPENERS[kind](directory, uris, *rest)


def _write(directory: Path, _uris: Mapping[str, str], _pace: str = "") -> Tracker:
    fd = os.open(directory / "bytes", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    one, write = b"x" * 38, os.write
    size = {1: 38, 10: 131, 100: 1220}  # bytes that the outbox writes for so many metrics in one call

    return Tracker(
        lambda _key, _value, _step: write(fd, one),
        lambda metrics, _step: write(fd, b"x" * size[len(metrics)]),
        lambda _key, _value: write(fd, one),
        lambda _key, _value: write(fd, one),
        lambda: os.close(fd),
    )


def _diskcache(directory: Path, _uris: Mapping[str, str]) -> Tracker:
    import diskcache

    cache = diskcache.Cache(
        str(directory / "cache"), eviction_policy="none", sqlite_journal_mode="wal", sqlite_synchronous=1
    )
    one, ten, many = b"x" * 28, b"x" * 121, b"x" * 1210
    size = {1: one, 10: ten, 100: many}
    return Tracker(
        lambda _key, _value, _step: cache.push(one),
        lambda metrics, _step: cache.push(size[len(metrics)]),
        lambda _key, _value: cache.push(one),
        lambda _key, _value: cache.push(one),
        cache.close,
    )


def _outbox(
    directory: Path, uris: Mapping[str, str], sync: str, worker: str = "none", destination: str = "http"
) -> Tracker:
    from mlflow_outbox import MLflowTracker, Settings

    tracker = MLflowTracker(
        "benchmark",
        uris.get(destination, "http://127.0.0.1:9"),
        outbox_dir=directory / "outbox",
        worker=worker,
        # A worker process outlives the experiment, which need not wait for it at its end.
        settings=Settings(sync=sync, exit_timeout=0.0 if worker == "process" else 60.0),
    )
    run = tracker.start_run("benchmark")

    def finish() -> None:
        run.end()
        if worker != "none" and not tracker.flush(120):
            raise RuntimeError("the outbox was not delivered within two minutes")

    return Tracker(run.log_metric, run.log_metrics, run.log_param, run.set_tag, finish)


def _plugin(directory: Path, uris: Mapping[str, str], worker: str) -> Tracker:
    os.environ["MLFLOW_OUTBOX_DIR"] = str(directory / "outbox")
    os.environ["MLFLOW_OUTBOX_WORKER"] = worker
    uri = f"outbox+{uris['http']}"
    tracker = _mlflow(directory, {"outbox": uri}, "sync", "outbox")

    def finish() -> None:
        from mlflow.tracking._tracking_service.utils import _get_store

        tracker.finish()
        if not _get_store(uri).outbox.flush(120):
            raise RuntimeError("the outbox was not delivered within two minutes")

    return tracker._replace(finish=finish)


def _mlflow(_directory: Path, uris: Mapping[str, str], manner: str, store: str) -> Tracker:
    import mlflow
    from mlflow.entities import Metric

    client = mlflow.MlflowClient(uris[store])
    found = client.get_experiment_by_name("benchmark")
    run = client.create_run(found.experiment_id if found else client.create_experiment("benchmark"))
    run_id, at_once = run.info.run_id, manner == "sync"

    def many(metrics: Mapping[str, float], step: int) -> Any:
        entities = [Metric(key, value, 0, step) for key, value in metrics.items()]
        return client.log_batch(run_id, entities, synchronous=at_once)

    def finish() -> None:
        if not at_once:
            mlflow.flush_async_logging()
        client.set_terminated(run_id)

    return Tracker(
        lambda key, value, step: client.log_metric(run_id, key, value, step=step, synchronous=at_once),
        many,
        lambda key, value: client.log_param(run_id, key, value, synchronous=at_once),
        lambda key, value: client.set_tag(run_id, key, value, synchronous=at_once),
        finish,
    )


def _wandb(directory: Path, _uris: Mapping[str, str]) -> Tracker:
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, save_code=False)
    run = wandb.init(project="benchmark", mode="offline", dir=str(directory), settings=settings)
    return Tracker(
        lambda key, value, step: run.log({key: value}, step=step),
        lambda metrics, step: run.log(dict(metrics), step=step),
        lambda key, value: run.config.update({key: value}, allow_val_change=True),
        None,
        run.finish,
    )


def _trackio(directory: Path, _uris: Mapping[str, str]) -> Tracker:
    os.environ["TRACKIO_DIR"] = str(directory / "trackio")
    import trackio

    trackio.init(project="benchmark", embed=False)
    return Tracker(
        lambda key, value, step: trackio.log({key: value}, step=step),
        lambda metrics, step: trackio.log(dict(metrics), step=step),
        None,
        None,
        trackio.finish,
    )


def _swanlab(directory: Path, _uris: Mapping[str, str]) -> Tracker:
    import swanlab

    swanlab.init(project="benchmark", mode="offline", logdir=str(directory / "swanlab"))
    return Tracker(
        lambda key, value, step: swanlab.log({key: value}, step=step),
        lambda metrics, step: swanlab.log(dict(metrics), step=step),
        None,
        None,
        swanlab.finish,
    )


def _neptune(directory: Path, _uris: Mapping[str, str]) -> Tracker:
    import neptune_scale

    run = neptune_scale.Run(
        run_id="benchmark",
        project="workspace/benchmark",
        mode="offline",
        log_directory=str(directory / "neptune"),
        enable_console_log_capture=False,
    )
    return Tracker(
        lambda key, value, step: run.log_metrics({key: value}, step=step),
        lambda metrics, step: run.log_metrics(dict(metrics), step=step),
        lambda key, value: run.log_configs({key: value}),
        lambda _key, value: run.add_tags([value]),
        run.close,
    )


def _comet(directory: Path, _uris: Mapping[str, str]) -> Tracker:
    import comet_ml

    off = dict.fromkeys(("log_git_metadata", "log_git_patch", "log_env_details", "log_code", "log_graph"), False)
    experiment = comet_ml.OfflineExperiment(
        project_name="benchmark",
        workspace="workspace",
        offline_directory=str(directory),
        auto_output_logging=False,
        display_summary_level=0,
        **off,
    )
    return Tracker(
        lambda key, value, step: experiment.log_metric(key, value, step=step),
        lambda metrics, step: experiment.log_metrics(dict(metrics), step=step),
        experiment.log_parameter,
        lambda _key, value: experiment.add_tag(value),
        experiment.end,
    )


def _clearml(directory: Path, _uris: Mapping[str, str]) -> Tracker:
    os.environ["CLEARML_CACHE_DIR"] = str(directory / "clearml")
    from clearml import Task

    Task.set_offline(offline_mode=True)
    task = Task.init(
        "benchmark",
        "benchmark",
        auto_connect_frameworks=False,
        auto_connect_streams=False,
        auto_resource_monitoring=False,
        auto_connect_arg_parser=False,
    )
    logger = task.get_logger()
    return Tracker(
        lambda key, value, step: logger.report_scalar(key, key, value, step),
        None,
        task.set_parameter,
        lambda _key, value: task.add_tags([value]),
        task.close,
    )


def _aim(directory: Path, _uris: Mapping[str, str]) -> Tracker:
    os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"  # its messages are older than today's protobuf
    import aim

    if not hasattr(aim, "Run"):
        msg = "the version that wheels alone give has no Run"
        raise RuntimeError(msg)
    run = aim.Run(repo=str(directory / "aim"), system_tracking_interval=None, capture_terminal_logs=False)
    return Tracker(
        lambda key, value, step: run.track(value, name=key, step=step),
        lambda metrics, step: run.track(dict(metrics), step=step),
        run.set,
        None,
        run.close,
    )


def _dvclive(directory: Path, _uris: Mapping[str, str]) -> Tracker:
    from dvclive import Live

    live = Live(dir=str(directory / "dvclive"), save_dvc_exp=False, report=None)

    def metric(key: str, value: float, step: int) -> None:
        live.step = step
        live.log_metric(key, value)

    return Tracker(metric, None, live.log_param, None, live.end)


def _tensorboard(directory: Path, _uris: Mapping[str, str]) -> Tracker:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(directory / "tensorboard"))
    return Tracker(writer.add_scalar, None, None, None, writer.close)


_OPENERS: dict[str, Callable[..., Tracker]] = {
    "write": _write,
    "diskcache": _diskcache,
    "outbox": _outbox,
    "mlflow": _mlflow,
    "plugin": _plugin,
    "wandb": _wandb,
    "trackio": _trackio,
    "swanlab": _swanlab,
    "neptune-scale": _neptune,
    "comet_ml": _comet,
    "clearml": _clearml,
    "aim": _aim,
    "dvclive": _dvclive,
    "tensorboardX": _tensorboard,
}
