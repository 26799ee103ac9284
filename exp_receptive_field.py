"""Does a larger receptive field help gating and attention, and what must go with it?

Notebook    graph notebook: 13/3, 14.3, 15.3
Setup       Overfit 16 PATTERN graphs of one pattern: one batch, Adam at 1e-4, gradient norm clipped
            at 5, 100 epochs; four layers, width 100, feed-forward 200. The receptive field [0..r]
            lists the powers of P = D^-1 A by which a pair of nodes is known, by hop unless the arm
            says "by powers". Batch norms stand inside the feed-forward. For all of PATTERN see
            exp_pattern_benchmark.
Hypothesis  Batch norm inside the feed-forward may help gating with a larger field. Ours: PATTERN
            graphs have diameter 2, so hops beyond 2 are empty. The rows of the second and higher
            powers are nearly equal, so gating by powers sums all nodes alike and learns nothing.
            On the training graphs attention with batch norm is worse with [0..4] than with [0, 1].
            What attention lacks is the degree: given as an input, no larger field is needed.
Rule        8 paired seeds. Best score: largest balanced accuracy on the training graphs. A model
            works above 0.8 and learns nothing below 0.55; helps, better, worse: a difference of the
            best scores. Pairs beyond 2 hops: their share of all pairs of nodes; none is below
            0.001. Row difference: mean absolute difference between the entries of P^2 and their
            mean over the rows, relative to the mean entry. Oscillation: mean absolute change of the
            score per epoch in the second half.
Cost        9 min on 2 cores
"""

import core
from core import OURS, Check, Claim

import torch

parser = core.make_parser(__doc__, seeds=8)
parser.add_argument(
    "--mixing",
    nargs="+",
    choices=["gating", "softmax"],
    default=["gating"],
    help="whether a node adds up gated nodes or averages over them",
)
parser.add_argument(
    "--powers",
    nargs="+",
    type=core.int_tuple,
    default=[(0, 1)],
    help="powers of the adjacency, such as 0,1,2,3,4: the receptive field",
)
parser.add_argument(
    "--pair-encoding",
    nargs="+",
    choices=["hop", "powers"],
    default=["hop"],
    help="what a pair's weight sees: its hop, or the powers of the adjacency",
)
parser.add_argument(
    "--feedforward-norm",
    nargs="+",
    choices=["none", "batch"],
    default=["none"],
    help="norm inside the feed-forward, before its ReLU",
)
parser.add_argument(
    "--degree",
    nargs="+",
    choices=["hidden", "given"],
    default=["hidden"],
    help="whether the model gets each node's degree as an input",
)
parser.add_argument("--layers", nargs="+", type=core.integer(1, 64), default=[4], help="layers")
parser.add_argument(
    "--lr", nargs="+", type=core.positive_float, default=[1e-4], help="Adam's learning rate"
)
parser.add_argument("--dim", nargs="+", type=core.layer_width, default=[100], help="width")
parser.add_argument(
    "--hidden", nargs="+", type=core.layer_width, default=[200], help="width in the feed-forward"
)
parser.add_argument(
    "--graphs", nargs="+", type=core.integer(1, 1000), default=[16], help="training graphs"
)
parser.add_argument(
    "--epochs", nargs="+", type=core.integer(4, 100_000), default=[100], help="steps"
)

TO_4 = (0, 1, 2, 3, 4)
TO_8 = (0, 1, 2, 3, 4, 5, 6, 7, 8)
SOFTMAX = {"mixing": "softmax"}
BATCH = {"feedforward_norm": "batch"}
BY_POWERS = {"pair_encoding": "powers"}

ARMS = {  # the baseline first; a run with flags takes these
    "gating, [0, 1]": {},
    "gating, [0..4]": {"powers": TO_4},
    "gating, [0..4], batch norm": {"powers": TO_4} | BATCH,
    "softmax attention, [0, 1], batch norm": SOFTMAX | BATCH,
    "softmax attention, [0..4], batch norm": SOFTMAX | {"powers": TO_4} | BATCH,
}
ABLATIONS = {  # what else the claims and the table read
    "gating, [0, 1], batch norm": BATCH,
    "gating, [0..8]": {"powers": TO_8},
    "gating, [0..8], batch norm": {"powers": TO_8} | BATCH,
    "gating by powers, [0..4]": BY_POWERS | {"powers": TO_4},
    "gating by powers, [0..8]": BY_POWERS | {"powers": TO_8},
    "softmax attention, [0, 1]": SOFTMAX,
    "softmax attention by powers, [0, 1], batch norm": SOFTMAX | BY_POWERS | BATCH,
    "softmax attention by powers, [0..4], batch norm": (
        SOFTMAX | BY_POWERS | {"powers": TO_4} | BATCH
    ),
    "softmax attention, [0, 1], degree given": SOFTMAX | {"degree": "given"},
}
COLUMNS = ["best score", "oscillation"]
ROWS = [  # of the entry's table; all arms stand in its CSV
    "gating, [0, 1]",
    "gating, [0, 1], batch norm",
    "gating, [0..4]",
    "gating, [0..4], batch norm",
    "gating, [0..8], batch norm",
    "gating by powers, [0..4]",
    "softmax attention, [0, 1]",
    "softmax attention, [0, 1], batch norm",
    "softmax attention, [0..4], batch norm",
    "softmax attention, [0, 1], degree given",
]
TINY = {"graphs": 2, "epochs": 4, "dim": 8, "hidden": 8, "lr": 1e-3}


