"""STS-B: what sampled attention costs on a task. Spearman correlation of all-MiniLM-L6-v2 embeddings, classical and sampled.

    python -m bench.sts_b [--split test] [--seeds 5] [--json FILE]

Every sentence pair of the split is embedded (mean over the tokens, normalised) and ranked by cosine. Sentences of one length
share a batch, so there is no padding. A sentence of no more tokens than samples is computed exactly (but for `naive`): the
share of longer sentences says how much of a row was sampled at all. The row `default` is what `convert`
makes without a word.
"""

import csv
import gzip
import tempfile
from pathlib import Path

import numpy as np

import qexport
from bench import common
from bench.models import minilm_dir
from bench.packages import fetch
from qexport.runtime import quiet_options

PUBLISHED = 82.03  # Spearman x 100 of all-MiniLM-L6-v2 on the test split
CONFIGURATIONS = (
    *(("stratified", samples, 1) for samples in (32, 16, 8, 4)),
    ("stratified", 8, 0),
    *((strategy, samples, 1) for samples in (32, 8) for strategy in ("adaptive", "hybrid", "naive")),
)


def pairs(split: str) -> tuple[list[str], list[str], np.ndarray]:
    """Sentences and similarity scores (0 to 5) of one split of STS-B: "train", "dev" or "test"."""
    file = fetch("text2vec") / "stsbenchmark.tsv.gz"
    with gzip.open(file, "rt", encoding="utf-8") as text:
        rows = [row for row in csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if row["split"] == split]
    return (
        [row["sentence1"] for row in rows],
        [row["sentence2"] for row in rows],
        np.array([float(r["score"]) for r in rows]),
    )


def tokenizer():
    """The tokenizer of all-MiniLM-L6-v2, without padding, cut at 256 tokens as its authors use it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_dir() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    return tokenizer


def embed(session, sequences: list[list[int]], batch: int = 64, seed: int | None = None) -> np.ndarray:
    """Mean-pooled, normalised embeddings of token sequences, (len(sequences), 384)."""
    names = {i.name for i in session.get_inputs()}
    by_length = {}
    for index, sequence in enumerate(sequences):
        by_length.setdefault(len(sequence), []).append(index)
    embeddings = None
    for indices in by_length.values():
        for start in range(0, len(indices), batch):
            part = indices[start : start + batch]
            ids = np.array([sequences[i] for i in part], dtype=np.int64)
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            if seed is not None:
                feeds["seed"] = np.array(seed, dtype=np.int64)
            hidden = session.run(None, {name: value for name, value in feeds.items() if name in names or name == "seed"})[0]
            if embeddings is None:
                embeddings = np.empty((len(sequences), hidden.shape[-1]))
            embeddings[part] = hidden.mean(1)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def embed_all(session, sequences, seed=None) -> np.ndarray:
    """`embed` of sequences some of which are equal: each is computed once."""
    unique = sorted(set(map(tuple, sequences)))
    place = {sequence: i for i, sequence in enumerate(unique)}
    return embed(session, unique, seed=seed)[[place[tuple(sequence)] for sequence in sequences]]


def correlation(embeddings: np.ndarray, scores) -> float:
    """Spearman correlation x 100 of cosines with scores; the first half of the embeddings pairs with the second half."""
    from scipy.stats import spearmanr

    left, right = embeddings[: len(scores)], embeddings[len(scores) :]
    return 100 * float(spearmanr((left * right).sum(1), scores).statistic)


def spearman(session, sequences, scores, seed=None) -> float:
    """`correlation` of the sequences' embeddings by a model."""
    return correlation(embed_all(session, sequences, seed), scores)


def main():
    arguments = common.parser(__doc__.split("\n")[0], split="test", seeds=5).parse_args()
    first, second, scores = pairs(arguments.split)
    sequences = [encoding.ids for encoding in tokenizer().encode_batch(first + second)]
    lengths = np.array([len(sequence) for sequence in sequences])

    def open_session(path, library=True):
        return qexport.session(path, library=library, options=quiet_options(arguments.threads))

    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "minilm"
        qexport.convert(minilm_dir(), bundle, strategy="stratified", num_samples=32)
        classical = spearman(open_session(bundle / "classical.onnx"), sequences, scores)
        rows = [_row("classical", None, None, [classical], classical, None)]
        fallback = spearman(open_session(bundle / "model.onnx", library=False), sequences, scores)
        rows.append(_row("stratified, without the library", 32, 1, [fallback], classical, None))
        qexport.convert(minilm_dir(), Path(scratch) / "default")
        default = spearman(open_session(Path(scratch) / "default" / "model.onnx"), sequences, scores)
        rows.append(_row("default", None, None, [default], classical, None))
        for strategy, samples, control_variate in CONFIGURATIONS:
            model = common.with_attributes(
                bundle / "model.onnx",
                bundle / "other.onnx",
                strategy=strategy,
                num_samples=[samples],
                control_variate=control_variate,
            )
            session = open_session(model)
            values = [spearman(session, sequences, scores, seed) for seed in range(arguments.seeds)]
            longer = 100 * float(np.mean(lengths > samples)) if strategy != "naive" else 100.0
            rows.append(_row(strategy, samples, control_variate, values, classical, longer))

    parameters = {
        "split": arguments.split,
        "pairs": len(scores),
        "seeds": arguments.seeds,
        "mean_tokens": round(float(lengths.mean()), 1),
        "published": PUBLISHED if arguments.split == "test" else None,
    }
    common.report("sts_b", arguments.threads, parameters, {"spearman": rows}, arguments.json)


def _row(strategy, samples, control_variate, values, classical, longer):
    mean, half = common.mean_interval(values)
    return {
        "strategy": strategy,
        "samples": samples,
        "control_variate": control_variate,
        "spearman_x100": round(mean, 3),
        "ci95": round(half, 3) if len(values) > 1 else None,
        "loss_percent": round(100 * (classical - mean) / classical, 3),
        "sampled_sentences_percent": longer,
    }


if __name__ == "__main__":
    main()
