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
Quick       `--attn-activ softmax sigmoid tanh --qk-activ none --qk-norm none fro_norm --post-attn-norm none --steps 40 --seeds 3`
"""

import textwrap

import numpy as np

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim

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


def figures(run: core.Run) -> list[core.Figure]:
    """A box a setting with its paired difference to the first one, and the curves."""
    short = {"none": "none", "rms_norm": "rms", "fro_norm": "fro"}

    def words(cell: dict, keys: list[str]) -> str:
        told = {"attn_activ": cell["attn_activ"].replace("none", "no activation"), "qk_norm": "q,k " + short[cell["qk_norm"]]}
        told |= {"post_attn_norm": "post " + short[cell["post_attn_norm"]], "position": f"{cell['position']} position"}
        told |= {"qk_activ": cell["qk_activ"].replace("none", "no gelu"), "bug": "bug " + cell["bug"]}
        return ", ".join(told.get(key, core.cell_name(cell, [key])) for key in keys) or "loss"

    varies, plt = core.varying(run.cells), core.pyplot()
    across = [key for key in ("qk_norm", "qk_activ") if key in varies]
    down = [key for key in varies if key not in across]
    places = [(words(cell, down), words(cell, across)) for cell in run.cells]
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*places, strict=True))
    base, colour, table = np.array(run.values(0, "loss")), np.full((len(rows), len(columns)), np.nan), {}
    figure, axes = plt.subplots(figsize=(3.4 + 1.25 * len(columns), 2.0 + 0.55 * len(rows)))
    for i, (row, column) in enumerate(places):
        table[f"{row} | {column}"] = np.array(run.values(i, "loss")) - base
        mean, low, high, _ = core.mean_interval(table[f"{row} | {column}"])
        at = rows.index(row), columns.index(column)
        colour[at] = mean
        text = f"{mean:+.3f}" + f"\n±{(high - low) / 2:.3f}" * (0 < high - low < np.inf)
        axes.text(at[1], at[0], text, ha="center", va="center", fontsize=9, color="white" if abs(mean) > 0.2 else "black")
    image = axes.imshow(colour, cmap="RdBu_r", vmin=-0.3, vmax=0.3, aspect="auto")
    axes.set_xticks(range(len(columns)), [textwrap.fill(name, 12) for name in columns], fontsize=10)
    axes.set_yticks(range(len(rows)), rows, fontsize=10)
    axes.grid(False)
    figure.colorbar(image, label="nats a byte", extend="both")
    finding = f"Held-out loss above that of {rows[0]}, {columns[0]} ({core.brief(base.mean())} nats a byte), ± its 95% interval"
    core.add_title(figure, finding)
    curves = core.curves_figure(
        run, "curves", headline(run), lambda cell, result: {words(cell, across): result["curve"]}, down, "step",
        "held-out loss, nats a byte", every=max(run.cells[0]["steps"] // 10, 1))  # fmt: skip
    curves.figure.axes[0].set_ylim(1.8, 3.5)  # the first steps come down from 5.7
    return [core.Figure("heat", figure, finding, table), curves]


SMOKE = {"attn_activ": ("softmax", "tanh"), "qk_norm": ("none", "fro_norm"), "qk_activ": ("none",), "post_attn_norm": ("none",),
         "layers": (1,), "dim": (8,), "heads": (2,), "length": (16,), "batch": (2,), "steps": (10,)}  # fmt: skip
METRICS = ["loss", "bits", "token_loss", "steps", "tokens", "gradient_norm"]
EXPERIMENT = core.Experiment(
    __file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell, memory=core.language_memory
)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
