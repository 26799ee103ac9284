"""Where should a graph be told its question: at a query node joined to all others, as the notebook planned, or elsewhere?

Entry       question-answering notebook, "Graph structuring": "query node connected to all other nodes"
Hypothesis  The notebook: one query node joined to all, and one for each passage with the passage's words beside the query's. Ours:
            both beat no query, but the query belongs on the start's own nodes: from there only what follows the chain hears of it,
            while a query that is everywhere lets each fact be judged by itself (its relation is asked for, so is that of a fact
            that ends where it begins), a shortcut that is right more often than not. A hop takes two layers.
Rule        5 seeds, 1 to 3 hops trained together; accuracy on 500 new questions of each. Guesses are exact: the best without the
            query (floor), the best that knows relations but not the start. Solved: at least 0.99 at 1 hop, 0.9 at 2 and 3. A claim
            stands if the 95% interval of every check lies in its range, and falls if one lies wholly outside.
Cost        about 20 min on 2 cores. Entries of their own, trained longer: `--query everywhere-marked node-marked --steps 2000`,
            8 min; `--query start --depth 2 3 4 5 6 --steps 2000`, 20 min; `--query start none node nodes everywhere --steps 2000`,
            22 min; `--query node everywhere --steps 5000 --curriculum 0.2`, 20 min
Quick       `--query start none --hops 1 --steps 250 --seeds 3`
"""

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim

FLAGS = core.question_flags(query=("node", "nodes", "everywhere", "start", "none"))


def trial(config: dict, seed: int) -> dict:
    _, result = core.trained_on_questions(config, seed)
    for guess in ("floor", "no_start"):
        result |= {f"over_{guess}_{hops}": result[f"accuracy_{hops}"] - result[f"{guess}_{hops}"] for hops in (1, 2, 3)}
    return result


START, EVERYWHERE, NONE, NODES = ({"query": form} for form in ("start", "everywhere", "none", "nodes"))
AT_2000, LONG = {"steps": 2000}, {"steps": 5000, "curriculum": 0.2}


def layers(depth: int) -> dict:
    return START | {"depth": depth} | AT_2000


def more(one: dict, other: dict, hops: tuple = (1, 2, 3), least: float = 0.0) -> list[Check]:
    """An arm is right more often than another."""
    return [Check(f"accuracy_{h}", (least, ANY_ABOVE), one, other) for h in hops]


def solved(arm: dict, *hops: int) -> list[Check]:
    return [Check(f"accuracy_{h}", (0.99 if h == 1 else 0.9, ANY_ABOVE), arm) for h in hops]


def unsolved(arm: dict, *hops: int) -> list[Check]:
    return [Check(f"accuracy_{h}", (ANY_BELOW, 0.9), arm) for h in hops]


CLAIMS = [
    Claim("a query node beats no query", "Graph structuring", more({}, NONE)),
    Claim("one more for each passage helps by 0.01, at 1 and 2 hops", "Graph structuring", more(NODES, {}, (1, 2), 0.01)),
] + [Claim(f"{text} (our question)", "Graph structuring", checks) for text, checks in [
    ("without a query, accuracy is the best guess's within 0.03",
     [Check(f"over_floor_{h}", (-0.03, 0.03), NONE) for h in (1, 2, 3)]),
    ("on the start's nodes the query beats a query node", more(START, {})),
    ("and the query on all nodes, from 2 hops on", more(START, EVERYWHERE, (2, 3))),
    ("on the start's nodes 1 hop is solved", solved(START, 1)),
    ("and 2 hops", solved(START, 2)),
    ("and 3 hops", solved(START, 3)),
    ("on all nodes 1 hop is solved", solved(EVERYWHERE, 1)),
    ("there 2 hops stay within 0.05 of the guess without the start", [Check("over_no_start_2", (-0.05, 0.05), EVERYWHERE)]),
    ("told the start, they still do", [Check("over_no_start_2", (-0.05, 0.05), {"query": "everywhere-marked"} | AT_2000)]),
    ("told the start, a query node solves 1 and 2 hops", solved({"query": "node-marked"} | AT_2000, 1, 2)),
    ("a hop takes two layers: 2 layers solve 1 hop but not 2, and 4 solve 2 but not 3, on the start's nodes",
     [check for depth, hops in ((2, 1), (4, 2)) for arm in [layers(depth)]
      for check in (*solved(arm, hops), *unsolved(arm, hops + 1))]),
    ("nor do 3 layers solve 2 hops, or 5 layers 3", [*unsolved(layers(3), 2), *unsolved(layers(5), 3)]),
    ("5000 steps, hops one after the other: a query node solves 1 hop", solved(LONG, 1)),
    ("and 2 hops", solved(LONG, 2)),
    ("so does the query on all nodes", solved(EVERYWHERE | LONG, 1, 2)),
]]  # fmt: skip


def headline(run: core.Run) -> str:
    return f"accuracy at 2 hops: {core.extremes(run, 'accuracy_2')}"


def figures(run: core.Run) -> list[core.Figure]:
    finding, keys = headline(run), core.varying(run.cells)
    drawn = core.hop_figures(run, finding, {"best guess without query": "floor", "best guess without start": "no_start"})
    if "depth" in keys:
        told, others = [f"accuracy_{h}" for h in (1, 2, 3) if f"curve_{h}" in run.results[0][0]], [k for k in keys if k != "depth"]
        drawn.append(core.sweep_figure(run, "depth", f"By layers, {finding}", "depth", told, "accuracy", others))
    return drawn


SMOKE = {"query": ("nodes",), "hops": ((1, 2),), "entities": (5,), "facts": (6,), "passages": (2,), "candidates": (3,),
         "names": (8,), "depth": (1,), "dim": (8,), "heads": (2,), "steps": (10,), "batch": (4,),
         "test_questions": (20,)}  # fmt: skip
METRICS = ["accuracy_1", "accuracy_2", "accuracy_3", "floor_1", "floor_2", "floor_3", "no_start_1", "no_start_2", "no_start_3"]
EXPERIMENT = core.Experiment(
    __file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, core.question_cell
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
