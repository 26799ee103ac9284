"""Are the notebook's degrees and edge-type ratios those of one stored batch, or of the whole training set?

Entry       graph notebook, "number of neigbours distrubtion" (6/3) and "ratio of edges types" (10.3)
Hypothesis  The table counts 3631 nodes, 47.9 neighbours each: 32 graphs of 113.5 nodes, one batch. The recalls printed on 6/3
            split it into 3055 + 576 nodes and in no other way: 18 pattern nodes a graph. p[neighbour y | self y] is a mean over
            nodes of the share of neighbours on the pattern: .2030 outside, .1584 on it. Ours: stored graphs share one pattern and
            the shares grow with its size, so those of the set differ. p[connect | ...] is the same share (.0019/.0074 = .203/.797)
            over 107 to 109 pairs a node of either kind: not its edges, nor all pairs of this batch (113.5 or more). Of another
            one? Its nodes outside, more of which are in large graphs, should have about 4 more than those on the pattern.
Rule        5 seeds of 100 patterns; 32 and 10,000 graphs in both orders. Rank of a notebook number: share of the batches below it;
            "usual" is 0.025 to 0.975. A claim stands if the 95% interval of every check lies in its range, and falls if one lies
            wholly outside (CLAIMS, below; fixed before the first full run).
Cost        under 1 min on 2 cores
"""

import numpy as np

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, at_least, one_of

BATCH, SIZES = 32, np.arange(*core.SIZE_RANGE)  # graphs a batch, as in all of the notebook; nodes of a pattern or community
FLAGS = [
    Flag("graphs", at_least(BATCH), (BATCH, 10_000), "graphs: one batch, or the whole set"),
    Flag("order", one_of("stored", "shuffled"), ("stored", "shuffled"), "stored: pattern after pattern; shuffled: they mix"),
    Flag("split", one_of(*core.GRAPHS_PER_PATTERN), ("train",), "which part of the data"),
]
DEGREES = [*range(24, 80), 81, 82]  # the notebook's table, as nodes: its entries over their degree, without the 3631 of self
TABLE = np.array([
    3, 3, 4, 7, 9, 15, 15, 24, 31, 33, 44, 76, 75, 106, 97, 106, 124, 130, 149, 131, 157, 169, 161, 156, 154, 186, 160, 147, 135,
    127, 118, 90, 101, 78, 66, 65, 64, 47, 51, 34, 28, 33, 17, 25, 18, 17, 6, 6, 5, 3, 5, 2, 4, 5, 4, 2, 1, 2])  # fmt: skip
NOTEBOOK = {"nodes": 3631 / 32, "pattern_nodes": 576 / 32, "degree_low": 24, "degree_mean": TABLE @ DEGREES / 3631}
NOTEBOOK |= {"degree_high": 82, "outside_share": 0.2030, "pattern_share": 0.1584, "pairs_gap": 1.2}  # 108.4 - 107.2 at most


