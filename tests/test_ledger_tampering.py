"""The ledger whose settings, rows or files somebody else has changed: fault rows F35, F36 and F90."""

from __future__ import annotations

import os
import pickle
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import diskcache
import pytest

from ledgers import FILES, assert_set_aside, copy, edit, letter, record, view
from mlflow_outbox.errors import OutboxUnusable
from mlflow_outbox_worker import dbconnection
from mlflow_outbox_worker.ledger import Ledger, LedgerCorrupt


class TestSettings:
    """F35: a database with other settings would delete rows, keep files beside it, or worse."""

    def test_a_directory_made_with_diskcaches_defaults_is_set_aside(self, directory: Path) -> None:
        """Its rows are kept in the file set aside, and the new one does not evict."""
        directory.mkdir(0o700)
        cache = diskcache.Cache(str(directory), size_limit=200_000)
        cache.set("run/a", b"x")
        cache.close()
        ledger = assert_set_aside(directory)
        for index in range(100):
            ledger.commit(record(str(index)), view=view())
        assert 101 == len(list(ledger.records()))
        assert ("none", 0) == (ledger._source._cache.eviction_policy, ledger._source._cache.cull_limit)  # type: ignore[union-attr]  # it has one
        ledger.close()

    @pytest.mark.parametrize(
        "sql",
        [
            "UPDATE Settings SET value = 'least-recently-stored' WHERE key = 'eviction_policy'",
            "UPDATE Settings SET value = 10 WHERE key = 'cull_limit'",
            "UPDATE Settings SET value = 67108864 WHERE key = 'sqlite_mmap_size'",
            "UPDATE Settings SET value = '0' WHERE key = 'cull_limit'",
            "DELETE FROM Settings WHERE key = 'cull_limit'",
            "INSERT INTO Settings VALUES ('sqlite_synchronous = 0; --', 1)",
            "INSERT INTO Settings VALUES ('disk_evil', 1)",
            "CREATE TRIGGER evil AFTER INSERT ON Cache BEGIN DELETE FROM Cache; END",
            "CREATE VIEW evil AS WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n FROM x) SELECT n FROM x",
            "DROP TRIGGER Settings_count_insert",
            "DROP TABLE Settings",
        ],
    )
    def test_any_other_setting_or_table_is_set_aside(self, clean: Path, directory: Path, sql: str) -> None:
        """Nothing of it reaches diskcache; a reader says that it is damaged and changes nothing."""
        copy(clean, directory)
        edit(directory, sql)
        with pytest.raises(LedgerCorrupt):
            Ledger.open(directory, read_only=True).record("00")
        assert ["cache.db", "reserve"] == sorted(os.listdir(directory))
        assert_set_aside(directory).close()

    def test_the_settings_in_force_are_those_written_here(self, directory: Path) -> None:
        """The same dictionary is what diskcache stored and what SQLite does."""
        ledger = Ledger.open(directory)
        stored = dict(ledger._source.query("SELECT key, value FROM Settings"))
        assert dbconnection.SETTINGS == {
            key: stored[key] for key in stored if key not in {"count", "size", "hits", "misses"}
        }
        for key, value in dbconnection.SETTINGS.items():
            if key.startswith("sqlite_"):
                assert [(value,)] == ledger._source.query(f"PRAGMA {key.removeprefix('sqlite_')}")
        ledger.close()


