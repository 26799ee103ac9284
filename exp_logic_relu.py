"""Does a ReLU network learn Conway's Life, and what are the losses at which the journal's networks stop?

Entry       logic journal: "a simple version", "fixed sparse weights", "predictions", "relu but gate activation", "pure relu"
Hypothesis  [9, 512, 512, 1] falls below 1e-6 in 1500 steps; its predictions are cut at 0 and lie at 0.99 to 1.01 on top; with
            trained gates that all are ReLU it takes 600; on fixed sparse weights the loss stays at 0.29; [9, 48, 48, 1] converges
            in 2500. Ours: a loss that stays has a name, the exact loss of the best predictor of a kind (0.29: always 0; 0.2: the
            mean). The last unit is a ReLU with a bias of random sign: half of all networks are born dead, at always 0 for ever.
            Trained gates that all are ReLU only multiply the rate: they learn faster, and may die of it. Units on a shuffled
            identity pass on nothing: nine of 512 reach an input; with ReLU that is always 0, with the 16 gates the mean.
Rule        Plain SGD on fresh batches; loss: exact, over all 512 neighbourhoods with the journal's chances. "In n steps": the least
            so far, geometric mean over seeds not born dead (the living). On top: share of what should be 1 that comes out within
            0.99 to 1.01, over 0.9. A claim stands if the 95% interval of every check is in its range, and falls if one is out.
Cost        about 20 min on 2 cores; [9, 48, 48, 1]: `--model relu --hidden 48,48 --batch 512 --steps 2500`, half a minute
Quick       `--model relu relu-gates --steps 600 --seeds 4`
"""

import itertools

import numpy as np
import torch

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, at_least, one_of

MODELS = {"relu": ("RELU",), "relu-gates": ("RELU",) * 16, "wired": core.GATES[:16], "wired-relu": ("RELU",) * 16}
FLAGS = [
    Flag("model", one_of(*MODELS), tuple(MODELS), "ReLU; 16 trained gates a unit, all ReLU; 16 gates, or those, on fixed weights"),
    Flag("hidden", core.widths, ((512, 512),), "hidden layers"),
    Flag("batch", at_least(1), (1024,), "neighbourhoods a step"),
    Flag("lr", at_least(0.0, float, above=True), (0.1,), "learning rate of plain SGD"),
    Flag("steps", at_least(1), (2000,), "steps, the journal's epochs"),
    Flag("alive", core.probability, (0.254,), "chance that a cell of a neighbourhood lives"),
    Flag("spread", at_least(0.0, float), (0.01,), "standard deviation of initial weights and biases"),
]
EVERY = 10  # steps between points of a curve


