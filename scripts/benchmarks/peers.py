"""Installs the trackers to compare with, each with all that it needs into a directory of its own.

Wheels only: nothing is built, so that a comparison never depends on a compiler. A peer that cannot be installed is
named in the results with pip's reason.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.trackers import PEERS


def install(directory: Path, say: Callable[[str], None]) -> tuple[dict[str, Path], dict[str, str], dict[str, str]]:
    """Return the directories of the peers that are there, their versions, and why the others are not.

    Args:
        directory: holds one directory per peer; filled at the first call.
        say: told what takes time.
    """
    found: dict[str, Path] = {}
    versions: dict[str, str] = {}
    missing: dict[str, str] = {}
    for name in PEERS:
        target, reason = directory / name, directory / f"{name}.failed"
        if not target.exists() and not reason.exists():
            say(f"installing {name} ...")
            _install(name, target, reason)
        if target.exists():
            found[name] = target
            versions[name] = _version(name, target)
        else:
            missing[name] = reason.read_text().strip()
    return found, versions, missing


def _install(name: str, target: Path, reason: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(".unfinished")
    shutil.rmtree(draft, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--only-binary", ":all:", "--target", str(draft), name],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        draft.rename(target)
        return
    shutil.rmtree(draft, ignore_errors=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    reason.write_text((errors[0] if errors else "pip failed")[:200] + "\n")


def _version(name: str, target: Path) -> str:
    wanted = name.replace("-", "_").lower()
    for info in target.glob("*.dist-info"):
        distribution, _, version = info.name.removesuffix(".dist-info").rpartition("-")
        if distribution.replace("-", "_").lower() == wanted:
            return version
    return "?"