def trial(config, seed, job):
    """Train on graphs that share one pattern, score on the same graphs after each step."""
    graphs = core.PatternData(seed).first(config.graphs)
    batch = core.GraphBatch(graphs, job.device)
    with core.initialised_from(seed):
        layers = [make_layer(config) for _ in range(config.layers)]
        if config.degree == "given":
            layers.insert(0, core.AddDegree(config.dim))
        model = core.NodeClassifier(layers, config.dim).to(job.device)
    history = core.train(
        model,
        [batch],
        seed=seed,
        lr=config.lr,
        epochs=config.epochs,
        clip=5.0,
        checkpoint=job.checkpoint,
    )
    score = history["recall"].mean(axis=1)
    return {
        "best score": score.max(),
        "oscillation": core.oscillation(score),
        "pairs beyond 2 hops": pairs_beyond_2_hops(batch),
        "row difference": row_difference(batch),
        "score by epoch": score,
    }


def make_layer(config):
    """One layer of position attention over the arm's receptive field: [V, D] -> [V, D]."""
    mixing = core.PositionAttention(
        config.dim,
        powers=config.powers,
        encoding=config.pair_encoding,
        activation="softmax" if config.mixing == "softmax" else "sigmoid",
    )
    feedforward = core.FeedForward(config.dim, config.hidden, config.feedforward_norm)
    return core.TransformerLayer(mixing, feedforward, config.dim)


def pairs_beyond_2_hops(batch):
    """Share of the pairs of nodes of one graph that no path of at most two edges joins."""
    pairs = batch.nodes[:, :, None] & batch.nodes[:, None, :]
    _, within_2 = core.pair_encoding(batch, (0, 1, 2), "powers")
    return float((pairs & ~within_2).sum() / pairs.sum())


def row_difference(batch):
    """How far the rows of P^2 are from their mean row, relative to its mean entry; over graphs."""
    power = core.transition_powers(batch.adjacency, batch.nodes, (2,))[:, 0]
    found = []
    for graph, real in zip(power, batch.nodes, strict=True):
        rows = graph[real][:, real]
        found.append((rows - rows.mean(0)).abs().mean() / rows.mean())
    return float(torch.stack(found).mean())


CLAIMS = [
    Claim(
        "With gating, batch norm inside the feed-forward helps larger receptive fields",
        "14.3",
        Check("best score", above=0, arm="gating, [0..4], batch norm", minus="gating, [0..4]"),
        Check("best score", above=0, arm="gating, [0..8], batch norm", minus="gating, [0..8]"),
    ),
    Claim(
        "In the graphs drawn all nodes are within two hops, so that [0..8] by hops equals [0..2]",
        OURS,
        Check("pairs beyond 2 hops", below=0.001, arm="gating, [0..8]"),
    ),
    Claim(
        "By powers beyond [0, 1] gating without batch norm learns nothing",
        OURS,
        Check("best score", below=0.55, arm="gating by powers, [0..4]"),
        Check("best score", below=0.55, arm="gating by powers, [0..8]"),
    ),
    Claim(
        "On the training graphs attention with batch norm is worse with [0..4] than with [0, 1]",
        OURS,
        Check(
            "best score",
            below=0,
            arm="softmax attention, [0..4], batch norm",
            minus="softmax attention, [0, 1], batch norm",
        ),
        Check(
            "best score",
            below=0,
            arm="softmax attention by powers, [0..4], batch norm",
            minus="softmax attention by powers, [0, 1], batch norm",
        ),
    ),
    Claim(
        "Given the degree, softmax attention with [0, 1] scores more, and works without batch norm",
        OURS,
        Check("best score", above=0.8, arm="softmax attention, [0, 1], degree given"),
        Check(
            "best score",
            above=0,
            arm="softmax attention, [0, 1], degree given",
            minus="softmax attention, [0, 1]",
        ),
    ),
]


def plot(run):
    """{name of the file: figure}."""
    return {
        "best": core.draw_points(
            run,
            "best score",
            "A batch norm inside the feed-forward helps gating with a larger receptive field",
            "Best score by arm",
            "best balanced accuracy on the training graphs",
            levels={"works": 0.8},
        ),
        "score": core.draw_curves(
            run,
            "score by epoch",
            "Given the degree, softmax attention with [0, 1] works without batch norm",
            "Score by epoch, all seeds",
            "epoch",
            "balanced accuracy",
            panels={
                "without the degree": [
                    "softmax attention, [0, 1]",
                    "softmax attention, [0, 1], batch norm",
                    "softmax attention, [0..4], batch norm",
                ],
                "degree given": ["softmax attention, [0, 1], degree given"],
            },
            levels={"works": 0.8},
        ),
    }


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY, rows=ROWS)
