"""What all commands have in common: how they end, how they look, and that nothing shown can harm a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from commands import Here, closing, command, console_script, environment, offline, outbox_of, run
from mlflow_outbox.spool import provisional
from mlflow_outbox_worker.cli import app, exits, terminal
from mlflow_outbox_worker.cli.exits import ExitCode, most_urgent, of_backlog
from mlflow_outbox_worker.wording import size, span
from replays import contents_of
from servers import MlflowServer
from spools import make_journal, make_outbox, metric


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Run commands in this process."""
    return Here(capsys, monkeypatch)


def at_terminal(columns: int, *words: object, **more: str) -> str:
    """Run a command at a terminal of so many columns and return what it wrote there."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {name: value for name, value in environment(TERM="xterm-256color", **more).items() if name != "COLUMNS"}
    process = subprocess.Popen(command(*words), stdin=slave, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    written = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        written += data
    os.close(master)
    process.wait()
    return written.decode()


def plain(text: str) -> list[str]:
    """Return the lines of a terminal's text without its escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "").split("\n")


def every_command(group: click.Group, *words: str) -> Iterator[tuple[list[str], click.Command]]:
    """Yield all commands with the words that name them."""
    for name, one in group.commands.items():
        yield [*words, name], one
        if isinstance(one, click.Group):
            yield from every_command(one, *words, name)


def examples(text: str) -> list[str]:
    """Return the command lines that stand in a help text."""
    return [line.strip() for line in text.splitlines() if line.strip().startswith("mlflow-outbox ")]


def test_every_command_has_help_with_examples(here: Here) -> None:
    """And the general help explains every exit code."""
    general = here("--help")
    assert 0 == general.code
    for code in ExitCode:
        assert re.search(rf"^ +{int(code)} +\S", general.out, re.MULTILINE), code
    for words, one in every_command(app.build()):
        done = here(*words, "--help")
        assert 0 == done.code
        assert examples(done.out), words
        assert len(words) > 1 or re.search(rf"^ +{words[0]} ", general.out, re.MULTILINE), words
        assert {"Print", "Show"} & set(done.out.split()), one


