"""Which masks keep padding and unreachable nodes out of attention, and what does a leak cost?

Notebook    graph notebook: 6/3, 9.3, 10.3, 13/3, 15.3
Setup       Overfit 32 PATTERN graphs of one pattern: one batch, Adam at 1e-4, gradient norm clipped
            at 5, 50 epochs; two layers, width 100, feed-forward 600. Padding is nodes without edges
            and labels; norms see it unless masked. A mask adds -inf, -1000, -1 or 0 (unmasked) to
            the logits of unreachable pairs, pairs with padding included, or multiplies their
            weights by 0; fix_nans adds -inf and then replaces NaN by 0; "real pairs" masks pairs
            with padding only. The exact mask also zeroes weights and gradients of rows that are
            wholly masked. Leaks are measured in one untrained layer on random input.
Hypothesis  Before a sigmoid -inf needs nothing else; before a softmax fix_nans is needed; -1000 may
            trouble the gradient; layer norms need no mask; what disturbs batch norms is masking.
            Ours: fix_nans leaves NaN in the gradients; -1000 troubles nothing; a layer norm takes
            each node by itself, so that its mask has no effect by arithmetic; a softmax multiplied
            by the mask shows the degree and so gains.
Rule        10 paired seeds; exact results hold in every seed. Best score: largest balanced
            accuracy, 0.5 in an epoch with logits that are not finite; the same: within 0.01. That
            batch norms are compared with masked ones was set after an earlier run. Leaks and errors
            are relative to the largest value; they count above 0.001. Forward leak: relative change
            of a real node's output under noise of size 1 on padding. Backward leak: relative
            gradient, at the padding, of a random sum of the real outputs, NaN counted as 1.
            Unreachable leak: the forward leak from each graph's first node to nodes out of its
            reach, by attention alone. Batch dependence: change of the smallest graph's output by
            attention when it is alone in the batch. Gradient error: difference from the exact
            mask's gradient at the logits, NaN left out. NaN in logits: share of the real nodes'
            logits before training; NaN in gradient: share of NaN in the gradient at attention's
            logits. Padding mixed: attention output on padding. Misplaced zeros: share of pairs with
            a zero weight though reachable, or another weight though unreachable. Reachable outside:
            share of reachable pairs with padding; real pairs out of reach: unreachable share of the
            pairs of real nodes. Padding grad_output: gradient at a softmax's output in rows of
            padding. Zeros in grad_output and grad_input: share of zeros in the gradient at its
            output and input, over the pairs of real nodes; no zeros: below 0.001.
Cost        10 min on 2 cores; `--epochs 10` under 1 min
"""

import core
from core import OURS, Check, Claim

import numpy as np
import torch
from torch import nn

POWERS = (0, 1)
ADDED = {  # to the logits of masked pairs
    "-inf": -torch.inf,
    "fix-nans": -torch.inf,
    "real-pairs": -torch.inf,
    "-1000": -1000.0,
    "-1": -1.0,
    "unmasked": 0.0,
    "multiplied": 0.0,
}

parser = core.make_parser(__doc__, seeds=10)
parser.add_argument(
    "--mixing",
    nargs="+",
    choices=["gating", "softmax"],
    default=["gating"],
    help="whether a node adds up gated nodes or averages over them",
)
parser.add_argument(
    "--mask",
    nargs="+",
    choices=["exact", *ADDED],
    default=["exact"],
    help="exact: core's mask; a number: added to the logits of masked pairs; fix-nans: -inf, then 0"
    " for NaN; real-pairs: the same for padding only; multiplied: weights times the mask",
)
parser.add_argument(
    "--norm", nargs="+", choices=["layer", "batch"], default=["layer"], help="norms of a layer"
)
parser.add_argument(
    "--norm1-sees",
    nargs="+",
    choices=["padding", "nodes"],
    default=["padding"],
    help="whether the norm before mixing sees the padding too, or real nodes only",
)
parser.add_argument(
    "--norm2-sees",
    nargs="+",
    choices=["padding", "nodes"],
    default=["padding"],
    help="whether the norm before the feed-forward sees the padding too, or real nodes only",
)
parser.add_argument("--layers", nargs="+", type=core.integer(1, 64), default=[2], help="layers")
parser.add_argument(
    "--lr", nargs="+", type=core.positive_float, default=[1e-4], help="Adam's learning rate"
)
parser.add_argument("--dim", nargs="+", type=core.layer_width, default=[100], help="width")
parser.add_argument(
    "--hidden", nargs="+", type=core.layer_width, default=[600], help="width in the feed-forward"
)
parser.add_argument(
    "--graphs", nargs="+", type=core.integer(2, 1000), default=[32], help="training graphs"
)
parser.add_argument(
    "--epochs", nargs="+", type=core.integer(2, 100_000), default=[50], help="steps"
)

