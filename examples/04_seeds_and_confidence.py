"""Sampling is repeatable and measurable: the same seed gives the same bits, many seeds give a confidence interval."""

import sys

import numpy as np

import qexport

BUNDLE = sys.argv[1] if len(sys.argv) > 1 else "minilm_bundle"
ids = np.random.default_rng(0).integers(1996, 29000, (1, 64))  # 64 tokens, more than the 8 samples of example 01
values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
classical, sampled = qexport.session(f"{BUNDLE}/classical.onnx"), qexport.session(f"{BUNDLE}/model.onnx")
feeds = {i.name: values[i.name] for i in classical.get_inputs()}
(exact, *_) = classical.run(None, feeds)


def run(seed):
    return sampled.run(None, feeds | {"seed": np.array(seed)})[0]


assert np.array_equal(run(7), run(7))
assert not np.array_equal(run(7), run(8))
errors = [np.linalg.norm(run(seed) - exact) / np.linalg.norm(exact) for seed in range(20)]
half = 2.093 * np.std(errors, ddof=1) / 20**0.5  # Student's t, 19 degrees of freedom, 95 %
print(f"relative error of one draw {np.mean(errors):.3f} +- {half:.3f} (95 %), of the mean of 20 draws ", end="")
print(f"{np.linalg.norm(np.mean([run(s) for s in range(20)], axis=0) - exact) / np.linalg.norm(exact):.3f}")
