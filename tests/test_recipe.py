"""Recipes: defaults by strategy, overrides by glob, and one-line errors that name file, key, value and limit."""

import pytest

from qexport.errors import QexportError, UsageError
from qexport.ops import QUANTUM_ATTENTION, QUANTUM_MEASURE
from qexport.ops.strategies import STRATEGIES
from qexport.recipe import Recipe, load_recipe, make_recipe

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


def resolved(**recipe):
    return make_recipe(recipe).resolve("encoder.0", "n")


def test_nothing_named_is_the_tree_with_a_tolerance():
    values = resolved()
    assert (values["strategy"], values["precision"], values["error_tolerance"]) == ("tree", "auto", 0.01)
    assert values == resolved(strategy="tree")
    assert Recipe().to_dict() == {"seed": 0, "layers": []}


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "tree"])
def test_other_strategies_have_the_op_tables_defaults(strategy):
    for name, value in resolved(strategy=strategy).items():
        default = QUANTUM_ATTENTION.attribute(name).default
        assert value == (strategy if name == "strategy" else default)


def test_a_named_budget_is_taken_at_its_word():
    assert resolved(num_samples=48)["error_tolerance"] == 0
    assert resolved(num_samples=48)["strategy"] == "tree"
    both = resolved(num_samples=48, error_tolerance=0.05)
    assert (both["num_samples"], both["error_tolerance"]) == ((48,), 0.05)
    assert resolved(error_tolerance=0)["error_tolerance"] == 0


def test_a_layer_inherits_what_its_strategy_takes():
    layers = [
        {"match": "draws", "strategy": "stratified"},
        {"match": "dense", "strategy": "exact"},
        {"match": "tight", "error_tolerance": 0.001},
    ]
    recipe = make_recipe({"precision": "int8", "error_tolerance": 0.1, "num_samples": 16, "layers": layers})
    keys = ("strategy", "num_samples", "precision", "error_tolerance")
    found = {name: tuple(recipe.resolve(name, "")[key] for key in keys) for name in ("draws", "dense", "tight", "other")}
    assert found == {
        "draws": ("stratified", (16,), "fp32", 0.0),
        "dense": ("exact", (32,), "int8", 0.0),
        "tight": ("tree", (16,), "int8", 0.001),
        "other": ("tree", (16,), "int8", 0.1),
    }


def test_an_argument_that_names_a_strategy_drops_what_it_does_not_take(write):
    recipe = make_recipe(write("precision: bf16\nerror_tolerance: 0.1"), strategy="naive")
    assert recipe.resolve("", "n")["precision"] == "fp32"
    budget = write("num_samples: 4")
    assert make_recipe(budget, strategy="exact").resolve("", "n")["num_samples"] == (32,)
    with pytest.raises(UsageError, match=r"^convert: num_samples needs .*, got exact"):
        make_recipe(budget, strategy="exact", num_samples=4)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"strategy": "stratified", "error_tolerance": 0.1}, ["recipe: error_tolerance", "tree", "stratified"]),
        ({"strategy": "exact", "error_tolerance": 0.1}, ["recipe: error_tolerance", "tree", "exact"]),
        ({"strategy": "naive", "precision": "bf16"}, ["recipe: precision", "naive", "bf16"]),
        ({"layers": [{"match": "a*", "strategy": "hybrid", "precision": "int8"}]}, ["layers[0] (a*): precision", "hybrid"]),
        ({"strategy": "exact", "num_samples": 4}, ["recipe: num_samples", "adaptive, hybrid or tree, got exact; leave num"]),
        ({"strategy": "exact", "control_variate": True}, ["recipe: control_variate", "naive", "got exact"]),
        ({"control_variate": True}, ["recipe: control_variate", "naive", "got tree"]),
        ({"strategy": "adaptive", "residual": "unbiased"}, ["recipe: residual needs strategy tree, got adaptive"]),
        (
            {"layers": [{"match": "a*", "strategy": "exact", "num_samples": 4}]},
            ["layers[0] (a*): num_samples", "got exact"],
        ),
    ],
)
def test_values_of_one_entry_that_do_not_fit_each_other(recipe, words):
    with pytest.raises(UsageError) as caught:
        make_recipe(recipe)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_values_that_meet_at_a_layer_and_do_not_fit_name_it():
    recipe = make_recipe({"strategy": "hybrid", "layers": [{"match": "enc*", "error_tolerance": 0.01}]})
    with pytest.raises(UsageError, match=r"^enc\.0: error_tolerance needs strategy tree, got hybrid"):
        recipe.resolve("enc.0", "n")
    assert recipe.resolve("dec.0", "n")["strategy"] == "hybrid"


