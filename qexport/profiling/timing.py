"""Times of calls that take turns, and what they tell."""

import math
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


def throughput(ms: np.ndarray, batch: int, tokens: int | None) -> dict:
    """Latency, and items and tokens per second, of runs of a batch that took these times."""
    p50, p90, p99 = np.percentile(ms, [50, 90, 99])
    mean = float(ms.mean())
    return {
        "latency_ms": {
            "p50": float(p50),
            "p90": float(p90),
            "p99": float(p99),
            "mean": mean,
            "min": float(ms.min()),
            "max": float(ms.max()),
        },
        "samples_per_second": 1e3 * batch / mean,
        "tokens_per_second": 1e3 * tokens / mean if tokens else None,
    }


def ratio(converted: np.ndarray, classical: np.ndarray) -> dict:
    """Time of the converted model over the classical one: ratio of the medians, and the ratios of the rounds with their
    quartiles and the 95 % confidence interval of their median."""
    rounds = np.sort(converted / classical)
    low, high = median_interval(len(rounds))
    return {
        "of_medians": float(np.median(converted) / np.median(classical)),
        "of_rounds": {f"p{q}": float(np.percentile(rounds, q)) for q in (25, 50, 75)},
        "median_ci95": [float(rounds[low]), float(rounds[high])] if low is not None else None,
    }


def median_interval(count: int) -> tuple[int | None, int | None]:
    """Indices of the order statistics that enclose the median of `count` values with at least 95 % confidence (the binomial
    distribution of how many lie below it); (None, None) for fewer than six."""
    cumulated, below = 0.0, -1
    for k in range(count):
        cumulated += math.exp(math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2))
        if cumulated > 0.025:
            break
        below = k
    return (below, count - 1 - below) if below >= 0 else (None, None)
