"""What do activation and norms inside attention do to a language model, at equal optimizer steps?

Entry       attention notebook, 2024-10-10: "dipping my toes in" (the bugs), "Ablations"
Hypothesis  sigmoid is about as good as softmax; tanh and none are bad, and were terrible without position and mask. fro_norm of
            queries and keys costs 0.2, rms_norm 0.2 for sigmoid and nothing for softmax; rms_norm behind attention costs 1.5 to 2;
            gelu on queries and keys costs a bit, or nothing where rms_norm follows. Ours: at equal steps the norm behind attention
            costs nothing; with norms over the whole tensor fro_norm costs more than over a head's channels.
Rule        5 paired seeds, the same windows in every arm, the same number of steps. Nats a byte on held-out text; claims in nats a
            token of the notebook's (GPT-2's, taken for 4.5 bytes of English). "No difference": within 0.1, half of what it calls
            consistently worse; "0.2": 0.1 to 0.3; "a bit": 0 to 0.2; bad: over 0.1. A claim stands if the 95% interval of every
            check lies in its range, and falls if one lies wholly outside.
Cost        about 25 min on 2 cores, 48 settings x 5 seeds. Entries of their own: the bugs, 7 min: `--qk-activ none
            --post-attn-norm none --bug none norm-dim no-position`; positions, 9 min: `--qk-activ none --attn-activ softmax sigmoid
            --qk-norm none fro_norm --position linear rotary none`. One run, 10 s: `--attn-activ softmax --qk-norm none --qk-activ
            none --post-attn-norm none --seeds 1`
"""

import textwrap

import numpy as np

import core
from core import ANY_ABOVE, ANY_BELOW, Check, Claim

ACTIVATIONS, NORMS = ("softmax", "sigmoid", "tanh", "none"), ("none", "fro_norm", "rms_norm")
FLAGS = core.language_flags(
    ("logit_bias", "logit_scale", "init"), attn_activ=ACTIVATIONS, qk_norm=NORMS, qk_activ=("none", "gelu"),
    post_attn_norm=("none", "rms_norm"))  # fmt: skip
FIXED = {"logit_bias": "none", "logit_scale": "root", "init": "torch"}


def trial(config: dict, seed: int) -> dict:
    result = core.train_on_text(FIXED | config, seed)
    return result | {"token_loss": core.BYTES_A_TOKEN * result["loss"]}


def cell(config: dict) -> dict:
    return {key: value for key, value in core.language_cell(FIXED | config).items() if key not in FIXED}


def costs(low: float, high: float, arm: dict, versus: dict | None = None) -> Check:
    return Check("token_loss", (low, high), arm, versus or {})


SIGMOID, SAME, ABOUT_02, BAD = {"attn_activ": "sigmoid"}, (-0.1, 0.1), (0.1, 0.3), (0.1, ANY_ABOVE)
BOTH = ({}, SIGMOID)
CLAIMS = [
    Claim("sigmoid is about as good as softmax", "Ablations", [costs(*SAME, SIGMOID)]),
    *(Claim(f"{kind} is bad", "toes, Ablations", [costs(*BAD, {"attn_activ": kind}, one) for one in BOTH])
      for kind in ACTIVATIONS[2:]),
    *(Claim(f"fro_norm costs 0.2, {name}", "Ablations", [costs(*ABOUT_02, {"qk_norm": "fro_norm"} | one, one)])
      for one, name in zip(BOTH, ACTIVATIONS, strict=False)),
    Claim("rms_norm costs 0.2, sigmoid", "Ablations, 1", [costs(*ABOUT_02, {"qk_norm": "rms_norm"} | SIGMOID, SIGMOID)]),
    Claim("rms_norm makes no difference, softmax", "Ablations, 1", [costs(*SAME, {"qk_norm": "rms_norm"})]),
    Claim("post_attn_norm costs 1.5 to 2", "Ablations", [costs(1.5, 2, {"post_attn_norm": "rms_norm"} | one, one) for one in BOTH]),
    Claim("post_attn_norm costs nothing at equal steps (our question)", "Ablations",
          [costs(ANY_BELOW, 0.1, {"post_attn_norm": "rms_norm"} | one, one) for one in BOTH]),
    Claim("gelu makes no difference where rms_norm follows", "Ablations, 1",
          [costs(*SAME, {"qk_norm": "rms_norm", "qk_activ": "gelu"} | one, {"qk_norm": "rms_norm"} | one) for one in BOTH]),
    Claim("gelu without a norm costs a bit", "Ablations, 2", [costs(0, 0.2, {"qk_activ": "gelu"} | one, one) for one in BOTH]),
    Claim("fro_norm destroys performance, with gelu and without", "Ablations, 2",
          [costs(*BAD, {"qk_norm": "fro_norm"} | one, one) for one in
           ({**one, "qk_activ": gelu} for one in BOTH for gelu in ("none", "gelu"))]),
    Claim("tanh and none gain by position and mask", "toes",
          [costs(0, ANY_ABOVE, {"attn_activ": kind, "bug": "no-position"}, {"attn_activ": kind}) for kind in ACTIVATIONS[2:]]),
    *(Claim(f"{norm} over the whole tensor is worse (our question)", "toes",
            [costs(0, ANY_ABOVE, {"qk_norm": norm, "bug": "norm-dim"} | one, {"qk_norm": norm} | one) for one in BOTH])
      for norm in NORMS[1:]),
    *(Claim(f"{name} the same with rotary positions, and without any (our question)", "Ablations",
            [costs(*claimed, arm | {"position": position}, {"position": position}) for position in ("rotary", "none")])
      for name, claimed, arm in (("fro_norm bad,", BAD, {"qk_norm": "fro_norm"}), ("sigmoid as good as softmax,", SAME, SIGMOID),
                                 ("post_attn_norm harmless,", (ANY_BELOW, 0.1), {"post_attn_norm": "rms_norm"}))),
]  # fmt: skip


