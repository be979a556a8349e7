"""ice_image.pt to a frame tokenizer folder."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_icetk import image_weights, small_config, small_vqvae

from megacog.errors import CheckpointError, EnvError
from megacog.interop.icetk_frames import import_icetk_frames
from megacog.interop.main import main
from megacog.tokenizers.frames import load_frame_tokenizer


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ice_image.pt"
    torch.save({"module": image_weights(), "iteration": 1}, path)
    return path


@pytest.mark.parametrize("rate", [4, 8, 16])
def test_a_rate_of_the_file_becomes_a_folder_that_codes_the_same(file: Path, tmp_path: Path, rate: int) -> None:
    import_icetk_frames(file, tmp_path / "frames", small_config(rate))
    loaded, expected = load_frame_tokenizer(tmp_path / "frames"), small_vqvae(rate)
    assert loaded.fingerprint == expected.fingerprint
    frames = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    codes = loaded.encode(frames)
    assert codes.shape == (1, 32 // rate, 32 // rate)
    assert torch.equal(codes, expected.encode(frames))


def test_half_precision_is_widened_without_change(file: Path, tmp_path: Path) -> None:
    half = {name: weight.half() for name, weight in image_weights().items()}
    torch.save({"module": half}, file)
    tokenizer = import_icetk_frames(file, tmp_path / "frames", small_config())
    for name, weight in tokenizer.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, half[name].float())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pack(path: Path) -> None:
    inner = path.rename(path.with_name("inner.pt"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "ice_image.pt")


def change(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        weights = image_weights()
        edit(weights)
        torch.save({"module": weights}, path)

    return apply


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "no such file.*icetk"),
        (truncate, "truncated"),
        (pack, "still packed.*ice_image.pt"),
        (lambda path: path.write_text("<html><body>login</body></html>"), "HTML page"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n"), "git-lfs pointer"),
        (lambda path: torch.save({"state_dict": image_weights()}, path), "no dict `module`.*state_dict"),
        (change(lambda w: w.pop("decs.1.up.0.block.0.conv1.bias")), r"lacks 1 .*decs.1.up.0.block.0.conv1.bias"),
        (change(lambda w: w.update({"enc.conv_in.bias": torch.ones(7)})), r"conv_in.bias is \[7\], expected \[32\]"),
        (change(lambda w: w["enc.conv_in.bias"].fill_(float("nan"))), "enc.conv_in.bias .* finite"),
    ],
    ids=["missing", "truncated", "packed", "html", "lfs", "other-key", "lacking", "shape", "nan"],
)
def test_bad_files_are_told_and_leave_no_folder(
    file: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(file)
    with pytest.raises(CheckpointError) as caught:
        import_icetk_frames(file, tmp_path / "frames", small_config())
    assert str(file) in str(caught.value) and re.search(said, str(caught.value), re.DOTALL)
    assert not (tmp_path / "frames").exists()


def test_what_the_other_rates_need_may_be_missing(file: Path, tmp_path: Path) -> None:
    weights = {name: weight for name, weight in image_weights().items() if not name.startswith("decs.0")}
    torch.save({"module": weights}, file)
    import_icetk_frames(file, tmp_path / "frames", small_config(8))
    with pytest.raises(CheckpointError, match="decs.0.conv_in.weight"):
        import_icetk_frames(file, tmp_path / "frames-16", small_config(16))


def test_an_existing_folder_is_replaced_only_when_asked(file: Path, tmp_path: Path) -> None:
    import_icetk_frames(file, tmp_path / "frames", small_config(4))
    with pytest.raises(EnvError, match="exists already"):
        import_icetk_frames(file, tmp_path / "frames", small_config(8))
    import_icetk_frames(file, tmp_path / "frames", small_config(8), replace=True)
    assert load_frame_tokenizer(tmp_path / "frames").downsample == 8


def test_the_command_expects_the_sizes_of_the_release(file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"quantize.embed.weight|enc.conv_in.weight is \[32, 3, 3, 3\], expected"):
        main(["import-icetk-frames", str(file), "--out", str(tmp_path / "frames")])
