"""tune on a trained model: MiniLM on long English texts."""

import pytest

import qexport
from qexport.demo import SENTENCES, minilm_folder
from qexport.tuning import SAME_SPEED, search
from qexport.tuning.trials import Bench

SEQ, MAX_ERROR = 128, 0.01


@pytest.fixture
def timed(monkeypatch):
    """Labels of the recipes of each timing, of the fewest rounds: only times that were taken together compare."""
    monkeypatch.setattr(search, "TIMING_SECONDS", 0)
    monkeypatch.setattr(search, "FINAL_SECONDS", 0)
    groups, try_time = [], Bench.try_time

    def watched(bench, candidates, rounds):
        groups.append({c.label for c in candidates})
        try_time(bench, candidates, rounds)

    monkeypatch.setattr(Bench, "try_time", watched)
    return groups


def test_minilm_within_one_percent(tmp_path, timed):
    """The tuned recipe holds the tolerance where validate looks at it, and errors add up as the allocation supposes."""
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    texts = [" ".join(lines[i:] + lines[:i]) for i in range(0, 16, 8)]  # some 300 tokens each, cut to SEQ
    qexport.convert(minilm_folder(), tmp_path / "b")
    report = qexport.tune(
        tmp_path / "b", texts, max_error=MAX_ERROR, seq=SEQ, trials=7, threads=1, output=tmp_path / "tuned"
    )
    assert report.passed
    assert [site["keys"] for site in report.sites] == [SEQ] * 6
    for candidate in report.candidates:
        if candidate["predicted_error"]:
            assert candidate["predicted_error"] == pytest.approx(candidate["error"], rel=0.6)
    exact = next(c for c in report.candidates if c["label"] == "exact")
    assert exact["error"] < 1e-5
    together = [c["ratio"]["of_rounds"]["p50"] for c in report.candidates if c["within"] and c["label"] in timed[-1]]
    assert report.best["ratio"]["of_rounds"]["p50"] <= (1 + SAME_SPEED) * min(together)
    checked = qexport.validate(tmp_path / "tuned", texts, seq=SEQ, max_error=MAX_ERROR, seeds=3)
    assert checked.passed, checked.reasons
