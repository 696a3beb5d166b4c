"""File systems of one's own for a child process: tiny ones, and ones whose power can be cut. Needs root, on Linux.

Everything happens in a mount namespace of the child: when the child and its children are gone, so are the mounts.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import subprocess
from pathlib import Path

_CLONE_NEWNS = 0x00020000
#: ext4: stop the file system at once, without writing the journal out: what a power cut does.
_EXT4_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2


def own_namespace() -> None:
    """Give this process mounts of its own.

    Raises:
        OSError: it may not.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    mount("--make-rprivate", "/")


def mount(*arguments: str) -> None:
    """Mount something; the arguments are those of the command."""
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def umount(path: Path, *options: str) -> None:
    """Unmount a path, with options of the command."""
    subprocess.run(["umount", *options, str(path)], check=True, capture_output=True)


def tmpfs(path: Path, options: str) -> Path:
    """Mount a tmpfs, for instance with ``size=64k``, and return its path."""
    path.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"{options},mode=0700", "tmpfs", str(path))
    return path


class PowerCut:
    """An ext4 file system in a file, that can lose its power.

    The file lies in memory. On a disk that six tests cut the power of it would be a slow one too, which is a fault of
    its own (F23); what reaches the file and what does not is up to ext4.

    Args:
        folder: where it is mounted; in a mount namespace of one's own.
    """

    def __init__(self, folder: Path) -> None:
        self.image = tmpfs(folder / "memory", "size=32m") / "image"
        self.path = folder / "disk"
        self.path.mkdir()
        with self.image.open("wb") as file:
            file.truncate(24 * 1024 * 1024)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1", str(self.image)], check=True)
        self.on()
        self.path.chmod(0o700)

    def on(self) -> None:
        """Mount it; ext4 recovers from its journal as after a real power cut."""
        mount("-o", "loop", str(self.image), str(self.path))

    def cut(self) -> None:
        """Lose everything that was not synced; writes fail from now on."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def off(self) -> None:
        """Unmount it."""
        umount(self.path)
