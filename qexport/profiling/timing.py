"""Times of calls that take turns."""

import time

import numpy as np


def interleaved(
    calls: dict, least: int = 5, seconds: float = 0.0, warmup: int = 1, clock=time.perf_counter, stopwatch=None
) -> dict:
    """Times of each call in milliseconds, one array per name: `least` rounds and more until `seconds` have passed.

    A round runs every call once, in turn, so that a slow spell of the machine hits them alike, and the next round begins
    with the next call, so that nobody is always the first. Of three calls or more none follows itself, and finds what it
    reads in the processor's caches no more than others do. `warmup` rounds come first and are not timed.
    `stopwatch` runs a call and returns its milliseconds, where `clock` cannot tell them: work that a device does later.
    """

    def by_clock(call) -> float:
        start = clock()
        call()
        return 1e3 * (clock() - start)

    measure = stopwatch or by_clock
    order, times = list(calls), {name: [] for name in calls}
    for _ in range(warmup):
        for call in calls.values():
            call()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        first = rounds % len(order) if order else 0
        for name in order[first:] + order[:first]:
            times[name].append(measure(calls[name]))
        rounds += 1
    return {name: np.array(values) for name, values in times.items()}
