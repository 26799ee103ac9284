"""Does pretraining on graphs in which entities are masked help to answer questions from few labels?

Entry       question-answering notebook, "Pretraining": "Entities are masked from the system"
Hypothesis  The notebook plans it. Ours: where two thirds of the facts are told twice, a hidden mention can be found by its fact's
            other telling, as a question's answer is by its fact; so masking entities helps, most with 50 and 200 labels, and more
            than naming words masked at random, as of BERT, which gains nothing: finding a name costs more steps than answering.
Rule        5 paired seeds; 1 and 2 hops; mean accuracy on 500 new questions of each, after the same steps on 50, 200 or 1000
            labelled questions. Masked: a mention of a candidate, in its sentence and passage and in the links by which it could be
            looked up; it is marked, and chosen among the candidates. At random: 15% of names and relations, to be named among all
            words. Gains are differences to training from scratch on the same labels. A claim stands if the 95% interval of every
            check lies in its range, and falls if one lies wholly outside.
Cost        about 10 min on 2 cores. Entries of their own: `--depth 6`, 13 min; `--masked entities entities-named --depth 6`, 9 min
Quick       `--masked entities none --labels 50 --pretraining 150 --steps 60 --seeds 3`
"""

import copy

import numpy as np
import torch
from torch import nn

import core_old as core
from core_old import ANY_ABOVE, Check, Claim, Flag, at_least, one_of, probability

FLAGS = [
    Flag(
        "masked",
        one_of("entities", "entities-named", "random", "none"),
        ("entities", "random", "none"),
        "pretraining: an entity to be chosen among candidates; mentions to be named; any words to be named; none",
    ),
    Flag("masked-share", probability, (0.15,), "share of the mentions that are masked; at random as many words"),
    Flag("pretraining", at_least(10), (1000,), "steps of pretraining, on graphs without questions"),
    Flag("labels", core.widths, ((50, 200, 1000),), "labelled questions, joined by commas: each a training of its own"),
    *core.question_flags(("curriculum",), hops=((1, 2),), facts=(12,), restated=(8,), depth=(4,), steps=(300,)),
]


def pretrain(config: dict, seed: int, model: core.QuestionModel, data: core.QuestionData) -> dict:
    """Train a model in place to say what is masked: "entities" are marked and chosen among the candidates, words named among all.
    Returns, a step: the loss, and the share that is found."""
    rng, found, losses, what = core.stream(seed, "fresh patterns"), [], [], config["masked"]
    with core.initialised_from(seed):
        head = nn.Linear(config["dim"], config["dim"]).to(core.Runtime.device)
    optimizer = core.WarmAdamW(nn.ModuleList([model, head]), config["lr"], config["pretraining"])
    for _ in range(config["pretraining"]):
        questions, edges = data.sample(rng, config["batch"], data.hops)
        questions, edges, nodes, words = core.mask_words(questions, edges, rng, what, config.get("masked_share", 1.0))
        if what == "entities":
            questions = questions._replace(answer=questions.entity[nodes])
        batch = core.QuestionBatch(questions, edges, "none")
        nodes, words = (torch.from_numpy(x).to(core.Runtime.device) for x in (nodes, words))
        if what == "entities":
            batch.form, batch.start = "marked", nodes
            logits, words = model(batch), batch.answer
        else:
            logits = head(model.nodes(batch)[nodes]) @ model.embed.weight.T
        losses.append(optimizer.step(nn.functional.cross_entropy(logits, words)))
        found.append((logits.argmax(1) == words).float().mean())
    return {"pretraining_loss": torch.stack(losses).cpu().numpy(), "found_curve": torch.stack(found).cpu().numpy()}


