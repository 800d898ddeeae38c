"""Run a bundle with onnxruntime alone: qexport only says where the op library is. Needs no torch."""

import sys

import numpy as np
import onnxruntime

import qexport

BUNDLE = sys.argv[1] if len(sys.argv) > 1 else "minilm_bundle"
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(qexport.get_library_path())  # or the copy in the bundle, lib/libqexport_ops.so
session = onnxruntime.InferenceSession(f"{BUNDLE}/model.onnx", options, providers=["CPUExecutionProvider"])

ids = np.array([[101, 7592, 2088, 102]])  # [CLS] hello world [SEP]
values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
names = [i.name for i in session.get_inputs()]  # the seed is optional: it has a default in the file
(hidden, *_) = session.run(None, {name: value for name, value in values.items() if name in names})
print(f"inputs {', '.join(names)}: hidden states {hidden.shape}")
