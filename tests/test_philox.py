"""Philox4x32-10: the published test vectors, and the same bits in the reference and the kernel."""

import numpy as np
import pytest
import torch

from qexport import _core
from qexport.ops.philox import philox4x32

# Known-answer vectors of the Random123 distribution (kat_vectors): key, counter, output.
VECTORS = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def reference(key, counter):
    seed = key[0] | key[1] << 32
    tensors = [torch.tensor(c) for c in counter[1:]]
    return tuple(philox4x32(seed, counter[0], *tensors).tolist())


@pytest.mark.parametrize(("key", "counter", "output"), VECTORS)
def test_published_vectors(key, counter, output):
    assert reference(key, counter) == output
    assert tuple(int(word) for word in _core.philox(*key, *counter)) == output


def test_reference_and_kernel_share_every_bit():
    words = np.random.default_rng(0).integers(0, 1 << 32, (500, 6), dtype=np.uint64).tolist()
    for row in words:
        assert tuple(int(word) for word in _core.philox(*row)) == reference(row[:2], row[2:])
