"""Are norms in attention bad or untuned, and when is a sigmoid as good as softmax?

Notebook    attention notebook: ablations
Setup       The language model of attention_ablation: 2 layers, width 128, 4 heads, 250 steps of
            AdamW on 8 windows of 128 bytes of English, equal for all. Each setting is trained at
            two learning rates, next to what was best in an earlier sweep from 0.0005 to 0.008:
            0.001 and 0.002; for fro_norm with its own or a learned scale twice as much; for tanh
            and none four times. The notebook's norms have no learned weights. The logits of
            fro_norm, q k^T over the root of a head's 32 channels, stay within 0.18; a scale of 14
            instead (QKNorm's start for 128 bytes) and a learned one are tried. Sigmoid attention as
            published since (Ramapuram et al., arXiv 2409.04431) has a bias of -log n on its logits,
            n the bytes of context, and a norm on the attention's output or LayerScale. Each is
            added by itself to the notebook's sigmoid, with its linear position bias and with rotary
            positions. Here the norm is a layer norm after the output projection, and LayerScale, a
            learned factor per channel, starts at 0.1.
Hypothesis  The authors' later notes: norms change the training dynamics and were not tuned for; in
            another code base sigmoid was clearly worse than softmax, perhaps for its position
            encoding. Ours: each setting at its own rate, rms_norm and post_attn_norm cost nothing
            and fro_norm, tanh and none still do. A sigmoid is as good as softmax where the linear
            bias keeps the sum of its weights near 1. With rotary positions that sum is about a
            quarter of the context at first; then -log n mends most, and a norm or a small scale of
            the output less, since they leave the sum as it is. It is the trouble of gating on
            graphs, whose sums are too large until they are divided (gating_causes).
Rule        10 paired seeds, 5 for ablations. A check holds if its 95% interval lies inside its
            bounds and fails if it lies outside; one failed check refutes a claim. Loss: held-out
            nats per byte. Tuned loss: at the rate that is best on the mean of the other seeds, so
            that choosing gains nothing by chance. Cost: tuned loss less that of another setting.
            Costs nothing: below 0.02; costs, worse: over 0.02; as good: within 0.02. A remedy mends
            most of a cost if it leaves at most half of it, and hurts if it costs over 0.02. Sum of
            weights: mean over queries, heads and layers of the sum of the absolute attention
            weights before training, on held-out text; near 1: 0.5 to 2; large: over 10. Takes back:
            lowers the cost by over 0.02.
Cost        28 min on 2 cores; `--lr 2e-3 --arms 'softmax, lr 0.002' 'sigmoid, lr 0.002'` 3 min
"""

import itertools
import math

import core
from core import OURS, Check, Claim
from exp_attention_ablation import add_attention_flags

import numpy as np
import torch
from torch import nn

parser = core.make_parser(__doc__, seeds=10, ablation_seeds=5)
parser.set_defaults(first_seed=100)  # tolerances were chosen knowing 0 to 16
add_attention_flags(parser, ["attn-activ", "qk-norm", "post-attn-norm", "position"])
parser.add_argument(
    "--logit-scale",
    nargs="+",
    choices=["root", "root-learned", "14"],
    default=["root"],
    help="factor of q k^T: 1 / root of a head's channels, learned from there, or 14",
)
parser.add_argument(
    "--logit-bias",
    nargs="+",
    choices=["none", "log-n"],
    default=["none"],
    help="log-n: subtract the logarithm of the context from every logit",
)
parser.add_argument(
    "--output",
    nargs="+",
    choices=["plain", "norm", "layer-scale"],
    default=["plain"],
    help="what acts on the attention's output before it is added: a layer norm or LayerScale",
)
core.add_language_flags(parser, layers=2, dim=128, heads=4, steps=250)