def trial(config: dict, seed: int) -> dict:
    data, result, parts = core.QuestionData(config), dict.fromkeys(METRICS, np.nan), []
    pretrained = core.build_question_model(config, seed)
    if config["masked"] != "none":
        result |= pretrain(config, seed, pretrained, data)
        result["found"] = float(result["found_curve"][-len(result["found_curve"]) // 10 :].mean())
    for count in config["labels"]:
        model, labelled = copy.deepcopy(pretrained), data.sample(core.stream(seed, "order"), count, data.hops)

        def draw(rng: np.random.Generator, step: int, labelled: tuple = labelled) -> core.QuestionBatch:
            number = len(labelled[0].hops)
            some = np.sort(rng.choice(number, min(config["batch"], number), replace=False))
            return data.batch(*core.take_questions(*labelled, some))

        parts.append(core.train_on_questions(config, seed, model, draw, points=1))  # no figure shows accuracy by step
        kept = {key: parts[-1][key] for key in parts[-1] if key.startswith(("accuracy", "curve", "train_loss", "floor"))}
        result |= {f"{key}_labels_{count}": value for key, value in kept.items()}
    diverged = [part["diverged"] for part in parts if part["diverged"] == part["diverged"]]
    return result | {"diverged": diverged[0] if diverged else np.nan}


def cell(config: dict) -> dict:
    config = core.question_cell(config)
    if config["questions"] != "generated" and max(config["labels"]) > (have := len(core.QuestionData(config).rows["train"])):
        raise core.UsageError(f"--labels {','.join(map(str, config['labels']))}: {config['questions']} has {have} to train on")
    unread = {"none": ("masked_share", "pretraining"), "entities": ("masked_share",)}.get(config["masked"], ())
    return {key: value for key, value in config.items() if key not in unread}


NONE, RANDOM, DEEP, LABELS = {"masked": "none"}, {"masked": "random"}, {"depth": 6}, (50, 200, 1000)


def gain(count: int, over: dict, least: float = 0.0) -> Check:
    return Check(f"accuracy_labels_{count}", (least, ANY_ABOVE), {}, over)


CLAIMS = [
    Claim("masking entities helps with few labels (50, 200)", "Pretraining", [gain(n, NONE) for n in LABELS[:2]]),
    Claim("and with 1000", "Pretraining", [gain(1000, NONE)]),
] + [Claim(f"{text} (our question)", "Pretraining", checks) for text, checks in [
    ("with 200 it gains over 0.1", [gain(200, NONE, 0.1)]),
    ("it gains more than masking at random, with each", [gain(n, RANDOM) for n in LABELS]),
    ("masking at random gains less than 0.05, with each",
     [Check(f"accuracy_labels_{n}", (core.ANY_BELOW, 0.05), RANDOM, NONE) for n in LABELS]),
    ("masking entities to name them gains less than choosing them, with each",
     [Check(f"accuracy_labels_{n}", (0.0, ANY_ABOVE), DEEP, DEEP | {"masked": "entities-named"}) for n in LABELS]),
    ("over 0.75 of the masked entities are found", [Check("found", (0.75, ANY_ABOVE))]),
    ("with 50 labels 1 hop stays under 0.9 from scratch", [Check("accuracy_1_labels_50", (core.ANY_BELOW, 0.9), NONE)]),
    ("with 200 labels, pretrained, 1 hop is over 0.9", [Check("accuracy_1_labels_200", (0.9, ANY_ABOVE))]),
]]  # fmt: skip


def headline(run: core.Run) -> str:
    most = max(run.cells[0]["labels"])
    return f"accuracy from {most} labels: {core.extremes(run, f'accuracy_labels_{most}')}"


def figures(run: core.Run) -> list[core.Figure]:
    finding, told = headline(run), {1: "1 hop", 2: "2 hops", 3: "3 hops"}
    hops = [h for h in told if f"curve_{h}_labels_{run.cells[0]['labels'][0]}" in run.results[0][0]]
    rows, keys = {}, core.varying(run.cells)
    for n, (i, cell) in ((n, one) for n in run.cells[0]["labels"] for one in enumerate(run.cells)):
        rows[f"{n} labels, {core.cell_name(cell, keys)}"] = {told[h]: run.values(i, f"accuracy_{h}_labels_{n}") for h in hops}
    drawn = [core.dots_figure(rows, "accuracy", finding, "accuracy on new questions")]
    pretrained = core.only(run, [i for i, cell in enumerate(run.cells) if cell["masked"] != "none"])
    if pretrained.cells:
        lines = lambda cell, result: {cell["masked"]: core.running_median(result["found_curve"], 50)}  # noqa: E731
        text = "Masked words that are named, by step of pretraining, running median"
        drawn.append(core.curves_figure(pretrained, "found", text, lines, [], "step", "share of masked words named"))
    return drawn


SMOKE = {"labels": ((4,),), "pretraining": (10,), "hops": ((1, 2),), "entities": (5,), "facts": (6,), "restated": (2,),
         "passages": (2,), "candidates": (3,), "names": (8,), "depth": (1,), "dim": (8,), "heads": (2,), "steps": (10,),
         "batch": (4,), "test_questions": (20,)}  # fmt: skip
METRICS = [f"accuracy_labels_{n}" for n in LABELS] + [f"accuracy_{h}_labels_{n}" for n in LABELS for h in (1, 2)] + ["found"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
