"""The allocation of settings to sites: optimal where the knapsack's relaxation is, within its limit, and head by head."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from qexport.knapsack import STEPS, Option, choose, front, hull
from qexport.tuning.allocation import site_options
from qexport.tuning.settings import EXACT, Setting, grid

TREE = Setting("tree", (16,), "bf16")


def random_sites(seed, sites=4, options=5):
    """Sites with an exact option and cheaper ones, errors and times drawn independently."""
    rng = np.random.default_rng(seed)
    return [
        [Option(EXACT, 1.0, 0.0)]
        + [Option(replace(TREE, num_samples=(n + 1,)), *rng.uniform(0, 1, 2)) for n in range(options)]
        for _ in range(sites)
    ]


def totals(sites):
    """(load, cost) of every combination."""
    return [(sum(o.load for o in chosen), sum(o.cost for o in chosen)) for chosen in itertools.product(*sites)]


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_beats_a_state_of_the_front(seed):
    sites = random_sites(seed)
    states = front(sites)
    everything = totals(sites)
    for state in states:
        assert state.cost == pytest.approx(min(time for error, time in everything if error <= state.load + 1e-12))
    assert states[0].load == 0
    assert states[-1].cost == pytest.approx(min(time for _, time in everything))


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_holds_its_limit_and_is_the_optimum_to_a_step(seed):
    """Loads are rounded up to steps, by less than one for each site."""
    sites = random_sites(seed)
    states = front(sites)
    for limit in (0.1, 0.5, 1.0):
        chosen = choose(states, sites, limit)
        assert chosen.load <= limit
        best, rounded = (
            min(time for error, time in totals(sites) if error <= most) for most in (limit, limit * (1 - 4 / STEPS))
        )
        assert best - 1e-12 <= chosen.cost <= rounded + 1e-12


def test_nothing_within_the_limit_is_the_most_accurate_state():
    sites = [[Option(EXACT, 1.0, 0.04), Option(TREE, 0.5, 0.09)]]
    assert choose(front(sites), sites, 0.01).options == (sites[0][0],)


def test_a_hull_drops_what_is_slower_or_lies_above():
    points = [(0.0, 10.0), (1.0, 4.0), (2.0, 3.5), (3.0, 1.0), (4.0, 1.5)]
    options = [Option(EXACT, time, error) for error, time in points]
    assert [(o.load, o.cost) for o in hull(options)] == [(0.0, 10.0), (1.0, 4.0), (3.0, 1.0)]


def test_heads_get_budgets_of_their_own_where_one_needs_more():
    settings = [EXACT, TREE, replace(TREE, num_samples=(64,))]
    times = np.array([10.0, 2.0, 4.0])
    errors = np.array([[0.0, 0.0], [0.5, 0.001], [0.01, 0.0005]])
    options = site_options(settings, times, errors, np.array([1.0, 2.0, 2.0]), causal=True)
    mixed = [o for o in options if len(o.choice.num_samples) > 1]
    assert [o.choice for o in mixed] == [replace(TREE, num_samples=(64, 16))]
    assert mixed[0].cost == pytest.approx(3.0)
    assert mixed[0].load == pytest.approx(4 * 0.011)
    assert mixed[0] in hull(options)
    alone = site_options(settings, times, errors, np.array([1.0, 2.0, 2.0]), causal=False)
    assert [o.choice for o in alone] == settings, "the op shares a single budget out itself"


def test_settings_of_different_kinds_are_not_mixed():
    settings = [EXACT, TREE, replace(TREE, num_samples=(64,), precision="int8"), replace(TREE, error_tolerance=0.1)]
    options = site_options(settings, np.ones(4), np.full((4, 2), 0.1), np.ones(4), causal=True)
    assert [o.choice for o in options] == settings


@pytest.mark.parametrize("keys", [1, 20, 128, 2048])
def test_every_setting_of_the_grid_is_one_that_the_op_takes(keys):
    from qexport.ops import QUANTUM_ATTENTION
    from qexport.recipe import make_recipe

    found = grid(keys, 0.02)
    assert found[0] == EXACT
    assert len(set(found)) == len(found)
    for setting in found:
        QUANTUM_ATTENTION.resolve(setting.attributes())
        recipe = make_recipe(setting.named()).resolve("", "n")
        assert {key: recipe[key] for key in setting.named() if key != "num_samples"} == {
            key: value for key, value in setting.named().items() if key != "num_samples"
        }
        if setting.strategy != "exact":
            assert recipe["num_samples"] == setting.num_samples
        if setting.strategy == "tree" and not setting.error_tolerance:
            assert setting.num_samples[0] < keys
