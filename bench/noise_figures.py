"""What noise does to rows of a trained model, what mitigation makes of it at equal shots, and how long the simulator takes.

    python -m bench.noise_figures [--runs 300] [--folder docs] [--json FILE]

channels      draws FOLDER/noise_channels.png: one row of MiniLM's attention behind every channel, against its level
mitigation    mean squared error of every method at the same total number of shots, theory and measurement, over eight rows
              of MiniLM; draws FOLDER/noise_mitigation.png
simulator     latency of `simulate_attention`, 64 x 64, 64-D, 32 shots, one thread of torch
goals         those of bench/goals.toml that are decided here
"""

from pathlib import Path

import numpy as np
import torch

from bench import activations, common
from bench.attention import goals
from qexport import _core
from qexport.nn import QuantumAttentionSimulator
from qexport.noise.comparison import METHODS, compare_mitigation, theory
from qexport.noise.measured import MeasuredNoise
from qexport.noise.mitigation import parse_mitigation
from qexport.noise.model import NoiseModel
from qexport.profiling.timing import interleaved

LENGTH = 64
HEAD = 1, 4  # layer and head of MiniLM: six keys on average
ROW = 20  # the query that is drawn
ROWS = slice(4, 64, 8)  # those that mitigation is compared on
LEVEL = 0.02  # of depolarizing noise, each qubit
SHOTS = (32, 1024, 32768)
PANELS = {
    "depolarizing": {},
    "depolarizing, all qubits as one": {"scope": "global"},
    "amplitude damping": {},
    "thermal relaxation, 20 % excited": {"excited_population": 0.2},
    "bit flip; readout alike": {},
    "phase damping, phase flip: flat": {},
}
DISTANCES = {
    "depolarizing": ("#1f4e9c", "-"),
    "amplitude_damping": ("#c0392b", "-"),
    "thermal_relaxation": ("#d9822b", "-"),
    "bit_flip": ("#2e8b57", "-"),
    "readout": ("#2a9fd6", "--"),
    "phase_damping": ("#8e44ad", "-"),
    "phase_flip": ("#e377c2", "--"),
}
COLOURS = ("#1f4e9c", "#c0392b", "#2e8b57", "#d9822b", "#8e44ad")
METHOD_COLOURS = {
    "none": "#444444",
    "readout_inversion": "#1f4e9c",
    "readout_inversion:project": "#2a9fd6",
    "zne": "#d9822b",
    "pec": "#c0392b",
    "repetition:3": "#2e8b57",
}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}


def attention_rows() -> torch.Tensor:
    """The softmax rows of HEAD on 64 tokens of a film review: float64 (64, 64)."""
    q, k, _ = activations.minilm(LENGTH)
    q, k = (torch.from_numpy(x[HEAD]).double() for x in (q, k))
    return (q @ k.T / q.shape[-1] ** 0.5).softmax(-1)


def noisy(p: torch.Tensor, channel: str, levels, basis: str = "z", **more) -> torch.Tensor:
    """(levels, n) of one row."""
    return torch.stack(
        [MeasuredNoise([NoiseModel(channel, float(x), **more)], len(p), basis).probabilities(p) for x in levels]
    )


def draw_channels(p: torch.Tensor, file: Path) -> None:
    """Six panels of the five likeliest keys against the level, and the distance from the row in both bases."""
    figure, axes = _figure(2, 4, (13, 6.2))
    levels = np.linspace(0, 1, 101)
    top = p.topk(len(COLOURS)).indices.tolist()
    for axis, (title, more) in zip(axes[:, :3].flat, PANELS.items(), strict=True):
        channel = "_".join(title.split(",")[0].split(";")[0].split()[:2])
        rows = noisy(p, channel, levels, **more)
        for key, colour in zip(top, COLOURS, strict=True):
            axis.plot(levels, rows[:, key], color=colour, label=f"key {key}")
        axis.plot(levels, 1 - rows[:, top].sum(-1), color="#999999", linestyle="--", label=f"the other {len(p) - len(top)}")
        axis.set(title=title, xlim=(0, 1), ylim=(0, 1))
    axes[0, 0].legend(frameon=False, fontsize=8)
    for axis, basis in zip(axes[:, 3], ("z", "x"), strict=True):
        for channel, (colour, line) in DISTANCES.items():
            rows = noisy(p, channel, levels, basis)
            axis.plot(
                levels, (rows - rows[0]).abs().sum(-1) / 2, color=colour, linestyle=line, label=channel.replace("_", " ")
            )
        axis.set(title=f"distance, basis {basis}", xlim=(0, 1), ylim=(0, 1), ylabel="total variation")
    axes[1, 3].legend(frameon=False, fontsize=7.5, loc="upper left")
    for axis in axes[:, 0]:
        axis.set_ylabel("probability of being measured")
    for axis in axes[1]:
        axis.set_xlabel("level (thermal relaxation: t / T1, T2 = T1)")
    figure.savefig(file, dpi=80)


