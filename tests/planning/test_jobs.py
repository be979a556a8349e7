"""Job scripts: templates that are valid as they are, and what a configuration makes of them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacog.errors import ConfigError, EnvError
from megacog.planning.jobs import KINDS, fill, main

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "launch/slurm"
CLUSTER = [
    "cluster.nodes=13", "cluster.gpus_per_node=8", "train.global_batch_size=104", "train.micro_batch_size=1"
]  # fmt: skip
CONTAINER = 'cluster.container={runtime: pyxis, image: "my image.sqsh", mounts: ["/data:/data"]}'


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Lines of the script that --dry-run shows."""
    assert main(TEMPLATES, ["--config", str(ROOT / "configs/digits.yaml"), "--dry-run", *CLUSTER, *words]) == 0
    return capsys.readouterr().out.splitlines()


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as info:
        main(TEMPLATES, ["--config", str(ROOT / "configs/digits.yaml"), "--dry-run", *words])
    return str(info.value)


def test_every_kind_has_a_template_that_bash_can_read() -> None:
    assert {path.stem for path in TEMPLATES.glob("*.sbatch")} == set(KINDS)
    for path in [*TEMPLATES.iterdir(), ROOT / "launch/cluster_environment.sh"]:
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_a_run_on_thirteen_nodes_asks_for_them(capsys: pytest.CaptureFixture[str]) -> None:
    script = shown(
        capsys, "cluster.partition=h100", "cluster.account=video", "cluster.time=2-00:00:00",
        "cluster.save_seconds=600", "cluster.options={qos: high, exclusive: user}",
    )  # fmt: skip
    header = [line for line in script if line.startswith("#SBATCH")]
    assert header == [
        "#SBATCH --job-name=pretrain-base", "#SBATCH --nodes=13", "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8", "#SBATCH --exclusive=user", "#SBATCH --time=2-00:00:00",
        "#SBATCH --output=runs/quickstart/base/slurm/%x-%j.out", "#SBATCH --open-mode=append", "#SBATCH --requeue",
        "#SBATCH --signal=USR1@600", "#SBATCH --partition=h100", "#SBATCH --account=video", "#SBATCH --qos=high",
    ]  # fmt: skip
    assert {f"repository={ROOT}", "run_dir=runs/quickstart/base", "nodes=13"} <= set(script)
    assert {"#SBATCH --nodes=14", "nodes=13"} <= set(shown(capsys, "cluster.spare_nodes=1"))


@pytest.mark.parametrize("value", ["null", "''", ""])
def test_an_option_of_sbatch_may_have_no_value(capsys: pytest.CaptureFixture[str], value: str) -> None:
    script = shown(capsys, f"cluster.options={{contiguous: {value}, exclusive: {value}}}")
    assert script.count("#SBATCH --contiguous") == script.count("#SBATCH --exclusive") == 1


def test_all_but_header_and_variables_is_the_template(capsys: pytest.CaptureFixture[str]) -> None:
    def body(lines: list[str]) -> list[str]:
        filled = ("#SBATCH", "repository=", "run_dir=", "nodes=", "arguments=")
        return [line for line in lines if not line.startswith(filled)]

    for kind in ("pretrain", "pretrain_array"):
        assert body(shown(capsys, "--kind", kind)) == body((TEMPLATES / f"{kind}.sbatch").read_text().splitlines())


def test_a_run_without_gpus_asks_for_none(capsys: pytest.CaptureFixture[str]) -> None:
    script = shown(capsys, "cluster.gpus_per_node=0", "cluster.ranks_per_node=2")
    assert "#SBATCH --ntasks-per-node=2" in script and not any("--gpus" in line for line in script)


def test_a_container_is_chosen_by_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    script = shown(capsys, CONTAINER)
    assert {"runtime=pyxis", "image='my image.sqsh'", "mounts=(/data:/data)"} <= set(script)
    assert "#SBATCH --nodes=13" in script
    assert "set cluster.container=null" in refusal(*CLUSTER, CONTAINER, "--kind", "pretrain_array")
    assert "needs cluster.container" in refusal(*CLUSTER, "--kind", "pretrain_container")


