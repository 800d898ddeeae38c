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
        self._merge, self._count, self._first = merge, 0, 0
        self.stride = 1

    def append(self, x: int, y: int) -> None:
        """One more reading."""
        if self._count == 0:
            self._first = x
        if not self._put(x, y):
            while (x - self._first) // self.stride >= len(self._xs):
                self.stride *= 2
            stored = zip(*self.pairs(), strict=True)
            self._count = 0
            for pair in stored:
                self._put(*pair)
            self._put(x, y)

    def _put(self, x: int, y: int) -> bool:
        """Whether there was room."""
        last = self._count - 1
        if last >= 0 and (x - self._first) // self.stride == (self._xs[last] - self._first) // self.stride:
            self._xs[last], self._ys[last] = x, self._merge(self._ys[last], y)
            return True
        if self._count == len(self._xs):
            return False
        self._xs[self._count], self._ys[self._count] = x, y
        self._count += 1
        return True

    def pairs(self) -> tuple[list[int], list[int]]:
        """All stored x, and all y."""
        return self._xs[: self._count].tolist(), self._ys[: self._count].tolist()