def headline(run: core.Run) -> str:
    return f"held-out nats a byte: {core.extremes(run, 'loss')}"


def heat_map(run: core.Run) -> core.Figure:
    """Paired difference to the first cell, a box a setting: mean, and half the 95% interval below it."""
    across = [key for key in ("qk_norm", "qk_activ", "bug") if key in core.varying(run.cells)]
    down = [key for key in core.varying(run.cells) if key not in across]
    places = [(core.cell_name(cell, down), core.cell_name(cell, across)) for cell in run.cells]
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*places, strict=True))
    base = np.array(run.values(0, "loss"))
    found = {place: core.mean_interval(np.array(run.values(i, "loss")) - base) for i, place in enumerate(places)}
    colour = np.full((len(rows), len(columns)), np.nan)
    plt = core.pyplot()
    figure, axes = plt.subplots(figsize=(2.6 + 1.35 * len(columns), 1.9 + 0.62 * len(rows)))
    for (row, column), interval in found.items():
        at = rows.index(row), columns.index(column)
        colour[at] = np.clip(interval.estimate, -0.3, 0.3)
        text = f"{interval.estimate:+.3f}" + f"\n±{interval.high - interval.estimate:.3f}" * (interval.high > interval.low)
        axes.text(at[1], at[0], text, ha="center", va="center", fontsize=9)
    image = axes.imshow(colour, cmap="RdBu_r", vmin=-0.3, vmax=0.3, aspect="auto", alpha=0.7)
    axes.set_xticks(range(len(columns)), [textwrap.fill(name, 18) for name in columns], fontsize=9)
    axes.set_yticks(range(len(rows)), [textwrap.fill(name, 34) for name in rows], fontsize=9)
    axes.grid(False)
    figure.colorbar(image, label="nats a byte above the first setting", extend="both")
    finding = f"Difference to {core.cell_name(run.cells[0], core.varying(run.cells))}: {headline(run)}"
    figure.suptitle(textwrap.fill(finding, int(10 * figure.get_size_inches()[0])), fontsize=11)
    table = {f"{row} | {column}": np.array(run.values(i, "loss")) - base for i, (row, column) in enumerate(places)}
    return core.Figure("heat", figure, finding, table)


def figures(run: core.Run) -> list[core.Figure]:
    varies = core.varying(run.cells)
    told = [key for key in ("qk_norm", "qk_activ", "bug") if key in varies]
    panels, every = [key for key in varies if key not in told], max(run.cells[0]["steps"] // 10, 1)
    curves = core.curves_figure(
        run, "curves", headline(run).capitalize(), lambda cell, result: {core.cell_name(cell, told): result["curve"]},
        panels, "step", "held-out loss, nats a byte", every=every)  # fmt: skip
    return [heat_map(run), curves]


SMOKE = {"attn_activ": ("softmax", "sigmoid", "tanh"), "qk_norm": ("none", "fro_norm"), "qk_activ": ("none",),
         "layers": (1,), "dim": (8,), "heads": (2,), "length": (16,), "batch": (2,), "steps": (10,)}  # fmt: skip
METRICS = ["loss", "bits", "token_loss", "steps", "tokens", "gradient_norm"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell)


def main(argv: list[str] | None = None) -> int:
    return core.main(EXPERIMENT, argv)


if __name__ == "__main__":
    raise SystemExit(main())
