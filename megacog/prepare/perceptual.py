"""Perceptual distance of images over VGG16 features (LPIPS, Zhang et al. 2018), from weights the user brings.

Expected names: torchvision's `features.{0,2,5,...,28}.{weight,bias}` of VGG16 and LPIPS' `lin{0..4}.model.1.weight`.

Dimensions: B images, C channels, H/W pixels.
"""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacog.errors import DataError

# (index in torchvision's VGG16, input channels, output channels) of the convolutions, by block; features are
# taken at the end of each block, a 2x2 max pool leads into the next one.
_BLOCKS: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
# Mean and scale of pixels in -1..1 that LPIPS was fitted with.
_MEAN = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor that a weights file must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number, block in enumerate(_BLOCKS):
        for index, inputs, outputs in block:
            shapes[f"features.{index}.weight"] = (outputs, inputs, 3, 3)
            shapes[f"features.{index}.bias"] = (outputs,)
        shapes[f"lin{number}.model.1.weight"] = (1, block[-1][2], 1, 1)
    return shapes


class PerceptualLoss(nn.Module):
    """Frozen; the mean LPIPS distance of two batches of images in -1..1."""

    _mean: Tensor
    _scale: Tensor

    def __init__(self, weights: dict[str, Tensor]) -> None:
        """Takes tensors of `expected_shapes`."""
        super().__init__()
        for name in expected_shapes():
            self.register_buffer(name.replace(".", "_"), weights[name].to(torch.float32), persistent=False)
        self.register_buffer("_mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def load(cls, path: Path) -> PerceptualLoss:
        """Returns the loss with the weights of a safetensors file.

        Raises:
            DataError: the file is missing, damaged, or holds other tensors.
        """
        try:
            weights = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(f"{path}: perceptual weights cannot be read ({error})") from error
        expected = expected_shapes()
        wrong = [f"{name} is missing" for name in expected if name not in weights]
        wrong += [
            f"{name} is {list(weights[name].shape)}, not {list(shape)}"
            for name, shape in expected.items()
            if name in weights and tuple(weights[name].shape) != shape
        ]
        if wrong:
            raise DataError(
                f"{path}: not VGG16 features with LPIPS layers ({len(wrong)} of {len(expected)} tensors wrong: "
                f"{'; '.join(wrong[:3])}); it must hold torchvision's features.N.weight/bias and lin0..4.model.1.weight"
            )
        return cls(weights)

    def forward(self, output_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """Returns the scalar mean distance; gradients flow to the output only."""
        with torch.no_grad():
            targets = self._features(target_BCHW)
        total = output_BCHW.new_zeros(())
        for number, (ours, theirs) in enumerate(zip(self._features(output_BCHW), targets, strict=True)):
            weight = self.get_buffer(f"lin{number}_model_1_weight")
            total = total + F.conv2d((ours - theirs).square(), weight).mean()
        return total

    def _features(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Returns the features of each block, scaled to unit length over channels."""
        x_BCHW = (pixels_BCHW - self._mean) / self._scale
        features = []
        for number, block in enumerate(_BLOCKS):
            if number:
                x_BCHW = F.max_pool2d(x_BCHW, 2)
            for index, _, _ in block:
                weight = self.get_buffer(f"features_{index}_weight")
                x_BCHW = F.relu(F.conv2d(x_BCHW, weight, self.get_buffer(f"features_{index}_bias"), padding=1))
            features.append(x_BCHW / (x_BCHW.square().sum(1, keepdim=True) + 1e-10).sqrt())
        return features
