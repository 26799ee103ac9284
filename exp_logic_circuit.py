"""Do wired logic-gate networks learn Conway's Life exactly, and how small a circuit comes out?

Entry       logic journal: "fixed sparse weights, like original paper", "the paper works", 48 gates wide, 20 deep, 1500 steps
Hypothesis  The paper's way, a softmax over 16 gates from a pass-through start, finds an exact circuit in 1500 steps, 48 wide and 20
            deep. Ours: four sigmoids a gate (its truth table) learn what the softmax does not: 8 layers of 128 end exact, once
            hardened, for at least 15 of 16 seeds, under 5 CPU seconds each. A soft loss near 0 does not yet mean a right circuit.
            Simplified, a circuit of over 1000 gates keeps under 60.
Rule        AdamW (betas 0.9, 0.99) on the mean squared error of 64 of the 512 neighbourhoods a step, each once in 8 steps; layers
            halve down to one unit at the end. Exact: the hardened circuit is right on all 512, checked every 20 steps; "share"
            claims by exact intervals, 16 seeds. Every pass of the simplification is checked on all 512, the result on boards for 100
            generations against scipy.signal. A claim stands if every check's 95% interval is in its range, falls if one is out.
Cost        about 20 min on 2 cores; the circuits: `--form table --width 128 --depth 8 --patience 10000`, 10 min. Play with one:
            `--play gosper-gun [--netlist FILE] [--generations 60] [--save strip.png or life.gif]`
"""

import time

import numpy as np
import torch
from scipy import signal

import core
from core import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, at_least, one_of

FLAGS = [
    Flag("form", one_of("softmax", "table"), ("softmax", "table"), "16 gates in a softmax, or four sigmoids for a truth table"),
    Flag("width", at_least(5), (48, 128, 256), "units of each wide layer"),
    Flag("depth", at_least(1), (20, 4, 8), "wide layers; behind them each layer has half the units, down to one"),
    Flag("lr", at_least(0.0, float, above=True), (0.1,), "AdamW's learning rate"),
    Flag("decay", at_least(0.0, float), (0.01,), "AdamW's weight decay"),
    Flag("pass-through", core.probability, (0.95,), "share of the pass-through in a unit's start"),
    Flag("batch", one_of("64", "512"), ("64",), "neighbourhoods a step, out of all 512 in turn"),
    Flag("steps", at_least(1), (3000,), "steps"),
    Flag("patience", at_least(0), (0,), "attempts of the last simplifying pass without success; 0: do not simplify"),
]
CHECK_EVERY = 20
AROUND = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]])


def sizes(config: dict) -> list[int]:
    found = [core.CELLS] + [config["width"]] * config["depth"]
    while found[-1] > 1:
        found.append(-(-found[-1] // 2))
    return found


def trial(config: dict, seeds: list[int]) -> list[dict]:
    network = core.wired_gate_network(sizes(config), seeds, config["form"], config["pass_through"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=config["lr"], weight_decay=config["decay"], betas=(0.9, 0.99))
    cells = torch.from_numpy(core.NEIGHBOURHOODS).to(core.Runtime.device)
    target = torch.from_numpy(core.LIFE).to(core.Runtime.device)
    every, batch, orders = cells.T.expand(len(seeds), *cells.T.shape), int(config["batch"]), [core.stream(s, "order") for s in seeds]
    circuits, results, started = {}, [{"least_wrong": 512.0} for _ in seeds], time.process_time()
    for step in range(config["steps"] + 1):
        if step % CHECK_EVERY == 0:
            with torch.no_grad():
                soft, hard = network(every), network.hardened(every)
            loss, soft_wrong = (soft - target).square().mean(1).tolist(), ((soft > 0.5) != (target > 0.5)).sum(1).tolist()
            for s, wrong in enumerate((hard != target).sum(1).tolist()):
                if s in circuits:
                    continue
                if soft_wrong[s] == 0:
                    results[s].setdefault("wrong_when_soft_is_right", float(wrong))
                results[s] |= {"least_wrong": min(results[s]["least_wrong"], wrong), "soft_loss": loss[s], "steps_to_exact": np.nan}
                if wrong == 0:
                    circuits[s] = core.hardened_circuit(network, s)
                    results[s]["steps_to_exact"] = float(step)
            if len(circuits) == len(seeds):
                break
        if (start := step * batch % 512) == 0:
            order = torch.from_numpy(np.stack([rng.permutation(512) for rng in orders])).to(cells.device)
        drawn = order[:, start : start + batch]
        optimizer.zero_grad()
        (network(cells[drawn].mT.contiguous()) - target[drawn]).square().mean(1).sum().backward()
        optimizer.step()
    seconds = (time.process_time() - started) / len(seeds)
    for s, result in enumerate(results):
        result |= {"exact": float(s in circuits), "time_cpu_seconds": seconds, "gates": float("nan"), "operations": float("nan")}
        result.setdefault("wrong_when_soft_is_right", np.nan)
        if config["patience"] and s in circuits:
            result |= simplified(circuits[s], config["patience"], seeds[s])
    return results


def simplified(circuit: core.Circuit, patience: int, seed: int) -> dict:
    """The small circuit as a netlist, gates after each pass, and whether boards run as they should."""
    started = time.process_time()
    small, left = core.simplify(circuit, patience, core.stream(seed, "test"))
    result = {f"gates_{name}": float(count) for name, count in left.items()} | {"gates": float(len(small.gates))}
    result |= {"time_simplify": time.process_time() - started, "netlist": np.array([core.netlist(small, f"Life, seed {seed}")])}
    rng = core.stream(seed, "val")
    boards = [rng.random((60, width)) < 0.35 for width in (60, 64, 100)]
    boards += [core.pattern_board(name, 60, 70) for name in core.PATTERNS]
    right = True
    for board in boards:
        packed = core.PackedLife(small, board)
        for _ in range(100):
            packed.step()
            around = signal.convolve2d(board, AROUND, mode="same", boundary="wrap")
            board = (around == 3) | (board & (around == 2))
        right &= bool((packed.board() == board).all())
    return result | {"boards_right": float(right)}
