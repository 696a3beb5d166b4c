"""What the figures were taken on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

_PACKAGES = ("mlflow", "diskcache", "msgspec", "tenacity")


def describe(directory: Path) -> dict[str, Any]:
    """Return processor, memory, file system and versions.

    Args:
        directory: where the measurements write.
    """
    return {
        "taken": time.strftime("%Y-%m-%d", time.gmtime()),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "file_system": _file_system(directory),
        "free_disk_gib": shutil.disk_usage(directory).free >> 30,
        "load_at_start": [round(load, 1) for load in os.getloadavg()],
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _file_system(directory: Path) -> str:
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ""
    holding = [m for m in mounts if directory.is_relative_to(m[1])]
    return max(holding, key=lambda m: len(m[1]))[2] if holding else ""