def test_a_chain_is_an_array_that_runs_one_job_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    script = shown(capsys, "--kind", "pretrain_array", "--jobs", "4")
    assert {"#SBATCH --array=1-4%1", "#SBATCH --no-requeue"} <= set(script)


def test_preparation_and_generation_take_the_words_of_their_programs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "a b.csv", "--out", "shards/x"]
    script = shown(capsys, "cluster.gpus_per_node=0", "--kind", "prepare", "--", *words)
    assert "arguments=(run 'a b.csv' --out shards/x)" in script
    assert {"#SBATCH --nodes=13", "#SBATCH --signal=B:USR1@300"} <= set(script)
    script = shown(capsys, "--kind", "infer", "--", "prompts.txt", "guidance=2")
    assert {"#SBATCH --nodes=1", "#SBATCH --gpus-per-node=1", "arguments=(prompts.txt guidance=2)"} <= set(script)
    assert "needs the words of launch/infer.py" in refusal(*CLUSTER, "--kind", "infer")
    assert "takes key=value only" in refusal(*CLUSTER, "--", "prompts.txt")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "cluster.nodes is not set"),
        ([*CLUSTER, "cluster.time=1;reboot"], "no time limit of SLURM"),
        ([*CLUSTER, "cluster.partition='a b'"], "no single word"),
        ([*CLUSTER, 'cluster.account="x\\n#SBATCH --uid=0"'], "no single word"),
        ([*CLUSTER, "cluster.options={qos: $(reboot)}"], "no single word"),
        ([*CLUSTER, "cluster.options={'qos=x --uid': y}"], "no long option of sbatch"),
        ([*CLUSTER, "cluster.options={nodes: '3', time: '5'}"], r"nodes (set cluster.nodes), time (set cluster.time)"),
        ([*CLUSTER, "cluster.options={requeue: x, open-mode: truncate}"], "itself says: requeue, open-mode; leave"),
        ([*CLUSTER, "cluster.options={no-requeue: null}", "--kind", "pretrain_array"], "itself says: no-requeue;"),
        ([*CLUSTER, "cluster.ranks_per_node=4"], "one rank per GPU"),
        ([*CLUSTER, "cluster.time=4"], "save_seconds 300 is not less than the 240 seconds"),
        ([*CLUSTER, "train.run_dir=runs/a b"], "holds characters that the name of a job's output file cannot"),
        ([*CLUSTER, "train.run_dir='runs/%u'"], "holds characters"),
        ([*CLUSTER, 'samples.prompts=["a\\nb"]', 'model.inherit="x\ny"'], "line break"),
        ([*CLUSTER, "--kind", "pretrain_array", "--jobs", "0"], "--jobs 0 must be 1 or more"),
    ],
)
def test_what_cannot_stand_in_a_job_script_is_refused(words: list[str], message: str) -> None:
    assert message in refusal(*words)


def test_a_run_that_does_not_divide_or_fit_is_not_queued() -> None:
    assert "is not a multiple of train.micro_batch_size 1 x 88 data-parallel ranks" in refusal(
        *CLUSTER, "cluster.nodes=11"
    )
    large = [*CLUSTER, "train.micro_batch_size=512", "train.global_batch_size=53248"]
    message = refusal(*large, "cluster.gpu_memory_gib=4")
    assert re.search(r"the run needs [\d.]+ GiB per GPU and tensors may take 2\.4 GiB", message)
    assert "train.micro_batch_size=" in message.split("What fits", 1)[1]


def test_a_run_that_fits_or_whose_memory_is_not_known_is_queued(capsys: pytest.CaptureFixture[str]) -> None:
    shown(capsys, "cluster.gpu_memory_gib=4")
    command = ["--config", str(ROOT / "configs/digits.yaml"), "--dry-run", *CLUSTER]
    large = ["train.micro_batch_size=512", "train.global_batch_size=53248"]
    assert main(TEMPLATES, [*command, *large]) == 0
    assert capsys.readouterr().err == "memory is not checked: set cluster.gpu_memory_gib\n"
    assert main(TEMPLATES, [*command, "cluster.gpus_per_node=0"]) == 0
    assert capsys.readouterr().err == "", "ranks on CPUs are not planned"


