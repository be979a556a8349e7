"""Log lines on stderr, from rank 0 only unless something is wrong."""

from __future__ import annotations

import logging
import sys

_ROOT = "megacog"


class _ProgressSafeHandler(logging.Handler):
    """Writes a line to the present sys.stderr without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if sys.stderr.isatty():
                from tqdm import tqdm

                tqdm.write(line, file=sys.stderr)
            else:
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
        except Exception:
            self.handleError(record)


SHARED = {"shared": True}
"""`log.warning(..., extra=SHARED)`: every rank would say the same, so rank 0 alone does."""


def setup(rank: int = 0) -> None:
    """Send log lines of megacog and its kernels to stderr: all from rank 0, warnings and errors from the others."""
    who = "" if rank == 0 else f" rank {rank}"
    line = f"%(asctime)s{who} %(levelname).1s %(message)s"
    for root in (_ROOT, "megacog_kernels"):
        logger = logging.getLogger(root)
        for old in [handler for handler in logger.handlers if isinstance(handler, _ProgressSafeHandler)]:
            logger.removeHandler(old)
        handler = _ProgressSafeHandler()
        if rank != 0:
            handler.addFilter(lambda record: not getattr(record, "shared", False))
        handler.setFormatter(logging.Formatter(line, datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; `name` is its `__name__`."""
    return logging.getLogger(name if name.split(".")[0] == _ROOT else f"{_ROOT}.{name}")
