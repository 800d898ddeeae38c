"""A GPU for commands to run on where there is none: sessions that are asked for CUDA compute on the CPU and say CUDA, and
copies in memory of the host take the place of those on a device."""

import pytest

from qexport.providers import CPU, CUDA, provider_name

NO_FALLBACK = "session.disable_cpu_ep_fallback"


@pytest.fixture
def fake_gpu(monkeypatch):
    """What each session is asked for: its providers, and whether onnxruntime must not run nodes of it on the CPU. The op
    library has no kernels for this GPU, so that only `allow_fallback` opens its sessions."""
    import onnxruntime

    from qexport import cuda_checks

    asked, from_numpy = [], onnxruntime.OrtValue.ortvalue_from_numpy

    class Binding(onnxruntime.IOBinding):
        def __init__(self, session):
            super().__init__(session)
            self.addresses = {}  # of what is bound where it lies

        def bind_input(self, name, device_type, *place):
            self.addresses[name] = place[-1]
            super().bind_input(name, "cpu", *place)

        def bind_output(self, name, device_type="cpu", *place):
            self.addresses[name] = place[-1] if len(place) > 1 else None
            super().bind_output(name, "cpu", *place)

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

        def get_provider_options(self):
            return {name: {} for name in self.get_providers()}

        def io_binding(self):
            return Binding(self)

    def put(array, device_type="cpu", device_id=0):
        return from_numpy(array if device_type == "cpu" else array.copy())

    missing = cuda_checks.Obstacle("the kernels are missing", "build them")
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(cuda_checks, "plugin_obstacle", lambda library: missing)
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", put)
    return asked