@given(st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12), max_size=4))
def test_any_words_are_read_back_as_they_are(words: list[str]) -> None:
    line = fill("arguments=(x)\n", {}, {"arguments": words}).rstrip("\n")
    assert shlex.split(line.removeprefix("arguments=(").removesuffix(")")) == words


def test_bash_itself_agrees_about_quoting() -> None:
    words = ["$(touch x)", "`id`", "a'b", 'c"d', "e\\", "*", "", "~", "!x", "秒", "{1..3}", "-n", "a;b&c|d>e"]
    script = fill("arguments=(x)\nprintf '%s\\0' \"${arguments[@]}\"\n", {}, {"arguments": words})
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == words


def test_the_header_stays_in_one_piece() -> None:
    template = "#!/bin/bash\n#SBATCH --a=1\n#SBATCH --b\n\nx=1\n"
    filled = fill(template, {"a": None, "b": "2", "c": "3"}, {"x": "4"})
    assert filled == "#!/bin/bash\n#SBATCH --b=2\n#SBATCH --c=3\n\nx=4\n"
    with pytest.raises(ValueError, match="assigns no y"):
        fill(template, {}, {"y": "1"})


def test_without_slurm_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvError, match="sbatch is not on the PATH"):
        main(TEMPLATES, ["--config", str(ROOT / "configs/digits.yaml"), *CLUSTER, f"train.run_dir={tmp_path}/run"])


