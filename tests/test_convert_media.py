"""convert of Hugging Face folders whose models take videos, sound as frames, or images among texts."""

import numpy as np
import pytest
import torch
import transformers

from qexport.conversion import convert
from qexport.runtime import session

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PATCHES = {"image_size": 32, "patch_size": 8, "num_channels": 3}
SPEECH = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "conv_channels": 16,
    "input_feat_per_channel": 20,
}
PARAKEET = SMALL | {"num_key_value_heads": 4, "num_mel_bins": 16, "subsampling_conv_channels": 8}

# name: (model class, configuration, task, main input, its shape, sites)
MODELS = {
    "timesformer": (
        "TimesformerModel",
        SMALL | PATCHES | {"num_frames": 3},
        None,
        "pixel_values",
        ["batch", 3, 3, 32, 32],
        4,
    ),
    "wav2vec2-bert": (
        "Wav2Vec2BertModel",
        SMALL | {"feature_projection_input_dim": 20, "conv_depthwise_kernel_size": 5},
        None,
        "input_features",
        ["batch", "frames", 20],
        2,
    ),
    "speech_to_text": (
        "Speech2TextForConditionalGeneration",
        SPEECH,
        "speech-recognition",
        "input_features",
        ["batch", "frames", 20],
        6,
    ),
    "parakeet": (
        "ParakeetForCTC",
        {"vocab_size": 99, "encoder_config": PARAKEET},
        "speech-recognition",
        "input_features",
        ["batch", "frames", 16],
        2,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_videos_and_frames_of_sound(name, tmp_path):
    class_name, config, task, main, shape, sites = MODELS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**config)).eval()
    model.save_pretrained(tmp_path / "model")
    report = convert(tmp_path / "model", tmp_path / "b", task=task, strategy="exact")
    assert (len(report.sites), report.left_alone) == (sites, [])
    assert next(i["shape"] for i in report.manifest["inputs"] if i["name"] == main) == shape
    axes = {"batch": 3, "frames": 60, "decoder_sequence": 5}  # others than those of the example
    feeds = {}
    for spec in report.manifest["inputs"]:
        sizes = [axes.get(d, d) for d in spec["shape"]]
        value = torch.randint(spec["high"], sizes) if spec["kind"] == "token_ids" else torch.randn(sizes)
        feeds[spec["name"]] = value
    with torch.no_grad():
        expected = model(**feeds)[0].numpy()
    got = session(tmp_path / "b").run(None, {name: value.numpy() for name, value in feeds.items()})[0]
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    torch.manual_seed(0)
    texts = SMALL | {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 64}
    images = SMALL | PATCHES | {"model_type": "clip_vision_model"}
    config = transformers.LlavaConfig(text_config=texts, vision_config=images, image_token_index=98)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("models") / "llava"
    model.save_pretrained(folder)
    return model, folder


def test_a_model_that_reads_images_as_tokens_is_converted_for_texts(llava, tmp_path):
    model, folder = llava
    report = convert(folder, tmp_path / "b", task="causal-lm", strategy="exact")
    assert (len(report.sites), report.left_alone) == (2, [])
    assert [i["name"] for i in report.manifest["inputs"]] == ["input_ids", "attention_mask"]
    assert "images are left out" in report.notes[0]
    ids = torch.randint(98, (3, 9))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits.numpy()
    got = session(tmp_path / "b").run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_it_has_a_cache_for_texts(llava):
    report = convert(llava[1], None, kv_cache=32, dry_run=True)
    assert len(report.sites) == 2


def test_images_beside_texts_stay_inputs(tmp_path):
    config = transformers.CLIPConfig(
        text_config=SMALL | {"vocab_size": 99, "projection_dim": 16},
        vision_config=SMALL | PATCHES | {"projection_dim": 16},
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / "model")
    report = convert(tmp_path / "model", None, dry_run=True)
    assert {"input_ids", "pixel_values"} <= {i["name"] for i in report.manifest["inputs"]}
    assert (len(report.sites), report.notes) == (4, [])


def test_a_batch_that_the_model_fixes_is_one_item(tmp_path):
    torch.manual_seed(0)
    model = transformers.PixtralVisionModel(transformers.PixtralVisionConfig(**SMALL, **PATCHES)).eval()
    model.save_pretrained(tmp_path / "model")
    report = convert(tmp_path / "model", tmp_path / "b", strategy="exact")  # it joins the images of a batch
    assert report.notes == ["batch is fixed at 1: the model computes with that size"]
    assert [i["shape"] for i in report.manifest["inputs"]] == [[1, 3, 32, 32]]
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels)[0].numpy()
    got = session(tmp_path / "b").run(None, {"pixel_values": pixels.numpy()})[0]
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
