"""Why do networks of free logic gates blow up while they learn Life, and which single change prevents it?

Entry       logic journal: "why the heck did that happen?", "NOOOOO blow up", "WAIT! it blew up", step size 0.05, weights within ±1
Hypothesis  They blow up at step 9948, 11578 with AND and OR, 2590 with gates over their sum, about 5000 with weights within ±1.
            Ours: steps overshoot, and one rare neighbourhood of 8 or 9, where the polynomial grows, throws the weights.
            L1 of 1e-4 changes nothing (nor does 1e-5 or 1e-6: added when 1e-4 had ended learning); 1e-3 ends it, and learning.
Rule        8 seeds, exact binomial intervals of rates; runs that survive count with their last step. "None blows up": fewer than 2
            in 5 runs. A claim stands if the 95% interval of every check is in range, falls if one is out.
Cost        about 26 min on 2 cores, with --kind plain --fix none error-clip bounded softmax all-clipped adam l1 for the rest
Quick       `--kind plain sum-1 --fix none --steps 4000`
"""

import numpy as np
import torch

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, at_least, one_of

NOTEBOOK = {"gates": ("AND", "XOR", "OR", "NAND"), "form": "free", "bound": None, "alive": 0.254, "optimizer": torch.optim.SGD,
            "clip": np.inf, "largest_weight": np.inf, "largest_gate": np.inf, "heed": torch.ones_like, "l1": 0.0}  # fmt: skip
KINDS = {"plain": {}, "sum-1": {"form": "sum-1"}, "weights-clipped": {"largest_weight": 1.0}, "half-lr": {"lr": 0.05},
         "and-or": {"gates": ("AND", "OR")}}  # fmt: skip
FIXES = {  # heed: the share of its gradient that each neighbourhood keeps; tanh is no change near 0, where training starts
    "none": {}, "uniform-inputs": {"alive": 0.5}, "gradient-clip": {"clip": 1.0}, "softmax": {"form": "softmax"},
    "without-crowded": {"heed": lambda error: torch.from_numpy(core.CELLS_ALIVE < CROWDED).to(error)},
    "error-clip": {"heed": lambda error: (1 / error.abs()).clamp(max=1)}, "bounded": {"bound": torch.tanh},  # the first: Huber's
    "all-clipped": {"largest_weight": 1.0, "largest_gate": 1.0}, "adam": {"optimizer": torch.optim.Adam, "lr": 1e-3},
    "l1": {"l1": 1e-4}, "l1-strong": {"l1": 1e-3}, "l1-weak": {"l1": 1e-5}, "l1-weaker": {"l1": 1e-6}}  # fmt: skip
FLAGS = [
    Flag("kind", one_of(*KINDS), tuple(KINDS), "run of the journal"),
    Flag("fix", one_of(*FIXES), ("none", "uniform-inputs", "without-crowded", "gradient-clip"), "one change to it"),
    Flag("lr", at_least(0.0, float, above=True), (0.1,), "learning rate"),
    Flag("batch", at_least(1), (512,), "neighbourhoods a step"),
    Flag("width", at_least(1), (48,), "units in each of the two hidden layers"),
    Flag("steps", at_least(1), (12000,), "steps, the journal's epochs"),
]
LOST, CROWDED = 1e6, 8  # loss of a batch from which no run returns (it may stay finite); live cells, 8 or 9: in one batch of 17
CALM, EVERY = 100, 10  # steps that tell what was usual before the trouble; steps between points of a curve


