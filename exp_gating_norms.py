"""Which norm in which slot does gating need, and is the notebook's table of eight more than noise?

Entry       graph notebook, 13/3 ("batch norms") and 15.3 ("results pattern gating 4 layers", the table of eight)
Hypothesis  Overfit set-up: a batch norm inside the feed-forward alone works, over 0.9; in the attention slot, in the feed-forward
            slot, in both, it does not. Norms first are better than norms behind the residuals ("probably", 6/3): a higher best
            score. Full task: the table runs from 0.835 to 0.856, best with layer norm before mixing and batch
            norm before the feed-forward; "it is not the learning rate and not the batch norm". Ours: on other seeds the order of
            the eight is another; differences of 0.02 between runs that were still going are noise.
Rule        5 paired seeds. Overfit: 32 stored graphs, 4 layers, feed-forward 200, 100 steps; "works": a best score above 0.9. Full
            protocol at a size for 2 cores: 1,600 training graphs of all 100 patterns, 2 epochs of 200 steps at lr 1e-3; 200 test
            graphs after each epoch. Order: Spearman's correlation of the eight best scores with the notebook's, seed by seed,
            and with the means of the other seeds. A claim stands if the 95% interval of every check lies in its range, and falls if
            one lies outside.
Cost        about 11 min on 2 cores; `--task overfit` alone about 4 min. Norms first or last, an entry of its own, 2 min:
            `--task overfit --norm layer batch --feedforward-norm none --norm-order first last`
Quick       `--task overfit --norm layer batch --epochs 30 --seeds 3`
"""

import numpy as np

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, at_least, one_of

TABLE = {  # by norm inside the feed-forward, and norms before mixing / before the feed-forward
    ("none", "batch"): 0.839, ("none", "batch/layer"): 0.852, ("none", "layer/batch"): 0.856, ("none", "layer"): 0.835,
    ("batch", "batch"): 0.837, ("batch", "batch/layer"): 0.839, ("batch", "layer/batch"): 0.851, ("batch", "layer"): 0.835,
}  # fmt: skip
FULL = ("train_graphs", "train_batch", "train_epochs", "train_lr", "test_graphs")
FLAGS = [
    Flag("task", one_of("overfit", "full"), ("overfit", "full"), "train and score on the same graphs, or on the splits"),
    *core.overfit_flags(norm=("layer", "batch/layer", "layer/batch", "batch"), feedforward_norm=("none", "batch"), hidden=(200,),
                        epochs=(100,)),
    Flag("train-graphs", at_least(1), (1600,), "full task: training graphs, shuffled"),
    Flag("train-batch", at_least(1), (8,), "full task: graphs a step"),
    Flag("train-epochs", at_least(1), (2,), "full task: passes over them, with a test after each"),
    Flag("train-lr", at_least(0.0, float, above=True), (1e-3,), "full task: Adam's learning rate"),
    Flag("test-graphs", at_least(1), (200,), "full task: test graphs, shuffled"),
]  # fmt: skip


def cell(config: dict) -> dict:
    unread = FULL if config["task"] == "overfit" else ("lr", "graphs", "batch", "order", "epochs")
    config = core.overfit_cell(config)
    if config["task"] == "full":  # refuse now what the splits do not have
        for flag, split in (("train_graphs", "train"), ("test_graphs", "test")):
            if config[flag] > len(core.PatternData(0, split)):
                raise core.UsageError(
                    f"--{flag.replace('_', '-')} {config[flag]}: the {split} split has fewer graphs; ask for less"
                )
    return {key: value for key, value in config.items() if key not in unread}


def trial(config: dict, seed: int) -> dict:
    if config["task"] == "overfit":
        return core.overfit(config, seed)
    padding = config.get("norm_mask") == "off"

    def batches(graphs: list[core.Graph]) -> list[core.GraphBatch]:  # as shuffled: alike sizes in a batch would mislead batch norm
        parts = (graphs[i : i + config["train_batch"]] for i in range(0, len(graphs), config["train_batch"]))
        return [core.GraphBatch(part, core.Runtime.device, padding) for part in parts]

    train = batches(core.PatternData(seed).first(config["train_graphs"], "shuffled"))
    test = batches(core.PatternData(seed, "test").first(config["test_graphs"], "shuffled"))
    how = {"lr": config["train_lr"], "epochs": config["train_epochs"], "clip": config["clip"]}
    curves = core.train(core.build_model(config, seed), train, seed=seed, held_out=test, **how)
    return curves | core.ratio_summary(curves) | core.score_summary(curves)


def row(cell: dict) -> tuple[str, str]:
    return cell.get("feedforward_norm"), cell.get("norm")


