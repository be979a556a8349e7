"""The console commands that `pip install` puts on the PATH (see setup.py).

Each loads its part of megacog only when it is called and turns user errors into one message and an
exit code. `launch/*.py` are the same commands for use from the repository.
"""

from __future__ import annotations

import os
import sys

from megacog.runtime.cli import run
from megacog.runtime.signals import StopFlag


def pretrain() -> None:
    """Exit with the code of `megacog.training.pretrain.main`, before native threads can abort a finished rank."""
    with StopFlag() as stop:  # already now: to import torch and DeepSpeed takes seconds
        from megacog.training.pretrain import main

        run(lambda: main(stop=stop), leave=os._exit)


def plan() -> None:
    """Exit with the code of `megacog.planning.main.main`, or of `megacog.training.memory_check.main` for `check`."""
    if sys.argv[1:2] == ["check"]:
        from megacog.training import memory_check

        run(lambda: memory_check.main(sys.argv[2:]))
    from megacog.planning.main import main

    run(main)


def prepare() -> None:
    """Exit with the code of `megacog.prepare.main.main`."""
    from megacog.prepare.main import main

    run(main)


def train_tokenizer() -> None:
    """Exit with the code of `megacog.prepare.train_tokenizer.main`."""
    from megacog.prepare.train_tokenizer import main

    run(main)


def infer() -> None:
    """Exit with the code of `megacog.generation.infer.main`."""
    from megacog.generation.infer import main

    run(main)


def evaluate() -> None:
    """Exit with the code of `megacog.evaluation.evaluate.main`."""
    from megacog.evaluation.evaluate import main

    run(main)


def convert() -> None:
    """Exit with the code of `megacog.interop.main.main`."""
    from megacog.interop.main import main

    run(main)


def doctor() -> None:
    """Exit with the code of `megacog.doctor.main.main`."""
    from megacog.doctor.main import main

    run(main)
