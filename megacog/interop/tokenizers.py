"""Whether tokenizers that go with imported weights fit their model."""

from __future__ import annotations

from pathlib import Path

from megacog.config.schema import ModelConfig
from megacog.errors import ConfigError, DataError
from megacog.runtime.log import get_logger
from megacog.tokenizers.frames import FrameTokenizer, load_frame_tokenizer
from megacog.tokenizers.icetk_vqvae import IcetkVqvae, IcetkVqvaeConfig
from megacog.tokenizers.text import TextTokenizer

_RELEASED_GRID = (20, 20)
"""Codes of a frame of the released models: 160 x 160 pixels at icetk's default rate."""
_RELEASED_RATE = IcetkVqvaeConfig().rate
_logger = get_logger(__name__)


class GivenTokenizers:
    """The tokenizers in two folders, loaded; either may be missing.

    Args:
        text, frames: The folders; None = there is none.

    Raises:
        DataError: A folder is missing, damaged or something else.
    """

    def __init__(self, text: Path | None, frames: Path | None) -> None:
        self._text_folder, self._frames_folder = text, frames
        if text is not None:
            _require_folder(text, "text")
        if frames is not None:
            _require_folder(frames, "frame")
        self._text: TextTokenizer | None = None if text is None else TextTokenizer.load(text)
        self._frames: FrameTokenizer | None = None if frames is None else load_frame_tokenizer(frames)

    def require(self, model: ModelConfig) -> None:
        """Raises:
        ConfigError: They do not fit a model.
        """
        if problems := self.problems(model):
            raise ConfigError("the tokenizers do not fit the model: " + "; ".join(problems))

    def problems(self, model: ModelConfig) -> list[str]:
        """A line for each thing in which they do not fit a model; a warning is logged for what is merely unusual."""
        found = []
        if self._text is not None:
            if self._text.vocab_size > model.text_vocab_size:
                found.append(
                    f"{self._text_folder} has {self._text.vocab_size} text pieces, the model's text_vocab_size is "
                    f"{model.text_vocab_size}"
                )
            if self._text.boi_id != model.boi_id:
                found.append(
                    f"{self._text_folder} has <start_of_image> as id {self._text.boi_id}, the model's boi_id is "
                    f"{model.boi_id}"
                )
        if self._frames is not None:
            if self._frames.codebook_size != model.image_vocab_size:
                found.append(
                    f"{self._frames_folder} has {self._frames.codebook_size} codes, the model's image_vocab_size is "
                    f"{model.image_vocab_size}"
                )
            self._warn_of_rate(self._frames, model)
        return found

    def _warn_of_rate(self, frames: FrameTokenizer, model: ModelConfig) -> None:
        rate = frames.downsample
        if isinstance(frames, IcetkVqvae) and model.grid == _RELEASED_GRID and rate != _RELEASED_RATE:
            height, width = (rate * side for side in model.grid)
            expected_height, expected_width = (_RELEASED_RATE * side for side in model.grid)
            _logger.warning(
                "%s is icetk's tokenizer of rate %d: clips will have %d x %d pixels, not %d x %d as CogVideo's; "
                "convert.py import-icetk-frames --rate %d makes that one",
                self._frames_folder, rate, width, height, expected_width, expected_height, _RELEASED_RATE,
            )  # fmt: skip


def _require_folder(path: Path, kind: str) -> None:
    if path.is_dir():
        return
    command = {"text": "import-icetk-text ice_text.model", "frame": "import-icetk-frames ice_image.pt"}[kind]
    found = "is a file" if path.exists() else "does not exist"
    raise DataError(
        f"--{kind}-tokenizer {path} {found}; run convert.py {command} --out FOLDER first and give its folder"
    )
