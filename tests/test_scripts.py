from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["scripts/demo", "scripts/test", "scripts/check", ".ci/run"]

#: Stands in for Python, in the machine and in the environments it "makes": notes pip's calls and can fail at them.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *"import venv"*) [ -z "${NO_VENV:-}" ] ;;
    "-c "*) exit 0 ;;
    "-m venv --clear "*)
        rm -rf "$4"
        mkdir -p "$4/bin"
        cp "$0" "$4/bin/python"
        echo made >>"$CALLS" ;;
    "-m pip install "*)
        echo "pip $*" >>"$CALLS"
        [ ! -e "$CALLS.fail" ] ;;
    *) echo "ran $*" >>"$CALLS" ;;
esac
"""


class Machine:
    """A checkout in a directory with a space in its name, and a stand-in for Python."""

    def __init__(self, directory: Path) -> None:
        self.checkout = directory / "a checkout"
        self.calls_file = directory / "calls"
        self.python = directory / "python stand-in"
        self.checkout.mkdir()
        for name in ("pyproject.toml", "constraints.txt", "constraints-oldest.txt"):
            shutil.copy(ROOT / name, self.checkout)
        shutil.copytree(ROOT / "scripts", self.checkout / "scripts")
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a script of the checkout from another directory."""
        environment = os.environ | {"PYTHON": str(self.python), "CALLS": str(self.calls_file)} | variables
        command = [str(self.checkout / script), *arguments]
        return subprocess.run(command, env=environment, cwd="/", check=False, capture_output=True, text=True)

    def calls(self) -> list[str]:
        """Return the first word of each call since the last time."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return [line.split()[0] for line in lines]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine on which nothing has been installed."""
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_executable_and_stops_at_the_first_error(script: str) -> None:
    """Each script is bash, strict, and free of syntax errors."""
    path = ROOT / script
    assert path.stat().st_mode & stat.S_IXUSR
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_first_run_installs_and_the_second_does_not(machine: Machine) -> None:
    """The environment is made once, whatever directory the script is called from."""
    assert 0 == machine.run("scripts/demo", "--help").returncode
    assert ["made", "pip", "ran"] == machine.calls()
    assert 0 == machine.run("scripts/demo").returncode
    assert ["ran"] == machine.calls()


def test_arguments_reach_the_program_as_they_were_given(machine: Machine) -> None:
    """Spaces and empty arguments survive."""
    machine.run("scripts/demo")
    machine.calls()
    machine.run("scripts/demo", "--name", "two words")
    demo = machine.checkout / "scripts" / "demo_session.py"
    assert f"ran {demo} --name two words\n" == machine.calls_file.read_text()


def test_a_failed_installation_is_told_and_made_up_for(machine: Machine) -> None:
    """The next run starts afresh, as after an interruption, and the one after it does nothing."""
    fail = Path(f"{machine.calls_file}.fail")
    fail.touch()
    failed = machine.run("scripts/demo")
    assert 1 == failed.returncode
    assert "The installation failed" in failed.stderr
    assert ["made", "pip"] == machine.calls()
    fail.unlink()
    machine.run("scripts/demo")
    assert ["made", "pip", "ran"] == machine.calls()
    machine.run("scripts/demo")
    assert ["ran"] == machine.calls()


def test_changed_pins_update_the_environment_that_is_there(machine: Machine) -> None:
    """Another version in the constraints is installed over what there is."""
    machine.run("scripts/demo")
    machine.calls()
    with (machine.checkout / "constraints.txt").open("a") as constraints:
        constraints.write("another==1.0\n")
    machine.run("scripts/demo")
    assert ["pip", "ran"] == machine.calls()


def test_a_checkout_that_moved_gets_a_new_environment(machine: Machine) -> None:
    """Commands in an environment contain its path, so a moved one is made anew."""
    machine.run("scripts/demo")
    machine.calls()
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("moved here"))
    machine.run("scripts/demo")
    assert ["made", "pip", "ran"] == machine.calls()


def test_the_oldest_mlflow_gets_an_environment_and_constraints_of_its_own(machine: Machine) -> None:
    """`scripts/test oldest` leaves the other environment alone and passes its arguments on."""
    machine.run("scripts/test", "oldest", "-x")
    calls = machine.calls_file.read_text()
    assert "constraints-oldest.txt" in calls
    assert "-m compatibility -x\n" in calls
    assert (machine.checkout / ".venv-oldest").exists()
    assert not (machine.checkout / ".venv").exists()


def test_a_python_without_venv_is_explained(machine: Machine) -> None:
    """The message names the package to install."""
    result = machine.run("scripts/demo", NO_VENV="1")
    assert (1, True) == (result.returncode, "apt-get install python3-venv" in result.stderr)


def test_a_machine_without_python_is_explained(machine: Machine, tmp_path: Path) -> None:
    """The message says what was looked for."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("bash", "env", "dirname", "cat", "cksum", "flock", "head", "rm"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    result = machine.run("scripts/demo", PYTHON="", PATH=str(programs))
    assert (1, True) == (result.returncode, "No Python 3.10 or later was found" in result.stderr)


def test_a_python_that_is_too_old_is_refused_by_name(machine: Machine) -> None:
    """PYTHON is the user's choice: nothing else is taken in its place."""
    result = machine.run("scripts/demo", PYTHON="false")
    assert (1, True) == (result.returncode, "PYTHON=false is not a Python 3.10 or later" in result.stderr)
