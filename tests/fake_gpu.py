"""A GPU for commands to run on where there is none: sessions that are asked for CUDA compute on the CPU and say CUDA."""

import pytest

from qexport.providers import CPU, CUDA, provider_name

NO_FALLBACK = "session.disable_cpu_ep_fallback"


@pytest.fixture
def fake_gpu(monkeypatch):
    """What each session is asked for: its providers, and whether onnxruntime must not run nodes of it on the CPU. The op
    library has no kernels for this GPU, so that only `allow_fallback` opens its sessions."""
    import onnxruntime

    from qexport import cuda_checks, runtime
    from qexport.scaling import nodes

    asked = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, source, options, *, providers, **more):
            self.named = [provider_name(provider) for provider in providers]
            strict = False
            try:
                strict = options.get_session_config_entry(NO_FALLBACK) == "1"
                options.add_session_config_entry(NO_FALLBACK, "0")
            except RuntimeError:  # there is no such entry
                pass
            asked.append((providers, strict))
            super().__init__(source, options, providers=[CPU], **more)

        def get_providers(self):
            return [*self.named, *([] if CPU in self.named else [CPU])]

    missing = cuda_checks.Obstacle("the kernels are missing", "build them")
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(cuda_checks, "plugin_obstacle", lambda library: missing)
    for module in (runtime, nodes):
        monkeypatch.setattr(module, "device_of", lambda session: ("cpu", 0))  # where its tensors are, after all
    return asked
