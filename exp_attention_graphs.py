"""Does attention in graph question answering show the chain of facts that answers a question, and does it matter?

Entry       question-answering notebook, "Visualisations": draw attention graphs; flow of information
Hypothesis  Ours. In a model that answers right attention finds the chain, also among edges of the same kinds (AUC over 0.7), but
            no single head shows all of it. The flow from the question's start to the answer shows it better (0.9), and better than
            the same flow with even attention, which knows the graph alone. The edges with most attention carry the answer: without
            the strongest 2%, about as many as a chain has, accuracy falls by more than without random ones of the same kinds.
Rule        5 seeds, the query on the start's nodes, 500 questions of each number of hops. Chain: edges from fact to fact and on to
            the answer; detours through an entity's node count for neither side. The best head is chosen on half of the questions,
            its AUC taken on the other. Cut: edges left out of all layers, as many of each question. A claim stands if the 95%
            interval of every check lies in its range, and falls if one lies wholly outside.
Cost        about 6 min on 2 cores, 2 behind exp_query_node, which trains the same model
Quick       `--hops 1 --steps 250 --test-questions 200 --seeds 3`
"""

from collections.abc import Callable

import numpy as np

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, at_least

FLAGS = [Flag("draw", at_least(0), (0,), "which of the held-out questions with most hops is drawn, from 0"),
         *core.question_flags(("form",))]  # fmt: skip
SHARES = np.linspace(0, 0.2, 11)  # of a question's edges, cut


def cell(config: dict) -> dict:
    return core.question_cell(config | {"form": "edges"})  # the dense form has no weights to look at


def drawn(config: dict, data: core.QuestionData) -> core.QuestionBatch:
    """The question to be drawn, a batch of its own: one of those with most hops, the same for every seed."""
    found = data.held_out(config["draw"] + 1, "val", 1)[max(data.hops)]
    return found[min(config["draw"], len(found) - 1)]


def trial(config: dict, seed: int) -> dict:
    (model, result), data = core.trained_on_questions(config, seed), core.QuestionData(config)
    rng, kinds = core.stream(seed, "val"), len(core.KINDS)
    batches = [batch for of_hops in data.held_out(config["test_questions"]).values() for batch in of_hops]
    watched = [core.WatchedQuestions(model, batch) for batch in batches]
    mean = [w.weight.mean((0, 2)) for w in watched]
    share = np.sum([np.bincount(w.type, m, kinds**2) for w, m in zip(watched, mean, strict=True)], 0).reshape(kinds, kinds)
    result["share"] = (share / np.maximum(share.sum(1, keepdims=True), 1e-9)).astype(np.float32)  # of a kind's attention, by source

    def accuracy_without(cuts: list[np.ndarray]) -> float:
        return float(core.answered(model, [w.without(cut) for w, cut in zip(watched, cuts, strict=True)]).float().mean())

    def mean_auc(score: Callable, *how) -> float:
        return float(np.mean([w.auc(score(w, i), *how) for i, w in enumerate(watched)]))

    heads = np.array([[[mean_auc(lambda w, i: w.weight[layer, :, h], True, half) for h in range(config["heads"])]  # noqa: B023
                       for layer in range(config["depth"])] for half in (0, 1)])  # fmt: skip
    even = [np.tile(1 / np.bincount(w.target)[w.target], (len(w.weight), 1)) for w in watched]
    result |= {"auc": mean_auc(lambda w, i: mean[i]), "kind_auc": mean_auc(lambda w, i: mean[i], True)}
    result |= {
        "head_auc": heads.mean(0).astype(np.float32),
        "best_head_auc": float(heads[1].ravel()[np.nan_to_num(heads[0]).argmax()]),
    }
    result |= {"flow_auc": mean_auc(lambda w, i: w.flow(w.weight.mean(2)), True)}
    result |= {"even_flow_auc": mean_auc(lambda w, i: w.flow(even[i]), True)}
    for name, own in (("best_head", "kind_auc"), ("even_flow", "flow_auc")):
        result[f"over_{name}"] = result[own] - result[f"{name}_auc"]
    result["drawn"] = core.WatchedQuestions(model, drawn(config, data)).weight
    cuts = {"strongest": [], "random, same kinds": [], "random": [], "weakest": []}
    for part in SHARES:
        noise, strong = [rng.random(len(m)) for m in mean], [w.foremost(m, part) for w, m in zip(watched, mean, strict=True)]
        of_kinds = [w.foremost(x, 0, s) for w, x, s in zip(watched, noise, strong, strict=True)]
        others = ([w.foremost(x, part) for w, x in zip(watched, scores, strict=True)] for scores in (noise, [-m for m in mean]))
        for curve, some in zip(cuts.values(), (strong, of_kinds, *others), strict=True):
            curve.append(accuracy_without(some))
    result |= {f"cut {name}": np.array(curve, np.float32) for name, curve in cuts.items()}
    strong, same, random, _ = (curve[1] for curve in cuts.values())
    result |= {"cut_strong": strong, "cut_kinds": same, "cut_random": random, "cut_weak": cuts["weakest"][-1]}
    result |= {"over_random": random - strong, "over_kinds": same - strong, "weakest_cost": cuts["weakest"][0] - result["cut_weak"]}
    return result | {"cut_chain": accuracy_without([w.chain == 1 for w in watched])}


