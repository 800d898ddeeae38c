"""Convert a decoder with a KV cache and generate with it in onnxruntime, token by token; transformers says the same."""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import qexport

PROMPT = [5, 3, 8, 1, 13, 21]
if len(sys.argv) > 1:
    folder = sys.argv[1]  # any causal language model of Hugging Face that takes position ids
else:
    folder = "small_llama"  # random weights
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)

qexport.convert(folder, "decoder_bundle", kv_cache=128, strategy="exact")
generator = qexport.Generator("decoder_bundle")
tokens = generator.generate([PROMPT], max_new_tokens=40, on_token=lambda row, token: print(token, end=" ", flush=True))[0]

model = AutoModelForCausalLM.from_pretrained(folder).eval()
expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False)[0, len(PROMPT) :].tolist()
print(f"\n{len(tokens)} tokens, the cache holds {generator.past[0]} of {generator.length}")
assert tokens == [token for token in expected if token != model.generation_config.eos_token_id]
