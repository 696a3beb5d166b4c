from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def requirements(*extras: str) -> list[Requirement]:
    """Return the project's requirements and those of some extras, without the project itself."""
    optional = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in optional[extra])]
    return [one for one in map(Requirement, lines) if one.name != PROJECT["project"]["name"]]


def pins(name: str, python: str) -> dict[str, Version]:
    """Return the versions that a constraints file pins for a version of Python."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                (exactly,) = pin.specifier
                assert "==" == exactly.operator, line
                assert pin.name not in found, line
                found[pin.name] = Version(exactly.version)
    return found


class TestRequirements:
    def test_every_requirement_has_a_lowest_version_and_a_bound_above(self) -> None:
        """A new major version of a dependency reaches users after it has been tested."""
        for requirement in requirements("metrics", "postgresql", "demo"):
            operators = sorted(each.operator for each in requirement.specifier)
            assert ["<", ">="] == operators, requirement

    @pytest.mark.parametrize("python", PYTHONS)
    @pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
    def test_the_pinned_versions_are_ones_that_the_project_allows(self, name: str, python: str) -> None:
        """Each direct requirement is pinned, for each Python, to a version inside its range."""
        pinned = pins(name, python)
        for requirement in requirements(*PROJECT["project"]["optional-dependencies"]):
            assert requirement.name in pinned
            assert requirement.specifier.contains(pinned[requirement.name]), requirement

    @pytest.mark.parametrize("python", PYTHONS)
    def test_the_oldest_constraints_pin_the_lowest_versions(self, python: str) -> None:
        """What `scripts/test oldest` tests is what the lower bounds promise."""
        pinned = pins("constraints-oldest.txt", python)
        for requirement in requirements("metrics"):
            (lowest,) = (each.version for each in requirement.specifier if each.operator == ">=")
            assert Version(lowest) == pinned[requirement.name]

    @pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
    def test_constraints_name_no_place(self, name: str) -> None:
        """Versions only: no address, no path and no option that would bind them to one machine."""
        for line in (ROOT / name).read_text().splitlines():
            assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+( ; python_version .*)?", line), line

    def test_the_tested_pythons_are_the_supported_ones(self) -> None:
        """Classifiers and requires-python tell the same."""
        classifiers = [f"Programming Language :: Python :: {python}" for python in PYTHONS]
        stated = [one for one in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", one)]
        assert classifiers == stated
        assert f">={PYTHONS[0]}" == PROJECT["project"]["requires-python"]
        assert Marker("python_version >= '3.10'").evaluate()


class TestDistribution:
    def test_the_wheel_holds_the_two_packages_and_nothing_else(self, tmp_path: Path) -> None:
        """Both halves with their type information, the licence and the command; no tests, no scripts."""
        command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        (wheel,) = tmp_path.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
        version = PROJECT["project"]["version"]
        tops = {name.split("/")[0] for name in names}
        assert {"mlflow_outbox", "mlflow_outbox_worker", f"mlflow_outbox-{version}.dist-info"} == tops
        assert {"mlflow_outbox/py.typed", "mlflow_outbox_worker/py.typed"} <= set(names)
        assert any(name.endswith("licenses/LICENSE") for name in names)
        assert "mlflow-outbox = mlflow_outbox_worker.cli:main" in entry_points

    def test_whoever_has_the_source_distribution_can_test_it(self, tmp_path: Path) -> None:
        """The scripts that the tests look at are in it, the one of continuous integration too."""
        command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        (path,) = tmp_path.glob("*.tar.gz")
        with tarfile.open(path) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        wanted = {".ci/run", "scripts/test", "tests/conftest.py", "README.md", "pyproject.toml", "constraints.txt"}
        assert set() == wanted - names

    def test_the_changelog_speaks_of_this_version(self) -> None:
        """A release without a word about it is none."""
        assert PROJECT["project"]["version"] in (ROOT / "CHANGELOG.md").read_text()

    def test_every_exception_from_a_lint_rule_has_a_reason(self) -> None:
        """One rule a line, with a comment behind it."""
        text = (ROOT / "pyproject.toml").read_text()
        rules = re.findall(r'^ {4}"([A-Z]+\d*)",(.*)$', text.split("[tool.ruff.lint]")[1], re.MULTILINE)
        assert len(rules) > 0
        assert [] == [rule for rule, reason in rules if not re.match(r" +# \w+", reason)]
