"""IMDB: what sampled attention costs a classifier of long texts. Logistic regression on MiniLM embeddings of film reviews.

    python -m bench.imdb [--reviews 1000] [--threads 2] [--json FILE]

Reviews of more than 512 tokens, cut there, are embedded (mean over the tokens, normalised) by the classical and by each
converted model. Per model a probe is fitted on its own embeddings, and judged on reviews that it has not seen (5 folds).
`loss_percent` is relative to the classical model's accuracy; `ci95` is the half width of the interval of that loss, from the
reviews that only one of the two classifies rightly. `cosine` is the mean between a review's two embeddings.
"""

import tempfile
from pathlib import Path

import numpy as np

import qexport
from bench import common
from bench.minilm_error import pooled, texts
from bench.models import minilm_dir
from qexport.runtime import quiet_options

LENGTH, FOLDS = 512, 5
# What `convert` is given; nothing is the recipe that a user gets who says nothing.
RECIPES = {
    "default": {},
    "stratified, 32 samples": {"strategy": "stratified", "num_samples": 32},
    "stratified, 64 samples": {"strategy": "stratified", "num_samples": 64},
}


def right(embeddings: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Which reviews a probe classifies rightly that was fitted on the other folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    probe = LogisticRegression(C=10.0, max_iter=1000)
    return cross_val_predict(probe, embeddings, positive, cv=FOLDS) == positive


def compared(found: np.ndarray, classical: np.ndarray) -> dict:
    """Accuracy and relative loss in percent, with the 95 % interval of the paired difference."""
    difference = classical.astype(float) - found
    half = 1.96 * difference.std(ddof=1) / len(found) ** 0.5
    scale = 100 / classical.mean()
    return {
        "accuracy_percent": 100 * float(found.mean()),
        "loss_percent": float(scale * difference.mean()),
        "ci95": float(scale * half),
    }


def embed(session, ids: np.ndarray, seed: int | None = None, batch: int = 8) -> np.ndarray:
    return np.concatenate([pooled(session, ids[i : i + batch], seed) for i in range(0, len(ids), batch)])


def main():
    arguments = common.parser(__doc__.split("\n")[0], reviews=1000).parse_args()
    ids, positive = texts(arguments.reviews, LENGTH)
    rows, classical = [], None

    def opened(path: Path):
        return qexport.session(path, options=quiet_options(arguments.threads))

    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            bundle = Path(folder) / name
            qexport.convert(minilm_dir(), bundle, **recipe)
            if classical is None:
                classical = embed(opened(bundle / "classical.onnx"), ids)
                known = right(classical, positive)
                rows.append({"attention": "classical"} | compared(known, known) | {"cosine": 1.0})
            embeddings = embed(opened(bundle / "model.onnx"), ids)
            cosine = float((embeddings * classical).sum(1).mean())
            rows.append({"attention": name} | compared(right(embeddings, positive), known) | {"cosine": cosine})
    parameters = {"reviews": arguments.reviews, "tokens": LENGTH, "folds": FOLDS, "positive": float(positive.mean())}
    common.report("imdb", arguments.threads, parameters, {"probe": rows}, arguments.json)


if __name__ == "__main__":
    main()
