"""Whatever a program hands to the logging calls, judged by what MLflow holds: values (F67) and artifact paths (F91)."""

from __future__ import annotations

import math
import os
import random
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from faults import workload
from faults.oracle import held
from faults.table import Row
from mlflow_outbox import MLflowTracker
from mlflow_outbox.errors import EventRefused, InvalidEvent
from mlflow_outbox.spool.artifact_path import checked_artifact_path
from mlflow_outbox.spool.enclosure import store_of
from mlflow_outbox.spool.events import Artifact
from mlflow_outbox.validation import checked_text
from servers import eventually

#: Characters that are likely to be taken for something else somewhere.
_ODD = "abzAZ09_-. :/\\#%@?&=\n\r\t\0\x1b\x7f\ud800\udfffäß損\u202e\ufeff\U0001f600\"'`;$~*"


def odd_text(rng: random.Random, most: int = 30) -> str:
    """Return a short text of odd characters, now and then one that is far too long."""
    if rng.random() < 0.01:
        return rng.choice("aä\0") * rng.choice((249, 250, 251, 6000, 6001, 8001, 100_000))
    alphabet = rng.choice(("abc/._- :09", _ODD))
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(most)))


def odd_number(rng: random.Random) -> Any:
    """Return a number at the edge of something, or something that is none."""
    return rng.choice(
        [
            lambda: math.nan,
            lambda: rng.choice((math.inf, -math.inf, 0.0, -0.0, 5e-324, 1.7976931348623157e308, -2.5)),
            lambda: rng.choice((-1, 1)) * 2 ** rng.randrange(70) + rng.randrange(-2, 3),
            lambda: rng.uniform(-1e6, 1e6),
            lambda: float(rng.randrange(-(2**63), 2**64)),
            lambda: rng.randrange(-5, 1000),
            lambda: rng.choice((True, False, None, "1", b"1", [], {}, 1j, object())),
            lambda: 10**400,
        ]
    )()


def points_held(database: Path) -> set[tuple[Any, ...]]:
    """Return every metric point in MLflow's database: key, value as it was logged, step, time."""
    connection = sqlite3.connect(database, timeout=20)
    rows = connection.execute("SELECT key, value, is_nan, step, timestamp FROM metrics").fetchall()
    connection.close()
    return {(key, "nan" if nan else repr(float(value) + 0.0), step, time) for key, value, nan, step, time in rows}


def as_held(value: Any) -> str:
    """Return a value as MLflow's tables show it: it keeps an infinity as the largest float, and zero without a sign."""
    number = float(value)
    if math.isinf(number):
        number = math.copysign(1.7976931348623157e308, number)
    return "nan" if math.isnan(number) else repr(number + 0.0)


def texts_held(database: Path, table: str) -> dict[str, str]:
    """Return every param or tag in MLflow's database but those that MLflow or the outbox made."""
    connection = sqlite3.connect(database, timeout=20)
    rows = connection.execute(f"SELECT key, value FROM {table} WHERE key NOT LIKE 'mlflow%'").fetchall()
    connection.close()
    return dict(rows)


