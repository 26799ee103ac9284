"""Which head or product of heads finds a node's mirror image on a path, and from how many stacks on?

Entry       graph notebook, 24.3 ("debugging polyndrome example", Q1 to Q3) and 9.3 ("polyndrome edges are indeed unique")
Hypothesis  Heads that sum the stacks with weights +1 and -1, multiplied, are not largest at opposite nodes; the flattened stacks,
            multiplied with their negative, are ("works"); pairs of opposite nodes have a vector of their own. Ours: neighbours on a
            path have opposite parity, so that product is 0 at odd distances: it ties, or for odd n loses. The mirror is the
            Chebyshev polynomial T(P) of degree n - 1: one head needs n stacks, and weights that grow 1 + sqrt 2 times a node; for
            an even n no head wins with fewer. Rows compared as multisets, whatever the numbering, tell it from half as many.
Rule        Paths of 3 to 16 nodes and 24, 4 and 5 stacks, exact integers; "wins": larger than every other entry of its row. Seeds
            matter to random heads, 2,000 pairs, and to the order of float32 sums; exact numbers of ours were seen in drafts. A
            claim stands if the 95% interval of every check lies in its range, and falls if one lies wholly outside.
Cost        under 1 min on 2 cores
"""

import numpy as np

import core_old as core
from core_old import ANY_BELOW, Check, Claim, Flag, at_least

FLAGS = [
    Flag("nodes", at_least(2), (4, 3, *range(5, 17), 24), "nodes of the path"),
    Flag("stacks", at_least(1), (4, 5), "powers P^0, P^1, ... that a head sums"),
    Flag("draws", at_least(1), (2000,), "pairs of random heads a seed"),
]
PRINTED = {  # (nodes, stacks) -> what the notebook prints: row 1 of h1, rows 2 and 3 of h2; the vector of the pair (1, 2)
    (4, 4): [[0.875, 1.75, 1.125, 0.25], [-0.25, -1.125, -1.75, -0.875], [-0.25, -0.5, -1.75, -1.5]],
    (4, 5): [[0, 0.5, 0, 0.625, 0]]}  # fmt: skip


