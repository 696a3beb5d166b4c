"""``python -m mlflow_outbox_worker DIRECTORY``: the worker process that an experiment starts.

People use ``mlflow-outbox worker``.
"""

import os
import sys
from pathlib import Path

from mlflow_outbox_worker.process import serve

if __name__ == "__main__":
    code = serve(Path(sys.argv[1]), sys.stdin.buffer)
    sys.stderr.flush()
    os._exit(code)  # a request that hangs must not hold up the exit; everything that counts is on disk
