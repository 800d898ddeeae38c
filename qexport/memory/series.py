"""Readings in a fixed amount of memory, so that whoever watches memory does not grow himself."""

from array import array


class Series:
    """Pairs (x, y) of whole numbers in the order they come. Where more come than fit, neighbours are merged into one: every
    stored pair stands for `stride` readings, with the last x and the least (or with `merge=max` the largest) y of them.

    Args:
        capacity: pairs that fit, an even number; 16 bytes each, taken at once.
        merge: what becomes of the y of neighbours.
    """

    def __init__(self, capacity: int = 2048, merge=min):
        self._xs, self._ys = array("q", bytes(8 * capacity)), array("q", bytes(8 * capacity))
        self._merge, self._count, self._filling, self._y = merge, 0, 0, 0
        self.stride = 1

    def append(self, x: int, y: int) -> None:
        """One more reading."""
        self._y = self._merge(self._y, y) if self._filling else y
        self._filling += 1
        if self._filling < self.stride:
            return
        self._xs[self._count], self._ys[self._count] = x, self._y
        self._count, self._filling = self._count + 1, 0
        if self._count == len(self._xs):
            self._halve()

    def _halve(self) -> None:
        self._count //= 2
        for i in range(self._count):
            self._xs[i] = self._xs[2 * i + 1]
            self._ys[i] = self._merge(self._ys[2 * i], self._ys[2 * i + 1])
        self.stride *= 2

    def pairs(self) -> tuple[list[int], list[int]]:
        """All stored x, and all y."""
        return self._xs[: self._count].tolist(), self._ys[: self._count].tolist()
