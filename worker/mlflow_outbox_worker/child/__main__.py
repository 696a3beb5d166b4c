"""``python -m mlflow_outbox_worker.child DIRECTORY LOCK``: delivers for the thread that has started it.

Its standard input is the socket. That number is given to nothing afterwards, and what libraries print goes nowhere.
"""

import os
import socket
import sys
from pathlib import Path

from mlflow_outbox_worker.child.server import serve
from mlflow_outbox_worker.priority import stand_back

if __name__ == "__main__":
    stand_back()
    own = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    serve(Path(sys.argv[1]), int(sys.argv[2]), own)
    sys.stderr.flush()
    os._exit(0)  # a request that hangs must not hold up the exit; everything that counts is on disk
