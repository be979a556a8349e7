"""`launch/submit.py`: job scripts of SLURM from the templates in launch/slurm and a run's configuration.

A template is a job script that is valid as it is. Filling it in replaces its `#SBATCH` lines and the variables at
its top, and nothing else: what is submitted can be read and compared with the template.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megacog.config.load import load_config
from megacog.config.schema import Config
from megacog.errors import ConfigError, EnvError
from megacog.runtime.files import atomic_file

KINDS = ("pretrain", "pretrain_container", "pretrain_array", "prepare", "infer")
_MANAGED = {
    "nodes": "cluster.nodes", "ntasks-per-node": "cluster.ranks_per_node", "gpus-per-node": "cluster.gpus_per_node",
    "partition": "cluster.partition", "account": "cluster.account", "time": "cluster.time",
    "signal": "cluster.save_seconds", "job-name": "train.run_dir", "output": "train.run_dir", "array": "--jobs",
}  # fmt: skip
"""Options of sbatch that have a key of their own."""
_FIXED = ("requeue", "no-requeue", "open-mode")
"""Options of sbatch that a job script relies on."""
_DIRECTIVE = re.compile(r"#SBATCH --([a-z-]+)(?:=.*)?")
_VARIABLE = re.compile(r"([a-z_]+)=.*")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")

Values = Mapping[str, str | Sequence[str]]


def main(templates: Path, argv: Sequence[str] | None = None) -> int:
    """Show the job script of a run and submit it; 0, or sbatch's own code.

    Args:
        templates: Folder of the templates; the repository is two folders above.
        argv: Command line; sys.argv[1:] if None.

    Raises:
        ConfigError: The configuration is wrong or asks for what a job script cannot say.
        EnvError: sbatch or bash is missing.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    options, words = _parser().parse_args(argv[:split]), argv[split + 1 :]
    config = load_config(options.config, options.overrides)
    kind = options.kind or ("pretrain_container" if config.cluster.container else "pretrain")
    if words and kind not in ("prepare", "infer"):
        raise ConfigError(f"words after -- are for --kind prepare and infer; {kind} takes key=value only")
    if kind in ("prepare", "infer") and not words:
        raise ConfigError(f"--kind {kind} needs the words of launch/{kind}.py after --")
    if kind.startswith("pretrain"):
        require_runnable(config)
        words = ["--config", str(options.config), *options.overrides]
    name = f"{kind}.sbatch"
    script = fill(
        (templates / name).read_text(encoding="utf-8"),
        directives(config, kind, options.jobs),
        variables(config, kind, templates.resolve().parents[1], words),
    )
    check_syntax(script)
    print(script, end="", flush=True)
    if options.dry_run:
        return 0
    folder = Path(config.train.run_dir) / "slurm"
    folder.mkdir(parents=True, exist_ok=True)  # sbatch makes no folder for a job's output
    with atomic_file(folder / name, "w") as file:
        file.write(script)
    return _run("sbatch", str(folder / name)).returncode


def require_runnable(config: Config) -> None:
    """Refuse a run before it is queued; says on stderr if its memory cannot be checked.

    Raises:
        ConfigError: It does not divide over the ranks of `cluster`, or cannot fit on its GPUs, with the plan's numbers.
    """
    from megacog.planning.cluster import Cluster, Device, reported_gib
    from megacog.planning.plan import accumulation_steps, data_parallel
    from megacog.planning.require import require_memory

    cluster = config.cluster
    if cluster.nodes is None:
        raise ConfigError("cluster.nodes is not set: say on how many machines the job runs")
    accumulation_steps(config, data_parallel(config, cluster.nodes * cluster.local_ranks))
    if not cluster.gpus_per_node:
        return
    if cluster.gpu_memory_gib is None:
        print("memory is not checked: set cluster.gpu_memory_gib", file=sys.stderr)
        return
    gpu = Device("GPU", reported_gib(cluster.gpu_memory_gib))
    require_memory(config, Cluster(gpu, cluster.gpus_per_node, cluster.nodes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit.py", description="Fill in a job script from a configuration, show it and submit it to SLURM.",
        usage="%(prog)s --config FILE [--kind KIND] [--jobs N] [--dry-run] [key=value ...] [-- WORDS ...]",
        epilog="Words after -- go to launch/prepare.py or launch/infer.py. The script is kept in RUN_DIR/slurm.",
    )  # fmt: skip
    add = parser.add_argument
    add("--config", required=True, type=Path, help="YAML file of the run; its `cluster` section says what to ask for")
    add("--kind", choices=KINDS, help="what to run (default: pretrain, in a container if the configuration has one)")
    add("--jobs", type=int, default=10, help="pretrain_array: at most so many jobs in a row (default: 10)")
    add("--dry-run", action="store_true", help="only show the script")
    add("overrides", nargs="*", default=[], metavar="key=value", help="override a key of the configuration")
    return parser


def directives(config: Config, kind: str, jobs: int = 1) -> dict[str, str | None]:
    """Values of `#SBATCH` lines by option; None removes the line, "" makes one without a value.

    Raises:
        ConfigError: A value is missing or cannot stand in such a line.
    """
    cluster, run_dir = config.cluster, Path(config.train.run_dir)
    if cluster.nodes is None and kind != "infer":
        raise ConfigError("cluster.nodes is not set: say on how many machines the job runs")
    taken = [f"{name} (set {_MANAGED[name]})" for name in cluster.options if name in _MANAGED]
    if taken:
        raise ConfigError(f"cluster.options holds what has a key of its own: {', '.join(taken)}")
    fixed = [name for name in cluster.options if name in _FIXED]
    if fixed:
        raise ConfigError(
            f"cluster.options holds what the job script itself says: {', '.join(fixed)}; leave it out. --kind "
            "pretrain_array is for clusters that do not requeue"
        )
    if kind == "pretrain_array" and jobs < 1:
        raise ConfigError(f"--jobs {jobs} must be 1 or more")
    if not re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./+~=@:-]*", config.train.run_dir):
        raise ConfigError(
            f"train.run_dir {config.train.run_dir!r} holds characters that the name of a job's output file cannot: "
            "use letters, digits and _./+~=@:-"
        )
    alone, training = kind == "infer", kind.startswith("pretrain")
    gpus = min(cluster.gpus_per_node, 1) if alone else cluster.gpus_per_node
    found: dict[str, str | None] = {
        "job-name": f"{kind.partition('_')[0]}-{run_dir.name}",
        "nodes": "1" if alone else str((cluster.nodes or 0) + (cluster.spare_nodes if training else 0)),
        "ntasks-per-node": "1" if alone else str(cluster.local_ranks),
        "gpus-per-node": str(gpus) if gpus else None,
        "partition": cluster.partition,
        "account": cluster.account,
        "time": cluster.time,
        "output": f"{run_dir}/slurm/%x-{'%A' if kind == 'pretrain_array' else '%j'}.out",
    }
    if kind != "infer":
        # `B:` signals the script alone, else the ranks. Preparation has nothing to save: its script requeues the job.
        found["signal"] = f"{'' if training else 'B:'}USR1@{cluster.save_seconds}"
    if kind == "pretrain_array":
        found["array"] = f"1-{jobs}%1"
    return found | {name: value or "" for name, value in cluster.options.items()}


