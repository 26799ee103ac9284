"""Are norms in attention harmful or only untuned; when is sigmoid attention as good as softmax?

Notebook    attention notebook: ablations
Setup       Model and training are those of attention_ablation: 2 layers, width 128, 4 heads, 250
            steps of AdamW on 8 windows of n = 128 bytes. Each config is trained at two learning
            rates near the best of an earlier sweep (0.0005 to 0.008): 0.001 and 0.002; 0.002 and
            0.004 for fro_norm with its own or a learned scale; 0.004 and 0.008 for tanh and no
            activation. The notebook's norms have no learned weights. The logits of fro_norm, q k^T
            over the root of a head's 32 channels, stay within 0.18; a scale of 14 instead (QKNorm's
            start for 128 bytes) and a learned one are tried. The three remedies for sigmoid
            attention are a bias of -log n on its logits; an output norm, a layer norm after the
            output projection, unlike post_attn_norm; and LayerScale, a learned factor per channel
            of the output, 0.1 at first. Each is added by itself, with the linear bias and with
            rotary positions; published sigmoid attention (Ramapuram et al., arXiv 2409.04431)
            combines bias and norm, which is not run.
Hypothesis  Ours: at their own learning rates rms_norm and post_attn_norm cost nothing, but tanh, no
            activation and fro_norm still cost. The logits of fro_norm are too small: a scale of 14
            lowers its cost; a learned one starts too low for 250 steps. Sigmoid attention is as
            good as softmax where the linear bias keeps the sum of its weights near 1. With rotary
            positions the sum is about 32 before training, and sigmoid attention is worse. There
            -log n, which makes it about 0.5, removes most of the cost; an output norm or
            LayerScale, which leave it as it is, do not. With the linear bias -log n makes the sum
            too small. Gating on graphs fails likewise: its unscaled sums are too large
            (gating_causes).
Rule        10 paired seeds, 5 for ablations. A check holds if its 95% interval lies inside its
            bounds and fails if it lies outside; one failed check rejects a claim. Loss is held-out
            nats per byte. The own learning rate is the better of the two that were run; 0.008 was
            the largest of the sweep. Tuned loss is the loss at the rate that is better on the mean
            of the other seeds, so that choosing gains nothing by chance. A cost is a tuned loss
            minus that of another config. Costs nothing means below 0.02; costs and worse mean over
            0.02; as good means within 0.02. A remedy removes most of a cost if it leaves at most
            half. Sum of weights is the sum of a query's absolute attention weights before training,
            on held-out text, mean over queries, heads and layers; about 1 means 0.5 to 2, and over
            10 is large. Gradient norm is the median over the steps.
Cost        28 min on 2 cores; `--lr 2e-3 --arms 'softmax, lr 0.002' 'sigmoid, lr 0.002'` 3 min
"""

import itertools
import math

import core
from core import OURS, Check, Claim
from exp_attention_ablation import add_attention_flags, add_language_flags, check_language_flags

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
    help="log-n: subtract the logarithm of the window's length from every logit",
)
parser.add_argument(
    "--output",
    nargs="+",
    choices=["plain", "norm", "layer-scale"],
    default=["plain"],
    help="what acts on the attention's output before it is added: a layer norm or LayerScale",
)
add_language_flags(parser, layers=2, dim=128, heads=4, steps=250)

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
    """{name with each change: row}."""
    return {f"{name}, {change}": {**base, **changes[change]} for change in changes}


def at_rates(configs, rates):
    """Rows of arms: every config at every learning rate."""
    rows = {}
    for name, row in configs.items():
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

    def weights(self, logits):
        scale = self.scale
        if self.log_scale is not None:
            scale = self.log_scale.exp()[:, None, None]
        weights = super().weights(logits * scale - self.bias)
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
    check_language_flags(config, text)
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
    """{config: its arms, one per learning rate}."""
    found = {}
    for arm in ARMS | ABLATIONS:
        found.setdefault(arm.rpartition(", lr ")[0], []).append(arm)
    return found


CONFIGS = split_arms()


