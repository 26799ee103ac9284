"""Does a norm after attention cost 1.5 to 2 in loss, or did the notebook's schedule do it?

Notebook    attention notebook: ablations
Setup       The model is as near to the one that we infer for the notebook as 2 cores allow: 8
            layers of one head, width 64, on bytes of English. Its initial weights are small:
            normal, of deviation 0.25 (in output projections 0.5 / layers) over the root of the
            number of inputs. post_attn_norm is x / sqrt(mean x^2) of a head's output.

            The notebook does not state how it trained; we infer, and use, the schedule of hlb-gpt,
            a public training script. Training ends after 250 micro-batches of 1,024 bytes. The
            windows double every 40 steps, from 8 to 128 bytes. The number of micro-batches per step
            follows the gradient norm over the root of the number of parameters, g: every 5 steps it
            is multiplied by 1 + 0.025 (g / target - 1), with a target that falls with the steps. So
            larger gradients mean fewer steps.

            We compare it with equal steps (250, one micro-batch of full windows each) and with a
            swapped schedule: a model without the norm takes the steps of its partner with it, and
            the reverse. Single changes to softmax attention go towards the inferred model (8
            channels of queries and keys instead of 64; windows from 32 bytes), sharpen the schedule
            (gain 0.1 instead of 0.025), or change the depth (2 layers).
Hypothesis  post_attn_norm costs 1.5 to 2, for softmax and sigmoid. Ours: in no config is the cost
            near that, so the cause stays unknown. With equal steps the norm costs nothing. It has
            larger early gradients and takes fewer steps; a model without it loses on the schedule
            with the norm, and a model with it gains on the schedule without the norm.
Rule        8 paired seeds from 200 on, 24 for the two arms of 2 layers. With 4 for all but the
            first four arms the notebook's claim was open (largest cost 0.124, from 0.093 to 0.156),
            and with 8 for all (0.116 ± 0.023, with 2 layers): by its spread 24 seeds give ± 0.012.

            Nats per byte: the loss, mean over held-out windows of 128 bytes. Early gradient: median
            gradient norm over the first 10 steps. Last window: length of the windows in the last
            step.

            The notebook's 1.5 to 2 is a "loss value". We infer nats per token and assume 4.5 bytes
            per token: 0.33 to 0.44 nats per byte. Its model and text are others, so only direction
            and order of magnitude are judged: over 0.1. The notebook states no config, so the one
            with the largest mean cost counts (largest cost), of those with the inferred schedule;
            choosing the largest favours the notebook.

            Costs nothing means below 0.02. "Loses" and "gains": the loss differs by over 0.02.
            Fewer steps means below 0.95 as many.
Cost        23 min on 2 cores; `--layers 2 --arms softmax 'softmax, post_attn_norm'` 2 min
"""

import math

import core
from core import OURS, Check, Claim
from exp_attention_ablation import (
    add_attention_flags,
    add_language_flags,
    check_language_flags,
    name_texts,
)

import numpy as np
from torch import nn

parser = core.make_parser(__doc__, seeds=24, ablation_seeds=8)
parser.set_defaults(first_seed=200)  # tolerances were chosen knowing others
parser.add_argument(
    "--schedule",
    nargs="+",
    choices=["notebook", "equal", "swapped"],
    default=["notebook"],
    help="steered by the gradient; equal steps; or the steps of the other post-attn-norm",
)
parser.add_argument(
    "--gain",
    nargs="+",
    type=core.positive_float,
    default=[0.025],
    help="relative change of the micro-batches for a gradient norm of twice its target",
)
parser.add_argument(
    "--growth",
    nargs="+",
    type=core.positive_int,
    default=[40],
    help="steps between doublings of the length",
)
parser.add_argument(
    "--first-length", nargs="+", type=core.positive_int, default=[8], help="bytes at first"
)
parser.add_argument(
    "--init",
    nargs="+",
    choices=["notebook", "torch"],
    default=["notebook"],
    help="initial weights: small; torch's own",
)
parser.add_argument(
    "--query-dim",
    nargs="+",
    type=core.layer_width,
    default=[64],
    help="channels of queries and keys over all heads",
)
add_attention_flags(parser, ["attn-activ", "post-attn-norm"])
add_language_flags(parser, layers=8, dim=64, heads=1, steps=250)

