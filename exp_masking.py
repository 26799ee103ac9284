"""Which masks keep padding and unreachable nodes out of attention, and what does a leak cost?

Notebook    graph notebook: 6/3 (todo), 9.3, 10.3, 13/3, 15.3
Setup       Padding travels as nodes, as in the notebook. Position attention by hop, powers [0, 1],
            one head; pairs that no power connects are masked: by this repository's masks (exact),
            or by what is added to their logits: -inf, -inf with NaN set to 0 afterwards (fix_nans),
            -1000, -1, nothing; or the weights are multiplied by the mask afterwards. Leaks are
            measured on one untrained layer of width 100. Then two layers with a feed-forward of 200
            overfit 32 PATTERN graphs that share one pattern: one batch, Adam at 1e-4, 50 epochs of
            one step. Norms see real nodes only, or the padding, too.
Hypothesis  -inf before a sigmoid needs nothing else; a softmax needs fix_nans. -1000 may trouble
            the gradient. Leaving unreachable pairs without a negative number is worse. Attention
            leaves padding alone, layer norms need no mask, and batch norms without one are the
            trouble. Ours: -1000 gives the gradient of -inf; a layer norm takes each node by itself,
            so that nothing of the padding can reach a real node; a batch norm mixes them.
Rule        12 paired seeds. A check holds if its 95% interval lies inside its bounds and fails if
            it lies outside; one failed check refutes a claim. Exact zeros must be zero in every
            seed. Padding leak: largest change of a real node's output under noise of size 1 on all
            padding, over the largest output; padding gradient: largest gradient that a real node's
            output sends to padding, over the largest at real nodes; unreachable leak: largest
            change of a node that does not reach its graph's first node under noise on that one. NaN
            counts as 1. A leak is above 0.001. NaN in padding, NaN in nodes, NaN in gradient:
            shares of the padding after one mixing, of real nodes after two layers, and of the
            gradient at the logits. Gradient error: largest difference of the gradient at the logits
            from that of the exact mask, relative to it; trouble is above 0.001. Padding mixed:
            largest value that mixing gives to padding. Zeros at the output, zeros at the input:
            share of zeros in the gradient at a softmax's output and input, in the rows of real
            nodes; "no zeros" is below 0.01. Zeros in padding rows: the same at the output, of
            padding; all is above 0.99. Any of the softmax's masks may hold, since that day's is not
            known. Misplaced zeros: share of pairs where a weight is zero but reachable, or the
            reverse. Reachable outside: share of reachable pairs that are not pairs of real nodes.
            Best score: largest balanced accuracy on the training graphs; worse is lower.
Cost        7 min on 2 cores
"""

import core
from core import OURS, Check, Claim

import numpy as np
import torch
from torch import nn

ADDED = {"-inf": -np.inf, "fix-nans": -np.inf, "-1000": -1000.0, "-1": -1.0, "nothing": 0.0}

parser = core.make_parser(__doc__, seeds=12)
parser.add_argument(
    "--mixing",
    nargs="+",
    choices=["gating", "softmax"],
    default=["gating"],
    help="whether logits become gates or a softmax",
)
parser.add_argument(
    "--mask",
    nargs="+",
    choices=["exact", "-inf", "fix-nans", "-1000", "-1", "nothing", "multiply"],
    default=["exact"],
    help="what unreachable pairs get; fix-nans: -inf, then 0 for NaN",
)
parser.add_argument(
    "--norm", nargs="+", choices=["layer", "batch"], default=["layer"], help="norms of a layer"
)
parser.add_argument(
    "--norm-sees",
    nargs="+",
    choices=["nodes", "padding", "padding-in-norm2"],
    default=["nodes"],
    help="whether norms see real nodes only, the padding, too, or the second one alone does",
)
parser.add_argument("--layers", nargs="+", type=core.integer(1, 64), default=[2], help="layers")
parser.add_argument(
    "--lr", nargs="+", type=core.positive_float, default=[1e-4], help="Adam's learning rate"
)
parser.add_argument("--dim", nargs="+", type=core.layer_width, default=[100], help="width")
parser.add_argument(
    "--hidden", nargs="+", type=core.layer_width, default=[200], help="width in the feed-forward"
)
parser.add_argument(
    "--graphs", nargs="+", type=core.integer(2, 1000), default=[32], help="training graphs"
)
parser.add_argument(
    "--epochs", nargs="+", type=core.positive_int, default=[50], help="steps of the training"
)

