"""One option for each of several places: the least cost under a limit, and the whole front of such choices at once.

A multiple-choice knapsack (Kellerer, Pferschy, Pisinger 2004, ch. 11). Its linear relaxation is solved by walking the lower
convex hulls of the places' (load, cost) points, always taking the step that saves most cost per load; each state of the walk
is the optimum for its own load.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any


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


def _state(options) -> State:
    return State(tuple(options), sum(o.cost for o in options), sum(o.load for o in options))


def choose(states: list[State], places: list[list[Option]], limit: float) -> State:
    """The cheapest state found whose load is at most `limit`: of the front, then with the slack spent on single places. The
    lightest state where none holds."""
    within = [state for state in states if state.load <= limit]
    if not within:
        return states[0]
    best = min(within, key=lambda state: state.cost)
    while True:
        swaps = [
            (best.options[p].cost - option.cost, p, option)
            for p, options in enumerate(places)
            for option in options
            if option.cost < best.options[p].cost and best.load - best.options[p].load + option.load <= limit
        ]
        if not swaps:
            return best
        _, p, option = max(swaps, key=lambda swap: swap[0])
        best = _state((*best.options[:p], option, *best.options[p + 1 :]))
