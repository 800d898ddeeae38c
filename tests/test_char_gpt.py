"""The character-level language model of bench.char_gpt on texts that are made here: nothing is downloaded."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import qexport
from bench import char_gpt, data
from bench.char_gpt import CONFIG, CharGPT, encode, nats_per_character, text_windows, trained, vocabulary, windows
from qexport.errors import QexportError

TEXT = "the cat sat on the mat. the dog ate the cake. " * 100
SMALL = replace(CONFIG, vocabulary=20, context=32, layers=2, heads=2, width=32, steps=20, warmup=5)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """WikiText-2 replaced by TEXT, and an empty cache; counts the texts that are read."""
    read = []
    monkeypatch.setattr(char_gpt, "wikitext", lambda split: read.append(split) or TEXT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return read


def test_vocabulary_is_the_most_frequent_characters():
    assert vocabulary("aabbbcd", 3) == "ba"
    np.testing.assert_array_equal(encode("abc☉", "ba"), [2, 1, 0, 0])
    assert encode("abc☉", "ba").dtype == np.int64


def test_every_id_but_the_first_is_a_target_once():
    rows = windows(np.arange(12), 4)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]])
    np.testing.assert_array_equal(windows(np.arange(13), 4)[:, 1:].ravel(), np.arange(1, 13))
    assert len(windows(np.arange(5), 4)) == 1
    with pytest.raises(QexportError, match="4 characters is less than one window of 5"):
        windows(np.arange(4), 4)


def test_a_split_that_is_not_there():
    with pytest.raises(QexportError, match="no split 'validation': use train, valid or test"):
        data.wikitext("validation")


def test_untrained_model_guesses_uniformly_and_does_not_see_what_comes():
    torch.manual_seed(0)
    model = CharGPT(CONFIG).eval()
    ids = torch.randint(CONFIG.vocabulary, (2, CONFIG.context))
    with torch.no_grad():
        logits = model(ids)
        changed = model(torch.cat([ids[:, :100], ids[:, 100:].flip(1)], 1))
    assert logits.shape == (2, CONFIG.context, CONFIG.vocabulary)
    torch.testing.assert_close(changed[:, :100], logits[:, :100])
    assert (changed[:, 100:] - logits[:, 100:]).abs().max() > 0.01
    # A logit is 0.02 N(0, 1) times a normalised vector of `width`: variance s² = 0.0004 width. The mean cross-entropy is
    # log(vocabulary) + s²/2, within what 512 targets vary by.
    variance = 0.02**2 * CONFIG.width
    rows = torch.cat([ids, torch.randint(CONFIG.vocabulary, (2, 1))], 1).numpy()
    nats = nats_per_character(model, rows)
    assert abs(nats - math.log(CONFIG.vocabulary) - variance / 2) < 5 * (variance / rows[:, 1:].size) ** 0.5


def test_nats_are_the_mean_over_all_targets():
    """A model that gives the next id e times the weight of the others, on rows that do not fill the last batch."""
    rows = windows(np.arange(50) % 7, 7)

    def predict(ids):
        return torch.nn.functional.one_hot((ids + (ids < 6)) % 7, 7)

    right = rows[:, 1:] == rows[:, :-1] + 1
    expected = math.log(6 + math.e) - right.mean()
    assert nats_per_character(predict, rows, batch=2) == pytest.approx(expected, rel=1e-6)


def test_loss_falls_and_the_seed_decides():
    ids = encode(TEXT, vocabulary(TEXT, SMALL.vocabulary))
    model, losses = char_gpt.train(SMALL, ids)
    assert len(losses) == SMALL.steps
    assert losses[0] == pytest.approx(math.log(SMALL.vocabulary), abs=0.1)
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    assert nats_per_character(model, windows(ids, SMALL.context)) < 0.9 * losses[0]
    assert char_gpt.train(SMALL, ids)[1] == losses
    assert char_gpt.train(replace(SMALL, seed=1), ids)[1] != losses


def test_trained_once_per_configuration(texts):
    first, characters, minutes = trained(SMALL)
    assert texts == ["train"]
    again, *same = trained(SMALL)
    assert texts == ["train"]
    assert same == [characters, minutes]
    assert minutes > 0
    rows = text_windows("valid", characters, SMALL.context)
    assert nats_per_character(again, rows) == nats_per_character(first, rows)
    other, *_ = trained(replace(SMALL, seed=1))
    assert nats_per_character(other, rows) != nats_per_character(first, rows)
    assert texts == ["train", "valid", "train"]


def test_convert_samples_every_attention(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(char_gpt, "CONFIG", replace(SMALL, context=128, steps=1))
    report = qexport.convert("bench.char_gpt:char_gpt", tmp_path / "bundle")
    assert (len(report.sites), report.left_alone) == (SMALL.layers, [])