SIGMOID = {"attn_activ": "sigmoid"}
NORM = {"post_attn_norm": "rms_norm"}
EQUAL_STEPS = {"schedule": "equal"}
SWAPPED = {"schedule": "swapped"}
CHANGES = {  # to softmax attention, under the inferred schedule
    "8 query channels": {"query_dim": 8},
    "from 32 bytes": {"first_length": 32},
    "2 layers": {"layers": 2},
    "gain 0.1": {"gain": 0.1},
}
ARMS = {  # the baseline first; a run with flags takes these
    "softmax": {},
    "softmax, post_attn_norm": NORM,
    "softmax, equal steps": EQUAL_STEPS,
    "softmax, post_attn_norm, equal steps": {**EQUAL_STEPS, **NORM},
}
ABLATIONS = {  # what else the claims read
    "sigmoid": SIGMOID,
    "sigmoid, post_attn_norm": {**SIGMOID, **NORM},
    "softmax, swapped schedule": SWAPPED,
    "softmax, post_attn_norm, swapped schedule": {**SWAPPED, **NORM},
    **{f"softmax, {name}": row for name, row in CHANGES.items()},
    **{f"softmax, post_attn_norm, {name}": {**NORM, **row} for name, row in CHANGES.items()},
}
parser.few_seeds = {  # 24 only for the largest cost
    **dict.fromkeys(ARMS, 8),
    "softmax, 2 layers": 24,
    "softmax, post_attn_norm, 2 layers": 24,
}
WITH_NORM = {  # {arm under the inferred schedule: the same with the norm}
    "softmax": "softmax, post_attn_norm",
    "sigmoid": "sigmoid, post_attn_norm",
    **{f"softmax, {name}": f"softmax, post_attn_norm, {name}" for name in CHANGES},
}
LOSS = "nats per byte"
COLUMNS = [LOSS, "steps", "last window, bytes", "early gradient"]
ROWS = [  # of the entry's table; all arms stand in its CSV
    *ARMS,
    "sigmoid",
    "sigmoid, post_attn_norm",
    "softmax, swapped schedule",
    "softmax, post_attn_norm, swapped schedule",
]
TINY = {
    "layers": 1,
    "dim": 8,
    "query_dim": 8,
    "length": 16,
    "batch": 2,
    "steps": 12,
    "growth": 2,
    "first_length": 4,
}
LOOK = 5  # steps between two looks at the gradient


