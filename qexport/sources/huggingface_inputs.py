"""Example inputs for a transformers model: what its `forward` accepts decides which."""

import inspect

from qexport.errors import QexportError
from qexport.sources.source import InputSpec

# Of different length, so that the example batch holds padding; the first has more tokens than a query samples by default, so
# that the stored samples of a bundle do sample.
SENTENCES = (
    "The river rose after a week of rain, and the old bridge was closed to lorries before the weekend. Farmers moved their "
    "cattle to the hills, the school sent its pupils home at noon, and by evening the lower road had become a brown lake in "
    "which only the tops of the fence posts and the roof of the bus shelter could still be seen.",
    "She tuned the violin by ear.",
)
# Length of made-up texts, where there is no tokenizer: also more than a query samples by default.
RANDOM_TOKENS = 48
# Frames of made-up sound, where the model does not fix their number.
RANDOM_FRAMES = 200
# How configurations call the width of a frame in models that read (frames, width); Whisper and its kin read (bins, frames).
FRAME_WIDTHS = ("feature_projection_input_dim", "input_feat_per_channel")
# How configurations call the token that stands for a part of an image.
IMAGE_TOKENS = ("image_token_id", "image_token_index")


def example_inputs(torch, model, tokenizer, positions):
    """Example tensors, what is known of each input, dynamic axes, all by name, and limits of the axes.

    Args:
        tokenizer: of the model's folder; None for random token ids.
        positions: whether position ids become an input in place of a mask, for a KV cache.

    Raises:
        QexportError: the model takes something for which no example is known.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    accepted = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    vocab = getattr(config, "vocab_size", None)
    kwargs, specs, axes, limits = {}, {}, {}, {}

    def add(name, tensor, kind, high, *axis_names):
        kwargs[name] = tensor
        specs[name] = InputSpec(name, "", [], kind, high)
        axes[name] = {i: axis for i, axis in enumerate(axis_names) if axis}

    if main == "input_ids" or {"pixel_values", "input_ids"} <= set(accepted):
        ids, mask = _text(torch, tokenizer, vocab, longest_text(model, config), generator)
        add("input_ids", ids, "token_ids", vocab, "batch", "sequence")
        if positions:
            if "position_ids" not in accepted:
                raise QexportError(f"{type(model).__name__} takes no position ids, which a KV cache needs")
            places = torch.arange(ids.shape[1]).expand(ids.shape[0], -1).contiguous()
            add("position_ids", places, "position_ids", longest_text(model, config), "batch", "sequence")
        elif "attention_mask" in accepted:
            add("attention_mask", mask, "mask", 2, "batch", "sequence")
        if "token_type_ids" in accepted and not positions and getattr(config, "type_vocab_size", 0):
            add("token_type_ids", torch.zeros_like(ids), "token_types", config.type_vocab_size, "batch", "sequence")
        if longest := longest_text(model, config):
            limits["sequence"] = longest
    if "pixel_values" in accepted and not reads_images_as_tokens(model):
        vision = getattr(model.config, "vision_config", model.config)
        size = getattr(vision, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        frames = [vision.num_frames] if main == "pixel_values" and getattr(vision, "num_frames", 0) else []  # of a video
        pixels = torch.randn(2, *frames, getattr(vision, "num_channels", 3), height, width, generator=generator)
        add("pixel_values", pixels, "continuous", None, "batch")
    if main == "input_features" and (width := _frame_width(model.config)):
        sound = torch.randn(2, RANDOM_FRAMES, width, generator=generator)
        add("input_features", sound, "continuous", None, "batch", "frames")
    elif main == "input_features":
        frames = 2 * getattr(model.config, "max_source_positions", 1500)
        bins = getattr(model.config, "num_mel_bins", None) or getattr(model.config, "feature_size", 80)
        if model.config.model_type == "audio-spectrogram-transformer":
            frames, bins = model.config.max_length, model.config.num_mel_bins
        add("input_features", torch.randn(2, bins, frames, generator=generator), "continuous", None, "batch")
    elif main == "input_values":
        if hasattr(model.config, "max_length") and hasattr(model.config, "num_mel_bins"):
            shape = (2, model.config.max_length, model.config.num_mel_bins)
            add("input_values", torch.randn(*shape, generator=generator), "continuous", None, "batch")
        else:
            wave = torch.randn(2, 16000, generator=generator)
            add("input_values", wave, "continuous", None, "batch", "samples")
    if "decoder_input_ids" in accepted:
        longest = getattr(config, "max_target_positions", None) or longest_text(model, config)
        ids, _ = _text(torch, tokenizer, vocab, longest, generator)
        # another length than the encoder's, so that the two axes are not taken for one
        add("decoder_input_ids", ids[:, : ids.shape[1] - 3], "token_ids", vocab, "batch", "decoder_sequence")
        if longest:
            limits["decoder_sequence"] = longest
    if not kwargs:
        raise QexportError(
            f"{type(model).__name__} takes {main!r}, for which no example inputs are known; give package.module:callable"
        )
    return kwargs, specs, axes, limits


def reads_images_as_tokens(model) -> bool:
    """Whether images stand for tokens of a text, which is read without any where none is given."""
    pixels = inspect.signature(model.forward).parameters.get("pixel_values")
    has_token = any(getattr(model.config, name, None) is not None for name in IMAGE_TOKENS)
    return has_token and pixels is not None and pixels.default is None


def _frame_width(config) -> int | None:
    """The last axis of input_features where the frames are the axis before it, else None."""
    widths = [width for name in FRAME_WIDTHS if (width := getattr(config, name, None))]
    return widths[0] if widths else getattr(getattr(config, "encoder_config", None), "num_mel_bins", None)  # Parakeet


def _text(torch, tokenizer, vocab, longest, generator):
    """Token ids and mask (2, n) of the example sentences, cut to `longest`, or random ids where there is no tokenizer."""
    if tokenizer is not None:
        cut = {"truncation": True, "max_length": longest} if longest else {}
        rows = [tokenizer(text, **cut)["input_ids"] for text in SENTENCES]
        if vocab is None or max(max(row) for row in rows) < vocab:
            longest = max(len(row) for row in rows)
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
            ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            return ids, mask
    ids = torch.randint(
        min(10, (vocab or 2) - 1), vocab or 2, (2, min(RANDOM_TOKENS, longest or RANDOM_TOKENS)), generator=generator
    )
    return ids, torch.ones_like(ids)


def longest_text(model, config) -> int | None:
    """The longest sequence that the position table serves, or None where there is no table."""
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest <= 0:
        return None
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None), None)
    # Where the table has a row for padding, positions begin behind it, as in RoBERTa.
    return longest if padding is None else longest - padding - 1
