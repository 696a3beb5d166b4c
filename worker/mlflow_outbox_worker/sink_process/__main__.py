"""``python -m mlflow_outbox_worker.sink_process``: the process that holds MLflow for a worker thread.

Its standard input is the socket. That number is given to nothing afterwards, and what libraries print goes nowhere.
"""

import os
import socket

from mlflow_outbox_worker.priority import stand_back
from mlflow_outbox_worker.sink_process.server import serve

if __name__ == "__main__":
    stand_back()
    connection = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    serve(connection)
    os._exit(0)
