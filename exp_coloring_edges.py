"""Can a small network tell same-colour from different-colour pairs of a pyramid from the pair's vector of adjacency powers?

Entry       graph notebook, 13/4 ("Complexity of 3 coloring using transformer+edge bias") and 24.3 ("batch normalize feature")
Hypothesis  13/4 takes an edge feed-forward for enough; 24.3 guesses that powers want a batch norm. Ours: raw powers, C / 6^d
            at distance d, do not fit; normed do and beat the look-up table; powers beyond 4 harm.
Rule        5 seeds. Score: mean of both recalls over ordered pairs i != j of the trained pyramids, the next (test), one 3 further
            (far); near: distance 1, 2. A claim stands if all intervals are in range, falls if one is out (CLAIMS, fixed before).
Cost        about 3 min on 2 cores; the other entries in the logbook, better trained, up to 30 min
Quick       `--receptive-field 4 --norm none input --steps 500 --seeds 3`
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, at_least, one_of

FLAGS = [
    Flag("receptive-field", at_least(0), (4, 2, 3, 6, 9), "r: a pair's vector is (P^0 .. P^r)[i, j], P = D^-1 A"),
    Flag("norm", one_of("none", "input", "batch"), ("none", "input", "batch"), "batch norm of the vectors, or before each ReLU"),
    Flag("logarithm", one_of("off", "on"), ("off",), "vectors as logarithms"),
    Flag("depth", at_least(1), (1, 3), "hidden layers"),
    Flag("width", at_least(1), (64,), "hidden width"),
    Flag("lr", at_least(0.0, float, above=True), (1e-2,), "Adam's learning rate"),
    Flag("decay", one_of("off", "on"), ("off",), "the learning rate falls linearly to 0"),
    Flag("steps", at_least(1), (2000,), "steps, each on all training pairs"),
    Flag("train-up-to", at_least(3), (6,), "train on the pyramids of base 3 to this; the test is on this + 1, and + 4"),
]


class Pairs:
    """All ordered pairs i != j of some pyramids: vector [V, r + 1]; same [V]: are they of one colour; code [V]: equal exactly where
    vectors are; hop [V]: their distance, r + 1 if out of reach."""

    def __init__(self, bases: range, r: int, logarithm: str = "off"):
        columns = []
        for p in map(core.pyramid, bases):
            adjacency = torch.zeros(1, n := len(p.row), n, dtype=torch.float64)
            adjacency[0, *p.edges.T] = adjacency[0, *p.edges.T[::-1]] = 1
            powers = core.transition_powers(adjacency, torch.ones(1, n, dtype=torch.bool), range(r + 1))[0].permute(1, 2, 0)
            code, same = core.pair_codes(n, p.edges, r, 2**57 - 13, 0x9E3779B97F4A7C15), np.equal.outer(p.colour, p.colour)
            columns.append([values[~np.eye(n, dtype=bool)] for values in (powers.numpy(), same, code)])
        powers, self.same, self.code = map(np.concatenate, zip(*columns, strict=True))
        self.hop = (powers.cumsum(1) == 0).sum(1)
        self.vector = torch.from_numpy(np.log(powers + 12.0**-r) if logarithm == "on" else powers).float().to(core.Runtime.device)


def best_rule(group: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The function of the group [V] with the best balanced accuracy: all groups; those where it says "same"; its score."""
    groups, index = np.unique(group, return_inverse=True)
    share = [np.bincount(index[same == kind], minlength=len(groups)) / np.sum(same == kind) for kind in (False, True)]
    return groups, groups[share[1] > share[0]], np.max(share, 0).sum() / 2


def balanced(right: np.ndarray, same: np.ndarray) -> float:
    """Mean over the classes that occur of the share of right answers; NaN without pairs."""
    return np.mean([right[same == kind].mean() for kind in np.unique(same)] or np.nan)


