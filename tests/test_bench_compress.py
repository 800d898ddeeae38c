"""The parts of bench.compress that decide what its tables say."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bench import compress, compress_factors
from bench.data import crops
from qexport import runtime
from qexport.mps.layout import make_layout


def _model(file, numbers):
    """A model whose output is the first of so many stored numbers."""
    graph = helper.make_graph(
        [helper.make_node("Gather", ["W", "i"], ["Y"])],
        "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(np.full(numbers, numbers, np.float32), "W")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), file)
    return file


class _Case:
    """Loses nothing at 4000 numbers, and 1 for each thousand that is missing."""

    def answer(self, session):
        return float(runtime.run(session, None, {"i": np.zeros(1, np.int64)})[0][0])

    def figures(self, answer, classical):
        return {"loss": (classical - answer) / 1000}


def test_front_holds_contenders_against_the_best_int8(tmp_path):
    names = (compress.CLASSICAL, *compress.INT8_OPTIONS)
    sizes = dict(zip(names, (4000, 1000, 2000), strict=True)) | {"compress 3x": 1500, "compress 5x": 2000}
    files = {name: _model(tmp_path / f"{name}.onnx", numbers) for name, numbers in sizes.items()}
    rows = {row["contender"]: row for row in compress.front(_Case(), files, 1)}
    assert list(rows) == list(sizes)
    assert {name: row["loss"] for name, row in rows.items()} == dict(zip(sizes, (0, 3, 2, 2.5, 2), strict=True))
    assert [row["no_more_loss"] for row in rows.values()] == [True, False, True, False, True]
    for name, row in rows.items():
        assert row["bytes"] == files[name].stat().st_size
        assert row["ratio"] == files[compress.CLASSICAL].stat().st_size / row["bytes"]
        assert row["x_int8_bytes"] == rows[compress.INT8]["bytes"] / row["bytes"]


def test_int8_loads_in_a_stock_runtime(tmp_path):
    W = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    dense = compress_factors._product(tmp_path / "dense.onnx", [W])
    compress.int8(dense, tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").stat().st_size < dense.stat().st_size / 3.5
    X = np.random.default_rng(1).standard_normal((2, 1024), np.float32)
    found = runtime.run(runtime.session(tmp_path / "int8.onnx", library=False), None, {"X": X})[0]
    assert 0 < np.linalg.norm(found - X @ W) < 0.05 * np.linalg.norm(X @ W)


def test_factors_are_the_truncated_weight(tmp_path):
    rows = compress_factors.low_rank_table(tmp_path, 1, rounds=2)
    assert {(row["contender"], row["n"]) for row in rows} == {
        (name, n) for name in ("dense", "rank 64, fp32", "rank 64, int8", "rank 64, int4") for n in (1, 64)
    }
    W = numpy_helper.to_array(onnx.load(tmp_path / "dense.onnx").graph.initializer[0]).astype(np.float64)
    U, sigma, V = np.linalg.svd(W)
    X = np.random.default_rng(1).standard_normal((4, 1024), np.float32)
    expected = X @ (U[:, :64] * sigma[:64]) @ V[:64]
    # fp32 rounds; 8 and 4 bits move a number by up to half a step of about 3 / 2^7 and 3 / 2^3 of its size, in two factors
    for name, most in (("fp32", 1e-5), ("int8", 0.03), ("int4", 0.3)):
        session = runtime.session(tmp_path / f"{name}.onnx", library=False)
        error = np.linalg.norm(runtime.run(session, None, {"X": X})[0] - expected) / np.linalg.norm(expected)
        assert error < most, name


@pytest.mark.parametrize("kind", ["serial", "interleaved"])
def test_trains_use_the_numbers_that_they_are_given(kind):
    W = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    layout, numbers = make_layout(kind, 48, 64), 1500
    bond_dim, error = compress_factors._train(W, kind, numbers)
    assert layout.numbers(layout.bonds(bond_dim)) <= numbers < layout.numbers(layout.bonds(bond_dim + 1))
    assert 0.3 < error < 1  # half of the numbers of noise: about sqrt(1 / 2) is lost
    assert compress_factors._train(W, kind, 10**6)[1] < 1e-7


def test_crops_are_squares_of_the_photo():
    pytest.importorskip("PIL")
    rows, columns = np.mgrid[:240, :400]
    photo = np.stack([rows, columns // 2, np.full_like(rows, 7)], -1).astype(np.uint8)
    found = crops(photo, 6)
    assert found.shape == (6, 3, 224, 224)
    pixels = 255 * (found * np.array([0.229, 0.224, 0.225])[:, None, None] + np.array([0.485, 0.456, 0.406])[:, None, None])
    assert np.abs(pixels[:, 2] - 7).max() < 1e-3
    height, width = (np.abs(pixels[:, i, -1, -1] - pixels[:, i, 0, 0]) for i in (0, 1))
    assert ((height > 155) & (height < 240)).all()
    assert np.abs(height - 2 * width).max() < 4
    assert len({pixels[i, 1, 0, 0] < pixels[i, 1, 0, -1] for i in range(6)}) == 2, "some are mirrored, some are not"
    assert np.array_equal(found, crops(photo, 6))
    assert not np.array_equal(found, crops(photo, 6, seed=1))
