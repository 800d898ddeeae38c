"""Inputs of a bundle from every source, and one line for whatever does not fit the model."""

import numpy as np
import pytest
from bundle_factory import LIMIT, VOCAB, make_bundle, manifest

from qexport.bundle import Bundle
from qexport.data import load_inputs
from qexport.errors import QexportError, UsageError
from qexport.generated import dimension_sizes, generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("data") / "bundle")


@pytest.fixture
def bundle(folder):
    return Bundle.open(folder)


def with_inputs(folder, inputs, **limits) -> Bundle:
    """A bundle (of the real files) whose manifest lists other inputs."""
    document = {**manifest(), "inputs": inputs, "limits": limits}
    return Bundle(folder, document)


def spec(name, shape, kind="continuous", dtype="float32", high=None):
    return {"name": name, "dtype": dtype, "shape": shape, "kind": kind, "high": high}


def ids(*shape):
    return np.zeros(shape, np.int64)


def error_of(*arguments, **options) -> str:
    with pytest.raises(QexportError) as error:
        load_inputs(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_stored_samples_come_with_the_classical_outputs(bundle):
    inputs = load_inputs(bundle)
    assert inputs.source == "stored samples"
    assert inputs.samples == 2
    assert list(inputs.feeds[0]) == ["input_ids", "attention_mask"]
    assert list(inputs.expected[0]) == ["hidden"]


def test_a_damaged_sample(tmp_path):
    make_bundle(tmp_path / "b")
    (tmp_path / "b" / "test_data_set_0" / "input_0.pb").write_bytes(b"\xff\xff nonsense")
    assert "damaged sample" in error_of(Bundle.open(tmp_path / "b"))


def test_an_npz_is_cut_into_batches_and_its_mask_is_filled_in(bundle, tmp_path):
    np.savez(tmp_path / "d.npz", input_ids=np.arange(50).reshape(10, 5).astype(np.int32))
    inputs = load_inputs(bundle, tmp_path / "d.npz", batch=4)
    assert [len(feed["input_ids"]) for feed in inputs.feeds] == [4, 4, 2]
    assert inputs.samples == 10
    np.testing.assert_array_equal(np.concatenate([f["input_ids"] for f in inputs.feeds]), np.arange(50).reshape(10, 5))
    assert inputs.feeds[0]["input_ids"].dtype == np.int64
    np.testing.assert_array_equal(inputs.feeds[2]["attention_mask"], np.ones((2, 5), np.int64))
    assert inputs.notes == ["input 'attention_mask' was not given and is filled with ones"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": ids(1, 4)}, "the model has no input 'tokens'; it has input_ids, attention_mask"),
        ({"input_ids": ids(1, 4), "seed": np.array(1)}, "seeds are chosen with --seeds"),
        ({"attention_mask": ids(1, 4)}, "input 'input_ids' is missing"),
        ({"input_ids": np.zeros((1, 4))}, "must be int64, got float64; convert it with .astype('int64')"),
        ({"input_ids": np.array([["a"]])}, "must be int64, got <U1"),
        ({"input_ids": ids(4)}, "must have 2 dimensions (batch, sequence), got (4,)"),
        ({"input_ids": ids(0, 4)}, "is empty"),
        ({"input_ids": ids(2, 0)}, "is empty"),
        ({"input_ids": ids(1, LIMIT + 1)}, f"sequence {LIMIT + 1} is longer than the model takes ({LIMIT})"),
        ({"input_ids": ids(1, 4) + VOCAB}, f"must lie in [0, {VOCAB}), got {VOCAB}"),
        ({"input_ids": ids(1, 4) - 1}, f"must lie in [0, {VOCAB}), got -1"),
        ({"input_ids": ids(2, 4), "attention_mask": ids(2, 5)}, "has sequence 5, but 'input_ids' has 4"),
        ({"input_ids": ids(2, 4), "attention_mask": ids(3, 4)}, "has batch 3, but 'input_ids' has 2"),
        ({"input_ids": ids(2, 4), "attention_mask": ids(2, 4)}, "input 'attention_mask' keeps no position"),
    ],
)
def test_arrays_that_do_not_fit(bundle, tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    for data in (tmp_path / "d.npz", arrays):
        assert message in error_of(bundle, data)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(folder, bad):
    bundle = with_inputs(folder, [spec("pixels", ["batch", 3, 4, 4])])
    pixels = np.zeros((2, 3, 4, 4), np.float32)
    pixels[1, 2, 0, 3] = bad
    text = error_of(bundle, {"pixels": pixels})
    assert "1 NaN or infinite values, the first at (1, 2, 0, 3)" in text


def test_an_additive_mask_may_hold_minus_infinity(folder):
    bundle = with_inputs(folder, [spec("bias", ["batch", "n"], kind="mask")])
    load_inputs(bundle, {"bias": np.array([[0, -np.inf]], np.float32)})
    assert "NaN or infinite" in error_of(bundle, {"bias": np.array([[0, np.inf]], np.float32)})


def test_one_of_two_masks_may_be_zeros(folder):
    """As the mask of global attention is where there is none."""
    names = ("attention_mask", "global_attention_mask")
    bundle = with_inputs(folder, [spec(name, ["batch", "n"], "mask", "int64") for name in names])
    load_inputs(bundle, {names[0]: 1 + ids(2, 3), names[1]: ids(2, 3)})
    assert "'attention_mask' keeps no position" in error_of(bundle, {name: ids(2, 3) for name in names})


def test_a_fixed_dimension(folder):
    bundle = with_inputs(folder, [spec("pixels", ["batch", 3, 224, 224])])
    assert "must have size 3 on axis 1, got 1" in error_of(bundle, {"pixels": np.zeros((1, 1, 224, 224), np.float32)})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.npz", b"not a zip", "not a readable .npz file (no zip archive of arrays); write it with numpy.savez"),
        ("d.txt", b"\n  \n\n", "holds no text"),
        ("d.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("d.txt", b"some words", "has no tokenizer/tokenizer.json"),
        ("d.csv", b"1,2", "unknown kind of data"),
        ("missing.npz", None, "no such data file"),
    ],
)
def test_files_that_cannot_be_read(bundle, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = error_of(bundle, tmp_path / name)
    assert message in text


def test_a_folder_is_no_data(bundle, tmp_path):
    (tmp_path / "d.npz").mkdir()
    assert "d.npz: a folder; give the .npz or .txt file" in error_of(bundle, tmp_path / "d.npz")


def test_pickles_are_not_loaded(bundle, tmp_path):
    np.savez(tmp_path / "d.npz", input_ids=np.array([{"a": 1}], dtype=object))
    assert "not a readable .npz file" in error_of(bundle, tmp_path / "d.npz")


@pytest.fixture
def text_bundle(tmp_path):
    """A bundle with a word tokenizer that itself would cut at 4 tokens, in silence."""
    import tokenizers

    make_bundle(tmp_path / "text")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "mat"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(4)
    (tmp_path / "text" / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "text" / "tokenizer" / "tokenizer.json"))
    return Bundle.open(tmp_path / "text")


