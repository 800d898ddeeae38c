"""Names and numbers as the reports write them."""

import pytest

from qexport.words import percent, recipe_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not finite"),
        (0, "0"),
        (-0.0014, "-0.14 %"),
        (3.2e-7, "3.2e-07"),
        (0.041, "4.1 %"),
        (0.994, "99 %"),
        (0.999, "100 %"),
        (1.9, "190 %"),
    ],
)
def test_percent(value, text):
    assert percent(value) == text


@pytest.mark.parametrize(
    ("site", "text"),
    [
        ({"strategy": "tree", "num_samples": [1]}, "tree, 1 key"),
        ({"strategy": "tree", "num_samples": [64]}, "tree, 64 keys"),
        ({"strategy": "naive", "num_samples": [1, 1]}, "naive, 1 sample"),
        ({"strategy": "naive", "num_samples": [1, 8]}, "naive, 1 to 8 samples"),
    ],
)
def test_recipe_text(site, text):
    assert recipe_text(**site) == text
