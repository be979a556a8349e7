"""The frame of every command: user errors become one message and an exit code, never a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from megacog.errors import EXIT_DONE, EXIT_FAULT, EnvError, MegacogError
from megacog.runtime import outcome
from megacog.runtime.files import environment_error
from megacog.runtime.signals import EXIT_INTERRUPTED

_EXIT_BROKEN_PIPE = 141


def run(main: Callable[[], int | None], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Call `main` and leave the process with its exit code (None = 0).

    `leave` is called with the code that `main` returns. With os._exit nothing runs any more after `main`: for
    processes in which threads of native libraries may still be running, which now and then abort the process when
    the interpreter ends under them.

    A MegacogError prints `error: <message>` and uses its own code, and so does an OSError that a user can
    mend (no space, no permission, a file where a folder is needed, ...). Ctrl-C gives 130. Anything else
    is a bug and keeps its traceback.
    """
    outcome.note(None)
    try:
        code = main()
        sys.stdout.flush()
        with contextlib.suppress(OSError):  # a log on a full disk spoils nothing
            sys.stderr.flush()
    except BaseException as error:
        failed = explain(error)
        if not isinstance(error, SystemExit):
            outcome.note(EXIT_FAULT if failed is None else failed, f"{type(error).__name__}: {error}")
        if failed is None:
            raise
        sys.exit(failed)
    code = EXIT_DONE if code is None else code
    outcome.note(code)
    leave(code)

def explain(error: BaseException, who: str = "") -> int | None:
    """Tell the user what went wrong and return the exit code that says it too; None, and nothing told, for a bug.

    Args:
        error: What ended the command.
        who: Which of several processes this is, e.g. "rank 1 on node2: ".
    """
    if isinstance(error, MegacogError):
        if error.told:
            return error.exit_code
        _complain(f"error: {who}{error}")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        _complain(f"{who}interrupted")
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # The reader of our output (head, less) has gone; a second error at exit would only confuse.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    if isinstance(error, OSError) and (mendable := environment_error(error)) is not None:
        _complain(f"error: {who}{mendable}")
        return EnvError.exit_code
    return None

def _complain(message: str) -> None:
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