@pytest.mark.fault("F67", "NaN, infinities, 2**63, steps and times beyond int64, odd and endless keys, surrogates, NUL")
def test_what_a_call_accepts_arrives_as_it_was_and_all_else_is_a_counted_refusal(
    empty_database: Callable[[Path], Path], row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """I2, I4: no call raises, each that returns True is in MLflow's tables, and each that returns False is counted."""
    total, refused, per_run = row.pick(500, 20_000, 1_000_000), 0, 2_000
    for number in range(-(-total // per_run)):
        database = empty_database(tmp_path / f"{number}.db")
        uri, outbox = f"sqlite:///{database}", tmp_path / f"outbox{number}"
        tracker = MLflowTracker("values", uri, outbox_dir=outbox, settings=workload.settings())
        run = tracker.start_run("values")
        points: set[tuple[Any, ...]] = set()
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        refusals = 0
        for _ in range(min(per_run, total)):
            key = rng.choice((f"k{rng.randrange(30)}", odd_text(rng)))
            what = rng.randrange(10)
            if what < 7:
                value, step = odd_number(rng), rng.choice((odd_number(rng), rng.randrange(10**6)))
                time_ms = rng.choice((rng.randrange(2**42), rng.randrange(-5, 2**63 + 5)))
                kept = run.log_metric(key, value, step=step, timestamp=time_ms)
                if kept:
                    points.add((key, as_held(value), int(step or 0), time_ms))
            elif what == 7:
                key, text = f"p{len(params)}", odd_text(rng, 200)
                kept = run.log_params({key: text})
                if kept:
                    params[key] = text[:6000]
            else:
                text = odd_text(rng, 200)
                kept = run.set_tag(key, text)
                if kept:
                    tags[key] = text[:8000]
            refusals += not kept
            row.done()
        run.end()
        left = tracker.flush(60)
        counted = sum(n for name, n in tracker.counters.items() if name.startswith("refused"))
        assert (0, 0, 0) == (left.pending, left.parked, left.dead), (left, tracker.counters)
        assert tracker.close(10).pending == 0
        assert points == points_held(database)
        assert params == texts_held(database, "params")
        assert tags == texts_held(database, "tags")
        assert refusals == counted, tracker.counters
        refused += refusals
    assert row.times // 20 < refused < row.times * 3 // 4, "hardly anything was refused, or accepted"
    row.measure(refused=refused)


#: Pieces of paths, each of which may lead elsewhere in one spelling or other.
_PIECES = (
    *("..", ".", "/", "//", "a", "b.txt", "%2e", "%2E", "%252e", "%2f", "%252F", "%5c", "\\", "C:", "c:", "#", "%23"),
    *("\0", "%00", " ", "~", "\u202e", "ä", "\n", "\x7f", "\ud800", "x" * 990, "..%2f", "%25", "%", "file:", ":", "."),
)


def odd_path(rng: random.Random) -> str:
    """Return a path of a few such pieces."""
    return "".join(rng.choice(_PIECES) for _ in range(rng.randrange(1, 8)))


def leads_out(path: str) -> bool:
    """Return whether a path leads out of its folder, in any of the ways in which a server may decode it."""
    for _ in range(12):
        parts = path.replace("\\", "/").split("/")
        if path.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:[/\\]", path) or "\0" in path:
            return True
        path = unquote(path)
    return False


@pytest.mark.fault("F91", "paths of pieces that climb, once and twice encoded, absolute, with drives, NUL, #, endless")
def test_no_path_that_is_accepted_leads_out_however_often_it_is_decoded(row: Row, rng: random.Random) -> None:
    """Each is refused by one of our errors, or stays inside its folder; nothing in between."""
    refused = 0
    for _ in range(row.pick(2_000, 100_000, 3_000_000)):
        path = odd_path(rng)
        try:
            found = checked_artifact_path(path)
        except InvalidEvent:
            refused += 1
        else:
            assert not leads_out(found), f"{path!r} was accepted as {found!r}"
            assert found == checked_artifact_path(found), "what was accepted once is the path at delivery, too"
        row.done()
    assert row.times // 10 < refused < row.times
    row.measure(refused=refused)


@pytest.mark.fault("F91", "such paths given to calls, and in a journal that somebody wrote, up to MLflow's files")
def test_files_of_any_path_are_inside_the_run_s_folder_or_nowhere(
    empty_database: Callable[[Path], Path], row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """Refused at the call or confined; and again at delivery: nothing appears anywhere else, and the run arrives."""
    total, per_run = row.pick(80, 600, 20_000), 200
    for number in range(-(-total // per_run)):
        place = tmp_path / f"{number}"
        place.mkdir()
        uri = f"sqlite:///{empty_database(place / 'mlflow.db')}"
        tracker = MLflowTracker("paths", uri, outbox_dir=place / "outbox", settings=workload.settings())
        run = tracker.start_run("paths")
        acked = {n for n in range(20) if workload.log_event(run, n)}
        kept: set[str] = set()
        forged: set[str] = set()
        taken = {f"a{n}.txt" for n in acked}
        for _ in range(min(total, per_run)):
            path = odd_path(rng)
            if is_free(path, taken) and run.log_text("content", path):
                kept.add(os.path.normpath(path))
            path = odd_path(rng)
            if not is_free(path, taken):
                continue
            try:  # what a program of ours would never write; a text that is no Unicode cannot be written at all
                checked_text("path", path, "tag")
            except EventRefused:
                continue
            sha = store_of(run._files._journal, "interval").add_bytes(b"forged", limit=10).sha256
            forged.add(path)
            assert run._keep(Artifact(path, sha, 6, 1))
            row.done()
        run.end()
        eventually(lambda tracker=tracker: not tracker.flush(10).pending, 60)
        left = tracker.flush(10)
        assert (0, 0) == (left.pending, left.parked), (left, tracker.counters)
        tracker.close(10)
        held(uri, "paths").check(acked)
        folder = artifact_folder(place / "mlflow.db")
        inside = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        made = {file for file in tmp_path.rglob("*") if file.is_file() and not file.name.startswith("mlflow.db")}
        strays = [str(file) for file in made if not file.is_relative_to(folder) and "outbox" not in file.parts]
        assert [] == strays, "files lie outside of the run's folder"
        assert kept <= inside
        assert inside <= {*kept, *map(os.path.normpath, forged), *(f"a{n}.txt" for n in acked)}
        assert [] == [path for path in inside if leads_out(path)]
        row.measure(kept=len(kept), forged=len(forged), dead=left.dead)
        for one in (folder, place):
            shutil.rmtree(one)


def is_free(path: str, taken: set[str]) -> bool:
    """Return whether a path is none of a file's folders, and no file is in its place; then it is taken from now on."""
    path = os.path.normpath(path)
    if any(path == other or path.startswith(f"{other}/") or other.startswith(f"{path}/") for other in taken):
        return False
    taken.add(path)
    return True


def artifact_folder(database: Path) -> Path:
    """Return where MLflow keeps the files of the only run."""
    connection = sqlite3.connect(database, timeout=20)
    ((uri,),) = connection.execute("SELECT artifact_uri FROM runs").fetchall()
    connection.close()
    return Path(unquote(urlsplit(uri).path))
