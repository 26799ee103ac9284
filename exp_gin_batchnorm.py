"""Which of GIN's batch norms does it need, and why?

Entry       graph notebook, opening and 8.3 ("Effects of batch norm", "Debugging networks by observing gradients")
Hypothesis  Only the batch norm inside the MLP matters: without it GIN stays at 0.5, with or without the one between layers; with it
            alone GIN works and rises steadily. The variance that enters the MLP's ReLU is very high. grad/weight: in a working run
            it falls and stays within 0.1 to 0.001; in one that does not work the MLP's biases stay very low and go up and down.
            Ours: a bias in front of a batch norm has no gradient, whether the run works or not, so low biases do not tell what is
            wrong. What is wrong without norms is scale: each layer sums over 58 neighbours. Divided by 58, no norm is needed.
Rule        Eight arms (norm in the MLP x norm between layers x divisor), 5 paired seeds, the overfit set-up: 32 stored graphs, 4
            layers, 200 steps. "Works" is a best score above 0.8, "stays at 0.5" one from 0.45 to 0.55, "high" a variance above 10,
            "low" a ratio below 0.001. A claim stands if the 95% interval of every check lies in its range, and falls if one lies
            outside.
Cost        about 5 min on 2 cores; `--divide 1` alone half of that
Quick       `--divide 1 --epochs 60 --seeds 3`
"""

import numpy as np
import torch

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, one_of

FLAGS = [
    Flag("mlp-norm", one_of("batch", "layer", "none"), ("batch", "none"), "norm inside each MLP, before its ReLU"),
    Flag("between-norm", one_of("batch", "layer", "none"), ("batch", "none"), "norm behind each MLP, between the layers"),
    *core.overfit_flags(without=("model", *core.TRANSFORMER_ONLY), divide=(1.0, 58.0)),  # a node has 58 neighbours on average
]


def cell(config: dict) -> dict:
    config = core.overfit_cell(config | {"model": "gin"})
    has_norm = config["mlp_norm"] != "none" or config["between_norm"] != "none"
    return config if has_norm else {key: value for key, value in config.items() if key != "norm_mask"}


def watch_relus(model: torch.nn.Module) -> dict[str, list[list[torch.Tensor]]]:
    """From now on each training pass appends, layer by layer, the mean over channels of the variance over nodes, and of the squared
    mean, of what the MLP's first Linear puts out ("linear") and of what its ReLU takes in ("relu")."""
    seen = {"linear": [[] for _ in model.layers], "relu": [[] for _ in model.layers]}

    def meter(rows: list) -> callable:
        def look(module, inputs):
            if module.training:
                x = inputs[0].detach()
                rows.append(torch.stack([x.var(0).mean(), x.mean(0).square().mean()]))

        return look

    for i, layer in enumerate(model.layers):
        layer.mlp.norm.register_forward_pre_hook(meter(seen["linear"][i]))
        layer.mlp.relu.register_forward_pre_hook(meter(seen["relu"][i]))
    return seen


def trial(config: dict, seed: int) -> dict:
    model = core.build_model(config, seed)
    seen = watch_relus(model)
    result = core.overfit(config, seed, model)
    moments = {where: torch.stack([torch.stack(rows) for rows in layers], 1) for where, layers in seen.items()}  # [T, layers, 2]
    linear, relu = (moments[where].double().numpy() for where in ("linear", "relu"))
    names, ratio = core.ratio_to_weight(result, by="parameter")
    bias = {part: ratio[1:, [name.endswith(f"mlp.{part}.bias") for name in names]] for part in ("first", "last")}  # [T - 1, layers]
    decades = np.log10(np.maximum(np.concatenate(list(bias.values()), 1), 1e-12))
    return result | {
        "linear_variance": np.median(linear[..., 0].max(1)),  # of the layer where it is highest
        "relu_variance": np.median(relu[..., 0].max(1)),
        "relu_shared": np.median((relu[..., 1] / relu.sum(-1)).max(1)),
        "mlp_bias_ratio": 10 ** np.median(decades),
        "mlp_bias_wobble": np.abs(np.diff(decades, axis=0)).mean(),
        "first_bias_ratio": np.median(bias["first"]),
        "last_bias_ratio": np.median(bias["last"]),
        "variance_entering_relu": relu[..., 0],  # [T, layers]
    }  # fmt: skip


