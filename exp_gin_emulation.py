"""Is position gating with its weights set by hand GIN, and what should pairs out of reach get?

Entry       graph notebook, steps 0 to 2 (before 6/3), 6/3 (todo and done: unreachable bias, initial values, simpler layers)
Hypothesis  With stack [0, 1], hops, equal positive weights, a large negative bias and -inf for unreachable pairs, gating is GIN's
            aggregation, so it overfits as GIN does, frozen or learned. Default initial values work just as well as those set by
            hand. Not sending unreachable pairs to a negative number is worse. -1000 may trouble the gradient.
            "mock as relu: about the same thing happens"; "emb_dim =1 does not learn".
            Ours: a logit of -1000 is -inf but for rounding, so it troubles nothing; -1 is not negative enough, -10 is. Of width 1
            a layer norm leaves nothing, while a batch norm leaves it all, and what a layer learns is a number a node, its degree:
            so that does learn, and so does a layer whose feed-forward is the identity.
Rule        5 paired seeds, the overfit set-up with a single layer, as on that day: 32 stored graphs, 200 steps. "Is GIN's
            aggregation": largest difference below 1e-6 of the largest sum. "As well", "as GIN": best scores within 0.02. "Worse":
            lower. "Learns": passes 0.6. A claim stands if the 95% interval of every check lies in its range, and falls if one lies
            outside.
Cost        about 6 min on 2 cores; with `--unreachable shut` about 2 min. Simpler layers, an entry of its own, 3 min:
            `--model position --unreachable shut --start default --dim 100 1 --norm layer batch --gate sigmoid relu
            --feedforward mlp identity`
Quick       `--unreachable shut 1 --epochs 60 --seeds 3`
"""

import torch
from torch import nn

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, one_of

HAND = 20.0  # sigmoid(20) is 1 in float32
FLAGS = [
    *core.overfit_flags(model=("position", "gin"), layers=(1,), unreachable=("shut", 1.0, -1.0, -10.0, -1000.0)),
    Flag("start", one_of("default", "hand", "frozen"), ("default", "hand", "frozen"),
         "a pair's logits: torch's default initial values; set by hand to GIN's; so set and never learned"),
    Flag("gate", one_of("sigmoid", "relu"), ("sigmoid",), "what makes weights of logits, where activation is sigmoid"),
    Flag("feedforward", one_of("mlp", "identity"), ("mlp",), "the feed-forward, or nothing in its place"),
]  # fmt: skip


def cell(config: dict) -> dict:
    config = core.overfit_cell(config)
    if config["model"] != "position":
        return {key: value for key, value in config.items() if key not in ("start", "gate", "feedforward")}
    if config["gate"] == "relu" and (config["activation"] == "softmax" or config["distance"] == "off"):
        raise core.UsageError("--gate relu: of gates by hops alone; give --activation sigmoid and --distance on")
    unread = ("hidden", "feedforward_norm") if config["feedforward"] == "identity" else ()
    return {key: value for key, value in config.items() if key not in unread}


def set_by_hand(mixing: core.PositionMixing, frozen: bool) -> None:
    """Equal positive weights and a large negative bias: the logit of every pair that some power connects is +HAND."""
    with torch.no_grad():
        mixing.pair.weight.fill_(2 * HAND)
        mixing.pair.bias.fill_(-HAND)
    if frozen:
        mixing.pair.requires_grad_(False)
        if mixing.unreachable is not None:
            mixing.unreachable.requires_grad_(False)


@torch.no_grad()
def distance_from_gin(mixing: core.PositionMixing, batch: core.GraphBatch, dim: int) -> float:
    """Largest difference between what the layer sums and GIN's x + sum over neighbours, over the largest such sum."""
    x = torch.randn(len(batch.label), dim, generator=torch.Generator().manual_seed(0)).to(batch.adjacency.device)
    stack = core.adjacency_stack(batch, mixing.powers)
    ours = mixing.mix_hops(x, stack) if mixing.distance else mixing.mix_pairs(x, stack, stack.values)
    gin = x + batch.mix(batch.adjacency, x)
    return float((ours - gin).abs().max() / gin.abs().max())


def build(config: dict, seed: int) -> core.NodeClassifier:
    model = core.build_model({"hidden": 1, "feedforward_norm": "none"} | config, seed)
    for layer in model.layers if config["model"] == "position" else ():
        if config["gate"] == "relu":
            layer.mixing.gate = torch.relu
        if config["feedforward"] == "identity":
            layer.feedforward = nn.Identity()
        if config["start"] != "default":
            set_by_hand(layer.mixing, config["start"] == "frozen")
    return model


