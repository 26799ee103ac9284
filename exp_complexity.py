"""What do an edge-bias transformer and the simple one on pairs cost, and what does sharing save?

Notebook    graph notebook: 13/4
Setup       One forward pass over one graph of n = 256 nodes, width d = 100, e = 8 features per pair
            and L = 4 layers, unless an arm says otherwise. Edge bias: a transformer on nodes with
            two heads; a pair's features pass an edge feed-forward e, 4e, e and give a bias to each
            head's logit. Simple: the notebook's "simple og transformer" on pairs; each layer is an
            edge feed-forward and a product of two heads of the pair features E: path attention (E
            w1)(E w2) or cluster attention (E w1)(E w2)^T ("cluster"). All layers share one edge
            feed-forward (l = 1) or each has its own (l = L); with an edge bias a shared one is
            computed once, in the simple transformer once per layer.
Hypothesis  Weights: 8e^2 per edge feed-forward, 2e per edge bias or pair of heads, 4d^2 + 8d^2 per
            layer on nodes. Operations: 8e^2 per pair, 8d^2 per node, 3nd + n^2 d in attention.
            Ours: attention takes 4nd^2 + 2n^2 d, path and cluster attention 2n^2 e + n^3. Sharing
            saves hardly any weights where there is an edge bias, but much of the operations; in
            the simple transformer it saves weights only.
Rule        5 paired seeds of other weights and inputs, which matter to times only; counts have to
            agree in every seed. The bounds were set after one seed of a pilot. Weights: entries of
            all weight matrices, without biases and norms. Operations: multiplications with
            addition, counted by torch's FlopCounterMode. Weights missed, edge operations missed,
            node operations missed: the counted number less the notebook's; operations missed: the
            largest difference from our formulas, over the parts and the whole. Attention over
            formula: counted operations of attention without the edge bias over L(3nd + n^2 d); the
            notebook counts by orders, so that a factor of 2 is allowed (0.5 to 2), at one size at
            least. Sharing saves under 1% of the weights if at least 0.99 of them stay, and over a
            quarter of the operations if at most 0.75 stay. Times are medians of 5 rounds,
            interleaved in one process on one thread. Time over edge bias: over that of an edge bias
            of the same sizes with own feed-forwards (for that arm itself a copy).
Cost        3 min on 1 core; nothing else may compute meanwhile; `--nodes 64` under 1 min
"""

import math
import re
from functools import partial

import core
from core import OURS, Check, Claim

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROUNDS = 5  # of interleaved forward passes

parser = core.make_parser(__doc__, seeds=5)
parser.add_argument(
    "--model",
    nargs="+",
    choices=["edge-bias", "path", "cluster"],
    default=["edge-bias"],
    help="edge bias on nodes, or the simple transformer on pairs by path or cluster attention",
)
parser.add_argument(
    "--feedforwards",
    nargs="+",
    choices=["own", "shared"],
    default=["own"],
    help="edge feed-forward: one per layer (l = L), or one for all (l = 1)",
)
parser.add_argument(
    "--nodes", nargs="+", type=core.integer(2, 2048), default=[256], help="nodes n of the graph"
)
parser.add_argument("--layers", nargs="+", type=core.integer(1, 64), default=[4], help="layers L")
parser.add_argument(
    "--pair-dim", nargs="+", type=core.integer(1, 256), default=[8], help="features e of a pair"
)
parser.add_argument(
    "--dim", nargs="+", type=core.layer_width, default=[100], help="width d of a node"
)
parser.add_argument(
    "--heads", nargs="+", type=core.positive_int, default=[2], help="heads of the attention"
)