SOFTMAX = {"mixing": "softmax"}
BATCH = {"norm": "batch"}
MASKED_NORMS = {"norm1_sees": "nodes", "norm2_sees": "nodes"}

ARMS = {  # the baseline first; a run with flags takes these
    "gating, exact mask": {},
    "gating, -inf": {"mask": "-inf"},
    "gating, unmasked": {"mask": "unmasked"},
    "softmax, exact mask": SOFTMAX,
    "softmax, -inf": SOFTMAX | {"mask": "-inf"},
    "softmax, fix_nans": SOFTMAX | {"mask": "fix-nans"},
}
ABLATIONS = {  # what else the claims and the table read
    "gating, -1000": {"mask": "-1000"},
    "softmax, -1000": SOFTMAX | {"mask": "-1000"},
    "softmax, -1": SOFTMAX | {"mask": "-1"},
    "softmax, fix_nans, real pairs": SOFTMAX | {"mask": "real-pairs"},
    "softmax, multiplied": SOFTMAX | {"mask": "multiplied"},
    "gating, only norm2 sees padding": {"norm1_sees": "nodes"},
    "gating, batch norms see padding": BATCH,
    "gating, batch norms masked": BATCH | MASKED_NORMS,
}
COLUMNS = ["best score", "forward leak", "backward leak", "unreachable leak", "NaN in gradient"]
ROWS = [  # of the entry's table; all arms stand in its CSV
    "gating, exact mask",
    "gating, -inf",
    "gating, unmasked",
    "softmax, exact mask",
    "softmax, -inf",
    "softmax, fix_nans",
    "softmax, multiplied",
    "gating, batch norms see padding",
    "gating, batch norms masked",
]
TINY = {"graphs": 2, "epochs": 3, "dim": 8, "hidden": 8, "lr": 1e-2}


def trial(config, seed, job):
    """Measure the leaks of one untrained layer, then train on padded graphs and score them."""
    graphs = core.PatternData(seed).first(config.graphs)
    batch = core.GraphBatch(graphs, job.device, padding=True)
    draws = core.stream(seed, "init", 1)
    shape = (3, len(batch.slot), config.dim)
    x, noise, probe = torch.from_numpy(draws.standard_normal(shape, "float32")).to(job.device)
    with core.initialised_from(seed):
        layer = MaskedLayer(config).to(job.device)
    smallest = min(range(config.graphs), key=lambda i: len(graphs[i].feature))
    alone = core.GraphBatch([graphs[smallest]], job.device)
    measured = {
        "forward leak": forward_leak(layer, x, noise, batch),
        "backward leak": backward_leak(layer, x, probe, batch),
        "unreachable leak": unreachable_leak(layer.mixing, x, noise, batch),
        "batch dependence": batch_dependence(layer.mixing, x, batch, alone, smallest),
        **gradient_measures(layer.mixing, x, probe, batch),
        **pair_measures(layer.mixing, x, batch),
    }

    with core.initialised_from(seed):
        layers = [MaskedLayer(config) for _ in range(config.layers)]
        model = core.NodeClassifier(layers, config.dim).to(job.device)
    logits, _ = core.evaluate(model, [batch])
    history = core.train(
        model,
        [batch],
        seed=seed,
        lr=config.lr,
        epochs=config.epochs,
        clip=5.0,
        checkpoint=job.checkpoint,
    )
    score = np.nan_to_num(history["recall"].mean(axis=1), nan=0.5)
    return {
        "best score": score.max(),
        "NaN in logits": share(logits[real_nodes(batch)].isnan()),
        **measured,
        "last loss": history["loss"][-1],
        "score by epoch": score,
    }


