"""What this machine can inject: each ability is tried for real, once, and its absence is a sentence for the table."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_TRY_MOUNT = "mount -t tmpfs -o size=64k tmpfs /mnt"
_TRY_LOOP = "truncate -s 8M {0}/image && mkfs.ext4 -q -F {0}/image && mkdir {0}/m && mount -o loop {0}/image {0}/m"


@functools.cache
def missing(ability: str) -> str:
    """Return what would be needed for an ability, or "" when it is there.

    Args:
        ability: "strace", "mounts", "loop" or "root".
    """
    return {"strace": _strace, "mounts": _mounts, "loop": _loop, "root": _root}[ability]()


def _strace() -> str:
    if shutil.which("strace") is None:
        return "the program strace, with ptrace allowed"
    inject = ["strace", "-f", "-o", os.devnull, "-e", "inject=getpid:error=EPERM", "true"]
    try:
        done = subprocess.run(inject, capture_output=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "an strace that works"
    return "" if done.returncode == 0 else "permission to trace processes (ptrace)"


def _in_namespace(command: str) -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, timeout=30, check=False)
    return done.returncode == 0


def _mounts() -> str:
    return "" if _in_namespace(_TRY_MOUNT) else "root (CAP_SYS_ADMIN) in a mount namespace, for tmpfs"


def _loop() -> str:
    with tempfile.TemporaryDirectory() as folder:
        if _in_namespace(_TRY_LOOP.format(Path(folder))):
            return ""
    return "root, /dev/loop-control, mkfs.ext4 and ext4, for a file system whose power can be cut"


def _root() -> str:
    return "" if os.geteuid() == 0 else "root, to act as another user"