def build(config: dict, seed: int) -> nn.Sequential:
    """Vectors [V, r + 1] -> logits of "same" [V, 1]."""
    size, width, norm = config["receptive_field"] + 1, config["width"], config["norm"]
    with core.initialised_from(seed):
        parts = [core.make_norm("batch" if norm == "input" else "none", size)]
        for before in [size] + [width] * (config["depth"] - 1):
            parts += [core.Linear(before, width), core.make_norm("batch" if norm == "batch" else "none", width), nn.ReLU()]
        return nn.Sequential(*parts, core.Linear(width, 1)).to(core.Runtime.device)


@torch.no_grad()
def answers(model: nn.Module, pairs: Pairs, known: Tensor | None = None) -> np.ndarray:
    """1 for a right answer, 0 for a wrong one, NaN for none: [V]. Batch norms take their statistics from the vectors `known`, if
    given: running averages are of earlier weights, and raw vectors vary so little that such an error decides the answer."""
    if known is not None:
        model = copy.deepcopy(model).train().apply(lambda part: setattr(part, "momentum", 1.0))
        model(known)
    logit = model.eval()(pairs.vector)[:, 0].cpu().numpy()
    return np.where(np.isfinite(logit), (logit > 0) == pairs.same, np.nan)


def trial(config: dict, seed: int) -> dict:
    r, top, model, losses, curve = config["receptive_field"], config["train_up_to"], build(config, seed), [], []
    train, test, far = (Pairs(range(*s), r, config["logarithm"]) for s in ((3, top + 1), (top + 1, top + 2), (top + 4, top + 5)))
    target = torch.from_numpy(train.same).float().to(core.Runtime.device)
    weight = target / target.sum() / 2 + (1 - target) / (1 - target).sum() / 2  # both classes count equally
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], fused=True)
    for percent in range(101):
        for _ in range(percent * config["steps"] // 100 - len(losses)):
            optimizer.param_groups[0]["lr"] = config["lr"] * (1 - (config["decay"] == "on") * len(losses) / config["steps"])
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.binary_cross_entropy_with_logits(model(train.vector)[:, 0], target, weight, reduction="sum")
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curve.append(balanced(answers(model, test, train.vector), test.same))
    loss, (table, table_same, _) = torch.stack(losses).cpu().numpy(), best_rule(train.code, train.same)
    result = {"loss": loss, "curve": np.array(curve), "diverged": core.diverged_at(loss)}
    for name, pairs in (("train", train), ("test", test), ("far", far)):
        same, right, new = pairs.same, answers(model, pairs, train.vector), ~np.isin(pairs.code, table)
        found = {f"{key}score": balanced(right[on], same[on]) for key, on in (("", ...), ("new_", new), ("near_", pairs.hop < 3))}
        found |= {"ceiling": best_rule(pairs.code, same)[2], "distance_ceiling": best_rule(pairs.hop, same)[2], "new": new.mean()}
        found["look_up"] = balanced(np.isin(pairs.code, table_same) == same, same)  # what is new: different, the larger class
        found |= {f"over_{rule}": found["score"] - found[rule] for rule in ("look_up", "ceiling", "distance_ceiling")}
        result |= {f"{name}_{key}": value for key, value in found.items()}
    return result | {"running_drop": result["train_score"] - balanced(answers(model, train), train.same)}


INPUT, BATCH, DEEP, NEAR, WIDE = {"norm": "input"}, {"norm": "batch"}, {"depth": 3}, {"receptive_field": 2}, {"receptive_field": 9}
BEST, FALLING, LOGARITHMS, MORE, WITHIN = INPUT | DEEP, {"decay": "on"}, {"logarithm": "on"}, (0.0, ANY_ABOVE), (-0.05, 0.05)
LARGE = WIDE | DEEP | BATCH | FALLING | {"train_up_to": 9, "width": 256, "steps": 4000, "lr": 3e-3}
CLAIMS = [
    Claim(f"batch norm of the powers helps, hidden layers: {arm.get('depth', 1)}", "24.3",
          [Check(f"{part}_score", MORE, INPUT | arm, arm) for part in ("train", "test")]) for arm in ({}, DEEP)
] + [Claim(f"{text} (our question)", "13/4, 24.3", checks) for text, checks in [
    ("raw powers do not fit: 0.05 below ceiling", [Check("train_over_ceiling", (ANY_BELOW, -0.05), arm) for arm in ({}, DEEP)]),
    ("with norm, three layers fit within 0.05", [Check("train_over_ceiling", WITHIN, BEST | arm) for arm in ({}, WIDE)]),
    ("the next pyramid is within 0.05 of its ceiling", [Check("test_over_ceiling", WITHIN, BEST)]),
    ("and there it beats the look-up table", [Check("test_over_look_up", MORE, BEST | arm) for arm in ({}, WIDE)]),
    ("above chance on new vectors", [Check("test_new_score", (0.5, ANY_ABOVE), BEST | arm) for arm in ({}, WIDE)]),
    ("more powers help: 4 over 2", [Check("test_score", MORE, BEST, BEST | NEAR)]),
    ("more powers help: 9 over 4", [Check("test_score", MORE, BEST | WIDE, BEST)]),
    ("9 powers are worse than 4 on near pairs", [Check("test_near_score", (ANY_BELOW, 0.0), BEST | WIDE, BEST)]),
    ("three layers help", [Check(f"{part}_score", MORE, BEST, INPUT) for part in ("train", "test")]),
    ("with a falling rate it comes nearer to that ceiling", [Check("test_over_ceiling", MORE, BEST | FALLING, BEST)]),
    ("so it does on bases up to 9", [Check("test_over_ceiling", MORE, BEST | FALLING | {"train_up_to": 9}, BEST | FALLING)]),
    ("and is within 0.05", [Check("test_over_ceiling", WITHIN, BEST | FALLING | {"train_up_to": 9} | a) for a in ({}, WIDE)]),
    ("256 wide, normed in all layers, it comes nearer than 64 wide, and than with normed input",
     [Check("test_over_ceiling", MORE, LARGE, LARGE | arm) for arm in ({"width": 64}, INPUT)]),
    ("logarithms help", [Check("test_score", MORE, LARGE | LOGARITHMS | arm, LARGE | arm) for arm in ({}, INPUT)]),
    ("batch norms with running averages lose 0.05", [Check("running_drop", (0.05, ANY_ABOVE), BATCH | arm) for arm in ({}, DEEP)]),
]]  # fmt: skip


def headline(run: core.Run) -> str:
    return f"score on the next pyramid: {core.extremes(run, 'test_score')}"


def figures(run: core.Run) -> list[core.Figure]:
    deep = core.only(run, [i for i, cell in enumerate(run.cells) if cell["depth"] == max(cell["depth"] for cell in run.cells)])
    finding, lines = f"Deepest networks, {headline(deep)}", lambda cell, result: {f"norm {cell['norm']}": result["curve"]}
    key = next((key for key in core.varying(deep.cells) if key in ("receptive_field", "width", "train_up_to")), None)
    fields, others = ([k for k in core.varying(deep.cells) if k != other] for other in ("norm", key))
    score = (core.sweep_figure(deep, "score", finding, key, METRICS[:4], "balanced accuracy", others) if key
             else core.dots_figure(core.by_arm(deep, METRICS[:4]), "score", finding, "balanced accuracy"))  # fmt: skip
    return [score, core.curves_figure(deep, "curves", f"{finding}, by step", lines, fields, "steps done, %", "balanced accuracy")]


SMOKE = {"receptive_field": (2,), "norm": ("none",), "depth": (1,), "width": (4,), "steps": (3,), "train_up_to": (3,)}
METRICS = ["test_score", "test_ceiling", "test_look_up", "test_distance_ceiling", "test_new", "test_new_score", "train_score"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
