"""The key `compress` of a recipe, and arguments beside it: what wins, and errors that name file, key and value."""

import pytest

from qexport.compression.settings import MAX_DROP, resolve
from qexport.errors import UsageError
from qexport.recipe import make_recipe
from qexport.recipe_compression import METHODS


def settings(recipe=None, **arguments):
    return resolve(recipe, **arguments)[1]


def write(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_nothing_named_is_the_default_drop_with_all_methods():
    found = settings()
    assert (found.ratio, found.max_drop, found.methods, found.heal) == (None, MAX_DROP, METHODS, 0)
    assert settings({"compress": {}}) == found
    assert resolve(None)[0] is None  # attention stays as it is


def test_arguments_win_and_a_goal_replaces_the_other(tmp_path):
    path = write(tmp_path, "compress: {ratio: 6, methods: [int8], heal: 5}")
    assert settings(path) == settings(path, ratio=None, max_drop=None)
    found = settings(path, max_drop=0.02, methods="int4,fp16", heal=7)
    assert (found.ratio, found.max_drop, found.methods, found.heal) == (None, 0.02, ("fp16", "int4"), 7)
    assert settings(path, ratio=3).ratio == 3
    assert settings({"compress": {"max_drop": 0.1}}, ratio=3).max_drop is None
    both = settings({"compress": {"ratio": 3, "max_drop": 0.1, "products": "int8"}}, ratio=4)  # which may have both
    assert (both.ratio, both.max_drop) == (4, 0.1)
    one = settings({"compress": {"ratio": 3, "max_drop": 0.1, "products": "int8"}}, ratio=4, products="float")
    assert (one.ratio, one.max_drop) == (4, None)


def test_a_recipe_samples_attention_where_it_says_how():
    sampling, found = resolve({"strategy": "stratified", "num_samples": 8, "compress": {"ratio": 4}})
    assert (sampling.strategy, found.ratio) == ("stratified", 4)
    layers = {"layers": [{"match": "a", "strategy": "exact"}]}
    assert resolve(layers)[0].layers[0].strategy == "exact"
    assert resolve({"seed": 3, "compress": {"ratio": 4}})[0] is None


def test_the_last_layer_that_fits_wins():
    layers = [{"match": "*", "methods": ["int8"]}, {"match": "enc.*", "methods": ["int4"]}, {"match": "up", "methods": []}]
    found = settings({"compress": {"layers": layers}})
    assert found.methods_of("enc.0", "w") == ("int4",)
    assert found.methods_of("dec", "w") == ("int8",)
    assert found.methods_of("dec", "up") == ()
    assert settings().methods_of("dec", "up") == METHODS


def test_products_of_whole_numbers_leave_room_for_both_goals():
    assert settings().products == "float"
    found = settings({"compress": {"products": "int8", "max_drop": 0.1, "ratio": 3}})
    assert (found.products, found.ratio, found.max_drop) == ("int8", 3.0, 0.1)
    assert settings(ratio=3, max_drop=0.1, products="int8") == found
    with pytest.raises(UsageError, match=r"ratio and max_drop exclude each other"):
        settings({"compress": {"products": "int8"}}, ratio=3, max_drop=0.1, products="float")


def test_round_trip():
    recipe = make_recipe({"compress": {"ratio": 4, "methods": "int4", "layers": [{"match": "a", "methods": ["fp16"]}]}})
    assert make_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ratio: 1", ["compress.ratio", "above 1", "got 1"]),
        ("ratio: 0.5", ["compress.ratio", "got 0.5"]),
        ("ratio: -8", ["compress.ratio", "got -8"]),
        ("ratio: .nan", ["compress.ratio", "got nan"]),
        ("ratio: .inf", ["compress.ratio", "got inf"]),
        ("ratio: true", ["compress.ratio", "got True"]),
        ("ratio: eight", ["compress.ratio", "got 'eight'"]),
        ("ratio: [2]", ["compress.ratio", "got [2]"]),
        ("max_drop: 0", ["compress.max_drop", "between 0 and 1", "got 0"]),
        ("max_drop: 1", ["compress.max_drop", "got 1"]),
        ("max_drop: -0.1", ["compress.max_drop", "got -0.1"]),
        ("max_drop: .nan", ["compress.max_drop", "got nan"]),
        ("max_drop: 1 %", ["compress.max_drop", "got '1 %'", "0.01 for 1 %"]),
        ("methods: int3", ["compress.methods", "fp16, int8, trellis, int4, low-rank", "'int3'"]),
        ("methods: [int8, [int4]]", ["compress.methods", "int4"]),
        ("methods: 8", ["compress.methods", "got 8"]),
        ("products: int4", ["compress.products", "must be float or int8, got 'int4'"]),
        ("products: [int8]", ["compress.products", "got ['int8']"]),
        ("heal: -1", ["compress.heal", ">= 0", "got -1"]),
        ("heal: 1.5", ["compress.heal", "got 1.5"]),
        ("heal: true", ["compress.heal", "got True"]),
        ("size: 3", ["compress.size", "no such key", "max_drop"]),
        ("layers: [{match: a}]", ["compress.layers[0].methods", "missing"]),
        ("layers: [{methods: [int8]}]", ["compress.layers[0].match", "missing"]),
        ("layers: [{match: a, methods: [int5]}]", ["compress.layers[0].methods", "int5"]),
        ("layers: [{match: '', methods: [int8]}]", ["compress.layers[0].match"]),
        ("layers: [{match: a, methods: [int8], ratio: 3}]", ["compress.layers[0].ratio", "no such key", "methods"]),
        ("ratio: 3\n  max_drop: 0.1", ["compress: ratio and max_drop exclude", "got 3 and 0.1"]),
    ],
)
def test_errors_are_one_line_with_file_key_and_value(tmp_path, text, words):
    path = write(tmp_path, f"compress:\n  {text}\n")
    with pytest.raises(UsageError) as caught:
        resolve(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in [str(path), *words]:
        assert word in message


@pytest.mark.parametrize("text", ["compress: 3", "compress: [int8]", "compress: int8"])
def test_compress_is_a_mapping(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(UsageError, match=r"compress: .*got") as caught:
        resolve(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, r"compress.ratio: must be a number above 1.*, got 1\.0"),
        ({"ratio": float("nan")}, r"compress.ratio: .*, got nan"),
        ({"max_drop": 1.0}, r"compress.max_drop: must lie between 0 and 1.*, got 1\.0"),
        ({"ratio": 3.0, "max_drop": 0.1}, r"ratio and max_drop exclude each other"),
        ({"methods": "int8,"}, r"compress.methods: must be a list of .*, got 'int8,'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        resolve({"compress": {"methods": ["int4"]}}, **arguments)
