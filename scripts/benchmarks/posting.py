"""Another process that posts points to the tracking server: what a busy machine does to work that logs nothing to it.

It uses MLflow's own client, batch after batch, as a worker would; it and the server use the same cores.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator


@contextlib.contextmanager
def posting(uri: str) -> Iterator[subprocess.Popen[bytes]]:
    """Have points posted by the process it gives, from the first answer of the server to the end of the block.

    Args:
        uri: the tracking URI.

    Raises:
        RuntimeError: the server took nothing.
    """
    command = [sys.executable, "-c", "from benchmarks.posting import post; post()", uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as poster:
        try:
            assert poster.stdout is not None  # noqa: S101 - for the type checker: PIPE was asked for
            if not poster.stdout.readline():
                msg = f"nothing could be posted to {uri}: the process that posts has ended"
                raise RuntimeError(msg)
            yield poster
        finally:
            poster.kill()


def post() -> None:
    """Post batches of points to the server whose URI is the first argument, and say when the first one is there."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(sys.argv[1])
    run_id = client.create_run(client.create_experiment(f"posted-{time.time_ns()}")).info.run_id
    for start in itertools.count(step=1000):
        client.log_batch(run_id, [Metric("loss", 0.5, 1, step) for step in range(start, start + 1000)])
        if not start:
            print("posting", flush=True)
