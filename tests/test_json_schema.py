"""docs/json_schema.md against what every command prints: all keys are there, and its tables have no others."""

import json
import math
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundle_factory import LIMIT, build_model, make_bundle
from click.testing import CliRunner
from compression_cases import token_ids
from test_generation import bundle as cached_bundle  # noqa: F401  (a fixture)

from qexport import demo
from qexport.cli import COMMANDS, cli
from qexport.documents import make_document
from qexport.memory import AdvancedMemoryProfiler
from qexport.tuning.samples import error_by_samples

DOCS = Path(__file__).parent.parent / "docs"
HEAD = ("schema", "schema_version")
# A small run of every command; OUT is a folder of its own.
RUNS = {
    "convert": "convert OUT/encoder.onnx -o OUT/converted",
    "validate": "validate DIR --seeds 1 --max-error 500%",
    "profile": "profile DIR --seq 8 --runs 2",
    "scaling": "scaling --lengths 16,32 --heads 1 --strategies exact",
    "resilience": "resilience DIR --levels 0.01 --shots 64 --seeds 1",
    "tune": "tune DIR --max-error 90% --trials 3 --seeds 1",
    "compress": "compress LM -o OUT/small --ratio 5 --data OUT/tokens.npz --no-profile",
    "attention": "attention DIR --no-pictures -o OUT/maps",
    "inspect": "inspect DIR",
    "report": "report DIR -o OUT/report.html --reuse OUT/validate.json --skip samples --skip profile --skip scaling",
    "compare": "compare OUT/validate.json OUT/validate.json",
    "generate": "generate CACHED --prompt Hello --max-new-tokens 3",
    "bundle": "bundle DIR -o OUT/deployment",
    "verify-bundle": "verify-bundle OUT/deployment --runs 2",
    "ops": "ops",
    "doctor": "doctor",
    "demo": "demo -o OUT/demo",
}
# Objects of a document that have a table of their own: where they are, by its number in the section.
INNER = {
    "convert": {1: ("manifest",)},
    "scaling": {1: ("contenders", 0), 2: ("contenders", 0, "lengths", 0)},
    "profile": {1: ("sizes", 0, "models", "converted")},
    "verify-bundle": {1: ("run",)},
    "ops": {1: ("ops", 0)},
}
# Objects whose keys are names: of files, packages, outputs, ops, types, providers, counters.
BY_NAME = {"files", "versions", "outputs", "fallback", "library", "errors", "ops", "opsets", "fallbacks", "attributes"}
BY_NAME |= {"type_vars", "nodes", "counters", "timeline", "trends"}


@pytest.fixture(scope="module")
def documents(module_path, lm, cached_bundle):  # noqa: F811
    """Schema to a real document of it."""
    bundle = make_bundle(module_path / "bundle")
    onnx.save(build_model(quantum=False), module_path / "encoder.onnx")
    np.savez(module_path / "tokens.npz", **token_ids())
    places = {"OUT": module_path, "DIR": bundle, "LM": lm, "CACHED": cached_bundle}
    found = {}
    with pytest.MonkeyPatch.context() as patch:  # the demo's model and texts take a minute, and give the same keys
        patch.setattr(demo, "minilm_folder", lambda: module_path / "encoder.onnx")
        patch.setattr(demo, "SENTENCES", None)
        patch.setattr(demo, "SEQ", LIMIT)
        for name, line in RUNS.items():
            words = [re.sub("^[A-Z]{2,}", lambda part: str(places[part[0]]), word) for word in line.split()]
            run = CliRunner().invoke(cli, [*words, "--json"])
            assert run.exception is None or isinstance(run.exception, SystemExit), (name, run.exception)
            (module_path / f"{name}.json").write_text(run.stdout)
            found[name] = json.loads(run.stdout)
    profiler = AdvancedMemoryProfiler()
    with profiler.profile_block("block"):
        pass
    found["memory"] = json.loads(json.dumps(profiler.generate_report().to_dict()))
    found["samples"] = json.loads(json.dumps(error_by_samples(bundle).to_dict()))
    return found


def sections() -> dict[str, str]:
    """Schema to its section."""
    page = re.split(r"^## qexport\.(\S+), version 1\n", (DOCS / "json_schema.md").read_text(), flags=re.M)
    memory = (DOCS / "memory.md").read_text().split("\n## JSON\n")[1]
    return dict(zip(page[1::2], page[2::2], strict=True)) | {"memory": memory}


def tables(section: str) -> list[set[str]]:
    """The keys in the first column of each table."""
    found = re.findall(r"^\| key \| meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", section, flags=re.M)
    return [{key for row in rows.splitlines() for key in re.findall(r"`(\w+)`", row.split("|")[1])} for rows in found]


def test_every_document_has_its_section_and_every_command_its_document(documents):
    assert set(RUNS) == set(COMMANDS) - {"completion"}  # whose answer is a script
    assert list(documents) == [document["schema"].removeprefix("qexport.") for document in documents.values()]
    assert set(sections()) == set(documents)


@pytest.mark.parametrize("name", [*RUNS, "memory", "samples"])
def test_the_tables_of_a_section_are_the_keys_of_the_document(name, documents):
    document, found = documents[name], tables(sections()[name])
    assert (*document,)[:2] == HEAD
    assert document["schema_version"] == 1
    assert found[0] == document.keys() - set(HEAD)
    for number, path in INNER.get(name, {}).items():
        inner = document
        for step in path:
            inner = inner[step]
        assert found[number] == inner.keys() - set(HEAD), path


def keys_within(value, by_name=False):
    """The keys of a document and of what is in it, but for those that are names."""
    if isinstance(value, dict):
        yield from () if by_name else value
        for key, inner in value.items():
            yield from keys_within(inner, key in BY_NAME)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_within(inner)


@pytest.mark.parametrize("name", [*RUNS, "memory", "samples"])
def test_every_key_within_a_document_is_on_the_page(name, documents):
    named = set(re.findall(r"`(\w+)`", "".join((DOCS / page).read_text() for page in ("json_schema.md", "memory.md"))))
    assert set(keys_within(documents[name])) - named == set()


def test_what_json_cannot_say_is_null():
    found = make_document("any", {"a": math.nan, "b": [{"c": (np.float64("inf"), 1.5)}], "d": {"e": -math.inf}})
    content = {"a": None, "b": [{"c": [None, 1.5]}], "d": {"e": None}}
    assert json.loads(json.dumps(found, allow_nan=False)) == {"schema": "qexport.any", "schema_version": 1} | content
