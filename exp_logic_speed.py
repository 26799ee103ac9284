"""How fast are stacked training, the fused gate layer and a learned circuit on whole boards, each against its rivals?

Entry       logic journal: "relu is fast", "I could try speeding up the gate", "optimized sparse connections"
Hypothesis  Ours. Eight seeds as one tensor program make at least 1.9 times the steps a second of one seed alone. A step of the gate
            layer in four coefficients is 3.5 times faster than one that weighs 16 gates as written, and than torchlogix's layer.
            On a board of 512 x 512 the packed circuit makes 20 times the updates a second of scipy's convolution, 1000 times the
            soft network's, and more than a separable sum of rolled bytes. As the journal's gates are "very very slow" and its "relu
            is fast", a step of all 16 gates takes at least twice as long as one of ReLU units, in the same dense network.
Rule        Medians of interleaved rounds in one process, one thread; ratios of times for the same work, 5 seeds (other weights,
            wires, boards, circuits). A claim stands if the 95% interval of the geometric mean is in its range, falls if out of it.
Cost        about 4 min with --jobs 1, as recorded. The peer, where installed: pip install --no-deps -r requirements-peers.txt
Quick       `--part stack layer --network wired --units 128 --rounds 3 --seeds 3`
"""

import numpy as np
import torch

import core_old as core
from core_old import ANY_ABOVE, Check, Claim, Flag, at_least, one_of

FLAGS = [
    Flag("part", one_of("stack", "layer", "boards"), ("stack", "layer", "boards"), "stacked training; a step of one layer; boards"),
    Flag("network", one_of("wired", "dense"), ("wired", "dense"), "8 layers of 128 wired gates, or the journal's [9, 48, 48, 1]"),
    Flag("units", at_least(5), (128, 1024), "units of the layer, and its inputs"),
    Flag("batch", at_least(1), (512, 64), "inputs of the layer at once"),
    Flag("board", at_least(3), (512, 128, 2048), "rows and columns of the board"),
    Flag("steps", at_least(1), (3000,), "steps to learn the circuit"),
    Flag("patience", at_least(1), (1000,), "attempts of the last simplifying pass without success"),
    Flag("rounds", at_least(1), (15,), "timed rounds, behind two that are not"),
]
USED = {"stack": ("network",), "layer": ("units", "batch"), "boards": ("board", "steps", "patience")}
SIZES = [core.CELLS, *[128] * 8, 64, 32, 16, 8, 4, 2, 1]
STEPS, CALLS, TRAINING = 19, 20, {"lr": 0.1, "decay": 0.01, "batch": 64}
RATIOS = ("stack_gain", "literal_over_fused", "peer_over_fused", "convolution_over_packed", "soft_over_packed", "roll_over_packed",
          "gates_over_relu")  # fmt: skip


def cell(config: dict) -> dict:
    return {key: config[key] for key in ("part", *USED[config["part"]], "rounds")}


def trial(config: dict, seed: int) -> dict:
    result = {"stack": stack, "layer": layer, "boards": boards}[config["part"]](config, seed)
    return dict.fromkeys([f"time_{m}" for m in (*RATIOS, "packed_us", "us_an_operation")] + ["gates"], np.nan) | result


def stack(config: dict, seed: int) -> dict:
    """Training steps of eight stacked seeds against those of one; in the dense network also of 16 gates against those of ReLU."""

    def steps(seeds: list[int], gates: tuple[str, ...] = ("AND", "XOR", "OR", "NAND")):
        if config["network"] == "wired":
            network = core.wired_gate_network(SIZES, seeds, "table", 0.95)
            return lambda: core.train_until_exact(network, seeds, TRAINING | {"steps": STEPS}, lambda row: None)
        network = core.dense_gate_network((core.CELLS, 48, 48, 1), seeds, gates)
        return lambda: core.train_on_life(network, seeds, {"steps": STEPS, "batch": 512, "alive": 0.254, "lr": 0.1})

    eight = [*range(8 * seed, 8 * seed + 8)]
    rivals = {"gates": core.GATES[:16], "relu": ("RELU",)} if config["network"] == "dense" else {}
    arms = {"eight": steps(eight), "one": steps(eight[:1])} | {name: steps(eight[:1], gates) for name, gates in rivals.items()}
    seconds = core.interleaved_medians(arms, config["rounds"])
    work = {"wired": sum(SIZES[1:]), "dense": 97}[config["network"]] * 8.0 * STEPS * config["rounds"]
    ratio = {"time_gates_over_relu": seconds["gates"] / seconds["relu"]} if "relu" in arms else {}
    return ratio | {"time_stack_gain": 8 * seconds["one"] / seconds["eight"], "work": work}


def layer(config: dict, seed: int) -> dict:
    """Forward and backward through one wired layer with a softmax over 16 gates, written in three ways."""
    units, batch, rng = config["units"], config["batch"], core.stream(seed, "init")
    wires = core.draw_wires(units, units, rng)
    weight = torch.from_numpy(rng.standard_normal((1, units, 16), np.float32))
    fused = core.GateLayer(core.WiredOperands(wires[None], units), core.GateMixture(weight, form="softmax"))
    x, logits = torch.from_numpy(rng.random((1, units, batch), np.float32)).requires_grad_(), weight[0].clone().requires_grad_()

    def literal() -> torch.Tensor:
        """As the paper prints it: every gate of the two inputs, then their weighted sum."""
        a, b = (x[0].T[:, torch.from_numpy(side)] for side in wires)  # (batch, units)
        gates = [a * 0, a * b, a - a * b, a, b - a * b, b, a + b - 2 * a * b, a + b - a * b]
        gates += [1 - gate for gate in reversed(gates)]
        return (torch.stack(gates, -1) * logits.softmax(-1)).sum(-1).T

    torch.testing.assert_close(literal(), fused(x)[0], rtol=1e-3, atol=1e-4)
    arms = {"fused": lambda: fused(x).sum().backward(), "literal": lambda: literal().sum().backward()}
    if layers := core.optional("torchlogix.layers"):
        peer, flat = layers.LogicDense(units, units), x.detach()[0].T.contiguous().requires_grad_()
        arms["peer"] = lambda: peer(flat).sum().backward()
    calls = {name: lambda arm=arm: [arm() for _ in range(CALLS)] for name, arm in arms.items()}  # one is too short to be timed
    seconds = core.interleaved_medians(calls, config["rounds"])
    timed = {f"time_{name}_over_fused": seconds[name] / seconds["fused"] for name in arms if name != "fused"}
    return timed | {"work": float(units * batch * CALLS * config["rounds"])}


