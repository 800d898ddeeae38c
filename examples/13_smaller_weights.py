"""The bundle of the first example with int8 weights, judged on sentences that nothing was fitted to; it still samples."""

from importlib import resources

import qexport

sentences = resources.files("qexport").joinpath("demo_sentences.txt").read_text(encoding="utf-8").splitlines()
options = {"batch": 4, "seq": 64, "methods": ["int8"], "profile": False}
report = qexport.compress("minilm_bundle", "minilm_int8", sentences, ratio=3.5, **options)
before, after, ratio = (report.size[key] for key in ("before", "after", "ratio"))
print(f"{before / 1e6:.1f} MB became {after / 1e6:.1f} MB, {ratio:.2f} times smaller; reached: {report.passed}")
print(f"loss of {report.metric['name']}: {report.metric['loss']:.4f}")
worst = max((layer for layer in report.layers if layer.get("relative_error")), key=lambda layer: layer["relative_error"])
print(f"worst of {len(report.layers)} weights: {worst['module']}, its outputs are off by {worst['relative_error']:.2%}")
