from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEST = "tests/test_thing.py::test_it_holds"
SUMMARY = "F\n=== short test summary info ===\n"


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("mutants_script", ROOT / "scripts" / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants_script", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (1, f"{SUMMARY}FAILED {TEST} - AssertionError: lost\n", "noticed"),
        (1, f"{SUMMARY}FAILED {TEST}[moved away] - assert 1 == 2\n", "noticed"),
        (0, f"{SUMMARY}PASSED {TEST}\n", "SURVIVED"),
        (0, f"{SUMMARY}PASSED {TEST}_and_more\n", "NOT RUN"),
        (1, f"{SUMMARY}FAILED {TEST}_and_more - assert 1 == 2\n", "NOT RUN"),
        (1, f"{SUMMARY}ERROR {TEST} - RuntimeError: no server\n", "NOT RUN"),
        (1, "Timeout (0:03:00)!\nThread 0x1 (most recent call first):\n", "NOT RUN"),
        (2, f"{SUMMARY}ERROR tests/test_thing.py - ImportError\n", "NOT RUN"),
        (2, f"{SUMMARY}FAILED {TEST} - AssertionError\n!!! KeyboardInterrupt !!!\n", "NOT RUN"),
        (3, "INTERNALERROR> Traceback\n", "NOT RUN"),
        (4, f"ERROR: not found: {TEST}\n", "NOT RUN"),
        (5, "no tests ran in 0.01s\n", "NOT RUN"),
        (-9, "", "NOT RUN"),
    ],
    ids=range(13),
)
def test_only_a_failure_of_the_named_test_notices_a_mutant(
    mutants: ModuleType, code: int, output: str, expected: str
) -> None:
    """Whatever else goes wrong with pytest proves nothing."""
    assert expected == mutants.verdict(mutants.ran_of(code, output), TEST)


@pytest.fixture
def tree(mutants: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A product of one module with a test of it, and mutants that end in each way."""
    for folder in ("tracker/thing", "worker", "tests", "scripts"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / "tracker/thing/__init__.py").write_text("VALUE = 1\nOTHER = 2\n")
    (tmp_path / "tests/test_thing.py").write_text("import thing\n\ndef test_it_holds():\n    assert 1 == thing.VALUE\n")
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # of which this test needs none
    file = "tracker/thing/__init__.py"
    changes = {
        "wrong": ("VALUE = 1", "VALUE = 2"),
        "no difference": ("OTHER = 2", "OTHER = 3"),
        "no import": ("VALUE = 1", "import nothing_of_that_name"),
        "no syntax": ("VALUE = 1", "VALUE ="),
        "changed since": ("VALUE = 9", "VALUE = 1"),
    }
    made = [mutants.Mutant(name, file, old, new, TEST) for name, (old, new) in changes.items()]
    monkeypatch.setattr(mutants, "MUTANTS", made)
    return tmp_path


def test_each_mutant_gets_its_verdict_and_all_but_the_noticed_make_the_script_fail(
    mutants: ModuleType, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code of the tree is put back after each."""
    assert 0 == mutants.main(["wrong"])
    assert "noticed" == capsys.readouterr().out.split()[0]
    others = ["no difference", "no import", "no syntax", "changed since"]
    assert 1 == mutants.main(others)
    said = capsys.readouterr().out.splitlines()
    assert ["SURVIVED", "NOT RUN", "NOT RUN", "NOT APPLIED"] == [line[:12].strip() for line in said[:4]]
    assert "4 mutants, 0 noticed, 1 SURVIVED, 2 NOT RUN, 1 NOT APPLIED" == said[-1]
    assert "VALUE = 1\nOTHER = 2\n" == (tree / "tracker/thing/__init__.py").read_text()


def test_a_test_that_does_not_end_in_time_notices_nothing(
    mutants: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine does that too."""
    monkeypatch.setattr(mutants, "_PATIENCE", 0.001)
    assert "NOT RUN" == mutants.verdict(mutants._run(tree, [TEST]), TEST)


def test_a_test_that_is_not_run_without_a_mutant_proves_nothing(
    mutants: ModuleType, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another one that passes beside it does not hide that."""
    (tree / "tests/conftest.py").write_text(
        "def pytest_collection_modifyitems(items):\n    items[:] = [i for i in items if i.name != 'test_it_holds']\n"
    )
    (tree / "tests/test_other.py").write_text("def test_something():\n    pass\n")
    mutants.MUTANTS.append(mutants.MUTANTS[0]._replace(name="other", test="tests/test_other.py"))
    assert 1 == mutants.main(["wrong", "other"])
    assert (
        f"these were not run without any mutant, so nothing can be proved with them: {TEST}\n"
        == capsys.readouterr().out
    )


def test_every_mutant_still_finds_what_it_breaks_and_the_test_that_notices(mutants: ModuleType) -> None:
    """Code moves on: a mutant whose place is gone breaks nothing, and would be found out in an hour only."""
    for mutant in mutants.MUTANTS:
        assert 1 == (ROOT / mutant.file).read_text().count(mutant.old), mutant.name
        path, _, name = mutant.test.partition("[")[0].partition("::")
        assert f"def {name.rpartition('::')[2]}" in (ROOT / path).read_text(), mutant.test
