"""Are the notebook's degrees and edge-type ratios those of one stored batch, or of the whole set?

Notebook    graph notebook: 6/3 (number of neighbours), 10.3 (edge types)
Setup       Training graphs of PATTERN as its authors generate it: 32 or all 10,000, in stored order
            (100 graphs with one pattern, then 100 with the next) or shuffled, cut into batches of
            32, the notebook's batch size. Each seed draws its own 100 patterns. The recalls of 6/3
            are fractions of 3,055 and 576 of the table's 3,631 nodes: 18 pattern nodes per graph,
            by arithmetic that no check tests. We read p[connect], the notebook's chance that two
            nodes are joined, as the nodes' shares of neighbours, summed over a batch and divided by
            its pairs; its code leaves open which pairs it counts.
Hypothesis  A stored batch has the table's range of 24 to 82 neighbours; a node outside the pattern
            has 0.2030 of its neighbours on the pattern, a node on it 0.1584. Ours: both shares
            follow from the size of the one pattern that stored graphs share, so the notebook's are
            those of 18 nodes, and neither they nor the range are those of the whole set.
Rule        10 paired seeds. Rank: share of a set's batches that lie below the notebook's number;
            the number is usual for a batch if its rank is between 0.025 and 0.975. Outside share
            and pattern share: mean share of neighbours on the pattern, over the nodes outside it
            and on it; share gap: the first less the second. Pairs gap: pairs per node outside less
            pairs per node on the pattern; the four printed p[connect] leave at most 1.2 for it.
            Error of a share: mean over patterns of the share in all graphs with that pattern less
            the share that its size implies; small within 0.005. Implied size: the size at which a
            share has its expected value. Low and high implied size: 95% interval of the size that
            the notebook's two shares imply together, by the errors of batches with one pattern; 18
            has to lie inside. Size disagreement: the size that the pattern share implies less the
            one that the outside share implies; the notebook's is not that of a shuffled batch if
            its rank there is below 0.025. The whole set is compared with 24, 82 and 0.1584.
Cost        under 1 min on 2 cores
"""

import core
from core import OURS, Check, Claim

import numpy as np

parser = core.make_parser(__doc__, seeds=10)
parser.add_argument(
    "--graphs", nargs="+", type=core.integer(32, 10_000), default=[32], help="training graphs"
)
parser.add_argument(
    "--order",
    nargs="+",
    choices=["stored", "shuffled"],
    default=["stored"],
    help="stored: pattern after pattern; shuffled: a batch has many patterns",
)

ARMS = {  # the baseline first; a run with flags takes these
    "one stored batch": {},
    "one shuffled batch": {"order": "shuffled"},
    "whole set, stored": {"graphs": 10_000},
    "whole set, shuffled": {"graphs": 10_000, "order": "shuffled"},
}
ABLATIONS = {}
COLUMNS = [
    "pattern share",
    "outside share",
    "fewest neighbours",
    "mean neighbours",
    "most neighbours",
]
ROWS = ["one stored batch", "one shuffled batch", "whole set, stored"]  # a whole set has no order
TINY = {"graphs": 32}

BATCH = 32
DEGREES = np.array([*range(24, 80), 81, 82])
NODES = np.array(  # of each degree; the notebook's table counts node-neighbour pairs instead
    [
        *(3, 3, 4, 7, 9, 15, 15, 24, 31, 33, 44, 76, 75, 106, 97, 106, 124, 130, 149, 131),
        *(157, 169, 161, 156, 154, 186, 160, 147, 135, 127, 118, 90, 101, 78, 66, 65, 64, 47),
        *(51, 34, 28, 33, 17, 25, 18, 17, 6, 6, 5, 3, 5, 2, 4, 5, 4, 2, 1, 2),
    ]
)
NOTEBOOK = {
    "nodes": 3631 / BATCH,
    "fewest neighbours": 24,
    "mean neighbours": NODES @ DEGREES / 3631,
    "most neighbours": 82,
    "outside share": 0.2030,
    "pattern share": 0.1584,
    "p[connect] 0, 0": 0.0074,  # label of the node, label of the other
    "p[connect] 0, 1": 0.0019,
    "p[connect] 1, 0": 0.0078,
    "p[connect] 1, 1": 0.0015,
    "pairs gap": 1.2,
}


def trial(config, seed, job):
    """Draw graphs, measure each, and rank the notebook's numbers among their batches."""
    data = core.PatternData(seed)
    if config.order == "stored":
        graphs = data.first(config.graphs)
    else:
        graphs = core.shuffled(data, config.graphs)
    rows = [measure_graph(graph) for graph in graphs]
    measured = {name: np.array([row[name] for row in rows]) for name in rows[0]}

    batches = []
    for start in range(0, len(graphs) - BATCH + 1, BATCH):
        batches.append(summarise(measured, np.arange(start, start + BATCH)))
    patterns = []
    for number in np.unique(measured["pattern"]):
        patterns.append(summarise(measured, np.flatnonzero(measured["pattern"] == number)))

    whole = summarise(measured, np.arange(len(graphs)))
    low, high = implied_size_interval(batches)
    return {
        **whole,
        **rank_notebook(batches),
        "share gap": whole["outside share"] - whole["pattern share"],
        "outside share error": share_error(patterns, "outside share"),
        "pattern share error": share_error(patterns, "pattern share"),
        "implied size, low": low,
        "implied size, high": high,
        "nodes by degree": measured["histogram"].sum(axis=0) / measured["nodes"].sum(),
        "size by pattern": [pattern["pattern nodes"] for pattern in patterns],
        "outside share by pattern": [pattern["outside share"] for pattern in patterns],
        "pattern share by pattern": [pattern["pattern share"] for pattern in patterns],
    }