def together(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All tensors [S, ...] as one row a seed."""
    return torch.cat([tensor.detach().flatten(1) for tensor in tensors], 1)


def first_sign(loss: np.ndarray) -> int:
    """First of the unbroken run of steps, up to the last, at which the batch's loss is over twice the median of those before."""
    step = len(loss) - 1
    while step > 1 and loss[step - 1] > 2 * np.median(loss[max(step - 1 - CALM, 0) : step - 1]):
        step -= 1
    return step


def trial(config: dict, seeds: list[int]) -> list[dict]:
    config = NOTEBOOK | config | KINDS[config["kind"]] | FIXES[config["fix"]]
    sizes, how = (9, config["width"], config["width"], 1), {key: config[key] for key in ("gates", "form", "bound")}
    network, before, errors, now = core.dense_gate_network(sizes, seeds, **how), [], [], {}
    weights, gates = [p for layer in network for p in layer.operands.parameters()], [layer.gates.weight for layer in network]
    optimizer = config["optimizer"](network.parameters(), config["lr"])
    target, cells = (torch.from_numpy(x).to(core.Runtime.device) for x in (core.LIFE, core.CELLS_ALIVE))

    def weigh(network, inputs, output):
        now["heed"] = config["heed"](output.detach() - target)
        output.register_hook(now["heed"].mul)

    def watch(step, output, counts, gradients):
        squared, gradient = (output - target).square(), together(gradients)
        each = torch.where(counts > 0, now["heed"] * counts * squared, 0.0)
        total, (largest, worst) = each.sum(1), each.max(1)
        turn = torch.cosine_similarity(gradient, now.get("gradient", gradient))  # from the last step's gradient
        sums, *sizes = (together(tensors).abs() for tensors in ([gate.sum(2) for gate in gates], weights, gates))
        sizes = gradient.norm(dim=1), *(size.amax(1) for size in sizes), sums.amin(1)
        before.append(torch.stack([total / config["batch"], cells[worst], largest / total, turn, *sizes]))
        now["gradient"] = gradient
        if step % EVERY == 0:
            errors.append(torch.stack([squared[:, cells == n].mean(1) for n in range(10)]))

    def update(parameters, gradients, _):
        scale = (config["clip"] / now["gradient"].norm(dim=1)).clamp(max=1)[:, None, None]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * scale + config["l1"] * parameter.sign()
        optimizer.step()
        for tensors, limit in ((weights, config["largest_weight"]), (gates, config["largest_gate"])):
            torch._foreach_clamp_min_(tensors, -limit)
            torch._foreach_clamp_max_(tensors, limit)

    network.register_forward_hook(weigh)
    run = core.train_on_life(network, seeds, config, update, watch)
    before, errors = (torch.stack(rows, -1).cpu().double().numpy() for rows in (before, errors))  # [8, S, T], [10, S, T / EVERY]
    results = []
    for i, (exact, right) in enumerate(zip(run["loss"], (run["output"] > 0.5) == core.LIFE, strict=True)):
        lost = ~(before[0, i] < LOST)
        blew_up, end = bool(lost.any()), int(lost.argmax()) if lost.any() else config["steps"]
        loss, live, share, turn, gradient, weight, gate, gate_sum = before[:, i, :end]
        start = first_sign(loss) if blew_up else int((loss * share).argmax())  # of a run that survives: its worst neighbourhood
        calm, crowded = slice(max(start - CALM, 0), max(start, 1)), blew_up and live[start] >= CROWDED and share[start] > 0.5
        result = {"blew_up": float(blew_up), "crowded": float(crowded), "onset": float(end), "diverged": run["diverged"][i]}
        result |= {"start": float(start), "live_cells": live[start], "share": share[start], "turn": np.median(turn[calm])}
        result |= {"gradient_jump": gradient[start] / np.median(gradient[calm]), "slow": float(blew_up and end > start + 4)}
        result |= {"largest_weight": weight[start], "largest_gate": gate[start], "least_sum": gate_sum[start]}
        result |= {"best": exact[:end].min(), "right": right.mean(), "loss": exact[::EVERY], "errors": errors[:, i]}
        results.append(result)
    return results


def rate(metric: str, claimed: tuple, versus: dict | None = None, **cell: str) -> Check:
    return Check(metric, claimed, cell, versus, "rate")


FEW, SOME, LEARNS, WHY = (ANY_BELOW, 0.4), (0.1, ANY_ABOVE), (0.85, ANY_ABOVE), "why the heck"
JOURNAL = {"plain": (9948, (ANY_BELOW, 0.0139)), "and-or": (11578, (ANY_BELOW, 0.0431)), "sum-1": (2590, (0.17, ANY_ABOVE)),
           "weights-clipped": (5000, (0.154, 0.174))}  # step of the blow-up, least loss till then  # fmt: skip
CLAIMS = [
    *(Claim(f"{k}: blows up, over 1 in 10 runs", k, [rate("blew_up", SOME, kind=k)]) for k in JOURNAL),
    *(Claim(f"{k}: near step {n}, with its loss", k, [Check("onset", (n / 1.5, n * 1.5), {"kind": k}, None, "ratio"),
      Check("best", best, {"kind": k})]) for k, (n, best) in JOURNAL.items()),
    Claim("in three steps: rarely over 4", "and-or", [rate("slow", FEW, kind=k) for k in JOURNAL]),
    Claim("there are very big parameters, over 10", "and-or", [Check("largest_weight", (10, ANY_ABOVE))]),
    *(Claim(f"{k}: sooner", k, [Check("onset", (0, 1), {"kind": k}, {}, "ratio")]) for k in ("sum-1", "weights-clipped")),
    Claim("0.05 helps: it blows up less", "half-lr", [rate("blew_up", (ANY_BELOW, 0), {}, kind="half-lr")]),
    *(Claim(f"{k}: 8 or 9 live cells start it (our question)", WHY, [rate("crowded", SOME, kind=k)]) for k in KINDS),
    Claim("a sum that divides is below 0.1 (our question)", "sum-1", [Check("least_sum", (ANY_BELOW, 0.1), {"kind": "sum-1"})]),
    Claim("uniform-inputs: none so (our question)", WHY, [rate("crowded", FEW, kind=k, fix="uniform-inputs") for k in KINDS]),
    *(Claim(f"{fix}: later, or not at all (our question)", WHY, [Check("onset", (1.2, ANY_ABOVE), {"fix": fix}, {}, "ratio")])
      for fix in ("uniform-inputs", "without-crowded")),
    Claim("gradient-clip: none blows up (our question)", WHY, [rate("blew_up", FEW, kind=k, fix="gradient-clip") for k in KINDS]),
    Claim("successive gradients turn about: cosine below -0.5 (our question)", WHY, [Check("turn", (-1, -0.5))]),
    *(Claim(f"{fix}: no blow-up, and over 85% right (our question)", WHY,
            [rate("blew_up", FEW, fix=fix), Check("right", LEARNS, {"fix": fix})]) for fix in ("error-clip", "bounded", "adam")),
    *(Claim(f"{fix}: blows up (our question)", WHY, [rate("blew_up", SOME, fix=fix)])
      for fix in ("all-clipped", "softmax", "l1", "l1-weak", "l1-weaker")),
    Claim("l1-strong: no blow-up, and not over 85% right (our question)", "regulariser",
          [rate("blew_up", FEW, fix="l1-strong"), Check("right", (ANY_BELOW, 0.85), {"fix": "l1-strong"})]),
]  # fmt: skip


def headline(run: core.Run) -> str:
    blown = [result["crowded"] for results in run.results for result in results if result["blew_up"]]
    return f"{len(blown)} of {len(run.cells) * len(run.seeds)} runs blew up, {sum(blown):.0f} of them at a crowded neighbourhood"


def figures(run: core.Run) -> list[core.Figure]:
    keys, rows = core.varying(run.cells), {}
    for cell, results in zip(run.cells, run.results, strict=True):
        told = {name: [r["onset"] for r in results if r["blew_up"] == hit] for name, hit in (("blew up", 1), ("never did", 0))}
        told["journal"] = [JOURNAL[cell["kind"]][0]] if cell["fix"] == "none" and cell["kind"] in JOURNAL else []
        rows[f"{core.cell_name(cell, keys)}: {len(told['blew up'])} of {len(results)}"] = {k: v for k, v in told.items() if v}
    panel, line = ("kind", "fix") if "kind" in keys else ("fix", "kind")
    finding = "Squared error by live cells: just before a blow-up's first sign, or at the worst step of a run that survives"
    lines = lambda cell, result: {cell[line]: result["errors"][:, int(result["start"]) // EVERY]}  # noqa: E731
    return [core.dots_figure(rows, "onset", headline(run), "step of the blow-up, or the last one"),
            core.curves_figure(run, "error", finding, lines, [panel], "live cells", "squared error", log=True)]  # fmt: skip


SMOKE = {"kind": ("plain", "sum-1"), "fix": ("none", "gradient-clip"), "steps": (20,), "width": (6,), "batch": (64,)}
METRICS = ["onset", "blew_up", "crowded", "best", "right", "live_cells", "share", "gradient_jump", "turn", "largest_weight"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, stack=8, seeds=8)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
