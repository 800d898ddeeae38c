"""One ssh connection to a target: files and a job go there, bounded lines of JSON come back.

The system's `ssh` is used, with the user's configuration, keys and known hosts. It asks nothing, refuses hosts that are not
known, and forwards nothing. What the target answers is data: it names no file here and nothing of it is executed.
"""

import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from qexport._swap import terminate_as_exception
from qexport.errors import QexportError, UsageError
from qexport.failures import one_line

SSH_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",
    "ConnectTimeout": "15",
    # a connection that died is noticed within a minute
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "4",
}
MOST_ANSWER = 256 << 20  # bytes, all in all
STDERR_KEPT = 4096
CHUNK = 1 << 20
GRACE = 20  # seconds that a target has to clean up after we left
FORM = "ssh://user@host or ssh://user@host:port"
# What ssh says, and what to do about it.
MENDS = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED": "its host key is another one than before; find out why before you trust it",
    "Host key verification failed": "its host key is not known here; connect by hand once and compare the fingerprint",
    "Permission denied": "it accepts none of your keys (no password is asked for); add one with ssh-copy-id or ssh-add",
}


@dataclass(frozen=True)
class Target:
    """A machine to measure on.

    Attributes:
        url: ssh://user@host or ssh://user@host:port.
        python: the Python there, with numpy and onnxruntime; a name on its path, or a path, relative to the home directory.
        ssh_config: a configuration file for ssh in place of the user's own.
    """

    url: str
    python: str = "python3"
    ssh_config: str | None = None

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname

    def command(self) -> list[str]:
        """The ssh command line up to what runs there.

        Raises:
            UsageError: the URL is not of the form.
            QexportError: `ssh_config` is no file, or there is no ssh.
        """
        try:
            parts = urlsplit(self.url)
            user, host, port = parts.username, parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f"target {self.url!r} is not of the form {FORM}: {error}") from None
        # a name that begins with - would be an option to ssh
        fits = re.fullmatch(r"[A-Za-z0-9_][\w.-]*", user or "_") and re.fullmatch(r"[A-Za-z0-9_:][\w.:%-]*", host or "-")
        if parts.scheme != "ssh" or not fits or parts.password or parts.path.strip("/") or parts.query or parts.fragment:
            raise UsageError(f"target {self.url!r} is not of the form {FORM}")
        if self.ssh_config and not Path(self.ssh_config).is_file():
            raise QexportError(f"{self.ssh_config}: no such ssh configuration file")
        if shutil.which("ssh") is None:
            raise QexportError("there is no ssh on this machine; install the OpenSSH client")
        options = [word for name, value in SSH_OPTIONS.items() for word in ("-o", f"{name}={value}")]
        options += ["-F", str(self.ssh_config)] if self.ssh_config else []
        options += ["-l", user] if user else []
        options += ["-p", str(port)] if port else []
        return ["ssh", "-T", *options, "--", host]


class Connection:
    """The agent on a target, once it has started; see `connect`."""

    def __init__(self, target: Target, process: subprocess.Popen):
        self.target, self.process, self.left = target, process, MOST_ANSWER
        self._stderr = b""
        self._lines = queue.SimpleQueue()
        # both are read while we write, since a target may answer before it has read everything
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._keep_stdout, self._keep_stderr)]
        for reader in self._readers:
            reader.start()

    def _keep_stdout(self) -> None:
        while self.left > 0 and (line := self.process.stdout.readline(self.left)):
            self.left -= len(line)
            self._lines.put(line)
        if self.left <= 0:
            self.process.kill()
        self._lines.put(None)

    def _keep_stderr(self) -> None:
        while data := self.process.stderr.read1(STDERR_KEPT):
            self._stderr = (self._stderr + data)[-STDERR_KEPT:]

    def send(self, name: str, source) -> None:
        """Write a file there; `source` are its bytes, or the path of a file."""
        if isinstance(source, bytes):
            self._write(json.dumps({"name": name, "bytes": len(source)}).encode() + b"\n" + source)
            return
        with open(source, "rb") as file:
            self._write(json.dumps({"name": name, "bytes": os.fstat(file.fileno()).st_size}).encode() + b"\n")
            while data := file.read(CHUNK):
                self._write(data)

    def start(self, command: list[str]) -> None:
        """Run that target's Python with these arguments."""
        self._write(json.dumps({"command": command}).encode() + b"\n")
        self.process.stdin.flush()

    def _write(self, data: bytes) -> None:
        try:
            self.process.stdin.write(data)
        except OSError:  # it ended; why, it has said
            for message in self.messages():
                if "error" in message:
                    raise self.error(message["error"]) from None
            raise self.ended() from None

    def messages(self) -> Iterator[dict]:
        """What the target says, until it ends.

        Raises:
            QexportError: it said something that is not a line of JSON, or more than MOST_ANSWER bytes.
        """
        while True:
            line = self._lines.get()
            if self.left <= 0:
                raise self.error(f"answered more than {MOST_ANSWER >> 20} MB; it was cut off")
            if line is None:
                self._lines.put(None)  # the end stays the end
                return
            try:
                message = json.loads(line, parse_constant=_refuse)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                said = one_line(printable(line.decode("utf-8", "replace")), 80)
                raise self.error(f"answered {said!r}, which is not what was asked; its shell must print nothing by itself")
            yield printable(message)

    def close(self) -> None:
        """Wait until all that an ended process said is read."""
        for reader in self._readers:
            reader.join(GRACE)

    def error(self, text) -> QexportError:
        """An error of the target, as one line."""
        return QexportError(f"{self.target.url}: {one_line(printable(str(text)))}")

    def ended(self) -> QexportError:
        """Why the connection or the target's Python ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        self.close()
        said = self._stderr.decode("utf-8", "replace")
        for words, mend in MENDS.items():
            if words in said:
                return self.error(mend)
        last = (said.strip().splitlines() or ["no reason given"])[-1]
        if self.process.returncode in (126, 127):
            return self.error(f"cannot run {self.target.python!r}: {last}; give a Python that is there with --python")
        return self.error(f"{last} (exit code {self.process.returncode})")


@contextmanager
def connect(target: Target):
    """Start the agent on a target; yields a `Connection` and what the agent says of its machine.

    At the end, on any failure, Ctrl-C and SIGTERM included, the agent kills its job and removes what it wrote.

    Raises:
        UsageError: a URL of the wrong form.
        QexportError: ssh or the target's Python does not start; the message says why.
    """
    agent = Path(__file__).with_name("agent.py").read_bytes()
    start = f"import sys; exec(sys.stdin.buffer.read({len(agent)}))"
    command = [*target.command(), f"{shlex.quote(target.python)} -c {shlex.quote(start)}"]
    with terminate_as_exception():
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        try:
            connection = Connection(target, process)
            connection._write(agent)
            with suppress(OSError):
                process.stdin.flush()
            hello = next((m["hello"] for m in connection.messages() if isinstance(m.get("hello"), dict)), None)
            if hello is None:
                raise connection.ended()
            yield connection, hello
        finally:
            with suppress(OSError):
                process.stdin.close()  # tells the agent to end
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            connection.close()
            process.stdout.close()
            process.stderr.close()


def printable(value):
    """`value` with what a terminal would obey or not show replaced in every text, in nested dicts and lists."""
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [printable(item) for item in value]
    if isinstance(value, str) and not value.isprintable():
        return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in value)
    return value


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON")
