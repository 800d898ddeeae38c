"""One option for each of several places: the least cost under a limit, and the whole front of such choices at once.

A multiple-choice knapsack (Kellerer, Pferschy, Pisinger 2004, ch. 11). Its linear relaxation is solved by walking the lower
convex hulls of the places' (load, cost) points, always taking the step that saves most cost per load; each state of the walk
is the optimum for its own load. Between two of them dynamic programming finds what fits a limit best.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

# Steps of the limit in which loads are counted.
STEPS = 1 << 13


@dataclass(frozen=True)
class Option:
    """A choice for one place, with the cost that is to be small and the load that is limited; both add up."""

    choice: Any
    cost: float
    load: float


@dataclass(frozen=True)
class State:
    """One option per place, with the sums of their costs and loads."""

    options: tuple[Option, ...]
    cost: float
    load: float


def hull(options: list[Option]) -> list[Option]:
    """The lower convex hull of the options in the plane (load, cost): from the least load to the least cost, each step
    saving less cost per load than the one before."""
    ordered = sorted(options, key=lambda option: (option.load, option.cost))
    path: list[Option] = []
    for option in ordered:
        if path and option.cost >= path[-1].cost:
            continue  # dearer and no lighter
        while len(path) > 1 and _slope(path[-2], path[-1]) <= _slope(path[-2], option):
            path.pop()
        path.append(option)
    return path


def _slope(a: Option, b: Option) -> float:
    """Cost saved per load added from a to b."""
    return (a.cost - b.cost) / max(b.load - a.load, 1e-300)


def front(places: list[list[Option]]) -> list[State]:
    """The optimal states from the lightest to the cheapest one."""
    paths = [hull(options) for options in places]
    steps = [(_slope(a, b), p, i + 1) for p, path in enumerate(paths) for i, (a, b) in enumerate(pairwise(path))]
    current = [path[0] for path in paths]
    states = [_state(current)]
    # slopes fall along each hull, so a stable sort keeps the steps of a place in order
    for _, p, i in sorted(steps, key=lambda step: -step[0]):
        current[p] = paths[p][i]
        states.append(_state(current))
    return states


def last_within(states: list[State], holds) -> State | None:
    """The last state for which `holds(state)` where it holds up to there, found by halving; None where not even the first
    does."""
    best, low, high = None, 0, len(states) - 1
    while low <= high:
        middle = (low + high + 1) // 2 if best else low
        if holds(states[middle]):
            best, low = states[middle], middle + 1
        elif best is None:
            return None
        else:
            high = middle - 1
    return best


def _state(options) -> State:
    return State(tuple(options), sum(o.cost for o in options), sum(o.load for o in options))


def choose(states: list[State], places: list[list[Option]], limit: float) -> State:
    """The cheapest state found whose load is at most `limit`: of the front, or by dynamic programming over loads in steps of
    limit / STEPS, rounded up. The lightest state where none holds."""
    within = [state for state in states if state.load <= limit]
    if not within:
        return states[0]
    best = min(within, key=lambda state: state.cost)
    if limit <= 0:
        return best
    costs, picks = np.zeros(STEPS + 1), []  # the least cost of the places so far within each load
    for options in places:
        reached, pick = np.full(STEPS + 1, np.inf), np.zeros(STEPS + 1, np.int32)
        for number, option in enumerate(options):
            steps = math.ceil(max(option.load, 0) / limit * STEPS)
            if steps <= STEPS:
                cost = costs[: STEPS + 1 - steps] + option.cost
                better = cost < reached[steps:]
                reached[steps:][better], pick[steps:][better] = cost[better], number
        costs, picks = reached, [*picks, pick]
    if not costs[-1] < best.cost:
        return best
    chosen, room = [], STEPS
    for options, pick in zip(reversed(places), reversed(picks), strict=True):
        chosen.append(options[pick[room]])
        room -= math.ceil(max(chosen[-1].load, 0) / limit * STEPS)
    return _state(chosen[::-1])