SOFTMAX = {"mixing": "softmax"}
ARMS = {  # the baseline first; a run with flags takes these
    "gating, exact mask": {},
    "gating, -inf": {"mask": "-inf"},
    "gating, no mask": {"mask": "nothing"},
    "softmax, exact mask": SOFTMAX,
    "softmax, -inf": SOFTMAX | {"mask": "-inf"},
    "softmax, fix_nans": SOFTMAX | {"mask": "fix-nans"},
}
ABLATIONS = {
    "gating, -1000": {"mask": "-1000"},
    "gating, -1": {"mask": "-1"},
    "gating, multiplied by the mask": {"mask": "multiply"},
    "softmax, -1000": SOFTMAX | {"mask": "-1000"},
    "softmax, -1": SOFTMAX | {"mask": "-1"},
    "softmax, no mask": SOFTMAX | {"mask": "nothing"},
    "softmax, multiplied by the mask": SOFTMAX | {"mask": "multiply"},
    "layer norms see padding": {"norm_sees": "padding"},
    "second layer norm sees padding": {"norm_sees": "padding-in-norm2"},
    "batch norms": {"norm": "batch"},
    "batch norms see padding": {"norm": "batch", "norm_sees": "padding"},
}
COLUMNS = ["padding leak", "unreachable leak", "gradient error", "NaN in nodes", "best score"]
ROWS = [
    "gating, exact mask",
    "gating, -inf",
    "gating, -1",
    "gating, no mask",
    "softmax, -inf",
    "softmax, fix_nans",
    "softmax, -1000",
    "batch norms",
    "batch norms see padding",
]
TINY = {"graphs": 3, "epochs": 4, "dim": 8, "hidden": 8, "lr": 1e-2}


class MaskedMixing(nn.Module):
    """Position attention by hop with a choice of masks, one head: [V, D] -> [V, D]."""

    def __init__(self, dim, activation, mask):
        super().__init__()
        self.activation = activation
        self.mask = mask
        self.pair = nn.Linear(2, 1)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, batch):
        return self.out(self.mix(self.weigh(self.logits(batch), batch), x, batch))

    def logits(self, batch):
        """Of every pair: [B, N, N]."""
        hops, _ = core.pair_encoding(batch, (0, 1), "hop")
        return torch.einsum("bknm,k->bnm", hops, self.pair.weight[0]) + self.pair.bias

    def weigh(self, logits, batch):
        """Logits to weights, both [B, N, N], by the layer's mask."""
        _, keep = core.pair_encoding(batch, (0, 1), "hop")
        if self.mask == "exact" and self.activation == "softmax":
            return core.masked_softmax(logits, keep)
        if self.mask == "exact":
            return core.masked_sigmoid(logits, keep)
        if self.mask != "multiply":
            logits = torch.where(keep, logits, logits + ADDED[self.mask])
        weight = logits.softmax(-1) if self.activation == "softmax" else logits.sigmoid()
        if self.mask == "multiply":
            weight = weight * keep
        elif self.mask == "fix-nans":
            weight = weight.nan_to_num()
        return weight

    def mix(self, weight, x, batch):
        """Weighted sum of the values: [V, D]."""
        return batch.pack(weight @ batch.pad(self.value(x)))


class RealNodeNorm(nn.Module):
    """A norm that sees real nodes only; padding passes it unchanged: [V, D] -> [V, D]."""

    def __init__(self, norm, batch):
        super().__init__()
        self.norm = norm
        self.real = (batch.label != core.IGNORED).nonzero().squeeze(1)

    def forward(self, x):
        return x.index_copy(0, self.real, self.norm(x[self.real]))