def test_submitting_keeps_the_script_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin/sbatch"
    sbatch.write_text('#!/bin/sh\ncp "$1" "$0.seen"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    run_dir = tmp_path / "run"
    assert main(TEMPLATES, ["--config", str(ROOT / "configs/digits.yaml"), *CLUSTER, f"train.run_dir={run_dir}"]) == 0
    kept = (run_dir / "slurm/pretrain.sbatch").read_text()
    assert kept == Path(f"{sbatch}.seen").read_text() and f"train.run_dir={run_dir})" in kept


def in_job(tmp_path: Path, script: str, code: int, srun: str = "", **environment: str) -> list[str]:
    """Lines that a job script prints, among them the commands of SLURM and MPI that it calls.

    Args:
        tmp_path: Where it starts.
        script: Its text.
        code: That it must end with.
        srun: What the stand-in for srun does before it prints its command line, in sh.
        environment: Variables of the job.
    """
    commands = tmp_path / "environment/bin"
    if not commands.exists():
        commands.mkdir(parents=True)
        (commands / "python").symlink_to(sys.executable)
    for name in ("scontrol", "scancel", "srun", "mpirun"):
        first = srun if name == "srun" else '[ "$2" = hostnames ] && { printf "n1\\nn2\\n"; exit; }'
        text = f'#!/bin/sh\n{first}\necho "{name} $*"\n'
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    place = {
        "PATH": "/usr/bin:/bin", "VIRTUAL_ENV": str(commands.parent), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS_PER_NODE": "8",
    } | environment  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", script], env=place, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == code, done.stdout
    return done.stdout.splitlines()


def outcome(tmp_path: Path, code: int, **environment: str) -> list[str]:
    """What `finish CODE` of job.sh calls and says."""
    script = f'repository={ROOT}\nrun_dir={tmp_path}/run\nsource "$repository/launch/slurm/job.sh"\nfinish {code}\n'
    return in_job(tmp_path, f"set -euo pipefail\n{script}", code, **environment)


def test_exit_codes_decide_whether_a_job_is_requeued(tmp_path: Path) -> None:
    assert outcome(tmp_path, 85)[0] == "scontrol requeue 7"
    for code in (0, 2, 75):
        assert not any("scontrol" in line for line in outcome(tmp_path, code))
    assert "not started again" in outcome(tmp_path, 75)[0]


@pytest.mark.parametrize("chain", ["", "5"])
def test_a_run_that_its_stop_file_has_ended_is_not_started_again(tmp_path: Path, chain: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/STOP").touch()
    said = outcome(tmp_path, 85, SLURM_ARRAY_JOB_ID=chain)
    assert f"saved and stopped by {tmp_path}/run/STOP: not started again" in said[0]
    assert said[1:] == (["scancel --state=PENDING 5"] if chain else [])


def test_the_third_fault_in_a_row_at_the_same_place_is_the_last(tmp_path: Path) -> None:
    latest = tmp_path / "run/checkpoints/latest"
    latest.parent.mkdir(parents=True)
    for step in (1, 1, 2, 2):
        latest.write_text(f"step-{step:07d}\n")
        assert outcome(tmp_path, 1)[0] == "scontrol requeue 7"
    said = outcome(tmp_path, 137)
    assert len(said) == 1 and "three times in a row at the same place (step-0000002): given up" in said[0]


def test_a_chain_goes_on_by_itself_and_is_cancelled_when_it_is_over(tmp_path: Path) -> None:
    chain = {"SLURM_ARRAY_JOB_ID": "5"}
    assert len(outcome(tmp_path, 85, **chain)) == 1
    assert outcome(tmp_path, 0, **chain)[-1] == "scancel --state=PENDING 5"
    assert outcome(tmp_path, 75, **chain)[-1] == "scancel --state=PENDING 5"


@pytest.mark.parametrize(
    ("words", "called"),
    [
        ([], "--wait=60 --cpu-bind=none python {root}/launch/pretrain.py --config {config} "),
        (["--kind", "pretrain_array"], "--cpu-bind=none python {root}/launch/pretrain.py --config {config} "),
        (
            [CONTAINER],
            "--container-image=my image.sqsh --container-mounts=/data:/data,{here}:{here},{root}:{root} "
            "--container-workdir={here} python {root}/launch/pretrain.py --config {config} ",
        ),
        (
            [CONTAINER.replace("pyxis", "apptainer")],
            "--cpu-bind=none apptainer exec --nv --bind /data:/data,{here}:{here},{root}:{root} --pwd {here} "
            "my image.sqsh python {root}/launch/pretrain.py --config {config} ",
        ),
        (
            ["--kind", "prepare", "--", "run", "x.csv"],
            "mpirun --bind-to none python {root}/launch/prepare.py run x.csv",
        ),
        (
            ["--kind", "infer", "--", "a.txt"],
            "srun bash {root}/launch/infer.sh --model runs/quickstart/base/export a.txt",
        ),
    ],
)
def test_a_job_starts_its_program_on_all_ranks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], called: str
) -> None:
    script = "\n".join(shown(capsys, "cluster.nodes=2", "train.global_batch_size=16", *words))
    said = in_job(tmp_path, script, 0, SLURM_ARRAY_JOB_ID="5" if "pretrain_array" in words else "")
    line = called.format(root=ROOT, here=tmp_path, config=ROOT / "configs/digits.yaml")
    assert any(line in f"{other} " for other in said), said
    if "launch/pretrain.py" in called:
        assert any(" --nodes=2 --ntasks=16 --nodelist=n1,n2 --kill-on-bad-exit=1 " in other for other in said), said


PROBED = 'case "$*" in *"-c import torch"*) {probe} ;; *doctor.py*) {doctor} ;; esac'
REPORT = 'for last; do :; done; echo "{}" >"$last"'
"""What the doctor does of its own, in sh: its last word is the file of its report."""


