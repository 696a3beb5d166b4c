"""The two ends of the socket between a program and the child that delivers for it, and who else could have one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox_worker.child.process import Child
from servers import eventually

_WAITING = """
import json, socket
said = socket.socket(fileno=0)
said.sendall(json.dumps({"ready": "mlflow-outbox"}).encode() + bytes([10]))
while said.recv(4096):
    pass
"""


def test_a_process_that_is_forked_while_the_child_is_started_does_not_hide_the_child_s_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a data loader's may be, by another thread: with a copy of the child's end it would keep the socket open."""
    start, forked = subprocess.Popen, list[int]()

    def forks(*arguments: Any, **named: Any) -> subprocess.Popen[bytes]:
        started = start(*arguments, **named)
        forked.append(os.fork())
        if not forked[-1]:
            signal.pause()
        return started

    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", forks)
        child = Child([sys.executable, "-c", _WAITING], tmp_path, lock)
    stopped = threading.Event()
    heeds = threading.Thread(target=lambda: list(child.messages(stopped)))
    heeds.start()
    try:
        os.kill(child._process.pid, signal.SIGKILL)
        eventually(lambda: not heeds.is_alive(), 15, "the death of the child is noticed")
    finally:
        stopped.set()
        heeds.join()
        child.close()
        os.close(lock)
        os.kill(forked[0], signal.SIGKILL)
        os.waitpid(forked[0], 0)
