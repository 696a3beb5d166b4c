"""Sockets between the program and the process that delivers for it."""

from __future__ import annotations

import os
import socket

from mlflow_outbox.living import Living
from mlflow_outbox.spool import private


def above_streams(one: socket.socket) -> socket.socket:
    """Return a socket in place of one that may have the number of a standard stream."""
    return socket.socket(fileno=private.above_streams(one.detach()))


def close_in_children(*sockets: socket.socket) -> None:
    """Have forked children of this process close sockets.

    One that kept its copy would keep the process at the other end alive, or its death from being noticed, or would
    hear what is said to its parent.
    """
    for one in sockets:
        _sockets.add(one)


_sockets: Living[socket.socket] = Living()


def _after_fork_in_child() -> None:
    for one in _sockets.members():
        one.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
