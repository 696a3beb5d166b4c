"""Delivery for a worker thread, in a child process that ends with the program.

A delivery loop in the program's own interpreter would take its lock for some milliseconds at a time, to read, plan and
record, and mlflow holds it for one to three seconds when it is imported, adds 200 MB, and makes modules that a fork in
that moment would leave locked. So the thread only sees to it that there is a process which delivers.

    program                                                       child
    worker thread: the outbox's lock, the environment  ========>  Delivery, ledger, mlflow_sink -> MLflow
                   counters, the log                   <========

What holds:

* The thread takes the outbox's lock and hands it down: of sixty-four processes that log to one outbox, one has a child,
  and the threads of the others stand by. The lock is gone when the child is, whatever ended it.
* The child ends when its socket does, a second later at most: the death of the program must not leave somebody behind
  who goes on delivering. A forked child of the program gives its copy of the socket up in the fork.
* A child that ends unasked, killed for instance, is counted, and another one goes on; what it had not recorded is sent
  again, to the same effect (``courier``).
* The child has the program's ``sys.path``, and its environment as it is at present, a second late: a token that is
  renewed in ``os.environ`` is used.
* What the child counts is added to the program's counters; what it logs goes through the program's logging; a second
  later, as all that is heard of it. While the program's calls follow each other so fast that each look at the child is
  at the cost of one of them, it looks every four seconds.
* The first child is started by the call that starts the thread, which takes a millisecond or two. Where the thread did
  it, each of its steps was a call that waited for the interpreter.
* Where mlflow is imported already, its price is paid, and delivery happens in the thread until there is much of it
  (``handover``). So it does for good where no child can be started: a frozen program, an interpreter that does not say
  where it lies, a limit on processes.

Over the socket go lines of JSON. That way: where modules are, and ``process.note_of`` with the outbox, without waiting
for the child's greeting; then ``{"environment": {name: value or null}}``. This way: the greeting; then ``{"counts":
{reason: more}}`` and ``{"log": [level, text]}``.

Rooms: ``keeper`` is the thread's loop, ``process`` one child as the program sees it, ``server`` what runs in the child.
"""

from __future__ import annotations

from mlflow_outbox_worker.child.keeper import ChildDelivery, Loop

__all__ = ["ChildDelivery", "Loop"]
