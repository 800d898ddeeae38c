"""Memory of a process over time, seen from outside: the process does nothing for it, so what it measures of itself stays."""

import threading
import time

INTERVAL = 0.005  # seconds between two looks


class RssTimeline:
    """Context: looks at the resident memory of the process `pid` every INTERVAL seconds while it is entered.

    Without psutil it sees nothing.
    """

    def __init__(self, pid: int):
        self._pid = pid
        self._seen: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "RssTimeline":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            import psutil
        except ImportError:
            return
        try:
            process = psutil.Process(self._pid)
            while not self._stop.wait(INTERVAL):
                self._seen.append((time.monotonic(), process.memory_info().rss))
        except psutil.Error:  # it has ended
            return

    def to_dict(self, marks: dict[str, tuple[float, int | None]]) -> dict:
        """`seconds` since the mark `open` and resident `bytes` then, without the middle of runs of equal figures, and the
        other marks in the same seconds.

        Args:
            marks: name to (time of the system's monotonic clock, bytes that the process itself saw then, None where it did
                not look), `open` first and `done` last. They are part of the line; nothing from before or after them is.
        """
        start, end = marks["open"][0], marks["done"][0]
        known = [(at, size) for at, size in marks.values() if size is not None]
        line = sorted([*known, *(point for point in self._seen if start <= point[0] <= end)])
        ends = [
            point
            for i, point in enumerate(line)
            if i in (0, len(line) - 1) or not line[i - 1][1] == point[1] == line[i + 1][1]
        ]
        others = {name: at - start for name, (at, _) in marks.items() if name != "open"}
        return {"seconds": [at - start for at, _ in ends], "bytes": [size for _, size in ends], **others}