SIGMOID = {"attn_activ": "sigmoid"}
FRO = {"qk_norm": "fro_norm"}
ROTARY = {"position": "rotary"}
REMEDIES = {
    "-log n": {"logit_bias": "log-n"},
    "output norm": {"output": "norm"},
    "LayerScale": {"output": "layer-scale"},
}
LOW_RATE_NORMS = {
    "rms_norm": {"qk_norm": "rms_norm"},
    "post_attn_norm": {"post_attn_norm": "rms_norm"},
    "fro_norm, scale 14": {**FRO, "logit_scale": "14"},
}
MIDDLE_RATE_NORMS = {
    "fro_norm": FRO,
    "fro_norm, learned scale": {**FRO, "logit_scale": "root-learned"},
}
LOW = (1e-3, 2e-3)
MIDDLE = (2e-3, 4e-3)
HIGH = (4e-3, 8e-3)


def add_to(base, name, changes):
    """{name with each change: settings}."""
    return {f"{name}, {change}": {**base, **changes[change]} for change in changes}


def at_rates(settings, rates):
    """Rows of arms: every setting at every learning rate."""
    rows = {}
    for name, row in settings.items():
        for lr in rates:
            rows[f"{name}, lr {lr:g}"] = {**row, "lr": lr}
    return rows


ARMS = at_rates({"softmax": {}, "sigmoid": SIGMOID}, LOW)  # the baseline first
ABLATIONS = {  # what else the claims read
    **at_rates(add_to({}, "softmax", LOW_RATE_NORMS), LOW),
    **at_rates(add_to(SIGMOID, "sigmoid", LOW_RATE_NORMS), LOW),
    **at_rates(add_to({}, "softmax", MIDDLE_RATE_NORMS), MIDDLE),
    **at_rates(add_to(SIGMOID, "sigmoid", MIDDLE_RATE_NORMS), MIDDLE),
    **at_rates({"tanh": {"attn_activ": "tanh"}, "no activation": {"attn_activ": "none"}}, HIGH),
    **at_rates(add_to(SIGMOID, "sigmoid", REMEDIES), LOW),
    **at_rates({"softmax, rotary": ROTARY, "sigmoid, rotary": {**SIGMOID, **ROTARY}}, LOW),
    **at_rates(add_to({**SIGMOID, **ROTARY}, "sigmoid, rotary", REMEDIES), LOW),
}
LOSS = "nats per byte"
COLUMNS = [LOSS, "sum of weights", "gradient norm", "steps"]
ROWS = [  # of the entry's table; all arms stand in its CSV
    "softmax, lr 0.002",
    "sigmoid, lr 0.002",
    "softmax, fro_norm, lr 0.002",
    "softmax, rms_norm, lr 0.002",
    "softmax, post_attn_norm, lr 0.002",
    "softmax, rotary, lr 0.002",
    "sigmoid, rotary, lr 0.002",
    "sigmoid, rotary, -log n, lr 0.002",
    "sigmoid, rotary, output norm, lr 0.002",
]
TINY = {"layers": 1, "dim": 8, "heads": 2, "length": 16, "batch": 2, "steps": 10}


class PublishedAttention(core.CausalAttention):
    """CausalAttention with a scale and a bias of its logits, and something on its output.

    scale    factor of the logits beside 1 / root of the channels, learned or not
    bias     subtracted from the logits
    output   module [B T, D] -> [B T, D]
    Source: bias, norm and LayerScale: Ramapuram et al., arXiv 2409.04431; scale: QKNorm, Henry
    et al., arXiv 2010.04245.
    """

    def __init__(self, dim, heads, scale, learned, bias, output, **options):
        super().__init__(dim, heads, **options)
        log_scale = torch.full((heads,), scale).log()  # a step is the same share of any scale
        self.log_scale = nn.Parameter(log_scale) if learned else None
        self.scale = scale
        self.bias = bias
        self.output = output
        self.sum_of_weights = 0.0  # of the latest call in evaluation mode

    def forward(self, x, shape):
        return self.output(super().forward(x, shape))

    def weigh(self, logits):
        scale = self.scale
        if self.log_scale is not None:
            scale = self.log_scale.exp()[:, None, None]
        weights = super().weigh(logits * scale - self.bias)
        if not self.training:
            self.sum_of_weights = weights.abs().sum(dim=-1).mean().item()
        return weights


