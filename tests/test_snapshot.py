"""Copies of artifact files (F68), and the paths that they may have (F91)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlflow_outbox.errors import ArtifactRefused, InvalidEvent, InvalidEventType
from mlflow_outbox.spool import snapshot
from mlflow_outbox.spool.artifact_path import checked_artifact_path
from mlflow_outbox.spool.snapshot import SnapshotStore, alone, is_digest
from servers import eventually

LIMIT = 10_000_000


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    """The files of one run."""
    (tmp_path / "run").mkdir()
    return SnapshotStore(tmp_path / "run")


@pytest.mark.parametrize("size", [0, 1, 1024 * 1024, 3 * 1024 * 1024 + 1])
def test_a_copy_is_the_file_as_it_was(store: SnapshotStore, tmp_path: Path, size: int) -> None:
    """Named by its content, readable by the user alone; the source may go."""
    data = os.urandom(size)
    (tmp_path / "source").write_bytes(data)
    kept = store.add_file(tmp_path / "source", limit=LIMIT)
    (tmp_path / "source").unlink()
    assert (hashlib.sha256(data).hexdigest(), size) == kept
    assert data == (store.path / kept.sha256).read_bytes()
    assert 0o600 == stat.S_IMODE((store.path / kept.sha256).stat().st_mode)
    assert 0o700 == stat.S_IMODE(store.path.stat().st_mode)
    assert is_digest(kept.sha256)


def test_the_same_content_is_kept_once(store: SnapshotStore, tmp_path: Path) -> None:
    """As a file and as bytes."""
    (tmp_path / "source").write_bytes(b"same")
    assert store.add_file(tmp_path / "source", limit=9) == store.add_bytes(b"same", limit=9)
    assert 1 == len(list(store.path.iterdir()))


@pytest.mark.parametrize("durable", [False, True])
def test_a_copy_that_is_there_stays_where_the_same_content_is_logged_again(tmp_path: Path, durable: bool) -> None:
    """F16: a durable event may name it; a power cut may take the content of what took its place, and not its name."""
    (tmp_path / "run").mkdir()
    store = SnapshotStore(tmp_path / "run", durable=durable)
    place = store.path / store.add_bytes(b"same", limit=9).sha256
    before = place.stat().st_ino
    for _ in range(2):
        store.add_bytes(b"same", limit=9)
        assert before == place.stat().st_ino
    for damage in (b"", b"tame"):
        place.write_bytes(damage)
        store.add_bytes(b"same", limit=9)
        assert b"same" == place.read_bytes()
        assert before != place.stat().st_ino
        before = place.stat().st_ino
    assert [place] == list(store.path.iterdir())


def test_a_link_is_followed_to_its_file(store: SnapshotStore, tmp_path: Path) -> None:
    """It is the user's own, given on purpose."""
    (tmp_path / "source").write_bytes(b"x")
    (tmp_path / "link").symlink_to("source")
    assert 1 == store.add_file(tmp_path / "link", limit=9).size


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "socket", "device", "dangling", "nul", "loop"])
def test_what_is_no_regular_file_is_refused_without_waiting(store: SnapshotStore, tmp_path: Path, kind: str) -> None:
    """F68: a FIFO without a writer would stop the experiment."""
    import socket

    path = tmp_path / "source"
    makers: dict[str, Callable[[], object]] = {
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "dangling": lambda: path.symlink_to("nowhere"),
        "loop": lambda: path.symlink_to(path),
    }
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "socket":
            server.bind(str(path))
        makers.get(kind, lambda: None)()
        source = {"device": "/dev/zero", "nul": "a\0b"}.get(kind, str(path))
        with pytest.raises(ArtifactRefused) as caught:
            store.add_file(source, limit=LIMIT)
    assert "bad_file" == caught.value.reason
    assert not store.path.exists() or [] == list(store.path.iterdir())


