"""Is sigmoid gating stable when its layers are stacked, and what calms it?

Entry       graph notebook, "cannot overfit using attention" (opening), 6/3, 9.3 and "Unstable gradients" (13/3)
Hypothesis  Averaging (softmax) over reachable nodes sticks near 0.6 and is smooth. Gating (sigmoid) passes it but its score and
            class recalls jump from step to step: one layer hardly, two more, four most. A tenth of the learning rate calms it.
            Ours: what jumps is the threshold between the classes, not the order of the nodes (their AUC): all logits drift
            together, by more than a tenth of their spread a step. Then centring the readout's input ends the jumps.
Rule        5 paired seeds, each with its own pattern; 32 stored graphs, one batch, 200 epochs = 200 steps. Score: mean of both
            class recalls on the same graphs. Jump: mean absolute change of the score a step, second half of training; "smooth"
            is below 0.01, "jumps" above 0.02. A claim stands if the 95% interval of every check lies in the range that the claim
            gives it, and falls if one lies wholly outside (CLAIMS, below; fixed before the first full run).
Cost        about 10 min on 2 cores with the defaults; `--layers 4 --lr 1e-5` alone about 3 min
"""

import math

import numpy as np

import core
from core import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, at_least, one_of

FLAGS = [
    Flag("model", one_of("position", "gin"), ("position", "gin"), "position mixing, or the GIN reference"),
    Flag("activation", one_of("sigmoid", "softmax"), ("sigmoid", "softmax"), "gating, or averaging"),
    Flag("layers", at_least(1), (4, 2, 1), "layers"),
    Flag("lr", at_least(0.0, float, above=True), (1e-4, 1e-5), "Adam's learning rate"),
    Flag("stack", core.powers_list, ((0, 1),), "adjacency powers that a pair's weight sees"),
    Flag("distance", one_of("on", "off"), ("on",), "hop one-hots instead of the powers themselves"),
    Flag("norm", one_of("layer", "batch", "none"), ("layer",), "norm before mixing and before feed-forward"),
    Flag("norm-mask", one_of("on", "off"), ("on",), "norms see real nodes only, or padding too"),
    Flag("feedforward-norm", one_of("none", "batch"), ("none",), "norm inside the feed-forward, before its ReLU"),
    Flag("degree", one_of("off", "on"), ("off",), "give each node its degree as an input"),
    Flag("readout", one_of("plain", "centred"), ("plain",), "centred: the mean over all nodes is taken off before the readout"),
    Flag("dim", at_least(1), (100,), "width"),
    Flag("heads", at_least(1), (1,), "heads"),
    Flag("hidden", at_least(1), (600,), "width inside the feed-forward"),
    Flag("graphs", at_least(1), (32,), "training graphs"),
    Flag("batch", at_least(1), (32,), "graphs a step"),
    Flag("order", one_of("stored", "shuffled"), ("stored",), "stored: all graphs share one pattern; shuffled: they mix 100"),
    Flag("epochs", at_least(2), (200,), "passes over the graphs"),
    Flag("clip", at_least(0.0, float), (5.0,), "largest gradient norm; 0: no clipping"),
]
ONLY_POSITION = ("activation", "stack", "distance", "norm", "feedforward_norm", "heads", "hidden")


def cell(config: dict) -> dict:
    """Without what the model does not read."""
    if config["graphs"] > len(core.PatternData(0)):
        raise core.UsageError(f"--graphs {config['graphs']}: the training split has {len(core.PatternData(0))}")
    if config["model"] == "gin":
        return {key: value for key, value in config.items() if key not in ONLY_POSITION}
    if config["dim"] % config["heads"]:
        raise core.UsageError(f"--heads {config['heads']}: does not divide --dim {config['dim']}; choose a divisor")
    has_norm = config["norm"] != "none" or config["feedforward_norm"] != "none"
    return config if has_norm else {key: value for key, value in config.items() if key != "norm_mask"}


