"""Does a norm behind attention cost 1.5 to 2 in loss, or did the notebook's training make that difference?

Entry       attention notebook, 2024-10-10, "Ablations": post_attn_norm
Hypothesis  The notebook: rms_norm of what attention mixed costs 1.5 to 2, for softmax and sigmoid. Its training steered the number
            of micro-batches a step by the gradient's norm, doubled the length of its windows every 80 optimizer steps, and ended
            when its tokens were spent. Ours: a setting with larger gradients takes fewer steps, on shorter windows, and that makes
            the difference: at equal steps the norm costs nothing, and no norm at the norm's pace loses what the norm lost.
Rule        5 paired seeds; nats a token of the notebook's, as in attention_ablation, on windows of full length. Costs: over 0.1;
            nothing: below 0.1; fewer steps: ratio below 0.95. A claim stands if the 95% interval of every check lies in its range,
            and falls if one lies wholly outside.
Cost        about 20 min on 2 cores. Nearer to the notebook's model (8 layers, one head, its initial weights), 20 min, an entry of
            its own: `--pace notebook steps borrowed --layers 8 --dim 64 --heads 1 --init notebook`
Quick       `--pace notebook steps --steps 40 --seeds 3`
"""

import math

import numpy as np

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, at_least, one_of

PACES = ("notebook", "steps", "batches", "lengths", "borrowed")
FLAGS = [
    Flag("pace", one_of(*PACES), PACES, "notebook: micro-batches steered, lengths grown; batches, lengths: one of these; steps: "
         "neither; borrowed: as the other post-attn-norm stepped in the notebook's pace"),
    Flag("gain", at_least(0.0, float), (0.025,), "relative change of the micro-batches for a gradient twice its target"),
    Flag("growth", at_least(1), (40,), "optimizer steps between doublings of the length"),
    Flag("first-length", at_least(1), (8,), "bytes of a window at first"),
    *core.language_flags(("bug",), attn_activ=("softmax", "sigmoid"), post_attn_norm=("none", "rms_norm"), steps=(400,)),
]  # fmt: skip
UNREAD = {"steps": ("gain", "growth", "first_length"), "batches": ("growth", "first_length"), "lengths": ("gain",)}
SAMPLE = 5  # optimizer steps between the controller's looks at the gradient


