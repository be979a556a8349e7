"""A real SLURM cluster of several nodes on this machine: own configuration, ports, keys and names.

Every node is a slurmd of its own. A node dies when its slurmd, its slurmstepds and their tasks die; killing slurmd
alone leaves the tasks running. Two settings make a requeued job start again after seconds instead of two minutes.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from run_ranks import python_environment

from megacog.runtime.ranks import free_port

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
_HOSTS = Path("/etc/hosts")
_CONFIGURATION = """\
ClusterName=megacogtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=2
SlurmdTimeout=15
InactiveLimit=0
KillWait=5
MpiDefault=none
PropagateResourceLimits=NONE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


class SlurmCluster:
    """Context manager: up when entered, and nothing of it is left when it ends.

    Args:
        names: Of the nodes; by default two that no other cluster on this machine has.
    """

    def __init__(self, *names: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)  # munged wants its socket within reach of all
        self.nodes = list(names) or [f"megacog{os.getpid()}n{number}" for number in (1, 2)]
        self._ports = [free_port() for _ in self.nodes]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """For commands that use this cluster."""
        return python_environment() | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kill([pid for pid, _ in self.processes()])
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        self._kill([pid for pid, _ in self.processes()])
        lines = _HOSTS.read_text().splitlines(keepends=True)
        _HOSTS.write_text("".join(line for line in lines if not set(self.nodes) & set(line.split())))
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, timeout: float = 60) -> str:
        """Output of a command of this cluster, which must succeed."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, cwd=self.folder
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, ExitCode, Restarts, ..."""
        words = self.run("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, what: str, condition: Callable[[], object], seconds: float) -> None:
        """Wait until `condition` holds; fail with the daemons' logs when it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"after {seconds} s still no {what}\n{self.logs()}"
            time.sleep(0.2)

    def processes(self, node: str | None = None) -> Iterator[tuple[int, str]]:
        """Process ids and names of tasks, batch scripts and slurmstepds, of one node or of all."""
        wanted = [node] if node else self.nodes
        marks = [f"SLURMD_NODENAME={name}\0".encode() for name in wanted]
        parents = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = (entry / "environ").read_bytes() + b"\0"
                    if any(mark in environment for mark in marks):
                        parents.add(int((entry / "stat").read_text().rpartition(")")[2].split()[1]))
                        yield int(entry.name), (entry / "comm").read_text().strip()
                except OSError:  # gone meanwhile
                    continue
        for pid in parents:
            try:
                name = Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                continue
            if name == "slurmstepd":
                yield pid, name

    def kill_node(self, node: str) -> None:
        """As when the power fails: nothing of the node is left, and nobody is told."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        self._kill([pid for pid, _ in self.processes(node)])

    def start_node(self, node: str, *limits: str) -> None:
        """Start a node whose tasks have these limits, as options of prlimit."""
        self._daemons[node] = self._daemon(node, "prlimit", "--nofile=4096:4096", *limits, "slurmd", "-D", "-N", node)

    def logs(self) -> str:
        """The last lines of SLURM's daemons."""
        files = [self.folder / f"{name}.log" for name in ("slurmctld", *self.nodes)]
        tails = [(file.name, file.read_text().splitlines(True)[-20:]) for file in files if file.exists()]
        return "".join(f"== {name}\n{''.join(lines)}" for name, lines in tails)

    def _start(self) -> None:
        folder = self.folder
        host = socket.gethostname().partition(".")[0]
        places = zip(self.nodes, self._ports, strict=True)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            "CPUs=2 CoresPerSocket=2 RealMemory=4000 State=UNKNOWN"
            for name, port in places
        )
        (folder / "slurm.conf").write_text(
            _CONFIGURATION.format(folder=folder, host=host, control_port=free_port(), nodes=nodes)
        )
        (folder / "state").mkdir()
        for name in self.nodes:
            (folder / f"spool-{name}").mkdir()
        with open(_HOSTS, "a") as hosts:
            hosts.writelines(f"127.0.0.1 {name}\n" for name in self.nodes)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._daemons["munged"] = self._daemon(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed", "--num-threads=2",
        )  # fmt: skip
        self.wait_for("munge socket", (folder / "munge.socket").exists, 20)
        self._daemons["slurmctld"] = self._daemon("slurmctld", "slurmctld", "-D", "-i")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for("idle nodes", lambda: self.idle_nodes() == len(self.nodes), 60)

    def idle_nodes(self) -> int:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%T"], env=self.environment, capture_output=True, text=True, timeout=60
        )
        return done.stdout.split().count("idle")

    def _daemon(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{name}.log", "ab") as log:
            # However this process ends, its daemons end with it.
            command = ("setpriv", "--pdeathsig", "KILL", *command)
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    @staticmethod
    def _kill(pids: list[int]) -> None:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
