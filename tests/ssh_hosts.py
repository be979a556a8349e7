"""Two hosts that ssh reaches on this machine: an sshd on 127.0.0.2 and one on 127.0.0.3, with keys of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from run_ranks import python_environment

from megacog.runtime.ranks import free_port

HOSTS = ("127.0.0.2", "127.0.0.3")
PROGRAMS = ("sshd", "ssh", "ssh-keygen", "pdsh")


class SshHosts:
    """Context manager. `environment` has an `ssh` first on the PATH that knows keys and port of the hosts."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sshd-"))
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        environment = python_environment()
        return environment | {"PATH": f"{self.folder}:{environment['PATH']}", "PDSH_RCMD_TYPE": "ssh"}

    def __enter__(self) -> SshHosts:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self._daemons:
            daemon.terminate()
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        folder, port = self.folder, free_port()
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd confines its unprivileged half
        for name in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        keys = (folder / "user_key.pub").read_text()
        (folder / "authorized_keys").write_text(keys)
        public = " ".join((folder / "host_key.pub").read_text().split()[:2])
        (folder / "known_hosts").write_text("".join(f"[{host}]:{port} {public}\n" for host in HOSTS))
        (folder / "ssh_config").write_text(
            f"Port {port}\nIdentityFile {folder}/user_key\nIdentitiesOnly yes\nBatchMode yes\n"
            f"UserKnownHostsFile {folder}/known_hosts\nStrictHostKeyChecking yes\n"
        )
        wrapper = folder / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        for host in HOSTS:
            command = [
                str(shutil.which("sshd")), "-D", "-e", "-f", "/dev/null", "-h", str(folder / "host_key"),
                "-p", str(port), "-o", f"ListenAddress={host}", "-o", f"AuthorizedKeysFile={folder}/authorized_keys",
                "-o", "StrictModes=no", "-o", "UsePAM=no", "-o", "PermitRootLogin=prohibit-password",
                "-o", f"PidFile={folder}/{host}.pid",
            ]  # fmt: skip
            with open(folder / f"{host}.log", "wb") as log:
                self._daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=os.environ))
        for host in HOSTS:
            self._wait_for(host)

    def _wait_for(self, host: str) -> None:
        deadline = time.monotonic() + 20
        command = [str(self.folder / "ssh"), host, "true"]
        while (done := subprocess.run(command, capture_output=True, text=True)).returncode:
            log = (self.folder / f"{host}.log").read_text()
            assert time.monotonic() < deadline, f"{host} does not answer: {done.stderr}{log}"
            time.sleep(0.2)