class NotebookSchedule:
    """Length of the windows and number of micro-batches, step by step, until they are spent.

    Every LOOK steps the wanted number is multiplied by 1 + gain (norm / target - 1): norm is the
    gradient's over the root of the P parameters, and the target (t P log P) ** (-0.677 log(P) **
    -0.2) falls with step t. A step takes that number, rounded at random, and at least one.
    Source: hlb-gpt, from which we infer that the notebook's code was made.
    """

    def __init__(self, config, parameters, seed):
        self.config = config
        self.parameters = parameters
        self.rng = core.stream(seed, "val")  # windows are drawn from "order", in any schedule
        self.left = config.steps
        self.step = 0
        self.wanted = 0.1

    def next(self, norm):
        """(length, micro-batches) after a step with this gradient norm; (0, 0) at the end."""
        config = self.config
        doublings = min(self.step // config.growth, 20)
        length = min(config.length, config.first_length << doublings)
        if self.step > 0 and self.step % LOOK == 0 and math.isfinite(norm):
            log_p = math.log(self.parameters)
            work = self.step * self.parameters * log_p
            target = work ** (-0.677 * log_p**-0.2)
            excess = norm / math.sqrt(self.parameters) / target - 1
            self.wanted = max(self.wanted * (1 + config.gain * excess), 0.1)
        count = min(max(1, int(self.wanted + self.rng.random())), self.left)
        self.left -= count
        self.step += 1
        return (length, count) if count > 0 else (0, 0)


class FixedSchedule:
    """Given steps: a list of (length, micro-batches)."""

    def __init__(self, steps):
        self.steps = iter(steps)

    def next(self, norm):
        """The next of them, whatever the gradient norm; (0, 0) at the end."""
        return next(self.steps, (0, 0))


def trial(config, seed, job):
    """Train by the arm's schedule, measure the held-out loss and what the schedule did."""
    text = core.load_text(config.text)
    check_language_flags(config, text)
    if config.query_dim % config.heads:
        flags = f"--query-dim {config.query_dim}: --heads {config.heads}"
        raise core.UsageError(f"{flags} do not divide it")
    schedule = None
    if config.schedule == "equal":
        schedule = FixedSchedule([(config.length, 1)] * config.steps)
    elif config.schedule == "swapped":
        other = {"none": "rms_norm", "rms_norm": "none"}[config.post_attn_norm]
        model = make_model(config, seed, other).to(job.device)
        schedule = FixedSchedule(train(model, text, config, seed)[0])
    model = make_model(config, seed, config.post_attn_norm).to(job.device)
    steps, norms = train(model, text, config, seed, schedule)
    lengths, counts = np.array(steps).T
    spent = np.arange(1, config.steps + 1, max(1, config.steps // 40))
    return {
        LOSS: core.held_out_loss(model, text, config.length),
        "steps": len(steps),
        "last window, bytes": lengths[-1],
        "early gradient": np.median(norms[:10]),
        "steps by micro-batches": 1 + np.searchsorted(np.cumsum(counts), spent),
        "text": text.digest(),
    }


def make_model(config, seed, post_attn_norm):
    """A language model with the initial weights of the arm."""
    with core.initialised_from(seed):
        layers = []
        for _ in range(config.layers):
            mixing = core.CausalAttention(
                config.dim,
                config.heads,
                attn_activ=config.attn_activ,
                post_attn_norm=post_attn_norm,
                query_dim=config.query_dim,
            )
            feedforward = core.FeedForward(config.dim, 4 * config.dim)
            if config.init != "torch":
                small = 0.5 / config.layers
                draw_weights(mixing.inputs, 0.25)
                draw_weights(mixing.out, small)
                draw_weights(feedforward.first, 0.25)
                draw_weights(feedforward.last, small)
            layers.append(core.TransformerLayer(mixing, feedforward, config.dim))
        return core.LanguageModel(layers, config.dim)


def draw_weights(linear, scale):
    """Normal weights with `scale` over the root of the inputs as deviation, and no bias."""
    nn.init.normal_(linear.weight, std=scale * linear.in_features**-0.5)
    nn.init.zeros_(linear.bias)


def train(model, text, config, seed, schedule=None):
    """Train by a schedule (default: the notebook's): its steps, and the gradients' norms.

    The learning rate rises over the first config.steps / 10 optimizer steps.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    schedule = schedule or NotebookSchedule(config, parameters, seed)
    optimizer = core.language_optimizer(model, config.lr)
    rng = core.stream(seed, "order")
    warm_up = max(1, config.steps // 10)
    device = model.embed.weight.device
    steps = []
    norms = [math.nan]
    while True:
        length, count = schedule.next(norms[-1])
        if count == 0:
            return steps, np.array(norms[1:])
        batches = []
        for _ in range(count):
            size = config.batch * config.length // length
            starts = rng.integers(len(text.train) - length, size=size)
            batches.append(core.cut_windows(text.train, starts, length, device))
        rate = config.lr * min(1.0, (len(steps) + 1) / warm_up)
        _, norm = core.language_step(model, optimizer, rate, batches)
        steps.append((length, count))
        norms.append(norm)


def cost_of_norm(run, without, with_norm):
    """Loss with the norm minus that without it: [S]."""
    return run.values(with_norm, LOSS) - run.values(without, LOSS)


def across(run):
    """The norm's cost in the config where its mean is largest: [S]."""
    costs = [cost_of_norm(run, *arms) for arms in WITH_NORM.items()]
    return {"largest cost": max(costs, key=np.mean)}


CLAIMS = [
    Claim(
        "Under the inferred schedule post_attn_norm costs over 0.1 nats per byte in the config "
        "with the largest cost (notebook: 1.5 to 2 in loss value)",
        "ablations",
        Check("largest cost", above=0.1),
    ),
    Claim(
        "With 250 steps on full windows post_attn_norm costs softmax nothing",
        OURS,
        Check(
            LOSS,
            below=0.02,
            arm="softmax, post_attn_norm, equal steps",
            minus="softmax, equal steps",
        ),
    ),
    Claim(
        "post_attn_norm has larger early gradients and takes fewer steps, for softmax and sigmoid",
        OURS,
        Check("early gradient", above=1, arm="softmax, post_attn_norm", over="softmax"),
        Check("early gradient", above=1, arm="sigmoid, post_attn_norm", over="sigmoid"),
        Check("steps", below=0.95, arm="softmax, post_attn_norm", over="softmax"),
        Check("steps", below=0.95, arm="sigmoid, post_attn_norm", over="sigmoid"),
    ),
    Claim(
        "Softmax without post_attn_norm loses on the schedule with it, and with post_attn_norm "
        "gains on the schedule without it",
        OURS,
        Check(LOSS, above=0.02, arm="softmax, swapped schedule", minus="softmax"),
        Check(
            LOSS,
            below=-0.02,
            arm="softmax, post_attn_norm, swapped schedule",
            minus="softmax, post_attn_norm",
        ),
    ),
]


def plot(run):
    """{name of the file: figure or text}."""
    return {
        "cost": draw_costs(run),
        "steps": core.draw_curves(
            run,
            "steps by micro-batches",
            "With post_attn_norm the inferred schedule takes fewer steps",
            "Optimizer steps by micro-batches spent",
            "micro-batches spent, about a fortieth of all per unit",
            "steps taken",
            panels={
                "softmax": ["softmax", "softmax, post_attn_norm"],
                "sigmoid": ["sigmoid", "sigmoid, post_attn_norm"],
            },
        ),
        "text.txt": name_texts(run),
    }


def draw_costs(run):
    """The norm's cost in every config, with its 95% interval; None unless the run has all."""
    if not run.is_whole:
        return None
    figure, axes = core.new_figure(
        run,
        "post_attn_norm costs most in two layers, a third of what 1.5 per token would be",
        "Cost of post_attn_norm, a dot per seed, the mean's 95% interval",
        height=4.0,
    )
    axis = axes[0, 0]
    pairs = WITH_NORM | {"softmax, equal steps": "softmax, post_attn_norm, equal steps"}
    for row, arms in enumerate(pairs.items()):
        costs = cost_of_norm(run, *arms)
        found = core.mean_interval(costs)
        axis.plot(costs, [row] * len(costs), "o", color="#0072B2", alpha=0.4)
        axis.plot([found.low, found.high], [row, row], color="black", linewidth=2)
    core.draw_levels(axis.axvline, {"notebook: 1.5, if per token": 0.33, "no cost": 0.0})
    axis.set(xlabel="nats per byte", yticks=range(len(pairs)))
    axis.set_yticklabels(pairs)
    axis.invert_yaxis()
    axis.legend(fontsize=9, loc="center")
    return figure


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY, across=across, rows=ROWS)
