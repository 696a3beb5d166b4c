"""Is a path on a network file system? There, locks and SQLite cannot be relied on, and others see the same files.

``statvfs`` does not tell the type of a file system, so the kernel's table of mounts is asked
(``/proc/self/mountinfo``). Where there is no such table, a path counts as local.

What follows from the answer: no logging call locks a file there, the ledger and the worker's lock live in the local
state directory, and a *host lease* in the outbox keeps two machines from delivering it at once.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

#: Types of file systems that other machines may have mounted too. FUSE types are judged by the part behind "fuse.".
NETWORK_TYPES: Final = frozenset(
    {
        "nfs",
        "nfs3",
        "nfs4",
        "lustre",
        "gpfs",
        "mmfs",
        "beegfs",
        "fhgfs",
        "cifs",
        "smb",
        "smb2",
        "smb3",
        "smbfs",
        "ncpfs",
    }
    | {
        "sshfs",
        "ceph",
        "ceph-fuse",
        "cephfs",
        "glusterfs",
        "9p",
        "afs",
        "afs_osd",
        "orangefs",
        "pvfs2",
        "panfs",
        "wekafs",
    }
    | {
        "gfs",
        "gfs2",
        "ocfs2",
        "coda",
        "davfs",
        "davfs2",
        "s3fs",
        "gcsfuse",
        "goofys",
        "rclone",
        "mountpoint-s3",
        "juicefs",
    }
    | {"moosefs", "lizardfs", "quobyte", "virtiofs", "vboxsf", "prl_fs", "curlftpfs", "blobfuse", "blobfuse2", "hdfs"}
)

_ESCAPE: Final = re.compile(r"\\([0-7]{3})")
_TABLE: Final = "/proc/self/mountinfo"
#: Answers by device number, which every mount has its own of: the table is read once per file system.
_known: dict[int, bool] = {}


class Mount(NamedTuple):
    """A mounted file system: where, and of which type."""

    point: str
    kind: str


def mount_of(path: str, mountinfo: str) -> Mount | None:
    """Return the mount that a path lies on, or None when the table names none.

    Args:
        path: absolute, without symbolic links.
        mountinfo: the text of ``/proc/self/mountinfo``; lines that are none are passed over.
    """
    best: Mount | None = None
    for line in mountinfo.splitlines():
        left, dash, right = line.partition(" - ")
        fields, kinds = left.split(" "), right.split(" ")
        if not dash or len(fields) < 6 or not kinds[0]:  # noqa: PLR2004 - the fields before the optional ones
            continue
        point = _ESCAPE.sub(lambda found: chr(int(found[1], 8)), fields[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        # A later mount at the same place covers the earlier one.
        if inside and (best is None or len(point) >= len(best.point)):
            best = Mount(point, kinds[0])
    return best


def is_network_type(kind: str) -> bool:
    """Return whether a type of file system, for instance "nfs4" or "fuse.sshfs", is one that other machines share."""
    name = kind.lower()
    return name in NETWORK_TYPES or name.partition(".")[2] in NETWORK_TYPES


def is_network(path: str | os.PathLike[str]) -> bool:
    """Return whether a path, or the nearest of its parents that exists, is on a network file system."""
    real = os.path.realpath(path)
    while True:
        try:
            device = os.stat(real).st_dev
            break
        except OSError:
            parent = os.path.dirname(real)
            if parent == real:
                return False
            real = parent
    if device not in _known:
        mount = mount_of(real, read_mountinfo())
        _known[device] = mount is not None and is_network_type(mount.kind)
    return _known[device]


def read_mountinfo() -> str:
    """Return the kernel's table of mounts; empty where there is none."""
    try:
        return Path(_TABLE).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def forget() -> None:
    """Forget all answers, because something was mounted meanwhile."""
    _known.clear()
