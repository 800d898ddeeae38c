"""What a long-running program relies on, on a GPU: no memory is lost, a captured graph draws anew, streams do not meet.

These tests need an NVIDIA GPU, an onnxruntime with its CUDA provider, and the CUDA kernels.
"""

import pytest

from qexport.ops.proto import make_node

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")]

HEADS, SIZE, N = 4, 64, 512
RUNS = 10_000
# The driver hands out memory in pieces of 2 MiB: RUNS calls that lose 210 bytes each show.
PIECE = 2 << 20
STRATEGIES = {
    "exact": {},
    "naive": {"num_samples": [16]},
    "stratified": {"num_samples": [16]},
    "adaptive": {"num_samples": [16]},
    "hybrid": {"num_samples": [16]},
    "tree": {"num_samples": [64], "residual": "unbiased"},
}


@pytest.fixture(scope="module")
def nodes():
    """Contenders of the benchmark: sessions whose tensors stay on the device."""
    from bench.cuda import nodes
    from qexport.runtime import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    return nodes


@pytest.fixture(autouse=True)
def stream():
    """A stream of the test's own: onnxruntime takes no default one from its caller."""
    with torch.cuda.stream(torch.cuda.Stream()) as context:
        yield context


def tensors(n=N, dtype=torch.float16, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shape = 1, n, HEADS * SIZE
    q, k, v = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(3))
    return {"q": q, "k": k, "v": v, "seed": torch.tensor(7, device="cuda")}


def seeded_node(strategy, **attributes):
    inputs = ["q", "k", "v", "", "", "", "", "seed"]
    heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
    return make_node("QuantumAttention", inputs, ["y"], strategy=strategy, **heads, **STRATEGIES[strategy], **attributes)


def contender(nodes, strategy, inputs):
    return nodes.node_contender(seeded_node(strategy), [inputs], [{"y": torch.empty_like(inputs["q"])}], "cuda")


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize("strategy", ["exact", "stratified", "tree"])
def test_sessions_keep_their_memory(nodes, strategy):
    calls = [contender(nodes, strategy, tensors(n)).calls[0] for n in (N, 300, 40)]
    for call in calls * 10:
        call()
    before = free_bytes()
    for i in range(RUNS):
        calls[i % len(calls)]()
    assert before - free_bytes() < PIECE


@pytest.mark.parametrize("strategy", ["exact", "stratified", "tree"])
def test_torch_keeps_its_memory(strategy):
    from qexport.nn import quantum_attention

    inputs = tensors()
    settings = {"strategy": strategy, "q_num_heads": HEADS, "kv_num_heads": HEADS, "backend": "kernel"}
    settings |= STRATEGIES[strategy]

    def call(seed):
        quantum_attention(inputs["q"], inputs["k"], inputs["v"], seed=seed, **settings)

    for seed in range(10):
        call(seed)
    free, allocated = free_bytes(), torch.cuda.memory_allocated()
    for seed in range(RUNS):
        call(seed)
    assert free - free_bytes() < PIECE
    assert torch.cuda.memory_allocated() == allocated


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_captured_graph_draws_anew_with_a_new_seed(nodes, strategy):
    """onnxruntime records the first run as a CUDA graph and replays it; the seed is read when it is replayed."""
    from qexport.runtime import create_session, get_library_path, quiet_options, register_library

    inputs = tensors()
    y = torch.empty_like(inputs["q"])
    model = nodes.node_model(seeded_node(strategy), inputs, {"y": y}, {}, 23)
    options = quiet_options()
    register_library(options, get_library_path())
    provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1"})
    session = create_session("captured", model, options, [provider], True)
    binding = session.io_binding()
    for name, tensor in (inputs | {"y": y}).items():
        place = "cuda", 0, nodes.ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()
        (binding.bind_output if name == "y" else binding.bind_input)(name, *place)
    plain = contender(nodes, strategy, inputs)
    found = []
    for seed in (7, 8, 7):
        inputs["seed"].fill_(seed)
        torch.cuda.synchronize()
        session.run_with_iobinding(binding)
        torch.cuda.synchronize()
        found.append(y.clone())
        expected = plain.result()
        torch.cuda.synchronize()
        assert torch.equal(found[-1], expected), seed
    assert torch.equal(found[0], found[2])
    draws = strategy not in ("exact", "hybrid")
    assert torch.equal(found[0], found[1]) != draws


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_streams_do_not_meet(nodes, strategy):
    """Sessions on two streams at the same time, on different inputs: each has what it has alone."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    inputs = [tensors(seed=seed) for seed in range(2)]
    torch.cuda.synchronize()
    found, alone = [], []
    for one, given in zip(streams, inputs, strict=True):
        with torch.cuda.stream(one):
            found.append(contender(nodes, strategy, given))
    for one in found:
        one.calls[0]()
        torch.cuda.synchronize()
        alone.append(one.output(0).clone())
    for _ in range(50):
        for one in found:
            one.calls[0]()
    torch.cuda.synchronize()
    for one, expected in zip(found, alone, strict=True):
        assert torch.equal(one.output(0), expected)
    assert not torch.equal(*alone)


def test_types_of_a_call_agree(nodes):
    """The same inputs in float32, float16 and bfloat16 give the same output up to their rounding."""
    exact = contender(nodes, "exact", tensors(dtype=torch.float32)).result()
    for dtype in (torch.float16, torch.bfloat16):
        found = contender(nodes, "exact", tensors(dtype=dtype)).result()
        torch.cuda.synchronize()
        error = (found.float() - exact).norm() / exact.norm()
        # Q, K and V are rounded, the scores by a few units for it, the output once.
        assert error < 8 * torch.finfo(dtype).eps