def measure_graph(graph):
    """Counts and sums of one graph: {name: number or histogram}."""
    adjacency = graph.adjacency()
    on_pattern = graph.label == 1
    degree = adjacency.sum(axis=1)
    share = adjacency[:, on_pattern].sum(axis=1) / np.maximum(degree, 1)
    return {
        "pattern": graph.pattern,
        "nodes": len(degree),
        "pattern nodes": on_pattern.sum(),
        "fewest": degree.min(),
        "total": degree.sum(),
        "most": degree.max(),
        "outside sum": share[~on_pattern].sum(),
        "pattern sum": share[on_pattern].sum(),
        "histogram": np.bincount(degree, minlength=128)[:128],
    }


def summarise(measured, chosen):
    """The notebook's numbers, of the chosen graphs together: {name: number}."""
    graph = {name: values[chosen] for name, values in measured.items()}
    outside_nodes = graph["nodes"] - graph["pattern nodes"]
    outside_share = graph["outside sum"].sum() / outside_nodes.sum()
    pattern_share = graph["pattern sum"].sum() / graph["pattern nodes"].sum()
    # Pairs of a node, itself included; large graphs have more nodes outside
    outside_pairs = np.average(graph["nodes"], weights=outside_nodes)
    pattern_pairs = np.average(graph["nodes"], weights=graph["pattern nodes"])
    from_outside, from_pattern = implied_sizes(outside_share, pattern_share)
    return {
        "nodes": graph["nodes"].mean(),
        "pattern nodes": graph["pattern nodes"].mean(),
        "fewest neighbours": graph["fewest"].min(),
        "mean neighbours": graph["total"].sum() / graph["nodes"].sum(),
        "most neighbours": graph["most"].max(),
        "outside share": outside_share,
        "pattern share": pattern_share,
        "p[connect] 0, 0": (1 - outside_share) / outside_pairs,
        "p[connect] 0, 1": outside_share / outside_pairs,
        "p[connect] 1, 0": (1 - pattern_share) / pattern_pairs,
        "p[connect] 1, 1": pattern_share / pattern_pairs,
        "pairs gap": outside_pairs - pattern_pairs,
        "implied size": (from_outside + from_pattern) / 2,
        "size disagreement": from_pattern - from_outside,
        "patterns": len(np.unique(graph["pattern"])),
    }


def expected_shares(pattern_size):
    """Expected outside share and pattern share for a pattern of so many nodes.

    Averages over the sizes of the communities. A node on the pattern meets all others alike, so
    its share is exact; outside, it is expected neighbours there over all expected neighbours.
    """
    sizes = np.arange(*core.SIZES)
    two = np.convolve(np.ones(len(sizes)), np.ones(len(sizes)))
    ways = np.convolve(two, two)  # to draw each total size of the four other communities
    others = 4 * sizes[0] + np.arange(len(ways))
    own = sizes[:, None]  # size of the node's own community

    to_pattern = core.EDGE_PATTERN * pattern_size
    to_rest = core.EDGE_INSIDE * (own - 1) + core.EDGE_BETWEEN * others
    outside_share = np.average(to_pattern / (to_pattern + to_rest), weights=own * ways)
    nodes = pattern_size + own + others
    pattern_share = np.average((pattern_size - 1) / (nodes - 1), weights=np.ones_like(own) * ways)
    return outside_share, pattern_share


FORMULA = np.array([expected_shares(size) for size in range(60)])  # [size, 2]


def implied_sizes(outside_share, pattern_share):
    """Pattern sizes at which the two shares have their expected values."""
    sizes = np.arange(len(FORMULA))
    from_outside = np.interp(outside_share, FORMULA[:, 0], sizes)
    from_pattern = np.interp(pattern_share, FORMULA[:, 1], sizes)
    return from_outside, from_pattern


def share_error(patterns, name):
    """Mean over the patterns of a share less what the pattern's size implies."""
    column = ["outside share", "pattern share"].index(name)
    errors = [
        pattern[name] - FORMULA[round(pattern["pattern nodes"]), column] for pattern in patterns
    ]
    return np.mean(errors)


def implied_size_interval(batches):
    """95% interval of the notebook's pattern size, from batches with one pattern; NaN without."""
    errors = []
    for batch in batches:
        if batch["patterns"] == 1:
            errors.append(batch["implied size"] - batch["pattern nodes"])
    size = np.mean(implied_sizes(NOTEBOOK["outside share"], NOTEBOOK["pattern share"]))
    return size - np.quantile(errors or [np.nan], [0.975, 0.025])


