"""The ledger's files damaged at random places: it opens, works, and believes nothing that was never committed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from faults.table import Row
from ledgers import assert_one_of_the_past, assert_works, copy, record, view
from mlflow_outbox_worker.ledger import Ledger


@pytest.mark.fault("F31", "the database: a page zeroed, random, cut off, or a bit of it flipped")
@pytest.mark.parametrize("damage", ["zeroed", "cut", "random", "a bit"])
def test_damage_at_any_page_is_survived(
    damage: str, clean: Path, directory: Path, row: Row, rng: random.Random
) -> None:
    """Records are as they were or gone, which is said or counted, and the ledger works."""
    pages = os.path.getsize(clean / "cache.db") // 4096
    every = list(range(pages))
    for number in range(row.pick(pages, 125, 2500)):
        page = every[number] if number < pages else rng.randrange(pages)
        copy(clean, directory)
        path = directory / "cache.db"
        data = bytearray(path.read_bytes())
        begin = 4096 * page
        if damage == "cut":
            del data[begin + rng.randrange(4096) :]
        elif damage == "a bit":
            data[begin + rng.randrange(4096)] ^= 1 << rng.randrange(8)
        else:
            data[begin : begin + 4096] = bytes(4096) if damage == "zeroed" else rng.randbytes(4096)
        path.write_bytes(data)
        reports: list[str] = []
        ledger = Ledger.open(directory, report=reports.append)
        absent = 0
        for index in range(20):
            run_id = f"{index:02d}"
            found, seen = ledger.record(run_id), ledger.view(run_id)
            assert found in (None, record(run_id, index, f"r{index}"))
            assert seen in (None, view())
            absent += (found is None) + (seen is None)
        is_set_aside = (directory / "cache.db.corrupt-1").exists()
        assert is_set_aside == any("cache.db.corrupt-1" in text for text in reports)
        if data and not is_set_aside:  # an empty file is used, for there is nothing in it to keep
            # Rows that can be told by their columns are put aside at the opening; not all are records or views.
            assert absent <= ledger.quarantined_rows
            assert reports or absent == ledger.quarantined_rows
        assert_works(ledger)
        ledger.close()
        row.done()


@pytest.mark.fault("F32", "a bit of the database's log flipped, its index gone or garbled")
def test_a_flipped_bit_anywhere_in_the_log_gives_a_state_of_the_past(
    crashed: Path, directory: Path, row: Row, rng: random.Random
) -> None:
    """SQLite cuts a damaged log silently; the ledger may be older, but is one that once was."""
    log = (crashed / "cache.db-wal").read_bytes()
    seen = set()
    for number in range(row.pick(60, 2000, 20_000)):
        copy(crashed, directory)
        data = bytearray(log)
        place = len(log) * (number % 60) // 60 + rng.randrange(len(log) // 60)
        data[place] ^= 1 << rng.randrange(8)
        (directory / "cache.db-wal").write_bytes(data)
        if rng.random() < 0.2:
            (directory / "cache.db-shm").write_bytes(rng.randbytes(32768))
        else:
            (directory / "cache.db-shm").unlink()  # after a power cut there is none, and the log is read anew
        seen.add(assert_one_of_the_past(directory, []))
        row.done()
    assert seen <= {*range(10, 31)}
    assert len(seen) > 5
