"""The same bundle on an NVIDIA GPU where there is one, and the reason why not elsewhere (docs/cuda.md)."""

import time

import numpy as np

import qexport
from qexport.errors import QexportError

feeds = {"input_ids": np.full((8, 128), 2003), "attention_mask": np.ones((8, 128), np.int64)}
for provider in ("CPUExecutionProvider", "CUDAExecutionProvider"):
    try:
        session = qexport.session("minilm_bundle", providers=[provider])  # never falls back to the CPU unasked
    except QexportError as error:
        print(f"{provider}: {error}")
        continue
    given = {i.name: feeds.get(i.name, np.zeros((8, 128), np.int64)) for i in session.get_inputs() if i.name != "seed"}
    session.run(None, given)
    started = time.perf_counter()
    session.run(None, given)
    print(f"{provider}: 8 x 128 tokens in {1e3 * (time.perf_counter() - started):.1f} ms")
