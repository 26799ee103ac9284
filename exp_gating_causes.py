"""Why does gating jump: the learning rate, the batch norm that is missing, or the masking?

Entry       graph notebook, opening ("learning rate and batch norm"), 13/3 ("learning rate", "batch norm in MLP"), 15.3 ("masking")
Hypothesis  The notebook names three causes: the learning rate, the batch norm missing in the feed-forward, the masking. Ours: the
            scale of the sum. Gates add up 58 neighbours, so nearly all that enters the readout is the same for all nodes, and Adam
            moves all logits together by more than their spread. Divided by a constant, which changes nothing that the layer can
            express, gating no longer jumps and keeps its score; divided by the degree it loses it.
Rule        Full factorial of six factors, 5 paired seeds: a factor has "the real effect" if it explains more of the variance of
            log10 jump over the 64 arms than any other, seed by seed. Second command, one change each to the notebook's own arm: a
            fix "ends the jumps" if jump < 0.01 and under a quarter of that arm's, and "keeps gating" with a best score above 0.75.
            "Before a jump": positive rank correlation, over epochs, with the next |change of the score|.
Cost        about 12 min on 2 cores, and 4 min for the second command; both with 16 graphs, feed-forward 200, 100 epochs:
            --lr 1e-4 --layers 4 --feedforward-norm none --norm-mask on --unreachable shut --clip 5 --model position gin --fix none
            divide-3 divide-8 divide-20 divide-59 divide-degree divide-root-degree layer-mixed batch-mixed batch-readout
            centred-readout batch-mlp warm-up no-clip tight-clip
Quick       `--unreachable shut --norm-mask on --feedforward-norm none --clip 5 --epochs 40 --seeds 3`
"""

import numpy as np
import torch

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, one_of

FIXES = {  # what each changes in the config; 59: a node and its neighbours, on average
    "none": {}, "divide-3": {"divide": 3}, "divide-8": {"divide": 8}, "divide-20": {"divide": 20}, "divide-59": {"divide": 59},
    "divide-degree": {"divide": "degree"}, "divide-root-degree": {"divide": "root-degree"}, "layer-mixed": {"mixed_norm": "layer"},
    "batch-mixed": {"mixed_norm": "batch"}, "batch-readout": {"readout": "batch"}, "centred-readout": {"readout": "centred"},
    "batch-mlp": {"feedforward_norm": "batch"}, "warm-up": {"warmup": 50}, "no-clip": {"clip": 0.0}, "tight-clip": {"clip": 0.1},
}  # fmt: skip
FACTORS = {"lr": (1e-4, 1e-5), "layers": (4, 1), "feedforward_norm": ("none", "batch"), "norm_mask": ("on", "off"),
           "unreachable": ("shut", 1.0), "clip": (5.0, 0.0)}  # fmt: skip
FLAGS = [*core.overfit_flags(**FACTORS, hidden=(200,), graphs=(16,), epochs=(100,)),
         Flag("fix", one_of(*FIXES), ("none",), "one change to the arm")]  # fmt: skip


def cell(config: dict) -> dict:
    config = core.overfit_cell(config)
    return {key: value for key, value in config.items() if key != "fix" or config["model"] == "position"}


