"""What the functions of the package say to arguments of a wrong type: one line with the name and the value."""

import functools

import numpy as np
import pytest
import torch
from bundle_factory import make_bundle
from cli_cases import one_line

import qexport
from qexport.arguments import real, several, whole, wholes
from qexport.errors import UsageError
from qexport.hardware import to_qasm3
from qexport.memory import AdvancedMemoryProfiler
from qexport.mps.layout import make_layout
from qexport.noise.comparison import compare_mitigation
from qexport.noise.measured import MeasuredNoise, measured
from qexport.noise.mitigation import RepetitionCode, ZeroNoiseExtrapolation, mitigated, parse_mitigation
from qexport.noise.model import NoiseModel, parse_noise
from qexport.ops.proto import function_proto, make_node
from qexport.recipe import load_recipe, make_recipe
from qexport.scaling import sweep

says = functools.partial(one_line, UsageError)
FLIPS, ZNE, ROWS = NoiseModel("bit_flip", 0.1), parse_mitigation("zne"), torch.full((2, 4), 0.25, dtype=torch.float64)
DEVICE = MeasuredNoise([FLIPS], 4)


@pytest.mark.parametrize("value", [3, np.int64(3), np.array(3), torch.tensor(3)])
def test_whole_numbers(value):
    assert whole("n", value) == 3
    assert wholes("n", value) == wholes("n", [value]) == [3]
    says("n must be >= 4, got 3", whole, "n", value, 4)


@pytest.mark.parametrize("value", [3.0, "3", None, float("nan"), [3], True])
def test_what_is_no_whole_number(value):
    says(f"n must be a whole number, got {value!r}", whole, "n", value)


def test_whole_numbers_of_numpy_in_a_recipe():
    recipe = make_recipe(num_samples=[np.int64(3), 4], error_tolerance=np.float32(0.5), seed=np.int64(7))
    assert recipe.to_dict() == {"num_samples": [3, 4], "error_tolerance": 0.5, "seed": 7, "layers": []}
    assert make_recipe(noise="bit_flip:0.1", shots=np.int32(9)).shots == 9


def test_numbers_and_lists():
    assert wholes("n", range(1, 3)) == wholes("n", np.arange(1, 3)) == [1, 2]
    says("n must hold at least one number", wholes, "n", [])
    says("n must be a whole number, got '128'", wholes, "n", "128")
    says("n must be a whole number, got <generator", wholes, "n", (n for n in range(3)))
    says("n must be a whole number, got array([[0., 0.]", whole, "n", np.zeros((2, 2)))
    assert real("x", np.float32(0.5)) == real("x", torch.tensor(0.5)) == 0.5
    for value in ("0.5", None, [0.5, 1]):
        says(f"x must be a number, got {value!r}", real, "x", value)
    assert several("x", (1, 2)) == [1, 2]
    for value in ("ab", 3, None):
        says(f"x must be a list, got {value!r}", several, "x", value)


