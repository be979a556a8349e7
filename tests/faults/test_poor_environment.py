"""Machines and folders that lack something: the commands work all the same, or say what is missing."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import poor_machine
import pytest
from command_line import Command, TrainingArguments, assert_tells, files, nothing_changes, prepare_arguments
from tiny_run import settings, write_config

Figure = Callable[[str], None]
Run = Callable[..., subprocess.CompletedProcess[str]]
TOOLS = ("bash", "dirname")
"""All that launch/infer.sh needs on the PATH beside python."""


@pytest.fixture
def poor(repository: Path, tmp_path: Path) -> Run:
    """Runs a command without HOME, network, compiler, ninja, user name, optional packages or room in /dev/shm."""
    isolate = ["unshare", "--net", "--mount"]
    allowed = shutil.which("unshare") and subprocess.run([*isolate, "true"], capture_output=True, check=False)
    if not allowed or allowed.returncode != 0:
        pytest.skip("NOT CHECKED: unshare needs root (and a container that allows it)")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    # A link to the interpreter would lose its virtual environment.
    (tools / "python").write_text(f'#!{tools / "bash"}\nexec {sys.executable} "$@"\n')
    (tools / "python").chmod(0o755)
    paths = [poor_machine.hide_packages(tmp_path / "hide"), repository, repository / "kernels"]
    environment = {"PATH": str(tools), "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    start = [shutil.which("unshare"), "--net", "--mount", sys.executable, str(repository / "tests/poor_machine.py")]

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [*start, *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def test_the_hidden_packages_are_hidden(poor: Run) -> None:
    lines = [f"assert importlib.util.find_spec({name!r}) is None, {name!r}" for name in poor_machine.ABSENT]
    lines += ["assert importlib.util.find_spec('torch')", "assert os.getuid() == 54321 and 'HOME' not in os.environ"]
    lines += ["import shutil; assert not any(map(shutil.which, ('gcc', 'cc', 'g++', 'nvcc', 'ninja', 'mpirun')))"]
    result = poor("python", "-c", "import importlib.util, os\n" + "\n".join(lines))
    assert result.returncode == 0, result.stderr


def test_a_poor_machine_prepares_trains_and_generates(
    poor: Run, world: Path, repository: Path, tmp_path: Path, figure: Figure
) -> None:
    prepare = prepare_arguments(world, world / "videos/captions.csv", tmp_path / "made/clips")
    prepared = poor("python", repository / "launch/prepare.py", *prepare)
    assert prepared.returncode == 0, prepared.stderr
    values = settings(world / "inputs", tmp_path / "run", "base", steps=2, eval_every=0)
    values["data"]["workers"] = 2
    config = write_config(tmp_path / "config.yaml", values)
    trained = poor("python", repository / "launch/pretrain.py", "--config", config)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run/export/manifest.json").is_file() and "engine deepspeed" in trained.stderr
    # The shell script, and names that a careless one would run.
    prompts, out = tmp_path / "$(touch canary) `touch canary`.txt", tmp_path / "; touch canary; out"
    prompts.write_text("$(touch canary)\n")
    made = ("--model", world / "made/export", "--out", out, "levels=0", "--scale", "8")
    generated = poor("bash", repository / "launch/infer.sh", prompts, *made)
    assert generated.returncode == 0, generated.stderr
    assert len(list(out.glob("*.mp4"))) == 1 and not list(tmp_path.rglob("canary"))
    figure(
        "no HOME, network, user name, compiler, ninja, optional packages; 64 KiB shm, 64 open files: prepare, pretrain "
        "(DeepSpeed, 2 loader processes) and infer.sh all work"
    )


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system that cannot be written."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("NOT CHECKED: mounting a read-only file system needs root (and a container that allows it)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_an_output_folder_that_cannot_be_written_is_named_before_anything_is_made(
    command: Command, training: TrainingArguments, world: Path, tmp_path: Path, read_only: Path, figure: Figure
) -> None:
    export, captions = world / "made/export", world / "videos/captions.csv"
    (tmp_path / "prompts.txt").write_text("the digit 3 moves left\n")
    commands = [
        ("pretrain", *training(), f"train.run_dir={read_only / 'run'}"),
        ("prepare", *prepare_arguments(world, captions, read_only / "made/clips")),
        ("train_tokenizer", "text", captions, "--out", read_only / "text", "--vocab-size", 60),
        ("train_tokenizer", "frames", world / "videos/good.mp4", "--out", read_only / "frames", "--steps", 1),
        ("infer", tmp_path / "prompts.txt", "--model", export, "--out", read_only / "out", "levels=0"),
        ("convert", "export-safetensors", export, "--stage", "sequential", "--out", read_only / "sat"),
    ]
    for name, *arguments in commands:
        with nothing_changes(tmp_path):
            outcome = command(name, *arguments)
        assert outcome.code == 1
        assert_tells(outcome.message, f"{read_only}.*[Rr]ead-only")
    figure(f"read-only output folder: refused with a clear error {len(commands)} of {len(commands)}")


def test_a_rendezvous_port_in_use_is_named(
    command: Command, training: TrainingArguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ranks = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        for name, value in ({"MASTER_ADDR": "127.0.0.1"} | ranks).items():
            monkeypatch.setenv(name, str(value))
        outcome = command("pretrain", *training())
    assert outcome.code == 1
    assert_tells(outcome.message, f"127.0.0.1:{port}.*in use.*MASTER_PORT")
    assert "run" not in files(tmp_path)