def test_a_file_beyond_the_limit_is_refused_and_leaves_nothing(
    store: SnapshotStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the copy by its size, during the copy when it grows."""
    path = tmp_path / "source"
    path.write_bytes(b"x" * 100)
    with pytest.raises(ArtifactRefused, match="artifact_bytes"):
        store.add_file(path, limit=99)
    assert 100 == store.add_file(path, limit=100).size
    real = os.fstat

    def smaller(fd: int) -> os.stat_result:
        found = list(real(fd))
        found[6] = 0
        return os.stat_result(found)

    monkeypatch.setattr(snapshot.os, "fstat", smaller)
    with pytest.raises(ArtifactRefused, match="grew"):
        store.add_file(path, limit=99)
    assert 1 == len(list(store.path.iterdir()))


def test_a_full_disk_refuses_the_file_and_leaves_no_draft(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is a counter's name, and the next file is kept."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        for call in ("link", "rename"):
            patch.setattr(snapshot.os, call, full)
        with pytest.raises(ArtifactRefused) as caught:
            store.add_bytes(b"x", limit=9)
    assert "no_room_for_file" == caught.value.reason
    assert [] == list(store.path.iterdir())
    assert 1 == store.add_bytes(b"x", limit=9).size


def test_a_file_that_cannot_be_read_to_its_end_is_the_trouble_and_not_the_outbox(
    store: SnapshotStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk, or a server of files, that fails in the middle; each such file is named."""
    (tmp_path / "source").write_bytes(b"x" * 1000)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "read", fail)
    with pytest.raises(ArtifactRefused, match="source' cannot be read: Input/output error") as caught:
        store.add_file(tmp_path / "source", limit=LIMIT)
    assert "bad_file" == caught.value.reason
    assert [] == list(store.path.iterdir())


