"""compress stopped and taken up again."""

import pytest
from compression_cases import language_model, token_ids

from qexport import conversion
from qexport.bundle import Bundle, sha256
from qexport.compression import compress
from qexport.compression.checkpoint import Checkpoint
from qexport.errors import QexportError


def test_a_stopped_run_goes_on_where_it_was(lm, tmp_path):
    wanted, steps = compress(lm, tmp_path / "wanted", token_ids(), max_drop=1e-4, metric="cosine", profile=False), []
    again = compress(lm, tmp_path / "wanted", token_ids(), max_drop=1e-4, metric="cosine", profile=False,
                     progress=lambda step, _: steps.append(step))  # fmt: skip
    assert again.layers == wanted.layers
    model = sha256(tmp_path / "wanted" / "model.onnx")
    starts = {"measuring": "measuring", "trying": "trying", "running": "running the compressed"}
    for name, start in starts.items():
        out, seen = tmp_path / name, []

        def stop(step, _, name=name, start=start, seen=seen):
            seen.append(step)
            if sum(s.startswith(start) for s in seen) == (1 if name == "running" else 2):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compress(lm, out, token_ids(), max_drop=1e-4, metric="cosine", profile=False, progress=stop)
        assert not out.exists()
        assert {path.name for path in tmp_path.iterdir()} - {"wanted", *starts} == {f".{name}.compress"}
        seen.clear()
        report = compress(lm, out, token_ids(), max_drop=1e-4, metric="cosine", profile=False,
                          progress=lambda step, _, seen=seen: seen.append(step))  # fmt: skip
        assert "took up what another run had found" in report.notes
        assert not any(step.startswith("watching the inputs") for step in seen)
        assert sha256(out / "model.onnx") == model
        assert (report.layers, report.trials) == (wanted.layers, wanted.trials)
        assert not (tmp_path / f".{name}.compress").exists()


def test_findings_serve_other_ratios_and_leave_what_else_is_there(lm, tmp_path):
    findings, ids = tmp_path / "findings", token_ids()
    findings.mkdir()
    (findings / "mine").write_text("kept")
    for ratio, known in ((4, False), (5, True)):
        out = tmp_path / f"out{ratio}"
        report = compress(lm, out, ids, ratio=ratio, findings=findings, profile=False)
        assert any("took up" in note for note in report.notes) == known
        assert report.layers == compress(lm, tmp_path / "alone", ids, ratio=ratio, profile=False).layers
    assert (findings / "mine").read_text() == "kept"
    assert len(list(findings.iterdir())) == 2


def test_other_data_is_no_continuation(lm, tmp_path):
    def stop(step, _):
        if step.startswith("trying"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(lm, tmp_path / "out", token_ids(32), ratio=3, profile=False, progress=stop)
    report = compress(lm, tmp_path / "out", token_ids(24), ratio=3, profile=False)
    assert not any("took up" in note for note in report.notes)
    # another goal on the same data is one
    with pytest.raises(KeyboardInterrupt):
        compress(lm, tmp_path / "out", token_ids(32), ratio=3, profile=False, progress=stop)
    assert Bundle.open(tmp_path / "out", verify=True)  # the one before is as it was
    report = compress(lm, tmp_path / "out", token_ids(32), ratio=4, profile=False)
    assert any("took up" in note for note in report.notes)
    assert report.size["ratio"] >= 4


def test_a_model_of_other_weights_beside_its_file_is_no_continuation(lm, tmp_path, monkeypatch):
    """Above 2 GB two trainings of one model are one .onnx file and differ in the file beside it."""
    monkeypatch.setattr(conversion, "EXTERNAL_ABOVE", 1000)
    other = language_model(tmp_path / "other.onnx", up=lambda weights: 3 * weights)
    for model, known in ((lm, False), (other, False), (lm, True)):
        report = compress(model, tmp_path / "out", token_ids(), ratio=4, findings=tmp_path / "findings", profile=False)
        assert (tmp_path / "out" / "model.onnx.data").exists()
        assert any("took up" in note for note in report.notes) == known


def test_two_runs_in_one_folder_do_not_read_each_other(tmp_path):
    one, two = (Checkpoint(tmp_path / "store", {"data": name}) for name in ("one", "two"))
    one.save("loss", 1.0)
    assert one.load("loss") == 1.0
    assert not two.has("loss")


def test_a_full_disk_while_the_model_is_written(lm, tmp_path, monkeypatch):
    """What was found stays for the next run, the bundle that was there is as it was."""
    compress(lm, tmp_path / "out", token_ids(), ratio=2, profile=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    save = conversion.save

    def full(model, path, external):
        if path.name != "compressed.onnx":
            return save(model, path, external)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "save", full)
    with pytest.raises(QexportError, match=r"out: the disk is full or over its limit") as caught:
        compress(lm, tmp_path / "out", token_ids(), ratio=5, profile=False)
    (note,) = caught.value.__notes__
    assert note.startswith(f"what was found so far is kept in {tmp_path / '.out.compress'}: ")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.compress"}
    report = compress(lm, tmp_path / "out", token_ids(), ratio=5, profile=False)
    assert any("took up" in note for note in report.notes)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_findings_that_cannot_be_kept(lm, tmp_path):
    (tmp_path / ".out.compress").write_text("a file of that name")
    with pytest.raises(QexportError, match=r"\.out\.compress: cannot store a finding \(File exists\)"):
        compress(lm, tmp_path / "out", token_ids(), ratio=5, profile=False)
    assert not (tmp_path / "out").exists()
