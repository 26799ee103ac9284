"""Are norms in attention harmful or only untuned; when is sigmoid attention as good as softmax?

Notebook    attention notebook: ablations
Setup       Model and training are those of attention_ablation, on windows of n = 128 bytes. The
            held-out text is cut into a validation and a test half. Each trial trains at two
            learning rates (0.001 and 0.002, for fro_norm 0.002 and 0.004, for tanh and no
            activation 0.004 and 0.008) and reports the model with the lower validation loss. These
            rates are near the best of sweeps on seeds 0 to 4. Not swept, so at 0.001 and 0.002:
            scale 14, -log n with the linear bias, output norm and LayerScale.

            The notebook's norms have no learned weights, so that the logits of fro_norm, q k^T over
            the root of a head's 32 channels, stay within 0.18; a scale of 14 (QKNorm's start for
            128 bytes) is tried instead.

            Before training the logits q k^T are near 0, so that the sigmoid weights of a query need
            not sum to 1. Remedies, each by itself: a bias of -log n on the logits; an output norm,
            a layer norm after the output projection; LayerScale, a learned factor per channel of
            the output, 0.1 at first. Published sigmoid attention (Ramapuram et al., arXiv
            2409.04431) combines bias and norm.
Hypothesis  Ours: at their own learning rates rms_norm and post_attn_norm cost nothing, but tanh, no
            activation and fro_norm still cost. The logits of fro_norm are too small: a scale of 14
            lowers its cost. Sigmoid attention is as good as softmax where the linear bias keeps the
            sum of its weights near 1. With rotary positions the sum is large, and sigmoid attention
            is worse. There -log n removes most of the cost; an output norm or LayerScale, which
            leave the sum as it is, do not. With the linear bias -log n makes the sum too small.
            Gating on graphs fails likewise: its unscaled sums are too large (gating_causes).
Rule        6 paired seeds from 300 on, 4 for ablations.

            Nats per byte: the loss, mean over 256 windows of the test half. Learning rate: mean of
            those chosen. Sum of weights: of a query's absolute attention weights before training,
            mean over queries, heads and layers, on test windows. Gradient norm: median over the
            steps.

            A cost is a difference in loss. Costs nothing means below 0.02; costs, worse and lowers
            mean over 0.02; as good means within 0.02. A remedy removes most of a cost if it leaves
            at most half; what was not swept is judged at these two rates. The sweeps went from
            0.0005 to 0.008 with the linear bias, with and without norms, and from 0.001 to 0.008
            with rotary positions, with and without -log n.
Cost        21 min on 2 cores; `--rates 1 --arms softmax sigmoid` 2 min
"""

import itertools
import math

import core
from core import OURS, Check, Claim
from exp_attention_ablation import (
    add_attention_flags,
    add_language_flags,
    check_language_flags,
    compare,
    name_texts,
)

import numpy as np
import torch
from torch import nn