ARMS = {  # the baseline first; a run with flags takes these
    "edge bias": {},
    "edge bias, shared": {"feedforwards": "shared"},
    "simple": {"model": "path"},
    "simple, shared": {"model": "path", "feedforwards": "shared"},
    "cluster": {"model": "cluster"},
}
ABLATIONS = {  # what else the claims read
    "edge bias, 64 nodes": {"nodes": 64},
    "edge bias, 1024 nodes": {"nodes": 1024},
    "edge bias, shared, 64 nodes": {"feedforwards": "shared", "nodes": 64},
    "edge bias, shared, 1024 nodes": {"feedforwards": "shared", "nodes": 1024},
    "simple, 64 nodes": {"model": "path", "nodes": 64},
    "simple, 1024 nodes": {"model": "path", "nodes": 1024},
    "edge bias, 32 features": {"pair_dim": 32},
    "edge bias, shared, 32 features": {"feedforwards": "shared", "pair_dim": 32},
    "simple, 32 features": {"model": "path", "pair_dim": 32},
}
COLUMNS = [
    "weights",
    "million operations",
    "attention over formula",
    "time over edge bias",
    "time, ms",
]
ROWS = [  # of the entry's table; all arms stand in its CSV
    "edge bias",
    "edge bias, shared",
    "simple",
    "simple, shared",
    "cluster",
    "edge bias, 1024 nodes",
    "edge bias, shared, 1024 nodes",
    "simple, 1024 nodes",
    "simple, 64 nodes",
]
TINY = {"nodes": 8, "layers": 2, "pair_dim": 3, "dim": 8}
PARTS = {  # of a model's operations, with the colour of its bar
    "edge feed-forward": "#0072B2",
    "edge bias": "#56B4E9",
    "attention of nodes": "#D55E00",
    "feed-forward of nodes": "#E69F00",
    "two heads of pairs": "#009E73",
    "product of pairs, n^3": "#CC79A7",
}


def trial(config, seed, job):
    """Count weights and operations of a forward pass, then time it against edge bias."""
    if config.dim % config.heads:
        raise core.UsageError(f"--heads {config.heads}: they do not divide --dim {config.dim}")
    rng = core.stream(seed, "train")
    n = config.nodes
    x = torch.from_numpy(rng.standard_normal((n, config.dim), np.float32)).to(job.device)
    pair_shape = (n * n, config.pair_dim)
    pairs = torch.from_numpy(rng.standard_normal(pair_shape, np.float32)).to(job.device)
    with core.initialised_from(seed):
        model = make_model(config).to(job.device)
        baseline = EdgeBiasTransformer(config, config.layers).to(job.device)
    model.requires_grad_(False)
    baseline.requires_grad_(False)

    operations = count_operations(model, x, pairs)
    total = operations["all"]
    formula = formulas(config)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    steps = {"own": partial(model, x, pairs), "baseline": partial(baseline, x, pairs)}
    if config.model != "edge-bias":
        attention = model.layers[0].attention
        steps["heads"] = partial(attention.heads, pairs)
        steps["product"] = partial(attention.multiply, *attention.heads(pairs))
    seconds = core.interleaved_medians(steps, ROUNDS, job.device)

    missed = {part: operations[part] - formula[part] for part in operations}
    attention_noted = config.layers * (3 * n * config.dim + n**2 * config.dim)
    return {
        "time over edge bias": seconds["own"] / seconds["baseline"],
        "time, ms": 1000 * seconds["own"],
        "million operations": total / 1e6,
        "weights": weights,
        "weights missed": weights - formula["weights"],
        "edge operations missed": missed["edge feed-forward"],
        "node operations missed": missed["feed-forward of nodes"],
        "operations missed": max(abs(number) for number in missed.values()),
        "attention over formula": divide(operations["attention of nodes"], attention_noted),
        "product over heads": divide(
            operations["product of pairs, n^3"], operations["two heads of pairs"]
        ),
        "time over heads": divide(seconds.get("product", 0.0), seconds.get("heads", 0.0)),
        "share of parts": np.array([operations[part] / total for part in PARTS]),
    }


def divide(number, by):
    """number / by; NaN where one of them is 0, which a model has not."""
    return number / by if number and by else math.nan


def make_model(config):
    """The model that the arm names: x [N, D], pairs [N * N, E] -> nodes or pairs."""
    count = config.layers if config.feedforwards == "own" else 1
    if config.model == "edge-bias":
        return EdgeBiasTransformer(config, count)
    return SimpleTransformer(config, count)


