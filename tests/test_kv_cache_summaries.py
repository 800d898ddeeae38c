"""Strategy tree with a KV cache: steps read summaries of the cache, which the caller keeps beside it."""

import numpy as np
import pytest
from test_kv_cache import export, random_model

import qexport
from qexport.conversion import convert
from qexport.errors import QexportError
from qexport.generation import Generator
from qexport.ops.key_summary import CLUSTER_KEYS, fields


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """An .onnx file of a random Llama without a cache: exported once, converted often."""
    folder = tmp_path_factory.mktemp("decoder")
    random_model("Llama", max_position_embeddings=4096).save_pretrained(folder)
    return export(folder, folder / "decoder.onnx")


@pytest.fixture(scope="module")
def summarised(decoder, tmp_path_factory):
    """(folder of exact, folder of tree with 64 keys) of a model with a cache of 1600 tokens: three chunks."""
    folder = tmp_path_factory.mktemp("summaries")
    convert(decoder, folder / "exact", kv_cache=1600, strategy="exact")
    convert(decoder, folder / "tree", kv_cache=1600, strategy="tree", num_samples=64)
    return folder / "exact", folder / "tree"


def difference(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_tree_decodes_from_a_summary(summarised):
    """Rows of different lengths, one of which is filled up over the end of a chunk before it gets there itself."""
    exact, tree = (Generator(folder) for folder in summarised)
    assert tree.caches["past_key_values.1.summary"].numpy().shape[:3] == (1, 2, 3)
    fallback = Generator(summarised[1], library=False)
    rng = np.random.default_rng(3)
    for generator in (exact, tree, fallback):
        generator.reset(2)
    counts = [(1100, 500), (1, 1), (100, 20), (30, 60), (1, 1)]
    for pair in counts:
        pieces = [rng.integers(3, 99, count).tolist() for count in pair]
        expected, got, classical = (generator.append(pieces) for generator in (exact, tree, fallback))
        assert difference(classical, expected) < 1e-5
        if pair == (1, 1):
            assert 1e-6 < difference(got, expected) < 0.05
    kept = tree.caches["past_key_values.0.summary"].numpy()
    sizes = [tree.caches[f"past_key_values.0.{kind}"].numpy().shape[-1] for kind in ("key", "value")]
    marks = fields(kept, *sizes)["keys"]
    assert (marks[0, :, :2] == CLUSTER_KEYS).all()
    assert not marks[:, :, 2].any(), "no row has a third chunk"


def test_summaries_of_an_earlier_text_are_not_read(summarised):
    tree, rng = Generator(summarised[1]), np.random.default_rng(4)
    texts = [rng.integers(3, 99, 1200).tolist() for _ in range(2)]
    alone = tree.append([texts[1]]), tree.append([[7]])
    for text in texts:
        tree.reset()
        again = tree.append([text]), tree.append([[7]])
    for one, other in zip(alone, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_validate_and_profile_with_summaries(summarised):
    report = qexport.validate(summarised[1], seeds=1, max_error=0.1)
    assert report.passed, report.reasons
    assert qexport.profile(summarised[1], seq=1, runs=2, warmup=1).sizes[0]["ratio"]["of_medians"] > 0
    with pytest.raises(
        QexportError, match="its steps read summaries of the cache, which cannot be measured under other settings"
    ):
        qexport.tune(summarised[1], max_error=0.1)


def test_which_recipes_and_models_have_summaries(decoder, tmp_path):
    random_model("Mistral", max_position_embeddings=1024).save_pretrained(tmp_path)
    window = export(tmp_path, tmp_path / "window.onnx")
    cases = [
        (decoder, 640, {}, 0),
        (decoder, 300, {"num_samples": 64}, 0),
        (window, 640, {"num_samples": 64}, 0),
        (decoder, 4096, {"error_tolerance": 0.1}, 2),  # from 4000 keys on
        (decoder, 4096, {"error_tolerance": 0.09}, 0),  # 4000 keys / 0.9^2
    ]
    for model, length, options, layers in cases:
        report = convert(model, None, kv_cache=length, dry_run=True, **options)
        assert len(report.manifest["kv_cache"]["summaries"]) == layers, (model.name, length, options)
