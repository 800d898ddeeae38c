"""An sshd of our own on the loopback, with keys, a configuration and known hosts of its own; and Pythons to log in to."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qexport.errors import QexportError
from qexport.remote import Target

SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
PACKAGES = ("numpy", "onnxruntime", "onnx", "google", "ml_dtypes", "typing_extensions")
PATIENCE = 60  # seconds; what is waited for takes less than one, unless the machine has more to do


class Server:
    """What a test needs of it: `url`, the ssh configuration `config`, and `temporary`, where logins put temporary files."""

    def __init__(self, folder: Path):
        self.folder, self.temporary = folder, folder / "tmp"
        self.temporary.mkdir()
        self.user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("host", "user", "stranger"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        shutil.copyfile(folder / "user.pub", folder / "authorized_keys")
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # where its unprivileged half is locked into
        self.process = None

    def start(self) -> None:
        """Listen on a port that is free; another one when somebody else was faster."""
        for _ in range(5):
            self.port = free_port()
            settings = {
                "Port": self.port,
                "ListenAddress": "127.0.0.1",
                "HostKey": self.folder / "host",
                "AuthorizedKeysFile": self.folder / "authorized_keys",
                "PidFile": "none",
                "StrictModes": "no",  # the folders of pytest belong to others as well
                "PasswordAuthentication": "no",
                "KbdInteractiveAuthentication": "no",
                "SetEnv": f"TMPDIR={self.temporary}",
            }
            file = self.folder / "sshd_config"
            file.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
            with open(self.folder / "log", "wb") as log:
                self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", file], stderr=log)
            if self._listens():
                return
            self.stop()
        pytest.fail(f"sshd does not start: {(self.folder / 'log').read_text()}")

    def _listens(self) -> bool:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.process.poll() is not None:
                return False
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return True
            time.sleep(0.05)
        return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(PATIENCE)

    @property
    def url(self) -> str:
        return f"ssh://{self.user}@127.0.0.1:{self.port}"

    def config(self, name="ssh_config", *, key="user", known: str | None = "host") -> Path:
        """A configuration for ssh: the key that it logs in with, and the one that it takes the host's for."""
        known_hosts = self.folder / f"{name}.known"
        line = "" if known is None else f"[127.0.0.1]:{self.port} {(self.folder / f'{known}.pub').read_text()}"
        known_hosts.write_text(line)
        file = self.folder / name
        file.write_text(
            f"IdentityFile {self.folder / key}\nIdentitiesOnly yes\n"
            f"UserKnownHostsFile {known_hosts}\nGlobalKnownHostsFile none\n"
            "StrictHostKeyChecking no\nForwardAgent yes\n"  # what the command line must win over
        )
        return file

    def left(self) -> list[str]:
        """What logins left behind, after a while to clean up."""
        end = time.monotonic() + PATIENCE
        while (found := sorted(p.name for p in self.temporary.iterdir())) and time.monotonic() < end:
            time.sleep(0.1)
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Skips with the reason where there is no sshd."""
    for tool in (SSHD, shutil.which("ssh"), shutil.which("ssh-keygen")):
        if tool is None:
            pytest.skip("OpenSSH's sshd, ssh and ssh-keygen are not all installed")
    made = Server(tmp_path_factory.mktemp("ssh"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


def make_python(folder: Path, *packages: str) -> Path:
    """A Python that has these packages of ours and nothing else, qexport least of all."""
    import numpy

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    source = Path(numpy.__file__).parents[1]
    (site,) = folder.glob("lib/python*/site-packages")
    for path in source.iterdir():
        name = path.name.partition("-")[0].partition(".")[0]
        if name in packages:
            (site / path.name).symlink_to(path)
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def pythons(tmp_path_factory):
    """By name: with numpy and onnxruntime alone, with onnx as well, and without onnxruntime."""
    base = tmp_path_factory.mktemp("pythons")
    chosen = {"plain": PACKAGES[:2], "onnx": PACKAGES, "bare": PACKAGES[:1]}
    return {name: make_python(base / name, *packages) for name, packages in chosen.items()}


@pytest.fixture
def target(server, pythons):
    """Makes the `Target` of a login to the server, with a Python by its name or its path."""

    def make(python="plain", *, url=None, config=None):
        chosen = pythons.get(python, python)
        return Target(url or server.url, str(chosen), str(config or server.config()))

    return make


def fails(function, *arguments, **keywords) -> str:
    """The message of its error, one line."""
    with pytest.raises(QexportError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)
