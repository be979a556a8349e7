"""`convert.py import-icetk-frames`: icetk's image tokenizer `ice_image.pt` to a frame tokenizer folder."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from megacog.errors import CheckpointError
from megacog.interop.torch_files import open_torch_file, require_tensors
from megacog.runtime.files import atomic_directory
from megacog.tokenizers.frames import KIND, write_frame_tokenizer
from megacog.tokenizers.icetk_vqvae import IcetkVqvae, IcetkVqvaeConfig

WHERE = (
    "ice_image.pt belongs to icetk, the tokenizer of CogView2 and CogVideo: icetk downloads it to "
    "~/.icetk_models/ice_image.pt when it first codes an image; https://github.com/THUDM/icetk has the link "
    "(icetk/utils.py)."
)
DEFAULT = IcetkVqvaeConfig()


def import_icetk_frames(
    path: Path, out: Path, config: IcetkVqvaeConfig = DEFAULT, *, replace: bool = False
) -> IcetkVqvae:
    """Returns the frame tokenizer of one rate after writing it to the folder `out` (atomically), in float32.

    Args:
        path: `ice_image.pt`.
        out: folder to make.
        config: rate; the other values are the release's unless the file is of another size.
        replace: overwrite an existing frame tokenizer.

    Raises:
        CheckpointError: the file is missing, damaged, something else, or lacks what the rate needs.
        EnvError: `out` exists, or the disk is full.
    """
    path = Path(path)
    weights = _weights(path)
    with torch.device("meta"):
        tokenizer = IcetkVqvae(config)
    expected = {name: tuple(weight.shape) for name, weight in tokenizer.state_dict().items()}
    require_tensors(path, weights, expected)
    tokenizer.load_state_dict({name: _float32(path, name, weights[name]) for name in expected}, assign=True)
    with atomic_directory(out, KIND if replace else None) as folder:
        write_frame_tokenizer(folder, tokenizer)
    return tokenizer.eval().requires_grad_(False)


def _weights(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file. {WHERE}")
    stored = open_torch_file(path)
    weights = stored.get("module")
    if not isinstance(weights, dict):
        keys = ", ".join(sorted(stored)[:8])
        raise CheckpointError(f"{path} has no dict `module` of weights, only {keys}. {WHERE}")
    return weights


def _float32(path: Path, name: str, weight: Tensor) -> Tensor:
    """Raises: CheckpointError: not floating point, or not finite."""
    if not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
        raise CheckpointError(
            f"{path}: {name} ({weight.dtype}) must hold finite floating-point numbers. Download the file again."
        )
    return weight.to(torch.float32).contiguous()


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the sub-command."""
    parser = commands.add_parser(
        "import-icetk-frames",
        help="icetk's image tokenizer -> frame tokenizer folder",
        description=f"Make a frame tokenizer folder from icetk's image tokenizer. {WHERE}",
    )
    parser.add_argument("file", type=Path, help="ice_image.pt")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to make")
    parser.add_argument(
        "--rate",
        type=int,
        choices=(4, 8, 16),
        default=DEFAULT.rate,
        help="pixels per code along each axis (default: %(default)s, CogVideo's)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing frame tokenizer")
    parser.set_defaults(command=_command)


def _command(options: argparse.Namespace) -> int:
    tokenizer = import_icetk_frames(
        options.file, options.out, IcetkVqvaeConfig(rate=options.rate), replace=options.force
    )
    parameters = sum(weight.numel() for weight in tokenizer.parameters())
    print(
        f"frame tokenizer in {options.out}: {tokenizer.downsample} x {tokenizer.downsample} pixels per code, "
        f"{tokenizer.codebook_size} codes, {parameters / 1e6:.1f} M parameters, "
        f"fingerprint {tokenizer.fingerprint[:16]}"
    )
    return 0
