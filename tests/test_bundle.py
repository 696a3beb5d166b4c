"""Runs travel in one file, whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import gzip
import io
import os
import shutil
import socket
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from commands import make_unreadable
from contents import QUICK, artifact_text, numbered, points, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.destination import resolve
from mlflow_outbox.spool import filesystem
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker import packing, unpacking
from mlflow_outbox_worker.bundle import MANIFEST, BundledRun, BundleRefused, Manifest, read_manifest, sealed
from mlflow_outbox_worker.jobs import view_of
from mlflow_outbox_worker.packing import write_bundle
from mlflow_outbox_worker.requeue import bring_back
from mlflow_outbox_worker.sources import find_runs
from mlflow_outbox_worker.unpacking import Imported, import_bundle
from replays import command, contents_of, log_offline, run_with_kills, the_outbox
from servers import eventually
from spools import RUN, Kit

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def bundle(tmp_path: Path, experiment_name: str) -> Path:
    """A bundle of two runs."""
    for name in ("one", "two"):
        log_offline(experiment_name, NOWHERE, tmp_path / "from", name=name)
    exported(tmp_path / "from", tmp_path / "runs.tar")
    return tmp_path / "runs.tar"


def exported(root: Path, target: Path) -> None:
    """Export all runs of the outbox under a root."""
    write_bundle(target, find_runs(the_outbox(root)).runs, resolve(NOWHERE), now_ms=1, replace=True)


def outbox(root: Path) -> OutboxDirectory:
    """Return the outbox under a root, which is made."""
    return OutboxDirectory.create(root, resolve(NOWHERE), now_ms=1)


def views(root: Path) -> dict[str, object]:
    """Return every run of the outbox under a root as its events describe it."""
    return {run_id: view_of(folders) for run_id, folders in find_runs(the_outbox(root)).runs.items()}


@pytest.mark.parametrize("when", ["before it is looked at", "before it is copied"])
def test_a_run_that_is_filed_meanwhile_goes_in_whole(
    when: str, tmp_path: Path, experiment_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker moves its files between the look at what there is and their copies."""
    run_id = log_offline(experiment_name, NOWHERE, tmp_path / "from")
    directory = the_outbox(tmp_path / "from")

    def file_it() -> None:
        (directory / "runs" / run_id).rename(directory / "delivered" / run_id)

    found = find_runs(directory).runs
    if when == "before it is looked at":
        file_it()
    else:
        seal = packing.sealed
        monkeypatch.setattr(packing, "sealed", lambda manifest: (file_it(), seal(manifest))[1])
    write_bundle(tmp_path / "runs.tar", found, resolve(NOWHERE), now_ms=1)
    import_bundle(tmp_path / "runs.tar", outbox(tmp_path / "to"))
    assert views(tmp_path / "from") == views(tmp_path / "to")


