"""The options that commands share, so that they are called, explained and understood alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OutboxDir = Annotated[
    Path | None,
    typer.Option(
        "--outbox-dir",
        "-d",
        metavar="DIR",
        help="An outbox, or a directory with several. [default: MLFLOW_OUTBOX_DIR, else ./.mlflow-outbox]",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and asked-for data only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print more; with errors, the traceback.")]
