"""Proves that the tests notice the faults they are there for: each mutant is a mistake that somebody could make.

A mutant is applied to a copy of the tree, and the test that is named with it is run there. The verdicts:

* **noticed**: pytest ran to its end, and that test, or a case of it, is among those it reports as failed.
* **SURVIVED**: the test passed.
* **NOT RUN**: anything else. The test was not collected, did not end in time, pytest or a fixture broke, or the mutated
  module cannot even be imported, which every test would notice. It says nothing about the test.
* **NOT APPLIED**: the code has changed, and the mutant has to be written anew.

All but the first make this script fail. Before that, each of these tests must be run and pass without any mutant.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent
#: Seconds that one mutant's test may take; a test that proves something has time limits of its own.
_PATIENCE: Final = 240


class Mutant(NamedTuple):
    """A mistake: where, what stands there, what it becomes, and the test that has to fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


COURIER: Final = "worker/mlflow_outbox_worker/courier.py"
MUTANTS: Final = [
    Mutant(
        "acknowledge before sending",
        COURIER,
        "        refused = Refused()\n        if window.events:\n",
        "        refused = Refused()\n        record.cursors = window.cursors\n"
        "        self._ledger.commit(record)\n        if window.events:\n",
        "tests/faults/test_network.py::test_statuses_that_pass_are_retried_and_never_dead_lettered",
    ),
    Mutant(
        "drop the search for the run's tag",
        "worker/mlflow_outbox_worker/counterparts.py",
        '        twins = ask("find_runs", lambda: self._sink.find_runs(record.experiment_id, record.run_id))\n',
        "        twins: list[str] = []\n",
        "tests/faults/test_network.py::test_an_answer_lost_at_any_request_doubles_nothing",
    ),
    Mutant(
        "do not look for a late create's run",
        "worker/mlflow_outbox_worker/twins.py",
        "    if not record.settles_ms:\n",
        "    if True:\n",
        "tests/test_outage.py::test_a_create_that_is_carried_out_after_the_next_one_leaves_no_second_run",
    ),
    Mutant(
        "unlink before sending",
        COURIER,
        "        refused = Refused()\n        if window.events:\n",
        "        refused = Refused()\n        for writer, held in reader.segments().items():\n"
        "            for segment in held:\n"
        "                if segment.header.ordinal < window.cursors[writer].ordinal:\n"
        "                    segment.path.unlink()\n        if window.events:\n",
        "tests/faults/test_network.py::test_no_segment_is_moved_or_deleted_before_its_events_are_answered",
    ),
    Mutant(
        "compare no window in doubt with what the store has",
        "worker/mlflow_outbox_worker/reconciliation.py",
        "        if in_doubt or record.adopted or not self._is_certain(run_id, writers):\n",
        "        if False:\n",
        "tests/test_reconciliation.py::test_a_store_that_would_have_points_twice_is_read_anew_for_a_window_in_doubt",
    ),
    Mutant(
        "keep what is delivered of a run that goes on",
        "worker/mlflow_outbox_worker/upkeep.py",
        "        passed = [] if done else passed_segments(turn.reader, record.cursors)\n",
        "        passed: list = []\n",
        "tests/test_upkeep.py::TestOfARunThatGoesOn::test_its_delivered_segments_are_filed_as_it_goes",
    ),
    # "Fold before sending", which stood here, changes nothing: a view that was not recorded is read anew. The cursor
    # without the view loses it, because what is behind the cursor is never folded again.
    Mutant(
        "record the cursor without the view",
        COURIER,
        "self._ledger.commit(record, view=view, dead=refused.letters)",
        "self._ledger.commit(record, dead=refused.letters)",
        "tests/faults/test_queue.py::test_an_older_value_of_another_writer_does_not_undo_what_was_delivered",
    ),
    Mutant(
        "a lane that dies takes its run along",
        "worker/mlflow_outbox_worker/delivery.py",
        "        except BaseException as error:  # this thread ends",
        "        except MemoryError as error:  # this thread ends",
        "tests/faults/test_exits.py::test_a_worker_that_dies_is_replaced_and_counted",
    ),
    Mutant(
        "dead-letter on 503",
        "worker/mlflow_outbox_worker/outcome.py",
        "status >= HTTPStatus.INTERNAL_SERVER_ERROR or error.code",
        "(status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != 503) or error.code",
        "tests/faults/test_network.py::test_statuses_that_pass_are_retried_and_never_dead_lettered",
    ),
    Mutant(
        "retry a failed fsync on the same descriptor",
        "tracker/mlflow_outbox/spool/syncer.py",
        "            self._disk.datasync(fd)\n        except OSError as error:\n",
        "            self._disk.datasync(fd)\n        except OSError as error:\n            try:\n"
        "                self._disk.datasync(fd)\n                return True\n            except OSError:\n"
        "                pass\n",
        "tests/faults/test_disk_errors.py::test_an_input_output_error_at_any_call_loses_nothing_that_was_kept",
    ),
    Mutant(
        "an event goes along with a sync that its copied file missed",
        "tracker/mlflow_outbox/spool/sync_round.py",
        "        if self._sequence.live in (self._sequence.syncing, self._lent):\n"
        "            self._sequence.end(rotated=True)\n",
        "",
        "tests/test_journal.py::test_an_event_whose_copied_file_came_too_late_for_a_sync_is_not_made_durable_by_it",
    ),
    Mutant(
        "no cut-back after a short write",
        "tracker/mlflow_outbox/spool/segment.py",
        "            if tail:\n                self._cut_off()\n",
        "            self.offset += len(tail)\n",
        "tests/faults/test_space.py::test_a_write_that_is_short_at_any_byte_leaves_no_torn_frame",
    ),
    Mutant(
        "skip the CRC check",
        "tracker/mlflow_outbox/spool/frame.py",
        "    if _crc32(data[offset + 4 : stop], seed) != crc:",
        "    if _crc32(data[offset + 4 : stop], seed) == -1 and crc:",
        "tests/faults/test_bytes.py::test_any_flipped_bit_of_a_segment_costs_at_most_its_frame",
    ),
    Mutant(
        "ignore a gap in the sequence",
        "tracker/mlflow_outbox/spool/window.py",
        "        self._miss(ahead)\n        self._seq = (seq + 1)",
        "        self._seq = (seq + 1)",
        "tests/test_recovery.py::test_a_removed_frame_is_counted_as_missing",
    ),
    Mutant(
        "ignore a gap that only a header tells",
        "tracker/mlflow_outbox/spool/window.py",
        "        if gone and not here:\n            self._pass_gap_before(segment)\n",
        "",
        "tests/test_reader.py::test_a_gap_that_only_a_header_tells_is_counted_once_and_not_waited_for",
    ),
    Mutant(
        "wait for the number of a header that is all that is left of a writer",
        "tracker/mlflow_outbox/spool/window.py",
        "        if gone:  # also where nothing is behind the header",
        "        if gone and self.events:  # also where nothing is behind the header",
        "tests/test_reader.py::test_wherever_a_cut_comes_nothing_is_waited_for_that_will_not_come",
    ),
    Mutant(
        "pickle in the ledger",
        "worker/mlflow_outbox_worker/disk.py",
        "        if type(mode) is int and mode == RAW and",
        "        if mode == 4:  # noqa: PLR2004\n            import pickle\n\n            return pickle.loads(value)\n"
        "        if type(mode) is int and mode == RAW and",
        "tests/test_disk.py",
    ),
    Mutant(
        "a lease that does not lock",
        "worker/mlflow_outbox_worker/lease.py",
        "            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "tests/faults/test_many.py::test_of_many_workers_one_delivers",
    ),
    Mutant(
        "trust a lock file that is no longer there",
        "worker/mlflow_outbox_worker/lease.py",
        "return self._fd >= 0 and _is_same(self._fd, self._path)",
        "return self._fd >= 0",
        "tests/faults/test_many.py::test_only_the_kernel_s_lock_decides_who_delivers",
    ),
    Mutant(
        "a param torn by a kill is refused for ever",
        "worker/mlflow_outbox_worker/mlflow_sink/stores.py",
        "        store = Directory(root, artifact_root or root)",
        "        store = file_store.FileStore(root, artifact_root or root)",
        "tests/faults/test_kills.py::test_a_param_that_a_killed_worker_left_empty_is_written_again",
    ),
    Mutant(
        "believe an index that does not fit its rows",
        "worker/mlflow_outbox_worker/dbconnection.py",
        "PRAGMA integrity_check(1)",
        "PRAGMA quick_check(1)",
        "tests/test_ledger_faults.py::TestDamagedFile::test_an_index_older_than_its_table_is_damage",
    ),
    Mutant(
        "wait for a thread that the end of the interpreter has stopped",
        "tracker/mlflow_outbox/ending.py",
        "    if lock.acquire(blocking=False):\n        lock.release()\n        return False\n    return True\n",
        "    return False\n",
        "tests/test_ending.py::test_what_a_destructor_logs_waits_for_no_thread_that_the_end_has_stopped",
    ),
    Mutant(
        "migrate while the program migrates",
        "worker/mlflow_outbox_worker/mlflow_sink/migrations.py",
        "            with _turn:\n                whole(*arguments, **named)\n",
        "            whole(*arguments, **named)\n",
        "tests/test_migrations.py::test_a_program_opens_a_new_database_of_its_own_while_delivery_opens_another",
    ),
    Mutant(
        "park what a restoration on its way lets in",
        "worker/mlflow_outbox_worker/precedence.py",
        "        room = self._restoring(record)\n        if room:",
        "        return\n        room = self._restoring(record)\n        if room:",
        "tests/test_plugin_deleted.py::test_what_was_logged_after_an_experiment_was_restored_waits_for_that",
    ),
    Mutant(
        "say that a program's segments were synced, and leave them",
        "worker/mlflow_outbox_worker/substitute.py",
        "                self._datasync(fd)\n",
        "",
        "tests/faults/test_power.py::"
        "test_what_a_stopped_program_has_logged_is_made_durable_by_the_process_that_delivers",
    ),
    Mutant(
        "rest while a new segment waits for its first sync",
        "tracker/mlflow_outbox/spool/caretaker.py",
        "            self._start()\n        self.hurry()\n",
        "            self._start()\n",
        "tests/test_caretaker.py::test_what_another_process_cannot_do_brings_the_next_round_at_once",
    ),
    Mutant(
        "pass by a segment that cannot be opened now",
        "tracker/mlflow_outbox/spool/listing.py",
        "            if waits:\n                self.unread[name] = error\n",
        "",
        "tests/test_reader.py::test_a_segment_that_cannot_be_opened_now_is_not_passed_by",
    ),
    Mutant(
        "believe a gap at the first look",
        "worker/mlflow_outbox_worker/intake.py",
        "        if not (window.missing or window.broken or any(window.begun.values())):\n            return window\n",
        "        return window\n",
        "tests/test_intake.py::test_a_segment_that_a_listing_leaves_out_is_delivered_all_the_same",
    ),
    Mutant(
        "take what is forbidden to one run for forbidden to all",
        "worker/mlflow_outbox_worker/gate.py",
        " and not is_admitted(sink)\n",
        "\n",
        "tests/test_rights.py::test_a_run_that_a_user_may_not_log_holds_up_no_other",
    ),
    Mutant(
        "open again and again what its use has shown to be damaged",
        "worker/mlflow_outbox_worker/database.py",
        " or _condemned(path, found):\n",
        ":\n",
        "tests/test_ledger_faults.py::TestDamagedFile::test_damage_that_opening_does_not_see_is_believed_where_it_was_met",
    ),
    Mutant(
        "let the program fork in the middle of a warning",
        "tracker/mlflow_outbox/counters.py",
        "    is_held = lock.acquire(timeout=_saying.patience)",
        "    is_held = False",
        "tests/test_forking.py::test_a_fork_waits_for_a_warning_that_another_thread_is_writing",
    ),
    Mutant(
        "let a database refuse a batch for a point that it has",
        "worker/mlflow_outbox_worker/mlflow_sink/point_rows.py",
        "sqlite.insert(table).on_conflict_do_nothing(),",
        "sqlite.insert(table),",
        "tests/test_point_rows.py::test_a_batch_is_one_statement_and_costs_no_more_when_it_is_sent_again",
    ),
    Mutant(
        "go on when one of the requests that went side by side failed",
        "worker/mlflow_outbox_worker/volley.py",
        "            failures = [shot.failure for shot in shots if shot.failure is not None]\n",
        "            failures = [shot.failure for shot in shots[:1] if shot.failure is not None]\n",
        "tests/test_volley.py::test_a_request_that_fails_beside_others_is_sent_again_alone",
    ),
]