CLAIMS = [Claim(f"{text} (our question)", "Visualisations", checks) for text, checks in [
    ("attention tells the chain from other edges: AUC over 0.7", [Check("auc", (0.7, ANY_ABOVE))]),
    ("also from those of the same kinds", [Check("kind_auc", (0.7, ANY_ABOVE))]),
    ("better than its best head alone", [Check("over_best_head", (0.0, ANY_ABOVE))]),
    ("the flow from start to answer: over 0.9", [Check("flow_auc", (0.9, ANY_ABOVE))]),
    ("over that with even attention", [Check("over_even_flow", (0.0, ANY_ABOVE))]),
    ("2% of the edges cut: the strongest cost 0.2 more than random ones", [Check("over_random", (0.2, ANY_ABOVE))]),
    ("and 0.2 more than random ones of the same kinds", [Check("over_kinds", (0.2, ANY_ABOVE))]),
    ("the weakest 20% cost less than 0.05", [Check("weakest_cost", (ANY_BELOW, 0.05))]),
    ("with the chain cut under 0.5 are right", [Check("cut_chain", (ANY_BELOW, 0.5))]),
]]  # fmt: skip


def headline(run: core.Run) -> str:
    attention, flow = (core.brief(float(np.mean(run.values(0, metric)))) for metric in ("kind_auc", "flow_auc"))
    return f"AUC of the chain among edges of its kinds: attention {attention}, flow to the answer {flow}"


def figures(run: core.Run) -> list[core.Figure]:
    plt, config, results = core.pyplot(), run.cells[0], run.results[0]
    data, words = core.QuestionData(config), ("attention", "best head", "flow to the answer", "flow, even attention")
    batch, weight = drawn(config, data), results[0]["drawn"]  # [L, E, H]
    chain = core.chain_edges(batch)

    numbers = {f"layer {i + 1}, head {h + 1}": weight[i, :, h] for i in range(weight.shape[0]) for h in range(weight.shape[2])}
    one, axes = plt.subplots(figsize=(12, 9))
    core.draw_attention(axes, batch, data.words, weight.max(0).mean(1), chain)
    told = f"A question, seed {run.seeds[0]}: mean attention of heads in the layer where it is strongest; orange: the chain"
    core.add_title(one, told)
    grid, panels = plt.subplots(*weight.shape[::2], figsize=(2.6 * weight.shape[2], 2.5 * weight.shape[0]), squeeze=False)
    for (i, h), panel in np.ndenumerate(panels):
        core.draw_attention(panel, batch, data.words, weight[i, :, h], chain, named=False)
        panel.set_title(f"layer {i + 1}, head {h + 1}", fontsize=10)
    each = "The same by layer and head: passages, subjects, objects, entities from left to right"
    core.add_title(grid, each)
    share = np.mean([result["share"] for result in results], 0)
    seen = np.nonzero(share.sum(1))[0]
    kinds, heads = [core.KINDS[i] for i in seen], results[0]["head_auc"]
    names = [f"layer {i + 1}" for i in range(len(heads))], [f"head {h + 1}" for h in range(heads.shape[1])]
    aucs = [run.values(0, f"{key}_auc") for key in ("kind", "best_head", "flow", "even_flow")]
    rows = {name: {"AUC": values} for name, values in zip(words, aucs, strict=True)}
    lines = lambda cell, result: {key[4:]: result[key] for key in result if key.startswith("cut ")}  # noqa: E731
    return [
        core.Figure("question", one, told, numbers | {"chain": chain}), core.Figure("heads", grid, each, {}),
        core.matrix_figure("flow", share[np.ix_(seen, seen)], kinds, kinds,
                           ("attention of", "to source"), "Where each kind of node looks"),
        core.matrix_figure("head-auc", heads, *names, ("", ""), "AUC of the chain among edges of its kinds, one seed"),
        core.dots_figure(rows, "auc", headline(run), "AUC", lines={"chance": 0.5}),
        core.curves_figure(run, "cut", "Accuracy without some of the edges", lines, [], "edges cut, %", "accuracy", every=2),
    ]  # fmt: skip


SMOKE = {"hops": ((1, 2),), "entities": (5,), "facts": (6,), "passages": (2,), "candidates": (3,), "names": (8,), "depth": (2,),
         "dim": (8,), "heads": (2,), "steps": (10,), "batch": (4,), "test_questions": (20,)}  # fmt: skip
METRICS = ["accuracy", "auc", "kind_auc", "best_head_auc", "flow_auc", "even_flow_auc", "cut_strong", "cut_kinds", "cut_random",
           "cut_weak", "cut_chain"]  # fmt: skip
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
