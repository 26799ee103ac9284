"""Which norm in which place does gating need, and is the notebook's table of eight more than noise?

Notebook    graph notebook: 6/3, 13/3, 15.3
Setup       Four gating layers, width 100, feed-forward 200; Adam, gradient norm clipped at 5.
            "layer/batch" is a layer norm before mixing and a batch norm before the feed-forward; "+
            inner batch" adds one inside it, before its ReLU. The notebook's eight rows come from
            runs on all of PATTERN that were still going. Here: 1,600 training graphs of all 100
            patterns, batches of 8, two epochs at 1e-3, scored on 200 test graphs after each.
            Overfit: 32 graphs of one pattern, one batch, 100 epochs at 1e-4.
Hypothesis  Norms first are better than norms after the residuals. The eight rows stand in the
            notebook's order, from 0.835 to 0.856, and a batch norm before the feed-forward gains
            0.02 over a layer norm; a batch norm inside the feed-forward adds nothing. Ours: other
            seeds repeat an order, but not the notebook's. In the overfit set-up a batch norm
            before mixing or before the feed-forward lowers the oscillation.
Rule        16 paired seeds, 5 for ablations. With 8 both gains were open (-0.0031 ± 0.013 and
            -0.0029 ± 0.014): by their spread 16 give ± 0.009.

            Best score: largest balanced accuracy over the epochs.
            Rank correlation: Spearman's, of the eight best scores of a seed with the notebook's
            (above 0: the same direction), and with the means of the other seeds. Gain before the
            feed-forward: best score of a batch norm there minus that of a layer norm, with a layer
            norm before mixing, mean over both feed-forwards; the notebook prints 0.021 and 0.016,
            and half of that, 0.01, counts. Gain inside: the same for the batch norm inside the
            feed-forward, mean over four pairs; it adds nothing below 0.01. Oscillation: mean
            absolute change of the score per epoch in the second half (held out: in the last of two
            epochs); lower: at most 0.5 of that of two layer norms.
Cost        18 min on 2 cores
"""

import core
from core import OURS, Check, Claim

import numpy as np

parser = core.make_parser(__doc__, seeds=16, ablation_seeds=5)
parser.add_argument(
    "--task",
    nargs="+",
    choices=["held-out", "overfit"],
    default=["held-out"],
    help="train on graphs of all patterns and score on test graphs, or score on the same graphs",
)
parser.add_argument(
    "--norm1",
    nargs="+",
    choices=["layer", "batch", "none"],
    default=["layer"],
    help="norm before mixing",
)
parser.add_argument(
    "--norm2",
    nargs="+",
    choices=["layer", "batch", "none"],
    default=["layer"],
    help="norm before the feed-forward",
)
parser.add_argument(
    "--feedforward-norm",
    nargs="+",
    choices=["none", "batch"],
    default=["none"],
    help="norm inside the feed-forward, before its ReLU",
)
parser.add_argument(
    "--norm-order",
    nargs="+",
    choices=["first", "last"],
    default=["first"],
    help="norms before mixing and feed-forward, or after their residuals",
)
parser.add_argument("--layers", nargs="+", type=core.integer(1, 64), default=[4], help="layers")
parser.add_argument(
    "--lr", nargs="+", type=core.positive_float, default=[1e-3], help="Adam's learning rate"
)
parser.add_argument("--dim", nargs="+", type=core.layer_width, default=[100], help="width")
parser.add_argument(
    "--hidden", nargs="+", type=core.layer_width, default=[200], help="width in the feed-forward"
)
parser.add_argument(
    "--graphs", nargs="+", type=core.integer(2, 10_000), default=[1600], help="training graphs"
)
parser.add_argument(
    "--batch",
    nargs="+",
    type=core.positive_int,
    default=[8],
    help="graphs per step of the held-out task; overfit takes all at once",
)
parser.add_argument(
    "--test-graphs",
    nargs="+",
    type=core.integer(1, 2000),
    default=[200],
    help="test graphs of the held-out task",
)
parser.add_argument(
    "--epochs", nargs="+", type=core.positive_int, default=[2], help="passes over the graphs"
)

INNER = {"feedforward_norm": "batch"}
OVERFIT = {"task": "overfit", "lr": 1e-4, "graphs": 32, "epochs": 100}

