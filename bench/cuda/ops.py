"""The other ops on the device, each against the CPU's kernels and beside what torch needs for something of the same size."""

import torch

from bench.cuda import nodes
from bench.cuda.attention import other_rows
from bench.cuda.measure import cache_bytes, compared, number_of_sets
from bench.cuda.runner import Case
from qexport.mps.layout import make_layout
from qexport.mps.train import decode
from qexport.ops.proto import make_node

LEVEL = 0.02
FEATURES = 64
MOST_OTHER_ROWS = 0.001
LIMIT = 1e-5  # largest relative error against the CPU's kernels, float32
RIVALS = {"x_other": "torch"}


def row_case(op: str, rows: int, n: int, attributes: dict, device: str) -> list[dict]:
    """QuantumNoise or QuantumMeasure of rows of probabilities, beside a copy of the rows."""
    count = number_of_sets(8 * rows * n, cache_bytes(device))
    sets = [(torch.softmax(scores, -1),) for (scores,) in nodes.random_sets([(rows, n)], count, torch.float32, device, n)]
    constants = {"level": torch.tensor(LEVEL)} if op == "QuantumNoise" else {"seed": torch.tensor(7)}
    node = make_node(op, ["p", *constants], ["y"], **attributes)

    def ours():
        return nodes.node_contender(
            node, [{"p": p} for (p,) in sets], [{"y": torch.empty_like(p)} for (p,) in sets], device, constants=constants
        )

    def check(name, contender):
        if name == "torch":
            return {"error": None, "other_rows": None}, ""
        output, wanted = contender.result().cpu(), nodes.cpu_output(node, {"p": sets[0][0]}, sets[0][0], constants)
        error, share = relative(output, wanted), other_rows(output, wanted)
        wrong = share > MOST_OTHER_ROWS if op == "QuantumMeasure" else not error <= LIMIT
        return {"error": error, "other_rows": share}, _verdict(wrong, error)

    makers = {"onnxruntime": ours, "torch": lambda: nodes.torch_contender(torch.clone, sets)}
    what = ", ".join(f"{name} {value}" for name, value in attributes.items()) or "depolarizing"
    base = {"op": op, "what": what, "rows": rows, "n": n, "dtype": "float32", "other": "copy"}
    return compared(makers, check, lambda name: (None, 8 * rows * n), RIVALS, base, device)


def train_case(op: str, n: int, bond_dim: int, tokens: int, device: str) -> list[dict]:
    """MPSDecode, MPSAttention of FEATURES values or MPOLinear of `tokens` rows, of an n x n matrix with interleaved sites:
    the first beside torch's product core by core, the others beside torch's product with the matrix at hand."""
    layout = make_layout("interleaved", n, n)
    bonds = layout.bonds(bond_dim)
    cores = _cores(layout, bonds, device)
    packed = torch.cat([core.flatten() for core in cores])
    matrix = decode(cores, layout)
    attributes = {"rows": n, "cols": n, "row_factors": layout.row_factors, "col_factors": layout.col_factors, "bonds": bonds}
    constants = {}
    if op == "MPSDecode":
        node, inputs, y = make_node(op, ["cores"], ["y"], **attributes), {"cores": packed}, torch.empty_like(matrix)
        rival = nodes.torch_contender(lambda *parts: decode(parts, layout), [cores])
    elif op == "MPSAttention":
        v = torch.randn(n, FEATURES, device=device)
        node, inputs = make_node(op, ["cores", "v"], ["y"], **attributes), {"cores": packed, "v": v}
        y, rival = torch.empty_like(v), nodes.torch_contender(torch.matmul, [(matrix, v)])
    else:
        x = torch.randn(tokens, n, device=device)
        node, inputs, constants = make_node(op, ["x", "cores"], ["y"], **attributes), {"x": x}, {"cores": packed}
        y, rival = torch.empty_like(x), nodes.torch_contender(torch.matmul, [(x, matrix)])

    def check(name, contender):
        found = contender.result().cpu()
        error = relative(found, nodes.cpu_output(node, inputs, y, constants))
        return {"error": error}, _verdict(not error <= LIMIT, error)

    makers = {
        "onnxruntime": lambda: nodes.node_contender(node, [inputs], [{"y": y}], device, constants=constants),
        "torch": lambda: rival,
    }
    moved = packed.nbytes + y.nbytes + sum(tensor.nbytes for name, tensor in inputs.items() if name != "cores")
    base = {"op": op, "n": n, "bond_dim": bond_dim, "tokens": tokens, "dtype": "float32"}
    base["other"] = "core by core" if op == "MPSDecode" else "matrix"
    return compared(makers, check, lambda name: (None, moved), RIVALS, base, device)


def _cores(layout, bonds, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(layout.rows + bonds[1])
    shapes = layout.shapes(bonds)
    return [(torch.randn(shape, generator=generator) / shape[0] ** 0.5).to(device) for shape in shapes]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def _verdict(wrong: bool, error: float) -> str:
    return f"wrong: relative error {error:.2g} against the CPU; not timed" if wrong else ""


def cases(device: str, quick: bool) -> list[Case]:
    noise = [{}, {"basis": "x"}]
    sizes = ((64, 64),) if quick else ((64, 64), (64, 1024), (32768, 1024))
    found = [
        Case("rows", f"{op}, {rows} rows of {n}, {attributes}", row_case, (op, rows, n, attributes))
        for op, settings in (("QuantumNoise", noise), ("QuantumMeasure", [{"shots": 32}, {"shots": 1024}]))
        for rows, n in sizes
        for attributes in settings
    ]
    trains = [("MPSDecode", 64, 8, 0)] if quick else []
    if not quick:
        trains = [("MPSDecode", n, 32, 0) for n in (1024, 4096)] + [("MPSAttention", 4096, bond, 0) for bond in (8, 32)]
        trains += [("MPOLinear", 4096, bond, tokens) for bond in (8, 32) for tokens in (1, 64, 1024)]
    return found + [
        Case("trains", f"{op}, n {n}, bond {b}, {t} tokens", train_case, (op, n, b, t)) for op, n, b, t in trains
    ]
