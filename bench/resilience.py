"""How noisy a device may be before a model breaks: `qexport resilience` on MiniLM and on stories15M.

    python -m bench.resilience [--seeds 5] [--json FILE] [--plot FILE]

minilm-N    all-MiniLM-L6-v2 on film reviews cut at N tokens: 1 - the cosine with the classical embedding
stories     stories15M on texts of 200 tokens that its classical model drew: perplexity

`thresholds` are the levels up to which 1 % or less is lost, `cells` what is lost at each level. The plot is that of stories
with depolarizing noise.
"""

import tempfile
from pathlib import Path

import numpy as np

import qexport
from bench import common
from bench.minilm_error import texts
from bench.models import minilm_dir, stories15m_folder

MITIGATION = ("none", "zne", "repetition:3", "readout_inversion")
STORY_TOKENS, BOS = 200, 1
# (inputs, noise, mitigation, items)
CASES = (
    ("stories", "depolarizing", MITIGATION, 6),
    ("stories", "amplitude_damping", ("none",), 6),
    ("minilm-128", "depolarizing", MITIGATION, 16),
    ("minilm-512", "depolarizing", ("none",), 4),
)


def stories(session, count: int) -> np.ndarray:
    """Texts that stories15M draws, token ids (count, STORY_TOKENS)."""
    rng, ids = np.random.default_rng(0), np.full((count, 1), BOS)
    while ids.shape[1] < STORY_TOKENS:
        logits = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][:, -1].astype(np.float64)
        # the largest of logits + Gumbel noise is a draw from their softmax
        ids = np.concatenate([ids, (logits + rng.gumbel(size=logits.shape)).argmax(-1)[:, None]], 1)
    return ids


def main():
    parser = common.parser(__doc__.split("\n")[0], seeds=5)
    parser.add_argument("--plot", metavar="FILE", help="draw the first case to this file")
    arguments = parser.parse_args()
    thresholds, cells = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        qexport.convert(minilm_dir(), folder / "minilm")
        qexport.convert(stories15m_folder(folder / "hf"), folder / "stories", task="causal-lm")
        for inputs, noise, mitigation, items in CASES:
            kind, _, length = inputs.partition("-")
            if length:
                ids = texts(items, int(length))[0]
            else:
                ids = stories(qexport.session(folder / "stories" / "classical.onnx", library=False), items)
            report = qexport.measure_resilience(
                folder / kind,
                {"input_ids": ids},
                noise=noise,
                mitigation=mitigation,
                seeds=arguments.seeds,
                plot=arguments.plot if not cells else None,
            )
            about = {"inputs": inputs, "noise": noise, "metric": report.metric["name"]}
            for line in report.thresholds:
                low, high = line["level_ci95"] or (None, None)
                thresholds.append(about | {key: line[key] for key in ("mitigation", "shots", "level", "verdict")})
                thresholds[-1] |= {"low": low, "high": high}
            for cell in report.cells:
                low, high = cell["loss"]["ci95"] or (None, None)
                row = about | {key: cell[key] for key in ("mitigation", "shots", "level")}
                loss, error = cell["loss"]["mean"], cell["attention_error"]["mean"]
                cells.append(row | {"loss": loss, "low": low, "high": high, "attention_error": error})
    parameters = {"seeds": arguments.seeds, "story_tokens": STORY_TOKENS}
    common.report("resilience", arguments.threads, parameters, {"thresholds": thresholds, "cells": cells}, arguments.json)


if __name__ == "__main__":
    main()