ARMS = {  # the notebook's table of eight
    "layer/layer": {},
    "layer/batch": {"norm2": "batch"},
    "batch/layer": {"norm1": "batch"},
    "batch/batch": {"norm1": "batch", "norm2": "batch"},
    "layer/layer + inner batch": INNER,
    "layer/batch + inner batch": {"norm2": "batch"} | INNER,
    "batch/layer + inner batch": {"norm1": "batch"} | INNER,
    "batch/batch + inner batch": {"norm1": "batch", "norm2": "batch"} | INNER,
}
TABLE = {  # balanced accuracy that the notebook prints
    "layer/layer": 0.835,
    "layer/batch": 0.856,
    "batch/layer": 0.852,
    "batch/batch": 0.839,
    "layer/layer + inner batch": 0.835,
    "layer/batch + inner batch": 0.851,
    "batch/layer + inner batch": 0.839,
    "batch/batch + inner batch": 0.837,
}
ABLATIONS = {  # what else the claims read
    "overfit, layer/layer": OVERFIT,
    "overfit, layer/batch": OVERFIT | {"norm2": "batch"},
    "overfit, batch/layer": OVERFIT | {"norm1": "batch"},
    "overfit, layer/layer, norms last": OVERFIT | {"norm_order": "last"},
}
COLUMNS = ["best score", "oscillation"]
ROWS = [
    "layer/layer",
    "layer/batch",
    "batch/layer",
    "batch/batch",
    "overfit, layer/layer",
    "overfit, layer/batch",
    "overfit, batch/layer",
    "overfit, layer/layer, norms last",
]
TINY = {"graphs": 4, "batch": 2, "test_graphs": 2, "epochs": 4, "dim": 8, "hidden": 8}


class NormedLayer(core.TransformerLayer):
    """A transformer layer whose norms differ by place: [V, D] -> [V, D].

    norm1, norm2  "layer", "batch" or "none", of mixing and of the feed-forward
    after_mixing  a further norm of what was mixed, before it is added to x
    order         "first": before mixing and feed-forward; "last": after their residuals
    """

    def __init__(self, mixing, feedforward, dim, norm1, norm2, after_mixing="none", order="first"):
        super().__init__(mixing, feedforward, dim)
        self.norm1 = core.make_norm(norm1, dim)
        self.norm2 = core.make_norm(norm2, dim)
        self.after_mixing = core.make_norm(after_mixing, dim)
        self.order = order

    def forward(self, x, batch):
        if self.order == "first":
            x = x + self.after_mixing(self.mixing(self.norm1(x), batch))
            return x + self.feedforward(self.norm2(x))
        x = self.norm1(x + self.after_mixing(self.mixing(x, batch)))
        return self.norm2(x + self.feedforward(x))


def trial(config, seed, job):
    """Train gating on a part of PATTERN and score on test graphs, or overfit one pattern."""
    if config.task == "overfit":
        graphs = core.PatternData(seed).first(config.graphs)
        train = [core.GraphBatch(graphs, job.device)]
        test = None
    else:
        graphs = core.shuffled(core.PatternData(seed), config.graphs)
        train = make_batches(graphs, config.batch, job.device)
        test_graphs = core.shuffled(core.PatternData(seed, "test"), config.test_graphs)
        test = make_batches(test_graphs, config.batch, job.device)
    with core.initialised_from(seed):
        layers = [make_layer(config) for _ in range(config.layers)]
        model = core.NodeClassifier(layers, config.dim).to(job.device)
    history = core.train(
        model,
        train,
        seed=seed,
        lr=config.lr,
        epochs=config.epochs,
        clip=5.0,
        held_out=test,
        checkpoint=job.checkpoint,
    )
    score = history["recall"].mean(axis=1)
    return {
        "best score": score.max(),
        "oscillation": core.oscillation(score),
        "score by epoch": score,
    }


def make_batches(graphs, size, device):
    """GraphBatches of `size` graphs each, in the given order; the last may be smaller."""
    starts = range(0, len(graphs), size)
    return [core.GraphBatch(graphs[start : start + size], device) for start in starts]


def make_layer(config):
    """One gating layer with the arm's norms: [V, D] -> [V, D]."""
    mixing = core.PositionAttention(config.dim)
    feedforward = core.FeedForward(config.dim, config.hidden, config.feedforward_norm)
    return NormedLayer(
        mixing, feedforward, config.dim, config.norm1, config.norm2, order=config.norm_order
    )


