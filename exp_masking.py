"""Which masks keep padding and unreachable nodes out of attention, forward and backward, and what does a leak cost?

Entry       graph notebook, todo of 6/3 ("why are there zeros in new_adj??", fix_nans, "-1000"), 9.3, 10.3, 13/3 and 15.3
Hypothesis  -inf before a sigmoid needs nothing else; before a softmax, rows that keep nothing need fix_nans (0 for NaN). -1000 may
            trouble the gradient. Attention leaves padding as it is, reachable pairs are pairs of real nodes, layer norms need no
            mask. Ours: does fix_nans repair the backward pass; -1; multiplying afterwards; batch norm; mean pooling.
Rule        5 paired seeds, overfit set-up, padding travels as nodes. One untrained layer; a forward leak is the largest change of a
            real node's output under noise of size 1 on padding (unreachable: on a node out of reach; alone: by leaving the batch)
            over the largest output; backward, the largest gradient on padding over that on real nodes; NaN counts as 1. None: below
            1e-6, a leak: above 1e-3; scores are the same within 0.01. A claim stands if all its 95% intervals lie in its ranges.
Cost        about 4 min on 2 cores with the defaults; `--mask exact zero-nan --activation softmax` under 1 min
Quick       `--epochs 3 --seeds 3`
"""

import torch
from torch import Tensor

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, one_of

ADDED = {"inf": -torch.inf, "zero-nan": -torch.inf, "-1000": -1000.0, "-1": -1.0, "0": 0.0, "multiply": 0.0}  # to masked logits
AROUND = ("layer", "layer_blind", "batch", "batch_blind", "pool", "pool_blind")  # norms, or mean pooling; blind: padding counts
FIXED = {"model": "position", "feedforward_norm": "none", "unreachable": "shut", "divide": 1.0}
FLAGS = [
    Flag("mask", one_of("exact", *ADDED), ("exact", *ADDED), "core's, or what is added to masked logits; zero-nan: then 0 for NaN"),
    *core.overfit_flags(without=tuple(FIXED), activation=("sigmoid", "softmax"), layers=(2,), norm_mask=("off",), epochs=(50,)),
]


def attend(mixing: core.PositionMixing, method: str, x: Tensor, batch: core.GraphBatch) -> tuple[Tensor, Tensor, Tensor]:
    """x [V, D] -> logits and weights [B, H, N, N], mixed values [V, D]; pairs that no power connects are masked by `method`."""
    stack = core.adjacency_stack(batch, mixing.powers)
    keep, vectors = stack.reachable[:, None], stack.hop if mixing.distance else stack.values
    logits = torch.einsum("bknm,hk->bhnm", vectors, mixing.pair.weight) + mixing.pair.bias[:, None, None]
    if method == "exact":
        weight = (core.masked_softmax if mixing.average else core.masked_sigmoid)(logits, keep)
    else:
        masked = torch.where(keep, logits, logits + ADDED[method])
        weight = masked.softmax(-1) if mixing.average else masked.sigmoid()
        weight = weight * keep if method == "multiply" else weight.nan_to_num() if method == "zero-nan" else weight
    return logits, weight, core.mix_heads(weight, mixing.value(x), batch)


def build(config: dict, seed: int) -> core.NodeClassifier:
    model = core.build_model(config, seed)
    for layer in model.layers:
        layer.mixing.forward = lambda x, batch, mixing=layer.mixing: mixing.out(attend(mixing, config["mask"], x, batch)[2])
    return model


def through(layer: torch.nn.Module, x: Tensor, batch: core.GraphBatch, around: str) -> Tensor:
    """x [B * N, D] through a layer with something of AROUND: [V, D] of real nodes, or their mean a graph."""
    seen = (torch.ones_like(batch.nodes) if "blind" in around else batch.nodes).flatten().nonzero().squeeze(1)
    x = x + layer.mixing(x.index_copy(0, seen, layer.norm1(x[seen])), batch)
    x, graph = x + layer.feedforward(x.index_copy(0, seen, layer.norm2(x[seen]))), seen // batch.shape[1]
    total = x.new_zeros(batch.shape[0], x.shape[1]).index_add(0, graph, x[seen])
    return total / graph.bincount()[:, None] if "pool" in around else x[batch.nodes.flatten()]