def test_text_is_padded_to_the_longest_line_of_its_batch(text_bundle, tmp_path):
    (tmp_path / "t.txt").write_text("the cat sat on the mat\n\nthe cat\nsat\n")
    inputs = load_inputs(text_bundle, tmp_path / "t.txt", batch=2)
    assert inputs.samples == 3
    first, second = inputs.feeds
    np.testing.assert_array_equal(first["input_ids"], [[2, 4, 5, 6, 7, 4, 8, 3], [2, 4, 5, 3, 0, 0, 0, 0]])
    np.testing.assert_array_equal(first["attention_mask"], [[1] * 8, [1, 1, 1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(second["input_ids"], [[2, 6, 3]])
    assert inputs.notes == []


def test_lines_are_those_of_an_editor(text_bundle, tmp_path):
    """Behind a byte order mark, and whatever Unicode calls a boundary inside of a line."""
    (tmp_path / "t.txt").write_bytes("\ufeffthe cat\x0csat\r\non\u2028the mat".encode())
    feed = load_inputs(text_bundle, tmp_path / "t.txt").feeds[0]
    np.testing.assert_array_equal(feed["input_ids"], [[2, 4, 5, 6, 3], [2, 7, 4, 8, 3]])


def test_text_is_cut_when_asked_and_said_so(text_bundle, tmp_path):
    (tmp_path / "t.txt").write_text("the cat sat on the mat\nthe cat\n")
    inputs = load_inputs(text_bundle, tmp_path / "t.txt", seq=5)
    np.testing.assert_array_equal(inputs.feeds[0]["input_ids"], [[2, 4, 5, 6, 3], [2, 4, 5, 3, 0]])
    assert inputs.notes == ["1 of 2 texts cut to 5 tokens"]


def test_a_list_of_texts(text_bundle):
    inputs = load_inputs(text_bundle, ["the cat", "the cat sat"])
    assert inputs.source == "2 texts"
    np.testing.assert_array_equal(inputs.feeds[0]["input_ids"], [[2, 4, 5, 3, 0], [2, 4, 5, 6, 3]])
    for data in ([], [1, 2]):
        assert "a list of texts" in error_of(text_bundle, data)


def test_a_line_that_is_too_long_names_its_number(text_bundle, tmp_path):
    (tmp_path / "t.txt").write_text("the cat\n\n" + "cat " * 100 + "\n")
    text = error_of(text_bundle, tmp_path / "t.txt")
    assert f"line 3: 102 tokens, the model takes at most {LIMIT}" in text
    assert f"seq {LIMIT + 1} is longer" in error_of(text_bundle, tmp_path / "t.txt", seq=LIMIT + 1)


def test_generated_inputs(bundle):
    feed = generate(bundle, batch=3, seq=20, ragged=True, seed=1).feeds[0]
    assert feed["input_ids"].shape == (3, 20)
    assert feed["input_ids"].min() >= 0
    assert feed["input_ids"].max() < VOCAB
    lengths = feed["attention_mask"].sum(axis=1)
    assert lengths[0] == 20
    assert (lengths >= 10).all()
    assert (np.diff(feed["attention_mask"], axis=1) <= 0).all()  # padding on the right
    again = generate(bundle, batch=3, seq=20, ragged=True, seed=1).feeds[0]
    other = generate(bundle, batch=3, seq=20, ragged=True, seed=2).feeds[0]
    np.testing.assert_array_equal(feed["input_ids"], again["input_ids"])
    assert (feed["input_ids"] != other["input_ids"]).any()
    assert generate(bundle, batch=2, seq=9).feeds[0]["attention_mask"].all()


@pytest.mark.parametrize(
    ("shapes", "batches"),
    [
        ({"q": ["batch", "n", 4], "bias": ["n", "keys"]}, {"q": [2, 2, 1], "bias": [5, 5, 5]}),  # n is no batch
        ({"bias": ["n", "keys"], "q": ["batch", "n", 4]}, {"q": [2, 2, 1], "bias": [5, 5, 5]}),
        ({"q": ["sequence", "batch", 4]}, {"q": [5]}),  # items do not lie along the first axis
        ({"x": ["x_dim_0", "x_dim_1"], "y": ["y_dim_0", "y_dim_1"]}, {"x": [2, 2, 1], "y": [2, 2, 1]}),  # unnamed axes
        ({"x": ["N", 3], "table": [5, 3]}, {"x": [2, 2, 1], "table": [5, 5, 5]}),
    ],
)
def test_arrays_are_cut_along_the_batch_alone(folder, shapes, batches):
    bundle = with_inputs(folder, [spec(name, shape) for name, shape in shapes.items()])
    given = {name: np.ones([d if isinstance(d, int) else 5 for d in shape], np.float32) for name, shape in shapes.items()}
    feeds = load_inputs(bundle, given, batch=2).feeds
    assert {name: [len(feed[name]) for feed in feeds] for name in shapes} == batches


def test_what_is_no_array_or_no_length(bundle):
    assert "arrays: an input is no array" in error_of(bundle, {"input_ids": [[1, 2], [3]]})
    assert "seq is for texts and generated inputs, got 4" in error_of(bundle, {"input_ids": ids(2, 8)}, seq=4)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"seq": 0}, {"seq": -3}, {"seq": LIMIT + 1}])