class EdgeBiasAttention(nn.Module):
    """Attention over all nodes, biased by pair features: [N, D], [N * N, E] -> [N, D].

    The logit of a pair is q k^T / sqrt(D/H) + Linear(E -> H) of its features. Source: graph
    notebook, 13/4, "Edge bias transformer".
    """

    def __init__(self, dim, heads, pair_dim):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.bias = nn.Linear(pair_dim, heads)

    def forward(self, x, pairs):
        query = self.split_heads(self.query(x))
        key = self.split_heads(self.key(x))
        value = self.split_heads(self.value(x))
        bias = self.bias(pairs).T.unflatten(1, (len(x), len(x)))  # [H, N, N]
        logits = query @ key.transpose(1, 2) / math.sqrt(query.shape[2]) + bias
        mixed = logits.softmax(dim=2) @ value
        return self.out(mixed.transpose(0, 1).flatten(1))

    def split_heads(self, x):
        """[N, D] -> [H, N, D/H]."""
        return x.unflatten(1, (self.heads, -1)).transpose(0, 1)


class EdgeBiasTransformer(nn.Module):
    """A transformer on nodes with an edge bias: x [N, D], pairs [N * N, E] -> [N, D].

    The first `count` layers change the pairs by an edge feed-forward; later ones take them as
    they are, so that count is the notebook's l.
    """

    def __init__(self, config, count):
        super().__init__()
        self.layers = nn.ModuleList()
        self.edge_feedforwards = nn.ModuleList()
        for number in range(config.layers):
            mixing = EdgeBiasAttention(config.dim, config.heads, config.pair_dim)
            feedforward = core.FeedForward(config.dim, 4 * config.dim)
            self.layers.append(core.TransformerLayer(mixing, feedforward, config.dim))
            if number < count:
                self.edge_feedforwards.append(
                    core.FeedForward(config.pair_dim, 4 * config.pair_dim)
                )

    def forward(self, x, pairs):
        for number, layer in enumerate(self.layers):
            if number < len(self.edge_feedforwards):
                pairs = pairs + self.edge_feedforwards[number](pairs)
            x = layer(x, pairs)
        return x


class PairAttention(nn.Module):
    """Two heads of the pairs, multiplied: [N * N, E] -> [N * N, 1].

    "path": (E w1)(E w2), a sum over the nodes between i and j; "cluster": (E w1)(E w2)^T, the node
    axes of the second swapped. Source: graph notebook, 13/4.
    """

    def __init__(self, pair_dim, kind):
        super().__init__()
        self.swap = kind == "cluster"
        self.first = nn.Linear(pair_dim, 1, bias=False)
        self.second = nn.Linear(pair_dim, 1, bias=False)

    def heads(self, pairs):
        """[N * N, E] -> [N, N] and [N, N]."""
        n = math.isqrt(len(pairs))
        return self.first(pairs).view(n, n), self.second(pairs).view(n, n)

    def multiply(self, first, second):
        """[N, N] and [N, N] -> [N, N]."""
        return first @ (second.T if self.swap else second)

    def forward(self, pairs):
        product = self.multiply(*self.heads(pairs))
        return product.view(-1, 1) / len(product)


class PairLayer(nn.Module):
    """pairs + feedforward(pairs), then + attention in every channel: [N * N, E] -> [N * N, E]."""

    def __init__(self, feedforward, attention):
        super().__init__()
        self.edge_feedforward = feedforward
        self.attention = attention

    def forward(self, pairs):
        pairs = pairs + self.edge_feedforward(pairs)
        return pairs + self.attention(pairs)


class SimpleTransformer(nn.Module):
    """The notebook's "simple og transformer": x [N, D], unused, pairs [N * N, E] -> [N * N, E].

    Each layer applies an edge feed-forward; there are `count` of them, the last for the rest.
    """

    def __init__(self, config, count):
        super().__init__()
        self.layers = nn.ModuleList()
        feedforward = None
        for number in range(config.layers):
            if number < count:
                feedforward = core.FeedForward(config.pair_dim, 4 * config.pair_dim)
            attention = PairAttention(config.pair_dim, config.model)
            self.layers.append(PairLayer(feedforward, attention))

    def forward(self, x, pairs):
        for layer in self.layers:
            pairs = layer(pairs)
        return pairs


