"""Hugging Face folders: config.json and weights, from the disk only."""

import json
from pathlib import Path
from shlex import quote

from qexport.bundle import read_manifest
from qexport.errors import QexportError, UsageError
from qexport.progress import portion, unwatched
from qexport.sources.huggingface_inputs import example_inputs, reads_images_as_tokens
from qexport.sources.quiet import quiet, reason_of
from qexport.sources.source import Source
from qexport.sources.torch_export import export_module, import_torch

# task -> the transformers classes that may serve it, in the order of preference
TASKS = {
    "feature-extraction": ("AutoModel",),
    "text-classification": ("AutoModelForSequenceClassification",),
    "token-classification": ("AutoModelForTokenClassification",),
    "question-answering": ("AutoModelForQuestionAnswering",),
    "masked-lm": ("AutoModelForMaskedLM",),
    "causal-lm": ("AutoModelForCausalLM", "AutoModelForImageTextToText"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM",),
    "image-classification": ("AutoModelForImageClassification",),
    "object-detection": ("AutoModelForObjectDetection",),
    "semantic-segmentation": ("AutoModelForSemanticSegmentation",),
    "depth-estimation": ("AutoModelForDepthEstimation",),
    "audio-classification": ("AutoModelForAudioClassification",),
    "speech-recognition": ("AutoModelForSpeechSeq2Seq", "AutoModelForCTC"),
}
ALIASES = {
    "default": "feature-extraction",
    "fill-mask": "masked-lm",
    "text-generation": "causal-lm",
    "text2text-generation": "seq2seq-lm",
    "image-feature-extraction": "feature-extraction",
    "automatic-speech-recognition": "speech-recognition",
    "sentence-similarity": "feature-extraction",
}
WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")


def open_folder(
    folder: Path, *, opset: int, dtype: str | None, task: str | None, positions: bool = False, say=unwatched
) -> Source:
    """Load and export the model of a Hugging Face folder; `positions` makes position ids an input, for a KV cache.

    Raises:
        UsageError: an unknown task.
        QexportError: no config.json, an architecture that transformers does not know, weights missing or damaged, or the
            export fails.
    """
    if not (folder / "config.json").is_file():
        raise QexportError(_what_else(folder))
    task = ALIASES.get(task, task) or ("causal-lm" if positions else "feature-extraction")
    if task not in TASKS:
        raise UsageError(f"task must be one of {', '.join([*TASKS, *ALIASES])}, got {task!r}")
    if positions and task != "causal-lm":
        raise UsageError(f"a KV cache needs task causal-lm, got {task!r}")
    torch = import_torch()
    say("loading the weights", 0.2)
    model = _load(folder, task)
    for part in model.modules():  # encoders and decoders hold configurations of their own
        config = getattr(part, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False
    model.config.return_dict = True
    tokenizer = _tokenizer(folder)
    kwargs, specs, axes, limits = example_inputs(torch, model, tokenizer, positions)
    if dtype is not None:
        target = getattr(torch, dtype)
        model = model.to(target)
        kwargs = {k: v.to(target) if v.is_floating_point() else v for k, v in kwargs.items()}

    def export(kwargs, axes, say):
        return export_module(
            model,
            (),
            kwargs,
            kind="huggingface",
            name=folder.resolve().name,
            opset=opset,
            axes=axes,
            output_names=names,
            specs=specs,
            say=say,
        )

    names = _output_names(torch, model, kwargs, folder)
    source = export(kwargs, axes, portion(say, 0.5, 1.0))
    if any(axes[spec.name].get(0) == "batch" and spec.shape[0] == 2 for spec in source.inputs):
        # the model computes with the size of the batch, and one item at a time is worth more than pairs
        free = {name: {i: axis for i, axis in own.items() if axis != "batch"} for name, own in axes.items()}
        source = export({name: value[:1] for name, value in kwargs.items()}, free, portion(say, 1.0, 1.0))
        source.notes.append("batch is fixed at 1: the model computes with that size")
    source.limits |= {axis: size for axis, size in limits.items() if any(axis in spec.shape for spec in source.inputs)}
    if reads_images_as_tokens(model):
        source.notes.append("its images are left out: what reads texts is converted")
    kinds = [getattr(part, "attention_type", None) for part in (model.config, *model.modules())]
    if "block_sparse" in kinds and "original_full" in kinds:  # BigBird has switched, at the length of the examples
        dense = (5 + 2 * model.config.num_random_blocks) * model.config.block_size
        source.notes.append(f"attends to all tokens at every length; the source reads more than {dense} in sparse blocks")
    source.tokenizer = _tokenizer_text(folder, tokenizer)
    source.stop_tokens = _stop_tokens(model)
    return source


def _what_else(folder: Path) -> str:
    """What a folder without config.json is, and what to give in its place."""
    try:
        read_manifest(folder)
    except QexportError:
        return f"{folder}: no config.json; give a Hugging Face folder, an .onnx or a .pt2 file"
    return (
        f"{folder}: a bundle, which is converted already; give the model that it was made of, "
        f"or change its recipe with 'qexport tune {quote(str(folder))}'"
    )


def _load(folder: Path, task: str):
    try:
        with quiet():
            import transformers
    except ImportError as error:
        raise QexportError(f'transformers cannot be imported ({reason_of(error)}): pip install "qexport[export]"') from error
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise QexportError(f"{folder}/config.json: cannot be read: {reason_of(error)}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise QexportError(f"{folder}/config.json: has no model_type, so no transformers architecture can be chosen")
    if config.get("auto_map") and config["model_type"] not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        raise QexportError(
            f"{folder}: architecture {config['model_type']!r} needs code from the folder, which is not run; "
            "export it yourself with package.module:callable"
        )
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise QexportError(f"{folder}: no weights (model.safetensors or pytorch_model.bin); copy them beside config.json")
    problem = None
    for class_name in TASKS[task]:
        for attention in ("sdpa", "eager"):
            try:
                return _from_pretrained(getattr(transformers, class_name), folder, attention)
            except QexportError as error:
                problem = problem or error
                break
            except Exception as error:
                problem = problem or _load_problem(folder, config["model_type"], task, error)
                if "scaled_dot_product_attention" not in str(error):
                    break
                problem = None  # written out in matrix products; the rules find it there
    raise problem


def _from_pretrained(model_class, folder: Path, attention: str):
    """The model with all its weights. A pooler that was never trained is left out rather than made up.

    Raises:
        QexportError: the weights lack tensors that the model needs.
    """
    for extra in ({}, {"add_pooling_layer": False}):
        with quiet():
            model, report = model_class.from_pretrained(
                folder,
                local_files_only=True,
                attn_implementation=attention,
                output_loading_info=True,
                dtype="auto",
                **extra,
            )
        missing = sorted(report["missing_keys"])
        if not missing:
            return model
        if not all(".pooler." in f".{key}" for key in missing):
            break
    raise QexportError(
        f"{folder}: the weights lack {len(missing)} tensors that {type(model).__name__} needs, {missing[0]} first; "
        "choose a task that the weights were trained for, or copy the whole checkpoint"
    )


def _load_problem(folder: Path, model_type: str, task: str, error: Exception) -> QexportError:
    text = " ".join(str(error).split())
    if "does not recognize this architecture" in text:
        return QexportError(
            f"{folder}: the installed transformers does not know the architecture {model_type!r}; upgrade it, "
            "or give package.module:callable"
        )
    if "Unrecognized configuration class" in text:
        return QexportError(
            f"{folder}: the architecture {model_type!r} has no model for the task {task!r}; choose another --task"
        )
    return QexportError(f"{folder}: cannot load the model: {reason_of(error)}")


def _tokenizer(folder: Path):
    """The folder's tokenizer, or None where it has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception:  # a model is convertible without its tokenizer; random ids stand in for the text then
        return None


def _tokenizer_text(folder: Path, tokenizer) -> str | None:
    """The text of tokenizer.json, from the folder or from the loaded tokenizer."""
    file = folder / "tokenizer.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else None


def _stop_tokens(model) -> list[int]:
    """The token ids that end a text, by the model's own configuration for generating."""
    config = getattr(model, "generation_config", None) or model.config
    stop = getattr(config, "eos_token_id", None)
    return [] if stop is None else [stop] if isinstance(stop, int) else list(stop)


def _output_names(torch, model, kwargs, folder) -> list[str]:
    """Names of the outputs, as the model's own output class calls them."""
    try:
        with quiet(), torch.no_grad():
            outputs = model(**kwargs)
    except Exception as error:
        raise QexportError(
            f"{folder}: {type(model).__name__} does not run on example inputs: {reason_of(error)}; "
            "give package.module:callable, which brings its own"
        ) from error
    names = []
    for key, value in outputs.items():
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(value) if torch.is_tensor(leaf)]
        names += [key] if len(leaves) == 1 else [f"{key}_{i}" for i in range(len(leaves))]
    return names