BOTH, MLP, BETWEEN = {}, {"between_norm": "none"}, {"mlp_norm": "none"}
NEITHER = MLP | BETWEEN
SCALED = {"divide": 58.0}
WORKS, STUCK = (0.8, ANY_ABOVE), (0.45, 0.55)
CLAIMS = [
    Claim("without the norm between layers GIN still works, and its score rises steadily", "opening 1, 4; 8.3",
          [Check("best", WORKS, MLP), Check("jump", (ANY_BELOW, 0.01), MLP), Check("rise", (0.0, ANY_ABOVE), MLP)]),
    Claim("the norm between layers hardly matters", "8.3", [Check("best", (-0.02, 0.02), MLP, versus=BOTH)]),
    Claim("without either norm GIN stays at 0.5", "opening 2; 8.3", [Check("best", STUCK, NEITHER)]),
    Claim("with the norm between layers alone GIN stays at 0.5", "opening 3; 8.3", [Check("best", STUCK, BETWEEN)]),
    Claim("the MLP's norm is paramount: more than 0.1 of score", "8.3",
          [Check("best", (0.1, ANY_ABOVE), BOTH, versus=BETWEEN), Check("best", (0.1, ANY_ABOVE), MLP, versus=NEITHER)]),
    Claim("the variance in front of the MLP's ReLU is very high", "8.3", [Check("linear_variance", (10.0, ANY_ABOVE), MLP)]),
    Claim("a working run keeps grad/weight within 0.1 to 0.001, and falling", "8.3",
          [Check("in_band", (0.9, ANY_ABOVE), MLP), Check("ratio_trend", (ANY_BELOW, 1.0), MLP, scale="ratio")]),
    Claim("where it does not work, grad/weight of the MLP's biases is very low and goes up and down", "8.3",
          [Check("mlp_bias_ratio", (ANY_BELOW, 1e-3), BETWEEN),
           Check("mlp_bias_wobble", (1.0, ANY_ABOVE), BETWEEN, versus=MLP, scale="ratio")]),
    Claim("those biases are low wherever a batch norm stands behind them, in runs that work too (our question)", "8.3",
          [Check("last_bias_ratio", (ANY_BELOW, 1e-3), BOTH), Check("last_bias_ratio", (1e-3, ANY_ABOVE), MLP),
           Check("first_bias_ratio", (ANY_BELOW, 1e-3), MLP), Check("first_bias_ratio", (1e-3, ANY_ABOVE), BETWEEN)]),
    Claim("without norms GIN fails by scale alone: its sums divided by 58, it works without any norm (our question)", "8.3",
          [Check("best", WORKS, NEITHER | SCALED), Check("best", (0.1, ANY_ABOVE), NEITHER | SCALED, versus=NEITHER)]),
]  # fmt: skip


def arm(config: dict) -> str:
    mlp, between = config["mlp_norm"], config["between_norm"]
    return f"both {mlp}" if mlp == between else f"MLP {mlp}, between {between}"


def headline(run: core.Run) -> str:
    return f"best score: {core.extremes(run, 'best')}"


def figures(run: core.Run) -> list[core.Figure]:
    told = ("mlp_norm", "between_norm")
    others = [key for key in core.varying(run.cells) if key not in told]
    return [
        core.score_figure(run, arm, told, notebook=lambda cell: {"both none": 0.5} if arm(cell) == "both none" else {}),
        core.curves_figure(run, "variance", f"Largest variance entering a ReLU: {core.extremes(run, 'relu_variance')}",
                           lambda cell, result: {arm(cell): result["variance_entering_relu"].max(1)}, others,
                           "step", "variance over nodes, highest layer", log=True),
        core.ratio_figure(run, arm),
    ]  # fmt: skip


SMOKE = {"layers": (2,), "lr": (1e-2,), "dim": (8,), "graphs": (2,), "epochs": (4,)}
METRICS = ["best", "final", "jump", "linear_variance", "relu_variance", "relu_shared", "first_bias_ratio", "last_bias_ratio"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