def trial(config: dict, seed: int) -> dict:
    model = build(config, seed)
    batch = core.GraphBatch(core.PatternData(seed).first(config["graphs"], config["order"]), core.Runtime.device)
    mixings = [layer.mixing for layer in model.layers if config["model"] == "position"]
    before = max((distance_from_gin(mixing, batch, config["dim"]) for mixing in mixings), default=0.0)
    result = core.overfit(config, seed, model)
    return result | {
        "from_gin_at_first": before,
        "from_gin_at_last": max((distance_from_gin(mixing, batch, config["dim"]) for mixing in mixings), default=0.0),
        "last_loss": float(result["loss"][-1]),
        "unreachable_gate": max(
            (float(m.unreachable.detach().sigmoid().max()) for m in mixings if m.unreachable is not None), default=0.0
        ),
    }


HAND_SET, FROZEN, GIN = {"start": "hand"}, {"start": "frozen"}, {"model": "gin"}
RELU, IDENTITY = {"gate": "relu"}, {"feedforward": "identity"}
SAME, WORSE = (-0.02, 0.02), (ANY_BELOW, 0.0)
CLAIMS = [
    Claim("set by hand, with -inf out of reach, gating is GIN's aggregation", "steps 1, 2",
          [Check("from_gin_at_first", (ANY_BELOW, 1e-6), start) for start in (HAND_SET, FROZEN)]),
    Claim("a single gating layer passes 0.6", "6/3", [Check("best", (0.6, ANY_ABOVE))]),
    Claim("gating as expressive as GIN overfits as GIN does: frozen, and learned", "before 6/3",
          [Check("best", SAME, FROZEN, versus=GIN), Check("best", SAME, HAND_SET, versus=GIN)]),
    Claim("default initial values work just as well as those set by hand", "6/3", [Check("best", SAME, {}, versus=HAND_SET)]),
    Claim("frozen works just as well as learned (our question)", "step 2", [Check("best", SAME, FROZEN, versus=HAND_SET)]),
    *(Claim(f"an unreachable logit that starts at {value:g} instead of -inf is worse{ours}", "6/3",
            [Check("best", WORSE, {"unreachable": value}, versus={})])
      for value, ours in ((1.0, ""), (-1.0, " (our question)"))),
    Claim("so it is with the gates set by hand (our question)", "6/3",
          [Check("best", WORSE, HAND_SET | {"unreachable": 1.0}, versus=HAND_SET)]),
    Claim("gates through a ReLU do about the same", "6/3", [Check("best", SAME, RELU, versus={})]),
    Claim("width 1 does not learn", "6/3", [Check("best", (ANY_BELOW, 0.6), {"dim": 1})]),
    Claim("it learns with batch norms (our question)", "6/3", [Check("best", (0.6, ANY_ABOVE), {"dim": 1, "norm": "batch"})]),
    Claim("a layer whose feed-forward is the identity learns (our question)", "6/3", [Check("best", (0.6, ANY_ABOVE), IDENTITY)]),
    Claim("-10 is as good as -inf (our question)", "6/3", [Check("best", SAME, {"unreachable": -10.0}, versus={})]),
    Claim("-1000 troubles the gradient: worse than -inf", "6/3", [Check("best", WORSE, {"unreachable": -1000.0}, versus={})]),
    Claim("-1000 is -inf but for rounding (our question)", "6/3",
          [Check(metric, (-1e-3, 1e-3), {"unreachable": -1000.0}, versus={}) for metric in ("last_loss", "best")]),
]  # fmt: skip


def headline(run: core.Run) -> str:
    return f"best score: {core.extremes(run, 'best')}"


def figures(run: core.Run) -> list[core.Figure]:
    return [
        core.dots_figure(core.by_arm(run, ["best"]), "best", f"Best score: {core.extremes(run, 'best')}", "best balanced accuracy",
                         lines={"notebook: worth debugging above": 0.6}),
        core.score_figure(run),
    ]  # fmt: skip


SMOKE = {"lr": (1e-2,), "dim": (8,), "hidden": (8,), "graphs": (2,), "epochs": (4,), "unreachable": ("shut", 1.0)}
METRICS = ["best", "final", "jump", "drift", "from_gin_at_first", "from_gin_at_last", "unreachable_gate"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