def relative(part: Tensor, whole: Tensor) -> float:
    """Largest entry of a part over the largest of the whole; NaN counts as 1, an empty part as 0."""
    found = part.detach().abs().max() / whole.detach().abs().max() if part.numel() else torch.zeros(())
    return float(found) if found.isfinite() else 1.0


def trial(config: dict, seed: int) -> dict:
    graphs = core.PatternData(seed).first(config["graphs"], config["order"])[: config["batch"]]
    batch, rng = core.GraphBatch(graphs, core.Runtime.device, padding=True), core.stream(seed, "init", 1)
    (b, n), stack, real = batch.shape, core.adjacency_stack(batch, config["stack"]), batch.nodes.flatten()
    x, noise, probe = torch.from_numpy(rng.standard_normal((3, b * n, config["dim"]), "float32")).to(real.device)
    model, found = build(config, seed), {}
    for around in AROUND:
        (layer,) = build(config | {"norm": "batch" if "batch" in around else "layer", "layers": 1}, seed).layers
        out = through(layer, x.requires_grad_(), batch, around)
        (gradient,) = torch.autograd.grad((out * probe[: len(out)]).sum(), x)
        found[f"forward_{around}"] = relative(through(layer, x + noise * ~real[:, None], batch, around) - out, out)
        found[f"backward_{around}"] = relative(gradient[~real], gradient[real])
    mixing, first = model.layers[0].mixing, torch.arange(b * n, device=real.device)[:, None] % n == 0
    apart = real & ~stack.reachable[:, :, 0].flatten()  # real nodes that do not reach their graph's first
    found["unreachable"] = relative((mixing(x + noise * first, batch) - (out := mixing(x, batch)))[apart], out[real])
    small = batch.sizes.index(min(batch.sizes))
    own, alone = slice(small * n, small * n + batch.sizes[small]), core.GraphBatch([graphs[small]], real.device)
    found["alone"] = relative(mixing(x[own], alone) - out[own], out[own])
    (logits, weight, mixed), (exact, _, honest) = (attend(mixing, method, x, batch) for method in (config["mask"], "exact"))
    (gradient, behind), (truth,) = (
        torch.autograd.grad((m * probe)[real].sum(), at) for m, at in ((mixed, (logits, weight)), (honest, exact))
    )
    behind, rows = behind.transpose(1, 2), batch.nodes  # of the weights, a row a node
    found["output_gradient_padding"] = relative(behind[~rows], behind[rows])
    found["gradient_error"] = relative((gradient - truth)[gradient.isfinite()], truth)
    found["padding_mixed"] = relative(mixed[~real], mixed[real])
    shares = {
        "nan_padding": mixed[~real].isnan(), "nan_forward": model(batch)[real].isnan(), "nan_backward": gradient.isnan(),
        "misplaced_zeros": (weight == 0) == stack.reachable[:, None], "gradient_zeros": gradient == 0,
        "output_gradient_zeros": behind[rows] == 0, "reachable_outside": ~stack.real[stack.reachable],
    }  # fmt: skip
    found |= {name: float(hits.float().mean()) if hits.numel() else 0.0 for name, hits in shares.items()}
    return core.overfit(config, seed, build(config, seed)) | found


def checks(metrics: str, claimed: tuple[float, float], *arms: str) -> list[Check]:
    """Of every metric in every arm: a mask of gating, or "softmax MASK". A score is compared with the exact mask's."""
    cells = [({"activation": "softmax"} if "softmax" in arm else {}) | {"mask": arm.split()[-1]} for arm in arms]
    return [Check(m, claimed, cell, cell | {"mask": "exact"} if m == "best" else None) for cell in cells for m in metrics.split()]


