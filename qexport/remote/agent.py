"""What runs first on a target: takes files and a job from stdin, runs the job, and removes what it wrote, whatever happens.

`qexport.remote.connection` sends this text itself to the target's Python, of whatever version: nothing newer than 3.6 and
nothing but the standard library. On stdout it and the job write JSON, a line each.

stdin: a line {"name", "bytes"} before the content of each file; then {"command"}, the arguments of this Python. It ends when
the other side is gone, and then the job is killed.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib.util import find_spec

CHUNK = 1 << 20


def send(**message):
    print(json.dumps(message), flush=True)


def introduce():
    """Says what this machine is, so that the other side can choose what to send."""
    missing = [name for name in ("numpy", "onnxruntime", "onnx") if find_spec(name) is None]
    here = sys.platform + "-" + platform.machine()
    send(hello={"target": here, "python": list(sys.version_info[:3]), "missing": missing})


def receive(stream, folder):
    """Writes the files below `folder`; the command that follows them, None where the other side left."""
    while True:
        line = stream.readline()
        if not line.endswith(b"\n"):
            return None
        head = json.loads(line.decode("utf-8"))
        if "command" in head:
            return head["command"]
        path = os.path.join(folder, *head["name"].split("/"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            left = head["bytes"]
            while left:
                data = stream.read(min(left, CHUNK))
                if not data:
                    return None
                file.write(data)
                left -= len(data)


def run(stream, folder, command):
    """Runs the command in `folder`, which it finds its modules in; kills it and its children when `stream` ends."""
    # onnxruntime, too, leaves a file in the folder for temporary ones
    environment = dict(os.environ, PYTHONPATH=folder, TMPDIR=folder)
    # a session of its own, so that its children are killed with it
    job = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )

    def watch():
        while os.read(stream.fileno(), CHUNK):  # a buffered read would hold a lock that the end of the program needs
            pass
        kill(job)

    threading.Thread(target=watch, daemon=True).start()
    try:
        job.wait()
    finally:
        kill(job)


def kill(job):
    """Ends the job and its children."""
    with suppress(OSError):  # where they ended by themselves
        os.killpg(job.pid, signal.SIGKILL)


def remove(folder):
    """Removes the folder, also while the last of its processes is dying."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(0.1)
    shutil.rmtree(folder)


def stop(number, frame):
    raise SystemExit(128 + number)


def main():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    introduce()
    stream = sys.stdin.buffer
    folder = tempfile.mkdtemp(prefix="qexport-")
    try:
        command = receive(stream, folder)
        if command is not None:
            run(stream, folder, command)
    except OSError as error:
        send(error=f"cannot write what was sent: {error}")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        remove(folder)
    send(removed=True)


main()
