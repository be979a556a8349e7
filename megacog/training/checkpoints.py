"""The checkpoints of a running loop: begun at a step, completed at a later one, and what happens when one fails."""

from __future__ import annotations

from collections.abc import Callable

from megacog.checkpoint.ownership import TakenOverError
from megacog.checkpoint.saver import Saved
from megacog.config.schema import CheckpointConfig
from megacog.errors import MegacogError
from megacog.metrics.record import Recorder
from megacog.runtime import outcome
from megacog.runtime.log import SHARED, get_logger
from megacog.training.state import RunState

log = get_logger(__name__)


class Checkpoints:
    """What the loop asks for. All methods are collective.

    Args:
        state: What is saved.
        config: Whether training goes on meanwhile, and after a failure.
        recorder: Gets a record of kind "checkpoint" for each.
    """

    def __init__(self, state: RunState, config: CheckpointConfig, recorder: Recorder) -> None:
        self.failures = 0
        """Checkpoints that could not be written."""
        self._state = state
        self._config = config
        self._recorder = recorder
        self.seconds: float | None = None
        """What the last one took, from its step to its name."""
        self._begun = 0
        """The step whose checkpoint was begun last."""

    @property
    def writing(self) -> bool:
        """Whether this rank still writes; when no rank does, all call `advance`. Not collective."""
        return self._state.writing

    def save(self, step: int, evaluation_loss: float | None) -> None:
        """Begin the checkpoint of a step; the one before is completed first, if it is not yet."""
        self.complete()
        self._begun = step
        self._attempt(step, lambda: self._state.start_save(step, evaluation_loss))
        if not self._config.asynchronous:
            self.complete()

    def save_last(self, step: int, evaluation_loss: float | None) -> None:
        """Write the checkpoint of the last step completely.

        Raises:
            MegacogError: It could not be written, whatever `checkpoint.on_error` says.
        """
        self.complete()
        self._tell(self._state.save(step, evaluation_loss))
        self._state.close()

    def advance(self) -> None:
        """Go on with the checkpoint that was begun, if one was, without waiting for files."""
        self._attempt(self._begun, lambda: self._tell(self._state.advance_save()))

    def complete(self) -> None:
        """Publish the checkpoint that was begun, if one was, waiting for its files."""
        self._attempt(self._begun, lambda: self._tell(self._state.finish_save()))

    def _attempt(self, step: int, action: Callable[[], None]) -> None:
        try:
            action()
        except TakenOverError:
            raise
        except MegacogError as error:  # the same on all ranks
            self.failures += 1
            self._recorder.write(step, "checkpoint", failures=self.failures, error=str(error))
            if self._config.on_error == "stop":
                raise
            log.error(
                "step %d | checkpoint %d of this run that failed: %s; training goes on without it, as "
                "checkpoint.on_error says", step, self.failures, error, extra=SHARED,
            )  # fmt: skip

    def _tell(self, saved: Saved | None) -> None:
        if saved is None:
            return
        outcome.reach(saved.path.name)
        self.seconds = saved.seconds
        speed = saved.bytes / saved.seconds
        log.info(
            "step %d | checkpoint complete: %.3g MB in %.3g s (%.3g MB/s), training stood still for %.3g s",
            saved.step, saved.bytes / 1e6, saved.seconds, speed / 1e6, saved.stall_seconds,
        )  # fmt: skip
        self._recorder.write(
            saved.step, "checkpoint", bytes=saved.bytes, seconds=saved.seconds, bytes_per_second=speed,
            stall_seconds=saved.stall_seconds, failures=self.failures,
        )  # fmt: skip
