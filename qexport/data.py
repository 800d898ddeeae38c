"""Inputs for a bundle: stored samples, named arrays of an .npz file, lines of text, or generated from the manifest.

Every source ends as `Inputs`: a list of feeds (batches) for `session.run`, checked against the manifest's inputs. A feed
holds no seed; the caller adds it.
"""

import os
import re
import zipfile
from pathlib import Path

import numpy as np

from qexport.arguments import whole
from qexport.bundle import Bundle
from qexport.errors import QexportError, UsageError
from qexport.failures import one_line
from qexport.feeds import Inputs, check_feed
from qexport.generated import generate, symbols

DEFAULT_BATCH = 8
GIVEN = "given texts"
WANTED = "data must be a path, a dict of arrays or a list of texts that is not empty"


def load_inputs(bundle: Bundle, data=None, *, batch: int | None = None, seq: int | None = None) -> Inputs:
    """Inputs from where `data` says.

    Args:
        data: None for the stored samples (generated inputs when `batch` or `seq` is given), a path of an .npz or .txt file,
            a dict of arrays by input name, a list of texts, or `Inputs` as they are.
        batch: items per feed (files), or items (generated).
        seq: length that texts are cut to, or length of generated inputs; not for arrays.

    Raises:
        UsageError: a batch or seq outside its limits.
        QexportError: no such file, an unknown kind of file, or the data does not fit the model's inputs; the message names
            the input, the value and the limit.
    """
    for name, value in (("batch", batch), ("seq", seq)):
        if value is not None:
            whole(name, value)
    if isinstance(data, Inputs):
        return data
    if data is None:
        if batch is None and seq is None:
            return stored_samples(bundle)
        return generate(bundle, batch=batch or 1, seq=seq, ragged=True)
    if isinstance(data, dict):
        return _split(bundle, data, "arrays", batch or DEFAULT_BATCH, seq)
    if isinstance(data, (list, tuple)):
        if not data or not all(isinstance(text, str) for text in data):
            raise UsageError(f"{WANTED}, got {one_line(repr(data))}")
        return tokenize(bundle, list(enumerate(data, 1)), GIVEN, batch=batch or DEFAULT_BATCH, seq=seq)
    if not isinstance(data, (str, os.PathLike)):
        raise UsageError(f"{WANTED}, got {one_line(repr(data))}")
    path = Path(data)
    if path.is_dir():
        raise QexportError(f"{path}: a folder; give the .npz or .txt file itself")
    if not path.is_file():
        raise QexportError(f"{path}: no such data file")
    if path.suffix == ".npz":
        return _split(bundle, _read_npz(path), str(path), batch or DEFAULT_BATCH, seq)
    if path.suffix == ".txt":
        return read_text(bundle, path, batch=batch or DEFAULT_BATCH, seq=seq)
    raise QexportError(f"{path}: unknown kind of data; give .npz (one array per input) or .txt (one text per line)")


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
        # lines end where editors end them: str.splitlines also ends them at form feeds and the like
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
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
    texts = "1 text" if len(numbered) == 1 else f"{len(numbered)} texts"
    return Inputs(feeds, texts if source == GIVEN else f"{texts} of {source}", notes)


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


def _sequence_limit(manifest: dict) -> int | None:
    """The longest sequence of the first input of token ids, None when unknown."""
    for spec in manifest["inputs"]:
        if spec["kind"] == "token_ids" and len(spec["shape"]) > 1:
            dim = spec["shape"][1]
            return dim if isinstance(dim, int) else manifest["limits"].get(dim)
    return manifest["limits"].get("sequence")


def _has_past(spec) -> bool:
    return any(isinstance(dim, str) and "past" in dim for dim in spec["shape"])


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):  # of which numpy says that it may be a pickle, and how to load it all the same
        raise QexportError(f"{path}: not a readable .npz file (no zip archive of arrays); write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib, numpy and OS errors
        raise QexportError(
            f"{path}: not a readable .npz file ({' '.join(str(error).split())}); write it with numpy.savez"
        ) from error


def _split(bundle: Bundle, arrays: dict, source: str, batch: int, seq: int | None) -> Inputs:
    """Arrays of many samples cut into feeds of `batch` items along the first axis of those that have the batch there."""
    if seq is not None:
        raise UsageError(f"seq is for texts and generated inputs, got {seq} beside {source}; cut the arrays themselves")
    try:
        given = {name: np.asarray(array) for name, array in arrays.items()}
    except ValueError as error:  # rows of different lengths
        raise QexportError(f"{source}: an input is no array: {one_line(error)}; fill up its rows to one length") from error
    feed, notes = check_feed(bundle, given, source)
    is_batch = symbols(bundle.manifest)
    batched = [spec["name"] for spec in bundle.manifest["inputs"] if spec["shape"] and is_batch.get(spec["shape"][0])]
    if not batched:
        return Inputs([feed], source, notes)
    total = feed[batched[0]].shape[0]
    batched = [name for name in batched if feed[name].shape[0] == total]
    feeds = [
        {name: array[start : start + batch] if name in batched else array for name, array in feed.items()}
        for start in range(0, total, batch)
    ]
    return Inputs(feeds, source, notes)