def correlation(one, other):
    """Spearman's rank correlation; 0 where one of them is constant."""
    from scipy import stats

    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return stats.spearmanr(one, other).statistic


def across(run):
    """Order of the eight rows and gains by batch norms: {name: [S]}."""
    ours = {row: run.values(row, "best score") for row in TABLE}
    scores = np.array(list(ours.values()))  # [8, S]
    seeds = scores.shape[1]
    with_notebook = [correlation(scores[:, s], list(TABLE.values())) for s in range(seeds)]
    with_others = []
    for s in range(seeds):
        others = (scores.sum(axis=1) - scores[:, s]) / max(seeds - 1, 1)
        with_others.append(correlation(scores[:, s], others))

    plain = ours["layer/batch"] - ours["layer/layer"]
    with_inner = ours["layer/batch + inner batch"] - ours["layer/layer + inner batch"]
    inside = [ours[f"{row} + inner batch"] - ours[row] for row in list(TABLE)[:4]]
    return {
        "rank correlation with the notebook": np.array(with_notebook),
        "rank correlation with other seeds": np.array(with_others),
        "gain before the feed-forward": (plain + with_inner) / 2,
        "gain inside": np.mean(inside, axis=0),
    }


CLAIMS = [
    Claim(
        "Norms first are better than norms after the residuals",
        "6/3",
        Check(
            "best score",
            above=0,
            arm="overfit, layer/layer",
            minus="overfit, layer/layer, norms last",
        ),
    ),
    Claim(
        "The eight combinations of norms rank as in the notebook's table (correlation above 0)",
        "15.3",
        Check("rank correlation with the notebook", above=0),
    ),
    Claim(
        "With a layer norm before mixing a batch norm before the feed-forward gains about 0.02 "
        "(over 0.01) over a layer norm",
        "15.3",
        Check("gain before the feed-forward", above=0.01),
    ),
    Claim(
        "A batch norm inside the feed-forward adds nothing on held-out graphs",
        "15.3",
        Check("gain inside", below=0.01),
    ),
    Claim(
        "The ranks of the eight combinations correlate with those of other seeds",
        OURS,
        Check("rank correlation with other seeds", above=0),
    ),
    Claim(
        "Overfit, a batch norm before mixing or before the feed-forward lowers the oscillation",
        OURS,
        Check("oscillation", below=0.5, arm="overfit, batch/layer", over="overfit, layer/layer"),
        Check("oscillation", below=0.5, arm="overfit, layer/batch", over="overfit, layer/layer"),
    ),
]


def plot(run):
    """{name of the file: figure}."""
    return {
        "table": draw_table(run),
        "overfit": core.draw_curves(
            run,
            "score by epoch",
            "Overfit, a batch norm before mixing lowers the oscillation of gating",
            "Score by epoch in the overfit set-up, two seeds per arm",
            "epoch",
            "balanced accuracy",
            panels={
                "two layer norms": ["overfit, layer/layer"],
                "batch norm before mixing": ["overfit, batch/layer"],
                "batch norm before the feed-forward": ["overfit, layer/batch"],
            },
            seeds=2,
        ),
    }


def draw_table(run):
    """The eight best scores of every seed beside those that the notebook prints."""
    rows = sorted((row for row in TABLE if run.shows(row)), key=TABLE.get)
    if not rows:
        return None
    figure, axes = core.new_figure(
        run,
        "The eight combinations of norms: ours beside the notebook's",
        "Best score of the eight combinations, in the notebook's order",
        height=0.4 * len(rows) + 1.5,
    )
    axis = axes[0, 0]
    for place, row in enumerate(rows):
        scores = run.values(row, "best score")
        axis.plot(scores, [place] * len(scores), "o", color=core.arm_colour(run, row), alpha=0.6)
        axis.plot(scores.mean(), place, "|", color="black", markersize=16)
        axis.plot(TABLE[row], place, "x", color="black")
    axis.plot([], [], "o", color="grey", label="one seed")
    axis.plot([], [], "|", color="black", markersize=10, label="mean")
    axis.plot([], [], "x", color="black", label="notebook, all of PATTERN")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xlabel("best balanced accuracy on test graphs")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY, across=across, rows=ROWS)
