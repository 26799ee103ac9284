"""What do the activation and the norms inside attention do to a small language model?

Notebook    attention notebook: bugs, ablations
Setup       A transformer of 2 layers, norms first, width 128, 4 heads, predicts the next byte of
            English: the documentation in Python's standard library, a tenth of it held out. 250
            steps of AdamW at 0.002 on 8 windows of 128 bytes, the same windows for all settings of
            a seed. Positions are known by a learned linear bias of the logits. All 48 combinations
            of the notebook's settings: what makes weights of logits (attn_activ), the norm and the
            activation of queries and keys (qk_norm, qk_activ), and the norm of what a head has
            mixed (post_attn_norm); no norm has learned weights. The notebook trained 46 million
            parameters on WikiText, and by a schedule that attention_confound looks at; here all
            settings take equal steps. Its first two bugs are put back as ablations.
Hypothesis  softmax and sigmoid are the best and very similar. fro_norm costs 0.2, so does rms_norm
            for sigmoid, but nothing for softmax; post_attn_norm costs 1.5 to 2; gelu costs a bit,
            or nothing where rms_norm follows. tanh and none were terrible because positions were
            not applied. Ours: at equal steps post_attn_norm costs nothing; what harms tanh and none
            is the linear bias, made for an exponential.
Rule        10 paired seeds, 5 for ablations. A check holds if its 95% interval lies inside its
            bounds and fails if it lies outside; one failed check refutes a claim. Loss: held-out
            nats per byte, a mean over 256 windows. The notebook's losses are nats per token of
            another model on another text. With 4.5 bytes per token, which we assume, its 0.2 is
            0.044 nats per byte and its 1.5 to 2 are 0.33 to 0.44. Only direction and order of
            magnitude are judged: about 0.2 is 0.02 to 0.2 nats per byte, 1.5 to 2 is over 0.1. No
            difference, and very similar: within 0.02. Worse, and a lot worse, of which the
            notebook says 0.2, too: over 0.02; destroyed: over 0.044; terrible: over 0.1; a bit
            worse: 0.01 to 0.1. Best: a lower loss of the other setting refutes it. Main effect of a
            setting: mean difference that it makes over all other settings; of norms and gelu over
            those of softmax and sigmoid. Fall: loss of the first batch less held-out loss after
            training.
Cost        38 min on 2 cores; `--layers 1 --arms softmax sigmoid` 3 min
"""

import itertools

import core
from core import OURS, Check, Claim

import numpy as np

FLAGS = {  # what each chooses from, the usual first, and its meaning
    "attn-activ": (["softmax", "sigmoid", "tanh", "none"], "what makes weights of logits"),
    "qk-norm": (["none", "fro_norm", "rms_norm"], "norm of queries and keys, in a head's channels"),
    "qk-activ": (["none", "gelu"], "activation of queries and keys, before their norm"),
    "post-attn-norm": (["none", "rms_norm"], "norm of what each head has mixed"),
    "position": (["linear", "rotary", "none"], "learned linear bias of the logits, or rotary"),
}
BUGS = ["none", "whole-tensor", "no-position"]


def add_attention_flags(parser, names):
    """Add those of FLAGS that have these names."""
    for name in names:
        choices, meaning = FLAGS[name]
        parser.add_argument(
            f"--{name}", nargs="+", choices=choices, default=choices[:1], help=meaning
        )


parser = core.make_parser(__doc__, seeds=10, ablation_seeds=5)
parser.set_defaults(first_seed=100)  # tolerances were chosen knowing 0 to 16
add_attention_flags(parser, FLAGS)
parser.add_argument(
    "--bug",
    nargs="+",
    choices=BUGS,
    default=BUGS[:1],
    help="the notebook's: norms over the whole tensor; tanh and none without position and mask",
)
core.add_language_flags(parser, layers=2, dim=128, heads=4, steps=250)

SIGMOID = {"attn_activ": "sigmoid"}
TANH = {"attn_activ": "tanh"}
NO_ACTIVATION = {"attn_activ": "none"}
ARMS = {  # the baseline first; a run with flags takes these
    "softmax": {},
    "softmax, gelu": {"qk_activ": "gelu"},
    "softmax, rms_norm": {"qk_norm": "rms_norm"},
    "softmax, rms_norm, gelu": {"qk_norm": "rms_norm", "qk_activ": "gelu"},
    "sigmoid": SIGMOID,
    "sigmoid, gelu": {**SIGMOID, "qk_activ": "gelu"},
    "sigmoid, rms_norm": {**SIGMOID, "qk_norm": "rms_norm"},
    "sigmoid, rms_norm, gelu": {**SIGMOID, "qk_norm": "rms_norm", "qk_activ": "gelu"},
}


