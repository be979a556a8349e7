"""A machine that lacks what it can lack: `unshare --net --mount python tests/poor_machine.py COMMAND ...` as root.

The command sees no network but itself, 64 KiB of /dev/shm, 64 open files, and a user id that has no name. What else it
lacks, its environment says; `ABSENT` packages are hidden from it by a folder that `hide_packages` makes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import socket
import struct
import sys
from pathlib import Path

ABSENT = ("mpi4py", "triton", "tensorboard", "wandb", "ninja", "sklearn", "skvideo", "matplotlib", "pytest")
OPEN_FILES = 64
_SIOCSIFFLAGS, _UP_AND_RUNNING = 0x8914, 0x41
_NOBODY = "54321"


def hide_packages(folder: Path) -> Path:
    """Make a folder that, on PYTHONPATH, hides the packages that a plain installation lacks; returns it."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "_find = PathFinder.find_spec\n"
        f"PathFinder.find_spec = lambda name, *rest: None if name.split('.')[0] in {ABSENT!r} else _find(name, *rest)\n"
    )
    return folder


def become_poor() -> None:
    """Take all of it away from this process and its children, who are in namespaces of their own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _UP_AND_RUNNING))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64k") != 0:
        raise OSError(ctypes.get_errno(), "mount")
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))


if __name__ == "__main__":
    become_poor()
    nameless = ["unshare", "--user", f"--map-user={_NOBODY}", f"--map-group={_NOBODY}"]
    os.execv("/usr/bin/unshare", [*nameless, *sys.argv[1:]])