@pytest.mark.parametrize(
    ("probe", "doctor", "chosen", "told"),
    [
        ("exit 0", f"{REPORT}; printf 'NCCL version 2.27\\nn1\\nn2\\n'; exit 0", "n1", None),
        ("exit 0", f"{REPORT}; echo n2; exit 1", "n2", None),
        ("exit 0", "exit 1", "n1", "the doctor came to no end"),
        ('case "$*" in *=n1\\ *) exit 1 ;; esac; exit 0', f"{REPORT}; echo n2; exit 0", "n2", "n1 is sick: it does"),
        ("exit 0", f"{REPORT}; exit 1", None, "only 0 healthy nodes () and 1 needed"),
        ("exit 1", "exit 0", None, "only 0 healthy nodes () and 1 needed"),
    ],
)
def test_a_job_with_spare_nodes_goes_on_with_those_that_are_healthy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, probe: str, doctor: str, chosen: str | None, told: str | None
) -> None:
    script = "\n".join(shown(capsys, "cluster.nodes=1", "cluster.spare_nodes=1", "train.global_batch_size=8"))
    said = in_job(tmp_path, script, 0 if chosen else 1, PROBED.format(probe=probe, doctor=doctor))
    started = [line for line in said if "launch/pretrain.py" in line]
    assert len(started) == (1 if chosen else 0), said
    assert chosen is None or f"--nodes=1 --ntasks=8 --nodelist={chosen} " in started[0]
    assert any((told or f": nodes {chosen}") in line for line in said), said
    assert ("scontrol requeue 7" in said) == (chosen is None)


def test_an_old_report_of_the_doctor_does_not_count(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = tmp_path / "runs/quickstart/base/slurm/7.doctor.json"
    report.parent.mkdir(parents=True)
    report.write_text("{}")
    script = "\n".join(shown(capsys, "cluster.nodes=1", "cluster.spare_nodes=1", "train.global_batch_size=8"))
    said = in_job(tmp_path, script, 0, PROBED.format(probe="exit 0", doctor="exit 1"))
    assert any("the doctor came to no end" in line for line in said), said


@pytest.mark.parametrize(
    ("runtime", "start"),
    [("pyxis", "--container-image=my image.sqsh .* python"), ("apptainer", "apptainer exec .* python")],
)
def test_in_a_container_the_doctor_has_the_python_of_the_image(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, runtime: str, start: str
) -> None:
    words = ["cluster.nodes=1", "cluster.spare_nodes=1", "train.global_batch_size=8"]
    script = "\n".join(shown(capsys, CONTAINER.replace("pyxis", runtime), *words))
    host = tmp_path / "environment/bin/python"
    host.parent.mkdir(parents=True)
    host.write_text("#!/bin/sh\necho the host has no such python\nexit 127\n")
    host.chmod(0o755)
    called = f'echo "$*" >>{tmp_path}/called; ' + PROBED.format(probe="exit 0", doctor=f"{REPORT}; echo n2; exit 0")
    said = in_job(tmp_path, script, 0, called)
    assert any(line.endswith(": nodes n2") for line in said), said
    assert "the host has no such python" not in said
    lines = (tmp_path / "called").read_text().splitlines()
    assert len(lines) == 4, "two that answer, the doctor, the run"
    assert all(re.search(start, line) for line in lines), lines


def test_a_preparation_is_done_when_its_shards_are_there_and_not_when_mpirun_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["run", "x.csv", "--out=shards/earlier", "--overwrite", "--out", "shards/x y"]
    script = "\n".join(shown(capsys, "cluster.gpus_per_node=0", "--kind", "prepare", "--", *words))
    assert "scontrol requeue 7" in in_job(tmp_path, script, 1), "mpirun has lost a node, and ended with 0"
    (tmp_path / "shards/x y.partial").mkdir(parents=True)
    (tmp_path / "shards/x y.json").touch()
    said = in_job(tmp_path, script, 1, SLURM_RESTART_COUNT="1")
    words.remove("--overwrite")
    assert f"mpirun --bind-to none python {ROOT}/launch/prepare.py {' '.join(words)}" in said
    assert any("three times" not in line and "after 0 shards" in line for line in said)
    (tmp_path / "shards/x y.partial").rmdir()
    said = in_job(tmp_path, script, 0)
    assert any("--overwrite --out shards/x y" in line for line in said) and said[-1].endswith("done")