def test_a_file_that_is_larger_than_what_is_free_is_not_begun(
    store: SnapshotStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk would be full to its last byte while it is copied, for the program too, and for nothing."""
    (tmp_path / "large").write_bytes(b"x" * 1000)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=999, f_frsize=1, f_blocks=1))
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "create_private", lambda _: pytest.fail("begun"))
        with pytest.raises(ArtifactRefused, match="1,000 bytes, 999 are free") as caught:
            store.add_file(tmp_path / "large", limit=LIMIT)
        assert "no_room_for_file" == caught.value.reason
        with pytest.raises(ArtifactRefused, match="1,000 bytes, 999 are free"):
            store.add_bytes(b"x" * 1000, limit=LIMIT)
    assert 999 == store.add_bytes(b"x" * 999, limit=LIMIT).size
    with pytest.raises(ArtifactRefused, match="99 bytes, 999 are free there, the setting free_bytes keeps 901"):
        SnapshotStore(store.path.parent, keeps_free=901).add_bytes(b"x" * 99, limit=LIMIT)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=1, f_blocks=0))
    assert 1000 == store.add_file(tmp_path / "large", limit=LIMIT).size, "a file system that does not tell"


def test_a_copy_that_is_interrupted_leaves_no_draft(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt in the middle of a large file."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot.os, "link", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.add_bytes(b"x", limit=9)
    assert [] == list(store.path.iterdir())


def test_a_copy_is_made_while_a_worker_takes_its_directory_away(store: SnapshotStore) -> None:
    """Again and again: a run that goes on while it is filed. Nothing is refused, and nothing is moved half-made."""
    moved, done = store.path.parent / "moved", threading.Event()
    moved.mkdir()
    seen: list[int] = []

    def take() -> None:
        while not done.is_set():
            with contextlib.suppress(FileNotFoundError), alone(store.path) as is_alone:
                if is_alone:
                    for name in os.listdir(store.path):
                        assert is_digest(name)
                        os.rename(store.path / name, moved / name)
                        seen.append(1)
                    os.rmdir(store.path)

    with ThreadPoolExecutor() as pool:
        taking = pool.submit(take)
        kept = [store.add_bytes(str(number).encode(), limit=9) for number in range(2000)]
        eventually(lambda: not store.path.exists())
        done.set()
        taking.result()
    assert 2000 == len({one.sha256 for one in kept}) == len(list(moved.iterdir())) == len(seen)


def test_a_worker_has_no_copy_to_itself_while_a_file_is_logged(store: SnapshotStore) -> None:
    """Nor while several are; a child that was forked meanwhile and lives on keeps nobody from them."""
    with store.held():
        with store.held():
            store.add_bytes(b"x", limit=9)
        with alone(store.path) as is_alone:
            assert not is_alone
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    with alone(store.path) as is_alone:
        assert is_alone
    os.close(writer)
    os.waitpid(child, 0)
    os.close(reader)


def test_a_worker_that_was_stopped_with_copies_to_itself_costs_a_refusal(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call does not hang."""
    store.add_bytes(b"x", limit=9)
    monkeypatch.setattr(snapshot, "_PATIENCE", 0.05)
    with alone(store.path), pytest.raises(ArtifactRefused) as caught:
        store.add_bytes(b"y", limit=9)
    assert "files_in_use" == caught.value.reason
    assert 1 == store.add_bytes(b"y", limit=9).size


def test_a_copy_whose_event_was_refused_goes_if_no_other_event_can_name_it(store: SnapshotStore) -> None:
    """One that was there before stays, and one that somebody else has made again or is just logging."""

    def discarded(before: Callable[[], object] = lambda: None, after: Callable[[], object] = lambda: None) -> bool:
        before()
        with store.held() as hold:
            kept = store.add_bytes(b"x", limit=9, hold=hold)
            after()
            hold.discard(kept.sha256)
        there = (store.path / kept.sha256).exists()
        (store.path / kept.sha256).unlink(missing_ok=True)
        return not there

    def make() -> None:
        store.add_bytes(b"x", limit=9)

    assert discarded()
    assert not discarded(before=make)
    assert not discarded(after=make)
    with store.held():
        assert not discarded()


def test_a_durable_copy_has_its_names_synced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut must not take the name of a file that a durable event speaks of: its own, and that of ``files``."""
    synced: list[str] = []
    monkeypatch.setattr(snapshot, "sync_directory", lambda path: synced.append(path.name))
    (tmp_path / "run").mkdir()
    SnapshotStore(tmp_path / "run", durable=True).add_bytes(b"x", limit=9)
    assert ["files", "run"] == synced
    synced.clear()
    store = SnapshotStore(tmp_path / "run")
    kept = store.add_bytes(b"y", limit=9)
    assert [] == synced
    store.sync(kept.sha256)
    assert ["files", "run"] == synced


def test_syncing_a_copy_that_is_gone_says_so(store: SnapshotStore) -> None:
    """The journal counts it."""
    store.add_bytes(b"x", limit=9)
    with pytest.raises(OSError):
        store.sync("0" * 64)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ""),
        ("a.txt", "a.txt"),
        ("a/b c/d.txt", "a/b c/d.txt"),
        ("a//b/./c", "a/b/c"),
        ("ä/名.txt", "ä/名.txt"),
        ("a./b. /c ", "a./b. /c "),
        ("👩\u200d💻/soft\u00adhy\u202e.txt", "👩\u200d💻/soft\u00adhy\u202e.txt"),
        ("esc\x1b/\x7f\t\r", "esc\x1b/\x7f\t\r"),
        ("back\\slash", "back\\slash"),
        ("a%5cb/100%", "a%5cb/100%"),
        ("a:b/c:/d:", "a:b/c:/d:"),
        ("./c:", "c:"),
        ("...", "..."),
        (("x" * 249 + "/") * 13 + "y", ("x" * 249 + "/") * 13 + "y"),
        ("ü" * 127 + "a/" + "x" * 255, "ü" * 127 + "a/" + "x" * 255),
    ],
)
def test_a_plain_relative_path_is_taken(given: str, expected: str) -> None:
    """In MLflow's form."""
    assert expected == checked_artifact_path(given)
    assert "a/b" == checked_artifact_path(Path("a") / "b")


@pytest.mark.parametrize(
    "path",
    [
        "/a",
        "//a",
        "..",
        "../a",
        "a/../../b",
        "a/..",
        "%2e%2e/a",
        "%252e%252e/a",
        "%25252e%25252e%25252fa",
        "c:/a",
        ".//c:/a",
        "C:\\a",
        "%43:%5ca",
        "c:../a",
        "\\a",
        "a\\..\\b",
        "a/.. /b",
        "a%" + "25" * 10 + "2e",
        "a%0ab",
        ("x" * 249 + "/") * 14 + "y",
        "a\0b",
        "a%00b",
        "a#b",
        "a%23b",
        "a\nb",
        "x" * 1001,
        "ü" * 128,
        "a/" + "x" * 256 + "/b",
        "a\ud800b",
        "%2fetc/passwd",
    ],
)
def test_a_path_that_could_leave_the_run_is_refused(path: str) -> None:
    """F91: whatever a server may decode it to."""
    with pytest.raises(InvalidEvent):
        checked_artifact_path(path)


@pytest.mark.parametrize("path", [5, None, b"a", 1.5, ["a"]])
def test_what_is_no_path_is_refused_by_type(path: object) -> None:
    """With the error of the tree, not a bare TypeError."""
    with pytest.raises(InvalidEventType):
        checked_artifact_path(path)  # type: ignore[arg-type]  # bad input


@pytest.mark.parametrize("path", ["a#b", "a%23b", "a\nb", "a%0ab"])
def test_what_only_mlflows_server_refuses_is_taken_for_other_places(path: str) -> None:
    """A directory or a storage that is written to itself has no such rule."""
    assert path == checked_artifact_path(path, served=False)
    with pytest.raises(InvalidEvent):
        checked_artifact_path("/" + path, served=False)


def test_a_folder_that_mlflow_refuses_is_refused_at_the_call() -> None:
    """MLflow takes no folder whose name begins with two dots, however it goes on; a file may be called so."""
    with pytest.raises(InvalidEvent, match="folder whose name begins"):
        checked_artifact_path("...plots/loss.png")
    assert "...loss.png" == checked_artifact_path("...loss.png")
    assert "plots/...loss.png" == checked_artifact_path("plots/...loss.png")