parser = core.make_parser(__doc__, seeds=6, ablation_seeds=4)
parser.set_defaults(first_seed=300)  # apart from attention_ablation's and older ones
add_attention_flags(parser, ["attn-activ", "qk-norm", "post-attn-norm", "position"])
parser.add_argument(
    "--logit-scale",
    nargs="+",
    choices=["root", "14"],
    default=["root"],
    help="factor of q k^T: 1 / root of a head's channels, or 14",
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
parser.add_argument(
    "--rates",
    nargs="+",
    type=core.integer(1, 10),
    default=[2],
    help="learning rates tried: --lr, twice it, and so on; the best on validation text counts",
)
add_language_flags(parser, layers=2, dim=128, heads=4, steps=250)
parser.set_defaults(lr=[1e-3])

SIGMOID = {"attn_activ": "sigmoid"}
RMS_NORM = {"qk_norm": "rms_norm"}
POST_ATTN_NORM = {"post_attn_norm": "rms_norm"}
FRO_NORM = {"qk_norm": "fro_norm"}
SCALE_14 = {"logit_scale": "14"}
ROTARY = {"position": "rotary"}
MINUS_LOG_N = {"logit_bias": "log-n"}
ARMS = {  # the baseline first; each is trained at 0.001 and 0.002 if its row does not say otherwise
    "softmax": {},
    "sigmoid": SIGMOID,
}
ABLATIONS = {  # what else the claims read
    "softmax, rms_norm": RMS_NORM,
    "sigmoid, rms_norm": {**SIGMOID, **RMS_NORM},
    "softmax, post_attn_norm": POST_ATTN_NORM,
    "sigmoid, post_attn_norm": {**SIGMOID, **POST_ATTN_NORM},
    "tanh": {"attn_activ": "tanh", "lr": 4e-3},
    "no activation": {"attn_activ": "none", "lr": 4e-3},
    "softmax, fro_norm": {**FRO_NORM, "lr": 2e-3},
    "softmax, fro_norm, scale 14": {**FRO_NORM, **SCALE_14},
    "sigmoid, -log n": {**SIGMOID, **MINUS_LOG_N},
    "softmax, rotary": ROTARY,
    "sigmoid, rotary": {**SIGMOID, **ROTARY},
    "sigmoid, rotary, -log n": {**SIGMOID, **ROTARY, **MINUS_LOG_N},
    "sigmoid, rotary, output norm": {**SIGMOID, **ROTARY, "output": "norm"},
    "sigmoid, rotary, LayerScale": {**SIGMOID, **ROTARY, "output": "layer-scale"},
}
LOSS = "nats per byte"
COLUMNS = [LOSS, "learning rate", "sum of weights", "gradient norm"]
ROWS = [  # of the entry's table; all arms stand in its CSV
    "softmax",
    "sigmoid",
    "softmax, rms_norm",
    "softmax, post_attn_norm",
    "softmax, fro_norm",
    "softmax, rotary",
    "sigmoid, rotary",
    "sigmoid, rotary, -log n",
    "sigmoid, rotary, output norm",
]
TINY = {"layers": 1, "dim": 8, "heads": 2, "length": 16, "batch": 2, "steps": 10}


class PublishedAttention(core.CausalAttention):
    """CausalAttention with a scale and a bias of its logits, and something on its output.

    scale    factor of the logits beside 1 / root of the channels
    bias     subtracted from the logits
    output   module [B T, D] -> [B T, D]
    Source: bias, norm and LayerScale: Ramapuram et al., arXiv 2409.04431; scale: QKNorm, Henry
    et al., arXiv 2010.04245.
    """

    def __init__(self, dim, heads, scale, bias, output, **options):
        super().__init__(dim, heads, **options)
        self.scale = scale
        self.bias = bias
        self.output = output
        self.sum_of_weights = 0.0  # of the latest call in evaluation mode

    def forward(self, x, shape):
        return self.output(super().forward(x, shape))

    def weights(self, logits):
        weights = super().weights(logits * self.scale - self.bias)
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
    """Train at each learning rate; measure the model that is best on validation text."""
    text = core.load_text(config.text)
    half = len(text.held_out) // 2
    validation = text._replace(held_out=text.held_out[:half])
    test = text._replace(held_out=text.held_out[half:])
    check_language_flags(config, validation)
    validation_losses = []
    measures = []
    for number in range(config.rates):
        with core.initialised_from(seed):
            layers = [make_layer(config) for _ in range(config.layers)]
            model = core.LanguageModel(layers, config.dim).to(job.device)
        core.held_out_loss(model, test, config.length, windows=8)
        sums = [layer.mixing.sum_of_weights for layer in model.layers]
        rate = config.lr * 2**number
        history = core.train_on_text(
            model,
            text,
            seed=seed,
            lr=rate,
            steps=config.steps,
            batch=config.batch,
            length=config.length,
        )
        validation_losses.append(core.held_out_loss(model, validation, config.length))
        found = {
            LOSS: core.held_out_loss(model, test, config.length),
            "learning rate": rate,
            "sum of weights": np.mean(sums),
            "gradient norm": np.median(history["gradient_norm"]),
            "text": text.digest(),
        }
        measures.append(found)
    best = np.nan_to_num(validation_losses, nan=np.inf).argmin()  # nan: it diverged
    return measures[best]


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
        bias=math.log(config.length) if config.logit_bias == "log-n" else 0.0,
        output=output,
        attn_activ=config.attn_activ,
        qk_norm=config.qk_norm,
        post_attn_norm=config.post_attn_norm,
        position=config.position,
    )
    return core.TransformerLayer(mixing, core.FeedForward(config.dim, 4 * config.dim), config.dim)