def rank_notebook(batches):
    """Share of the batches below each number of the notebook: {"rank of NAME": share}."""
    from_outside, from_pattern = implied_sizes(NOTEBOOK["outside share"], NOTEBOOK["pattern share"])
    numbers = NOTEBOOK | {"size disagreement": from_pattern - from_outside}
    ranks = {}
    for name, number in numbers.items():
        ranks[f"rank of {name}"] = np.mean([batch[name] < number for batch in batches])
    return ranks


def usual(*names):
    """Checks that the notebook's numbers are usual for a stored batch."""
    return [
        Check(f"rank of {name}", between=(0.025, 0.975), arm="whole set, stored") for name in names
    ]


CLAIMS = [
    Claim(
        "The table's nodes and its fewest (24), mean and most (82) neighbours are usual for a "
        "stored batch",
        "6/3",
        *usual("nodes", "fewest neighbours", "mean neighbours", "most neighbours"),
    ),
    Claim(
        "A share of neighbours on the pattern of 0.2030 outside it and 0.1584 on it is usual for a "
        "stored batch",
        "10.3",
        *usual("outside share", "pattern share"),
    ),
    Claim(
        "Nodes on the pattern have a smaller share of their neighbours there than other nodes",
        "10.3",
        Check("share gap", above=0, arm="one stored batch"),
    ),
    Claim(
        "The four printed p[connect] are usual for a stored batch, read as its shares of "
        "neighbours divided by its pairs",
        "10.3",
        *usual("p[connect] 0, 0", "p[connect] 0, 1", "p[connect] 1, 0", "p[connect] 1, 1"),
        *usual("pairs gap"),
    ),
    Claim(
        "In the mean over patterns both shares are as the pattern's size implies",
        OURS,
        Check("outside share error", between=(-0.005, 0.005), arm="whole set, stored"),
        Check("pattern share error", between=(-0.005, 0.005), arm="whole set, stored"),
    ),
    Claim(
        "The two printed shares allow a pattern of 18 nodes, the number of the recalls; the sizes "
        "that they imply differ as in a stored batch, by less than in nearly all shuffled ones",
        OURS,
        Check("implied size, low", below=18, arm="whole set, stored"),
        Check("implied size, high", above=18, arm="whole set, stored"),
        *usual("size disagreement"),
        Check("rank of size disagreement", below=0.025, arm="whole set, shuffled"),
    ),
    Claim(
        "The whole set has a wider range of degrees than the table and a larger pattern share",
        OURS,
        Check("fewest neighbours", below=24, arm="whole set, stored"),
        Check("most neighbours", above=82, arm="whole set, stored"),
        Check("pattern share", above=0.1584, arm="whole set, stored"),
    ),
]


def plot(run):
    """{name of the file: figure}."""
    return {"degrees": draw_degrees(run), "shares": draw_shares(run)}


def draw_degrees(run):
    """Share of nodes by degree, and the notebook's table."""
    figure = core.draw_curves(
        run,
        "nodes by degree",
        "The notebook's degrees fit one stored batch; the whole set has a wider range",
        "Share of nodes by their number of neighbours",
        "neighbours of a node",
        "share of nodes",
        panels={
            "one batch of 32 graphs": ["one stored batch"],
            "all graphs": ["whole set, stored"],
        },
    )
    if figure is None:
        return None
    for axis in figure.axes:
        axis.plot(DEGREES, NODES / 3631, color="black", linestyle="--", label="notebook")
        core.legend_below(axis)
    return figure


def draw_shares(run):
    """Both shares of each pattern by its size."""
    arm = "whole set, stored" if run.shows("whole set, stored") else next(iter(run.arms))
    figure, axes = core.new_figure(
        run,
        "In the mean both shares are those that the size of the pattern implies",
        f"Share of neighbours on the pattern by the pattern's size, {arm}",
        columns=2,
        width=9.0,
        height=4.2,
        sharey=True,
    )
    sizes = np.arange(*core.SIZES)
    panels = {"nodes outside the pattern": "outside share", "pattern nodes": "pattern share"}
    for column, (panel, name) in enumerate(panels.items()):
        axis = axes[0, column]
        for result in run.results(arm):
            sizes_shown = result["size by pattern"]
            axis.plot(sizes_shown, result[f"{name} by pattern"], ".", color="#56B4E9", markersize=3)
        axis.plot(sizes, FORMULA[sizes, column], color="black", label="expected by size")
        core.draw_levels(axis.axhline, {f"notebook: {NOTEBOOK[name]:.4f}": NOTEBOOK[name]})
        axis.axvline(18, color="black", linestyle=":", linewidth=1, label="18, by the recalls")
        axis.set(title=panel, xlabel="nodes of the pattern")
        core.legend_below(axis)
    axes[0, 0].set_ylabel("share of neighbours on the pattern")
    return figure


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY, rows=ROWS)
