"""Which setting each site gets: the least time for a given error at the outputs.

Errors of different sites are nearly orthogonal, so their squares add up at the outputs: with e_s the error of site s alone
and g_s the gain that takes it there, error^2 = sum_s (g_s e_s)^2, while times add up anyway. So
one measurement of every site gives the whole front of recipes (`qexport.knapsack`), without a search.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np

from qexport.knapsack import Option, hull
from qexport.tuning.settings import Setting


def site_options(
    settings: list[Setting], times: np.ndarray, errors: np.ndarray, gains: np.ndarray, causal: bool
) -> list[Option]:
    """The options of one site, time under a limit of the squared error at the outputs: every setting, and within a family
    the mixtures of budgets over the heads.

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
        steps += [((a.load - b.load) / max(b.cost - a.cost, 1e-12), head, a, b) for a, b in pairwise(path)]
        steps.append((np.inf, head, None, path[0]))
    chosen, found = [None] * heads, []
    for _, head, _, option in sorted(steps, key=lambda step: -step[0]):
        chosen[head] = option
        if None not in chosen:
            budgets = tuple(option.choice.num_samples[0] for option in chosen)
            if len(set(budgets)) > 1:
                setting = replace(settings[0], num_samples=budgets)
                found.append(Option(setting, sum(o.cost for o in chosen), sum(o.load for o in chosen)))
    return found