def variables(config: Config, kind: str, repository: Path, words: Sequence[str]) -> dict[str, str | Sequence[str]]:
    """Values of the variables at the top of a template; a sequence becomes an array.

    Raises:
        ConfigError: A container is asked for and not described.
    """
    found: dict[str, str | Sequence[str]] = {
        "repository": str(repository), "run_dir": config.train.run_dir, "arguments": words,
    }  # fmt: skip
    if kind.startswith("pretrain"):
        found["nodes"] = str(config.cluster.nodes)
    container = config.cluster.container
    if kind == "pretrain_container":
        if container is None:
            raise ConfigError("--kind pretrain_container needs cluster.container with runtime and image")
        found |= {"runtime": container.runtime, "image": container.image, "mounts": container.mounts}
    elif container is not None:
        raise ConfigError(f"--kind {kind} does not run in cluster.container; set cluster.container=null")
    return found


def fill(template: str, directives: Mapping[str, str | None], variables: Values) -> str:
    """The template with its `#SBATCH` lines and the first assignment of each variable replaced.

    Args:
        template: Text of a job script.
        directives: By option; None removes the line, "" is no value, an option without a line gets one after the last.
        variables: By name; every one must be assigned at the start of a line of the template.

    Raises:
        ConfigError: A value holds line breaks or other control characters.
    """
    lines, waiting, unset = [], dict(directives), dict(variables)
    last_directive = 0
    for line in template.splitlines():
        directive, variable = _DIRECTIVE.fullmatch(line), _VARIABLE.fullmatch(line)
        if directive and directive[1] in waiting:
            value = waiting.pop(directive[1])
            if value is None:
                continue
            line = _directive(directive[1], value)
        elif variable and variable[1] in unset:
            line = f"{variable[1]}={_quoted(unset.pop(variable[1]))}"
        lines.append(line)
        if line.startswith("#SBATCH"):
            last_directive = len(lines)
    if unset:
        raise ValueError(f"the template assigns no {', '.join(unset)}")
    added = [_directive(name, value) for name, value in waiting.items() if value is not None]
    return "\n".join([*lines[:last_directive], *added, *lines[last_directive:]]) + "\n"


def _directive(name: str, value: str) -> str:
    if re.search(r"[\s\"'#\\]", value) or _UNSAFE.search(value):
        raise ConfigError(f"sbatch's {name} {value!r} must be one word without quotes")
    return f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"


def _quoted(value: str | Sequence[str]) -> str:
    words = [value] if isinstance(value, str) else list(value)
    for word in words:
        if _UNSAFE.search(word):
            raise ConfigError(f"{word!r} holds a line break or control character and cannot stand in a job script")
    text = " ".join(map(shlex.quote, words))
    return text if isinstance(value, str) else f"({text})"


def check_syntax(script: str) -> None:
    """Raises:
    ConfigError: bash cannot read the script.
    """
    done = _run("bash", "-n", text=script)
    if done.returncode:
        raise ConfigError(f"the job script is not valid: {done.stderr.strip()}")


def _run(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        if text is not None:
            return subprocess.run(command, input=text, capture_output=True, text=True)
        return subprocess.run(command, text=True)
    except FileNotFoundError:
        raise EnvError(
            f"{command[0]} is not on the PATH; submit on a machine of the cluster, or use --dry-run to see the script"
        ) from None