def draw_mitigation(p: torch.Tensor, table: list[dict], file: Path) -> None:
    """Mean squared error against shots, and against the level; lines are theory, dots were measured."""
    figure, (left, right) = _figure(1, 2, (11, 4.6))
    shots = np.unique(np.logspace(4, 20, 33, base=2).astype(int))
    levels = np.logspace(-3, np.log10(0.3), 40)
    for text, colour in METHOD_COLOURS.items():
        method = parse_mitigation(text)
        if method.linear:
            noise = MeasuredNoise([NoiseModel("depolarizing", LEVEL)], p.shape[-1])
            left.plot(shots, [sum(theory(method, noise, p, int(s))) for s in shots], color=colour, label=text)
            noises = [MeasuredNoise([NoiseModel("depolarizing", float(x))], p.shape[-1]) for x in levels]
            right.plot(levels, [sum(theory(method, noise, p, SHOTS[1])) for noise in noises], color=colour, label=text)
        dots = [row for row in table if row["method"] == text]
        style = {"color": colour, "marker": "o", "markersize": 4, "linestyle": "" if method.linear else ":"}
        left.plot(
            *zip(*((r["shots"], r["measured_mse"]) for r in dots), strict=True),
            **style,
            label=None if method.linear else text,
        )
    ideal = float((1 - p.square().sum(-1)).mean())
    left.plot(shots, ideal / shots, color="#bbbbbb", linestyle="--", label="no noise")
    right.axhline(ideal / SHOTS[1], color="#bbbbbb", linestyle="--", label="no noise")
    left.set(
        title=f"depolarizing {LEVEL:g} on each of 6 qubits", xlabel="shots per row, in all", ylabel="mean squared error"
    )
    right.set(title=f"{SHOTS[1]} shots per row", xlabel="level of depolarizing noise")
    for axis in (left, right):
        axis.set(xscale="log", yscale="log")
    right.set_ylim(1e-4, 1)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=80)


def _figure(rows: int, columns: int, size):
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rcParams.update(STYLE)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def mitigation_table(p: torch.Tensor, runs: int) -> list[dict]:
    rows = []
    for shots in SHOTS:
        for error in compare_mitigation(p, NoiseModel("depolarizing", LEVEL), shots, runs=runs, methods=METHODS):
            row = {"shots": shots, "method": error.method, "qubits": error.qubits, "overhead": error.overhead}
            row |= {"bias2": error.bias2, "variance": error.variance, "mse": error.mse}
            rows.append(row | {"measured_mse": error.measured_mse, "standard_error": error.standard_error})
            if error.mse == error.mse and not abs(error.measured_mse - error.mse) < 5 * error.standard_error:
                raise SystemExit(f"{error.method} at {shots} shots is off its theory: {error}")
    return rows


def simulator_table(runs: int) -> list[dict]:
    """Milliseconds of a call; each is compared with the reference backend first."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    Q, K, V = (torch.randn(64, 64, generator=generator) for _ in range(3))
    settings = [{"noise_model": channel} for channel in DISTANCES]
    settings += [{"mitigation": method} for method in METHODS[1:]]
    settings += [{"basis": "x"}, {"basis": "overlap", "noise_model": "phase_damping"}, {"backend": "reference"}]
    rows, calls = [], {}
    for i, given in enumerate(settings):
        simulator = QuantumAttentionSimulator(**given)
        reference = QuantumAttentionSimulator(**given | {"backend": "reference"})
        error = (simulator.simulate_attention(Q, K, V)[1] - reference.simulate_attention(Q, K, V)[1]).abs().max()
        if not error < 1e-6:
            raise SystemExit(f"{given} draws otherwise than the reference, by {error:.3g}")
        calls[i] = lambda s=simulator: s.simulate_attention(Q, K, V, num_samples=32, noise_level=0.01)
        names = {"noise_model": "depolarizing", "basis": "z", "mitigation": "none", "backend": "auto"}
        rows.append(names | given | {"n": 64, "head_size": 64, "samples": 32})
    slow = {i: call for i, call in calls.items() if rows[i]["basis"] == "overlap" or rows[i]["backend"] == "reference"}
    times = interleaved({i: call for i, call in calls.items() if i not in slow}, runs, warmup=20)
    times |= interleaved(slow, max(2, runs // 10), warmup=2)  # apart: they would push the others out of the caches
    return [row | {"p50_ms": float(np.median(times[i]))} for i, row in enumerate(rows)]


def main():
    parser = common.parser(__doc__.split("\n")[0], runs=300)
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where the pictures go")
    arguments = parser.parse_args()
    p = attention_rows()
    draw_channels(p[ROW], arguments.folder / "noise_channels.png")
    tables = {"mitigation": mitigation_table(p[ROWS], arguments.runs)}
    draw_mitigation(p[ROWS], tables["mitigation"], arguments.folder / "noise_mitigation.png")
    tables["simulator"] = simulator_table(arguments.runs)
    tables["goals"] = goals.judged(tables, _core.isa(), file="noise_figures")
    parameters = {"channel": "depolarizing", "level": LEVEL, "rows": len(p[ROWS]), "n": LENGTH, "runs": arguments.runs}
    common.report("noise_figures", arguments.threads, parameters, tables, arguments.json)


if __name__ == "__main__":
    main()