def path_powers(nodes: int, stacks: int) -> np.ndarray:
    """2^(K - 1) P^k of the path 0 - 1 - ... for k < K, in Python's integers, which never overflow: [K, n, n] of object."""
    step = np.equal(abs(np.subtract.outer(range(nodes), range(nodes))), 1).astype(object)  # 2 P
    step[[0, -1]] *= 2  # an end has one neighbour
    powers = [np.diag([2 ** (stacks - 1)] * nodes).astype(object)]
    while len(powers) < stacks:
        powers.append(step @ powers[-1] // 2)
    return np.stack(powers)


def mirror_wins(scores: np.ndarray, ties: bool = False) -> np.ndarray:
    """[..., n, n] -> [..., n] bool: in which rows the opposite node's entry is larger than all others (`ties`: or as large)."""
    mirror = np.eye(scores.shape[-1], dtype=bool)[::-1]
    own, rest = scores[..., mirror][..., None], scores[..., ~mirror].reshape(*scores.shape[:-1], -1)
    return (own >= rest if ties else own > rest).all(-1)


def stacks_for_a_head(step: np.ndarray) -> int:
    """Fewest stacks from which some weighted sum of powers of `step`, P [n, n], lets the mirror win in every row. A linear program
    decides, in Chebyshev polynomials T_k(P): they span the same heads, and their entries are 0, 1/2 and 1, free of rounding."""
    from scipy.optimize import linprog

    n, basis = len(step), [np.eye(len(step)), step]
    while len(basis) < n:
        basis.append(2 * step @ basis[-1] - basis[-2])
    i, j = np.nonzero(~np.eye(n, dtype=bool)[::-1])
    lead = np.array([(one[i, n - 1 - i] - one[i, j]) for one in basis])  # over every other entry; at least 1, as a unit is free
    solved = (linprog(np.zeros(k), -lead[:k].T, -np.ones(len(i)), bounds=(None, None)).status for k in range(1, n))
    feasible = {0: True, 2: False}  # any other status would be no answer: a KeyError
    return next((k for k, status in enumerate(solved, 1) if feasible[status]), n)  # n are enough: T_{n - 1}(P) is the mirror


def stacks_to_tell(features: np.ndarray) -> int:
    """Fewest stacks whose features [K, n, ...] two nodes share only if they are opposite; K + 1 if K do not suffice."""
    seen = ({str(row.tolist()) for row in features[:k].swapaxes(0, 1)} for k in range(1, len(features) + 1))
    return next((k for k, rows in enumerate(seen, 1) if len(rows) == (features.shape[1] + 1) // 2), len(features) + 1)


def trial(config: dict, seed: int) -> dict:
    n, stacks = config["nodes"], config["stacks"]
    powers, unit, opposite = path_powers(n, stacks), 2 ** (stacks - 1), np.eye(n, dtype=bool)[::-1]
    head, flat, rows = powers.sum(0), *(p.transpose(1, 0, 2).reshape(n, -1) for p in (powers, np.sort(powers, 2)))
    product, flattened, multisets = -head @ head.T, -flat @ flat.T, -((rows[:, None] - rows) ** 2).sum(2)
    np.fill_diagonal(multisets, multisets.min())  # a node's own row is no find
    result = {"head_rows": mirror_wins(product).mean(), "flat_rows": mirror_wins(flattened).mean()}
    result["flat_ties"] = mirror_wins(flattened, ties=True).mean()
    to_mirror, others = powers[:, range(n), range(n)[::-1]].T.tolist(), powers[:, ~opposite].T.tolist()
    result |= {"edges_unique": np.mean([v not in others for v in to_mirror]), "edges_symmetric": to_mirror == to_mirror[::-1]}
    if (n, stacks) in PRINTED:
        ours = np.stack([head[1], -head[2], -head[3]] if stacks == 4 else [powers[:, 1, 2]]) / unit
        result["printed_error"] = float(abs(ours - PRINTED[n, stacks]).max())
    draws = core.stream(seed, "init").standard_normal((2, config["draws"], stacks))
    first, second = np.tensordot(draws, (powers / unit).astype(float), 1)  # [draws, n, n] each
    wins = mirror_wins(np.round(first @ second.mT, 9))  # what ties in exact arithmetic must not win by rounding
    result |= {"random_rows": wins.mean(), "random_all": wins.all(1).mean()}
    weights = np.array([int(c) for c in np.polynomial.chebyshev.cheb2poly([0] * (n - 1) + [1])], dtype=object)
    powers = path_powers(n, n)
    floats, single = (powers / 2 ** (n - 1)).astype(np.float32), np.tensordot(weights, powers, 1)
    result["single_exact"] = float((single == 2 ** (n - 1) * opposite).all())
    order = core.stream(seed, "order").permutation(n)  # term after term: BLAS sums in an order that hangs on the processor
    terms = weights.astype(np.float32)[order, None, None] * floats[order]
    result["float32_rows"] = mirror_wins(terms.cumsum(0, dtype=np.float32)[-1]).mean()
    result |= {"weight_sum": abs(weights).sum(), "error_growth": np.tensordot(abs(weights).astype(float), floats, 1).max()}
    result |= {"stacks_head": (fewest := stacks_for_a_head(floats[1].astype(float))), "spares": n - fewest}
    result["stacks_multiset"] = stacks_to_tell(np.sort(path_powers(n, 2 * n), 2))
    scores = {"product of heads": product, "flattened": flattened, "multisets": multisets}
    scores = {name: score / unit**2 for name, score in scores.items()} | {"one exact head": single / 2 ** (n - 1)}
    return result | {name: score.astype(float) for name, score in scores.items()}


FOUR, FIVE, ALL, NONE, EVEN, ODD = {}, {"stacks": 5}, (0.999, 1.001), (-0.001, 0.001), (4, 6, 10, 16), (5, 9, 15)
CLAIMS = [
    Claim("the printed rows of both heads (4 stacks) and the printed pair (5)", "24.3",
          [Check("printed_error", (-1e-9, 1e-9), arm) for arm in (FOUR, FIVE)]),
    Claim("heads +1 and -1, multiplied, do not find it", "24.3", [Check("head_rows", (ANY_BELOW, 1), arm) for arm in (FOUR, FIVE)]),
    Claim("the flattened stacks, multiplied, do: it wins in every row", "24.3", [Check("flat_rows", ALL)]),
    Claim("it wins in no row: with an even number of nodes it ties in all, with an odd one it loses (our question)", "24.3",
          [Check("flat_ties", ALL, {"nodes": n}) for n in EVEN] + [Check("flat_rows", NONE, {"nodes": n}) for n in (*EVEN, *ODD)]),
    Claim("palindrome edges are unique, and symmetric", "9.3", [Check(f"edges_{what}", ALL) for what in ("unique", "symmetric")]),
    Claim("pairs of random heads seldom do: under 0.2 of them on 4 nodes, 0.001 on 16 (our question)", "24.3",
          [Check("random_all", (ANY_BELOW, x), {"nodes": n} | arm) for n, x in ((4, 0.2), (16, 0.001)) for arm in (FOUR, FIVE)]),
    Claim("one head is exactly the mirror, with weights that grow 1 + sqrt 2 times a node (our question)", "24.3",
          [Check("single_exact", ALL, {"nodes": 16}), Check("weight_sum", (2.41, 2.42), {"nodes": 16}, {"nodes": 15}, "ratio")]),
    Claim("for an even n none wins with fewer stacks (our question)", "24.3", [Check("spares", NONE, {"nodes": n}) for n in EVEN]),
    Claim("float32 holds it at 16 nodes, and no longer at 24 (our question)", "24.3",
          [Check("float32_rows", ALL, {"nodes": 16}), Check("float32_rows", (ANY_BELOW, 1), {"nodes": 24})]),
    Claim("multisets of the rows tell opposite nodes from n / 2 stacks (our question)", "24.3",
          [Check("stacks_multiset", (n / 2 - 0.1, n / 2 + 0.1), {"nodes": n}) for n in (4, 8, 16)]),
]  # fmt: skip


def headline(run: core.Run) -> str:
    return f"rows in which the mirror wins, product of heads: {core.extremes(run, 'head_rows')}"


def figures(run: core.Run) -> list[core.Figure]:
    scores, n = {name: score for name, score in run.results[0][0].items() if np.ndim(score) == 2}, run.cells[0]["nodes"]
    figure, grid = core.pyplot().subplots(1, len(scores), figsize=(3.3 * len(scores), 4))
    for axes, (name, score) in zip(grid, scores.items(), strict=True):
        axes.imshow(score, cmap="Blues", vmax=2 * score.max() - score.min())
        axes.plot(range(n), range(n)[::-1], "s", color="black", fillstyle="none", markersize=140 / n)
        for (i, j), entry in np.ndenumerate(score[:6, :6]):
            axes.text(j, i, f"{entry:.3g}", ha="center", va="center", fontsize=10)
        axes.set(title=f"{name}\nwins in {mirror_wins(score).sum()} of {n} rows", xticks=range(n), yticks=range(n))
        axes.grid(False)
    core.add_title(figure, finding := f"The mirror (boxed) on {n} nodes with {run.cells[0]['stacks']} stacks")
    alike = core.only(run, [i for i, cell in enumerate(run.cells) if cell["stacks"] == run.cells[0]["stacks"]])
    return [core.Figure("scores", figure, finding, {name: score.ravel() for name, score in scores.items()}),
            core.sweep_figure(run, "wins", headline(run), "nodes", ["head_rows", "flat_ties", "flat_rows", "random_rows"],
                              "share of rows", ["stacks"]),
            core.sweep_figure(alike, "stacks", f"Stacks that one head needs: {core.extremes(run, 'stacks_head')}", "nodes",
                              ["stacks_head", "stacks_multiset"], "fewest that find the mirror")]  # fmt: skip


SMOKE = {"nodes": (4, 5), "stacks": (4,), "draws": (20,)}
METRICS = ["head_rows", "flat_rows", "flat_ties", "random_all", "edges_unique", "stacks_head", "stacks_multiset", "error_growth"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