@pytest.fixture(scope="module")
def bundle(module_path):
    return make_bundle(module_path / "bundle")


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (qexport.validate, {"seeds": 1.5}, "seeds must be a whole number, got 1.5"),
        (qexport.validate, {"seq": "x"}, "seq must be a whole number, got 'x'"),
        (qexport.validate, {"max_error": "1%"}, "max_error must be a number, got '1%'"),
        (qexport.profile, {"seq": 8.5}, "seq must be a whole number, got 8.5"),
        (qexport.profile, {"runs": None}, "runs must be a whole number, got None"),
        (qexport.tune, {"max_error": "1%"}, "max_error must be a number, got '1%'"),
        (qexport.tune, {"max_error": 0.1, "trials": "7"}, "trials must be a whole number, got '7'"),
        (qexport.map_attention, {"layers": "0"}, "layers must be a whole number, got '0'"),
        (qexport.map_attention, {"heads": [0, -1]}, "heads must be >= 0, got -1"),
        (qexport.validate, {"seeds": True}, "seeds must be a whole number, got True"),
        (qexport.validate, {"data": 5}, "data must be a path, a dict of arrays or a list of texts that is not empty, got 5"),
        (qexport.validate, {"data": np.ones(2)}, "data must be a path, a dict of arrays or a list of texts"),
        (
            qexport.validate,
            {"data": [1]},
            "data must be a path, a dict of arrays or a list of texts that is not empty, got [1",
        ),
        (qexport.profile, {"providers": 5}, "providers must be a list, got 5"),
        (qexport.session, {"options": {}}, "options must be an onnxruntime.SessionOptions, got dict"),
        (qexport.map_attention, {"seed": 2**63}, f"seed must be a whole number of 64 bits, -2^63 to 2^63 - 1, got {2**63}"),
        (qexport.map_attention, {"output": 5}, "output must be a str or a Path, got 5"),
        (qexport.tune, {"max_error": 0.1, "threads": "2"}, "threads must be a whole number, got '2'"),
        (qexport.report, {"output": "r.html", "threads": 0}, "threads must be >= 1, got 0"),
        (qexport.profile, {"seq": 8, "threads": 10**6}, "threads must be at most"),
        (qexport.tune, {"max_error": 0.1, "output": 5}, "output must be a str or a Path, got 5"),
        (qexport.report, {"output": 5}, "output must be a str or a Path, got 5"),
        (qexport.pack_deployment, {"output": 5}, "output must be a str or a Path, got 5"),
        (qexport.measure_resilience, {"plot": 5}, "plot must be a str or a Path, got 5"),
        (qexport.measure_resilience, {"levels": 0.1}, "levels must be a list, got 0.1"),
        (qexport.measure_resilience, {"levels": ["low"]}, "levels must be a number, got 'low'"),
        (qexport.measure_resilience, {"noise": 3}, "noise must be a list, got 3"),
        (qexport.measure_resilience, {"noise": ["bit_flip"]}, "noise must be one or several NoiseModels"),
        (qexport.measure_resilience, {"mitigation": [5]}, "mitigation 5 is not swept in models; give none"),
        (qexport.report, {"output": "r.html", "skip": "all"}, "skip must be a list, got 'all'"),
        (qexport.measure_resilience, {"mitigation": "zne"}, "mitigation must be a list, got 'zne'"),
    ],
)
def test_functions_of_a_bundle(bundle, function, options, words):
    says(words, function, bundle, **options)