class LayerScale(nn.Module):
    """x times a learned factor per channel: [V, D] -> [V, D]. Source: arXiv 2103.17239."""

    def __init__(self, dim, start=0.1):
        super().__init__()
        self.factor = nn.Parameter(torch.full((dim,), start))

    def forward(self, x):
        return self.factor * x


def trial(config, seed, job):
    """Measure the attention's sums before training, train, measure the held-out loss."""
    text = core.load_text(config.text)
    core.check_language_flags(config, text)
    with core.initialised_from(seed):
        layers = [make_layer(config) for _ in range(config.layers)]
        model = core.LanguageModel(layers, config.dim).to(job.device)
    core.held_out_loss(model, text, config.length, windows=8)
    sums = [layer.mixing.sum_of_weights for layer in model.layers]
    history = core.train_on_text(
        model,
        text,
        seed=seed,
        lr=config.lr,
        steps=config.steps,
        batch=config.batch,
        length=config.length,
    )
    return {
        LOSS: core.held_out_loss(model, text, config.length),
        "sum of weights": np.mean(sums),
        "gradient norm": np.median(history["gradient_norm"]),
        "steps": config.steps,
        "text": text.digest(),
    }


def make_layer(config):
    """One layer with the attention that the arm names: [B T, D] -> [B T, D]."""
    channels = config.dim // config.heads
    output = nn.Identity()
    if config.output == "norm":
        output = nn.LayerNorm(config.dim)
    elif config.output == "layer-scale":
        output = LayerScale(config.dim)
    mixing = PublishedAttention(
        config.dim,
        config.heads,
        scale=14.0 * channels**0.5 if config.logit_scale == "14" else 1.0,
        learned=config.logit_scale == "root-learned",
        bias=math.log(config.length) if config.logit_bias == "log-n" else 0.0,
        output=output,
        attn_activ=config.attn_activ,
        qk_norm=config.qk_norm,
        post_attn_norm=config.post_attn_norm,
        position=config.position,
    )
    return core.TransformerLayer(mixing, core.FeedForward(config.dim, 4 * config.dim), config.dim)


def split_arms():
    """{setting: its arms, one per learning rate}."""
    found = {}
    for arm in ARMS | ABLATIONS:
        found.setdefault(arm.rpartition(", lr ")[0], []).append(arm)
    return found


SETTINGS = split_arms()


def tuned_loss(run, setting):
    """Loss of a setting on each seed at the rate that is best on the mean of the others: [S]."""
    losses = np.array([run.values(arm, LOSS) for arm in SETTINGS[setting]])  # [rates, S]
    losses = np.nan_to_num(losses, nan=np.inf)  # of what diverged
    seeds = np.arange(losses.shape[1])
    chosen = []
    for seed in seeds:
        others = seeds[seeds != seed] if len(seeds) > 1 else seeds
        chosen.append(losses[:, others].mean(axis=1).argmin())
    return losses[chosen, seeds]


def cost(run, setting, base):
    """Tuned loss of a setting less that of another, on the seeds that both have: [S]."""
    one = tuned_loss(run, setting)
    other = tuned_loss(run, base)
    fewest = min(len(one), len(other))
    return one[:fewest] - other[:fewest]


def across(run):
    """Tuned costs of the settings that claims compare, and more than half left by a remedy: [S]."""
    found = {f"cost of {one} over {base}": cost(run, one, base) for one, base in PAIRS}
    whole = cost(run, "sigmoid, rotary", "softmax, rotary")
    for remedy in REMEDIES:
        left = cost(run, f"sigmoid, rotary, {remedy}", "softmax, rotary")
        found[f"left by {remedy}, less half"] = left - whole[: len(left)] / 2
    return found


PAIRS = []  # of the settings that claims compare
BEST = ("softmax", "sigmoid")


