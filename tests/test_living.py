"""A look at what is in use, while other threads begin to use more."""

from __future__ import annotations

import collections
import gc
import threading

from mlflow_outbox.living import Living


class One:
    """Something that is used."""


def test_what_nobody_has_any_more_is_gone() -> None:
    """It is held by nothing else than who uses it."""
    living: Living[One] = Living()
    kept, let_go, dropped = One(), One(), One()
    for one in (kept, let_go, dropped):
        living.add(one)
    living.add(kept)
    living.discard(let_go)
    living.discard(let_go)
    del dropped, one
    gc.collect()
    assert ([kept], True) == (living.members(), bool(living))
    del kept
    gc.collect()
    assert not living


def test_a_look_while_another_thread_adds_raises_nothing_and_misses_none_that_was_there() -> None:
    """As ``close`` looks at the journals of a program whose other threads start runs."""
    living: Living[One] = Living()
    kept = [One() for _ in range(2000)]
    for one in kept:
        living.add(one)
    over = threading.Event()

    def begin() -> None:
        more: collections.deque[One] = collections.deque(maxlen=100)
        while not over.is_set():
            more.append(One())
            living.add(more[-1])

    beginning = threading.Thread(target=begin)
    beginning.start()
    try:
        for _ in range(200):
            assert set(kept) <= set(living.members())
    finally:
        over.set()
        beginning.join()