def build(config: dict, seeds: list[int]) -> core.GateNetwork:
    sizes, model = (9, *config["hidden"], 1), config["model"]
    if not model.startswith("wired"):
        network = core.dense_gate_network(sizes, seeds, MODELS[model], spread=config["spread"])
        if model == "relu":
            for layer in network:
                layer.gates.weight.requires_grad_(False)  # stays 1
        return network
    network = core.dense_gate_network(sizes, seeds, MODELS[model], start="uniform")  # as the journal started then
    rngs = [core.stream(seed, "order") for seed in seeds]
    for layer, (inputs, units) in zip(network, itertools.pairwise(sizes), strict=True):
        fixed = layer.operands
        copies = range(len(fixed.weight[0]) // units)
        identities = [[rng.permutation(np.eye(units, inputs)) for _ in copies] for rng in rngs]
        fixed.weight.data = torch.from_numpy(np.concatenate(identities, 1).reshape(fixed.weight.shape)).to(fixed.weight)
        fixed.bias.data.zero_()
        fixed.requires_grad_(False)
    return network


def trial(config: dict, seeds: list[int]) -> list[dict]:
    network, inputs = build(config, seeds), torch.from_numpy(core.NEIGHBOURHOODS.T.copy()).to(core.Runtime.device)
    with torch.no_grad():
        first = network(inputs.expand(len(seeds), 9, 512)).cpu().numpy()
    negative = (network[-1].operands.bias[:, 0, 0] < 0).tolist()
    run, chance, on = core.train_on_life(network, seeds, config), core.neighbourhood_chances(config["alive"]), core.LIFE == 1
    results = []
    for s, (loss, output) in enumerate(zip(run["loss"], run["output"], strict=True)):
        least, born_dead = np.fmin.accumulate(loss), float((first[s] == 0).all())
        dead = float((output == 0).all())
        result = {"final": loss[-1], "born_dead": born_dead, "dead": dead, "died": dead * (1 - born_dead)}
        result |= {"dead_by_bias": float(born_dead == negative[s]), "diverged": run["diverged"][s]}
        result |= {f"best_{n}": least[min(n, config["steps"])] for n in (600, 1500, 2500)}
        near_one = float(chance @ (on & (abs(output - 1) < 0.01)) / (chance @ on))
        result |= {"on_top": near_one, "lowest": output.min(), "lowest_on_top": output[on].min(), "highest": output.max()}
        results.append(result | {"right": float(((output > 0.5) == on).mean()), "curve": np.clip(loss[::EVERY], 1e-9, 1.0)})
    return results


def cell(config: dict) -> dict:
    """Fixed weights have no spread."""
    return {k: v for k, v in config.items() if k != "spread"} if config["model"].startswith("wired") else config


def of_living(metric: str, claimed: tuple[float, float], scale: str = "difference", **arm) -> Check:
    return Check(metric, claimed, arm, scale=scale, unless="born_dead")


ALWAYS_0, MEAN, CONVERGED = (0.28, 0.30), (0.20, 0.21), (ANY_BELOW, 1e-6)
CLAIMS = [
    Claim("[9, 512, 512, 1] below 1e-6 in 1500 steps", "simple version", [of_living("best_1500", CONVERGED, "ratio")]),
    Claim("fixed sparse weights, 16 gates: 0.29", "fixed sparse weights", [Check("final", ALWAYS_0, {"model": "wired"})]),
    Claim("that is what ReLU units there give; the gates: the mean (our question)", "fixed sparse weights",
          [Check("final", ALWAYS_0, {"model": "wired-relu"}), Check("final", MEAN, {"model": "wired"})]),
    Claim("predictions cut at 0, 0.99 to 1.01 on top", "predictions",
          [of_living("lowest", (-1e-9, 1e-9)), of_living("on_top", (0.9, ANY_ABOVE))]),
    Claim("gates that all are ReLU: below 1e-6 in 600", "relu but gate",
          [of_living("best_600", CONVERGED, "ratio", model="relu-gates")]),
    Claim("they are ahead of plain ReLU after 600 (our question)", "relu but gate",
          [Check("best_600", (ANY_BELOW, 0.5), {"model": "relu-gates"}, {}, "ratio", "born_dead")]),
    Claim("[9, 48, 48, 1] converges, below 1e-6, in 2500", "48 x 48",
          [of_living("best_2500", CONVERGED, "ratio", hidden=(48, 48), batch=512, steps=2500)]),
    Claim("half are born dead, just where the last bias is negative (our question)", "simple version",
          [Check("born_dead", (0.2, 0.8), scale="rate"), Check("dead_by_bias", (0.7, ANY_ABOVE), scale="rate")]),
    Claim("trained ReLU gates die in training, plain ReLU does not (our question)", "relu but gate",
          [Check("died", (0, ANY_ABOVE), {"model": "relu-gates"}, {}, "rate")]),
]  # fmt: skip


def headline(run: core.Run) -> str:
    dead, networks = sum(sum(run.values(i, "dead")) for i in range(len(run.cells))), len(run.cells) * len(run.seeds)
    return f"{dead:.0f} of {networks} networks end dead; final loss: {core.extremes(run, 'final')}"


def figures(run: core.Run) -> list[core.Figure]:
    def lines(cell: dict, result: dict) -> dict:
        state = "born dead" if result["born_dead"] else "died in training" if result["dead"] else "alive"
        return {state: result["curve"]}

    levels = core.best_losses(run.cells[0]["alive"])
    panels = core.varying(run.cells)
    return [core.curves_figure(run, "loss", headline(run), lines, panels, "step", "loss, exact", True, every=EVERY, levels=levels)]


SMOKE = {"steps": (20,), "hidden": ((8, 8),), "batch": (16,)}
METRICS = ["best_1500", "final", "best_600", "born_dead", "dead", "right", "on_top", "lowest_on_top", "highest"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell, stack=8, seeds=16)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
