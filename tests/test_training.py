"""Training with sampled attention: the program of examples/08_train_with_sampling.py on texts that are made here."""

import numpy as np
import pytest
import torch

from bench.training import ATTENTIONS, example, table
from qexport.nn import QuantumMultiheadAttention, exact_attention

LENGTH, WORDS = 24, 50


@pytest.fixture(scope="module")
def made():
    """Word vectors, and 320 texts of random words with whether most of them are of the first half of the words."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (320, LENGTH), generator=generator)
    vectors = torch.randn(WORDS, 32, generator=generator)
    return vectors, ids, (ids < WORDS // 2).float().mean(1).gt(0.5).float()


def recipe(samples):
    return example.RECIPE | {"num_samples": samples}


def test_loss_falls_and_what_is_learnt_is_sampled(made):
    vectors, ids, positive = made
    model, losses = example.train(0, vectors, ids, positive, recipe(4), epochs=6)
    assert np.mean(losses[-8:]) < 0.7 * np.mean(losses[:8])
    assert example.accuracy(model, ids, positive) > 0.8
    modules = [m for m in model.modules() if isinstance(m, QuantumMultiheadAttention)]
    assert len(modules) == 2
    with torch.no_grad():
        drawn = model(ids)
        assert torch.equal(drawn, model(ids))
        with exact_attention():
            exact = model(ids)
    assert (drawn - exact).norm() > 0.02 * exact.norm()


def test_as_many_samples_as_keys_train_as_classical_attention_does(made):
    classical, losses = example.train(1, *made, epochs=2)
    assert not any(isinstance(m, QuantumMultiheadAttention) for m in classical.modules())
    _, all_read = example.train(1, *made, recipe(LENGTH), epochs=2)
    _, few_read = example.train(1, *made, recipe(4), epochs=2)
    assert losses[0] == pytest.approx(all_read[0], rel=1e-5)
    np.testing.assert_allclose(all_read, losses, rtol=1e-2)
    assert np.abs(np.array(few_read) / losses - 1).max() > 1e-2


def test_table_pairs_the_seeds():
    found = {name: np.array([80.0, 90.0]) - (recipe is not None) for name, recipe in ATTENTIONS.items()}
    times = {name: np.array([1.0, 2.0]) * (1 + (recipe is not None)) for name, recipe in ATTENTIONS.items()}
    classical, *_, sampled = table(found, times)
    assert classical["loss_percent"] == classical["loss_ci95"] == 0
    assert sampled["loss_percent"] == pytest.approx(100 / 85)
    assert sampled["loss_ci95"] == pytest.approx(0, abs=1e-9)
    assert sampled["ci95"] > 1
    assert (sampled["read_percent"], sampled["x_classical"]) == (12.5, 2)
