"""Trains in torch: against dense singular values per cut, einsum over whole tensors, and brute force."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from qexport.errors import UsageError
from qexport.mps.canonical import canonical, entanglement_entropy, sample
from qexport.mps.layout import KINDS, PRIMES, Layout, make_layout, prime_factors
from qexport.mps.train import apply, decode, unpack
from qexport.mps.tt_svd import NOISE, encode, error_limits, tt_svd

EXACT = 1e-12
REPEATABLE = settings(deadline=None, derandomize=True, database=None)  # the same examples at every run


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def smooth(n, width=5.0):
    """Attention to near places, a Toeplitz matrix up to its rims."""
    place = torch.arange(n, dtype=torch.float64)
    return torch.softmax(-((place[:, None] - place) ** 2) / (2 * width**2), -1)


def distance(found, wanted):
    return float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted))


def whole(train):
    """The padded matrix by one contraction of all cores at once, digit by digit."""
    sites, letters = len(train.cores), iter(map(chr, [*range(65, 91), *range(97, 123)]))
    bonds = [next(letters) for _ in range(sites + 1)]
    r, c = [next(letters) for _ in range(sites)], [next(letters) for _ in range(sites)]
    terms = ",".join(bonds[k] + r[k] + c[k] + bonds[k + 1] for k in range(sites))
    result = torch.einsum(f"{terms}->{bonds[0]}{''.join(r + c)}{bonds[-1]}", *(core.double() for core in train.cores))
    return result.reshape(train.layout.padded)


@settings(REPEATABLE)
@given(n=st.integers(1, 5000))
def test_lengths_are_padded_to_the_next_smooth_number(n):
    factors = prime_factors(n)
    assert set(factors) <= set(PRIMES)
    assert math.prod(factors) >= n
    for between in range(n, math.prod(factors)):  # none is skipped
        for prime in PRIMES:
            while between % prime == 0:
                between //= prime
        assert between > 1


@settings(REPEATABLE, max_examples=40)
@given(rows=st.integers(1, 40), cols=st.integers(1, 40), kind=st.sampled_from(KINDS), bond_dim=st.integers(1, 12))
def test_error_is_the_true_one_and_within_its_limits(rows, cols, kind, bond_dim):
    """The error of the padded matrix, which cropping can only make smaller, lies between the two limits of any train."""
    M = gaussian(rows, cols, seed=rows * 41 + cols)
    layout = make_layout(kind, rows, cols)
    train = tt_svd(M, layout, layout.bonds(bond_dim))
    R, C = layout.padded
    padded = torch.nn.functional.pad(M, (0, C - cols, 0, R - rows))
    assert abs(distance(whole(train), padded) - float(train.error)) <= EXACT
    assert (decode(train.cores, layout) - whole(train)[:rows, :cols]).abs().max() <= EXACT
    best, worst = error_limits(M, layout, train.ranks)
    assert float(train.lower_bound) <= best + EXACT
    assert best - EXACT <= float(train.error) <= worst + EXACT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tol", [0.3, 0.05, 1e-3])
def test_tol_keeps_its_word_with_no_rank_to_spare(kind, tol):
    M = smooth(64, 1.5)
    layout = make_layout(kind, 64, 64)
    train = tt_svd(M, layout, layout.bonds(64), tol)
    assert float(train.error) <= tol
    assert abs(distance(decode(train.cores, layout), M) - float(train.error)) <= EXACT
    # Each cut had an equal share at least: one rank less anywhere would have lost more than that.
    for k, rank in enumerate(train.ranks[1:-1].tolist(), 1):
        if rank > 1:
            less = train.ranks.clone()
            less[k] -= 1
            share = tol / math.sqrt(len(layout.row_factors) - 1)
            assert error_limits(M, layout, less)[1] > share


@pytest.mark.parametrize("kind", KINDS)
def test_left_cores_are_orthonormal(kind):
    train = encode(gaussian(24, 36), 100, 0.3, layout=kind)
    for core in train.cores[:-1]:
        flat = core.flatten(-4, -2)
        assert (flat.mT @ flat - torch.eye(flat.shape[-1], dtype=torch.float64)).abs().max() <= EXACT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "cols"), [(32, 32), (30, 7), (1, 9), (13, 1), (1, 1)])
def test_product_without_the_matrix(kind, rows, cols):
    train = encode(gaussian(2, 3, rows, cols), 4, layout=kind)
    V = gaussian(2, 3, cols, 5, seed=1)
    assert (apply(train.cores, train.layout, V) - decode(train.cores, train.layout) @ V).abs().max() <= 1e-11


def test_a_batch_is_its_matrices_one_by_one():
    M = torch.stack([smooth(27), smooth(27, 1.0), gaussian(27, 27)])
    layout = make_layout("interleaved", 27, 27)
    train = tt_svd(M, layout, layout.bonds(9), tol=0.02)
    for i, one in enumerate(M):
        alone = tt_svd(one, layout, layout.bonds(9), tol=0.02)
        assert train.ranks[i].tolist() == alone.ranks.tolist()
        assert abs(float(train.error[i] - alone.error)) <= EXACT
        assert distance(decode(train.cores, layout)[i], decode(alone.cores, layout)) <= EXACT


def test_layout_is_chosen_by_error():
    near = encode(smooth(64), 8)
    assert near.layout.kind == "interleaved"
    assert float(near.error) < 0.01 < float(encode(smooth(64), 8, layout="serial").error)
    outer = gaussian(64, 1) @ gaussian(1, 64, seed=1)  # of rank 1: the middle bond of the serial layout is 1
    assert encode(outer, 8, layout="serial").error < encode(outer, 8, layout="interleaved").error
    assert encode(outer, 8).layout.kind == "serial"


def test_what_is_no_more_than_rounding_is_not_kept():
    """A matrix of rank 3 rounded to float32 has more singular values, none of them above the limit; one above it is kept."""
    low = gaussian(64, 3) @ gaussian(3, 64, seed=1)
    layout = make_layout("serial", 64, 64)
    rounded = tt_svd(low.float(), layout, layout.bonds(64), tol=1e-9)
    assert int(torch.linalg.matrix_rank(low.float().double(), rtol=1e-12)) > 3
    assert rounded.ranks[len(layout.row_factors) // 2] == 3
    U, _ = torch.linalg.qr(gaussian(64, 64, seed=2))
    sigma = torch.zeros(64, dtype=torch.float64)
    for extra, rank in ((4 * NOISE, 3), (NOISE / 4, 2)):
        sigma[:3] = torch.tensor([1, 0.5, extra])
        assert tt_svd(U @ torch.diag(sigma), layout, layout.bonds(64), tol=1e-9).ranks[6] == rank


@pytest.mark.parametrize("tol", [None, 0.1])
def test_zeros(tol):
    train = encode(torch.zeros(8, 8), 4, tol)
    assert decode(train.cores, train.layout).abs().max() == 0
    assert train.error == 0
    assert entanglement_entropy(train).abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_full_bonds_lose_nothing(kind):
    M = gaussian(16, 16)
    train = encode(M, 16 if kind == "serial" else 256, layout=kind)
    assert (decode(train.cores, train.layout) == M).all()


@pytest.mark.parametrize("center", [0, 2, 5])
def test_canonical_form(center):
    train = encode(gaussian(2, 64, 64), 9, layout="interleaved")
    form = canonical(train, center)
    assert distance(decode(form.cores, form.layout), decode(train.cores, train.layout)) <= EXACT
    for k, core in enumerate(form.cores):
        flat = core.flatten(-4, -2) if k < center else core.flatten(-3).mT
        if k != center:
            assert (flat.mT @ flat - torch.eye(flat.shape[-1], dtype=torch.float64)).abs().max() <= EXACT
    norm = torch.linalg.matrix_norm(decode(train.cores, train.layout))
    assert (form.cores[center].flatten(-4).norm(dim=-1) / norm - 1).abs().max() <= EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_is_that_of_the_singular_values_at_each_cut(kind):
    M = smooth(36)
    layout = make_layout(kind, 36, 36)
    train = tt_svd(M, layout, layout.bonds(400))
    found = entanglement_entropy(train)
    sites = len(layout.row_factors)
    tensor = M.reshape(layout.row_factors + layout.col_factors)
    tensor = tensor.permute([axis for k in range(sites) for axis in (k, sites + k)])
    for k in range(1, sites):
        p = torch.linalg.svdvals(tensor.flatten(0, 2 * k - 1).flatten(1)).square()
        p = p[p > 0] / p.sum()
        assert abs(float(found[k - 1] + (p * p.log2()).sum())) <= 1e-9
        assert found[k - 1] <= math.log2(train.bonds[k]) + EXACT


def test_entropy_of_known_states():
    """A product state has none; the identity, q pairs of digits that are maximally entangled, has its q bits at the middle
    of the serial layout and none between interleaved sites."""
    assert entanglement_entropy(encode(torch.ones(8, 8), 8)).abs().max() <= EXACT
    eye = torch.eye(8, dtype=torch.float64)
    assert abs(float(entanglement_entropy(encode(eye, 8, layout="serial"))[2]) - 3) <= EXACT
    assert entanglement_entropy(encode(eye, 8, layout="interleaved")).abs().max() <= EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_squares_of_the_entries(kind):
    """chi-square over all places of the truncated, padded matrix; p < 1e-3 once in a thousand seeds."""
    shots = 20_000
    train = encode(gaussian(7, 5).abs(), 3, layout=kind)
    p = whole(train).square().flatten()
    p = p / p.sum()
    found = sample(train, shots, seed=3)
    assert (sample(train, shots, seed=3) == found).all()
    assert (sample(train, shots, seed=4) != found).any()
    counts = torch.bincount(found[:, 0] * train.layout.padded[1] + found[:, 1], minlength=len(p)).double()
    assert counts[p * shots < 1e-9].sum() == 0
    often = p * shots >= 5
    rest = torch.stack([counts[~often].sum(), (p[~often] * shots).sum()])
    observed, expected = torch.cat([counts[often], rest[:1]]), torch.cat([p[often] * shots, rest[1:]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


def test_packed_cores():
    train = encode(gaussian(2, 30, 30), 6)
    again = unpack(train.packed(), train.layout, train.bonds)
    assert all((a == b).all() for a, b in zip(train.cores, again, strict=True))
    assert train.packed().shape[-1] * 8 == train.bytes_per_matrix
    with pytest.raises(UsageError, match=r"cores must hold \d+ numbers on the last axis, got shape \(2, 3\)"):
        unpack(torch.zeros(2, 3), train.layout, train.bonds)
    with pytest.raises(UsageError, match=r"bonds must be \d numbers >= 1 with a 1 at each end"):
        unpack(train.packed(), train.layout, (2, *train.bonds[1:]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda M: encode(M, 0), "bond_dim must be >= 1, got 0"),
        (lambda M: encode(M, 4, 0.0), r"tol must be in \(0, 1\), got 0"),
        (lambda M: encode(M, 4, 1.0), r"tol must be in \(0, 1\), got 1"),
        (lambda M: encode(M, 4, float("nan")), r"tol must be in \(0, 1\), got nan"),
        (lambda M: encode(M, 4, layout="best"), "layout must be one of serial, interleaved, auto, got 'best'"),
        (lambda M: encode(M[0], 4), r"matrix must be \(..., rows, cols\) of floating point, got \(8,\)"),
        (lambda M: encode(M.int(), 4), "of floating point"),
        (lambda M: encode(M / 0, 4), "matrix must be finite, got NaN or infinity"),
        (lambda M: encode(M * 1e200, 4), "the norm of a matrix must be 0 or in 1e-140 to 1e150"),
        (lambda M: encode(M * 1e-200, 4), "the norm of a matrix must be 0 or in 1e-140 to 1e150"),
        (lambda M: encode(M[:0], 4), "rows must be >= 1, got 0"),
        (lambda M: tt_svd(M, make_layout("serial", 4, 8), (1, 1), 0.0), "bonds must be 6 numbers"),
        (lambda M: tt_svd(M, make_layout("serial", 4, 8), make_layout("serial", 4, 8).bonds(2)), r"must be \(..., 4, 8\)"),
        (lambda M: Layout(8, 8, (2, 2), (2, 4)), r"row_factors must be >= 1 with a product >= rows = 8, got \[2, 2\]"),
        (lambda M: Layout(8, 8, (8,), (2, 4)), "must be of one length >= 1, got 1 and 2"),
        (lambda M: canonical(encode(M, 4), 9), "center must be in 0 to"),
        (lambda M: sample(encode(M, 4), 0), "shots must be >= 1, got 0"),
        (lambda M: sample(encode(torch.stack([M, M]), 4), 3), r"takes one matrix, got a batch of shape \(2,\)"),
        (lambda M: sample(encode(torch.zeros(4, 4), 4), 3), "a matrix of zeros has no state to measure"),
        (lambda M: apply(encode(M, 4).cores, encode(M, 4).layout, M[:3]), r"V must be \(..., 8, features\), got \(3, 8\)"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(UsageError, match=message) as caught:
        call(gaussian(8, 8))
    assert "\n" not in str(caught.value)


def test_ranks_of_a_canonical_form_never_exceed_its_bonds():
    train = encode(torch.ones(8, 8), 8)
    fat = replace(train, cores=tuple(torch.cat([c, c], -1)[..., : c.shape[-1]] for c in train.cores))
    form = canonical(fat, 0)
    assert (form.ranks <= torch.tensor(form.bonds)).all()