@pytest.mark.parametrize("when", ["before it is looked at", "before it is copied"])
@pytest.mark.parametrize("others", [True, False])
def test_a_run_that_is_reclaimed_meanwhile_is_left_out_and_named(
    others: bool,
    when: str,
    tmp_path: Path,
    experiment_name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The bundle says nothing of it, and there is none when nothing is left."""
    gone = log_offline(experiment_name, NOWHERE, tmp_path / "from")
    held = [log_offline(experiment_name, NOWHERE, tmp_path / "from")] if others else []

    late = "write_bundle" if "looked" in when else "sealed"
    work = getattr(packing, late)

    def work_late(*arguments: Any, **more: Any) -> Any:
        shutil.rmtree(the_outbox(tmp_path / "from") / "runs" / gone, ignore_errors=True)
        return work(*arguments, **more)

    monkeypatch.setattr(packing, late, work_late)
    assert 1 == command("export", "--all", "-o", tmp_path / "runs.tar", "-d", tmp_path / "from")
    assert f"run {gone} was left out: it is not on disk any more" in capsys.readouterr().err
    assert others == (tmp_path / "runs.tar").exists()
    assert held == ([run.run_id for run in read_manifest(tmp_path / "runs.tar").runs] if others else [])


@pytest.mark.parametrize("name", ["runs.tar", "runs.tar.gz"])
def test_runs_arrive_as_they_were(name: str, tmp_path: Path, experiment_name: str) -> None:
    """All events and files, byte by byte; gzipped when the name says so."""
    for run in ("one", "two"):
        log_offline(experiment_name, NOWHERE, tmp_path / "from", name=run)
    exported(tmp_path / "from", tmp_path / name)
    assert name.endswith("gz") == ((tmp_path / name).read_bytes()[:2] == b"\x1f\x8b")
    assert {"new"} == set(import_bundle(tmp_path / name, outbox(tmp_path / "to")).values())
    assert views(tmp_path / "from") == views(tmp_path / "to")
    before, after = (contents_of(the_outbox(tmp_path / place) / "runs") for place in ("from", "to"))
    assert {k: v[2] for k, v in before.items()} == {k: v[2] for k, v in after.items()}


def test_a_file_that_is_filed_here_comes_again_with_a_segment_that_may_name_it(tmp_path: Path) -> None:
    """The run goes on in two places and logs the same file in both; what is filed gives way at any time."""
    here, there = Kit(tmp_path / "here"), Kit(tmp_path / "there")
    for kit in (here, there):
        assert kit.run.log_text("same", f"{kit.outbox.path.parent.name}.txt")
        kit.journal.close()
    files, filed = here.outbox.run(RUN) / "files", here.outbox.delivered / RUN
    filed.mkdir()
    files.rename(filed / "files")
    write_bundle(tmp_path / "runs.tar", {RUN: (there.outbox.run(RUN),)}, resolve(NOWHERE), now_ms=1)
    assert {RUN: "completed"} == import_bundle(tmp_path / "runs.tar", here.outbox)
    assert ["same"] == [path.read_text() for path in files.iterdir()]
    assert {RUN: "unchanged"} == import_bundle(tmp_path / "runs.tar", here.outbox)


def test_a_bundle_is_carried_to_another_machine_and_delivered(
    tmp_path: Path,
    sqlite_uri: str,
    experiment_name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Export, the machine is gone, import, flush: the run is in MLflow."""
    log_offline(experiment_name, sqlite_uri, tmp_path / "from")
    assert 0 == command("export", "--all", "-o", "runs.tar", "--outbox-dir", tmp_path / "from")
    shutil.rmtree(tmp_path / "from")
    assert 0 == command("import", "runs.tar", "--outbox-dir", tmp_path / "to")
    assert 0 == command("flush", "--outbox-dir", tmp_path / "to", "--timeout", "60")
    run = the_run(sqlite_uri, experiment_name)
    assert numbered(100) == points(sqlite_uri, run.info.run_id, "loss")
    assert "report of offline" == artifact_text(sqlite_uri, run.info.run_id, "reports/report.txt")
    assert "1 run" in capsys.readouterr().out


def test_an_import_twice_changes_nothing(bundle: Path, tmp_path: Path) -> None:
    """The second one finds everything there."""
    directory = outbox(tmp_path / "to")
    import_bundle(bundle, directory)
    before = contents_of(directory.runs)
    assert {"unchanged"} == set(import_bundle(bundle, directory).values())
    assert before == contents_of(directory.runs)
    assert [] == [path.name for path in directory.path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["ext4", "nfs4"])
def test_two_imports_at_once_put_each_run_there_once(
    kind: str, tmp_path: Path, experiment_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one comes when the first has looked at what the outbox has, and begins to add to it."""
    monkeypatch.setattr(filesystem, "read_mountinfo", lambda: f"1 1 0:1 / {tmp_path} rw - {kind} filer:/ rw")
    monkeypatch.setattr(filesystem, "_known", {})
    for name in ("one", "two"):
        log_offline(experiment_name, NOWHERE, tmp_path / "from", name=name)
    exported(tmp_path / "from", tmp_path / "runs.tar")
    directory, publish, flock = outbox(tmp_path / "to"), unpacking._publish, fcntl.flock
    second: list[Future[dict[str, Imported]]] = []
    begun, waits = threading.Event(), threading.Event()

    def publish_late(*arguments: Any) -> Imported:
        if not begun.is_set():
            begun.set()
            second.append(pool.submit(import_bundle, tmp_path / "runs.tar", directory))
            eventually(lambda: waits.is_set() or second[0].done())
        return publish(*arguments)

    def noted(fd: Any, operation: int) -> None:
        if begun.is_set() and operation == fcntl.LOCK_EX:
            waits.set()
        flock(fd, operation)

    monkeypatch.setattr(unpacking, "_publish", publish_late)
    monkeypatch.setattr(fcntl, "flock", noted)
    with ThreadPoolExecutor(1) as pool:
        assert ["new"] * 2 == list(import_bundle(tmp_path / "runs.tar", directory).values())
        assert ["unchanged"] * 2 == list(second[0].result(60).values())
    assert views(tmp_path / "from") == views(tmp_path / "to")


def test_a_bundle_that_another_machine_sends_is_no_leftover(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have one home on the network, where no machine sees another's lock of a directory."""
    monkeypatch.setattr(filesystem, "read_mountinfo", lambda: f"1 1 0:1 / {tmp_path} rw - nfs4 filer:/ rw")
    monkeypatch.setattr(filesystem, "_known", {})
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(socket, "gethostname", lambda: "login1")
    with unpacking.unpacked(bundle) as first:
        monkeypatch.setattr(socket, "gethostname", lambda: "login2")
        with unpacking.unpacked(bundle) as second:
            assert (2, 2) == (len(find_runs(first).runs), len(find_runs(second).runs))


def test_what_a_machine_that_is_gone_has_unpacked_does_not_stay_for_ever(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each container has a name of its own, and nobody else tells what one that was killed has left."""
    monkeypatch.setattr(filesystem, "read_mountinfo", lambda: f"1 1 0:1 / {tmp_path} rw - nfs4 filer:/ rw")
    monkeypatch.setattr(filesystem, "_known", {})
    with unpacking.unpacked(bundle):
        pass
    bundles = tmp_path / "state" / "mlflow-outbox" / "bundles"
    (own,) = bundles.iterdir()
    for name, days in (("a" * 12, 31), ("b" * 12, 1), ("of somebody", 31)):
        (bundles / name / ".bundle.killed").mkdir(parents=True)
        os.utime(bundles / name, (time.time() - days * 24 * 3600,) * 2)
    with unpacking.unpacked(bundle):
        assert {own.name, "b" * 12, "of somebody"} == {path.name for path in bundles.iterdir()}


def test_a_run_that_is_written_goes_in_as_far_as_it_is_and_the_rest_later(tmp_path: Path, experiment_name: str) -> None:
    """The first bundle has a state that the run once had; the second completes it in the same outbox."""
    tracker = MLflowTracker(experiment_name, NOWHERE, outbox_dir=tmp_path / "from", worker="none", settings=QUICK)
    run = tracker.start_run("live")
    for i in range(50):
        run.log_metric("loss", i / 2, step=i)
    [segment] = the_outbox(tmp_path / "from").glob("runs/*/*.log")
    with segment.open("ab") as file:
        file.write(b"half a frame")  # a writer is in the middle of a write
    exported(tmp_path / "from", tmp_path / "first.tar")
    directory = outbox(tmp_path / "to")
    import_bundle(tmp_path / "first.tar", directory)
    [held] = [view_of((directory.run(run.run_id),))]
    assert (50, "RUNNING") == (held.metrics["loss"].points, held.status.value)
    [copy] = directory.runs.glob("*/*.log")
    assert segment.stat().st_size - len(b"half a frame") == copy.stat().st_size
    os.truncate(segment, copy.stat().st_size)
    for i in range(50, 80):
        run.log_metric("loss", i / 2, step=i)
    run.log_text("late", "late.txt")
    run.end()
    exported(tmp_path / "from", tmp_path / "second.tar")
    assert {"completed"} == set(import_bundle(tmp_path / "second.tar", directory).values())
    held = view_of((directory.run(run.run_id),))
    assert (80, "FINISHED") == (held.metrics["loss"].points, held.status.value)
    assert {"unchanged"} == set(import_bundle(tmp_path / "first.tar", directory).values()), "an older one takes nothing"
    assert 80 == view_of((directory.run(run.run_id),)).metrics["loss"].points


def test_what_a_later_bundle_brought_is_not_undone_by_what_is_filed(tmp_path: Path, experiment_name: str) -> None:
    """One rank ends the run, which is filed, while another writes on: ``replay --again`` brings back the older copy."""
    first, second = (
        MLflowTracker(experiment_name, NOWHERE, outbox_dir=tmp_path / "from", worker="none", settings=QUICK)
        for _ in range(2)
    )
    run = first.start_run("two ranks")
    rank = second.start_run(run_id=run.run_id)
    assert rank.log_metric("rank", 0.0, step=0)
    run.end()
    exported(tmp_path / "from", tmp_path / "first.tar")
    directory = outbox(tmp_path / "to")
    import_bundle(tmp_path / "first.tar", directory)
    directory.run(run.run_id).rename(directory.delivered / run.run_id)
    for step in range(1, 50):
        assert rank.log_metric("rank", step / 2, step=step)
    exported(tmp_path / "from", tmp_path / "second.tar")
    assert {"completed"} == set(import_bundle(tmp_path / "second.tar", directory).values())
    bring_back(directory, run.run_id)
    assert 50 == view_of((directory.run(run.run_id),)).metrics["rank"].points
    assert not (directory.delivered / run.run_id).exists()


def test_segments_that_contradict_each_other_are_refused(bundle: Path, tmp_path: Path) -> None:
    """Nothing is overwritten that says something else."""
    directory = outbox(tmp_path / "to")
    import_bundle(bundle, directory)
    segment = max(directory.runs.glob("*/*.log"))
    data = bytearray(segment.read_bytes())
    data[-40] ^= 1
    segment.write_bytes(data)
    before = contents_of(directory.runs)
    with pytest.raises(BundleRefused, match="contradicts"):
        import_bundle(bundle, directory)
    assert before == contents_of(directory.runs)


def test_a_bundle_that_was_damaged_anywhere_is_refused_whole(bundle: Path, tmp_path: Path) -> None:
    """A flipped bit or a missing end, wherever it is: an error that says so, and nothing is used."""
    good = bundle.read_bytes()
    directory = outbox(tmp_path / "to")
    spots = [0, 200, 600, 700, 1500, *range(2000, len(good), max(1, len(good) // 40))]
    refused = 0
    for spot in spots:
        damaged = tmp_path / "damaged.tar"
        for data in (good[:spot], good[:spot] + bytes([good[spot] ^ 4]) + good[spot + 1 :]):
            damaged.write_bytes(data)
            try:
                import_bundle(damaged, directory)
            except BundleRefused:
                refused += 1
                assert not any(directory.runs.iterdir()), "nothing of it was used"
            else:
                # Padding and the end of the archive say nothing; what was imported is what was exported.
                assert views(tmp_path / "from") == views(tmp_path / "to")
                shutil.rmtree(directory.runs)
                directory.runs.mkdir(0o700)
    assert refused > len(spots)


def test_a_gzipped_bundle_that_was_cut_off_is_refused(bundle: Path, tmp_path: Path) -> None:
    """The error names the file, and not the mechanism."""
    data = gzip.compress(bundle.read_bytes())
    (tmp_path / "cut.tar.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleRefused, match=r"cut\.tar\.gz is damaged"):
        import_bundle(tmp_path / "cut.tar.gz", outbox(tmp_path / "to"))


def test_a_bundle_is_read_through_a_link(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The latest of several, say; the link may be given to any command, and is not changed."""
    latest, other = tmp_path / "latest.tar", (tmp_path / "mlruns").as_uri()
    latest.symlink_to(bundle.name)
    assert 0 == command("import", latest, "-d", tmp_path / "to")
    assert 0 == command("replay", latest, "--to", other, "--dry-run")
    assert str(latest) in capsys.readouterr().out
    assert views(tmp_path / "from") == views(tmp_path / "to")
    assert latest.is_symlink()


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    """A text, an empty file, a pipe, somebody else's archive."""
    directory = outbox(tmp_path / "to")
    (tmp_path / "text").write_text("hello\n" * 500)
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(tmp_path / "text", "text")
    for name in ("text", "empty", "pipe", "other.tar"):
        with pytest.raises(BundleRefused, match=name):
            import_bundle(tmp_path / name, directory)


def evil(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Callable[[tarfile.TarFile], None]:
    """Return what adds one more member to an archive."""

    def add(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        info.size = 5 if kind == tarfile.REGTYPE else 0
        archive.addfile(info, io.BytesIO(b"evil\n"))

    return add


@pytest.mark.parametrize(
    "add",
    [
        evil("runs/../../../evil.txt"),
        evil("/tmp/evil.txt"),
        evil("runs/0123/evil.log"),
        evil("evil", tarfile.SYMTYPE, "/etc"),
        evil("evil", tarfile.LNKTYPE, "manifest.json"),
        evil("evil", tarfile.FIFOTYPE),
        evil("evil", tarfile.CHRTYPE),
        evil("evil", tarfile.DIRTYPE),
        evil("manifest.json"),
    ],
)
def test_a_member_that_no_export_wrote_refuses_the_bundle(
    add: Callable[[tarfile.TarFile], None], bundle: Path, tmp_path: Path
) -> None:
    """Paths that climb out, links, devices, files too many: nothing is extracted, nothing is used."""
    with tarfile.open(bundle, "a") as archive:
        add(archive)
    directory = outbox(tmp_path / "to")
    before = contents_of(tmp_path)
    with pytest.raises(BundleRefused):
        import_bundle(bundle, directory)
    after = {path: seen for path, seen in contents_of(tmp_path).items() if not path.startswith("to")}
    assert {path: seen for path, seen in before.items() if not path.startswith("to")} == after
    assert not any(directory.runs.iterdir())


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_a_member_of_another_kind_than_a_file_refuses_the_bundle(kind: bytes, bundle: Path, tmp_path: Path) -> None:
    """Its name alone does not make it a file."""
    changed = tmp_path / "changed.tar"
    with tarfile.open(bundle) as source, tarfile.open(changed, "w") as target:
        for info in source:
            content = source.extractfile(info)
            if info.name.endswith(".log"):
                info.type, info.linkname, info.size = kind, "/etc/passwd", 0
            target.addfile(info, content)
    directory = outbox(tmp_path / "to")
    with pytest.raises(BundleRefused):
        import_bundle(changed, directory)
    assert not any(directory.runs.iterdir())


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_small_file_cannot_fill_the_memory_by_its_headers(kind: bytes, tmp_path: Path) -> None:
    """What stands in place of a header is read whole before anything is known of the bundle: a long one is refused."""
    size = 64 * 1024 * 1024
    bomb = tmp_path / "bomb.tar.gz"
    head = tarfile.TarInfo("x")
    head.type, head.size = kind, size
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        file.write(head.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(BundleRefused):
            import_bundle(bomb, outbox(tmp_path / "to"))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 << 20


def test_a_list_of_holes_refuses_the_bundle(tmp_path: Path) -> None:
    """It could be as long as it says, in either of the forms that tar has for it."""
    directory = outbox(tmp_path / "to")
    for attributes in ({}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}):
        holes = tmp_path / "holes.tar"
        with tarfile.open(holes, "w", format=tarfile.PAX_FORMAT) as archive:
            info = tarfile.TarInfo("manifest.json")
            info.pax_headers = attributes
            if not attributes:
                info.type = tarfile.GNUTYPE_SPARSE
            archive.addfile(info)
        with pytest.raises(BundleRefused, match="holes"):
            import_bundle(holes, directory)


def written(target: Path, manifest: Manifest) -> Path:
    """Write a bundle of nothing but a manifest, and return its path."""
    with tarfile.open(target, "w") as archive:
        info = tarfile.TarInfo(MANIFEST)
        info.size = len(sealed(manifest))
        archive.addfile(info, io.BytesIO(sealed(manifest)))
    return target


@pytest.mark.parametrize("how", ["import", "replay"])
@pytest.mark.parametrize("ids", [("../../../../evil",), ("/tmp/evil",), ("..",), ("",), (".",), ("a", "a"), ("a\n",)])
def test_a_run_that_no_export_names_refuses_the_bundle(ids: tuple[str, ...], how: str, tmp_path: Path) -> None:
    """Ids that climb out, or stand there twice, of runs without files as well: nothing is made anywhere."""
    runs = [BundledRun(run_id.replace("/tmp", str(tmp_path)), "e", []) for run_id in ids]
    evil = written(tmp_path / "evil.tar", Manifest(1, 1, NOWHERE, runs))
    outbox(tmp_path / "to")
    with pytest.raises(BundleRefused, match="names the run"):
        read_manifest(evil)
    before = contents_of(tmp_path)
    words = {"import": ["-d", tmp_path / "to"], "replay": ["--to", (tmp_path / "mlruns").as_uri()]}
    assert 1 == command(how, evil, *words[how])
    assert before == contents_of(tmp_path)


def test_a_bundle_of_a_newer_format_says_to_upgrade(bundle: Path, tmp_path: Path) -> None:
    """It is left alone."""
    newer = written(tmp_path / "newer.tar", msgspec.structs.replace(read_manifest(bundle), format=99))
    with pytest.raises(BundleRefused, match=r"format 99 .* upgrade"):
        import_bundle(newer, outbox(tmp_path / "to"))


def test_a_file_that_is_there_is_not_overwritten(bundle: Path, tmp_path: Path) -> None:
    """Unless it is asked for."""
    before = bundle.read_bytes()
    with pytest.raises(FileExistsError):
        write_bundle(bundle, find_runs(the_outbox(tmp_path / "from")).runs, resolve(NOWHERE), now_ms=2)
    assert before == bundle.read_bytes()
    assert 1 == command("export", "--all", "-o", bundle, "-d", tmp_path / "from")
    assert 0 == command("export", "--all", "-o", bundle, "-d", tmp_path / "from", "--force")


@pytest.mark.parametrize("kind", ["pipe", "directory"])
def test_only_a_file_is_replaced_by_a_bundle(
    kind: str, tmp_path: Path, experiment_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not ``/dev/null`` or ``/dev/stdout``, which every other program has open too; that is said before all is read."""
    log_offline(experiment_name, NOWHERE, tmp_path / "from")
    target = tmp_path / "target"
    os.mkfifo(target) if kind == "pipe" else target.mkdir()
    before = target.lstat()
    assert 2 == command("export", "--all", "-o", target, "--force", "-d", tmp_path / "from")
    assert f"{target} is no file that could be replaced" in capsys.readouterr().err
    assert before.st_ino == target.lstat().st_ino
    assert ["from", "state", "target"] == sorted({*os.listdir(tmp_path), "state"})


def test_what_cannot_be_read_is_left_out_and_said(
    tmp_path: Path, experiment_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest is in the bundle, and the exit code is 1; of a run of which nothing can be read there is no bundle."""
    root, target = tmp_path / "from", tmp_path / "runs.tar"
    damaged, sound = (log_offline(experiment_name, NOWHERE, root, name=name) for name in ("one", "two"))
    folder = the_outbox(root) / "runs" / damaged
    (segment,) = folder.glob("*.log")
    make_unreadable(segment)
    for chosen in (["--all"], [damaged, sound]):
        assert 1 == command("export", *chosen, "-o", target, "-d", root, "--force")
        assert [sound] == [run.run_id for run in read_manifest(target).runs]
        said = capsys.readouterr().err
        assert (True, True) == (str(segment) in said, f"what cannot be read is not in {target}" in said), said
    assert 0 == command("export", sound, "-o", target, "-d", root, "--force")
    assert 1 == command("export", damaged, "-o", tmp_path / "other.tar", "-d", root)
    assert 1 == command("export", folder, "-o", tmp_path / "other.tar", "-d", root)
    assert not (tmp_path / "other.tar").exists()


def test_a_run_of_which_the_disk_does_not_give_a_segment_is_left_out_of_a_bundle(
    tmp_path: Path, experiment_name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a whole, and named; the others are in it, which a failing disk may not give for long."""
    settings = dataclasses.replace(QUICK, segment_bytes=1024)
    torn = log_offline(experiment_name, NOWHERE, tmp_path / "from", name="torn", settings=settings)
    whole = log_offline(experiment_name, NOWHERE, tmp_path / "from", name="whole")
    *_, last = sorted((the_outbox(tmp_path / "from") / "runs" / torn).glob("*.log"))
    opened = os.open

    def failing(path: Any, *arguments: Any, **named: Any) -> int:
        if os.fspath(path) == str(last):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(last))
        return opened(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        words = ("export", "--all", "-d", tmp_path / "from", "-o", tmp_path / "runs.tar")
        assert 1 == command(*words)
    assert f"run {torn} was left out: it cannot be read" in capsys.readouterr().err
    assert {whole: "new"} == import_bundle(tmp_path / "runs.tar", outbox(tmp_path / "to"))


def test_what_others_keep_beside_a_bundle_is_left_alone(tmp_path: Path, experiment_name: str) -> None:
    """Whatever its name begins with: only a file that an export has left in a way that nothing else is called goes."""
    log_offline(experiment_name, NOWHERE, tmp_path / "from")
    place = tmp_path / "place"
    for folder in (".runs.tar.d", ".runs.tar.0123456789ab", ".runs.tar.git"):
        (place / folder).mkdir(parents=True)
        (place / folder / "mine").write_text("x")
    for name in (".runs.tar.bak", ".runs.tar.0123456789abc", ".runs.tar.0123456789AB", ".runs.tar.", "runs.tar.part"):
        (place / name).write_text("x")
    (place / ".runs.tar.0123456789ac").symlink_to(place / ".runs.tar.bak")
    os.mkfifo(place / ".runs.tar.0123456789ad")
    before = {path.relative_to(place) for path in place.rglob("*")}
    (place / ".runs.tar.0123456789ae").write_text("what an export has left that was killed")
    exported(tmp_path / "from", place / "runs.tar")
    assert {*before, Path("runs.tar")} == {path.relative_to(place) for path in place.rglob("*")}


def test_a_bundle_is_private(bundle: Path) -> None:
    """It holds what an outbox holds."""
    assert 0o600 == bundle.stat().st_mode & 0o777


def test_an_export_that_is_killed_leaves_no_bundle_or_a_whole_one(tmp_path: Path, experiment_name: str) -> None:
    """At random moments, again and again; the drafts of the dead are gone at the end."""
    root = tmp_path / "from"
    for number in range(6):
        log_offline(experiment_name, NOWHERE, root, name=f"run {number}", points=4000)
    target = tmp_path / "bundles" / "runs.tar.gz"
    target.parent.mkdir()
    killed, code = run_with_kills(
        "export", "--all", "-o", target, "--force", "-d", root, least=0.005, most=0.25, kills=12, mlflow=False
    )
    assert (True, 0) == (killed > 0, code)
    assert ["runs.tar.gz"] == os.listdir(target.parent)
    import_bundle(target, outbox(tmp_path / "to"))
    assert views(root) == views(tmp_path / "to")


def test_a_time_out_holds_while_a_bundle_is_unpacked(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a bundle holds may take long to copy: nothing of it is sent or left behind, and the code says left over."""
    assert 3 == command("replay", bundle, "--timeout", "0")
    assert "time was up before" in capsys.readouterr().err
    assert [] == list((tmp_path / "state" / "mlflow-outbox" / "bundles").iterdir())


def test_an_import_that_is_killed_leaves_nothing_half_done(tmp_path: Path, experiment_name: str) -> None:
    """At random moments, again and again: at the end all is there, and nothing of the attempts."""
    root = tmp_path / "from"
    for number in range(6):
        log_offline(experiment_name, NOWHERE, root, name=f"run {number}", points=4000)
    exported(root, tmp_path / "runs.tar")
    killed, code = run_with_kills(
        "import", tmp_path / "runs.tar", "-d", tmp_path / "to", least=0.005, most=0.15, kills=12, mlflow=False
    )
    assert (True, 0) == (killed > 0, code)
    assert views(root) == views(tmp_path / "to")
    assert [] == [path.name for path in the_outbox(tmp_path / "to").iterdir() if path.name.startswith(".")]