def watch(model: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
    """From now on each training step appends what might grow before a jump. saturation: how far the gates are from half open;
    gate_sum: over the nodes that one reaches; shared: by all nodes, of the readout's input; size: of that input, in 1-norm."""
    seen = {name: [] for name in ("saturation", "gate_sum", "shared", "size", "curvature")}
    parameters, last = list(model.parameters()), {"gradients": 0}
    mixings = [layer.mixing for layer in model.layers if hasattr(layer, "mixing")]

    def before_readout(module, inputs):
        if module.training:
            x = inputs[0].detach()
            gates = [(mixing.pair.weight + mixing.pair.bias[:, None]).detach().sigmoid() for mixing in mixings]  # [H, K] each
            counts = [core.adjacency_stack(last["batch"], mixing.powers).hop_count.mean(0)[:-1] for mixing in mixings]
            seen["saturation"].append(sum((2 * gate - 1).abs().mean() for gate in gates) + x.new_zeros(()))
            seen["gate_sum"].append(sum((g * c).sum(1).mean() for g, c in zip(gates, counts, strict=True)) + x.new_zeros(()))
            seen["shared"].append(x.mean(0).square().sum() / x.square().sum(1).mean())
            seen["size"].append(x.abs().sum(1).mean())

    def after_gradient(_):
        last["gradients"] += 1
        if last["gradients"] % len(parameters) == 0:  # the backward pass is through
            here, gradient = (torch.cat([t.detach().flatten() for t in ts]) for ts in (parameters, [p.grad for p in parameters]))
            step = here - last.get("here", here)  # with one batch the change of the gradient is the Hessian times the step
            seen["curvature"].append(step @ (gradient - last.get("gradient", gradient)) / (step @ step))  # NaN at first
            last.update(here=here, gradient=gradient)

    model.register_forward_pre_hook(lambda module, inputs: last.update(batch=inputs[0]))
    model.readout.register_forward_pre_hook(before_readout)
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(after_gradient)
    return seen


def trial(config: dict, seed: int) -> dict:
    config = config | FIXES[config.get("fix", "none")]
    model = core.build_model(config, seed)
    seen = watch(model)
    result = core.overfit(config, seed, model)
    watched = {name: torch.stack(rows).double().numpy() for name, rows in seen.items()}
    change = np.abs(np.diff(result["recall"].double().numpy().mean(1)))
    before = {f"{name}_before": core.rank_correlation(rows[1:], change[1:]) for name, rows in watched.items()}
    return result | watched | before | {"shared_part": np.median(watched["shared"]), "log10_jump": np.log10(result["jump"] + 1e-6)}


def factorial_shares(run: core.Run, metric: str, factors: list[str]) -> dict[str, np.ndarray]:
    """The share of a metric's variance over arms that each factor ("lr") and each pair ("lr x clip") explains in a two-level full
    factorial, as main effect or interaction, a value a seed; NaN where nothing varies, {} for another grid."""
    levels = {factor: list(dict.fromkeys(cell.get(factor) for cell in run.cells)) for factor in factors}
    if len(run.cells) != 2 ** len(factors) or any(len(level) != 2 for level in levels.values()):
        return {}
    signs = {factor: np.array([1.0 - 2 * level.index(cell[factor]) for cell in run.cells]) for factor, level in levels.items()}
    signs |= {f"{a} x {b}": signs[a] * signs[b] for i, a in enumerate(factors) for b in factors[i + 1 :]}
    values = np.array([run.values(i, metric) for i in range(len(run.cells))])  # [arms, S]
    with np.errstate(invalid="ignore", divide="ignore"):
        return {name: (sign @ values / len(values)) ** 2 / values.var(0) for name, sign in signs.items()}


def derived(run: core.Run) -> dict[str, np.ndarray]:
    """Shares of the variance, if the run is the full factorial; of the jump also each factor's lead over the others."""
    found = {}
    for metric in ("log10_jump", "best"):
        share = factorial_shares(run, metric, list(FACTORS))
        found |= {f"share of {metric}: {name}": value for name, value in share.items() if name in FACTORS}
        found |= {f"share of {metric}: pairs": sum(v for name, v in share.items() if name not in FACTORS)} if share else {}
    jump = {factor: found[name] for factor in FACTORS if (name := f"share of log10_jump: {factor}") in found}
    return found | {f"lead of {f}": jump[f] - np.max([jump[g] for g in jump if g != f], axis=0) for f in jump}


def ends_jumps(fix: str, best: tuple = (0.75, ANY_ABOVE)) -> list[Check]:
    few, fewer = Check("jump", (ANY_BELOW, 0.01), {"fix": fix}), Check("jump", (ANY_BELOW, 0.25), {"fix": fix}, {}, "ratio")
    return [few, fewer, Check("best", best, {"fix": fix})]


CLAIMS = [
    *(Claim(f"{text} has the real effect on the jumps", source, [Check(f"lead of {factor}", (0.0, ANY_ABOVE), None)])
      for factor, text, source in (
          ("lr", "the learning rate", "opening, 13/3"), ("feedforward_norm", "the batch norm in the feed-forward", "13/3"),
          ("norm_mask", "the masking of norms", "15.3"), ("unreachable", "the masking of unreachable pairs", "15.3"),
          ("layers", "the depth (our question)", "13/3"), ("clip", "clipping (our question)", "13/3"))),
    *(Claim(f"{text} ends the jumps and keeps gating", source, ends_jumps(fix)) for fix, text, source in (
        ("batch-mlp", "batch norm in the feed-forward", "13/3"), ("divide-59", "(ours) dividing the sum by a constant", "15.3"),
        ("batch-mixed", "(ours) batch norm after mixing", "6/3"), ("layer-mixed", "(ours) layer norm after mixing", "6/3"),
        ("batch-readout", "(ours) batch norm before the readout", "opening"), ("warm-up", "(ours) warm-up", "13/3"),
        ("no-clip", "(ours) no clipping", "13/3"), ("tight-clip", "(ours) clipping to 0.1", "13/3"))),
    Claim("divided by the degree gating no longer jumps, and loses what it is for (our question)", "opening",
          ends_jumps("divide-degree", (ANY_BELOW, 0.75))),
    Claim("the larger the constant, the smaller the jumps (our question)", "15.3",
          [Check("jump", (ANY_BELOW, 1.0), {"fix": f"divide-{b}"}, {"fix": f"divide-{a}"}, "ratio") for a, b in ((3, 8), (8, 20))]),
    Claim("divided by a constant, gating is as good as GIN or better: no more than 0.02 below (our question)", "13/3",
          [Check("best", (-0.02, ANY_ABOVE), {"fix": "divide-59"}, versus={"model": "gin"})]),
    *(Claim(f"before a jump {text} (our question)", "6/3", [Check(f"{name}_before", (0.0, ANY_ABOVE))]) for name, text in (
        ("curvature", "the loss is more curved along the step"), ("saturation", "the gates are more saturated"),
        ("gate_sum", "the sum of the gates is larger"), ("size", "what enters the readout is larger"))),
]  # fmt: skip


def headline(run: core.Run) -> str:
    share = {name.removeprefix("share of log10_jump: "): v.mean() for name, v in derived(run).items() if "of log10_jump" in name}
    most = ", ".join(f"{name.replace('_', ' ')} {share[name]:.0%}" for name in sorted(share, key=share.get)[::-1][:4])
    return f"of the variance of the jumps: {most}" if share else f"jump of the score an epoch: {core.extremes(run, 'jump')}"


def figures(run: core.Run) -> list[core.Figure]:
    shares = {metric: factorial_shares(run, metric, list(FACTORS)) for metric in ("log10_jump", "best")}
    if shares["best"]:
        rows = {effect: {metric: share[effect] for metric, share in shares.items()} for effect in shares["best"]}
        return [core.dots_figure(rows, "shares", headline(run), "share of the variance over arms")]
    jump, best = core.by_arm(run, ["jump"]), core.by_arm(run, ["best"])
    return [core.dots_figure(jump, "jump", headline(run), "mean |change of the score| an epoch, 2nd half", "log", {"rule": 0.01}),
            core.dots_figure(best, "best", f"Best score: {core.extremes(run, 'best')}", "best balanced accuracy"),
            core.score_figure(run)]  # fmt: skip


SMOKE = {"layers": (2, 1), "lr": (1e-2, 1e-3), "dim": (8,), "hidden": (8,), "graphs": (2,), "epochs": (4,)}
METRICS = ["jump", "best", "drift", "shared_part", "curvature_before", "saturation_before", "gate_sum_before", "size_before"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell, derived)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
