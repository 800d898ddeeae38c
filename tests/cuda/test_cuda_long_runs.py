"""What a program that runs for long relies on, on a GPU: memory is kept, captured graphs draw anew, streams do not meet."""

import pytest
import torch

from qexport.installed import onnxruntime
from qexport.nn import quantum_attention
from qexport.ops.proto import make_node
from qexport.ops.strategies import STRATEGIES, read_by

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

HEADS, SIZE, N = 4, 64, 512
ATTRIBUTES = {"num_samples": [64], "residual": "unbiased", "q_num_heads": HEADS, "kv_num_heads": HEADS}
KEPT = ("exact", "stratified", "tree")  # whose memory is watched: one per file of kernels
DRAW = ("naive", "stratified", "adaptive", "tree")  # the others choose
TREE_KEYS = 12288  # from which on `tree` is not exact
RUNS = 10_000
PIECE = 2 << 20  # the driver hands out memory in such pieces: RUNS calls that lose 210 bytes each show


@pytest.fixture(scope="module")
def nodes(gpu):
    """Contenders of the benchmark: sessions whose tensors stay on the device."""
    from bench.cuda import nodes

    if "CUDAExecutionProvider" not in onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    return nodes


@pytest.fixture(autouse=True)
def stream(gpu):
    """A stream of the test's own: onnxruntime takes no default one from its caller."""
    with torch.cuda.stream(torch.cuda.Stream()) as context:
        yield context


def inputs(n=N, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    q, k, v = (torch.randn(1, n, HEADS * SIZE, generator=generator, device="cuda").half() for _ in range(3))
    return {"q": q, "k": k, "v": v, "seed": torch.tensor(7, device="cuda")}


def contender(nodes, strategy, given):
    node = make_node("QuantumAttention", ["q", "k", "v", "", "", "", "", "seed"], ["y"], strategy=strategy, **ATTRIBUTES)
    return nodes.node_contender(node, [given], [{"y": torch.empty_like(given["q"])}], "cuda")


def in_torch(strategy, given):
    return quantum_attention(
        given["q"],
        given["k"],
        given["v"],
        seed=given["seed"],
        strategy=strategy,
        backend="kernel",
        **read_by(strategy, ATTRIBUTES),
    )


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize("strategy", KEPT)
def test_sessions_keep_their_memory(nodes, strategy):
    """Of three lengths in turn, whose scratch memory is of three sizes."""
    calls = [contender(nodes, strategy, inputs(n)).calls[0] for n in (N, 300, 40)]
    for call in calls * 10:
        call()
    before = free_bytes()
    for i in range(RUNS):
        calls[i % len(calls)]()
    assert before - free_bytes() < PIECE


@pytest.mark.parametrize("strategy", KEPT)
def test_torch_keeps_its_memory(strategy):
    given = [inputs(n) for n in (N, 300, 40)]
    for one in given * 10:
        in_torch(strategy, one)
    free, allocated = free_bytes(), torch.cuda.memory_allocated()
    for i in range(RUNS):
        in_torch(strategy, given[i % len(given)])
    assert free - free_bytes() < PIECE
    assert torch.cuda.memory_allocated() == allocated


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_graph_of_torch_reads_the_seed_again(strategy):
    given = inputs(TREE_KEYS if strategy == "tree" else N)
    in_torch(strategy, given)  # what is loaded at the first call is loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = in_torch(strategy, given)
    found = []
    for seed in (7, 8, 7):
        given["seed"].fill_(seed)
        graph.replay()
        found.append(captured.clone())
        assert torch.equal(found[-1], in_torch(strategy, given)), seed
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[1]) == (strategy not in DRAW)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_streams_do_not_meet(nodes, strategy):
    """Sessions on two streams at the same time, on different inputs: each finds what it finds alone."""
    given = [inputs(seed=seed) for seed in range(2)]
    torch.cuda.synchronize()
    found, alone = [], []
    for one in given:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(contender(nodes, strategy, one))
    for one in found:
        alone.append(one.result())
        torch.cuda.synchronize()
        alone[-1] = alone[-1].clone()
    assert not torch.equal(*alone)
    for _ in range(50):
        for one in found:
            one.calls[0]()
    torch.cuda.synchronize()
    for one, expected in zip(found, alone, strict=True):
        assert torch.equal(one.output(0), expected)