def test_an_argument_is_judged_beside_the_strategy_of_the_file(write):
    naive = write("strategy: naive\n")
    assert make_recipe(naive, control_variate=True).control_variate == 1
    for recipe in (None, write("strategy: exact")):
        with pytest.raises(UsageError, match=r"^convert: control_variate needs strategy"):
            make_recipe(recipe, control_variate=True)


def test_a_budget_from_above_ends_at_an_exact_layer():
    layers = [{"match": "a*", "strategy": "exact"}, {"match": "ab", "num_samples": 4}]
    recipe = make_recipe({"strategy": "naive", "num_samples": 8, "layers": layers})
    assert recipe.resolve("b", "")["num_samples"] == (8,)
    assert recipe.resolve("a", "")["num_samples"] == QUANTUM_ATTENTION.attribute("num_samples").default
    with pytest.raises(UsageError, match=r"^ab: num_samples needs strategy .*, got exact"):
        recipe.resolve("ab", "")


def test_what_a_strategy_does_anyway_may_be_said():
    said = {"control_variate": False, "residual": "none", "precision": "fp32", "error_tolerance": 0}
    assert resolved(strategy="exact", **said) == {"strategy": "exact", "num_samples": (32,), **said}
    assert resolved(strategy="naive", **said)["residual"] == "none"


def test_yaml_with_overrides(write):
    recipe = load_recipe(write(YAML))
    assert recipe.seed == 7
    plain = recipe.resolve("encoder.layer.1.self", "x")
    assert (plain["strategy"], plain["num_samples"], plain["control_variate"]) == ("adaptive", (48,), 0)
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("strategy: foo", ["strategy", "foo", "exact, naive, stratified, adaptive, hybrid, tree"]),
        ("num_samples: 0", ["num_samples", "0", "1"]),
        ("num_samples: -3", ["num_samples", "-3"]),
        ("num_samples: many", ["num_samples", "many", "whole number"]),
        ("num_samples: 1.5", ["num_samples", "1.5"]),
        ("num_samples: []", ["num_samples", "[]"]),
        ("precision: fp8", ["precision", "fp8", "fp32, bf16, int8, auto"]),
        ("residual: some", ["residual", "some", "none, verify_only, unbiased, james_stein"]),
        ("error_tolerance: 5", ["error_tolerance", "5", "0 (off) to 1"]),
        ("error_tolerance: .nan", ["error_tolerance", "nan", "0 (off) to 1"]),
        ("error_tolerance: true", ["error_tolerance", "True", "number"]),
        ("error_tolerance: 1 %", ["error_tolerance", "'1 %'", "0.01 for 1 %"]),
        ("control_variate: 2", ["control_variate", "2", "true or false"]),
        ("seed: x", ["seed", "x"]),
        ("seed: 9223372036854775808", ["seed", "9223372036854775808"]),
        ("samples: 3", ["samples", "no such key", "num_samples"]),
        ("layers:\n  - strategy: exact", ["layers[0].match", "missing"]),
        ("layers:\n  - match: a\n    strategy: foo", ["layers[0].strategy", "foo", "stratified"]),
        ("layers:\n  - match: a\n    seed: 3", ["layers[0].seed", "no such key"]),
        ("layers: encoder.*", ["layers: must be a list of entries with match", "got 'encoder.*'"]),
        ("layers: [encoder.*]", ["layers[0]: must hold keys, such as match: 'encoder.*'", "got 'encoder.*'"]),
        ("compress: 8", ["compress: must hold keys, such as ratio: 8", "got 8"]),
        ("", ["holds no recipe", "leave the file out"]),
        ("# strategy: exact", ["holds no recipe", "'strategy: exact'"]),
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
    with pytest.raises(QexportError, match=r"nothing\.yaml: cannot read the recipe: No such file") as caught:
        load_recipe(tmp_path / "nothing.yaml")
    assert caught.value.exit_code == 1


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