def tuned_loss(run, config):
    """Loss of a config on each seed at the rate that is best on the mean of the others: [S]."""
    losses = np.array([run.values(arm, LOSS) for arm in CONFIGS[config]])  # [rates, S]
    losses = np.nan_to_num(losses, nan=np.inf)  # of what diverged
    seeds = np.arange(losses.shape[1])
    chosen = []
    for seed in seeds:
        others = seeds[seeds != seed] if len(seeds) > 1 else seeds
        chosen.append(losses[:, others].mean(axis=1).argmin())
    return losses[chosen, seeds]


def cost(run, config, base):
    """Tuned loss of a config minus that of another, on the seeds that both have: [S]."""
    one = tuned_loss(run, config)
    other = tuned_loss(run, base)
    fewest = min(len(one), len(other))
    return one[:fewest] - other[:fewest]


def across(run):
    """Tuned costs that claims compare, and the cost that a remedy leaves minus half: [S]."""
    found = {f"cost of {one} over {base}": cost(run, one, base) for one, base in PAIRS}
    whole = cost(run, "sigmoid, rotary", "softmax, rotary")
    for remedy in REMEDIES:
        left = cost(run, f"sigmoid, rotary, {remedy}", "softmax, rotary")
        found[f"left by {remedy}, minus half"] = left - whole[: len(left)] / 2
    return found


PAIRS = []  # of the configs that claims compare
BEST = ("softmax", "sigmoid")


def costs(bounds, *pairs):
    """Checks that the tuned cost of a config over another has these bounds, for all pairs."""
    PAIRS.extend(pairs)
    return [Check(f"cost of {one} over {base}", **bounds) for one, base in pairs]


def both(change):
    """(config, base) of a change to softmax and to sigmoid."""
    return [(f"{base}, {change}", base) for base in BEST]


FREE = {"below": 0.02}
WORSE = {"above": 0.02}
CLAIMS = [
    Claim(
        "At their own learning rates tanh and no activation are worse than softmax and sigmoid",
        OURS,
        *costs(WORSE, *itertools.product(("tanh", "no activation"), BEST)),
    ),
    Claim(
        "At their own learning rates rms_norm and post_attn_norm cost nothing",
        OURS,
        *costs(FREE, *both("rms_norm"), *both("post_attn_norm")),
    ),
    Claim(
        "fro_norm costs at its own learning rate; a scale of 14 lowers the cost by over 0.02 nats "
        "per byte, a learned scale does not",
        OURS,
        *costs(WORSE, *both("fro_norm")),
        *costs(WORSE, *((f"{base}, fro_norm", f"{base}, fro_norm, scale 14") for base in BEST)),
        *costs(FREE, *((f"{base}, fro_norm", f"{base}, fro_norm, learned scale") for base in BEST)),
    ),
    Claim(
        "Sigmoid attention is as good as softmax with the linear bias, where its weights sum to "
        "about 1 before training, and worse with rotary positions, where they sum to over 10",
        OURS,
        Check("sum of weights", between=(0.5, 2), arm="sigmoid, lr 0.002"),
        Check("sum of weights", above=10, arm="sigmoid, rotary, lr 0.002"),
        *costs({"between": (-0.02, 0.02)}, ("sigmoid", "softmax")),
        *costs(WORSE, ("sigmoid, rotary", "softmax, rotary")),
    ),
    Claim(
        "With rotary positions -log n removes most of the cost of sigmoid attention; an output "
        "norm or LayerScale does not",
        OURS,
        Check("left by -log n, minus half", below=0),
        Check("left by output norm, minus half", above=0),
        Check("left by LayerScale, minus half", above=0),
    ),
    Claim(
        "With the linear bias -log n costs sigmoid attention over 0.02 nats per byte",
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
            "How much weight a query gives before training",
            "Sum of a query's weights before training, a dot per seed",
            "sum of the absolute weights",
            arms=[arm for arm in ARMS | ABLATIONS if arm.endswith("lr 0.002")],
            levels={"softmax": 1.0},
            scale="log",
        ),
        "text.txt": f"sha256 of the text: {', '.join(sorted(digests))}\n",
    }


def draw_tuned(run):
    """Tuned loss of every config, sorted; None unless the run has all."""
    if not run.across:
        return None
    tuned = {name: tuned_loss(run, name) for name in CONFIGS}
    names = sorted(tuned, key=lambda name: tuned[name].mean())
    figure, axes = core.new_figure(
        run,
        "Each config at its own learning rate",
        "Tuned loss, a dot per seed, a bar for the mean",
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
