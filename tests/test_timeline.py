"""Memory over time, of a process that takes and gives back what the test knows, and waits until it was looked at."""

import math
import subprocess
import sys
import time

from qexport.profiling.timeline import RssTimeline


def wait_for_a_look(timeline: RssTimeline) -> None:
    """Until it has looked at its process after this call."""
    now = time.monotonic()
    while not timeline.to_dict({"open": (now, None), "done": (math.inf, None)})["bytes"]:
        assert time.monotonic() < now + 60
        time.sleep(0.001)


def test_a_timeline_sees_what_another_process_takes():
    """64 MiB that are taken and given back show as a step up and one down; equal figures are left out."""
    program = (
        "import time\ndef say(name):\n    print(name, time.monotonic(), flush=True)\n    input()\n"
        "say('open')\nx = bytearray(b'1') * 2**26\nsay('full')\ndel x\nsay('empty')\nsay('done')"
    )
    marks, pipe = {}, subprocess.PIPE
    with (
        subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True) as child,
        RssTimeline(child.pid) as timeline,
    ):
        for name, at in map(str.split, child.stdout):
            marks[name] = float(at), None
            for _ in range(3):  # equal ones, which the child waits for
                wait_for_a_look(timeline)
            print(file=child.stdin, flush=True)
    found = timeline.to_dict(marks)
    first, most, last = found["bytes"][0], max(found["bytes"]), found["bytes"][-1]
    assert most - first > 60 * 2**20
    assert last - first < 10 * 2**20
    assert all(len(set(three)) > 1 for three in zip(found["bytes"], found["bytes"][1:], found["bytes"][2:], strict=False))
    assert found["done"] == marks["done"][0] - marks["open"][0]