class NotebookPace:
    """Until `steps` micro-batches are spent. Every SAMPLE optimizer steps the wanted number of micro-batches a step is multiplied
    by 1 + gain (norm / target - 1), where norm is the gradient's over the root of the P parameters and target falls with step t:
    (t P log P) ** (-0.677 log(P) ** -0.2). A step takes that number, rounded at random to the right mean, but at least one. Every
    `growth` optimizer steps the length doubles, up to the full one. Source: the code that the notebook trained with, hlb-gpt."""

    def __init__(self, config: dict, model: core.LanguageModel, seed: int):
        self.config, self.left, self.rng = config, config["steps"], core.stream(seed, "val")
        self.parameters = sum(p.numel() for p in model.parameters())
        self.step, self.wanted, self.norm = 0, 0.1, None

    def next(self) -> tuple[int, int]:
        length, pace = self.config["length"], self.config["pace"]
        if pace != "batches":
            length = min(length, self.config["first_length"] << min(self.step // self.config["growth"], 20))
        if pace != "lengths" and self.step and self.step % SAMPLE == 0:
            target = (self.step * self.parameters * math.log(self.parameters)) ** (-0.677 * math.log(self.parameters) ** -0.2)
            excess = float(self.norm) / math.sqrt(self.parameters) / target - 1
            if math.isfinite(excess):  # after a divergence it stays as it was
                self.wanted = max(self.wanted * (1 + self.config["gain"] * excess), 0.1)
        count = min(max(1, int(self.wanted + self.rng.random())), self.left)
        self.left, self.step = self.left - count, self.step + 1
        return length, count

    def seen(self, gradient_norm) -> None:
        self.norm = gradient_norm


class Replay:
    """The pace of an earlier run, step by step."""

    def __init__(self, run: dict):
        self.steps = zip(*(run[name].astype(int).tolist() for name in ("length_curve", "micro_batch_curve")), strict=True)

    def next(self) -> tuple[int, int]:
        return next(self.steps, (0, 0))

    def seen(self, gradient_norm) -> None:
        pass


def train(config: dict, seed: int) -> dict:
    if config["pace"] == "steps":
        return core.train_on_text(config, seed)
    if config["pace"] == "borrowed":
        other = {"none": "rms_norm", "rms_norm": "none"}[config["post_attn_norm"]]
        lender = train(config | {"pace": "notebook", "post_attn_norm": other}, seed)
        return core.train_on_text(config, seed, lambda c, model: Replay(lender))
    return core.train_on_text(config, seed, lambda c, model: NotebookPace(c, model, seed))


def trial(config: dict, seed: int) -> dict:
    result = train({"bug": "none"} | config, seed)
    last, early = result["length_curve"][-1], np.median(result["gradient_curve"][: 2 * SAMPLE])
    result |= {"token_loss": core.BYTES_A_TOKEN * result["loss"], "last_length": last, "early_gradient": early}
    spent = np.cumsum(result["micro_batch_curve"])
    return result | {"steps_by_spent": 1.0 + np.searchsorted(spent, np.arange(1, config["steps"] + 1, 10))}


def cell(config: dict) -> dict:
    whole = core.language_cell({"bug": "none"} | config)
    return {key: value for key, value in whole.items() if key not in ("bug", *UNREAD.get(config["pace"], ()))}


SIGMOID, NORM, STEPS, BORROWED = {"attn_activ": "sigmoid"}, {"post_attn_norm": "rms_norm"}, {"pace": "steps"}, {"pace": "borrowed"}
BOTH, DEEP = ({}, SIGMOID), {"layers": 8, "dim": 64, "heads": 1, "init": "notebook"}


def costs(low: float, high: float, one: dict, other: dict) -> list[Check]:
    """An arm against another, for softmax and sigmoid."""
    return [Check("token_loss", (low, high), one | kind, other | kind) for kind in BOTH]


CLAIMS = [
    claim for model, size in (("", {}), (", 8 layers", DEEP)) for claim in (
        Claim(f"post_attn_norm costs 1.5 to 2 in the notebook's training{model}", "Ablations", costs(1.5, 2, NORM | size, size)),
        Claim(f"it costs something there{model} (our question)", "Ablations", costs(0.1, ANY_ABOVE, NORM | size, size)),
        Claim(f"it costs nothing at equal steps{model} (our question)", "Ablations",
              costs(ANY_BELOW, 0.1, NORM | STEPS | size, STEPS | size)),
        Claim(f"it takes fewer steps in the notebook's training{model} (our question)", "Ablations",
              [Check("steps", (ANY_BELOW, 0.95), NORM | size | one, size | one, "ratio") for one in BOTH]),
        Claim(f"no norm at the norm's pace loses something{model} (our question)", "Ablations",
              costs(0.1, ANY_ABOVE, BORROWED | size, size)),
        Claim(f"the norm at the pace of no norm costs nothing{model} (our question)", "Ablations",
              costs(ANY_BELOW, 0.1, BORROWED | NORM | size, size)))
] + [
    Claim("the steered micro-batches lose against one a step, by over 0.1 (our question)", "Ablations",
          costs(0.1, ANY_ABOVE, {"pace": "batches"}, STEPS)),
    Claim("growing lengths lose against full ones, by over 0.1 (our question)", "Ablations",
          costs(0.1, ANY_ABOVE, {"pace": "lengths"}, STEPS)),
]  # fmt: skip


def headline(run: core.Run) -> str:
    return f"held-out nats a byte: {core.extremes(run, 'loss')}"


def figures(run: core.Run) -> list[core.Figure]:
    panels = [key for key in core.varying(run.cells) if key != "post_attn_norm"]
    lines = lambda metric: lambda cell, result: {f"post_attn_norm {cell['post_attn_norm']}": result[metric]}  # noqa: E731
    steps = core.curves_figure(
        run, "steps", f"Optimizer steps: {core.extremes(run, 'steps')}", lines("steps_by_spent"), panels,
        "micro-batches spent", "optimizer steps taken", every=10)  # fmt: skip
    rows = {arm: {"loss": row["loss"]} for arm, row in core.by_arm(run, ["loss"]).items()}
    return [core.dots_figure(rows, "loss", headline(run), "held-out loss, nats a byte"), steps]


SMOKE = {"pace": ("notebook", "borrowed"), "attn_activ": ("softmax",), "layers": (1,), "dim": (8,), "heads": (2,),
         "length": (16,), "batch": (2,), "steps": (12,), "growth": (2,), "first_length": (4,)}  # fmt: skip
METRICS = ["loss", "bits", "token_loss", "steps", "tokens", "last_length", "gradient_norm", "early_gradient"]
EXPERIMENT = core.Experiment(
    __file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell, memory=core.language_memory
)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
