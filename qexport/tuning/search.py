"""From the measured sites to recipes that were tried: gains, allocation, trials, times."""

import math
import time as clock

import numpy as np

from qexport import runtime
from qexport.knapsack import choose, front
from qexport.recipe import DEFAULT_TOLERANCE, STARTING_BUDGET
from qexport.tuning.allocation import site_options
from qexport.tuning.measurement import SiteTable
from qexport.tuning.settings import EXACT, Setting
from qexport.tuning.trials import TIMED_AT_ONCE, Bench, Candidate

GAIN_FEEDS = 2
# Errors below are rounding: they carry no gain, and settings that err less are the exact one.
ROUNDING = 1e-5
SAME = 1e-5
# The gain is measured with an error near this: above the rounding, and small enough to carry linearly.
GAIN_ERROR = 0.05
# Recipes that are always tried, for comparison and in case the allocation finds nothing better.
UNIFORM = {
    "exact": EXACT,
    "exact, bf16": Setting(precision="bf16"),
    "default recipe": Setting("tree", (STARTING_BUDGET,), "auto", DEFAULT_TOLERANCE),
}
# How near to the wanted error a recipe has to come before the search ends.
CLOSE = 0.8
# Of the classical model's runs, when all recipes are timed, and when the fastest are once more.
TIMING_SECONDS, FINAL_SECONDS = 3.0, 6.0


class Search:
    """One search for the fastest recipe within `max_error`, by measured sites and a bench to try recipes on.

    `deadline` is the time of `time.monotonic` after which no trial begins; the first one always does. `finalists` are the
    fastest recipes within `max_error`, whose times compare with each other.
    """

    def __init__(self, bench: Bench, tables: list[SiteTable], max_error: float, trials: int, say):
        self.bench, self.tables, self.max_error, self.trials, self.say = bench, tables, max_error, trials, say
        self.deadline, self.notes, self.candidates, self.finalists = math.inf, [], [], []

    def run(self) -> list[Candidate]:
        """Try recipes until one is close to the wanted error; all that were tried, timed."""
        self.gains = [self._gains(i) for i in range(len(self.tables))]
        for label, setting in UNIFORM.items():
            self._try(label, (setting,) * len(self.tables))
        options = [
            site_options(*self._kept(table, gains), table.site["causal"])
            for table, gains in zip(self.tables, self.gains, strict=True)
        ]
        states = front(options)
        scale = self._approach(states, options)
        for factor in (0.5, 2.0, 0.25, 4.0):
            self._try_state(choose(states, options, (factor * self.max_error * scale) ** 2))
        self._time()
        return self.candidates

    def _kept(self, table: SiteTable, gains: np.ndarray):
        """The settings that the allocation may use. Settings that err alike to many digits computed the same thing: a
        precision that the processor lacks, a tree that read every key. The first one, the simplest, stands for them all.
        """
        own, kept = table.relative_errors(), [0]
        for i, error in enumerate(own):
            if error > ROUNDING and not any(abs(error - own[k]) <= SAME * error for k in kept):
                kept.append(i)
        errors = table.errors()
        errors[0] = 0
        return [table.settings[i] for i in kept], table.times[kept], errors[kept], gains[kept]

    def _gains(self, index: int) -> np.ndarray:
        """How many times its own error site `index` moves the outputs, for each setting: measured once for settings that
        draw, whose noise averages out behind the site, and once for the others."""
        table = self.tables[index]
        self.say(f"measuring how far the error of attention {index + 1} carries", 0.42 + 0.18 * index / len(self.tables))
        feeds = self.bench.largest_feeds(GAIN_FEEDS)
        own = table.relative_errors(feeds)
        gains = np.ones(len(own))
        for draws in (False, True):
            members = [i for i, s in enumerate(table.settings) if s.draws == draws and np.isfinite(own[i])]
            worth = [i for i in members if own[i] > ROUNDING and table.times[i] < table.times[0]]
            if not worth or clock.monotonic() > self.deadline:
                continue
            chosen = min(worth, key=lambda i: abs(math.log(own[i] / GAIN_ERROR)))
            settings = [EXACT] * len(self.tables)
            settings[index] = table.settings[chosen]
            gains[members] = self.bench.error_of(tuple(settings), feeds) / own[chosen]
        return gains

    def _try(self, label: str, settings: tuple[Setting, ...], predicted: float | None = None) -> Candidate | None:
        """Try a recipe in the whole model; None when it was tried before, or trials or time are used up."""
        if any(settings == c.settings for c in self.candidates):
            return None
        if len(self.candidates) >= self.trials or (self.candidates and clock.monotonic() > self.deadline):
            return None
        done = len(self.candidates)
        self.say(f"trying recipe {done + 1} of {self.trials} at most", 0.6 + 0.25 * done / self.trials)
        candidate = Candidate(label, settings, predicted)
        self.bench.try_error(candidate)
        self.candidates.append(candidate)
        return candidate

    def _try_state(self, state) -> Candidate | None:
        settings = tuple(option.choice for option in state.options)
        return self._try(f"tuned {len(self.candidates) - len(UNIFORM) + 1}", settings, math.sqrt(state.load))

    def _approach(self, states, options) -> float:
        """Allocate for the wanted error, and again with what the last recipe really erred, until one comes close below it.

        Returns:
            How much error the allocation may predict per error wanted.
        """
        low, high, scale = 0.0, math.inf, 1.0
        while True:
            state = choose(states, options, (scale * self.max_error) ** 2)
            tried = self._try_state(state)
            if tried is None or state.load == 0:
                return scale
            if tried.error <= self.max_error:
                low = max(low, scale)
                if tried.error >= CLOSE * self.max_error:
                    return scale
            else:
                high = min(high, scale)
            scale = 0.95 * math.sqrt(state.load) / max(tried.error, 1e-12)
            if not low < scale < high:
                if high == math.inf:  # the allocation used less than it was given: the front ends here
                    return low
                scale = math.sqrt(max(low, high / 16) * high)
            if high < 1.05 * low:
                return low

    def _time(self) -> None:
        """Time the recipes that were tried, but for those whose outputs are no numbers; then the fastest of those that hold
        the wanted error longer and in the same rounds, since groups that ran one after the other compare badly."""
        finite_ones = [c for c in self.candidates if math.isfinite(c.error)]
        self.say(f"timing {len(finite_ones)} recipes", 0.85)
        seconds = _median_seconds(self.bench)
        self.bench.try_time(finite_ones, int(np.clip(TIMING_SECONDS / seconds, 5, 25)))
        within = sorted((c for c in finite_ones if c.error <= self.max_error), key=lambda c: c.ratio["of_rounds"]["p50"])
        self.finalists = within[:TIMED_AT_ONCE]
        if len(within) > 1:
            self.say("timing the fastest ones", 0.93)
            self.bench.try_time(self.finalists, int(np.clip(FINAL_SECONDS / seconds, 9, 49)))


def _median_seconds(bench: Bench) -> float:
    times = []
    for _ in range(3):
        start = clock.perf_counter()
        runtime.run(bench.classical, None, bench.timed)
        times.append(clock.perf_counter() - start)
    return sorted(times)[1]