LEAKS, BOTH, NAN = "forward_layer backward_layer unreachable", ("exact", "softmax exact"), "nan_forward nan_backward"
NONE, LEAK, SAME, WORSE = (ANY_BELOW, 1e-6), (1e-3, ANY_ABOVE), (-0.01, 0.01), (ANY_BELOW, -0.01)
CLAIMS = [
    Claim("-inf before a sigmoid needs nothing else", "6/3", checks(f"{LEAKS} {NAN}", NONE, "inf") + checks("best", SAME, "inf")),
    Claim("-inf before a softmax: rows that keep nothing are NaN, and the next layer spreads it", "6/3",
          checks("nan_padding", (0.99, ANY_ABOVE), "softmax inf") + checks("nan_forward", LEAK, "softmax inf")),
    Claim("fix_nans masks a softmax properly, forward", "6/3", checks(f"{LEAKS} nan_forward", NONE, "softmax zero-nan")),
    Claim("and backward (our question)", "6/3", checks("nan_backward", NONE, "softmax zero-nan")),
    Claim("-1000 troubles the gradient", "6/3", checks("gradient_error", LEAK, "-1000", "softmax -1000")),
    Claim("-1 leaks (our question)", "6/3", checks(f"{LEAKS} alone", LEAK, "-1", "softmax -1")),
    Claim("gating without a negative number for unreachable pairs scores worse", "6/3", checks("best", WORSE, "0")),
    Claim("a gate may be multiplied by the mask (our question)", "6/3", checks(f"{LEAKS} alone", NONE, "multiply")),
    Claim("a softmax may be multiplied by the mask (our question)", "6/3", checks(f"{LEAKS} alone", NONE, "softmax multiply")),
    Claim("its rows then tell the degree: better (our question)", "6/3", checks("best", (0.01, ANY_ABOVE), "softmax multiply")),
    Claim("zeros among the weights are the unreachable pairs (our reading)", "6/3", checks("misplaced_zeros", NONE, *BOTH)),
    Claim("attention does not change padding nodes that are not zero", "9.3", checks("padding_mixed", NONE, *BOTH)),
    Claim("nor does it with -1000 before a softmax (our question)", "9.3", checks("padding_mixed", NONE, "softmax -1000")),
    Claim("the gradient at a softmax's input has no zeros", "9.3", checks("gradient_zeros", (ANY_BELOW, 0.01), "softmax zero-nan")),
    Claim("that at its output is zero for padding nodes, and nowhere else", "9.3",
          checks("output_gradient_padding", NONE, "softmax zero-nan")
          + checks("output_gradient_zeros", (ANY_BELOW, 0.01), "softmax zero-nan")),
    Claim("reachable pairs are pairs of real nodes", "10.3", checks("reachable_outside", NONE, "exact")),
    Claim("a layer norm needs no mask", "13/3", checks("forward_layer_blind backward_layer_blind", NONE, *BOTH)),
    Claim("batch norm and mean pooling leak without one (our question)", "15.3",
          checks("forward_batch_blind backward_batch_blind forward_pool_blind backward_pool_blind", LEAK, *BOTH)),
    Claim("with one neither does", "15.3", checks("forward_batch backward_batch forward_pool backward_pool", NONE, *BOTH)),
    Claim("it is the masking: batch norms without it score worse", "15.3",
          [Check("best", WORSE, {"norm": "batch"}, {"norm": "batch", "norm_mask": "on"})]),
]  # fmt: skip


def figures(run: core.Run) -> list[core.Figure]:
    return [
        core.dots_figure(core.by_arm(run, ["forward_layer", "backward_layer", "unreachable", "alone", "nan_backward"]), "leaks",
                         f"Noise on padding moves real nodes: {core.extremes(run, 'forward_layer')}",
                         "share of the largest value, or of all entries (nan)", scale="symlog"),
        core.score_figure(run),
    ]  # fmt: skip


SMOKE = {"mask": ("exact", "zero-nan", "-1"), "lr": (1e-2,), "dim": (8,), "hidden": (8,), "graphs": (2,), "epochs": (3,)}
METRICS = ["best", "forward_layer", "backward_layer", "unreachable", "alone", "gradient_error", "nan_forward", "nan_backward"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, lambda run: core.extremes(run, "forward_layer"),
                             METRICS, SMOKE, lambda config: core.overfit_cell(FIXED | config))  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