class Evil:
    """Unpickling it makes a file called ``executed``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


class TestTamperedRow:
    """F36: a row that the ledger would not write is moved out of the way, unread, and counted."""

    @pytest.fixture
    def victim(self, tmp_path: Path) -> Path:
        """A file outside the ledger's directory that no row may read or remove."""
        path = tmp_path / "victim"
        path.write_bytes(b"\x80")
        return path

    @pytest.mark.parametrize("when", ["before opening", "in use", "read-only"])
    @pytest.mark.parametrize(
        "change",
        [
            "mode = 4, value = :evil",
            "raw = 0, key = :evil",
            "raw = 0",
            "raw = NULL",
            "mode = 2, filename = '../victim', value = NULL",
            "mode = 3, filename = '../victim', value = NULL",
            "mode = 4, filename = '../victim', value = NULL",
            "filename = '../victim'",
            "value = 'text'",
            "value = 1",
            "value = NULL",
            "value = CAST(x'ff' AS TEXT)",
            "expire_time = 1.0",
            "expire_time = 1e300",
            "value = x''",
            "value = x'c1'",
            "value = x'80'",
            "value = (SELECT value FROM Cache WHERE key = 'run/b')",
        ],
    )
    def test_it_is_absent_and_counted(
        self, directory: Path, tmp_path: Path, victim: Path, change: str, when: str
    ) -> None:
        """Nothing is executed, nothing outside is read or removed, and the run's next commit goes through."""
        executed = tmp_path / "executed"
        ledger = Ledger.open(directory)
        ledger.commit(record("a", 1, "ra"))
        ledger.commit(record("b", 1, "rb"))
        if when == "before opening":
            ledger.close()
        values = {"evil": pickle.dumps(Evil(executed))}
        connection = sqlite3.connect(directory / "cache.db", isolation_level=None)
        connection.execute(f"UPDATE Cache SET {change} WHERE key = 'run/a'", values)
        connection.close()
        if when == "before opening":
            ledger = Ledger.open(directory, report=lambda _: None)
        reader = Ledger.open(directory, read_only=True) if when == "read-only" else ledger

        assert reader.record("a") is None
        assert ["b"] == [found.run_id for found in reader.records()]
        assert reader.record("a") is None
        moved_key = ":evil" in change and "key" in change and when != "before opening"  # no longer among the runs
        assert (0 if moved_key else 1) == reader.quarantined_rows
        ledger.commit(record("a", 2, "ra"))
        assert record("a", 2, "ra") == ledger.record("a")
        ledger.close()
        again = Ledger.open(directory)
        assert record("a", 2, "ra") == again.record("a")
        assert (
            when != "read-only" or (not change.startswith("value = x") and "SELECT" not in change)
        ) == again.quarantined_rows
        again.close()
        assert not executed.exists()
        assert b"\x80" == victim.read_bytes()

    def test_overwriting_and_removing_such_a_row_touches_no_file(self, directory: Path, victim: Path) -> None:
        """Diskcache removes the file of a row that it overwrites or deletes; here the row is moved first."""
        ledger = Ledger.open(directory)
        ledger.commit(record("a", 1, "ra"), view=view(), dead=[letter("a")])
        edit(directory, "UPDATE Cache SET filename = '../victim', mode = 2")
        assert not ledger.drop_dead_letter("000000000001")
        ledger.forget("a")
        ledger.commit(record("a", 2, "ra"), view=view(), dead=[letter("a")])
        ledger.set_meta("m", b"1")
        assert record("a", 2, "ra") == ledger.record("a")
        assert ["000000000002"] == [found.id for found in ledger.dead_letters()]
        assert 5 == ledger.quarantined_rows
        assert victim.exists()
        ledger.close()

    def test_what_it_was_is_kept_for_a_person(self, directory: Path) -> None:
        """The quarantined row has the value, and its former columns in words."""
        ledger = Ledger.open(directory)
        ledger.commit(record("a"))
        edit(directory, "UPDATE Cache SET mode = 4, value = 'v' WHERE key = 'run/a'")
        assert ledger.record("a") is None
        ((tag, value),) = ledger._source.query("SELECT tag, value FROM Cache WHERE key GLOB 'bad/*'")
        assert "key='run/a' raw=1 mode=4 filename=NULL expire_time=NULL type=text" == tag
        assert b"v" == value
        ledger.close()

    def test_a_bad_dead_letter_view_or_map_is_absent(self, directory: Path) -> None:
        """Each kind of row is judged, not only records."""
        ledger = Ledger.open(directory)
        ledger.commit(record("a", 1, "ra"), view=view(), dead=[letter("a"), letter("a", "second")])
        ledger.set_meta("m", b"1")
        edit(directory, "UPDATE Cache SET value = x'ff' WHERE key IN ('view/a', 'remote/ra', 'dead/000000000001')")
        edit(directory, "UPDATE Cache SET value = 1 WHERE key = 'meta/m'")
        assert (None, None, None) == (ledger.view("a"), ledger.local_id("ra"), ledger.meta("m"))
        assert ["second"] == [found.reason for found in ledger.dead_letters()]
        assert 4 == ledger.quarantined_rows
        ledger.commit(record("a", 2, "ra"))
        assert "a" == ledger.local_id("ra")
        ledger.close()

    def test_a_key_that_is_no_text_does_not_stop_a_scan(self, directory: Path) -> None:
        """Invalid UTF-8 in a key is quarantined like any other row."""
        ledger = Ledger.open(directory)
        for index in range(3):
            ledger.commit(record(str(index)))
        edit(directory, "UPDATE Cache SET key = CAST(x'72756e2fff' AS TEXT) WHERE key = 'run/1'")
        assert ["0", "2"] == [found.run_id for found in ledger.records()]
        assert 1 == ledger.quarantined_rows
        ledger.close()