def costs(bounds, *pairs):
    """Checks that the tuned cost of a setting over another has these bounds, for all pairs."""
    PAIRS.extend(pairs)
    return [Check(f"cost of {one} over {base}", **bounds) for one, base in pairs]


def both(change):
    """(setting, base) of a change to softmax and to sigmoid."""
    return [(f"{base}, {change}", base) for base in BEST]


FREE = {"below": 0.02}
WORSE = {"above": 0.02}
CLAIMS = [
    Claim(
        "At their own learning rates, too, tanh and none are worse than softmax and sigmoid",
        "ablations",
        *costs(WORSE, *itertools.product(("tanh", "no activation"), BEST)),
    ),
    Claim(
        "Each at its own learning rate, rms_norm and post_attn_norm cost nothing",
        OURS,
        *costs(FREE, *both("rms_norm"), *both("post_attn_norm")),
    ),
    Claim(
        "fro_norm costs at any learning rate, and since its logits are too small: a scale of 14 "
        "takes back over 0.02, a scale learned from the small one less",
        OURS,
        *costs(WORSE, *both("fro_norm")),
        *costs(WORSE, *((f"{base}, fro_norm", f"{base}, fro_norm, scale 14") for base in BEST)),
        *costs(FREE, *((f"{base}, fro_norm", f"{base}, fro_norm, learned scale") for base in BEST)),
    ),
    Claim(
        "A sigmoid is as good as softmax with the linear bias, where its weights sum to about 1, "
        "and worse with rotary positions, where they sum to over 10",
        OURS,
        Check("sum of weights", between=(0.5, 2), arm="sigmoid, lr 0.002"),
        Check("sum of weights", above=10, arm="sigmoid, rotary, lr 0.002"),
        *costs({"between": (-0.02, 0.02)}, ("sigmoid", "softmax")),
        *costs(WORSE, ("sigmoid, rotary", "softmax, rotary")),
    ),
    Claim(
        "With rotary positions a bias of -log n mends most of that, an output norm and LayerScale "
        "do not",
        OURS,
        Check("left by -log n, less half", below=0),
        Check("left by output norm, less half", above=0),
        Check("left by LayerScale, less half", above=0),
    ),
    Claim(
        "With the linear bias, where the sum is small already, -log n hurts",
        OURS,
        *costs(WORSE, ("sigmoid, -log n", "sigmoid")),
    ),
]


def plot(run):
    """{name of the file: figure or text}."""
    digests = {result["text"] for arm in run.arms for result in run.results(arm)}
    return {
        "tuned": draw_tuned(run),
        "sums": core.draw_points(
            run,
            "sum of weights",
            "Before training a sigmoid's weights sum to near 1 with the linear bias alone",
            "Sum of a query's weights before training, a dot per seed",
            "sum of the absolute weights",
            arms=[arm for arm in ARMS | ABLATIONS if arm.endswith("lr 0.002")],
            levels={"softmax": 1.0},
            scale="log",
        ),
        "text.txt": f"sha256 of the text: {', '.join(sorted(digests))}\n",
    }


def draw_tuned(run):
    """Tuned loss of every setting, sorted; None unless the run has all."""
    if not run.across:
        return None
    tuned = {name: tuned_loss(run, name) for name in SETTINGS}
    names = sorted(tuned, key=lambda name: tuned[name].mean())
    figure, axes = core.new_figure(
        run,
        "A sigmoid is as good as softmax where the sum of its weights is near 1",
        "Loss of every setting at its own learning rate, a dot per seed, a bar for the mean",
        height=0.25 * len(names) + 1.6,
    )
    axis = axes[0, 0]
    for row, name in enumerate(names):
        axis.plot(tuned[name], [row] * len(tuned[name]), "o", color="#0072B2", alpha=0.5)
        axis.plot(tuned[name].mean(), row, "|", color="black", markersize=16, markeredgewidth=2.5)
    axis.set(xlabel="held-out nats per byte at the tuned rate", yticks=range(len(names)))
    axis.set_yticklabels(names)
    axis.invert_yaxis()
    return figure


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY, across=across, rows=ROWS)