def trial(config: dict, seed: int) -> dict:
    graphs = core.PatternData(seed).first(config["graphs"], config["order"])
    batches = core.batches_of(graphs, config["batch"], padding=config.get("norm_mask") == "off")
    model = core.build_model(config, seed)
    if config["readout"] == "centred":
        model.readout.register_forward_pre_hook(lambda module, inputs: (inputs[0] - inputs[0].mean(0),))
    curves = core.train(model, batches, seed=seed, lr=config["lr"], epochs=config["epochs"], clip=config["clip"])
    recall = curves["recall"].double().numpy()  # [epochs + 1, 2]
    score, swing = recall.mean(1), recall[:, 1] - recall[:, 0]
    half, quarter = len(score) // 2, max(1, len(score) // 4)
    margin = curves["margin"].double().numpy()  # [epochs + 1, (mean, spread)]
    reached = np.flatnonzero(score >= 0.7)
    norm = curves["gradient_norm"].double().numpy()
    onset = core.growth_onset(norm)
    return curves | core.ratio_summary(curves) | {
        "best": score[np.isfinite(score)].max(initial=0.0),
        "final": score[-1],
        "jump": np.abs(np.diff(score[half:])).mean(),
        "class_jump": np.abs(np.diff(swing[half:])).mean(),
        "auc_jump": np.abs(np.diff(curves["auc"].double().numpy()[half:])).mean(),
        "drift": np.median(np.abs(np.diff(margin[half:, 0])) / margin[half:-1, 1]),
        "rise": score[-quarter:].mean() - score[:quarter].mean(),
        "epochs_to_0.7": reached[0] if len(reached) else len(score),
        "spikes": core.count_spikes(norm),
        "onset": len(norm) if math.isnan(onset) else onset,  # never: the end of the run
        "growth": core.running_median(norm, 10).max() / core.running_median(norm[:10], 10)[0],
    }  # fmt: skip


ONE, TWO, SLOW = {"layers": 1}, {"layers": 2}, {"lr": 1e-5}  # arms, as they differ from 4 gating layers at 1e-4
AVERAGING, GIN = {"activation": "softmax"}, {"model": "gin"}
SMOOTH, JUMPS = (ANY_BELOW, 0.01), (0.01, ANY_ABOVE)  # one point of balanced accuracy a step
CLASS_SMOOTH, CLASS_JUMPS = (ANY_BELOW, 0.02), (0.02, ANY_ABOVE)  # both recalls moving one point, in opposite directions
MORE, LESS = (1.0, ANY_ABOVE), (ANY_BELOW, 1.0)  # ratios
CLAIMS = [
    Claim("averaging sticks near 0.6 and trains smoothly", "opening",
          [Check("best", (0.55, 0.65), AVERAGING), Check("jump", SMOOTH, AVERAGING)]),
    Claim("gating passes averaging", "opening", [Check("best", (0.0, ANY_ABOVE), versus=AVERAGING)]),
    Claim("gating's score and classes jump", "opening, 13/3", [Check("jump", JUMPS), Check("class_jump", CLASS_JUMPS)]),
    Claim("gating's jumps move the threshold, not the ranking (our question)", "opening",
          [Check("jump", JUMPS), Check("auc_jump", SMOOTH), Check("drift", (0.1, ANY_ABOVE))]),
    Claim("without what all nodes share, taken off before the readout, gating no longer jumps (our question)", "opening",
          [Check("jump", SMOOTH, {"readout": "centred"}), Check("jump", (ANY_BELOW, 0.5), {"readout": "centred"}, {}, "ratio")]),
    Claim("averaging's score and classes do not jump", "opening",
          [Check("jump", SMOOTH, AVERAGING), Check("class_jump", CLASS_SMOOTH, AVERAGING)]),
    Claim("one gating layer is stable and reaches about 0.7", "9.3, 13/3",
          [Check("jump", SMOOTH, ONE), Check("best", (0.65, 0.75), ONE)]),
    Claim("with two layers problems begin: they jump more than one", "9.3, 13/3",
          [Check("jump", MORE, TWO, versus=ONE, scale="ratio")]),
    Claim("four layers jump more than two", "13/3", [Check("jump", MORE, versus=TWO, scale="ratio")]),
    Claim("lr 1e-5 instead of 1e-4 calms four layers and makes them slow", "opening, 13/3",
          [Check("jump", LESS, SLOW, versus={}, scale="ratio"), Check("epochs_to_0.7", MORE, SLOW, versus={}, scale="ratio")]),
    Claim("at lr 1e-5 four layers jump a little and go up very slowly", "13/3",
          [Check("jump", SMOOTH, SLOW), Check("rise", (0.0, ANY_ABOVE), SLOW), Check("epochs_to_0.7", (100, ANY_ABOVE), SLOW)]),
    Claim("without distance, four layers at 1e-4 jump", "13/3", [Check("jump", JUMPS, {"distance": "off"})]),
    Claim("without distance, four layers at 1e-5 jump a little and go up very slowly", "13/3",
          [Check("jump", SMOOTH, SLOW | {"distance": "off"}), Check("rise", (0.0, ANY_ABOVE), SLOW | {"distance": "off"}),
           Check("epochs_to_0.7", (100, ANY_ABOVE), SLOW | {"distance": "off"})]),
    Claim("masking inside the layer norms does not matter", "13/3",
          [Check(m, (-0.01, 0.01), {"norm_mask": "off"}, versus={}) for m in ("best", "jump")]),
    Claim("without layer norm four layers stay near 0.5 and jump", "13/3",
          [Check("best", (0.45, 0.55), {"norm": "none"}), Check("jump", JUMPS, {"norm": "none"})]),
    Claim("one layer's gradients start small and grow rapidly at about epoch 70", "6/3",
          [Check("growth", (3.0, ANY_ABOVE), ONE, scale="ratio"), Check("onset", (50, 90), ONE)]),
    Claim("layer norms have the largest and least steady grad/weight, parameter by parameter", "opening, 13/3",
          [Check(f"norm_{what}_by_parameter", MORE, scale="ratio") for what in ("level", "wobble")]),
    Claim("the same with each module's weight and bias taken together (our question)", "opening, 13/3",
          [Check(f"norm_{what}_by_module", MORE, scale="ratio") for what in ("level", "wobble")]),
    Claim("a healthy run (GIN) keeps grad/weight within 0.1 to 0.001, and falling", "8.3",
          [Check("in_band", (0.9, ANY_ABOVE), GIN), Check("ratio_trend", LESS, GIN, scale="ratio")]),
]  # fmt: skip


