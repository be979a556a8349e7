"""What README.md and docs/ say is true: commands run, options, keys, files and links exist.

A bash block of README.md says in its fence how it is run here, so that what the reader sees is what runs:

- `test=quickstart`: with --smoke, by `launch/test.sh --all`, as a part of its own;
- `test=collect`: as it stands, with --collect-only (the tests inside the tests would not end);
- `test=walkthrough`: all of them, in order, in one folder; only the sizes in SMALLER differ;
- `test=cluster` and `test=syntax`: `bash -n` only. There is no cluster here (tests of the launchers on one
  machine are in tests/distributed), and the blocks that need the full quickstart's model would take its time.

A YAML block with `file=PATH` is saved as that file before the walk-through starts.

The commands run in a copy of the working folder whose `launch/install.sh` does nothing: installing is tested by
tests/skeleton/test_install.py, and must not redirect the environment that the tests run in.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from megacog.config.describe import describe
from megacog.config.load import apply_overrides, load_config
from megacog.config.schema import Config, GenerationConfig, Section

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MODES = ("quickstart", "collect", "walkthrough", "cluster", "syntax")
GENERATED = "<!-- Below this line: `python -m megacog.config.describe`. -->\n"
SMALLER = (
    ("--clips 400", "--clips 24 --heldout-clips 4"),
    ("--steps 5000", "--steps 4 --width 8 --frames-per-video 4"),
    ("num_layers: 8", "num_layers: 2"),
    ("hidden_size: 512", "hidden_size: 32"),
    ("num_heads: 8", "num_heads: 2"),
    ("steps: 20000", "steps: 4"),
    ("global_batch_size: 64", "global_batch_size: 4"),
    ("micro_batch_size: 8", "micro_batch_size: 2"),
    ("checkpoint: {every: 1000}", "checkpoint: {every: 2}"),
    ("samples: {every: 1000", "samples: {every: 4"),
)
"""Sizes only: what stands in the README, and what the test puts in its place. Each must occur."""
WITH_SUBCOMMANDS = ("prepare.py", "train_tokenizer.py", "prove.py", "benchmark.py", "convert.py")
FOREIGN = {"deepspeed": "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}
FILE_SUFFIXES = ("jsonl", "json", "safetensors", "yaml", "py", "md", "png", "model", "h5")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, `key=value` words after it, its text."""

    language: str
    words: dict[str, str]
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)([^\n]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    pairs = [dict(word.split("=", 1) for word in words.split()) for _, words, _ in found]
    return [Block(language, words, text) for (language, _, text), words in zip(found, pairs, strict=True)]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def bash_commands(text: str) -> Iterator[list[str]]:
    """The words of every command of a block, comments dropped and lines that end in a backslash joined."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((index for index, word in enumerate(words) if word in ("&&", "|", ">", ">>")), len(words))
            command, words = words[:end], words[end + 1 :]
            if "launch/submit.py" in command and "--" in command:  # the rest goes to the program of its kind
                mark = command.index("--")
                yield ["python", f"launch/{command[command.index('--kind') + 1]}.py", *command[mark + 1 :]]
                command = command[:mark]
            yield command


def all_commands() -> list[tuple[Path, list[str]]]:
    """(page, words) of every command that a page shows, in bash blocks and in inline code."""
    found = []
    for page in PAGES:
        texts = [block.text for block in blocks(page) if block.language == "bash"]
        texts += [code for code in inline_code(page) if re.match(r"(bash|python|deepspeed|torchrun) ", code)]
        found += [(page, words) for text in texts for words in bash_commands(text) if words]
    return found


@cache
def help_text(script: str, subcommand: str = "") -> str:
    """What a launch script says with --help; a shell script's own text."""
    path = ROOT / "launch" / script
    if script == "infer.sh":
        path = path.with_suffix(".py")
    elif path.suffix == ".sh":
        return path.read_text(encoding="utf-8")
    output = io.StringIO()
    arguments = [str(path), *([subcommand] if subcommand else []), "--help"]
    with patch.object(sys, "argv", arguments), contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    return output.getvalue()


def options_of(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]


def key_values(words: list[str]) -> list[str]:
    return [word for word in words if re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", word)]


def script_of(words: list[str]) -> tuple[str, int] | None:
    """The launch script that a command runs and its place among the words."""
    return next(((word[7:], index) for index, word in enumerate(words) if word.startswith("launch/")), None)


@cache
def known_keys() -> frozenset[str]:
    """Dotted names of all sections and settings."""

    def walk(section: type[Section], path: str) -> Iterator[str]:
        for name, info in section.model_fields.items():
            yield f"{path}{name}"
            for part in (info.annotation, *getattr(info.annotation, "__args__", ())):
                if isinstance(part, type) and issubclass(part, Section):
                    yield from walk(part, f"{path}{name}.")

    return frozenset(walk(Config, ""))


def readme_config(folder: Path) -> Path:
    """The README's own configuration, saved in `folder`."""
    (block,) = (block for block in blocks(README) if "file" in block.words)
    path = folder / "config.yaml"
    path.write_text(block.text, encoding="utf-8")
    return path


def test_every_bash_block_of_the_readme_says_how_it_is_run() -> None:
    bash = [block for block in blocks(README) if block.language == "bash"]
    assert {block.words.get("test") for block in bash} == set(MODES)


def test_every_bash_block_is_bash() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "bash":
                result = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
                assert result.returncode == 0, f"{page.name}: {result.stderr}\n{block.text}"


def test_every_option_of_a_shown_command_exists() -> None:
    checked = 0
    for page, words in all_commands():
        script = script_of(words)
        if script is None:
            continue
        name, place = script
        own = words[place + 1 :]
        subcommand = own[0] if name in WITH_SUBCOMMANDS and own and not own[0].startswith("-") else ""
        known = help_text(name, subcommand)
        for option in options_of(own):
            assert re.search(rf"{option}\b", known), f"{page.name}: {name} {subcommand} has no option {option}"
            checked += 1
        foreign = FOREIGN.get(words[0])
        if foreign is not None:
            spec = find_spec(foreign)
            assert spec is not None and spec.origin is not None
            source = Path(spec.origin).read_text(encoding="utf-8")
            for option in options_of(words[1:place]):
                assert f'"{option}"' in source, f"{page.name}: {words[0]} has no option {option}"
    assert checked > 15


def test_every_option_named_in_the_text_exists() -> None:
    scripts = [path.name for path in sorted((ROOT / "launch").glob("*.sh")) if path.name != "environment.sh"]
    texts = [help_text(name) for name in (*scripts, "pretrain.py", "evaluate.py", "submit.py", "supervise.py")]
    preparing = ("run", "records", "merge", "plan", "inspect", "verify", "digits")
    texts += [help_text("prepare.py", name) for name in preparing]
    texts += [help_text("train_tokenizer.py", name) for name in ("frames", "text", "show")]
    texts += [help_text("benchmark.py", name) for name in ("import", "generate", "train", "checkpoint", "prepare")]
    texts += [help_text("plan.py"), help_text("plan.py", "check"), help_text("doctor.py")]
    weights = ("verify", "import-sat", "add-tokenizers", "export-sat", "export-safetensors", "parity", "parity-file")
    texts += [help_text("convert.py", name) for name in (*weights, "import-icetk-text", "import-icetk-frames")]
    texts += [help_text("prove.py", name) for name in re.findall(r"\{([\w,]+)\}", help_text("prove.py"))[0].split(",")]
    tools = (ROOT / "kernels" / "benchmarks").glob("*.py")
    tools = (*tools, ROOT / "megacog" / "training" / "fault_times.py")
    texts += [path.read_text(encoding="utf-8") for path in tools]
    foreign = ["--num_accelerators", "--gpus-per-node", "--logdir"]  # of deepspeed, srun and tensorboard
    foreign += ["--shutdown-timeout", "--signals-to-handle", "--signal", "-TERM", "-f"]  # of torchrun, scancel, pkill
    foreign += ["--nodes", "--ntasks-per-node", "--container-image", "--mpi"]  # of srun
    foreign += ["--map-by", "--bind-to", "-x"]  # of mpirun
    foreign += ["--launcher", "--hostfile", "-l"]  # of deepspeed and ulimit
    known = "\n".join([*texts, *foreign])
    for page in PAGES:
        for code in inline_code(page):
            for option in options_of(code.split()):
                assert re.search(rf"{option}\b", known), f"{page.name}: no command has an option {option}"


def test_every_setting_of_a_shown_command_is_valid(tmp_path: Path) -> None:
    config = readme_config(tmp_path)
    checked = 0
    for _, words in all_commands():
        script = script_of(words)
        if script is None or not (overrides := key_values(words[script[1] + 1 :])):
            continue
        if script[0] in ("pretrain.py", "convert.py", "submit.py"):
            shown = Path(words[words.index("--config") + 1])
            load_config(ROOT / shown if (ROOT / shown).is_file() else config, overrides)
        else:
            apply_overrides(GenerationConfig(), overrides, "generation")
        checked += 1
    assert checked >= 4


def test_every_configuration_key_in_the_text_exists() -> None:
    for page in PAGES:
        for code in inline_code(page):
            name = re.split(r"[=:]", code)[0].strip().removesuffix("[]")
            dotted = re.fullmatch(r"(\w+)(\.\w+)+", name)
            if dotted is None or dotted[1] not in Config.model_fields or name.rsplit(".", 1)[1] in FILE_SUFFIXES:
                continue
            if dotted[1] != "deepspeed":
                assert name in known_keys(), f"{page.name}: there is no setting {name}"


def test_every_yaml_block_holds_known_keys() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "yaml":
                for section, values in yaml.safe_load(block.text).items():
                    for key in values:
                        assert f"{section}.{key}" in known_keys() or section == "deepspeed", (
                            f"{page.name}: there is no setting {section}.{key}"
                        )


def test_every_json_line_is_json() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "json":
                for line in block.text.splitlines():
                    assert json.loads(line), page.name


def test_every_file_named_in_the_text_exists() -> None:
    written = {block.words["file"] for block in blocks(README) if "file" in block.words}
    places = ("launch/", "configs/", "megacog/", "kernels/", "tests/", "docs/")
    for page in PAGES:
        words = {word for code in inline_code(page) for word in code.split()}
        words |= {word for block in blocks(page) if block.language == "bash" for word in block.text.split()}
        for word in sorted(words):
            if word.startswith(places) and word not in written and "*" not in word:
                assert (ROOT / word).exists(), f"{page.name} names {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), f"{page.name} links to {target}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
                anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
                assert anchor in anchors, f"{page.name} links to {target}"


CAPITALS = re.compile(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b")


def placeholders(text: str) -> list[str]:
    """Returns words that wait to be replaced: TODO and its like, and names in capitals that no program knows."""
    todo = re.findall(r"\b(?:TODO|TBD|XXX+|FIXME)\b|\?\?\?", text)
    return [*todo, *sorted(set(CAPITALS.findall(text)) - capital_names())]


@cache
def capital_names() -> set[str]:
    """Returns the names in capitals of all programs and scripts: environment variables and constants."""
    roots = [ROOT / name for name in ("megacog", "kernels", "launch", ".ci", "Dockerfile", "setup.py")]
    files = [path for root in roots for path in (root, *root.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    return {name for path in files for name in CAPITALS.findall(path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    assert placeholders(page.read_text(encoding="utf-8")) == []


def test_placeholders_are_told_from_names_that_programs_know() -> None:
    text = "It takes QUICKSTART_MINUTES minutes (TBD) with TORCH_INDEX_URL set. TODO: a picture"
    assert placeholders(text) == ["TBD", "TODO", "QUICKSTART_MINUTES"]


def test_the_configuration_reference_is_up_to_date() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text.partition(GENERATED)[2] == describe(), (
        "docs/configuration.md is out of date: replace what follows its marker by the output of "
        "`python -m megacog.config.describe`"
    )


def test_the_reference_names_every_setting_once() -> None:
    named: list[str] = []
    for part in describe().split("## ")[1:]:
        section = re.match(r"`(.+)`", part)
        prefix = f"{section[1].removesuffix('[]')}." if section else ""
        named += [f"{prefix}{key}" for key in re.findall(r"^\| `(\w+)` \|", part, re.M)]
    sections = {key.rpartition(".")[0] for key in known_keys()}
    assert sorted(named) == sorted(known_keys() - sections)


@pytest.fixture
def working_copy(tmp_path: Path) -> Path:
    """A folder like a clone's root, whose launch/install.sh does nothing."""
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("megacog", "kernels", "tests", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "launch" / "install.sh").write_text("exit 0\n", encoding="utf-8")
    return tmp_path


def run_in(folder: Path, script: str, timeout: float) -> str:
    """Output of a bash script that must succeed; what this test process's Python offers comes first on the PATH."""
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    assert result.returncode == 0, f"{script}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout + result.stderr


def of_mode(mode: str) -> list[Block]:
    return [block for block in blocks(README) if block.language == "bash" and block.words["test"] == mode]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_test_command_lists_the_tests(working_copy: Path) -> None:
    (block,) = of_mode("collect")
    output = run_in(working_copy, f"{block.text.strip()} --collect-only", 280)
    assert "test_the_test_command_lists_the_tests" not in output, "slow tests are left out"
    assert "tests/cli/test_readme.py" in output


def test_the_quickstart_runs_with_the_slow_tests() -> None:
    """`launch/test.sh --all` runs the block as a part of its own, with --smoke, alone on the machine."""
    (block,) = of_mode("quickstart")
    test_script = (README.parent / "launch/test.sh").read_text(encoding="utf-8")
    assert f"{block.text.strip()} --smoke" in test_script


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_the_walk_through_ends_with_clips(working_copy: Path) -> None:
    readme = README.read_text(encoding="utf-8")
    for shown, _ in SMALLER:
        assert shown in readme, f"{shown} is not in the README any more; correct SMALLER"

    def smaller(text: str) -> str:
        for shown, small in SMALLER:
            text = text.replace(shown, small)
        return text

    (config,) = (block for block in blocks(README) if "file" in block.words)
    (working_copy / config.words["file"]).write_text(smaller(config.text), encoding="utf-8")
    for block in of_mode("walkthrough"):
        run_in(working_copy, "source launch/environment.sh\n" + smaller(block.text), 600)

    run = working_copy / "runs" / "my-sequential"
    for name in re.findall(r"^\| `(.+?)`", prose(README), re.M):
        name = name.replace("step-0001000", "step-0000004")
        assert (run / name).exists(), f"the README says that a run leaves {name}"
    results = [json.loads(line) for line in (working_copy / "out/first/results.jsonl").read_text().splitlines()]
    assert [(line["frames"], line["seed"]) for line in results] == [(33, 1234), (49, 7)]
    assert all((working_copy / path).stat().st_size > 0 for line in results for path in line["paths"].values())
    assert (working_copy / "shards" / "sheet.png").is_file()
