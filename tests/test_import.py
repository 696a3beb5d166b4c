"""What importing and creating cost: none of the heavy libraries, and nothing of the host is changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
print(json.dumps({"created": created, "logged": logged, "threads": threads, "same": before == host()}))
os._exit(0)
"""
_HEAVY = "mlflow diskcache sqlalchemy pandas numpy requests rich typer tenacity sqlite3 asyncio mlflow_outbox_worker"


def test_import_creation_and_logging_load_nothing_heavy_and_change_nothing(tmp_path: Path) -> None:
    """mlflow, diskcache, sqlalchemy, pandas, numpy stay out; environment, logging, signals and umask are as before."""
    output = subprocess.run(
        [sys.executable, "-c", _PROBE, str(tmp_path), _HEAVY], capture_output=True, check=True, timeout=60
    )
    seen = json.loads(output.stdout)
    assert {"created": [], "logged": [], "threads": 1, "same": True} == seen