class MaskedAttention(nn.Module):
    """core.PositionAttention by hop, one head, on a padded batch: [B * N, D] -> [B * N, D].

    mask: "exact", or what ADDED adds to the logits of masked pairs.
    """

    def __init__(self, dim, mixing, mask):
        super().__init__()
        self.mixing = mixing
        self.mask = mask
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.pair = nn.Linear(len(POWERS), 1)

    def forward(self, x, batch):
        weight = self.weights(self.activate(self.logits(batch), batch), batch)
        return self.out(batch.pack(weight @ batch.pad(self.value(x))))

    def logits(self, batch):
        """[B, N, N] before the mask."""
        hops, _ = core.pair_encoding(batch, POWERS, "hop")
        logits = torch.einsum("bknm,hk->bhnm", hops, self.pair.weight)[:, 0]
        return logits + self.pair.bias

    def kept(self, batch):
        """Which pairs the mask keeps: [B, N, N] bool."""
        if self.mask == "real-pairs":
            return batch.nodes[:, :, None] & batch.nodes[:, None, :]
        return core.pair_encoding(batch, POWERS, "hop")[1]

    def activate(self, logits, batch):
        """Masked logits through sigmoid or softmax, before what the mask does afterwards."""
        keep = self.kept(batch)
        if self.mask == "exact":
            masked = core.masked_softmax if self.mixing == "softmax" else core.masked_sigmoid
            return masked(logits, keep)
        masked = torch.where(keep, logits, logits + ADDED[self.mask])
        return masked.softmax(-1) if self.mixing == "softmax" else masked.sigmoid()

    def weights(self, activated, batch):
        """[B, N, N]: the weight with which node n (second axis) takes in node m."""
        if self.mask == "multiplied":
            return activated * self.kept(batch)
        if self.mask in ("fix-nans", "real-pairs"):
            return activated.nan_to_num()
        return activated


class MaskedNorm(nn.Module):
    """A norm over a padded batch that sees real nodes only, or the padding too: [B * N, D].

    What it does not see it leaves as it is.
    """

    def __init__(self, name, dim, sees):
        super().__init__()
        self.norm = core.make_norm(name, dim)
        self.sees = sees

    def forward(self, x, batch):
        if self.sees == "padding":
            return self.norm(x)
        real = real_nodes(batch).nonzero().squeeze(1)
        return x.index_copy(0, real, self.norm(x[real]))


class MaskedLayer(nn.Module):
    """core.TransformerLayer whose mask and norms the config names: [B * N, D] -> [B * N, D]."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = MaskedNorm(config.norm, config.dim, config.norm1_sees)
        self.norm2 = MaskedNorm(config.norm, config.dim, config.norm2_sees)
        self.mixing = MaskedAttention(config.dim, config.mixing, config.mask)
        self.feedforward = core.FeedForward(config.dim, config.hidden)

    def forward(self, x, batch):
        x = x + self.mixing(self.norm1(x, batch), batch)
        return x + self.feedforward(self.norm2(x, batch))


def real_nodes(batch):
    """[B * N] bool."""
    return batch.nodes.flatten()


def share(hits):
    """Share of True in a bool tensor, 0 if it is empty."""
    return float(hits.float().mean()) if hits.numel() else 0.0


def relative(part, whole):
    """Largest entry of a part over the largest of the whole; NaN counts as 1, no part as 0."""
    if part.numel() == 0:
        return 0.0
    ratio = float(part.abs().max() / whole.abs().max())
    return ratio if np.isfinite(ratio) else 1.0


@torch.no_grad()
def forward_leak(layer, x, noise, batch):
    """How far noise on padding moves the outputs of real nodes."""
    real = real_nodes(batch)
    before = layer(x, batch)[real]
    after = layer(x + noise * ~real[:, None], batch)[real]
    return relative(after - before, before)


def backward_leak(layer, x, probe, batch):
    """How large the gradient of real nodes' outputs is on padding."""
    real = real_nodes(batch)
    x = x.clone().requires_grad_()
    (layer(x, batch) * probe)[real].sum().backward()
    return relative(x.grad[~real], x.grad[real])