def name_arm(row):
    """The name of a setting of the notebook: what differs from softmax, {flag: value}."""
    activation = row.get("attn_activ", "softmax").replace("none", "no activation")
    post = "post_attn_norm" if "post_attn_norm" in row else ""
    return join(activation, row.get("qk_norm"), row.get("qk_activ"), post)


def join(*words):
    """The words that are not empty, with commas."""
    return ", ".join(word for word in words if word)


def all_settings():
    """The notebook's 48 settings: {name: what differs from softmax}."""
    names = ["attn_activ", "post_attn_norm", "qk_norm", "qk_activ"]
    every = core.grid(**{name: FLAGS[name.replace("_", "-")][0] for name in names})
    rows = []
    for row in every.values():
        usual = parser.get_default
        rows.append({name: value for name, value in row.items() if [value] != usual(name)})
    return {name_arm(row): row for row in rows}


SETTINGS = all_settings()
ABLATIONS = {  # the other settings, and what else the claims read
    **{name: row for name, row in SETTINGS.items() if name not in ARMS},
    "tanh, bug": {**TANH, "bug": "no-position"},
    "tanh, no position": {**TANH, "position": "none"},
    "no activation, bug": {**NO_ACTIVATION, "bug": "no-position"},
    "no activation, no position": {**NO_ACTIVATION, "position": "none"},
    "softmax, fro_norm, bug": {"qk_norm": "fro_norm", "bug": "whole-tensor"},
    "sigmoid, fro_norm, bug": {**SIGMOID, "qk_norm": "fro_norm", "bug": "whole-tensor"},
    "rotary": {"position": "rotary"},
    "rotary, fro_norm": {"position": "rotary", "qk_norm": "fro_norm"},
    "rotary, rms_norm": {"position": "rotary", "qk_norm": "rms_norm"},
    "rotary, post_attn_norm": {"position": "rotary", "post_attn_norm": "rms_norm"},
}
LOSS = "nats per byte"
COLUMNS = [LOSS, "gradient norm", "steps", "kB trained on"]
ROWS = [  # of the entry's table: the baseline and every single change; all arms are in its CSV
    "softmax",
    "sigmoid",
    "tanh",
    "no activation",
    "softmax, gelu",
    "softmax, fro_norm",
    "softmax, rms_norm",
    "softmax, post_attn_norm",
    "sigmoid, rms_norm",
]
TINY = {"layers": 1, "dim": 8, "heads": 2, "length": 16, "batch": 2, "steps": 10}

MAIN_EFFECTS = {  # the setting and the value that it is changed to
    "sigmoid": ("attn_activ", "sigmoid"),
    "tanh": ("attn_activ", "tanh"),
    "no activation": ("attn_activ", "none"),
    "fro_norm": ("qk_norm", "fro_norm"),
    "rms_norm": ("qk_norm", "rms_norm"),
    "gelu": ("qk_activ", "gelu"),
    "post_attn_norm": ("post_attn_norm", "rms_norm"),
}


class WholeTensorNorms(core.CausalAttention):
    """The notebook's bug: norms over the whole tensor, not over the channels of a head."""

    norm_dim = None


class UnmaskedAttention(core.CausalAttention):
    """The notebook's bug: tanh and none know no position and see the bytes to come."""

    def weigh(self, logits):
        if self.attn_activ == "tanh":
            return logits.tanh()
        return logits if self.attn_activ == "none" else super().weigh(logits)


def trial(config, seed, job):
    """Train on the first part of the text, measure the loss on the held-out part."""
    text = core.load_text(config.text)
    core.check_language_flags(config, text)
    with core.initialised_from(seed):
        layers = [make_layer(config) for _ in range(config.layers)]
        model = core.LanguageModel(layers, config.dim).to(job.device)
    history = core.train_on_text(
        model,
        text,
        seed=seed,
        lr=config.lr,
        steps=config.steps,
        batch=config.batch,
        length=config.length,
    )
    loss = core.held_out_loss(model, text, config.length)
    return {
        LOSS: loss,
        "fall": history["loss"][0] - loss,
        "gradient norm": np.median(history["gradient_norm"]),
        "steps": config.steps,
        "kB trained on": config.steps * config.batch * config.length / 1000,
        "text": text.digest(),
    }


def make_layer(config):
    """One layer with the attention that the arm names: [B T, D] -> [B T, D]."""
    attention = core.CausalAttention
    if config.bug == "whole-tensor":
        attention = WholeTensorNorms
    elif config.bug == "no-position":
        attention = UnmaskedAttention
    mixing = attention(
        config.dim,
        config.heads,
        attn_activ=config.attn_activ,
        qk_activ=config.qk_activ,
        qk_norm=config.qk_norm,
        post_attn_norm=config.post_attn_norm,
        position=config.position,
    )
    return core.TransformerLayer(mixing, core.FeedForward(config.dim, 4 * config.dim), config.dim)


