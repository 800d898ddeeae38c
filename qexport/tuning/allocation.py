"""Which setting each site gets: the least time for a given error at the outputs.

Errors of different sites are nearly orthogonal, so their squares add up at the outputs: with e_s the error of site s alone
and g_s the gain that takes it there, error^2 = sum_s (g_s e_s)^2, while times add up anyway. Choosing one option per site is
then a multiple-choice knapsack (Kellerer, Pferschy, Pisinger 2004, ch. 11). Its linear relaxation is solved by walking the
lower convex hulls of the sites' (error^2, time) points, always taking the step that saves most time per error^2; each state
of the walk is the optimum for its own error. So one measurement of every site gives the whole front, without a search.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from qexport.tuning.settings import Setting


@dataclass(frozen=True)
class Option:
    """A setting of one site with its time (seconds) and its squared relative error at the model's outputs."""

    setting: Setting
    time: float
    error: float


@dataclass(frozen=True)
class State:
    """One option per site, with the sums of their times and squared errors."""

    options: tuple[Option, ...]
    time: float
    error: float


def site_options(
    settings: list[Setting], times: np.ndarray, errors: np.ndarray, gains: np.ndarray, causal: bool
) -> list[Option]:
    """The options of one site: every setting, and within a family the mixtures of budgets over the heads.

    Args:
        times: seconds of each setting.
        errors: (settings, heads): squared error of each head relative to the site's whole squared norm.
        gains: of each setting; see `qexport.tuning.measurement`.
        causal: whether the attention is. One that is not shares a single budget of `tree` out over its heads by itself
            (docs/math.md), and no longer does with one budget per head: what was measured tells nothing of such mixtures.
    """
    options = [
        Option(setting, float(time), float(gain**2 * error.sum()))
        for setting, time, error, gain in zip(settings, times, errors, gains, strict=True)
    ]
    heads = errors.shape[1]
    families = {setting.family for setting in settings if causal or setting.strategy != "tree"} - {None}
    for family in sorted(families) if heads > 1 else []:
        members = [i for i, setting in enumerate(settings) if setting.family == family]
        options += _mixtures([settings[i] for i in members], times[members], errors[members], gains[members])
    return options


def _mixtures(settings: list[Setting], times, errors, gains) -> list[Option]:
    """Budgets head by head. All heads begin with the smallest; again and again the step of one head along the hull of its
    options that lowers the error most per second is taken. A head costs its share of the time of the uniform setting.
    """
    heads = errors.shape[1]
    steps = []
    for head in range(heads):
        points = [Option(s, t / heads, g**2 * e) for s, t, g, e in zip(settings, times, gains, errors[:, head], strict=True)]
        path = hull(points)[::-1]  # from the cheapest to the most accurate
        steps += [((a.error - b.error) / max(b.time - a.time, 1e-12), head, a, b) for a, b in pairwise(path)]
        steps.append((np.inf, head, None, path[0]))
    chosen, found = [None] * heads, []
    for _, head, _, option in sorted(steps, key=lambda step: -step[0]):
        chosen[head] = option
        if None not in chosen:
            budgets = tuple(option.setting.num_samples[0] for option in chosen)
            if len(set(budgets)) > 1:
                setting = replace(settings[0], num_samples=budgets)
                found.append(Option(setting, sum(o.time for o in chosen), sum(o.error for o in chosen)))
    return found


def hull(options: list[Option]) -> list[Option]:
    """The lower convex hull of the options in the plane (error, time): from the most accurate to the fastest one, each step
    saving less time per error than the one before."""
    ordered = sorted(options, key=lambda option: (option.error, option.time))
    path: list[Option] = []
    for option in ordered:
        if path and option.time >= path[-1].time:
            continue  # slower and no more accurate
        while len(path) > 1 and _slope(path[-2], path[-1]) <= _slope(path[-2], option):
            path.pop()
        path.append(option)
    return path


def _slope(a: Option, b: Option) -> float:
    """Time saved per squared error added from a to b."""
    return (a.time - b.time) / max(b.error - a.error, 1e-300)


def front(sites: list[list[Option]]) -> list[State]:
    """The optimal states from the most accurate to the fastest one."""
    paths = [hull(options) for options in sites]
    steps = [(_slope(a, b), s, i + 1) for s, path in enumerate(paths) for i, (a, b) in enumerate(pairwise(path))]
    current = [path[0] for path in paths]
    states = [_state(current)]
    # slopes fall along each hull, so a stable sort keeps the steps of a site in order
    for _, s, i in sorted(steps, key=lambda step: -step[0]):
        current[s] = paths[s][i]
        states.append(_state(current))
    return states


def _state(options) -> State:
    return State(tuple(options), sum(o.time for o in options), sum(o.error for o in options))


def choose(states: list[State], sites: list[list[Option]], max_error: float) -> State:
    """The fastest state found whose squared error is at most max_error^2: of the front, then with the slack spent on single
    sites. The most accurate state where none holds."""
    limit = max_error**2
    within = [state for state in states if state.error <= limit]
    if not within:
        return states[0]
    best = min(within, key=lambda state: state.time)
    while True:
        swaps = [
            (best.options[s].time - option.time, s, option)
            for s, options in enumerate(sites)
            for option in options
            if option.time < best.options[s].time and best.error - best.options[s].error + option.error <= limit
        ]
        if not swaps:
            return best
        _, s, option = max(swaps, key=lambda swap: swap[0])
        best = _state((*best.options[:s], option, *best.options[s + 1 :]))