@torch.no_grad()
def unreachable_leak(mixing, x, noise, batch):
    """How far noise on each graph's first node moves real nodes that do not reach it."""
    _, n = batch.shape
    real = real_nodes(batch)
    _, reachable = core.pair_encoding(batch, POWERS, "hop")
    apart = real & ~reachable[:, :, 0].flatten()
    is_first = torch.arange(len(x), device=x.device) % n == 0
    before = mixing(x, batch)
    after = mixing(x + noise * is_first[:, None], batch)
    return relative((after - before)[apart], before[real])


@torch.no_grad()
def batch_dependence(mixing, x, batch, alone, index):
    """How far graph `index` moves when it leaves the batch; alone: a batch of it alone."""
    first = index * batch.shape[1]
    own = slice(first, first + alone.shape[1])
    within = mixing(x, batch)[own]
    return relative(mixing(x[own], alone) - within, within)


def gradients(mixing, value, probe, batch):
    """Gradients at attention's logits and at what its activation returns, both [B, N, N].

    value, probe [B, N, D]. The loss is a random sum of real nodes' mixed values.
    """
    logits = mixing.logits(batch).detach().requires_grad_()
    activated = mixing.activate(logits, batch)
    mixed = mixing.weights(activated, batch) @ value
    loss = (mixed * probe)[batch.nodes].sum()
    return torch.autograd.grad(loss, [logits, activated])


def gradient_measures(mixing, x, probe, batch):
    """What the mask does to the gradients of the logits: {name: number}."""
    value = batch.pad(mixing.value(x).detach())
    probe = batch.pad(probe)
    at_logits, at_output = gradients(mixing, value, probe, batch)
    exact = MaskedAttention(x.shape[1], mixing.mixing, "exact").to(x.device)
    exact.load_state_dict(mixing.state_dict())
    right, _ = gradients(exact, value, probe, batch)

    finite = at_logits.isfinite()
    real = batch.nodes
    pairs = real[:, :, None] & real[:, None, :]
    return {
        "gradient error": relative((at_logits - right)[finite], right),
        "NaN in gradient": share(at_logits.isnan()),
        "padding grad_output": relative(at_output[~real], at_output[real]),
        "zeros in grad_output": share(at_output[pairs] == 0),
        "zeros in grad_input": share(at_logits[pairs] == 0),
    }


@torch.no_grad()
def pair_measures(mixing, x, batch):
    """Which weights are zero, what padding mixes, and which pairs are in reach: {name: number}."""
    _, reachable = core.pair_encoding(batch, POWERS, "hop")
    real = batch.nodes
    pairs = real[:, :, None] & real[:, None, :]
    weight = mixing.weights(mixing.activate(mixing.logits(batch), batch), batch)
    mixed = weight @ batch.pad(mixing.value(x))
    return {
        "misplaced zeros": share((weight == 0) == reachable),
        "padding mixed": relative(mixed[~real], mixed[real]),
        "reachable outside": share(~pairs[reachable]),
        "real pairs out of reach": share(~reachable[pairs]),
    }


NO_LEAK = ("forward leak", "backward leak", "unreachable leak", "NaN in logits")
SOFTMAX_OF_9_3 = (  # the notebook does not say which mask its softmax had on that day
    "softmax, fix_nans",
    "softmax, fix_nans, real pairs",
    "softmax, -1000",
    "softmax, -1",
)

