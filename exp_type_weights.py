"""Should each kind of node have weights of its own (the notebook's "switch transformer"), or is one set told the kinds enough?

Entry       question-answering notebook, "Publication Clean Up": "remove redundant features like Switch transformer"
Hypothesis  The notebook calls weights per kind redundant. Ours: kinds have to be told (a subject from an object), and an embedding,
            with a logit for each pair of kinds, is enough: weights per kind, narrower so that there are no more of them, answer
            less at equal steps, and at equal width they gain less than 0.02 for six times the weights.
Rule        5 paired seeds; accuracy on 500 new questions of each number of hops, their mean, and the share of the training at which
            2 hops are first over 0.9 (100 if never). Weights count if training moves them. A claim stands if the 95% interval of
            every check lies in its range, and falls if one lies wholly outside.
Cost        about 10 min on 2 cores, less behind exp_query_node, which trains the first arm. An entry of its own, trained longer:
            `--equal width --steps 2000`, 8 min
Quick       `--types embedding none --hops 1 --steps 250 --seeds 3`
"""

import functools

import numpy as np

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, one_of

FLAGS = [
    Flag("equal", one_of("parameters", "width"), ("parameters",), "weights per kind: as many of them in all, or as wide"),
    *core.question_flags(types=("embedding", "none", "switch")),
]


@functools.cache
def used_weights(settings: tuple) -> int:
    """How many weights of a model a training step moves: those of kinds that never occur do not count."""
    config = dict(settings)
    model = core.build_question_model(config, 0)
    data = core.QuestionData(config)
    model(data.draw(core.stream(0, "train"), config["batch"], data.hops)).clamp(min=-1e9).sum().backward()
    return sum(p.numel() for p in model.parameters() if p.grad is not None)


def narrowed(config: dict) -> int:
    """The width, a multiple of the heads, at which weights per kind come nearest to the number of shared ones."""
    count = lambda types, dim: used_weights(tuple((config | {"types": types, "dim": dim}).items()))  # noqa: E731
    goal, choices = count("embedding", config["dim"]), range(config["heads"], config["dim"] + 1, config["heads"])
    return min(choices, key=lambda dim: abs(count("switch", dim) - goal))


def cell(config: dict) -> dict:
    config = core.question_cell(config)
    if config["types"] != "switch":
        return {key: value for key, value in config.items() if key != "equal"}
    return config | {"dim": narrowed(config)} if config["equal"] == "parameters" else config


def trial(config: dict, seed: int) -> dict:
    _, result = core.trained_on_questions(config, seed)
    two = result.get("curve_2", np.zeros(2))
    over = np.append(np.nonzero(two > 0.9)[0], len(two) - 1)
    return result | {"learned_2": 100.0 * over[0] / (len(two) - 1)}


NONE, SWITCH, LONGER = {"types": "none"}, {"types": "switch"}, {"steps": 2000}
WIDE = SWITCH | LONGER | {"equal": "width"}
LOSS = (ANY_BELOW, 0.0)
CLAIMS = [
    Claim("weights per kind are redundant: at equal width they gain less than 0.02", "Publication Clean Up",
          [Check("accuracy", (ANY_BELOW, 0.02), WIDE, LONGER)]),
    Claim("at equal parameters too", "Publication Clean Up", [Check("accuracy", (ANY_BELOW, 0.02), SWITCH, {})]),
] + [Claim(f"{text} (our question)", "Publication Clean Up", checks) for text, checks in [
    ("at equal parameters they answer less", [Check("accuracy", LOSS, SWITCH, {})]),
    ("shared weights that are told no kinds answer less", [Check("accuracy", LOSS, NONE, {})]),
    ("they do not even solve 1 hop", [Check("accuracy_1", (ANY_BELOW, 0.99), NONE)]),
    ("told kinds, shared weights solve 1, 2 and 3 hops",
     [Check("accuracy_1", (0.99, ANY_ABOVE)), Check("accuracy_2", (0.9, ANY_ABOVE)), Check("accuracy_3", (0.9, ANY_ABOVE))]),
    ("at equal width weights per kind learn 2 hops sooner", [Check("learned_2", LOSS, WIDE, LONGER)]),
    ("the narrow ones have as many weights, or up to 15% more", [Check("parameters", (1.0, 1.15), SWITCH, {}, scale="ratio")]),
]]  # fmt: skip


def headline(run: core.Run) -> str:
    return f"mean accuracy of 1 to 3 hops: {core.extremes(run, 'accuracy')}"


def figures(run: core.Run) -> list[core.Figure]:
    return core.hop_figures(run, headline(run))


SMOKE = {"types": ("switch",), "equal": ("parameters",), "hops": ((1, 2),), "entities": (5,), "facts": (6,), "passages": (2,),
         "candidates": (3,), "names": (8,), "depth": (1,), "dim": (8,), "heads": (2,), "steps": (10,), "batch": (4,),
         "test_questions": (20,)}  # fmt: skip
METRICS = ["accuracy", "accuracy_1", "accuracy_2", "accuracy_3", "learned_2", "parameters"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