class TestUnsafeFiles:
    """F90: files that somebody else could have put there are refused, with the reason, and left as they are."""

    @pytest.mark.parametrize("read_only", [False, True])
    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("kind", ["symbolic link", "hard link", "pipe", "dangling link"])
    def test_a_link_or_pipe_in_place_of_a_file_is_refused(
        self, clean: Path, directory: Path, tmp_path: Path, *, kind: str, name: str, read_only: bool
    ) -> None:
        """Nothing is opened through it, and opening does not hang."""
        copy(clean, directory)
        elsewhere = tmp_path / "elsewhere"
        path = directory / name
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        else:
            if kind != "dangling link":
                elsewhere.write_bytes(b"precious")
            (os.link if kind == "hard link" else os.symlink)(elsewhere, path)
        with pytest.raises(OutboxUnusable, match="left untouched"):
            Ledger.open(directory, read_only=read_only, report=pytest.fail).record("00")
        assert os.path.lexists(path)
        assert kind in {"pipe", "dangling link"} or b"precious" == elsewhere.read_bytes()
        assert kind != "dangling link" or not elsewhere.exists()

    @pytest.mark.parametrize("read_only", [False, True])
    @pytest.mark.parametrize("mode", [0o755, 0o701, 0o720, 0o777])
    def test_a_directory_open_to_others_is_refused(self, directory: Path, mode: int, *, read_only: bool) -> None:
        """The message names the mode."""
        directory.mkdir()
        directory.chmod(mode)
        (directory / "cache.db").touch(0o600)
        with pytest.raises(OutboxUnusable, match=f"{mode:04o}"):
            Ledger.open(directory, read_only=read_only).record("a")
        assert 0 == os.lstat(directory / "cache.db").st_size

    @pytest.mark.parametrize("target", ["directory", "file", "nothing"])
    def test_a_directory_that_is_a_link_or_a_file_is_refused(
        self, clean: Path, directory: Path, tmp_path: Path, target: str
    ) -> None:
        """Also when what it leads to would be fine."""
        if target == "directory":
            directory.symlink_to(clean)
        elif target == "nothing":
            directory.symlink_to(tmp_path / "nothing")
        else:
            directory.write_bytes(b"")
        for read_only in (False, True):
            with pytest.raises(OutboxUnusable):
                Ledger.open(directory, read_only=read_only).record("00")
        assert not (tmp_path / "nothing").exists()

    @pytest.mark.parametrize("what", ["directory", "database"])
    def test_files_of_another_user_are_refused(
        self, clean: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        """The check is on the owner, not on whether we could open it."""
        copy(clean, directory)
        owners = iter([os.geteuid()] if what == "database" else [])
        ours = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: next(owners, ours + 1))
        with pytest.raises(OutboxUnusable, match="belongs to user"):
            Ledger.open(directory)

    def test_a_place_where_no_directory_can_be_made_is_refused(self, tmp_path: Path) -> None:
        """A file in the way is no passing trouble."""
        (tmp_path / "file").touch()
        with pytest.raises(OutboxUnusable):
            Ledger.open(tmp_path / "file" / "delivery")

    def test_a_link_put_there_while_the_ledger_is_in_use_is_refused(self, directory: Path, tmp_path: Path) -> None:
        """A connection that has to be opened anew checks again."""
        ledger = Ledger.open(directory)
        ledger.commit(record("a"))
        with pytest.raises(TypeError):
            ledger.set_meta("m", "no bytes")  # type: ignore[arg-type]  # bad input
        shutil.move(directory / "cache.db", tmp_path / "moved")
        (directory / "cache.db").symlink_to(tmp_path / "moved")
        with pytest.raises(OutboxUnusable, match="symbolic link"):
            ledger.commit(record("a"))
        ledger.close()
