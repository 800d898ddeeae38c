"""Inputs for a bundle: stored samples, named arrays of an .npz file, lines of text, or generated from the manifest.

Every source ends as `Inputs`: a list of feeds (batches) for `session.run`, checked against the manifest's inputs. A feed
holds no seed; the caller adds it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qexport.bundle import Bundle
from qexport.errors import QexportError, UsageError
from qexport.feeds import check_feed, dim_size

DEFAULT_BATCH = 8
GIVEN = "given texts"


@dataclass
class Inputs:
    """Batches of inputs: `feeds` for session.run, `source` in words, `notes` on what was cut or filled in.

    `expected` holds the stored outputs of the classical model for each feed, by name, where the source has them.
    """

    feeds: list[dict[str, np.ndarray]]
    source: str
    notes: list[str] = field(default_factory=list)
    expected: list[dict[str, np.ndarray]] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of batch items, by the first input of each feed."""
        return sum(_batch_size(feed) for feed in self.feeds)


def load_inputs(bundle: Bundle, data=None, *, batch: int | None = None, seq: int | None = None) -> Inputs:
    """Inputs from where `data` says.

    Args:
        data: None for the stored samples (generated inputs when `batch` or `seq` is given), a path of an .npz or .txt file,
            a dict of arrays by input name, or a list of texts.
        batch: items per feed (files), or items (generated).
        seq: length that texts are cut to, or length of generated inputs.

    Raises:
        UsageError: an unknown kind of file, or a batch or seq outside its limits.
        QexportError: the data does not fit the model's inputs; the message names the input, the value and the limit.
    """
    for name, value in (("batch", batch), ("seq", seq)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be >= 1, got {value}")
    if data is None:
        if batch is None and seq is None:
            return stored_samples(bundle)
        return generate(bundle, batch=batch or 1, seq=seq, ragged=True)
    if isinstance(data, dict):
        return _split(bundle, data, "arrays", batch or DEFAULT_BATCH)
    if isinstance(data, (list, tuple)):
        if not data or not all(isinstance(text, str) for text in data):
            raise UsageError("data must be a path, a dict of arrays or a list of texts that is not empty")
        return tokenize(bundle, list(enumerate(data, 1)), GIVEN, batch=batch or DEFAULT_BATCH, seq=seq)
    path = Path(data)
    if not path.is_file():
        raise QexportError(f"{path}: no such data file")
    if path.suffix == ".npz":
        return _split(bundle, _read_npz(path), str(path), batch or DEFAULT_BATCH)
    if path.suffix == ".txt":
        return read_text(bundle, path, batch=batch or DEFAULT_BATCH, seq=seq)
    raise UsageError(f"{path}: unknown kind of data; give .npz (one array per input) or .txt (one text per line)")


def stored_samples(bundle: Bundle) -> Inputs:
    """The inputs and classical outputs in test_data_set_0 of the bundle.

    Raises:
        QexportError: the folder has no inputs, or a file is damaged.
    """
    from onnx import TensorProto, numpy_helper

    arrays = {}
    for kind in ("input", "output"):
        arrays[kind] = {}
        for file in sorted(bundle.samples_path.glob(f"{kind}_*.pb"), key=lambda p: int(re.sub(r"\D", "", p.stem) or 0)):
            tensor = TensorProto()
            try:
                tensor.ParseFromString(file.read_bytes())
                arrays[kind][tensor.name] = numpy_helper.to_array(tensor)
            except Exception as error:  # protobuf's DecodeError has no stable home, and to_array raises several types
                raise QexportError(f"{file}: damaged sample ({' '.join(str(error).split())}); convert again") from error
    inputs = {name: array for name, array in arrays["input"].items() if name != bundle.seed_input}
    if not inputs:
        raise QexportError(
            f"{bundle.samples_path}: holds no stored inputs; give --data, or --batch and --seq to generate some"
        )
    feed, notes = check_feed(bundle, inputs, str(bundle.samples_path))
    return Inputs([feed], "stored samples", notes, [arrays["output"]] if arrays["output"] else [])


def read_text(bundle: Bundle, path, *, batch: int = DEFAULT_BATCH, seq: int | None = None) -> Inputs:
    """Lines of a text file through the bundle's tokenizer, each batch padded to its longest line. Empty lines are skipped.

    Raises:
        QexportError: no tokenizer in the bundle or no `tokenizers` package, no text, or a line longer than the model takes
            (and no `seq` to cut it to).
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise QexportError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise QexportError(f"{path}: holds no text; write one text per line")
    return tokenize(bundle, numbered, str(path), batch=batch, seq=seq)


def tokenize(bundle: Bundle, numbered, source: str, *, batch: int = DEFAULT_BATCH, seq: int | None = None) -> Inputs:
    """Texts as feeds; `numbered` are (line number, text) pairs. See `read_text`."""
    tokenizer, pad_id = open_tokenizer(bundle)
    limit = _sequence_limit(bundle.manifest)
    encodings = tokenizer.encode_batch([text for _, text in numbered])
    if seq is not None and limit is not None and seq > limit:
        raise UsageError(f"seq {seq} is longer than the model takes ({limit}); lower it")
    lengths = [len(encoding.ids) for encoding in encodings]
    for (number, _), length in zip(numbered, lengths, strict=True):
        if seq is None and limit is not None and length > limit:
            mend = f"shorten it or cut with --seq {limit}"
            raise QexportError(f"{source}, line {number}: {length} tokens, the model takes at most {limit}; {mend}")
    feeds, notes = [], []
    if seq is not None and (cut := sum(length > seq for length in lengths)):
        tokenizer.enable_truncation(seq)  # again from the text, so that the closing special tokens stay
        encodings = tokenizer.encode_batch([text for _, text in numbered])
        notes.append(f"{cut} of {len(numbered)} texts cut to {seq} tokens")
    for start in range(0, len(encodings), batch):
        feed, more = check_feed(bundle, _text_arrays(bundle, encodings[start : start + batch], pad_id), source)
        feeds.append(feed)
        notes += [note for note in more if note not in notes]
    count = len(numbered)
    return Inputs(feeds, f"{count} {source}" if source == GIVEN else f"{count} texts of {source}", notes)


def open_tokenizer(bundle: Bundle):
    """The bundle's tokenizer without truncation and padding, and the id it pads with."""
    if not bundle.tokenizer_path.is_file():
        raise QexportError(f"{bundle.path}: has no tokenizer/tokenizer.json, so it takes no text; give an .npz file")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise QexportError("reading text needs the package tokenizers: pip install tokenizers") from None
    try:
        tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
    except Exception as error:  # tokenizers raises Exception itself
        raise QexportError(f"{bundle.tokenizer_path}: not a tokenizer: {' '.join(str(error).split())}") from error
    pad_id = (tokenizer.padding or {}).get("pad_id", 0)
    tokenizer.no_truncation()  # what the tokenizer would cut silently must be seen here
    tokenizer.no_padding()
    return tokenizer, pad_id


def _text_arrays(bundle: Bundle, encodings, pad_id: int) -> dict[str, np.ndarray]:
    """Arrays (batch, longest) of one batch of encodings, for the inputs that text can fill."""
    length = max(len(encoding.ids) for encoding in encodings)

    def padded(rows, value=0):
        return np.array([list(row) + [value] * (length - len(row)) for row in rows])

    by_kind = {
        "token_ids": padded([e.ids for e in encodings], pad_id),
        "mask": padded([e.attention_mask for e in encodings]),
        "token_types": padded([e.type_ids for e in encodings]),
        "position_ids": np.tile(np.arange(length), (len(encodings), 1)),
    }
    kinds = [spec["kind"] for spec in bundle.manifest["inputs"]]
    if "token_ids" not in kinds:
        raise QexportError(f"{bundle.path}: has no input of token ids, so it takes no text; give an .npz file")
    if "mask" not in kinds and len({len(e.ids) for e in encodings}) > 1:
        raise QexportError(f"{bundle.path}: has no mask input, so texts of unequal length need --batch 1")
    return {
        spec["name"]: by_kind[spec["kind"]].astype(spec["dtype"])
        for spec in bundle.manifest["inputs"]
        if spec["kind"] in by_kind and not _has_past(spec)
    }


def generate(
    bundle: Bundle, *, batch: int = 1, seq: int | None = None, ragged: bool = False, seed: int = 0, dims: dict | None = None
) -> Inputs:
    """Inputs of given sizes: token ids uniform in [0, high), standard normal for continuous inputs, masks of ones. With a KV
    cache the tokens are the last that fit into it.

    Args:
        batch, seq: sizes of the symbolic dimensions; `seq` is 128, or the model's limit when that is less, when None.
        ragged: masks of random lengths in [seq / 2, seq], the first item full, as padded text has.
        seed: seed of the generator; the same arguments give the same inputs.
        dims: sizes of symbolic dimensions by name, where they differ from `batch` and `seq`.

    Raises:
        UsageError: `seq` is longer than the model takes.
        QexportError: the manifest does not say the range of an integer input.
    """
    manifest = bundle.manifest
    sizes = dimension_sizes(manifest, batch, seq, dims)
    rng = np.random.default_rng(seed)
    feed, lengths = {}, {}
    for spec in manifest["inputs"]:
        shape = tuple(dim_size(dim, sizes) for dim in spec["shape"])
        feed[spec["name"]] = _generated(spec, shape, rng, ragged, lengths, bundle)
    if (cache := manifest.get("kv_cache")) is not None:
        feed[cache["past_length"]][...] = cache["length"] - feed[cache["token_ids"]].shape[1]
    words = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return Inputs([feed], f"generated ({words})" if words else "generated")


def _generated(spec, shape, rng, ragged, lengths, bundle):
    kind, dtype, high = spec["kind"], spec["dtype"], spec.get("high")
    if kind == "mask":
        mask = np.ones(shape)
        if ragged and len(shape) == 2 and shape[0] > 1:
            # masks of one shape share their lengths, as the rows of one batch do
            if shape not in lengths:
                lengths[shape] = np.concatenate([[shape[1]], rng.integers((shape[1] + 1) // 2, shape[1] + 1, shape[0] - 1)])
            mask = np.arange(shape[1]) < lengths[shape][:, None]
        return mask.astype(dtype)
    if kind == "position_ids":
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    if kind == "token_types":
        return np.zeros(shape, dtype)
    if kind == "boolean" or dtype == "bool":
        return rng.integers(0, 2, shape).astype(dtype)
    if kind in ("token_ids", "integer", "past_length"):
        if not high:
            raise QexportError(f"{bundle.path}: the manifest has no upper bound for input {spec['name']!r}; give --data")
        return rng.integers(0, high, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def dimension_sizes(manifest: dict, batch: int, seq: int | None, dims: dict | None = None) -> dict[str, int]:
    """Sizes of the symbolic dimensions of the inputs: the first axis is the batch, every other one `seq`, up to its limit.

    Raises:
        UsageError: `seq` or a size in `dims` is above the model's limit.
    """
    limits, dims, sizes = manifest["limits"], dict(dims or {}), {}
    for spec in manifest["inputs"]:
        for axis, dim in enumerate(spec["shape"]):
            if not isinstance(dim, str):
                continue
            for name in re.findall(r"[A-Za-z_]\w*", dim):
                if name not in sizes:
                    is_batch = axis == 0 or "batch" in name
                    sizes[name] = dims.get(name, batch if is_batch else _length(seq, limits.get(name)))
    for name, size in sizes.items():
        if name in limits and size > limits[name]:
            raise UsageError(f"{name} {size} is longer than the model takes ({limits[name]}); lower it")
    return sizes


def _length(seq: int | None, limit: int | None) -> int:
    return seq if seq is not None else min(128, limit or 128)


def _sequence_limit(manifest: dict) -> int | None:
    """The longest sequence of the first input of token ids, None when unknown."""
    for spec in manifest["inputs"]:
        if spec["kind"] == "token_ids" and len(spec["shape"]) > 1:
            dim = spec["shape"][1]
            return dim if isinstance(dim, int) else manifest["limits"].get(dim)
    return manifest["limits"].get("sequence")


def _has_past(spec) -> bool:
    return any(isinstance(dim, str) and "past" in dim for dim in spec["shape"])


def _batch_size(feed: dict) -> int:
    return next((array.shape[0] for array in feed.values() if array.ndim), 1)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib, numpy and OS errors
        raise QexportError(
            f"{path}: not a readable .npz file ({' '.join(str(error).split())}); write it with numpy.savez"
        ) from error


def _split(bundle: Bundle, arrays: dict, source: str, batch: int) -> Inputs:
    """Arrays of many samples cut into feeds of `batch` items along the axis named like the first axis of the inputs."""
    feed, notes = check_feed(bundle, {name: np.asarray(array) for name, array in arrays.items()}, source)
    specs = {spec["name"]: spec for spec in bundle.manifest["inputs"]}
    batched = [name for name in feed if specs[name]["shape"] and isinstance(specs[name]["shape"][0], str)]
    if not batched:
        return Inputs([feed], source, notes)
    total = feed[batched[0]].shape[0]
    feeds = [
        {name: array[start : start + batch] if name in batched else array for name, array in feed.items()}
        for start in range(0, total, batch)
    ]
    return Inputs(feeds, source, notes)