@pytest.mark.parametrize(
    ("function", "arguments", "options", "words"),
    [
        (qexport.convert, ["model", "out"], {"opset": "23"}, "opset must be a whole number, got '23'"),
        (qexport.convert, ["model", None], {}, "output must be a folder, got None; dry_run=True writes nothing"),
        (qexport.validate, [5], {}, "bundle must be a str or a Path, got 5"),
        (qexport.Generator, [5], {}, "bundle must be a str or a Path, got 5"),
        (qexport.inspect, [None], {}, "path must be a str or a Path, got None"),
        (qexport.inspect, [""], {}, "path is empty; give a path, '.' for the folder that you are in"),
        (qexport.convert, ["", "out"], {}, "model is empty; give a path"),
        (qexport.convert, ["model", ""], {}, "output is empty; give a path"),
        (qexport.session, [5], {}, "path must be a str or a Path, got 5"),
        (qexport.verify_deployment, [5], {}, "path must be a str or a Path, got 5"),
        (qexport.compare, [{}, {}], {}, "report must be a str or a Path, got {}"),
        (qexport.convert, ["model", 5], {}, "output must be a str or a Path, got 5"),
        (qexport.compress, ["model", 5], {}, "output must be a str or a Path, got 5"),
        (load_recipe, [5], {}, "path must be a str or a Path, got 5"),
        (make_recipe, [], {"strategy": "exact", "num_samples": 4}, "convert: num_samples needs strategy"),
        (sweep, [], {"lengths": [64], "strategies": "tree"}, "strategies must be a list, got 'tree'"),
        (qexport.compare, ["a.json", "b.json"], {"threshold": "5%"}, "threshold must be a number, got '5%'"),
        (sweep, [], {"lengths": "128"}, "lengths must be a whole number, got '128'"),
        (sweep, [], {"lengths": [float("nan")]}, "lengths must be a whole number, got nan"),
        (make_recipe, [[1]], {}, "recipe must be a dict or a file, got [1]"),
        (make_layout, ["serial", 4.0, 4], {}, "rows must be a whole number, got 4.0"),
        (NoiseModel, ["bit_flip", "x"], {}, "noise level must be a number, got 'x'"),
        (NoiseModel, ["bit_flip", None], {}, "noise level must be a number, got None"),
        (NoiseModel, ["thermal_relaxation", 0.1], {"T1": "x"}, "noise T1 must be a number, got 'x'"),
        (FLIPS.at, ["x"], {}, "noise level must be a number, got 'x'"),
        (MeasuredNoise, [[FLIPS], "x"], {}, "n must be a whole number, got 'x'"),
        (
            MeasuredNoise,
            ["bit_flip", 4],
            {},
            "noise must be one or several NoiseModels, as parse_noise makes them",
        ),
        (MeasuredNoise, [FLIPS, 4, "q"], {}, "basis must be one of z, x, got 'q'"),
        (measured, [ROWS.numpy(), 5, 1], {}, "rows must be a torch.Tensor, got numpy.ndarray; give torch.from_numpy(rows)"),
        (measured, [ROWS, 5, 2**63], {}, f"seed must be a whole number of 64 bits, -2^63 to 2^63 - 1, got {2**63}"),
        (
            mitigated,
            ["zne", DEVICE, ROWS, 9],
            {},
            "must be a Mitigation, as parse_mitigation makes it, got 'zne'",
        ),
        (mitigated, [ZNE, DEVICE, ROWS.numpy(), 9], {}, "p must be a torch.Tensor, got numpy.ndarray"),
        (mitigated, [ZNE, DEVICE, ROWS, "x"], {}, "shots must be a whole number, got 'x'"),
        (mitigated, [ZNE, DEVICE, ROWS, 9, 0.5], {}, "seed must be a whole number of 64 bits"),
        (DEVICE.probabilities, [ROWS.numpy()], {}, "p must be a torch.Tensor, got numpy.ndarray"),
        (to_qasm3, [[0.5, 0.5]], {}, "probabilities must be a torch.Tensor, got list; give torch.as_tensor(probabilities)"),
        (to_qasm3, [ROWS[0], "bit_flip"], {}, "noise must be one or several NoiseModels"),
        (AdvancedMemoryProfiler, [], {"sources": "rss"}, "sources must be a list, got 'rss'"),
        (AdvancedMemoryProfiler, [], {"interval": "x"}, "interval must be a number, got 'x'"),
        (AdvancedMemoryProfiler, [], {"overhead": None}, "overhead must be a number, got None"),
        (AdvancedMemoryProfiler().profile_block("b", tokens="x").__enter__, [], {}, "tokens must be a number, got 'x'"),
        (function_proto, ["QuantumAttention", "23"], {}, "opset must be a whole number, got '23'"),
        (function_proto, ["QuantumAttention", 23, 9], {}, "num_outputs must be from 1 to 6, got 9"),
        (make_node, ["QuantumAttention", "QKV", "Y"], {"layer": 1.5}, "layer must be of kind int, got 1.5"),
        (make_node, ["QuantumAttention", "QKV", "Y"], {"num_samples": "12"}, "num_samples must be of kind ints, got '12'"),
        (ZeroNoiseExtrapolation, [5], {}, "zne scales must be a list, got 5"),
        (ZeroNoiseExtrapolation, [["x", 1]], {}, "zne scales must be a number, got 'x'"),
        (RepetitionCode, [2.5], {}, "repetition distance must be a whole number, got 2.5"),
        (compare_mitigation, [ROWS.numpy(), FLIPS, 9], {}, "p must be a torch.Tensor, got numpy.ndarray"),
        (compare_mitigation, [ROWS, "bit_flip:0.1", 9], {}, "noise must be one or several NoiseModels"),
        (compare_mitigation, [ROWS, 5, 9], {}, "noise must be one or several NoiseModels, as parse_noise makes them, got 5"),
        (compare_mitigation, [ROWS, FLIPS, 9], {"methods": "zne"}, "methods must be a list, got 'zne'"),
        (compare_mitigation, [ROWS, FLIPS, 9], {"methods": [5]}, "mitigation must be a text such as zne, got 5"),
        (compare_mitigation, [ROWS, FLIPS, 9], {"basis": "q"}, "basis must be one of z, x, got 'q'"),
        (parse_noise, [None], {}, "noise must be a text such as depolarizing:0.01, got None"),
        (parse_mitigation, [None], {}, "mitigation must be a text such as zne, got None"),
    ],
)
def test_functions_of_anything_else(function, arguments, options, words):
    says(words, function, *arguments, **options)