def neighbours(graph: core.Graph) -> tuple[np.ndarray, np.ndarray]:
    """Of each node: its neighbours, and those of them on the pattern. Both [n]."""
    n = len(graph.label)
    edges = np.stack(core.upper_triangle(n))[:, np.unpackbits(graph.edges, count=n * (n - 1) // 2).view(bool)]
    node, other = np.concatenate([edges, edges[::-1]], 1)
    return np.bincount(node, minlength=n), np.bincount(node, graph.label[other], n)


def measure(rows: np.ndarray) -> np.ndarray:
    """The numbers of NOTEBOOK, in its order, of some graphs: [graphs, 7] as in `trial` -> [8]."""
    n, on, low, degree, high, outside_share, pattern_share = rows.T
    share, pairs = [outside_share.sum() / (n - on).sum(), pattern_share.sum() / on.sum()], np.average(n, weights=n - on)
    return np.array([n.mean(), on.mean(), low.min(), degree.sum() / n.sum(), high.max(), *share, pairs - np.average(n, weights=on)])


def expected_shares(hidden: int) -> tuple[float, float]:
    """Expected share of neighbours on a pattern of `hidden` nodes, of a node outside (expected neighbours there over all expected
    ones) and of one on it (exact, since it meets all others alike); averaged over the sizes of the communities."""
    two = np.convolve(np.ones(len(SIZES)), np.ones(len(SIZES)))
    four, own = np.convolve(two, two), SIZES[:, None]  # ways to each total of the four other communities; the node's own
    rest, onto = 4 * SIZES[0] + np.arange(len(four)), core.EDGE_PATTERN * hidden
    outside = onto / (onto + core.EDGE_INSIDE * (own - 1) + core.EDGE_BETWEEN * rest)
    inside = (hidden - 1) / (hidden - 1 + own + rest)
    return np.average(outside, weights=own * four), np.average(inside, weights=own**0 * four)


FORMULA = np.array([expected_shares(hidden) for hidden in range(60)])  # [size, 2]


def trial(config: dict, seed: int) -> dict:
    rows, pattern, histogram = [], [], np.zeros((core.COMMUNITIES + 1) * core.SIZE_RANGE[1])
    for graph in core.PatternData(seed, config["split"]).first(config["graphs"], config["order"]):
        degree, on_pattern = neighbours(graph)
        share, on = on_pattern / np.maximum(degree, 1), graph.label == 1
        rows.append([len(on), on.sum(), degree.min(), degree.sum(), degree.max(), share[~on].sum(), share[on].sum()])
        pattern.append(graph.pattern)
        histogram += np.bincount(degree, minlength=len(histogram))
    rows, pattern, wanted = np.array(rows), np.array(pattern), np.array(list(NOTEBOOK.values()))
    parts = [slice(i, i + BATCH) for i in range(0, len(rows) - BATCH + 1, BATCH)]
    batches = np.array([measure(rows[part]) for part in parts])
    patterns = np.array([measure(rows[pattern == number]) for number in np.unique(pattern)])
    # The size that both shares of a batch imply, less its true one, in batches of one pattern: the interval of the notebook's
    size = sum(np.interp([wanted[k], *batches[:, k]], FORMULA[:, k - 5], np.arange(len(FORMULA))) for k in (5, 6)) / 2
    off = [s - batch[1] for s, batch, part in zip(size[1:], batches, parts, strict=True) if len(set(pattern[part])) == 1]
    low, high = size[0] - np.quantile(off or np.nan, (0.975, 0.025))
    error = (patterns[:, 5:7] - FORMULA[patterns[:, 1].astype(int)]).mean(0)
    result = dict(zip(NOTEBOOK, measure(rows), strict=True)) | {"implied_size_low": low, "implied_size_high": high}
    result |= dict(zip((f"rank_{name}" for name in NOTEBOOK), (batches < wanted).mean(0), strict=True))
    result |= {"outside_share_error": error[0], "pattern_share_error": error[1], "curve": histogram / histogram.sum()}
    return result | {"share_gap": result["outside_share"] - result["pattern_share"], "batches": batches, "patterns": patterns}


def cell(config: dict) -> dict:
    if config["graphs"] > (whole := core.KNOWN_PATTERNS * core.GRAPHS_PER_PATTERN[config["split"]]):
        raise core.UsageError(f"--graphs {config['graphs']}: the {config['split']} split has {whole}; give fewer")
    return config


SET, MIXED, USUAL, UNUSUAL = {"graphs": 10_000}, {"graphs": 10_000, "order": "shuffled"}, (0.025, 0.975), (ANY_BELOW, 0.025)
CLAIMS = [
    Claim("the table's nodes and fewest (24), mean and most (82) neighbours are usual for a stored batch", "6/3",
          [Check(f"rank_{name}", USUAL, SET) for name in ("nodes", "degree_low", "degree_mean", "degree_high")]),
    Claim("so are 18 pattern nodes a graph and the shares .2030 and .1584", "6/3, 10.3",
          [Check(f"rank_{name}", USUAL, SET) for name in ("pattern_nodes", "outside_share", "pattern_share")]),
    Claim("the set, too, has the range 24 to 82", "6/3", [Check("degree_low", (23, 25), SET), Check("degree_high", (81, 83), SET)]),
    Claim("the whole set has the notebook's shares, to one point", "10.3",
          [Check("outside_share", (0.193, 0.213), SET), Check("pattern_share", (0.1484, 0.1684), SET)]),
    Claim(".1584 is too low for a shuffled batch (our question)", "10.3", [Check("rank_pattern_share", UNUSUAL, MIXED)]),
    Claim("pattern nodes have a smaller share of neighbours on the pattern than others, in a batch and in the set", "10.3",
          [Check("share_gap", (0.0, ANY_ABOVE), arm) for arm in ({}, SET)]),
    Claim("both shares follow from the pattern's size, to half a point (our question)", "10.3",
          [Check(f"{name}_share_error", (-0.005, 0.005), SET) for name in ("outside", "pattern")]),
    Claim("the shares alone imply a pattern of 18 nodes, as the recalls say (our question)", "6/3, 10.3",
          [Check("implied_size_low", (ANY_BELOW, 18), SET), Check("implied_size_high", (18, ANY_ABOVE), SET)]),
    Claim("p[connect] may be over all pairs of some batch: a gap below 1.2 is usual (our question)", "10.3",
          [Check("rank_pairs_gap", USUAL, SET)]),
]  # fmt: skip


def headline(run: core.Run) -> str:
    return f"share of a pattern node's neighbours on the pattern: {core.extremes(run, 'pattern_share')}; notebook 0.158"


def figures(run: core.Run) -> list[core.Figure]:
    table, columns = np.bincount(DEGREES, TABLE / 3631, 130), {}
    degrees = core.curves_figure(
        run, "degrees", f"Most neighbours of a node: {core.extremes(run, 'degree_high')}; notebook 82",
        lambda cell, result: {"this run": result["curve"][:130], "notebook": table},
        core.varying(run.cells), "neighbours of a node", "share of nodes")  # fmt: skip
    core.pyplot().setp(degrees.figure.findobj(lambda part: part.get_label() == "notebook"), color="black", linestyle="--")
    largest = max(range(len(run.cells)), key=lambda i: run.cells[i]["graphs"])
    figure, grid = core.pyplot().subplots(1, 2, figsize=(9.5, 4.8), sharey=True)
    for k, axes, title in zip((5, 6), grid, ("nodes outside the pattern", "pattern nodes"), strict=True):
        for seed, result in zip(run.seeds, run.results[largest], strict=True):
            columns |= {f"{title} | seed {seed} | {name}": result["patterns"][:, i] for name, i in (("size", 1), ("share", k))}
            axes.plot(result["patterns"][:, 1], result["patterns"][:, k], ".", markersize=4, label=f"seed {seed}")
        axes.plot(SIZES, FORMULA[SIZES, k - 5], "k", label="expected")
        axes.axhline(list(NOTEBOOK.values())[k], color="black", linestyle="--", linewidth=1, label="notebook")
        axes.axvline(18, color="black", linestyle=":", linewidth=1, label="size by the notebook's recalls")
        axes.set(title=title, xlabel="nodes of the pattern", ylabel="share of neighbours on the pattern")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    core.add_title(
        figure, finding := f"Pattern nodes' share less expected: {np.mean(run.values(largest, 'pattern_share_error')):+.4f}"
    )
    return [degrees, core.Figure("shares", figure, finding, columns)]


SMOKE = {"graphs": (32,), "order": ("stored",)}
METRICS = ["outside_share", "pattern_share", "share_gap", "degree_low", "degree_mean", "degree_high", "nodes", "pattern_nodes"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
