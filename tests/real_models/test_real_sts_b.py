"""A task: sentence similarity on the STS-B test split, with all-MiniLM-L6-v2 classical and sampled."""

import numpy as np
import pytest
from real_model_checks import need

import qexport
from bench.common import with_attributes
from bench.models import minilm_dir
from bench.sts_b import PUBLISHED, pairs, spearman, tokenizer
from qexport.runtime import quiet_options

pytestmark = pytest.mark.registry


def test_sampling_costs_less_than_one_percent_of_the_correlation(tmp_path):
    """As converted without a word, at 32 samples, where few sentences are longer, and at 8, where most are; on every third
    pair of the split."""
    need("text2vec")
    bundle = tmp_path / "bundle"
    qexport.convert(minilm_dir(), bundle, strategy="stratified", num_samples=32)
    qexport.convert(bundle / "classical.onnx", tmp_path / "default")
    eight = with_attributes(bundle / "model.onnx", bundle / "eight.onnx", num_samples=[8])
    first, second, scores = pairs("test")
    assert len(scores) == 1379
    first, second, scores = first[::3], second[::3], scores[::3]
    sequences = [encoding.ids for encoding in tokenizer().encode_batch(first + second)]
    assert np.mean([len(sequence) > 8 for sequence in sequences]) > 0.8

    def measure(path, seed=None):
        return spearman(qexport.session(path, options=quiet_options(2)), sequences, scores, seed)

    classical = measure(bundle / "classical.onnx")
    # Of a third of the pairs the correlation is known to about 2 points; python -m bench.sts_b compares all of them.
    assert classical == pytest.approx(PUBLISHED, abs=5)
    assert measure(tmp_path / "default" / "model.onnx", seed=0) > 0.995 * classical
    assert measure(bundle / "model.onnx", seed=0) > 0.99 * classical
    assert measure(eight, seed=0) > 0.99 * classical