def derived(run: core.Run) -> dict[str, np.ndarray]:
    """How the eight rows of the full task are ordered, a value a seed; {} if the run lacks one."""
    place = {row(cell): i for i, cell in enumerate(run.cells) if cell["task"] == "full"}
    if set(place) != set(TABLE) or len([cell for cell in run.cells if cell["task"] == "full"]) != len(TABLE):
        return {}
    ours = np.array([run.values(place[key], "best") for key in TABLE])  # [8, S]
    others = (ours.sum(1, keepdims=True) - ours) / max(ours.shape[1] - 1, 1)
    with_norm = np.array([norm == "batch" for norm, _ in TABLE])
    return {
        "rank correlation with the notebook's table": [core.rank_correlation(one, list(TABLE.values())) for one in ours.T],
        "rank correlation with the other seeds": [core.rank_correlation(*pair) for pair in zip(ours.T, others.T, strict=True)],
        "gain by batch norm in the feed-forward": ours[with_norm].mean(0) - ours[~with_norm].mean(0),
        "best row less worst row": ours.max(0) - ours.min(0),
    }


INSIDE = {"feedforward_norm": "batch"}
SLOTS = ("batch/layer", "layer/batch", "batch")
CLAIMS = [
    Claim("a batch norm inside the feed-forward alone works, over 0.9", "13/3", [Check("best", (0.9, ANY_ABOVE), INSIDE)]),
    Claim("in the attention slot, the feed-forward slot or both it does less", "13/3",
          [Check("best", (ANY_BELOW, 0.0), {"norm": norm}, versus=INSIDE) for norm in SLOTS]),
    Claim("a batch norm inside the feed-forward calms gating: under half the jump (our question)", "13/3",
          [Check("jump", (ANY_BELOW, 0.5), INSIDE, {}, "ratio")]),
    Claim("a batch norm before the feed-forward calms it (our question)", "13/3",
          [Check("jump", (ANY_BELOW, 0.5), {"norm": "layer/batch"}, {}, "ratio")]),
    Claim("a batch norm before mixing calms it (our question)", "13/3",
          [Check("jump", (ANY_BELOW, 0.5), {"norm": "batch/layer"}, {}, "ratio")]),
    Claim("norms first are better than norms behind the residuals", "6/3",
          [Check("best", (0.0, ANY_ABOVE), norm, versus=norm | {"norm_order": "last"}) for norm in ({}, {"norm": "batch"})]),
    Claim("first, layer norms make larger jumps (our question)", "6/3",
          [Check("jump", (1.0, ANY_ABOVE), {}, {"norm_order": "last"}, "ratio")]),
    Claim("on the full task the eight rows stand in the notebook's order", "15.3",
          [Check("rank correlation with the notebook's table", (0.0, ANY_ABOVE), None)]),
    Claim("layer norm before mixing and batch norm before the feed-forward is better than two layer norms", "15.3",
          [Check("best", (0.0, ANY_ABOVE), {"task": "full", "norm": "layer/batch"}, versus={"task": "full"})]),
    Claim("it is not the batch norm: inside the feed-forward it changes the full task by less than 0.01", "15.3",
          [Check("gain by batch norm in the feed-forward", (-0.01, 0.01), None)]),
    Claim("the rows have an order of their own that other seeds repeat (our question)", "15.3",
          [Check("rank correlation with the other seeds", (0.0, ANY_ABOVE), None)]),
]  # fmt: skip


def headline(run: core.Run) -> str:
    found = derived(run)
    told = "; ".join(f"{name} {np.mean(found[name]):.2f}" for name in list(found)[:2])
    return told or f"best score: {core.extremes(run, 'best')}"


def figures(run: core.Run) -> list[core.Figure]:
    drawn = []
    for task in dict.fromkeys(cell["task"] for cell in run.cells):
        part = core.only(run, [i for i, cell in enumerate(run.cells) if cell["task"] == task])
        notebook = {"full": lambda cell: {"sigmoid": TABLE[row(cell)]} if row(cell) in TABLE else {}, "overfit": lambda cell: {}}[
            task
        ]
        drawn.append(core.score_figure(part, notebook=notebook)._replace(kind=task))
    return drawn


SMOKE = {"layers": (1,), "lr": (1e-2,), "dim": (8,), "hidden": (8,), "graphs": (2,), "epochs": (3,), "train_graphs": (3,),
         "train_epochs": (2,), "train_batch": (2,), "test_graphs": (2,)}  # fmt: skip
METRICS = ["best", "final", "jump", "class_jump", "drift", "epochs_to_0.7"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell, derived)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
