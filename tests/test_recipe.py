"""Recipes: defaults from the op table, overrides by glob, and one-line errors that name file, key, value and limit."""

import pytest

from qexport.errors import UsageError
from qexport.ops import QUANTUM_ATTENTION
from qexport.recipe import SAMPLING, Recipe, load_recipe, make_recipe

YAML = """
strategy: adaptive
num_samples: 48
control_variate: false
seed: 7
layers:
  - match: "encoder.layer.0.*"
    strategy: exact
  - match: "*/attention_1"
    num_samples: [8, 16]
"""


@pytest.fixture
def write(tmp_path):
    def make(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return make


def test_defaults_are_the_op_tables():
    for name in SAMPLING:
        default = QUANTUM_ATTENTION.attribute(name).default
        assert Recipe().resolve("", "n")[name] == default


def test_yaml_with_overrides(write):
    recipe = load_recipe(write(YAML))
    assert recipe.seed == 7
    plain = recipe.resolve("encoder.layer.1.self", "x")
    assert plain == {"strategy": "adaptive", "num_samples": (48,), "control_variate": 0}
    assert recipe.resolve("encoder.layer.0.self", "x")["strategy"] == "exact"
    assert recipe.resolve("", "block/attention_1", 2)["num_samples"] == (8, 16)


def test_the_last_match_wins():
    layers = [{"match": "*", "strategy": "naive"}, {"match": "a*", "strategy": "hybrid"}]
    recipe = make_recipe({"layers": layers})
    assert recipe.resolve("abc", "")["strategy"] == "hybrid"
    assert recipe.resolve("xyz", "")["strategy"] == "naive"


def test_arguments_replace_the_recipes_own(write):
    recipe = make_recipe(write(YAML), strategy="hybrid", num_samples=None)
    assert recipe.strategy == "hybrid"
    assert recipe.num_samples == (48,)
    assert recipe.layers[0].strategy == "exact"


def test_dict_round_trip():
    recipe = make_recipe({"num_samples": [4, 8], "layers": [{"match": "a", "control_variate": True}]})
    assert make_recipe(recipe.to_dict()) == recipe
    assert recipe.to_dict()["layers"] == [{"match": "a", "control_variate": 1}]


def test_an_empty_file_is_the_default_recipe(write):
    assert load_recipe(write("")) == Recipe()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("strategy: foo", ["strategy", "foo", "exact, naive, stratified, adaptive, hybrid, tree"]),
        ("num_samples: 0", ["num_samples", "0", "1"]),
        ("num_samples: -3", ["num_samples", "-3"]),
        ("num_samples: many", ["num_samples", "many", "whole number"]),
        ("num_samples: 1.5", ["num_samples", "1.5"]),
        ("num_samples: []", ["num_samples", "[]"]),
        ("control_variate: 2", ["control_variate", "2", "true or false"]),
        ("seed: x", ["seed", "x"]),
        ("seed: 9223372036854775808", ["seed", "9223372036854775808"]),
        ("samples: 3", ["samples", "no such key", "num_samples"]),
        ("layers:\n  - strategy: exact", ["layers[0].match", "missing"]),
        ("layers:\n  - match: a\n    strategy: foo", ["layers[0].strategy", "foo", "stratified"]),
        ("layers:\n  - match: a\n    seed: 3", ["layers[0].seed", "no such key"]),
        ("- a\n- b", ["mapping", "list"]),
        ("strategy: [", ["line", "not YAML"]),
        ("strategy: exact\nstrategy: naive", ["not YAML"]),
    ],
)
def test_errors_are_one_line_with_file_key_and_limit(write, text, words):
    path = write(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in [str(path), *words]:
        assert word in message


def test_a_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.yaml: cannot read the recipe: No such file"):
        load_recipe(tmp_path / "nothing.yaml")


def test_errors_of_arguments_name_no_file(write):
    with pytest.raises(UsageError) as caught:
        make_recipe(write(YAML), num_samples=0)
    assert "recipe.yaml" not in str(caught.value)
    assert "num_samples" in str(caught.value)


def test_a_list_must_fit_the_heads():
    with pytest.raises(UsageError, match=r"num_samples lists 2 numbers, but enc\.0 has 12 query heads"):
        make_recipe({"num_samples": [1, 2]}).resolve("enc.0", "n", 12)


def test_a_match_that_fits_nothing_is_an_error():
    recipe = make_recipe({"layers": [{"match": "decoder.*", "strategy": "exact"}]})
    with pytest.raises(UsageError, match=r"layers\[0\].match: 'decoder.\*' fits no attention site"):
        recipe.check_matches([("encoder.0", "a")])
    recipe.check_matches([("decoder.0", "a")])
