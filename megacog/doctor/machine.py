"""Limits, disks and GPUs of one machine."""

from __future__ import annotations

import csv
import io
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from megacog.doctor.check import Check

OPEN_FILES, FEW_OPEN_FILES = 4096, 1024
"""A rank opens shards, sockets to other ranks and loader processes."""
SHARED_MEMORY = 1 << 30
"""Loader processes and NCCL pass data through /dev/shm; containers give 64 MiB of it by default."""
SLOW_DISK = 100e6
"""Bytes per second: at this rate a 9B checkpoint takes four minutes."""
_PROBE_BYTES = 256 << 20
_BLOCK = 16 << 20
_BUSY_MIB = 1024
_HOT_CELSIUS = 90

QUERY = (
    "index", "name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total",
    "temperature.gpu",
)  # fmt: skip
"""What nvidia-smi is asked for."""


def open_files_check(limit: int | None = None) -> Check:
    """`ulimit -n` of this process."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    value = "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
    if limit == resource.RLIM_INFINITY or limit >= OPEN_FILES:
        return Check("open files (ulimit -n)", "ok", value)
    fix = "ulimit -n 65536 in the job script, or LimitNOFILE of slurmd or docker --ulimit nofile=65536"
    return Check("open files (ulimit -n)", "warning" if limit >= FEW_OPEN_FILES else "sick", value, fix)


def locked_memory_check(limit: int | None = None, infiniband: bool | None = None) -> Check:
    """`ulimit -l`: InfiniBand registers memory that may not be swapped out."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    infiniband = _has_infiniband() if infiniband is None else infiniband
    value = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / 2**20:.0f} MiB"
    name = "locked memory (ulimit -l)"
    if limit == resource.RLIM_INFINITY:
        return Check(name, "ok", value)
    if not infiniband:
        return Check(name, "ok", f"{value}; no InfiniBand here")
    fix = "LimitMEMLOCK=infinity for slurmd or sshd, or docker --ulimit memlock=-1: InfiniBand needs it"
    return Check(name, "sick", value, fix)


def _has_infiniband() -> bool:
    try:
        return any(Path("/sys/class/infiniband").iterdir())
    except OSError:
        return False


def shared_memory_check(folder: Path = Path("/dev/shm")) -> Check:
    """Size of the shared-memory file system."""
    try:
        total = shutil.disk_usage(folder).total
    except OSError as error:
        return Check(str(folder), "sick", f"unusable: {error.strerror}", f"mount a tmpfs on {folder}")
    value = f"{total / 2**30:.1f} GiB"
    if total >= SHARED_MEMORY:
        return Check(str(folder), "ok", value)
    return Check(str(folder), "sick", value, "docker run --shm-size=16g or --ipc=host; apptainer and SLURM inherit it")


def disk_checks(folder: Path, needed: float, probe_bytes: int = _PROBE_BYTES) -> list[Check]:
    """Free space of a folder's file system, and how fast a synced file is written there.

    Args:
        folder: Where runs will write; it must exist.
        needed: Free bytes that a run needs.
        probe_bytes: Size of the file that is written and removed.
    """
    space, speed = f"space in {folder}", f"write speed in {folder}"
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return [Check(space, "sick", f"unusable: {error.strerror}", "create it, or name another one with --folder")]
    value = f"{free / 2**30:.0f} GiB free, {needed / 2**30:.0f} GiB wanted"
    checks = [Check(space, "ok", value)]
    if free < needed:
        checks = [Check(space, "sick", value, "free some space, or write runs elsewhere (train.run_dir)")]
    try:
        rate = write_rate(folder, min(probe_bytes, free // 2))
    except OSError as error:
        return [*checks, Check(speed, "sick", f"cannot write: {error.strerror}", "check permissions and quota")]
    value = f"{rate / 1e6:.0f} MB/s"
    if rate < SLOW_DISK:
        fix = "checkpoints will hold training up: use a parallel file system or a local disk"
        return [*checks, Check(speed, "warning", value, fix)]
    return [*checks, Check(speed, "ok", value)]


def write_rate(folder: Path, size: int) -> float:
    """Bytes per second of writing and syncing a file of `size` bytes, which is then removed.

    Raises:
        OSError: It cannot be written.
    """
    path = folder / f".doctor-{os.uname().nodename}-{os.getpid()}"
    block = os.urandom(min(_BLOCK, max(size, 1)))
    start, written = time.perf_counter(), 0
    try:
        with open(path, "xb", buffering=0) as file:
            while written < size:
                written += file.write(block[: size - written])
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return written / max(time.perf_counter() - start, 1e-9)


def read_nvidia_smi() -> str | None:
    """The answer to QUERY as csv; None without the tool, empty when it fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except FileNotFoundError:
        return None
    except (OSError, subprocess.SubprocessError):
        return ""


def gpu_checks(answer: str | None, torch_devices: int) -> list[Check]:
    """A check per GPU, and whether torch sees them all.

    Args:
        answer: As `read_nvidia_smi` returns.
        torch_devices: How many CUDA devices torch sees.
    """
    if answer is None:
        if torch_devices:
            return [Check("GPUs", "warning", f"{torch_devices} by torch", "install nvidia-smi to see ECC errors")]
        return [Check("GPUs", "ok", "none: CPU only")]
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(answer)) if row]
    if not rows:
        return [Check("GPUs", "sick", "nvidia-smi fails", "load the driver (nvidia-smi says why), or reboot the node")]
    checks = [_gpu_check(row) for row in rows]
    value = f"{torch_devices} of {len(rows)}"
    if torch_devices == len(rows):
        return [*checks, Check("GPUs that torch sees", "ok", value)]
    if torch_devices and os.environ.get("CUDA_VISIBLE_DEVICES"):
        return [*checks, Check("GPUs that torch sees", "ok", f"{value} (CUDA_VISIBLE_DEVICES)")]
    fix = "this torch is built for the CPU or for a newer driver: reinstall it for the driver's CUDA version"
    return [*checks, Check("GPUs that torch sees", "sick", value, fix)]


def _gpu_check(row: Sequence[str]) -> Check:
    index, name, driver, total, used, ecc, temperature = row
    title = f"GPU {index}"
    value = f"{name}, {total} MiB, driver {driver}, ECC errors {ecc}, {temperature} C, {used} MiB in use"
    if ecc.isdigit() and int(ecc):
        return Check(title, "sick", value, "uncorrected memory errors: drain the node, reset the GPU, or replace it")
    if not (total.isdigit() and driver[:1].isdigit()):
        return Check(title, "sick", value, "the GPU does not answer: see dmesg for Xid, drain and reboot the node")
    if temperature.isdigit() and int(temperature) >= _HOT_CELSIUS:
        return Check(title, "warning", value, "it will slow down: check fans and air flow")
    if used.isdigit() and int(used) > _BUSY_MIB:
        return Check(title, "warning", value, "another process holds memory: nvidia-smi names it")
    return Check(title, "ok", value)
