"""Outboxes as each release has left them, half delivered: what a newer version must read for ever.

``tests/faults/releases/<version>/`` holds one, with the file store that it was delivering to:

* run "half" was delivered in part, as its ledger says, with one dead letter, and has more to deliver
* run "waiting" was logged after that, in several segments, and ended
* run "killed" was being logged when its writer was killed, in the middle of a frame

Each release adds its own and never changes one that is there; from the top of the checkout::

    PYTHONPATH=tests .venv/bin/python -m faults.older tests/faults/releases/0.1.0

Git keeps neither private modes nor empty directories, and a path is absolute: ``unpacked`` puts that right in a copy.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Final

from contents import client, the_run
from faults import workload
from faults.oracle import log_event
from mlflow_outbox import MLflowTracker

RELEASES: Final = Path(__file__).with_name("releases")
EXPERIMENT: Final = "older"
#: Events of each run, by number; of the first, those before the middle one were delivered.
EVENTS: Final = {"half": range(60), "waiting": range(100, 160), "killed": range(200, 220)}
MIDDLE: Final = 30
#: The event that is a dead letter: a param that had another value in MLflow.
DEAD: Final = 23
#: What stands for the absolute path of the folder in files that are kept.
_PLACE: Final = "/somewhere"


def make(folder: Path) -> None:
    """Log and deliver, and leave an outbox in the state that the module describes."""
    folder.mkdir(parents=True)
    uri = (folder / "store").as_uri()
    given = workload.settings(**workload.TINY)
    tracker = MLflowTracker(EXPERIMENT, uri, outbox_dir=folder / "outbox", settings=given)
    half = tracker.start_run("half")
    log_event(half, 0)
    _delivered(tracker)
    with client(uri) as mlflow:
        mlflow.log_param(the_run(uri, EXPERIMENT).info.run_id, f"p{DEAD}", "another")
    for number in range(1, MIDDLE):
        log_event(half, number)
    _delivered(tracker)
    tracker.close(5)

    later = MLflowTracker(EXPERIMENT, uri, outbox_dir=folder / "outbox", worker="none", settings=given)
    half = later.start_run(run_id=half.run_id)
    for number in range(MIDDLE, 60):
        log_event(half, number)
    half.end("FAILED")
    waiting, killed = later.start_run("waiting"), later.start_run("killed")
    for run in (waiting, killed):
        for number in EVENTS["waiting" if run is waiting else "killed"]:
            log_event(run, number)
    waiting.end()
    _keep(folder, Path(str(later.outbox_path)), killed.run_id)  # while its writer lives: as a kill would leave it
    later.close(0)
    shutil.rmtree(folder / "outbox")
    os.rename(folder / "kept", folder / "outbox")


def _delivered(tracker: MLflowTracker) -> None:
    left = tracker.flush(30)
    assert left.pending == 0, left


def _keep(folder: Path, outbox: Path, killed: str) -> None:
    """Copy an outbox without what no reader needs and what is this machine's; tear the killed run's last frame."""
    kept = folder / "kept"
    shutil.copytree(outbox, kept, ignore=shutil.ignore_patterns("worker.lock", "doorbell", "hurry", "reserve"))
    for path in [kept / "outbox.json", *(folder / "store").rglob("meta.yaml")]:
        path.write_text(path.read_text().replace(str(folder), _PLACE))
    last = max((kept / "runs" / killed).glob("*.log"))
    os.truncate(last, last.stat().st_size - 2)


def _as_nobody() -> None:
    """Let nothing of this machine get into what is kept."""
    real = os.uname()
    name = os.uname_result((real.sysname, "host", real.release, real.version, real.machine))
    os.uname = lambda: name
    sys.argv[0] = "train.py"


def unpacked(release: Path, folder: Path) -> tuple[str, Path]:
    """Copy what a release left to a folder where it can be delivered; return the store's URI and the outbox."""
    shutil.copytree(release, folder)
    for tags in (folder / "store").glob("*/*/tags"):
        (tags.parent / "artifacts").mkdir(exist_ok=True)  # without it MLflow takes the directory for no run
    for path in [folder / "outbox", *(folder / "outbox").rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)
        os.utime(path, (1, 1))  # its writers are gone for long
    for path in [folder / "outbox" / "outbox.json", *(folder / "store").rglob("meta.yaml")]:
        path.write_text(path.read_text().replace(_PLACE, str(folder)))
    assert json.loads((folder / "outbox" / "outbox.json").read_text())["destination"] == (folder / "store").as_uri()
    return (folder / "store").as_uri(), folder / "outbox"


if __name__ == "__main__":
    target = Path(sys.argv[1]).absolute()
    _as_nobody()
    make(target)
