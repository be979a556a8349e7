"""The hosts of a hostfile: what the file says, and whether ssh reaches each of them and finds megacog there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megacog.doctor.check import Check, Nodes
from megacog.errors import ConfigError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_AT_ONCE = 32
_SECONDS_TO_CONNECT = 10
_SSH_FAILED = 255


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int
    """Ranks on this host."""


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file for `deepspeed --hostfile`, in its order.

    Raises:
        ConfigError: The file is missing (DeepSpeed would train on this machine alone) or a line is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the hostfile cannot be read ({error}); deepspeed would train here alone") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None or int(match[2]) < 1 or match[1].startswith("-"):
            raise ConfigError(f"{path}:{number}: {text!r} is no line such as `node1 slots=8`")
        if match[1] in hosts:
            raise ConfigError(f"{path}:{number}: {match[1]} stands in the file twice; add up its slots")
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts:
        raise ConfigError(f"{path}: names no host; write lines such as `node1 slots=8`")
    return list(hosts.values())


def check_hosts(hosts: Sequence[Host], folder: Path, seconds: float) -> Nodes:
    """Log in to every host as DeepSpeed does, and import megacog there.

    Args:
        hosts: As `read_hostfile` returns.
        folder: Where the run will be started: it must exist on every host.
        seconds: To wait for one host.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        checks = pool.map(lambda host: _reach(host, folder, seconds), hosts)
        return {host.name: [check] for host, check in zip(hosts, checks, strict=True)}


def _reach(host: Host, folder: Path, seconds: float) -> Check:
    path = os.environ.get("PYTHONPATH", "")  # which DeepSpeed hands on too
    remote = (
        f"cd {shlex.quote(str(folder))} && PYTHONPATH={shlex.quote(path)} {shlex.quote(sys.executable)} "
        "-c 'import megacog'"
    )
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SECONDS_TO_CONNECT}"]
    try:
        done = subprocess.run(
            ["ssh", *options, host.name, remote], capture_output=True, text=True, timeout=seconds, errors="replace"
        )
    except FileNotFoundError:
        return Check("ssh", "sick", "there is no ssh on this machine", "install openssh-client")
    except subprocess.TimeoutExpired:
        return Check("ssh", "sick", f"no answer in {seconds:.0f} s", "the host hangs: drain or reboot it")
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode == _SSH_FAILED:
        fix = f"`ssh {host.name} true` must end without a question: check name, key and known_hosts"
        return Check("ssh", "sick", said, fix)
    if done.returncode:
        fix = f"{folder} and {sys.executable} must be the same on all hosts: share them"
        return Check("ssh", "sick", f"reached, but: {said}", fix)
    return Check("ssh", "ok", f"reached, finds megacog; {host.slots} ranks")
