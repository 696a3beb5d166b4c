"""The options that commands share, so that they are called, explained and understood alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from mlflow_outbox_worker.cli.declare import Option

OutboxDir = Annotated[
    Path | None,
    Option(
        "--outbox-dir",
        "-d",
        metavar="DIR",
        about="An outbox, or a directory with several.",
        default="MLFLOW_OUTBOX_DIR, else ./.mlflow-outbox",
    ),
]
AsJson = Annotated[bool, Option("--json", about="Print JSON instead of text.")]
Incomplete = Annotated[
    bool, Option("--incomplete", about="Also what is left of runs whose first events were reclaimed.")
]
Quiet = Annotated[bool, Option("--quiet", "-q", about="Print errors and asked-for data only.")]
Verbose = Annotated[bool, Option("--verbose", "-v", about="Print more; with errors, the traceback.")]