def trial(config, seed, job):
    """Measure the leaks of one untrained layer, then train and score on the same graphs."""
    graphs = core.PatternData(seed).first(config.graphs)
    batch = core.GraphBatch(graphs, job.device, padding=True)
    rng = core.stream(seed, "init", 1)
    x, noise, probe = torch.from_numpy(
        rng.standard_normal((3, len(batch.label), config.dim), dtype=np.float32)
    ).to(job.device)
    with core.initialised_from(seed):
        layers = [make_layer(config, batch) for _ in range(config.layers)]
        model = core.NodeClassifier(layers, config.dim).to(job.device)

    found = measure_leaks(model.layers[0], batch, x, noise, probe)
    found |= measure_weights(model.layers[0].mixing, batch, x, probe)
    with torch.no_grad():
        logits = model(batch)[batch.label != core.IGNORED]
    found["NaN in nodes"] = share(logits.isnan())

    history = core.train(model, [batch], seed=seed, lr=config.lr, epochs=config.epochs, clip=5.0)
    score = history["recall"].mean(axis=1)
    return found | {
        "best score": score.max(),
        "last loss": history["loss"][-1],
        "score by epoch": score,
    }


def make_layer(config, batch):
    """One layer with the arm's mask and norms: [V, D] -> [V, D]."""
    activation = "softmax" if config.mixing == "softmax" else "sigmoid"
    mixing = MaskedMixing(config.dim, activation, config.mask)
    feedforward = core.FeedForward(config.dim, config.hidden)
    layer = core.TransformerLayer(mixing, feedforward, config.dim, config.norm)
    if config.norm_sees != "padding":
        layer.norm1 = RealNodeNorm(layer.norm1, batch)
    if config.norm_sees == "nodes":
        layer.norm2 = RealNodeNorm(layer.norm2, batch)
    return layer


def measure_leaks(layer, batch, x, noise, probe):
    """Leaks of padding and of unreachable nodes through a layer: {name: float}.

    x, noise, probe [V, D]: input, what is added to padding or to a node, weights of the outputs.
    """
    layer.train()
    real = batch.label != core.IGNORED
    x = x.clone().requires_grad_()
    out = layer(x, batch)
    (gradient,) = torch.autograd.grad((out * probe)[real].sum(), x)
    with torch.no_grad():
        padded = layer(x + noise * ~real[:, None], batch)

        _, reachable = core.pair_encoding(batch, (0, 1), "hop")
        first = torch.zeros_like(batch.nodes)
        first[:, 0] = True
        apart = (batch.nodes & ~reachable[:, :, 0]).flatten()
        mixed = layer.mixing(x, batch)
        moved = layer.mixing(x + noise * first.flatten()[:, None], batch)
    return {
        "padding leak": relative((padded - out)[real], out[real]),
        "padding gradient": relative(gradient[~real], gradient[real]),
        "unreachable leak": relative((moved - mixed)[apart], mixed[real]),
    }


def measure_weights(mixing, batch, x, probe):
    """What the mask does to weights and gradients of one mixing: {name: float}."""
    real = batch.label != core.IGNORED
    rows = batch.nodes
    logits = mixing.logits(batch).detach().requires_grad_()
    weight = mixing.weigh(logits, batch)
    weight.retain_grad()
    mixed = mixing.mix(weight, x, batch)
    (mixed * probe)[real].sum().backward()
    at_input, at_output = logits.grad, weight.grad

    exact_mixing = MaskedMixing(x.shape[1], mixing.activation, "exact")
    exact_logits = logits.detach().requires_grad_()
    exact_weight = exact_mixing.weigh(exact_logits, batch)
    exact_weight.backward(at_output.nan_to_num())
    error = at_input - exact_logits.grad

    _, reachable = core.pair_encoding(batch, (0, 1), "hop")
    pairs = rows[:, :, None] & rows[:, None, :]
    return {
        "NaN in padding": share(mixed[~real].isnan()),
        "NaN in gradient": share(at_input.isnan()),
        "gradient error": relative(error[error.isfinite()], exact_logits.grad),
        "padding mixed": relative(mixed[~real], mixed[real]),
        "zeros at the input": share(at_input[rows] == 0),
        "zeros at the output": share(at_output[rows] == 0),
        "zeros in padding rows": share(at_output[~rows] == 0),
        "misplaced zeros": share((weight == 0) == reachable),
        "reachable outside": share(~pairs[reachable]),
    }


def share(hits):
    """Share of True; 0 of nothing."""
    return float(hits.float().mean()) if hits.numel() else 0.0


def relative(part, whole):
    """Largest entry of a part over the largest of the whole; 1 for NaN, 0 for an empty part."""
    if part.numel() == 0:
        return 0.0
    ratio = part.detach().abs().max() / whole.detach().abs().max()
    return float(ratio) if ratio.isfinite() else 1.0