def boards(config: dict, seed: int) -> dict:
    """Generations of a board under a learned circuit, against scipy, numpy and the soft network."""
    network, exact = core.wired_gate_network(SIZES, [seed], "table", 0.95), []
    core.train_until_exact(network, [seed], TRAINING | {"steps": config["steps"]}, exact.append)
    circuit, _ = core.simplify(core.hardened_circuit(network, 0), config["patience"], core.stream(seed, "test"))
    size, rng = config["board"], core.stream(seed, "val")
    board = rng.random((size, size)) < 0.3
    packed, byte = core.PackedLife(circuit, board), board.astype(np.uint8)
    some = min(size**2, 1 << 16)  # cells for the soft network, whose time is scaled to the board
    cells = torch.from_numpy(core.NEIGHBOURHOODS[rng.integers(512, size=some)]).split(4096)

    def roll() -> np.ndarray:
        row = byte + np.roll(byte, 1, 1) + np.roll(byte, -1, 1)
        total = row + np.roll(row, 1, 0) + np.roll(row, -1, 0)
        return (total == 3) | ((total == 4) & board)

    @torch.no_grad()
    def soft() -> list:
        return [network(part.T.contiguous()[None]) for part in cells]

    assert (roll() == core.convolution_step(board)).all()
    arms = {"packed": packed.step, "convolution": lambda: core.convolution_step(board), "roll": roll}
    generations = min(64, 1 + (1 << 22) // size**2)  # one is too short to be timed, and starts cold
    calls = {name: lambda arm=arm: [arm() for _ in range(generations)] for name, arm in arms.items()}
    seconds = core.interleaved_medians(calls | {"soft": soft}, config["rounds"])
    seconds = {name: taken / generations for name, taken in seconds.items()} | {"soft": seconds["soft"] * size**2 / some}
    operations = sum(character in "&|^~" for gate, _, _ in circuit.gates for character in core.EXPRESSIONS[gate])
    result = {"gates": float(len(circuit.gates)), "exact": float(len(exact)), "work": float(size**2 * config["rounds"])}
    result |= {"time_packed_us": 1e6 * seconds["packed"], "time_us_an_operation": 1e6 * seconds["packed"] / max(operations, 1)}
    return result | {f"time_{name}_over_packed": seconds[name] / seconds["packed"] for name in seconds if name != "packed"}


def ratio(metric: str, least: float, **arm) -> Check:
    return Check(f"time_{metric}", (least, ANY_ABOVE), arm, scale="ratio")


LAYERS = [{"part": "layer", "units": units, "batch": batch} for units in (128, 1024) for batch in (512, 64)]
CLAIMS = [
    Claim("8 stacked seeds: 1.9 times the steps a second of one, wired", "speed", [ratio("stack_gain", 1.9)]),
    Claim("and in the journal's dense network", "speed", [ratio("stack_gain", 1.9, network="dense")]),
    Claim("a step of ReLU units is fast: all 16 gates, fused, take twice as long or more", "trainable gates",
          [ratio("gates_over_relu", 2, network="dense")]),
    Claim("fused: 3.5 times as fast as 16 gates as written", "speed", [ratio("literal_over_fused", 3.5, **arm) for arm in LAYERS]),
    Claim("and as torchlogix's layer", "speed", [ratio("peer_over_fused", 3.5, **arm) for arm in LAYERS]),
    Claim("packed circuit, 512 x 512: 20 times convolution, 1000 times the soft network", "speed",
          [ratio("convolution_over_packed", 20, part="boards"), ratio("soft_over_packed", 1000, part="boards")]),
    Claim("and faster than rolled bytes", "speed", [ratio("roll_over_packed", 1, part="boards")]),
]  # fmt: skip


def headline(run: core.Run) -> str:
    if any(cell["part"] == "boards" for cell in run.cells):
        return f"microseconds a generation: {core.extremes(run, 'time_packed_us')}"
    told = [f"{name.replace('_', ' ')} {found}" for name in RATIOS if (found := core.extremes(run, f"time_{name}")) != "–"]
    return f"times as fast: {', '.join(told)}"


def figures(run: core.Run) -> list[core.Figure]:
    arms = core.by_arm(run, [f"time_{name}" for name in RATIOS])
    rows = {arm: {m[5:]: values for m, values in row.items() if np.isfinite(values).all()} for arm, row in arms.items()}
    return [core.dots_figure(rows, "ratios", headline(run), "times as fast", "log", {"equal": 1.0})]


SMOKE = {"units": (16,), "batch": (8,), "board": (16,), "steps": (20,), "patience": (2,), "rounds": (1,)}
METRICS = ["time_packed_us", *(f"time_{name}" for name in RATIOS), "time_us_an_operation", "gates"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
