"""What do the activation and the norms inside attention do to a small language model?

Notebook    attention notebook: bugs, ablations
Setup       A pre-norm transformer of 2 layers, width 128, 4 heads, predicts the next byte of
            English: the documentation in Python's standard library, a tenth of it held out. It is
            trained for 250 steps of AdamW at 0.002 on 8 windows of 128 bytes, the same windows for
            all configs of a seed. Positions enter as a learned logit bias linear in distance. The
            notebook's 48 configs combine the function from logits to weights (attn_activ), the norm
            and the activation of queries and keys (qk_norm, qk_activ), and the norm of a head's
            output (post_attn_norm). fro_norm is x / |x|, rms_norm is x / sqrt(mean x^2), over a
            head's channels, without learned weights. Two bugs are put back: norms over the whole
            tensor; tanh and no activation without position and mask. The notebook states neither
            model nor text nor schedule. We infer 46 million parameters, WikiText, and the schedule
            of attention_confound, which judges its 1.5 to 2 for post_attn_norm; here all configs
            take equal steps.
Hypothesis  Softmax and sigmoid are the best and very similar. fro_norm costs 0.2 nats per token, as
            does rms_norm for sigmoid, but not for softmax; post_attn_norm costs, too. gelu costs a
            bit, or nothing where rms_norm follows. tanh and no activation were terrible because
            they lacked positions. Ours: at equal steps post_attn_norm lowers the loss; the linear
            bias harms tanh and no activation, since it is meant to be exponentiated; fro_norm over
            the whole tensor has a higher loss than over the channels of a head; with rotary
            positions, too, only fro_norm costs.
Rule        10 paired seeds, 5 for ablations. A check holds if its 95% interval lies inside its
            bounds and fails if it lies outside; one failed check refutes a claim. Loss is the mean
            over 256 held-out windows, in nats per byte; a cost is a difference in loss. With 4.5
            bytes per token, which we assume, the notebook's 0.2 nats per token is 0.044 nats per
            byte. Its model and text are others, so only direction and order of magnitude are
            judged: about 0.2 means 0.02 to 0.2 nats per byte. No difference and very similar mean
            within 0.02, a bit worse means 0.02 to 0.1, a lot worse and destroyed mean over 0.044,
            terrible means over 0.1. Best means that the other has a higher loss. A main effect is
            the mean change in loss over all configs that differ in it alone; for norms and gelu, of
            softmax and sigmoid only. The fall is the loss of the first batch minus the loss after
            training. Reduced means a fall over 0.1; as opposed to before means a larger fall than
            without position and mask. The notebook looked after two steps, we after 250; without
            mask the next byte is visible. Gradient norm is the median over the steps; kB trained on
            are the bytes of all batches.
Cost        38 min on 2 cores; `--layers 1 --arms softmax sigmoid` 3 min
"""

import argparse
import itertools

import core
from core import OURS, Check, Claim

import numpy as np

FLAGS = {  # what each chooses from, the usual first, and its meaning
    "attn-activ": (["softmax", "sigmoid", "tanh", "none"], "function from logits to weights"),
    "qk-norm": (["none", "fro_norm", "rms_norm"], "norm of queries and keys, per head"),
    "qk-activ": (["none", "gelu"], "activation of queries and keys, before their norm"),
    "post-attn-norm": (["none", "rms_norm"], "norm of a head's output"),
    "position": (["linear", "rotary", "none"], "learned logit bias linear in distance, or rotary"),
}
MAX_BYTES = 2**14  # per batch; more do not fit into memory
BUGS = ["none", "whole-tensor", "no-position"]


def add_attention_flags(parser, names):
    """Add those of FLAGS that have these names."""
    for name in names:
        choices, meaning = FLAGS[name]
        parser.add_argument(
            f"--{name}", nargs="+", choices=choices, default=choices[:1], help=meaning
        )


def text_source(text):
    """argparse type of --text: "library", or a core.InputFile known by its characters."""
    if text in ("library", core.LIBRARY):
        return core.LIBRARY
    path = core.input_file(text).path
    try:
        found = core.InputFile(core.short_hash(core.read_characters(path), 16))
        found.path = path
        core.load_text(found)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a UTF-8 text; convert it") from None
    except core.UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return found