def count_operations(model, x, pairs):
    """Multiplications with addition of a forward pass: {part: number, "all": number}."""
    with FlopCounterMode(display=False) as counter:
        model(x, pairs)
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    bias = count_in(flops, r"mixing\.bias")
    heads = count_in(flops, r"attention\.(first|second)")
    return {
        "edge feed-forward": count_in(flops, r"edge_feedforward(s\.\d+)?"),
        "edge bias": bias,
        "attention of nodes": count_in(flops, r"mixing") - bias,
        "feed-forward of nodes": count_in(flops, r"feedforward"),
        "two heads of pairs": heads,
        "product of pairs, n^3": count_in(flops, r"attention") - heads,
        "all": flops["Global"] // 2,
    }


def count_in(flops, pattern):
    """Operations of the modules whose name ends with a pattern, after a dot."""
    found = 0
    for name, number in flops.items():
        if re.search(rf"\.{pattern}$", name):
            found += number // 2  # a multiplication and an addition
    return found


def formulas(config):
    """Weights, and the operations of each part: {"weights": number, part: number}."""
    n, e, d = config.nodes, config.pair_dim, config.dim
    layers = config.layers
    count = layers if config.feedforwards == "own" else 1
    found = dict.fromkeys(PARTS, 0)
    if config.model == "edge-bias":
        found["weights"] = 8 * e**2 * count + layers * (config.heads * e + 4 * d**2 + 8 * d**2)
        found["edge feed-forward"] = count * n**2 * 8 * e**2
        found["edge bias"] = layers * config.heads * n**2 * e
        found["attention of nodes"] = layers * (4 * n * d**2 + 2 * n**2 * d)
        found["feed-forward of nodes"] = layers * n * 8 * d**2
    else:
        found["weights"] = 8 * e**2 * count + layers * 2 * e
        found["edge feed-forward"] = layers * n**2 * 8 * e**2
        found["two heads of pairs"] = layers * 2 * n**2 * e
        found["product of pairs, n^3"] = layers * n**3
    found["all"] = sum(found[part] for part in PARTS)
    return found


def exact(metric, *arms):
    """Checks that a difference of counts is 0 in these arms."""
    return [Check(metric, equals=0, arm=arm) for arm in arms]


CLAIMS = [
    Claim(
        "The transformer with an edge bias has 8e^2 l + L(4d^2 + 8d^2) weights and 2e more per "
        "layer for the edge bias",
        "13/4",
        *exact("weights missed", "edge bias", "edge bias, shared"),
        *exact("weights missed", "edge bias, 32 features", "edge bias, shared, 32 features"),
    ),
    Claim(
        "The simple transformer has 8e^2 weights per feed-forward and 2e per layer for two heads",
        "13/4",
        *exact("weights missed", "simple", "simple, shared", "cluster", "simple, 32 features"),
    ),
    Claim(
        "An edge feed-forward takes n^2 8e^2 operations, and a feed-forward of nodes n 8d^2",
        "13/4",
        *exact("edge operations missed", "edge bias", "edge bias, shared", "simple"),
        *exact("edge operations missed", "edge bias, 32 features", "edge bias, 1024 nodes"),
        *exact("node operations missed", "edge bias", "edge bias, 1024 nodes"),
    ),
    Claim(
        "Multi-head attention takes 3nd + n^2 d operations",
        "13/4",
        Check(
            "attention over formula",
            between=(0.5, 2),
            any_arm=("edge bias, 64 nodes", "edge bias", "edge bias, 1024 nodes"),
        ),
    ),
    Claim(
        "Attention takes 4nd^2 + 2n^2 d operations, and path or cluster attention 2n^2 e + n^3",
        OURS,
        *exact("operations missed", "edge bias", "edge bias, shared", "simple", "cluster"),
        *exact("operations missed", "edge bias, 64 nodes", "edge bias, 1024 nodes"),
        *exact("operations missed", "simple, 64 nodes", "simple, 1024 nodes"),
        *exact("operations missed", "edge bias, 32 features", "simple, 32 features"),
    ),
    Claim(
        "At 256 nodes a shared edge feed-forward saves an edge bias time and over a quarter of the "
        "operations, but under 1% of the weights; the simple transformer over half of the weights, "
        "but no operations",
        OURS,
        Check("weights", above=0.99, arm="edge bias, shared", over="edge bias"),
        Check("million operations", below=0.75, arm="edge bias, shared", over="edge bias"),
        Check("time over edge bias", below=1, arm="edge bias, shared"),
        Check("weights", below=0.5, arm="simple, shared", over="simple"),
        Check("million operations", equals=0, arm="simple, shared", minus="simple"),
    ),
    Claim(
        "At 256 nodes the simple transformer takes fewer operations and less time than an edge "
        "bias with own feed-forwards; at 1024 nodes more operations",
        OURS,
        Check("million operations", below=1, arm="simple", over="edge bias"),
        Check(
            "million operations", above=1, arm="simple, 1024 nodes", over="edge bias, 1024 nodes"
        ),
        Check("time over edge bias", below=1, arm="simple"),
    ),
]


