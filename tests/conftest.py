"""What every test gets: one thread per process and an environment without leftovers."""

from __future__ import annotations

import os

# Before torch is imported anywhere: two cores are shared by several test processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton interprets the kernels. It looks at this when it is itself imported, by whichever test.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Test processes share the cores: how long an example takes says nothing about it.
settings.register_profile("shared cores", deadline=None)
settings.load_profile("shared cores")

# A forked child has the objects of its parent's threads without the threads: gloo's would wait for them for ever if the
# child collected them.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)

ROOT = Path(__file__).resolve().parent.parent
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _restore_rank_variables() -> Iterator[None]:
    """Undo what rank discovery set, so that no test inherits another one's ports, and what a stopped run ignores."""
    before = {name: os.environ.get(name) for name in _RANK_VARIABLES}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return ROOT