def difference(run, arm, base):
    """Loss of an arm less that of another, on the seeds that both have: [S]."""
    one = run.values(arm, LOSS)
    other = run.values(base, LOSS)
    seeds = min(len(one), len(other))
    return one[:seeds] - other[:seeds]


def main_effect(run, key, value):
    """Mean difference that a setting makes over all other settings: [S]."""
    activations = [value] if key == "attn_activ" else ["softmax", "sigmoid"]
    differences = []
    for name, row in SETTINGS.items():
        if row.get(key) == value and row.get("attn_activ", "softmax") in activations:
            without = {other: row[other] for other in row if other != key}
            differences.append(difference(run, name, name_arm(without)))
    return mean_over_arms(differences)


def mean_over_arms(differences):
    """Mean of arrays [S], on the seeds that all have."""
    fewest = min(map(len, differences))
    return np.mean([values[:fewest] for values in differences], axis=0)


def across(run):
    """Main effects, and what gelu costs where no norm follows, for softmax and sigmoid: [S]."""
    found = {f"effect of {name}": main_effect(run, *what) for name, what in MAIN_EFFECTS.items()}
    costs = [difference(run, f"{base}, gelu", base) for base in BEST]
    return found | {"cost of gelu": mean_over_arms(costs)}


BEST = ("softmax", "sigmoid")
SAME = {"between": (-0.02, 0.02)}
ABOUT_02 = {"between": (0.02, 0.2)}
WORSE = {"above": 0.02}
TERRIBLE = {"above": 0.1}
LARGER = {"above": 0}
LOWER = {"below": 0}


def compare(text, source, bounds, *pairs):
    """The Claim that the loss of an arm less that of another has these bounds, for all pairs."""
    checks = [Check(LOSS, arm=arm, minus=other, **bounds) for arm, other in pairs]
    return Claim(text, source, *checks)


def both(change, *more):
    """(arm, base) of a change to softmax and to sigmoid, alone and with more changes."""
    pairs = [(f"{base}, {change}", base) for base in BEST]
    for other in more:
        pairs += [(f"{base}, {change}, {other}", f"{base}, {other}") for base in BEST]
    return pairs


CLAIMS = [
    compare(
        "Without position encoding and mask tanh and none are terrible",
        "bugs",
        TERRIBLE,
        ("tanh, bug", "softmax"),
        ("no activation, bug", "softmax"),
    ),
    Claim(
        "That is because no position encoding is applied: with it tanh and none are better",
        "bugs",
        *(
            Check(LOSS, above=0, any_arm=(f"{arm}, bug", f"{arm}, no position"), minus=arm)
            for arm in ("tanh", "no activation")
        ),
    ),
    Claim(
        "With position encoding and mask training with tanh and none reduces the loss",
        "bugs",
        Check("fall", above=0.1, arm="tanh"),
        Check("fall", above=0.1, arm="no activation"),
    ),
    compare(
        "sigmoid and softmax are the best activations: tanh and none are worse than both",
        "ablations",
        WORSE,
        *itertools.product(("tanh", "no activation"), BEST),
    ),
    compare("sigmoid and softmax are very similar", "ablations", SAME, ("sigmoid", "softmax")),
    compare(
        "No qk_norm is best: fro_norm is worse for both, rms_norm for sigmoid",
        "ablations",
        LARGER,
        *both("fro_norm"),
        ("sigmoid, rms_norm", "sigmoid"),
    ),
    compare(
        "fro_norm is consistently worse by about 0.2 per token",
        "ablations",
        ABOUT_02,
        *both("fro_norm"),
    ),
    compare(
        "rms_norm is consistently worse by about 0.2 per token for sigmoid",
        "ablations",
        ABOUT_02,
        ("sigmoid, rms_norm", "sigmoid"),
    ),
    compare(
        "rms_norm makes no difference for softmax",
        "ablations",
        SAME,
        ("softmax, rms_norm", "softmax"),
    ),
    compare(
        "No post_attn_norm is best: the norm is worse for softmax and sigmoid",
        "ablations",
        LARGER,
        *both("post_attn_norm"),
    ),
    compare(
        "post_attn_norm is consistently worse by 1.5 to 2 per token",
        "ablations",
        TERRIBLE,
        *both("post_attn_norm"),
    ),
    compare(
        "softmax can handle rms_norm, with gelu and without: it makes no difference",
        "ablations",
        SAME,
        *both("rms_norm", "gelu")[::2],
    ),
    compare(
        "sigmoid cannot handle rms_norm, with gelu and without: it is worse a lot",
        "ablations",
        WORSE,
        *both("rms_norm", "gelu")[1::2],
    ),
    compare(
        "Where rms_norm follows, gelu makes no real difference",
        "ablations",
        SAME,
        *((f"{base}, rms_norm, gelu", f"{base}, rms_norm") for base in BEST),
    ),
    compare(
        "fro_norm destroys performance in all cases, with gelu and without",
        "ablations",
        {"above": 0.044},
        *both("fro_norm", "gelu"),
    ),
    Claim(
        "Without qk_norm gelu worsens performance a bit, in the mean of softmax and sigmoid",
        "ablations",
        Check("cost of gelu", between=(0.01, 0.1)),
    ),
    Claim(
        "Over all other settings post_attn_norm lowers the loss",
        OURS,
        Check("effect of post_attn_norm", below=0),
    ),
    compare(
        "The linear bias harms tanh and none: masked and without it they are better",
        OURS,
        LOWER,
        ("tanh, no position", "tanh"),
        ("no activation, no position", "no activation"),
    ),
    compare(
        "fro_norm over the whole tensor is worse than over the channels of a head",
        OURS,
        LARGER,
        *((f"{base}, fro_norm, bug", f"{base}, fro_norm") for base in BEST),
    ),
    Claim(
        "With rotary positions, too, fro_norm is worse, and rms_norm and post_attn_norm are not",
        OURS,
        Check(LOSS, above=0.02, arm="rotary, fro_norm", minus="rotary"),
        Check(LOSS, below=0.02, arm="rotary, rms_norm", minus="rotary"),
        Check(LOSS, below=0.02, arm="rotary, post_attn_norm", minus="rotary"),
    ),
]