def test_sizes_out_of_range(bundle, sizes):
    with pytest.raises(UsageError) as error:
        load_inputs(bundle, **sizes)
    assert str(next(iter(sizes.values()))) in str(error.value)


def test_generation_of_every_kind(folder):
    inputs = [
        spec("pixels", ["batch", 3, 8, 8]),
        spec("flags", ["batch", "n"], kind="boolean", dtype="bool"),
        spec("types", ["batch", "n"], kind="token_types", dtype="int64", high=2),
        spec("places", ["batch", "n"], kind="position_ids", dtype="int64", high=64),
        spec("choice", ["batch"], kind="integer", dtype="int32", high=7),
        spec("past", ["batch", 2, "past_sequence", 4]),
        spec("wide", ["batch", "past_sequence + n"], kind="mask", dtype="int64"),
    ]
    bundle = with_inputs(folder, inputs, past_sequence=6)
    feed = generate(bundle, batch=2, seq=5, dims={"past_sequence": 3}).feeds[0]
    assert {name: array.shape for name, array in feed.items()} == {
        "pixels": (2, 3, 8, 8),
        "flags": (2, 5),
        "types": (2, 5),
        "places": (2, 5),
        "choice": (2,),
        "past": (2, 2, 3, 4),
        "wide": (2, 8),
    }
    assert {name: str(array.dtype) for name, array in feed.items()} == {s["name"]: s["dtype"] for s in inputs}
    np.testing.assert_array_equal(feed["places"][1], np.arange(5))
    assert abs(feed["pixels"].std() - 1) < 0.2


def test_an_integer_input_without_a_range(folder):
    bundle = with_inputs(folder, [spec("choice", ["batch"], kind="integer", dtype="int64")])
    with pytest.raises(QexportError, match="no upper bound for input 'choice'"):
        generate(bundle)


def test_dimension_sizes_of_a_model_without_a_length():
    document = {"inputs": [spec("pixels", ["batch", 3, 8, 8])], "limits": {}}
    assert dimension_sizes(document, 4, 99) == {"batch": 4}


def test_an_axis_that_an_input_has_first_may_be_a_length():
    document = {"inputs": [spec("bias", ["n", "m"]), spec("q", ["batch", "n", 4])], "limits": {}}
    assert dimension_sizes(document, 4, 9) == {"batch": 4, "n": 9, "m": 9}
