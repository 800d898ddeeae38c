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

    def to_dict(self, marks: dict[str, float]) -> dict:
        """`seconds` since `marks["open"]` and resident `bytes` then, without the middle of runs of equal figures, and the
        other marks in the same seconds.

        Args:
            marks: times of the system's monotonic clock; nothing from before `open` or after `done` is kept.
        """
        start = marks["open"]
        kept = [(at - start, size) for at, size in self._seen if start <= at <= marks["done"]]
        ends = [
            point
            for i, point in enumerate(kept)
            if i in (0, len(kept) - 1) or not kept[i - 1][1] == point[1] == kept[i + 1][1]
        ]
        others = {name: at - start for name, at in marks.items() if name != "open"}
        return {"seconds": [at for at, _ in ends], "bytes": [size for _, size in ends], **others}
