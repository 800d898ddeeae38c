"""Training with sampled attention: accuracy and time of the classifier of examples/08_train_with_sampling.py.

    python -m bench.training [--seeds 8] [--reviews 4000] [--judged 4000] [--json FILE]

Per seed one classifier for each attention, from the same weights on the same batches of film reviews; it is judged on
reviews that none has seen, with the attention that it was trained with. `read_percent` is the mean share of the keys that a
query reads. `loss_percent` is relative to the classical accuracy, the mean of the seeds' paired differences with its
interval. `step_ms`: one training step, the median; `x_classical` how many times the classical step. Both in the processor's
time, on one thread.
"""

import runpy
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from bench import common
from qexport.profiling.timing import interleaved

EXAMPLE = Path(__file__).parents[1] / "examples" / "08_train_with_sampling.py"
example = SimpleNamespace(**runpy.run_path(str(EXAMPLE)))
ATTENTIONS = {"classical": None}
ATTENTIONS |= {f"adaptive, {samples} samples": example.RECIPE | {"num_samples": samples} for samples in (32, 16)}
STEPS = 8  # that a call which is timed takes


def accuracies(seeds: range, vectors, known, new) -> dict[str, np.ndarray]:
    """Accuracy in percent of each attention, one per seed."""
    found = {name: [] for name in ATTENTIONS}
    for seed in seeds:
        for name, recipe in ATTENTIONS.items():
            model, _ = example.train(seed, vectors, *known, recipe)
            found[name].append(100 * example.accuracy(model, *new))
    return {name: np.array(values) for name, values in found.items()}


def step_times(vectors, known) -> dict[str, np.ndarray]:
    """Milliseconds of a training step of each attention, one per round."""
    few = [x[: STEPS * example.BATCH] for x in known]
    calls = {name: lambda r=recipe: example.train(0, vectors, *few, r, epochs=1) for name, recipe in ATTENTIONS.items()}
    times = interleaved(calls, least=5, clock=time.process_time)
    return {name: values / STEPS for name, values in times.items()}


def table(found: dict[str, np.ndarray], times: dict[str, np.ndarray]) -> list[dict]:
    rows = []
    for name, recipe in ATTENTIONS.items():
        mean, ci95 = common.mean_interval(found[name])
        loss, loss_ci95 = common.mean_interval(100 * (found["classical"] - found[name]) / found["classical"].mean())
        rows.append(
            {
                "attention": name,
                "read_percent": 100 * (recipe["num_samples"] if recipe else example.LENGTH) / example.LENGTH,
                "accuracy_percent": mean,
                "ci95": ci95,
                "loss_percent": loss,
                "loss_ci95": loss_ci95,
                "step_ms": float(np.median(times[name])),
                "x_classical": float(np.median(times[name] / times["classical"])),
            }
        )
    return rows


def main():
    arguments = common.parser(__doc__.split("\n")[0], seeds=8, reviews=4000, judged=4000).parse_args()
    torch.set_num_threads(arguments.threads)
    vectors, known, new = example.data(arguments.reviews, arguments.judged)
    times = step_times(vectors, known)
    rows = table(accuracies(range(arguments.seeds), vectors, known, new), times)
    parameters = {
        "reviews": arguments.reviews,
        "judged": arguments.judged,
        "tokens": example.LENGTH,
        "batch": example.BATCH,
        "seeds": arguments.seeds,
    }
    common.report("training", arguments.threads, parameters, {"training": rows}, arguments.json)


if __name__ == "__main__":
    main()
