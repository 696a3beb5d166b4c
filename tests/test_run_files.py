"""The files of a run: copied as they are at the call, refused with a count, durable before their events."""

from __future__ import annotations

import dataclasses
import datetime as dt
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlflow_outbox import jsontext
from mlflow_outbox.errors import ArtifactRefused
from mlflow_outbox.run import Run
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import demand
from mlflow_outbox.spool.events import Artifact
from mlflow_outbox.spool.guard import DiskGuard
from mlflow_outbox.spool.snapshot import alone
from servers import eventually
from spools import RUN, Kit, make_journal, warnings


def test_a_file_is_kept_as_it_was_at_the_call(kit: Kit) -> None:
    """F68: the experiment goes on writing, moves or deletes it."""
    source = Path("model.bin")
    source.write_bytes(b"one")
    assert kit.run.log_artifact(source, "models")
    source.write_bytes(b"two")
    assert kit.run.log_artifact(str(source))
    source.unlink()
    assert (b"one", b"two") == (kit.content("models/model.bin"), kit.content("model.bin"))


def test_a_tree_is_kept_with_its_folders(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """Empty files too; a FIFO and a dangling link are refused and the rest is kept, without waiting."""
    root = Path("tree")
    for path, data in {"a": b"1", "b/c": b"2", "b/d e/f": b"", ".hidden": b"3"}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    (root / "link").symlink_to("a")
    (root / "loop").symlink_to(".")
    assert kit.run.log_artifacts(root, "out")
    found = {event.path for event in kit.events if isinstance(event, Artifact)}
    assert {"out/a", "out/b/c", "out/b/d e/f", "out/.hidden", "out/link"} == found
    os.mkfifo(root / "fifo")
    (root / "gone").symlink_to("nowhere")
    assert not kit.run.log_artifacts(root)
    assert 2 == kit.counters["refused_bad_file"] == len(warnings(caplog))
    assert b"2" == kit.content("b/c")


def test_an_outbox_in_a_directory_that_is_logged_is_left_out(kit: Kit) -> None:
    """The program's own in its current directory, say: its journals, and copies of files, are no artifacts."""
    home = kit.outbox.path.parent
    (home / "a.txt").write_bytes(b"a")
    assert kit.run.log_artifacts(home)
    found = [event.path for event in kit.events if isinstance(event, Artifact)]
    assert "a.txt" in found
    assert [] == [path for path in found if path.startswith(f"{kit.outbox.path.name}/")]
    assert kit.run.log_artifacts(kit.outbox.path, "named"), "who names it means it"
    assert "named/outbox.json" in [event.path for event in kit.events if isinstance(event, Artifact)]


def test_a_strict_tree_raises_at_the_first_refusal_and_counts_it_once(strict: Kit, tmp_path: Path) -> None:
    """As one call does."""
    (tmp_path / "tree").mkdir()
    os.mkfifo(tmp_path / "tree" / "fifo")
    with pytest.raises(ArtifactRefused):
        strict.run.log_artifacts(tmp_path / "tree")
    assert {"refused_bad_file": 1} == strict.counters.snapshot()


def test_a_folder_that_cannot_be_read_is_counted(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """I7: its files are not skipped in silence."""
    (Path("tree") / "closed").mkdir(parents=True)
    (Path("tree") / "open").write_bytes(b"x")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    kit.run.log_artifacts("tree")
    assert 1 == kit.counters["refused_bad_file"]
    assert b"x" == kit.content("open")


def test_text_is_kept_as_utf_8(kit: Kit) -> None:
    """Lone surrogates too, which some models produce."""
    assert kit.run.log_text("naïve 名\ud800", "notes/a.txt")
    assert "naïve 名\ud800".encode("utf-8", "surrogatepass") == kit.content("notes/a.txt")


def test_a_mapping_is_kept_as_json_or_yaml(kit: Kit) -> None:
    """Strict JSON, whatever is in it; YAML by the name's end."""
    thing = {"b": [1, None, float("nan")], "a": {"名": np.float32(0.5)}, "when": dt.date(2020, 1, 1)}
    assert kit.run.log_dict(thing, "c.json")
    assert kit.run.log_dict(thing, "c.YAML")
    assert kit.run.log_dict([1, 2], "list.json")
    found = json.loads(kit.content("c.json"), parse_constant=lambda _: pytest.fail("not JSON"))
    assert ([1, None, None], {"名": 0.5}) == (found["b"], found["a"])
    yaml = pytest.importorskip("yaml")
    assert found == yaml.safe_load(kit.content("c.YAML"))
    assert [1, 2] == json.loads(kit.content("list.json"))
    assert {} == kit.counters.snapshot()


def test_a_document_with_more_values_than_a_description_may_have_is_whole(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predictions for each of many rows, say."""
    monkeypatch.setattr(jsontext, "MAX_VALUES", 100)
    predictions = {str(row): [row, 0.5] for row in range(200)}
    assert kit.run.log_dict(predictions, "predictions.json")
    assert predictions == json.loads(kit.content("predictions.json"))
    assert {} == kit.counters.snapshot()


def test_what_is_left_out_of_a_document_is_counted_and_said_once(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """The rest is kept; null stands for what could not be read."""

    class Broken:
        def __str__(self) -> str:
            msg = "disk gone"
            raise OSError(msg)

    for _ in range(2):
        assert kit.run.log_dict({"a": Broken(), "b": 1}, "c.json")
    assert {"a": None, "b": 1} == json.loads(kit.content("c.json"))
    assert 2 == kit.counters["unreadable_fields"]
    assert ["mlflow-outbox: c.json.a is not logged: OSError: disk gone"] == warnings(caplog)


def test_a_figure_is_rendered_by_the_names_extension(kit: Kit) -> None:
    """matplotlib's, and an image; what cannot be rendered is refused."""
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().plot([1, 2])
    assert kit.run.log_figure(figure, "plots/loss.png")
    assert kit.run.log_figure(figure, "loss.svg")
    assert kit.run.log_figure(figure, "noextension")
    assert kit.content("plots/loss.png").startswith(b"\x89PNG")
    assert b"<svg" in kit.content("loss.svg")
    assert kit.content("noextension").startswith(b"\x89PNG")
    assert not kit.run.log_figure(figure, "loss.xyz")
    image = pytest.importorskip("PIL.Image").new("RGB", (2, 2))
    assert kit.run.log_figure(image, "image.jpg")
    assert kit.content("image.jpg").startswith(b"\xff\xd8")
    assert {"refused_bad_figure": 1} == kit.counters.snapshot()


@pytest.mark.parametrize("name", ["a.tif", "a.jpg", "a.jfif", "a.apng", "a.png", "a.webp", "a"])
def test_an_image_is_saved_in_the_format_of_its_extension(name: str, kit: Kit) -> None:
    """As PIL knows them, which calls some formats by another name."""
    image = pytest.importorskip("PIL.Image")
    assert kit.run.log_figure(image.new("RGB", (2, 2)), name)
    with image.open(io.BytesIO(kit.content(name))) as found:
        assert image.registered_extensions().get(Path(name).suffix, "PNG") in (found.format, "PNG")


def test_a_file_for_which_there_is_no_room_is_counted(kit: Kit, tmp_path: Path) -> None:
    """And the run goes on."""
    (tmp_path / "big").write_bytes(b"x" * 1000)
    small = Kit(tmp_path / "small", artifact_bytes=999)
    assert not small.run.log_artifact(tmp_path / "big")
    assert not small.run.log_text("x" * 1000, "big")
    assert {"refused_file_too_large": 2} == small.counters.snapshot()
    kit.outbox.path.rename(tmp_path / "away")
    assert not kit.run.log_text("x", "x")
    assert 1 == kit.counters["refused_no_room_for_file"]


def test_a_file_that_finds_no_room_says_how_much_it_needs(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the worker, which has what is delivered give way; nothing on the disk would show it that there is need."""
    (tmp_path / "large").write_bytes(b"x" * 1000)
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=999, f_frsize=1, f_blocks=1))
        assert not kit.run.log_artifact(tmp_path / "large")
    assert (1, 1000) == (kit.counters["refused_no_room_for_file"], demand.told(kit.outbox.path))
    assert kit.run.log_artifact(tmp_path / "large")
    os.utime(kit.outbox.path / "wanted", (1, 1))
    assert 0 == demand.told(kit.outbox.path), "nobody asks for it any more"


def test_at_the_cap_nothing_is_copied(kit: Kit, tmp_path: Path) -> None:
    """What no event names would fill the disk; the file that reaches the cap is the last one, measured or not."""
    most = 3_500
    guard = DiskGuard(kit.outbox, Settings(outbox_bytes=most, free_bytes=0), kit.counters)
    journal = make_journal(kit.outbox, counters=kit.counters, refuse=guard.reason)
    run = Run(journal, RUN, kit.settings, kit.counters)
    source = tmp_path / "source"

    def log(number: int) -> bool:
        source.write_bytes(bytes([number]) * 1_000)
        return run.log_artifact(source) and run.log_text(str(number) * 1_000, "text")

    assert [True, True, False, False] == [log(number) for number in range(4)]
    files = kit.outbox.run(RUN) / "files"
    assert 4 == len(list(files.iterdir()))
    guard.look()
    assert not log(4)
    assert 4 == len(list(files.iterdir()))
    assert 3 == kit.counters["refused_full"]
    for path in files.iterdir():
        path.unlink()
    guard.look()
    assert log(5)


def test_a_file_that_could_not_be_copied_takes_no_room_from_the_others(kit: Kit) -> None:
    """Of a directory with one that is too large, or for which the disk has no room, the others are kept."""
    guard = DiskGuard(kit.outbox, Settings(outbox_bytes=10_000, free_bytes=0), kit.counters)
    journal = make_journal(kit.outbox, counters=kit.counters, refuse=guard.reason)
    run = Run(journal, RUN, Settings(artifact_bytes=10_000), kit.counters)
    tree = kit.outbox.path.parent / "tree"
    tree.mkdir()
    for name, size in {"a": 20_000, "b": 100, "c": 20_000, "d": 100}.items():
        (tree / name).write_bytes(name.encode() * size)
    assert not run.log_artifacts(tree)
    assert {"b", "d"} == {event.path for event in kit.events if isinstance(event, Artifact)}
    assert {"refused_file_too_large": 2} == kit.counters.snapshot()


def test_a_file_leaves_free_what_is_kept_for_others(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a checkpoint that just fits costs all events after it, for as long as nothing can be delivered."""
    (tmp_path / "large").write_bytes(b"x" * 1000)
    free = kit.settings.free_bytes + 999
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=1))
        assert not kit.run.log_artifact(tmp_path / "large")
        assert (1, 1000) == (kit.counters["refused_no_room_for_file"], demand.told(kit.outbox.path))
        free += 1
        assert kit.run.log_artifact(tmp_path / "large")


def test_the_copy_of_an_event_that_is_refused_is_removed(kit: Kit) -> None:
    """The disk fails, and the memory for that is full: the copy has no event; one that has stays."""
    assert kit.run.log_text("kept", "a.txt")
    kit.disk.fail("write", times=None)
    kit.settings = dataclasses.replace(kit.settings, memory_bytes=0)
    run = Run(
        make_journal(kit.outbox, kit.disk, counters=kit.counters, memory_bytes=0), RUN, kit.settings, kit.counters
    )
    assert not run.log_text("kept", "b.txt")
    assert not run.log_text("new", "c.txt")
    assert 2 == kit.counters["refused_disk"]
    assert [b"kept"] == [path.read_bytes() for path in (kit.outbox.run(RUN) / "files").iterdir()]


def test_workers_keep_away_from_a_copy_whose_event_waits_in_memory(kit: Kit) -> None:
    """The disk does not take the event, and nothing on disk says that the copy is needed."""
    kit.disk.fail("write", times=None)
    assert kit.run.log_text("x", "x.txt")
    assert 1 == kit.journal.in_memory
    files = kit.outbox.run(RUN) / "files"
    with alone(files) as is_alone:
        assert not is_alone
    kit.disk.clear()
    eventually(lambda: kit.journal.sync() or not kit.journal.in_memory)
    kit.journal.sync()
    with alone(files) as is_alone:
        assert is_alone
    assert b"x" == kit.content("x.txt")


def test_a_copy_is_durable_before_its_event_at_always_and_later_at_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A durable event must not name a file that is not."""
    order: list[str] = []

    def fsync(fd: int) -> None:
        if "/files" in os.readlink(f"/proc/self/fd/{fd}"):
            order.append("file")

    monkeypatch.setattr(os, "fsync", fsync)
    for name, sync in (("always", "always"), ("later", "interval")):
        kit = Kit(tmp_path / name, sync=sync)
        kit.disk.fail("datasync", times=None, when=lambda call: bool(order.append("event")))
        order.clear()
        kit.run.log_text("x", "x")
        assert (["file", "event"] if sync == "always" else []) == list(dict.fromkeys(order))
        kit.journal.sync()
        assert ["file", "event"] == list(dict.fromkeys(order))
