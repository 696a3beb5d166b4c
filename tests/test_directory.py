"""The outbox directory: how it is made, and what is refused (F22, F90, F92)."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_outbox.destination import resolve
from mlflow_outbox.errors import OutboxMismatch, OutboxUnusable
from mlflow_outbox.spool.directory import OutboxDirectory, find_outboxes, is_run_id
from mlflow_outbox_worker.sources import find_runs
from spools import make_journal, make_outbox, metric

HERE = resolve("http://user:canary-secret@127.0.0.1:9")


def test_everything_in_an_outbox_is_the_users_alone(tmp_path: Path) -> None:
    """Directories 0700, files 0600, under the umask of anybody; and the umask stays."""
    before = os.umask(0o000)
    try:
        outbox = make_outbox(tmp_path / "root")
        outbox.make_run("a" * 32)
        outbox.ring("a" * 32)
        outbox.ask_hurry()
        assert 0o000 == os.umask(0o000)
    finally:
        os.umask(before)
    found = [*outbox.path.rglob("*"), outbox.path]
    assert {0o700} == {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_dir()}
    assert {0o600} == {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_file()}


def test_an_outbox_is_opened_again_as_the_same(tmp_path: Path) -> None:
    """By its root and destination, or by its own path; the identity stays."""
    first = make_outbox(tmp_path)
    assert first.identity == make_outbox(tmp_path).identity == make_outbox(first.path).identity
    assert first.identity == OutboxDirectory.open(first.path).identity
    assert [first.path] == find_outboxes(tmp_path) == find_outboxes(first.path)
    assert [] == find_outboxes(tmp_path / "none")


#: Makes an outbox and dies once its identity has its name, before the draft of it is gone.
KILLED_WHILE_MAKING = """
import os, signal, sys
from pathlib import Path
from mlflow_outbox.destination import resolve
from mlflow_outbox.spool.directory import OutboxDirectory