def add_language_flags(parser, *, layers, dim, heads, steps):
    """Add --layers, --dim, --heads, --length, --batch, --steps, --lr and --text."""
    sizes = {  # default, largest value, meaning
        "layers": (layers, 64, "layers"),
        "dim": (dim, 1024, "width"),
        "heads": (heads, 64, "heads"),
        "length": (128, 1024, "bytes of context"),
        "batch": (8, 128, "windows per batch"),
        "steps": (steps, 10**6, "batches trained on"),
    }
    for name, (default, largest, meaning) in sizes.items():
        size_type = core.integer(1, largest)
        parser.add_argument(f"--{name}", nargs="+", type=size_type, default=[default], help=meaning)
    parser.add_argument(
        "--lr", nargs="+", type=core.positive_float, default=[2e-3], help="AdamW's learning rate"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        type=text_source,
        default=[core.LIBRARY],
        help="a UTF-8 file; library: the documentation of the standard library",
    )


parser = core.make_parser(__doc__, seeds=10, ablation_seeds=5)
parser.set_defaults(first_seed=100)  # tolerances were chosen knowing 0 to 16
add_attention_flags(parser, FLAGS)
parser.add_argument(
    "--bug",
    nargs="+",
    choices=BUGS,
    default=BUGS[:1],
    help="norms over the whole tensor; tanh and no activation without position and mask",
)
add_language_flags(parser, layers=2, dim=128, heads=4, steps=250)

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
    """The name of a config of the notebook: what differs from softmax, {flag: value}."""
    activation = row.get("attn_activ", "softmax").replace("none", "no activation")
    post = "post_attn_norm" if "post_attn_norm" in row else ""
    return join(activation, row.get("qk_norm"), row.get("qk_activ"), post)


def join(*words):
    """The words that are not empty, with commas."""
    return ", ".join(word for word in words if word)


def all_configs():
    """The notebook's 48 configs: {name: what differs from softmax}."""
    names = ["attn_activ", "post_attn_norm", "qk_norm", "qk_activ"]
    every = core.grid(**{name: FLAGS[name.replace("_", "-")][0] for name in names})
    rows = []
    for row in every.values():
        usual = parser.get_default
        rows.append({name: value for name, value in row.items() if [value] != usual(name)})
    return {name_arm(row): row for row in rows}


