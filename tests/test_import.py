"""What importing and creating cost: none of the heavy libraries, and nothing of the host is changed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mlflow_outbox
import mlflow_outbox_worker

_PROBE = """
import json, logging, os, signal, sys, threading, warnings

def host():
    umask = os.umask(0o22)
    os.umask(umask)
    return dict(os.environ), logging.root.level, list(logging.root.handlers), signal.getsignal(signal.SIGINT), umask

before = host()
import mlflow_outbox
tracker = mlflow_outbox.MLflowTracker("experiment", "http://127.0.0.1:9", outbox_dir=sys.argv[1])
created = sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[2].split()))
threads = threading.active_count()
offline = mlflow_outbox.MLflowTracker("experiment", "http://127.0.0.1:9", outbox_dir=sys.argv[1], worker="none")
offline.start_run().log_metric("loss", 1.0)
logged = sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[2].split()))
print(json.dumps({"created": created, "logged": logged, "threads": threads, "same": before == host()}), flush=True)
os._exit(0)
"""
_HEAVY = "mlflow diskcache sqlalchemy pandas numpy requests rich click tenacity sqlite3 asyncio mlflow_outbox_worker"


@pytest.mark.parametrize(
    ("library", "importers"),
    [
        ("mlflow", ["mlflow_outbox.plugin", "mlflow_outbox_worker.mlflow_sink"]),
        ("sqlalchemy", ["mlflow_outbox.plugin", "mlflow_outbox_worker.mlflow_sink"]),
        ("diskcache", ["mlflow_outbox_worker.dbconnection", "mlflow_outbox_worker.disk"]),
        ("tenacity", ["mlflow_outbox_worker.retry"]),
    ],
)
def test_a_heavy_library_is_imported_by_few_modules(library: str, importers: list[str]) -> None:
    """Wherever in a module the import stands: whoever looks for what this project does with it looks there only."""
    found = set()
    for package in (mlflow_outbox, mlflow_outbox_worker):
        root = Path(str(package.__file__)).parent
        for path in root.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_bytes())):
                named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if library in {name.partition(".")[0] for name in named}:
                    found.add(".".join(path.relative_to(root.parent).with_suffix("").parts[:2]))
    assert importers == sorted(found)


def test_import_creation_and_logging_load_nothing_heavy_and_change_nothing(tmp_path: Path) -> None:
    """mlflow, diskcache, sqlalchemy, pandas, numpy stay out; environment, logging, signals and umask are as before."""
    output = subprocess.run(
        [sys.executable, "-c", _PROBE, str(tmp_path), _HEAVY], capture_output=True, check=True, timeout=60
    )
    seen = json.loads(output.stdout)
    assert {"created": [], "logged": [], "threads": 1, "same": True} == seen


_BOTH = """
import sys, threading

def program():
    import mlflow
    print("program", mlflow.__name__)

thread = threading.Thread(target=program)
thread.start()
while "mlflow" not in sys.modules:
    pass
from mlflow_outbox_worker.mlflow_sink import open_sink
print("delivery", open_sink("http://127.0.0.1:9").parallel)
thread.join()
"""


def test_mlflow_can_be_imported_by_the_program_while_delivery_wants_it(tmp_path: Path) -> None:
    """Each has all of it, whoever came first; neither meets half of a module."""
    output = subprocess.run(
        [sys.executable, "-c", _BOTH], capture_output=True, check=False, timeout=120, text=True, cwd=tmp_path
    )
    assert "" == output.stderr
    assert ["delivery True", "program mlflow"] == sorted(output.stdout.splitlines())