def plot(run):
    """{name of the file: figure or text}."""
    digests = {result["text"] for arm in run.arms for result in run.results(arm)}
    return {
        "settings": draw_settings(run),
        "effects": draw_effects(run),
        "text.txt": f"sha256 of the text: {', '.join(sorted(digests))}\n",
    }


def draw_settings(run):
    """A heat map of the differences to softmax of all settings that the run has."""
    shown = [name for name in SETTINGS if run.shows(name)]
    if len(shown) < 2 or not run.shows("softmax"):
        return None
    figure, axes = core.new_figure(
        run,
        "Activation and fro_norm decide; post_attn_norm takes back most of what fro_norm costs",
        "Loss less that of softmax, nats per byte, by setting: mean over the seeds",
        width=9.0,
        height=5.2,
    )
    columns = list(itertools.product(("", "fro_norm", "rms_norm"), ("", "gelu")))
    activations = ("softmax", "sigmoid", "tanh", "no activation")
    rows = list(itertools.product(activations, ("", "post_attn_norm")))
    table = np.full((len(rows), len(columns)), np.nan)
    axis = axes[0, 0]
    for row, column in np.ndindex(table.shape):
        activation, post = rows[row]
        name = join(activation, *columns[column], post)
        if name in shown:
            mean = difference(run, name, "softmax").mean()
            table[row, column] = mean
            colour = "white" if abs(mean) > 0.3 else "black"
            axis.text(column, row, f"{mean:+.3f}", ha="center", va="center", color=colour)
    image = axis.imshow(table, cmap="RdBu_r", vmin=-0.4, vmax=0.4, aspect="auto")
    axis.grid(False)
    axis.set_xticks(range(len(columns)), ["\n".join(filter(None, c)) or "none" for c in columns])
    axis.set_yticks(range(len(rows)), [join(*words) for words in rows])
    axis.set_xlabel("norm and activation of queries and keys")
    figure.colorbar(image, label="nats per byte above softmax", extend="both")
    return figure


def draw_effects(run):
    """Main effects with their 95% intervals; None unless the run has all settings."""
    if not run.across:
        return None
    figure, axes = core.new_figure(
        run,
        "Of the norms only fro_norm costs; post_attn_norm gains",
        "Main effect of each setting on the loss, mean over all other settings, 95% interval",
        height=3.4,
    )
    axis = axes[0, 0]
    labels = []
    for row, name in enumerate(MAIN_EFFECTS):
        found = core.mean_interval(run.across[f"effect of {name}"])
        axis.plot([found.low, found.high], [row, row], color="#0072B2", linewidth=2)
        axis.plot(found.estimate, row, "o", color="#0072B2")
        labels.append(f"{name}: {found.estimate:+.3f} ± {(found.high - found.low) / 2:.3f}")
    axis.axvline(0.0, color="black", linestyle="--", linewidth=1)
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set(xlabel="nats per byte", yticks=range(len(labels)))
    axis.set_yticklabels(labels)
    axis.invert_yaxis()
    return figure


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY, across=across, rows=ROWS)