CONFIGS = all_configs()
ABLATIONS = {  # the other configs, and what else the claims read
    **{name: row for name, row in CONFIGS.items() if name not in ARMS},
    "tanh, no position or mask": {**TANH, "bug": "no-position"},
    "tanh, no position": {**TANH, "position": "none"},
    "no activation, no position or mask": {**NO_ACTIVATION, "bug": "no-position"},
    "no activation, no position": {**NO_ACTIVATION, "position": "none"},
    "softmax, whole-tensor fro_norm": {"qk_norm": "fro_norm", "bug": "whole-tensor"},
    "sigmoid, whole-tensor fro_norm": {**SIGMOID, "qk_norm": "fro_norm", "bug": "whole-tensor"},
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

MAIN_EFFECTS = {  # the option and the value that it is changed to
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
    """The notebook's bug: tanh and no activation without position, and later bytes are seen."""

    def weights(self, logits):
        if self.attn_activ == "tanh":
            return logits.tanh()
        return logits if self.attn_activ == "none" else super().weights(logits)


def trial(config, seed, job):
    """Train on the first part of the text, measure the loss on the held-out part."""
    text = core.load_text(config.text)
    check_language_flags(config, text)
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


def check_language_flags(config, text):
    """Raise UsageError, with the flags to blame, for sizes that do not fit each other."""
    if config.dim % (2 * config.heads):  # rotary positions turn pairs of channels
        message = f"--heads {config.heads}: twice as many do not divide --dim {config.dim}"
        raise core.UsageError(message)
    if config.length >= len(text.held_out):
        held_out = f"{len(text.held_out):,} bytes are held out of the text"
        raise core.UsageError(f"--length {config.length}: {held_out}; give a shorter context")
    if config.batch * config.length > MAX_BYTES:
        flags = f"--batch {config.batch} with --length {config.length}"
        most = f"at most {MAX_BYTES:,} bytes per batch"
        raise core.UsageError(f"{flags}: {most}; give smaller ones")


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
    """Loss of an arm minus that of another, on the seeds that both have: [S]."""
    one = run.values(arm, LOSS)
    other = run.values(base, LOSS)
    seeds = min(len(one), len(other))
    return one[:seeds] - other[:seeds]


def main_effect(run, key, value):
    """Mean change in loss over all configs that differ in this option alone: [S]."""
    activations = [value] if key == "attn_activ" else ["softmax", "sigmoid"]
    differences = []
    for name, row in CONFIGS.items():
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
LARGER = {"above": 0}
MUCH_LARGER = {"above": 0.044}
TERRIBLE = {"above": 0.1}


def compare(text, source, bounds, *pairs):
    """The Claim that the loss of an arm minus that of another has these bounds, for all pairs."""
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
        "Without position encoding and mask tanh and no activation are terrible",
        "bugs",
        TERRIBLE,
        ("tanh, no position or mask", "softmax"),
        ("no activation, no position or mask", "softmax"),
    ),
    compare(
        "tanh and no activation are terrible because no position encoding is applied: masked, they "
        "have a higher loss without it",
        "bugs",
        LARGER,
        ("tanh, no position", "tanh"),
        ("no activation, no position", "no activation"),
    ),
    Claim(
        "With position encoding and mask the loss of tanh and no activation is reduced, as opposed "
        "to before",
        "bugs",
        *(Check("fall", above=0.1, arm=arm) for arm in ("tanh", "no activation")),
        *(
            Check("fall", below=0, arm=f"{arm}, no position or mask", minus=arm)
            for arm in ("tanh", "no activation")
        ),
    ),
    compare(
        "Softmax and sigmoid are the best: tanh and no activation have a higher loss than both",
        "ablations",
        LARGER,
        *itertools.product(("tanh", "no activation"), BEST),
    ),
    compare(
        "The losses of softmax and sigmoid attention are very similar",
        "ablations",
        SAME,
        ("sigmoid", "softmax"),
    ),
    compare(
        "No qk_norm is best: fro_norm has a higher loss for softmax and sigmoid, rms_norm for "
        "sigmoid",
        "ablations",
        LARGER,
        *both("fro_norm"),
        ("sigmoid, rms_norm", "sigmoid"),
    ),
    compare(
        "fro_norm costs softmax and sigmoid attention 0.02 to 0.2 nats per byte (notebook: about "
        "0.2 per token)",
        "ablations",
        ABOUT_02,
        *both("fro_norm"),
    ),
    compare(
        "rms_norm costs sigmoid attention 0.02 to 0.2 nats per byte (notebook: about 0.2 per "
        "token)",
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
        "No post_attn_norm is best: with it softmax and sigmoid have a higher loss",
        "ablations",
        LARGER,
        *both("post_attn_norm"),
    ),
    compare(
        "Softmax attention can handle rms_norm: with gelu and without it makes no difference",
        "ablations",
        SAME,
        *both("rms_norm", "gelu")[::2],
    ),
    compare(
        "Sigmoid attention cannot handle rms_norm, with gelu and without: it gets a lot worse",
        "ablations",
        MUCH_LARGER,
        *both("rms_norm", "gelu")[1::2],
    ),
    compare(
        "Where rms_norm follows, gelu makes no real difference for softmax and sigmoid",
        "ablations",
        SAME,
        *((f"{base}, rms_norm, gelu", f"{base}, rms_norm") for base in BEST),
    ),
    compare(
        "fro_norm destroys the performance of softmax and sigmoid, with gelu and without",
        "ablations",
        MUCH_LARGER,
        *both("fro_norm", "gelu"),
    ),
    Claim(
        "Without qk_norm gelu worsens the mean loss of softmax and sigmoid a bit",
        "ablations",
        Check("cost of gelu", between=(0.02, 0.1)),
    ),
    Claim(
        "On the mean over qk_norm and qk_activ, for softmax and sigmoid, post_attn_norm lowers the "
        "loss",
        OURS,
        Check("effect of post_attn_norm", below=0),
    ),
    compare(
        "fro_norm over the whole tensor has a higher loss than over the channels of a head",
        OURS,
        LARGER,
        *((f"{base}, whole-tensor fro_norm", f"{base}, fro_norm") for base in BEST),
    ),
    Claim(
        "With softmax and rotary positions fro_norm costs over 0.02 nats per byte, rms_norm and "
        "post_attn_norm do not",
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
        "configs": draw_configs(run),
        "effects": draw_effects(run),
        "text.txt": f"sha256 of the text: {', '.join(sorted(digests))}\n",
    }


def draw_configs(run):
    """A heat map of the differences to softmax of all configs that the run has."""
    shown = [name for name in CONFIGS if run.shows(name)]
    if len(shown) < 2 or not run.shows("softmax"):
        return None
    figure, axes = core.new_figure(
        run,
        "The notebook's 48 configs compared with softmax",
        "Loss minus that of softmax, nats per byte, by config: mean over the seeds",
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
    """Main effects with their 95% intervals; None unless the run has all configs."""
    if not run.across:
        return None
    figure, axes = core.new_figure(
        run,
        "Main effects of activations and norms",
        "Mean change in loss over all configs that differ in one option alone, 95% interval",
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