class Ran(NamedTuple):
    """What pytest did: its exit code, the ids of the tests that failed and passed, its output and the seconds taken."""

    code: int | None
    failed: list[str]
    passed: list[str]
    output: str
    seconds: float


def main(names: list[str]) -> int:
    """Run mutants, all or those named; return the exit code."""
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    if len(chosen) < len(names):
        print("mutants:", *(mutant.name for mutant in MUTANTS), sep="\n  ")
        return 2
    with tempfile.TemporaryDirectory(prefix="mlflow-outbox-mutants-") as folder:
        copy = Path(folder) / "tree"
        for part in ("tracker", "worker", "tests", "scripts"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "seeds"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if not _hold(copy, sorted({mutant.test for mutant in chosen})):
            return 1
        results = [_try(copy, mutant) for mutant in chosen]
    print(f"{len(results)} mutants", *(f"{results.count(verdict)} {verdict}" for verdict in VERDICTS), sep=", ")
    return 0 if results.count("noticed") == len(results) else 1


def _hold(copy: Path, tests: list[str]) -> bool:
    """Return whether each of some tests is run and passes where nothing was changed; say which does not."""
    whole = _run(copy, tests)
    if whole.code != 0:
        print(f"these fail without any mutant, so nothing can be proved with them: {', '.join(whole.failed)}")
        print(whole.output[-2000:])
        return False
    absent = [test for test in tests if not _named(test, whole.passed)]
    if absent:
        print(f"these were not run without any mutant, so nothing can be proved with them: {', '.join(absent)}")
    return not absent


def _try(copy: Path, mutant: Mutant) -> str:
    path = copy / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        return _say("NOT APPLIED", mutant, 0.0, f"{mutant.file} has changed; write the mutant anew")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        broken = _import_error(copy, mutant.file)
        if broken:
            return _say("NOT RUN", mutant, 0.0, f"the mutated module cannot be imported: {broken}")
        ran = _run(copy, [mutant.test])
    finally:
        path.write_text(text, encoding="utf-8")
    found = verdict(ran, mutant.test)
    said = {"noticed": ", ".join(_named(mutant.test, ran.failed)), "SURVIVED": mutant.test}
    return _say(found, mutant, ran.seconds, said.get(found) or ran.output[-600:])


def _say(found: str, mutant: Mutant, seconds: float, what: str) -> str:
    print(f"{found:12} {mutant.name:45} {seconds:5.0f} s  {what}", flush=True)
    return found


VERDICTS: Final = ("noticed", "SURVIVED", "NOT RUN", "NOT APPLIED")


def verdict(ran: Ran, test: str) -> str:
    """Return what a run of pytest says about a mutant and the test that should notice it."""
    if ran.code == 1 and _named(test, ran.failed):
        return "noticed"
    if ran.code == 0 and _named(test, ran.passed):
        return "SURVIVED"
    return "NOT RUN"


def _named(test: str, ids: Iterable[str]) -> list[str]:
    """Return those ids that are a test, one of its cases, or in it if it is a file or a class."""
    return [found for found in ids if found == test or found.startswith((f"{test}[", f"{test}::"))]


def _environment(copy: Path) -> dict[str, str]:
    paths = os.pathsep.join(str(copy / part) for part in ("tracker", "worker"))
    return {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}


def _import_error(copy: Path, file: str) -> str:
    """Return why a module of a tree cannot be imported from there, "" when it can."""
    module = ".".join(Path(file).with_suffix("").parts[1:])
    code = f"import {module} as m; assert m.__file__ == {str(copy / file)!r}, m.__file__"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=copy, env=_environment(copy), capture_output=True, text=True, check=False)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def _run(copy: Path, tests: list[str]) -> Ran:
    """Run tests on a tree."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rpfE", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    started = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=copy,
            env=_environment(copy),
            capture_output=True,
            text=True,
            timeout=_PATIENCE * len(tests),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Ran(None, [], [], f"it did not end within {_PATIENCE} s", time.monotonic() - started)
    return ran_of(done.returncode, done.stdout, time.monotonic() - started)


def ran_of(code: int, output: str, seconds: float = 0.0) -> Ran:
    """Return what pytest's exit code and its output, with a summary of the passed and the failed, say."""
    summary = output.rpartition(" short test summary info ")[2]
    lines = [line.partition(" - ")[0].split(" ", 1) for line in summary.splitlines()]
    ids = {word: [line[1] for line in lines if line[0] == word and len(line) > 1] for word in ("FAILED", "PASSED")}
    return Ran(code, ids["FAILED"], ids["PASSED"], output, seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
