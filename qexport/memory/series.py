"""Readings in a fixed amount of memory, so that whoever watches memory does not grow himself."""

from array import array


class Series:
    """Pairs (x, y) of whole numbers, x rising. Where more come than fit, neighbours are merged: every stored pair stands for
    the readings in `stride` of x, with the last x and the least (or with `merge=max` the largest) y of them. So those that
    come more rarely later on stay as they are.

    Args:
        capacity: pairs that fit; 16 bytes each, taken at once.
        merge: what becomes of the y of neighbours.
    """

    def __init__(self, capacity: int = 2048, merge=min):
        self._xs, self._ys = array("q", bytes(8 * capacity)), array("q", bytes(8 * capacity))
        self._merge, self._count = merge, 0
        self._first, self._end = None, 0  # the first x, and where the last pair's stretch of x ends
        self.stride = 1

    def append(self, x: int, y: int) -> None:
        """One more reading."""
        last = self._count - 1
        if x < self._end:
            self._xs[last], self._ys[last] = x, self._merge(self._ys[last], y)
        elif last + 1 < len(self._xs):
            if self._first is None:
                self._first = x
            self._xs[last + 1], self._ys[last + 1] = x, y
            self._count += 1
            self._end = x + self.stride - (x - self._first) % self.stride
        else:
            self._make_room(x)
            self.append(x, y)

    def _make_room(self, x: int) -> None:
        while (x - self._first) // self.stride >= len(self._xs):
            self.stride *= 2
        stored = zip(*self.pairs(), strict=True)
        self._count = self._end = 0
        for pair in stored:
            self.append(*pair)

    def pairs(self) -> tuple[list[int], list[int]]:
        """All stored x, and all y."""
        return self._xs[: self._count].tolist(), self._ys[: self._count].tolist()