SOFTMAX_MASKS = (
    "softmax, exact mask",
    "softmax, fix_nans",
    "softmax, -1000",
    "softmax, -1",
    "softmax, no mask",
    "softmax, multiplied by the mask",
)


def no_leak(arm):
    """Checks that nothing of padding or of unreachable nodes comes through."""
    metrics = ("padding leak", "padding gradient", "unreachable leak", "NaN in nodes")
    return [Check(metric, equals=0, arm=arm) for metric in metrics]


CLAIMS = [
    Claim(
        "-inf before a sigmoid masks properly and needs nothing else",
        "6/3",
        *no_leak("gating, -inf"),
        Check("NaN in gradient", equals=0, arm="gating, -inf"),
    ),
    Claim("fix_nans masks a softmax properly", "6/3", *no_leak("softmax, fix_nans")),
    Claim(
        "-1000 instead of -inf may trouble the gradient",
        "6/3",
        Check("gradient error", above=0.001, any_arm=("gating, -1000", "softmax, -1000")),
    ),
    Claim(
        "Gating without a negative number for unreachable pairs scores worse",
        "6/3",
        Check("best score", below=0, arm="gating, no mask", minus="gating, exact mask"),
    ),
    Claim(
        "Self-attention does not change padding nodes, even when they are not zero",
        "9.3",
        Check("padding mixed", equals=0, any_arm=("gating, exact mask", "softmax, fix_nans")),
    ),
    Claim(
        "The gradient at the softmax's output is zero for padding nodes and nowhere else",
        "9.3",
        Check("zeros in padding rows", above=0.99, any_arm=SOFTMAX_MASKS),
        Check("zeros at the output", below=0.01, any_arm=SOFTMAX_MASKS),
    ),
    Claim(
        "The gradient at the softmax's input has no zeros, in the rows of real nodes",
        "9.3",
        Check("zeros at the input", below=0.01, any_arm=SOFTMAX_MASKS),
    ),
    Claim(
        "Only pairs of real nodes are reachable",
        "10.3",
        Check("reachable outside", equals=0, arm="gating, exact mask"),
    ),
    Claim(
        "Masking the layer norms has no effect: nothing of the padding reaches a node",
        "13/3",
        *no_leak("layer norms see padding"),
    ),
    Claim(
        "Masking in the second layer norm has no effect",
        "13/3",
        *no_leak("second layer norm sees padding"),
    ),
    Claim(
        "It is the masking: batch norms that see the padding score worse",
        "15.3",
        Check("best score", below=0, arm="batch norms see padding", minus="batch norms"),
    ),
    Claim(
        "fix_nans repairs the output of a softmax, not its gradient: that is NaN",
        OURS,
        Check("NaN in gradient", above=0.001, arm="softmax, fix_nans"),
    ),
    Claim(
        "With -1 in place of -inf padding and unreachable nodes leak",
        OURS,
        Check("padding leak", above=0.001, arm="gating, -1"),
        Check("unreachable leak", above=0.001, arm="gating, -1"),
        Check("padding leak", above=0.001, arm="softmax, -1"),
        Check("unreachable leak", above=0.001, arm="softmax, -1"),
    ),
    Claim(
        "A batch norm that sees the padding leaks it, one that sees real nodes does not",
        OURS,
        Check("padding leak", above=0.001, arm="batch norms see padding"),
        Check("padding leak", equals=0, arm="batch norms"),
    ),
    Claim(
        "The zeros among the weights of an exact mask are the unreachable pairs",
        OURS,
        Check("misplaced zeros", equals=0, arm="gating, exact mask"),
        Check("misplaced zeros", equals=0, arm="softmax, exact mask"),
    ),
]


def plot(run):
    """{name of the file: figure}."""
    return {
        "leak": core.draw_points(
            run,
            "padding leak",
            "-1, no mask and batch norms that see the padding let it through",
            "Padding leak by arm",
            "change of a real node's output, share of the largest",
            scale="symlog",
        ),
        "best": core.draw_points(
            run,
            "best score",
            "What a leak costs",
            "Best score by arm",
            "best balanced accuracy on the training graphs",
            arms=[arm for arm in run.arms if arm != "softmax, -inf"],
        ),
    }


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY, rows=ROWS)
