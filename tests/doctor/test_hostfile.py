"""What a hostfile says, and what is told of hosts that ssh does not reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from megacog.doctor.hosts import Host, check_hosts, read_hostfile
from megacog.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_is_a_hostfile() -> None:
    assert read_hostfile(ROOT / "launch/hostfile.example") == [Host("node1", 8), Host("node2", 8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "deepspeed would train here alone"),
        ("# nobody\n", "names no host"),
        ("node1\n", "hostfile:1: 'node1' is no line such as"),
        ("a slots=8\n\nb slots=0\n", "hostfile:3: "),
        ("a slots=8\nb slots=8 c\n", "hostfile:2: "),
        ("-oProxyCommand=x slots=1\n", "hostfile:1: "),
        ("a slots=8\na slots=8\n", "hostfile:2: a stands in the file twice"),
    ],
)
def test_a_wrong_hostfile_is_told_with_its_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "hostfile"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as info:
        read_hostfile(path)
    assert message in str(info.value)


def test_every_host_has_a_verdict_and_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(
        "#!/bin/sh\nfor last; do :; done\n"
        'case "$5" in\n'
        "good) cd / && sh -c \"$last\" ;;\n"
        "locked) echo 'Permission denied (publickey).' >&2; exit 255 ;;\n"
        "bare) echo 'sh: python: not found' >&2; exit 127 ;;\n"
        "slow) exec sleep 60 ;;\n"
        "esac\n"
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    names = ["good", "locked", "bare", "slow"]
    found = check_hosts([Host(name, 8) for name in names], tmp_path, seconds=5)
    checks = {name: check for name, (check,) in found.items()}
    assert list(checks) == names
    assert (checks["good"].verdict, checks["good"].value) == ("ok", "reached, finds megacog; 8 ranks")
    assert all(checks[name].sick and checks[name].fix for name in names[1:])
    assert checks["locked"].value == "Permission denied (publickey)." and "ssh locked true" in checks["locked"].fix
    assert checks["bare"].value == "reached, but: sh: python: not found" and str(tmp_path) in checks["bare"].fix
    assert checks["slow"].value == "no answer in 5 s"
    monkeypatch.setenv("PATH", str(ROOT))
    assert check_hosts([Host("a", 1)], tmp_path, 5)["a"][0].value == "there is no ssh on this machine"