CLAIMS = [
    Claim(
        "With a sigmoid -inf masks unreachable pairs exactly: no leaks, and the same score",
        "6/3",
        *[Check(metric, equals=0, arm="gating, -inf") for metric in NO_LEAK],
        Check("NaN in gradient", equals=0, arm="gating, -inf"),
        Check("best score", between=(-0.01, 0.01), arm="gating, -inf", minus="gating, exact mask"),
    ),
    Claim(
        "A bias of -1000 for unreachable pairs causes trouble for the gradient",
        "6/3",
        Check("gradient error", above=0.001, any_arm=("gating, -1000", "softmax, -1000")),
    ),
    Claim(
        "Without a negative logit at unreachable pairs the score is lower",
        "6/3",
        Check("best score", below=0, arm="gating, unmasked", minus="gating, exact mask"),
    ),
    Claim(
        "Attention does not change padding nodes, even when they are not zero",
        "9.3",
        Check(
            "padding mixed",
            equals=0,
            any_arm=("gating, exact mask", "softmax, exact mask", "softmax, fix_nans"),
        ),
    ),
    Claim(
        "The gradient at a softmax's output is zero for padding nodes and not zero elsewhere",
        "9.3",
        Check("padding grad_output", equals=0, any_arm=SOFTMAX_OF_9_3),
        Check("zeros in grad_output", below=0.001, any_arm=SOFTMAX_OF_9_3),
    ),
    Claim(
        "The gradient at a softmax's input has no zeros",
        "9.3",
        Check("zeros in grad_input", below=0.001, any_arm=SOFTMAX_OF_9_3),
    ),
    Claim(
        "The pairs that a power reaches are some, not all, of the pairs of real nodes",
        "10.3",
        Check("reachable outside", equals=0, arm="gating, exact mask"),
        Check("real pairs out of reach", above=0, arm="gating, exact mask"),
    ),
    Claim(
        "Masking the second layer norm has no effect: padding that it sees leaks nowhere",
        "13/3",
        Check("forward leak", equals=0, arm="gating, only norm2 sees padding"),
        Check("backward leak", equals=0, arm="gating, only norm2 sees padding"),
    ),
    Claim(
        "Masking the layer norms has no effect: padding that they see leaks nowhere",
        "13/3",
        Check("forward leak", equals=0, arm="gating, exact mask"),
        Check("backward leak", equals=0, arm="gating, exact mask"),
    ),
    Claim(
        "It is the masking: batch norms that see the padding score lower",
        "15.3",
        Check(
            "best score",
            below=0,
            arm="gating, batch norms see padding",
            minus="gating, batch norms masked",
        ),
    ),
    Claim(
        "With fix_nans a softmax is masked properly in the forward pass",
        OURS,
        *[Check(metric, equals=0, arm="softmax, fix_nans") for metric in NO_LEAK],
    ),
    Claim(
        "The zeros among the weights are the unreachable pairs, and no others",
        OURS,
        Check("misplaced zeros", equals=0, arm="gating, exact mask"),
        Check("misplaced zeros", equals=0, arm="softmax, exact mask"),
    ),
    Claim(
        "Before a softmax -inf gives NaN logits; fix_nans leaves NaN gradients and a lower score",
        OURS,
        Check("NaN in logits", above=0.001, arm="softmax, -inf"),
        Check("NaN in gradient", above=0.001, arm="softmax, fix_nans"),
        Check("best score", below=0, arm="softmax, fix_nans", minus="softmax, exact mask"),
    ),
    Claim(
        "A softmax multiplied by the mask scores higher, but depends on the batch",
        OURS,
        Check("best score", above=0, arm="softmax, multiplied", minus="softmax, exact mask"),
        Check("batch dependence", above=0.001, arm="softmax, multiplied"),
    ),
    Claim(
        "Batch norms that see the padding leak it, forward and backward, and masked ones do not",
        OURS,
        Check("forward leak", above=0.001, arm="gating, batch norms see padding"),
        Check("backward leak", above=0.001, arm="gating, batch norms see padding"),
        Check("forward leak", equals=0, arm="gating, batch norms masked"),
        Check("backward leak", equals=0, arm="gating, batch norms masked"),
    ),
]


def plot(run):
    """{name of the file: figure}."""
    leaks = core.draw_points(
        run,
        "forward leak",
        "Noise on padding changes real nodes without a mask, at -1, and through batch norms",
        "Forward leak of one untrained layer by arm",
        "largest change of a real node under noise on padding, relative",
        levels={"counts as a leak above": 0.001},
    )
    leaks.axes[0].set_xscale("symlog", linthresh=1e-3)  # most arms leak exactly 0
    leaks.axes[0].set_xlim(-2e-4, 1)
    return {
        "leaks": leaks,
        "best": core.draw_points(
            run,
            "best score",
            "Without a mask the best score of gating is lower",
            "Best score by arm",
            "best balanced accuracy",
        ),
    }


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY, rows=ROWS)