def across(run):
    """Of the cost of sigmoid attention with rotary positions: what a remedy leaves minus half."""
    softmax = run.values("softmax, rotary", LOSS)
    cost = run.values("sigmoid, rotary", LOSS) - softmax
    found = {}
    for remedy in ("-log n", "output norm", "LayerScale"):
        left = run.values(f"sigmoid, rotary, {remedy}", LOSS) - softmax
        found[f"left by {remedy}, minus half"] = left - cost / 2
    return found


CLAIMS = [
    Claim(
        "At their own learning rates rms_norm and post_attn_norm cost nothing, but tanh and no "
        "activation are worse than softmax and sigmoid",
        OURS,
        *compare(
            ("softmax, rms_norm", "softmax"),
            ("sigmoid, rms_norm", "sigmoid"),
            ("softmax, post_attn_norm", "softmax"),
            ("sigmoid, post_attn_norm", "sigmoid"),
            below=0.02,
        ),
        *compare(*itertools.product(("tanh", "no activation"), ("softmax", "sigmoid")), above=0.02),
    ),
    Claim(
        "At its own learning rate fro_norm costs softmax over 0.02 nats per byte, and a scale of "
        "14 lowers the cost by over 0.02",
        OURS,
        *compare(
            ("softmax, fro_norm", "softmax"),
            ("softmax, fro_norm", "softmax, fro_norm, scale 14"),
            above=0.02,
        ),
    ),
    Claim(
        "At its own learning rate sigmoid is as good as softmax with the linear bias, and worse "
        "with rotary positions",
        OURS,
        *compare(("sigmoid", "softmax"), between=(-0.02, 0.02)),
        *compare(("sigmoid, rotary", "softmax, rotary"), above=0.02),
    ),
    Claim(
        "With rotary positions -log n removes most of the cost of sigmoid; an output norm or "
        "LayerScale, at 0.001 and 0.002, does not",
        OURS,
        Check("left by -log n, minus half", below=0),
        Check("left by output norm, minus half", above=0),
        Check("left by LayerScale, minus half", above=0),
    ),
    Claim(
        "With the linear bias -log n costs sigmoid over 0.02 nats per byte, at 0.001 and 0.002",
        OURS,
        *compare(("sigmoid, -log n", "sigmoid"), above=0.02),
    ),
]


def plot(run):
    """{name of the file: figure or text}."""
    return {
        "losses": core.draw_points(
            run,
            LOSS,
            "At its own learning rate fro_norm costs; with rotary positions -log n removes most of "
            "sigmoid's cost",
            "Loss of each config at its own learning rate, a dot per seed",
            "nats per byte on test text",
        ),
        "sums": core.draw_points(
            run,
            "sum of weights",
            "With rotary positions the weights of sigmoid attention sum to 33 before training",
            "Sum of a query's weights before training, a dot per seed",
            "sum of the absolute weights",
            levels={"softmax": 1.0},
            scale="log",
        ),
        "text.txt": name_texts(run),
    }


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY, across=across, rows=ROWS)