def arm(config: dict) -> str:
    """What tells the models apart: gin, sigmoid or softmax."""
    return config.get("activation", config["model"])


def notebook_score(config: dict) -> dict:
    """The scores that the notebook names, where it names them."""
    named = {("softmax", 4): 0.6, ("sigmoid", 1): 0.7, ("gin", 4): 0.9}
    value = named.get((arm(config), config["layers"]))
    return {arm(config): value} if value and config["lr"] == 1e-4 else {}


def headline(run: core.Run) -> str:
    return f"jump of the score a step: {core.extremes(run, 'jump')}"


def figures(run: core.Run) -> list[core.Figure]:
    gating = core.only(run, [i for i, cell in enumerate(run.cells) if arm(cell) == "sigmoid"] or [0])
    swing = f"Step of the gap between recalls: {core.extremes(gating, 'class_jump')}. Of AUC: {core.extremes(gating, 'auc_jump')}"
    panels = [key for key in core.varying(run.cells) if key not in ("model", "activation")]
    return [
        core.curves_figure(run, "score", f"Jump of the score a step: {core.extremes(run, 'jump')}",
                           lambda cell, result: {arm(cell): result["recall"].mean(1)}, panels,
                           "epoch", "balanced accuracy", notebook=notebook_score),
        core.curves_figure(gating, "recalls", swing,
                           lambda cell, r: {"class 0": r["recall"][:, 0], "class 1": r["recall"][:, 1], "AUC": r["auc"]},
                           core.varying(gating.cells), "epoch", "class recall, AUC"),
        core.curves_figure(run, "gradient", f"Growth of the gradient norm over its start: {core.extremes(run, 'growth')}",
                           lambda cell, result: {arm(cell): result["gradient_norm"]}, panels,
                           "step", "gradient norm before clipping", log=True),
        core.ratio_figure(run, arm),
    ]  # fmt: skip


SMOKE = {"layers": (2,), "lr": (1e-2,), "dim": (8,), "hidden": (8,), "graphs": (2,), "epochs": (3,)}
METRICS = ["best", "final", "jump", "class_jump", "auc_jump", "drift", "epochs_to_0.7", "spikes"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell)


def main(argv: list[str] | None = None) -> int:
    return core.main(EXPERIMENT, argv)


if __name__ == "__main__":
    raise SystemExit(main())