@pytest.mark.parametrize("columns", ["80", "200"])
def test_help_fits_eighty_columns(columns: str, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line of any help is longer, and no sentence is cut off."""
    monkeypatch.setenv("COLUMNS", columns)
    for words in [[], *(words for words, _ in every_command(app.build()))]:
        lines = here(*words, "--help").out.splitlines()
        assert 80 >= max(map(len, lines)), words
        assert not any(line.endswith("...") for line in lines[1:]), words


def test_an_example_that_is_copied_is_good_usage(here: Here) -> None:
    """Each one is whole in its line: bash takes it, its command knows the options, and their values are possible."""
    named = {tuple(words): one for words, one in every_command(app.build())}
    for words in [[], *map(list, named)]:
        for line in examples(here(*words, "--help").out):
            subprocess.run(["bash", "-n", "-c", line], check=True)
            said: list[str] = []
            for word in shlex.split(line, comments=True):
                if word in {"|", "||", "&&", ">"}:
                    break
                said.append(word)
            name = tuple(said[1:3]) if tuple(said[1:3]) in named else (said[1],)
            assert not isinstance(named[name], click.Group), line
            named[name].make_context("example", said[1 + len(name) :])


def test_a_command_declared_alone_is_the_same(here: Here) -> None:
    """Only the module that is needed is declared; unknown words still see all of them."""
    assert ["status"] == list(app.build("status").commands)
    assert {"status", "flush", "runs", "show"} <= app.build("nonsense").commands.keys()
    done = here("statsu")
    assert 2 == done.code
    assert "No such command 'statsu'" in done.err


@pytest.mark.parametrize("words", [[], ["dead"]])
def test_without_a_command_there_is_help(words: list[str], here: Here) -> None:
    """All of it, and code 2: nothing was asked for."""
    done = here(*words)
    assert (2, "") == (done.code, done.err)
    assert done.out == here(*words, "--help").out


def test_help_and_status_import_no_mlflow(tmp_path: Path) -> None:
    """Nor anything else that takes long, nor what only a terminal needs."""
    offline(tmp_path)
    script = (
        "import sys; from mlflow_outbox_worker.cli import main;"
        f"main(['status', '-d', {str(tmp_path)!r}]); main(['--help']);"
        "heavy = ('mlflow', 'numpy', 'prometheus_client', 'pydantic', 'typer', 'rich');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=True)
    assert "[]" == done.stdout.splitlines()[-1]


def test_the_module_is_the_same_command(tmp_path: Path) -> None:
    """``python -m mlflow_outbox``, for where the console script is not on the PATH: same output, same exit code."""
    offline(tmp_path)
    words = ["runs", "-d", str(tmp_path), "--json"]
    module = [sys.executable, "-m", "mlflow_outbox"]
    done = subprocess.run([*module, *words], capture_output=True, text=True, env=environment(), check=False)
    assert tuple(run(*words)) == (done.returncode, done.stdout, done.stderr)
    assert 2 == subprocess.run([*module, "statsu"], capture_output=True, env=environment(), check=False).returncode


def test_a_wide_and_a_narrow_terminal(tmp_path: Path) -> None:
    """Wide: all columns and colours. Narrow: the important ones, and no table line is longer than the terminal."""
    (run_id,) = offline(tmp_path, experiment="an experiment with a name that is long enough to be in the way")
    wide = at_terminal(160, "status", "-d", tmp_path)
    assert "\x1b[33m" in wide
    assert "experiment" in wide
    narrow = at_terminal(44, "status", "-d", tmp_path)
    lines = plain(narrow)
    head = next(i for i, line in enumerate(lines) if line.startswith("run "))
    assert max(map(len, lines[head:])) <= 44
    assert lines[head].split()[:3] == ["run", "state", "events"]
    assert run_id[:8] in lines[head + 1]


def test_names_are_cut_before_columns_are_left_out(tmp_path: Path) -> None:
    """Numbers, times and ids are whole or not there at all."""
    offline(tmp_path, experiment="an experiment with a name that is long enough to be in the way")
    lines = plain(at_terminal(90, "runs", "-d", tmp_path))
    assert ["run", "name", "status", "waiting", "delivered", "dead", "started", "experiment"] == lines[0].split()
    assert re.search(r" \d{4}-\d\d-\d\d \d\d:\d\d:\d\d  an experiment.*…$", lines[1]), lines[1]
    assert max(map(len, lines)) <= 90


@pytest.mark.parametrize("command_line", ["status", "runs"])
def test_what_a_terminal_shows_of_an_id_is_enough_to_name_a_run_that_began_offline_through_mlflow(
    command_line: str, here: Here, tmp_path: Path
) -> None:
    """All their ids begin alike, and so do the names of rooms; -v shows each as a whole."""
    outbox = make_outbox(tmp_path)
    ids = [provisional.new_run_id(), provisional.new_run_id(), provisional.room_of("1"), provisional.room_of("2")]
    for run_id in ids:
        journal = make_journal(outbox, run=run_id)
        assert journal.append(metric(0))
        journal.close()
    beginnings = ("0b0e5e1f", "experime")
    lines = plain(at_terminal(100, command_line, "-d", tmp_path))
    shown = sorted(line.split()[0] for line in lines if line.startswith(beginnings))
    assert 4 == len(set(shown)), lines
    for name in shown:
        assert 0 == here("show", name, "-d", tmp_path).code
    lines = plain(at_terminal(100, command_line, "-v", "-d", tmp_path))
    assert sorted(ids) == sorted(line.split()[0] for line in lines if line.startswith(beginnings))


@pytest.mark.parametrize("words", [["status"], ["doctor", "--offline"], ["gc", "--dry-run"]])
def test_lines_break_between_words(words: list[str], tmp_path: Path) -> None:
    """What is too long for a terminal goes on in the next line, indented; a longer word is left whole."""
    offline(tmp_path)
    lines = plain(at_terminal(44, *words, "-d", tmp_path))
    assert all(len(line) <= 44 or len(line.split()) == 1 for line in lines), lines
    assert any(line.startswith("  ") for line in lines)


def test_no_color_is_respected(tmp_path: Path) -> None:
    """Bold and dim stay, colours go."""
    offline(tmp_path)
    text = at_terminal(100, "status", "-d", tmp_path, NO_COLOR="1")
    assert not re.search(r"\x1b\[(?:\d+;)*(?:3|4|9)\d", text)


def test_progress_leaves_the_last_line_readable(tmp_path: Path) -> None:
    """A flush at a terminal shows how far it is on one line, and takes it away before it says how it went."""
    offline(tmp_path)
    lines = plain(at_terminal(100, "flush", "-d", tmp_path, "--timeout", "1"))
    assert any("0 events delivered, 13 left, on disk" in line for line in lines)


def test_a_reader_that_has_had_enough(tmp_path: Path) -> None:
    """``| head -1``: no traceback, no complaint."""
    offline(tmp_path, points=20_000)
    first = subprocess.run(
        [*command("runs", "-d", tmp_path, "--json")], capture_output=True, text=True, env=environment(), check=True
    ).stdout
    run_id = re.search(r'"run_id": "(\w+)"', first)
    assert run_id is not None
    process = subprocess.Popen(
        command("show", run_id[1], "--json", "-d", tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert "" == process.stderr.read()
    process.stderr.close()
    process.wait()


@pytest.mark.parametrize("words", ["status", "status --json", "--version", "--help", "dead list"])
def test_a_full_disk_at_standard_output_is_said(words: str, tmp_path: Path) -> None:
    """One sentence and code 1, no traceback and no code 120, also where the other output is full too."""
    offline(tmp_path)
    env = environment(MLFLOW_OUTBOX_DIR=str(tmp_path), PYTHONUNBUFFERED="")
    for streams, said in ((">/dev/full", 1), (">/dev/full 2>&1", 0), (">/dev/full 2>&-", 0)):
        asked = closing(streams, *command(*words.split()))
        done = subprocess.run(asked, capture_output=True, text=True, env=env, check=False)
        assert (1, "") == (done.returncode, done.stdout), done
        assert said == len(re.findall("No space left on device", done.stderr)) == len(done.stderr.splitlines()), done


@pytest.mark.parametrize(
    ("streams", "is_read"),
    [(">&-", False), ("2>&-", True), (">&- 2>&-", False), ("<&- >&- 2>&-", False), ("2>/dev/full", True)],
)
@pytest.mark.parametrize("words", ["runs", "dead list", "status --exit-code -v"])
def test_a_stream_that_is_closed_keeps_no_command(words: str, streams: str, is_read: bool, tmp_path: Path) -> None:
    """Its exit code is that of one with all streams, and what is left open has no traceback."""
    offline(tmp_path)
    asked = command(*words.split(), "-d", tmp_path)
    expected = run(*words.split(), "-d", tmp_path)
    done = subprocess.run(closing(streams, *asked), capture_output=True, text=True, env=environment(), check=False)
    assert (expected.code, "", is_read) == (done.returncode, done.stderr, bool(done.stdout)), done


@pytest.mark.parametrize(
    ("streams", "unbuffered"),
    [*((streams, "") for streams in ("2>&-", "<&- >&- 2>&-", "2>/dev/full", ">/dev/full")), (">/dev/full", "1")],
)
@pytest.mark.parametrize("words", ["flush --timeout 60", "worker --until-idle"])
def test_without_streams_is_delivered_too(
    words: str,
    streams: str,
    unbuffered: str,
    here: Here,
    mlflow_server: MlflowServer,
    experiment_name: str,
    tmp_path: Path,
) -> None:
    """What it has to say may be lost; what was logged is not."""
    offline(tmp_path, mlflow_server.url, experiment=experiment_name)
    asked = closing(streams, *command(*words.split(), "-d", tmp_path))
    env = environment(PYTHONUNBUFFERED=unbuffered)
    done = subprocess.run(asked, capture_output=True, text=True, env=env, check=False)
    full = streams == ">/dev/full"
    assert (int(full), full) == (done.returncode, "standard output cannot be written" in done.stderr), done
    assert "Traceback" not in done.stderr
    assert 0 == here("status", "-d", tmp_path, "--json").data["pending"]


def test_an_error_is_one_sentence_unless_asked_for_more(here: Here, tmp_path: Path) -> None:
    """-v adds the traceback; -q leaves the error."""
    offline(tmp_path)
    (outbox,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    outbox.chmod(0o777)
    quiet = here("status", "-q", "-d", tmp_path)
    assert (1, "") == (quiet.code, quiet.out)
    assert 1 == len(quiet.err.splitlines())
    assert "chmod 700" in quiet.err
    verbose = here("status", "-v", "-d", tmp_path)
    assert "Traceback" in verbose.err


@pytest.mark.parametrize(
    "words", ["status", "flush --timeout 60", "verify", "runs", "dead list", "gc", "status --exit-code", "runs --json"]
)
def test_an_outbox_that_is_not_safe_keeps_nobody_from_the_others(
    words: str, here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It is named, with the remedy, and the exit code is 1; what was asked is done with the others."""
    (run_id,) = offline(tmp_path, mlflow_server.url, experiment=experiment_name)
    if words != "flush --timeout 60":
        assert 0 == here("flush", "-d", tmp_path, "--timeout", 60).code
    sound = outbox_of(tmp_path)
    offline(tmp_path)
    (bad,) = [path for path in tmp_path.iterdir() if path != sound]
    bad.chmod(0o755)
    done = here(*words.split(), "-d", tmp_path)
    assert (1, True) == (done.code, f"left alone: {bad}" in done.err), done
    assert "" != done.out
    assert 0 == here("flush", "-d", tmp_path, "--timeout", 60, "--run", run_id).code, "which is not in that one"
    assert 0 == here("show", run_id, "-d", tmp_path).code
    assert 0 == here("export", run_id, "-d", tmp_path, "-o", tmp_path / "run.tar").code
    assert 0 == here("status", "-d", tmp_path, "--json").data["pending"]
    sound.chmod(0o755)
    done = here(*words.split(), "-d", tmp_path)
    assert (1, "", True) == (done.code, done.out, str(sound) in done.err and str(bad) in done.err), done


def test_a_mistake_of_ours_is_said_too(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code 1 and one sentence, not a traceback of a hundred lines."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    offline(tmp_path)
    monkeypatch.setattr("mlflow_outbox_worker.survey.survey", broken)
    done = here("status", "-d", tmp_path)
    assert 1 == done.code
    assert "this should not have happened: ZeroDivisionError" in done.err
    assert "Traceback" not in done.err


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    """The variable, its value, and what it should be; code 1."""
    offline(tmp_path)
    done = run("status", "-d", tmp_path, MLFLOW_OUTBOX_RETRY_MAX="soon")
    assert 1 == done.code
    assert "MLFLOW_OUTBOX_RETRY_MAX='soon'" in done.err


@pytest.mark.parametrize(
    ("shell", "more", "answer"),
    [
        ("bash", {"COMP_WORDS": "mlflow-outbox dead re", "COMP_CWORD": "2"}, "plain,retry"),
        ("zsh", {"COMP_WORDS": "mlflow-outbox dead re", "COMP_CWORD": "2"}, "plain\nretry\nSend dead letters again"),
        ("fish", {"COMP_WORDS": "mlflow-outbox dead ", "COMP_CWORD": "re"}, "plain,retry\tSend dead letters again"),
        ("bash", {"COMP_WORDS": "mlflow-outbox flush --ti", "COMP_CWORD": "2"}, "plain,--timeout"),
        ("bash", {"COMP_WORDS": "mlflow-outbox replay ru", "COMP_CWORD": "2"}, "file,ru"),
    ],
)
def test_words_are_completed(shell: str, more: dict[str, str], answer: str) -> None:
    """Commands, those of a group, options, and files: what a shell's script asks, in its own form."""
    done = run(_MLFLOW_OUTBOX_COMPLETE=f"{shell}_complete", **more)
    assert (0, "") == (done.code, done.err)
    assert re.sub(r"\n$", "", done.out).startswith(answer)


@pytest.mark.parametrize("words", ["show -d {}", "verify -d {}", "flush -d {} --run"])
def test_the_ids_of_runs_are_completed(words: str, tmp_path: Path) -> None:
    """Those of the outbox that is named; where there is none, none, and no word about it in the middle of a line."""
    first, _ = offline(tmp_path, runs=2)
    for place, found in ((tmp_path, f"plain,{first}"), (tmp_path / "none", "")):
        asked = f"mlflow-outbox {words.format(place)} {first[:9]}"
        number = str(len(asked.split()) - 1)
        done = run(_MLFLOW_OUTBOX_COMPLETE="bash_complete", COMP_WORDS=asked, COMP_CWORD=number)
        assert (0, found, "") == (done.code, done.out.strip(), done.err)


#: What each shell does with the script, and then asks it for a word that was begun.
_COMPLETING = {
    "bash": """
        eval "$(mlflow-outbox --show-completion bash)"
        [[ $(complete -p mlflow-outbox) =~ -F\\ ([^ ]+) ]]
        COMP_WORDS=(mlflow-outbox re) COMP_CWORD=1
        "${BASH_REMATCH[1]}" mlflow-outbox re mlflow-outbox
        echo "${COMPREPLY[@]}"
    """,
    "zsh": """
        autoload -U compinit; compinit -D -u
        eval "$(mlflow-outbox --show-completion zsh)"
        _describe() { print -r -- ${completions_with_descriptions%%:*} }
        words=(mlflow-outbox re) CURRENT=2
        $_comps[mlflow-outbox]
    """,
    "fish": """
        mlflow-outbox --show-completion fish | source
        complete -C "mlflow-outbox re" | string split -f 1 \\t
    """,
}


@pytest.mark.parametrize(
    "shell", [pytest.param(shell, marks=pytest.mark.program(shell)) for shell in ("bash", "zsh", "fish")]
)
def test_a_shell_that_evaluated_the_script_completes(shell: str) -> None:
    """``eval "$(mlflow-outbox --show-completion)"``, and then a word that was begun."""
    env = environment(PATH=f"{console_script().parent}:{os.environ['PATH']}")
    done = subprocess.run([shell, "-c", _COMPLETING[shell]], capture_output=True, text=True, check=False, env=env)
    assert ("replay\n", "") == (done.stdout, done.stderr)


def test_the_shell_in_use_is_known(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its script is printed unless another is named; one that cannot complete is bad usage."""
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert "complete --no-files --command mlflow-outbox" in here("--show-completion").out
    assert "#compdef mlflow-outbox" in here("--show-completion", "zsh").out
    done = here("--show-completion", "tcsh")
    assert 2 == done.code
    assert "bash, zsh or fish" in done.err


@pytest.mark.parametrize("uri", ["", " "])
@pytest.mark.parametrize("words", [["replay", "."], ["replay", ".", "--dry-run"], ["verify"]])
def test_an_empty_place_is_bad_usage(
    words: list[str], uri: str, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that is not set must not mean the directory mlruns: nothing is sent, read or made."""
    offline(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents_of(tmp_path)
    done = here(*words, "--to", uri)
    assert 2 == done.code
    assert "--to" in done.err
    assert "its value is empty" in done.err
    assert before == contents_of(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["status", "-d", ""],
        ["import", "runs.tar", "--outbox-dir", " "],
        ["import", ""],
        ["replay", ""],
        ["replay", ".", "--experiment", ""],
        ["export", "--all", "-o", ""],
        ["export", "", "-o", "new.tar"],
        ["verify", ""],
        ["flush", "--run", ""],
        ["worker", "--until-idle", "--metrics-port", "0", "--metrics-address", ""],
    ],
    ids=" ".join,
)
def test_an_empty_path_or_name_is_bad_usage(
    words: list[str], here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it mean the current directory, the runs' own experiments, any run, or all addresses."""
    offline(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert 0 == here("export", "--all", "-d", ".", "-o", "runs.tar").code
    before = contents_of(tmp_path)
    done = here(*words)
    assert (2, True) == (done.code, "its value is empty" in done.err), done
    assert before == contents_of(tmp_path)


def test_the_logging_of_the_process_is_put_back(here: Here, tmp_path: Path) -> None:
    """A program that calls main() itself keeps its own logging."""
    import logging

    offline(tmp_path)
    log = logging.getLogger("mlflow_outbox")
    before = list(log.handlers), log.propagate
    here("status", "-d", tmp_path)
    assert before == (list(log.handlers), log.propagate)


@pytest.mark.parametrize(
    ("pending", "parked", "dead", "unreadable", "code"),
    [
        (0, 0, 0, 0, 0),
        (1, 0, 0, 0, 3),
        (1, 1, 1, 0, 4),
        (0, 1, 0, 0, 4),
        (1, 0, 1, 0, 3),
        (0, 0, 1, 0, 5),
        (0, 0, 0, 1, 1),
        (1, 1, 1, 1, 1),
    ],
)
def test_unreadable_before_parked_before_left_over_before_dead(
    pending: int, parked: int, dead: int, unreadable: int, code: int
) -> None:
    """What needs a person most is what the code says."""
    assert code == of_backlog(pending=pending, parked=parked, dead=dead, unreadable=unreadable)


def test_the_most_urgent_of_several() -> None:
    """An error before parked before held before left over before dead before done; of none: done."""
    order = [ExitCode.ERROR, ExitCode.PARKED, ExitCode.HELD, ExitCode.LEFT, ExitCode.DEAD, ExitCode.DONE]
    while order:
        assert order[0] is most_urgent(list(reversed(order)))
        order.pop(0)
    assert ExitCode.DONE is most_urgent([])
    assert [0, 1, 2, 3, 4, 5, 6, 130] == sorted(exits.ExitCode)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (123_456, "123 kB"), (8e12, "8.0 TB")]
)
def test_sizes(number: float, text: str) -> None:
    """Decimal units, about three digits."""
    assert text == size(number)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (200_000, "2 d")]
)
def test_spans(seconds: float, text: str) -> None:
    """One unit is enough; a clock that was set back shows no negative ages."""
    assert text == span(seconds)


def test_nobody_is_asked_where_nobody_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that did not say --yes has not said yes."""
    assert not terminal.confirm("Really?", assume_yes=False)
    assert terminal.confirm("Really?", assume_yes=True)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["flsh"], 2, "No such command 'flsh'. Did you mean 'flush'?"),
        (["flush", "--timeout", "soon"], 2, "'soon' is not a number of at least 0."),
        (["flush", "--timeout", "nan"], 2, "'nan' is not a number of at least 0."),
        (["flush", "--timeout", "inf"], 2, "'inf' is not a number of at least 0."),
        (["import", "nosuch"], 2, "there is nothing at nosuch; give a file made by export"),
        (["import", "box"], 2, "box is a directory; give a file made by export"),
        (["status", "-d", "loop"], 1, "loop cannot be looked into: Too many levels of symbolic links"),
        (["export", "--all", "-d", "box", "-o", "box"], 1, "there is a file box already; --force replaces it"),
        (["worker", "--metrics-port", "99999"], 2, "'99999' is not a whole number from 0 to 65535."),
        (["replay", "nowhere"], 2, "there is nothing at nowhere; give an outbox, a run's directory or a bundle"),
        (["replay", "box", "--to", "localhost:5000"], 1, "a server's address begins with http:// or https://"),
        (["export", "--all", "-d", "box", "-o", "no/where/runs.tar"], 2, "no/where to write runs.tar in"),
        (["flush", "-d", "box", "--timeout", "0"], 3, "http://127.0.0.1:9 has not answered yet"),
        (["replay", "box", "--timeout", "0"], 3, "http://127.0.0.1:9 has not answered yet"),
    ],
)
def test_what_is_wrong_is_said_with_the_remedy(
    words: list[str], code: int, said: str, here: Here, tmp_path: Path
) -> None:
    """In words of the person who typed it."""
    offline(tmp_path / "box")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    done = here(*words)
    assert (code, True) == (done.code, said in " ".join(done.err.split())), done


def test_a_command_that_is_copied_from_a_message_finds_its_path(here: Here, tmp_path: Path) -> None:
    """Also one with spaces in it."""
    offline(tmp_path / "my runs")
    path = outbox_of(tmp_path / "my runs")
    path.chmod(0o755)
    done = here("flush", "-d", tmp_path / "my runs")
    assert 1 == done.code
    subprocess.run(shlex.split(done.err.strip().partition("run: ")[2]), check=True)
    assert 0o700 == path.stat().st_mode & 0o777


def test_an_outbox_on_a_stick_can_be_replayed(here: Here, tmp_path: Path) -> None:
    """Where no mode is kept it is refused by what would have to write to it, with the command that only reads."""
    offline(tmp_path)
    outbox_of(tmp_path).chmod(0o755)
    done = here("flush", "-d", tmp_path)
    assert (1, True) == (done.code, "sent by mlflow-outbox replay, which only reads it" in done.err), done
    assert 0 == here("replay", tmp_path, "--dry-run").code


@pytest.mark.root
def test_an_outbox_of_somebody_else_can_be_replayed(here: Here, tmp_path: Path) -> None:
    """It is refused by what would have to write to it, with the command that only reads."""
    offline(tmp_path)
    path = outbox_of(tmp_path)
    os.chown(path, 12345, -1)
    done = here("flush", "-d", tmp_path)
    assert 1 == done.code
    assert f"mlflow-outbox replay {path}" in done.err
