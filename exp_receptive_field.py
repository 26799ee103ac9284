"""Does a larger receptive field help attention and gating, and what must go with it?

Entry       graph notebook, 13/3 ("receptive field(8)"), 14.3 ("larger adj_stack") and 15.3 ("attention with batch norm")
Hypothesis  Attention with batch norm in its feed-forward works on PATTERN; the batch norm is mandatory for larger stacks; [0..4] is
            better than [0, 1]; the learning rate has no effect, a higher one is better if anything. Gating with [0..4] may need the
            batch norm. Ours: PATTERN's graphs have diameter 2, so one-hots of hops beyond 2 are empty and [0..8] is [0..4]; powers
            of the walk are nearly the same in every row from the second on, so attention sees little but their differences, which
            the batch norm enlarges; a gate over them sums over all nodes alike and learns nothing. The degree as an input helps
            attention more than any stack.
Rule        5 paired seeds, 4 layers, 16 stored graphs, feed-forward 200, 100 steps. "Works": best score above 0.8; "mandatory":
            without it below 0.65 and at least 0.05 less; "better", "helps": a positive difference; "the same": within 0.02. A
            claim stands if the 95% interval of every check lies in its range, and falls if one lies outside.
Cost        about 8 min on 2 cores; with `--degree on --distance on` about 4 min; about 1 min with
            `--lr 1e-4 1e-3 --activation softmax --stack 0,1,2,3,4 --feedforward-norm batch`
Quick       `--stack 0,1 0,1,2,3,4 --distance on --epochs 50 --seeds 3`
"""

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim

NEAR, MIDDLE, FAR = (0, 1), tuple(range(5)), tuple(range(9))
FLAGS = core.overfit_flags(
    activation=("softmax", "sigmoid"), stack=(NEAR, MIDDLE, FAR), distance=("on", "off"), feedforward_norm=("none", "batch"),
    hidden=(200,), graphs=(16,), epochs=(100,), without=("model",),
)  # fmt: skip


def cell(config: dict) -> dict:
    return core.overfit_cell(config | {"model": "position"})


def trial(config: dict, seed: int) -> dict:
    batch = core.GraphBatch(core.PatternData(seed).first(config["graphs"], config["order"]), core.Runtime.device)
    count = core.adjacency_stack(batch, FAR).hop_count.sum(0)  # pairs at each hop, and out of reach
    return core.overfit(config, seed) | {
        "pairs_within_1": float(count[:2].sum() / count.sum()),
        "pairs_at_2": float(count[2] / count.sum()),
        "pairs_beyond_2": float(count[3:].sum() / count.sum()),
    }


ATTENTION, GATING, BATCH, POWERS = {}, {"activation": "sigmoid"}, {"feedforward_norm": "batch"}, {"distance": "off"}
WIDER, WIDEST, DEGREE, FASTER, LONG = {"stack": MIDDLE}, {"stack": FAR}, {"degree": "on"}, {"lr": 1e-3}, {"epochs": 400}
WORKS, BETTER, SAME = (0.8, ANY_ABOVE), (0.0, ANY_ABOVE), (-0.02, 0.02)
SEEN = (("by hops", {}), ("by powers", POWERS))
CLAIMS = [
    *(Claim(f"attention with batch norm works, {seen}", "14.3",
            [Check("best", WORKS, BATCH | arm | wide) for wide in (ATTENTION, WIDER)]) for seen, arm in SEEN),
    *(Claim(f"for [0..4] the batch norm is mandatory, {seen}", "14.3",
            [Check("best", (ANY_BELOW, 0.65), WIDER | arm),
             Check("best", (0.05, ANY_ABOVE), BATCH | WIDER | arm, versus=WIDER | arm)]) for seen, arm in SEEN),
    *(Claim(f"attention with batch norm: [0..4] is better than [0, 1], {seen}", "15.3",
            [Check("best", BETTER, BATCH | WIDER | arm, versus=BATCH | arm)]) for seen, arm in SEEN),
    Claim("given 400 epochs, attention with batch norm and [0, 1] works, and [0..4] is worse, by hops (our question)", "14.3, 15.3",
          [Check("best", WORKS, BATCH | LONG), Check("best", (ANY_BELOW, 0.0), BATCH | WIDER | LONG, versus=BATCH | LONG)]),
    Claim("no pair of nodes is more than 2 hops apart (our question)", "13/3", [Check("pairs_beyond_2", (ANY_BELOW, 1e-3))]),
    Claim("by hops [0..8] is the same as [0..4] (our question)", "13/3",
          [Check("best", SAME, WIDEST | arm, versus=WIDER | arm) for arm in (BATCH, GATING | BATCH)]),
    Claim("gating with [0..4] and batch norm works, by hops", "14.3", [Check("best", WORKS, GATING | BATCH | WIDER)]),
    Claim("batch norm helps gating with larger stacks, by hops", "14.3",
          [Check("best", BETTER, GATING | BATCH | wide, versus=GATING | wide) for wide in (WIDER, WIDEST)]),
    Claim("gating over powers beyond [0, 1] learns nothing without batch norm: below 0.55 (our question)", "14.3",
          [Check("best", (ANY_BELOW, 0.55), GATING | POWERS | wide) for wide in (WIDER, WIDEST)]),
    Claim("learning rate 1e-3 is as good as 1e-4 for attention with batch norm and [0..4]", "15.3",
          [Check("best", SAME, BATCH | WIDER | FASTER, versus=BATCH | WIDER)]),
    Claim("1e-3 is better, if anything", "15.3", [Check("best", BETTER, BATCH | WIDER | FASTER, versus=BATCH | WIDER)]),
    Claim("given the degree, attention works with [0, 1] and no batch norm (our question)", "14.3", [Check("best", WORKS, DEGREE)]),
]  # fmt: skip


def headline(run: core.Run) -> str:
    return f"best score: {core.extremes(run, 'best')}"


def figures(run: core.Run) -> list[core.Figure]:
    return [core.dots_figure(core.by_arm(run, ["best"]), "best", f"Best score: {core.extremes(run, 'best')}",
                             "best balanced accuracy"),
            core.score_figure(run)]  # fmt: skip


SMOKE = {"layers": (1,), "lr": (1e-2,), "dim": (8,), "hidden": (8,), "graphs": (2,), "epochs": (3,), "stack": ((0, 1), (0, 1, 2)),
         "distance": ("on",)}  # fmt: skip
METRICS = ["best", "final", "jump", "epochs_to_0.7", "in_band", "pairs_within_1", "pairs_at_2", "pairs_beyond_2"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