os.unlink = lambda path: os.kill(os.getpid(), signal.SIGKILL)
OutboxDirectory.create(Path(sys.argv[1]), resolve("http://127.0.0.1:9"), now_ms=1)
"""


def test_what_a_process_has_left_that_was_killed_while_it_made_an_outbox_is_removed(tmp_path: Path) -> None:
    """By the next one that opens it."""
    child = subprocess.run([sys.executable, "-c", KILLED_WHILE_MAKING, str(tmp_path)], timeout=60, check=False)
    assert -signal.SIGKILL == child.returncode
    (left,) = find_outboxes(tmp_path)
    assert 1 == len(list(left.glob(".outbox.json-*")))
    outbox = make_outbox(tmp_path)
    assert ([], left) == (list(left.glob(".*")), outbox.path)
    assert outbox.identity == OutboxDirectory.open(left).identity


def test_a_process_that_was_overtaken_while_it_made_an_outbox_goes_on_with_the_other_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are no hard links: a third one has removed the draft before it could get its name."""
    rename, made = os.rename, []

    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def overtaken(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        made.append(make_outbox(tmp_path))  # another process
        make_outbox(tmp_path)  # a third
        rename(source, target)

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(os, "rename", overtaken)
    assert make_outbox(tmp_path).identity == made[0].identity


def test_no_credential_is_written_into_an_outbox(tmp_path: Path) -> None:
    """I10, F93: neither in its name nor in any file."""
    outbox = OutboxDirectory.create(tmp_path, HERE, now_ms=1)
    assert "canary-secret" not in repr(outbox) + str(outbox.path) + str(outbox.destination)
    assert all(b"canary-secret" not in path.read_bytes() for path in outbox.path.rglob("*") if path.is_file())


def _open_to_others(path: Path) -> None:
    path.chmod(0o750)


def _link(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


def _not_a_directory(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.write_text("")


def _empty_identity(path: Path) -> None:
    (path / "outbox.json").write_bytes(b"")


def _identity_without_utf_8(path: Path) -> None:
    (path / "outbox.json").write_bytes(b'{"format": 1, "id": "\xff"}')


def _identity_nested_too_deeply(path: Path) -> None:
    (path / "outbox.json").write_bytes(b'{"format": 1, "later": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


def _damaged_identity(path: Path) -> None:
    (path / "outbox.json").write_bytes(b'{"format": "\xff"')


def _identity_is_a_fifo(path: Path) -> None:
    (path / "outbox.json").unlink()
    os.mkfifo(path / "outbox.json")


def _identity_is_a_link(path: Path) -> None:
    (path / "outbox.json").rename(path / "real.json")
    (path / "outbox.json").symlink_to("real.json")


def _foreign_owner(path: Path) -> None:
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        path.chmod(0o770)


@pytest.mark.parametrize(
    "harm",
    [
        _open_to_others,
        _link,
        _not_a_directory,
        _empty_identity,
        _damaged_identity,
        _identity_without_utf_8,
        _identity_nested_too_deeply,
        _identity_is_a_fifo,
        _identity_is_a_link,
        _foreign_owner,
    ],
)
def test_an_outbox_that_cannot_be_trusted_is_refused_and_left_alone(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    """F90: the error names the path, and nothing is repaired behind the user's back."""
    path = make_outbox(tmp_path).path
    harm(path)
    for opened in (lambda: OutboxDirectory.open(path), lambda: make_outbox(tmp_path)):
        with pytest.raises(OutboxUnusable, match=str(tmp_path)):
            opened()


@pytest.mark.parametrize("kind", ["a link", "a pipe"])
@pytest.mark.parametrize(
    "part",
    [
        *("runs", "delivered", "refused", "quarantine"),
        *("worker.lock", "host.lease", "doorbell", "size", "hurry", "wanted", "budget"),
    ],
)
def test_an_outbox_whose_part_leads_elsewhere_is_refused(part: str, kind: str, tmp_path: Path) -> None:
    """F90: who packed it may have made it so, and it is unpacked as the user's own; nobody waits for a pipe."""
    path = make_outbox(tmp_path / "root").path
    if (path / part).is_dir():
        (path / part).rmdir()
    if kind == "a link":
        (path / part).symlink_to(tmp_path)
    else:
        os.mkfifo(path / part)
    for opened in (lambda: OutboxDirectory.open(path), lambda: make_outbox(tmp_path / "root")):
        with pytest.raises(OutboxUnusable, match=part):
            opened()


def test_runs_of_another_outbox_to_which_a_link_leads_are_not_replayed(tmp_path: Path) -> None:
    """F90: what is private would be sent to wherever the outbox with the link goes."""
    mine, given = make_outbox(tmp_path / "mine"), make_outbox(tmp_path / "given")
    journal = make_journal(mine)
    assert journal.append(metric(1))
    journal.close()
    given.runs.rmdir()
    given.runs.symlink_to(mine.runs)
    found = find_runs(given.path)
    assert ({}, True) == (found.runs, "symbolic link" in found.problems[0]), found


def test_a_root_that_everybody_may_write_to_is_refused(tmp_path: Path) -> None:
    """Somebody could swap the outbox in it; with the sticky bit nobody can."""
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(OutboxUnusable, match="chmod o-w"):
        make_outbox(root)
    root.chmod(0o1777)
    make_outbox(root)


@pytest.mark.parametrize("is_there", [False, True], ids=["root", "outbox"])
def test_where_modes_cannot_be_set_the_refusal_says_what_helps(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Windows disk under WSL, or a share of one, everything stays open to everybody whatever ``chmod`` is told."""
    root, mkdir = tmp_path / "root", os.mkdir
    if is_there:
        root.mkdir(0o700)

    def open_to_all(path: Path, _mode: int = 0o777) -> None:
        mkdir(path)
        os.chmod(path, 0o777)

    monkeypatch.setattr(os, "mkdir", open_to_all)
    with pytest.raises(OutboxUnusable, match="MLFLOW_OUTBOX_DIR"):
        make_outbox(root)


@pytest.mark.parametrize("path", ["~no-such-user-here/outbox", "a\0b"])
def test_a_path_that_no_system_call_takes_is_refused_like_any_other(path: str) -> None:
    """The caller has one error to handle."""
    with pytest.raises(OutboxUnusable):
        make_outbox(Path(path))
    with pytest.raises(OutboxUnusable):
        OutboxDirectory.open(Path(path))
    with pytest.raises(OutboxUnusable):
        find_outboxes(Path(path))


def test_a_place_where_no_directory_can_be_made_is_refused(tmp_path: Path) -> None:
    """A file in the way."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutboxUnusable, match="cannot be made"):
        make_outbox(tmp_path / "file" / "below")
    with pytest.raises(OutboxUnusable):
        OutboxDirectory.open(tmp_path / "missing")


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_disk_that_fails_for_a_moment_does_not_disable_tracking(
    fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F21: what a network file system answers once is asked again; what it goes on to answer is said."""
    left = [fails]
    mkdir = os.mkdir

    def fail(path: str | Path, mode: int = 0o777) -> None:
        if Path(path).name == "runs" and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", fail)
    if fails < 3:
        assert make_outbox(tmp_path).runs.is_dir()
    else:
        with pytest.raises(OutboxUnusable, match="Input/output error"):
            make_outbox(tmp_path)
    assert 0 == left[0]


def test_an_outbox_of_another_destination_is_refused(tmp_path: Path) -> None:
    """Two destinations never share a queue; F92: an edited file is not obeyed either."""
    path = make_outbox(tmp_path).path
    with pytest.raises(OutboxMismatch, match="another directory"):
        OutboxDirectory.create(path, resolve("http://elsewhere"), now_ms=1)
    identity = json.loads((path / "outbox.json").read_text())
    (path / "outbox.json").write_text(json.dumps(identity | {"destination": "http://evil"}))
    with pytest.raises(OutboxMismatch):
        make_outbox(tmp_path)


def test_a_newer_format_is_left_untouched(tmp_path: Path) -> None:
    """F37: a newer version's outbox is refused with the remedy; unknown fields of this format are fine."""
    path = make_outbox(tmp_path).path
    identity = json.loads((path / "outbox.json").read_text())
    (path / "outbox.json").write_text(json.dumps(identity | {"later": [1]}))
    assert identity["id"] == OutboxDirectory.open(path).identity.id
    (path / "outbox.json").write_text(json.dumps(identity | {"format": 99}))
    before = (path / "outbox.json").read_bytes()
    with pytest.raises(OutboxMismatch, match="upgrade"):
        OutboxDirectory.open(path)
    assert before == (path / "outbox.json").read_bytes()


def test_many_processes_and_threads_that_make_one_outbox_agree(tmp_path: Path) -> None:
    """Whoever is first wins, all see the same id, and no draft is left."""
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from spools import *
sys.stdin.readline()
print(make_outbox(Path({str(tmp_path)!r})).identity.id)
"""
    command = [sys.executable, "-c", code]
    others = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    ids: list[str] = []
    threads = [threading.Thread(target=lambda: ids.append(make_outbox(tmp_path).identity.id)) for _ in range(8)]
    for other in others:
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids += [other.communicate(timeout=60)[0].strip() for other in others]
    assert 1 == len(set(ids))
    assert {"outbox.json", "runs", "delivered", "delivery"} == {
        path.name for path in make_outbox(tmp_path).path.iterdir()
    }


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_directory_that_is_swapped_while_in_use_is_noticed(tmp_path: Path, how: str) -> None:
    """F22: nothing is written into what has come in its place."""
    outbox = make_outbox(tmp_path)
    outbox.path.rename(tmp_path / "away")
    if how == "replaced":
        outbox.path.mkdir(mode=0o700)
    with pytest.raises(OutboxUnusable):
        outbox.make_run("a" * 32)


@pytest.mark.parametrize("text", ["a", "0" * 32, "A-b_c", "a" * 256])
def test_ids_that_mlflow_takes_are_run_ids(text: str) -> None:
    """They are safe as names of directories."""
    assert is_run_id(text)


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "-a", "_a", "a" * 257, "ä", "a\n", "a\0", 5, None])
def test_anything_else_is_no_run_id(text: str) -> None:
    """F91: nothing that could leave the directory."""
    assert not is_run_id(text)


def test_only_directories_with_proper_names_count_as_runs(tmp_path: Path) -> None:
    """Links and files are ignored."""
    outbox = make_outbox(tmp_path)
    outbox.make_run("b" * 32)
    outbox.make_run("a" * 32)
    (outbox.runs / "file").write_text("")
    (outbox.runs / "link").symlink_to("a" * 32)
    (outbox.runs / ".hidden").mkdir()
    assert ["a" * 32, "b" * 32] == outbox.run_ids()
    assert [] == outbox.delivered_ids()


def test_the_doorbell_tells_each_run_once_and_survives_being_emptied(tmp_path: Path) -> None:
    """A worker that looks at the bell need not look at all runs."""
    outbox = make_outbox(tmp_path)
    assert (set(), 0) == outbox.rung(0)
    outbox.ring("a" * 32)
    outbox.ring("b" * 32)
    first = outbox.rung(0)
    assert first is not None
    assert {"a" * 32, "b" * 32} == first[0]
    assert (set(), first[1]) == outbox.rung(first[1])
    with (outbox.path / "doorbell").open("ab") as bell:
        bell.write(b"../evil\n" * 40_000 + b"half a li")
    outbox.ring("c" * 32)
    outbox.answer_doorbell()
    assert outbox.rung(first[1]) is None
    outbox.ring("d" * 32)
    found = outbox.rung(0)
    assert found is not None
    assert "../evil" not in found[0]


def test_the_doorbell_leads_to_nothing_outside(tmp_path: Path) -> None:
    """F90: neither a run that is a link nor a file that the bell itself is a link to."""
    outbox = make_outbox(tmp_path)
    (outbox.runs / "linked").symlink_to(tmp_path)
    outbox.ring("linked")
    outbox.ring("a" * 32)
    found = outbox.rung(0)
    assert found is not None
    assert {"a" * 32} == found[0]
    victim = tmp_path / "thesis"
    victim.write_bytes(b"x" * 300_000)
    (outbox.path / "doorbell").unlink()
    (outbox.path / "doorbell").symlink_to(victim)
    outbox.answer_doorbell()
    assert 300_000 == victim.stat().st_size


def test_hurry_is_seen_each_time(tmp_path: Path) -> None:
    """Two requests within one tick of a clock are two."""
    outbox = make_outbox(tmp_path)
    assert 0 == outbox.hurry_asked()
    seen = set()
    for _ in range(20):
        outbox.ask_hurry()
        seen.add(outbox.hurry_asked())
    assert 20 == len(seen)


def test_a_run_that_is_filed_while_it_is_looked_at_has_no_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there at one look may be gone at the next: that is no error of the disk."""
    directory = OutboxDirectory.create(tmp_path / "outbox", resolve("http://127.0.0.1:9"), now_ms=0)
    run_id = "a" * 32
    folder = directory.make_run(run_id)
    (folder / "one.log").touch()
    (folder / "other").touch()
    assert [folder / "one.log"] == directory.segments(run_id)
    listdir = os.listdir

    def filed_first(path: Path) -> list[str]:
        os.rename(folder, directory.delivered / run_id)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", filed_first)
    assert [] == directory.segments(run_id)
