"""One run of a model as a call, as a user would run it: with the caches of a step in place, or by `session.run`."""

from collections.abc import Callable

import numpy as np

from qexport import installed, runtime


def shared_buffers(manifest: dict) -> list[list[str]]:
    """[past, present] of each input and output of a model with a KV cache that share their memory."""
    cache = manifest.get("kv_cache") or {}
    return [pair for kind in ("caches", "summaries") for pair in cache.get(kind, [])]


def make_call(session, feed: dict[str, np.ndarray], shared: list[list[str]]) -> Callable[[], None]:
    """A function that runs the model once on `feed`. With `shared` pairs nothing of a past is copied, as in
    `qexport.Generator`; what a run writes goes into copies of the feed's arrays, again at the same places in every run.
    On CUDA all inputs and outputs stay in the memory of the device, and a run ends when the device has done its work.
    """
    device = runtime.device_of(session)
    if not shared and device[0] == "cpu":
        return lambda: runtime.run(session, None, feed)
    make = installed.onnxruntime().OrtValue.ortvalue_from_numpy
    pasts = {past for past, _ in shared}
    values = {name: make(array.copy() if name in pasts else array, *device) for name, array in feed.items()}
    places = {present: values[past] for past, present in shared}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        if output.name in places:
            binding.bind_ortvalue_output(output.name, places[output.name])
        else:
            binding.bind_output(output.name, *device)

    def call() -> None:
        runtime.run_bound(session, binding)

    call.values = values  # the binding keeps only pointers
    return call