def test_noise_takes_the_place_of_a_strategy():
    values = resolved(noise="depolarizing:0.01,readout:0.02")
    assert (values["strategy"], values["precision"], values["error_tolerance"]) == ("exact", "fp32", 0)
    assert (values["noise"], values["shots"]) == (
        "depolarizing:0.01,readout:0.02",
        QUANTUM_MEASURE.attribute("shots").default,
    )
    assert resolved(noise="depolarizing:0", shots=7)["shots"] == 7
    assert resolved(noise="depolarizing:0", shots=float("inf"))["shots"] == "inf"  # YAML's .inf
    assert set(resolved(noise="none")) == set(resolved())


def test_layers_have_noise_of_their_own():
    layers = [
        {"match": "encoder.0", "strategy": "stratified"},
        {"match": "encoder.1", "noise": "readout:0.1", "shots": "inf"},
        {"match": "encoder.2", "shots": 5},
        {"match": "encoder.3", "noise": "none"},
    ]
    recipe = make_recipe({"noise": "depolarizing:0.01", "layers": layers})
    found = [recipe.resolve(f"encoder.{i}", "n") for i in range(5)]
    assert [one.get("noise") for one in found] == [
        None,
        "readout:0.1",
        "depolarizing:0.01",
        None,
        "depolarizing:0.01",
    ]
    assert [one.get("shots") for one in found] == [None, "inf", 5, None, 1024]
    assert [one["strategy"] for one in found] == ["stratified", "exact", "exact", "tree", "exact"]
    assert recipe.has_noise
    assert make_recipe(recipe.to_dict()) == recipe
    assert not make_recipe({"noise": "none"}).has_noise


def test_noise_on_the_command_line_wins_over_a_file(write):
    tree = write("strategy: tree\nnum_samples: 64\n")
    assert make_recipe(tree, noise="depolarizing:0.01").to_dict() == {"noise": "depolarizing:0.01", "seed": 0, "layers": []}
    noisy = write("noise: depolarizing:0.01\nshots: 32\n")
    assert make_recipe(noisy, shots=64).shots == 64
    assert make_recipe(noisy, strategy="exact").to_dict() == {"strategy": "exact", "seed": 0, "layers": []}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"noise": "depolarizing"}, r"noise: 'depolarizing': noise must be MODEL:LEVEL, such as depolarizing:0.01"),
        ({"noise": "depolarizing:1.5"}, r"noise: 'depolarizing:1.5': .*level must be in 0 to 1.33333 .*, got 1.5"),
        ({"noise": "bit_flip:nan"}, r"level must be in 0 to 1, got nan"),
        ({"noise": "thermal_relaxation:0.1:T1=1:T2=2.5"}, r"T2 must be at most 2 T1 = 2, got 2.5"),
        ({"noise": "hum:0.1"}, r"channel must be one of depolarizing, .*, got 'hum'"),
        ({"noise": 0.1}, r"noise: must be none or MODEL:LEVEL"),
        ({"noise": "bit_flip:0.1", "shots": 0}, r"shots: must be a whole number from 1 to 2147483647, or inf .*, got 0"),
        ({"noise": "bit_flip:0.1", "shots": "many"}, r"shots: must be a whole number .*, got 'many'"),
        ({"shots": 8}, r"recipe: shots 8 need noise, .*; shots alone are strategy naive with num_samples"),
        ({"noise": "none", "shots": 8}, r"shots 8 need noise"),
        ({"noise": "bit_flip:0.1", "strategy": "tree"}, r"recipe: noise acts on exact .*; leave strategy out, got 'tree'"),
        ({"noise": "bit_flip:0.1", "num_samples": 8}, r"leave num_samples out, got \(8,\) beside noise"),
        (
            {"layers": [{"match": "a", "noise": "bit_flip:0.1", "precision": "bf16"}]},
            r"layers\[0\] \(a\): noise acts on exact probabilities; leave precision out",
        ),
    ],
)
def test_noise_that_is_refused(recipe, message):
    with pytest.raises(UsageError, match=message):
        make_recipe(recipe)