def plot(run):
    """{name of the file: figure}."""
    return {"operations": draw_operations(run), "time": draw_times(run)}


def draw_operations(run):
    """Share of each part in the operations of the simple transformer, one bar per size."""
    sizes = {"simple, 64 nodes": "n = 64", "simple": "n = 256", "simple, 1024 nodes": "n = 1024"}
    arms = list(run.arms)
    names = arms
    if run.is_of_record:
        arms = list(sizes)
        names = list(sizes.values())
    figure, axes = core.new_figure(
        run,
        "The n^3 product grows from a tenth of the simple transformer's operations to two thirds",
        "Share of each part in the operations of a forward pass, by number of nodes",
        height=0.45 * len(arms) + 1.6,
    )
    axis = axes[0, 0]
    shares = np.array([run.values(arm, "share of parts")[0] for arm in arms])
    left = np.zeros(len(arms))
    for number, (part, colour) in enumerate(PARTS.items()):
        if shares[:, number].any():
            axis.barh(range(len(arms)), shares[:, number], left=left, color=colour, label=part)
        left += shares[:, number]
    axis.set_yticks(range(len(arms)), names)
    axis.invert_yaxis()
    axis.grid(False)
    axis.set(xlim=(0, 1), xlabel="share of all operations")
    axis.legend(fontsize=10, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    return figure


def draw_times(run):
    """Time over that of an edge bias with own feed-forwards, by nodes; every seed a dot."""
    figure, axes = core.new_figure(
        run,
        "With an edge bias a shared edge feed-forward takes less time than own ones",
        "Time of a forward pass over that of an edge bias with own feed-forwards, by nodes",
        width=7.0,
        height=4.0,
    )
    axis = axes[0, 0]
    lines = {}  # {arm without its size: [(nodes, arm)]}
    for arm, settings in run.arms.items():
        name = arm.removesuffix(f", {settings['nodes']} nodes")
        lines.setdefault(name, []).append((settings["nodes"], arm))
    for name, points in lines.items():
        if len(lines) > 1 and (len(points) == 1 or name == "edge bias"):
            continue  # one size makes no line; edge bias is the dashed line at 1
        points.sort()
        colour = core.arm_colour(run, name if name in run.arms else points[0][1])
        nodes = [number for number, _ in points]
        ratios = np.array([run.values(arm, "time over edge bias") for _, arm in points])
        axis.plot(nodes, ratios, "o", color=colour, alpha=0.4, markersize=4)
        axis.plot(nodes, ratios.mean(axis=1), color=colour, label=name)
    axis.axhline(1, color="black", linestyle="--", linewidth=1, label="own feed-forwards")
    axis.set(xscale="log", xlabel="nodes", ylabel="time / time of edge bias", ylim=(0, None))
    ticks = sorted({settings["nodes"] for settings in run.arms.values()})
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
    axis.legend(fontsize=10, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY, timing=True, rows=ROWS)
