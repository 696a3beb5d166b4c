"""MLflow in a process of its own, for the worker thread of an experiment.

A thread that imports mlflow holds the interpreter for one to three seconds in all, in pieces that make each step of
the experiment wait, adds 200 MB to it, and makes modules that a fork in that moment would leave locked. So the thread
only reads, plans and records; the sink, and mlflow with it, lives in a child process which is asked over a socket.

    experiment                                   child
    worker thread -> client.ProcessSink  ======  server -> mlflow_sink.Recorder -> MLflow
                           (messages: length, msgpack)

What holds:

* A request is made once, by the child; whether to make it again is decided where it always is, in ``retry``. When the
  child ends with a request under way, killed for instance, its fate is unknown: ``SinkError`` with ``sent=True``, as if
  a connection had broken. The next request starts another child.
* The child ends when the socket does, without finishing what is under way: the death of the experiment must not leave
  somebody behind who goes on delivering. A forked child of the experiment gives its copy of the socket up in the fork.
* The child sees the experiment's environment and ``sys.path`` as they are at each request: a token that is renewed in
  ``os.environ`` is used, a package that the experiment finds is found.
* Where mlflow is imported already, its price is paid, and the sink lives in the thread. So it does where no child can
  be started: a frozen program, an interpreter that does not say where it lies, a limit on processes.
"""

from __future__ import annotations

from mlflow_outbox_worker.sink_process.client import SinkProcesses

__all__ = ["SinkProcesses"]
