"""A loopback port that is somebody's for good, and listened on only while it is open."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Callable

from mlflow_outbox.living import Living


class Port:
    """A port of its own: while it is shut connections are refused, and nobody else can take it.

    Args:
        host: loopback address.
        serve: called with each connection, in the port's thread.
        number: of the port; 0 takes a free one.

    Attributes:
        address: host and number.
    """

    def __init__(self, host: str, serve: Callable[[socket.socket], None], number: int = 0) -> None:
        self._serve = serve
        self._lock = threading.Lock()  # held while opening and shutting
        self._released = False
        self._acceptor: _Acceptor | None = None
        self._holder = _bound(host, number)
        self.address: tuple[str, int] = self._holder.getsockname()[:2]

    def open(self) -> None:
        """Listen, unless it was released."""
        with self._lock:
            if self._acceptor is None and not self._released:
                self._acceptor = _Acceptor(self._holder, self._serve)

    def shut(self) -> None:
        """Listen no more; connections that were accepted are not the port's."""
        with self._lock:
            if self._acceptor is not None:
                self._acceptor.stop()
                self._acceptor = None
                self._holder = _bound(*self.address)

    def release(self) -> None:
        """Shut the port for good, and give it back."""
        self._released = True
        self.shut()
        self._holder.close()


class _Acceptor:
    """Accepts connections on a bound socket until it is stopped; then nobody listens any more, at once."""

    def __init__(self, listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        self._listener = listener
        self._serve = serve
        self._stop, self._stopped = socket.socketpair()
        listener.settimeout(0)  # the client may have gone between select and accept
        listener.listen(128)
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._stopped, selectors.EVENT_READ)
            while all(key.fileobj is self._listener for key, _ in selector.select()):
                with contextlib.suppress(OSError):
                    client, _ = self._listener.accept()
                    self._serve(client)

    def stop(self) -> None:
        self._stop.send(b"x")
        self._thread.join()
        with contextlib.suppress(OSError):  # where a child that was forked this moment has it too, closing ends nothing
            self._listener.shutdown(socket.SHUT_RDWR)
        for each in (self._listener, self._stop, self._stopped):
            each.close()


def _bound(host: str, port: int) -> socket.socket:
    """Bind without listening."""
    holder = socket.socket()
    not_in_children(holder)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((host, port))
    return holder


def not_in_children(one: socket.socket) -> None:
    """Have forked children of this process, such as a data loader's, close a socket.

    As long as one kept its copy nobody would be refused, and no client would see the end of its connection.
    """
    _sockets.add(one)


_sockets: Living[socket.socket] = Living()


def _after_fork_in_child() -> None:
    for one in _sockets.members():
        if one.fileno() >= 0:
            os.close(one.detach())  # close() would leave it to a file object that reads from it


os.register_at_fork(after_in_child=_after_fork_in_child)
