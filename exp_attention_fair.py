"""Are norms in attention bad or untuned, when is a sigmoid as good as softmax, and why does fro_norm fail?

Entry       attention notebook, 2024-10-10, "Ablations", and what its authors asked later
Hypothesis  Ours. Each setting at its own best learning rate: rms_norm and the norm behind attention cost nothing, fro_norm still
            does, as do tanh and none; and with rms_norm the choice of the rate matters less. A sigmoid is as good as softmax where
            the linear bias keeps the sum of its weights near one; with rotary positions or none that sum grows with the row, a
            sigmoid is worse, and -log of the length added to its logits mends it; -log of the row is no better than that. With the
            linear bias they hurt. fro_norm fails because its logits stay within 1 / root of the channels: a large fixed scale
            mends it; a scale that is learned from there is too slow to.
Rule        5 paired seeds, 250 steps. Loss of a setting: at the rate that is best on the mean of the other seeds, so that choosing
            gains nothing by chance. Nats a token, as in attention_ablation. "Nothing", "as good": below 0.1; worse: over 0.1. A
            claim stands if the 95% interval of every check lies in its range, and falls if one lies wholly outside.
Cost        about 25 min on 2 cores with the defaults, the rates. Positions, 20 min: `--qk-norm none --post-attn-norm none
            --position linear rotary none --logit-bias none length row --logit-scale root root-learned --lr 1e-3 2e-3`. Scales,
            10 min: `--qk-norm fro_norm none --post-attn-norm none --logit-scale root root-learned high high-learned
            --lr 1e-3 2e-3`. Activations, 7 min: `--attn-activ softmax tanh none --qk-norm none --post-attn-norm none`
Quick       `--qk-norm none fro_norm --post-attn-norm none --lr 2e-3 4e-3 --steps 30 --seeds 3`
"""

import numpy as np

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim

FLAGS = core.language_flags(
    ("bug", "qk_activ"), attn_activ=("softmax", "sigmoid"), qk_norm=("none", "fro_norm", "rms_norm"),
    post_attn_norm=("none", "rms_norm"), lr=(2e-3, 5e-4, 1e-3, 4e-3, 8e-3))  # fmt: skip
FIXED = {"bug": "none", "qk_activ": "none"}


def trial(config: dict, seed: int) -> dict:
    return core.train_on_text(FIXED | config, seed)


def cell(config: dict) -> dict:
    return {key: value for key, value in core.language_cell(FIXED | config).items() if key not in FIXED}


def name(setting: dict) -> str:
    """A setting, but for its rate, in the same words in every grid: "sigmoid, rotary, bias length"."""
    words = [setting.get("attn_activ", "softmax")]
    usual = {"qk_norm": ("none", ""), "post_attn_norm": ("none", "behind "), "position": ("linear", "position "),
             "logit_bias": ("none", "bias "), "logit_scale": ("root", "scale ")}  # fmt: skip
    return ", ".join(words + [word + setting[key] for key, (value, word) in usual.items() if setting.get(key, value) != value])


def tuned(run: core.Run) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of every setting, a value a seed: loss at the rate that is best on the other seeds, that rate, and by how much the mean over
    all rates is larger."""
    losses = {}
    for i, config in enumerate(run.cells):
        losses.setdefault(name(config), []).append((config["lr"], run.values(i, "loss")))
    found = {}
    for setting, swept in losses.items():
        rates, loss = map(np.array, zip(*swept, strict=True))
        loss, seeds = np.nan_to_num(loss, nan=np.inf, posinf=np.inf), range(loss.shape[1])
        others = [[s for s in seeds if s != own] or [own] for own in seeds]
        chosen = np.array([np.argmin(loss[:, other].mean(1)) for other in others])
        best = loss[chosen, seeds]
        with np.errstate(invalid="ignore"):  # of what diverged
            found[setting] = best, rates[chosen], loss.mean(0) - best
    return found


def derived(run: core.Run) -> dict[str, np.ndarray]:
    found, settings = {}, tuned(run)
    for one, other in (map(name, pair) for pair in PAIRS):
        if {one, other} <= settings.keys():
            (best, _, untuned), (base, _, base_untuned) = settings[one], settings[other]
            found[f"cost of {one}, over {other}"] = core.BYTES_A_TOKEN * (best - base)
            found[f"cost of not tuning {one}, over {other}"] = core.BYTES_A_TOKEN * (untuned - base_untuned)
    return found | {f"rate of {setting}": rate for setting, (_, rate, _) in settings.items()}


PAIRS = []  # of the settings that claims compare


def costs(low: float, high: float, one: dict, other: dict, what: str = "cost of") -> Check:
    """A tuned setting against another."""
    PAIRS.append((one, other))
    return Check(f"{what} {name(one)}, over {name(other)}", (low, high), None)


SOFTMAX, SIGMOID = BOTH = ({}, {"attn_activ": "sigmoid"})
RMS, FRO, BEHIND = {"qk_norm": "rms_norm"}, {"qk_norm": "fro_norm"}, {"post_attn_norm": "rms_norm"}
WORSE, FREE, SAME = (0.1, ANY_ABOVE), (ANY_BELOW, 0.1), (-0.1, 0.1)
UNBOUND = [{"position": position} for position in ("rotary", "none")]  # nothing keeps the sum of a sigmoid's weights small
CLAIMS = [
    Claim("tuned, rms_norm costs nothing", "later", [costs(*FREE, one | RMS, one) for one in BOTH]),
    Claim("tuned, post_attn_norm costs nothing", "later", [costs(*FREE, one | BEHIND, one) for one in BOTH]),
    Claim("tuned, fro_norm still costs", "later", [costs(*WORSE, one | FRO, one) for one in BOTH]),
    Claim("tuned, tanh and none are still bad", "Ablations",
          [costs(*WORSE, {"attn_activ": kind}, SOFTMAX) for kind in ("tanh", "none")]),
    Claim("with rms_norm the rate matters less", "later",
          [costs(ANY_BELOW, 0, one | RMS, one, "cost of not tuning") for one in BOTH]),
    Claim("tuned, sigmoid is as good as softmax with the linear bias", "later", [costs(*SAME, SIGMOID, SOFTMAX)]),
    Claim("without it sigmoid is worse", "later", [costs(*WORSE, SIGMOID | at, at) for at in UNBOUND]),
    Claim("-log of the length mends it", "later", [costs(*FREE, SIGMOID | at | {"logit_bias": "length"}, at) for at in UNBOUND]),
    Claim("-log of the row is no better", "later",
          [costs(*SAME, *(SIGMOID | at | {"logit_bias": bias} for bias in ("row", "length"))) for at in UNBOUND]),
    Claim("with the linear bias these hurt", "later",
          [costs(0, ANY_ABOVE, SIGMOID | {"logit_bias": bias}, SIGMOID) for bias in ("length", "row")]),
    Claim("a learned logit scale changes nothing", "later",
          [costs(*SAME, one | at | {"logit_scale": "root-learned"}, one | at) for one in BOTH for at in ({}, *UNBOUND)]),
    Claim("fro_norm with a large fixed scale costs nothing", "later",
          [costs(*FREE, one | FRO | {"logit_scale": "high"}, one) for one in BOTH]),
    Claim("a scale learned from the small one does not mend fro_norm", "later",
          [costs(*WORSE, one | FRO | {"logit_scale": "root-learned"}, one) for one in BOTH]),
    Claim("learning the large scale adds nothing", "later",
          [costs(*SAME, *(one | FRO | {"logit_scale": scale} for scale in ("high-learned", "high"))) for one in BOTH]),
    Claim("without a norm the large scale hurts", "later", [costs(*WORSE, one | {"logit_scale": "high"}, one) for one in BOTH]),
]  # fmt: skip


def headline(run: core.Run) -> str:
    best = {setting: float(loss.mean()) for setting, (loss, _, _) in tuned(run).items()}
    least, most = min(best, key=best.get), max(best, key=best.get)
    return f"tuned, nats a byte: least with {least} ({core.brief(best[least])}), most with {most} ({core.brief(best[most])})"


def figures(run: core.Run) -> list[core.Figure]:
    varies = core.varying(run.cells)
    lines = next(key for key in ("logit_bias", "logit_scale", "qk_norm", "attn_activ") if key in varies or key == "attn_activ")
    panels = [key for key in varies if key not in (lines, "lr")]
    curves = core.sweep_figure(run, "rates", headline(run), "lr", ["loss"], "held-out loss, nats a byte", panels, log="x")
    losses = np.array([run.values(i, "loss") for i in range(len(run.cells))])
    curves.figure.axes[0].set_ylim(np.nanmin(losses) - 0.02, min(np.nanmax(losses), np.nanmin(losses) + 1.2) + 0.02)
    rates = sorted({cell["lr"] for cell in run.cells})
    for axes in curves.figure.axes:
        axes.set_xticks(rates, [f"{1e3 * rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set_xlabel("learning rate / 0.001")
    rows = {setting: {"loss": loss} for setting, (loss, _, _) in tuned(run).items()}
    return [curves, core.dots_figure(rows, "tuned", headline(run), "held-out loss at the tuned rate, nats a byte")]


SMOKE = {"qk_norm": ("none", "rms_norm"), "post_attn_norm": ("none",), "lr": (1e-3, 2e-3), "layers": (1,), "dim": (8,),
         "heads": (2,), "length": (16,), "batch": (2,), "steps": (10,)}  # fmt: skip
METRICS = ["loss", "bits", "steps", "tokens", "gradient_norm"]
EXPERIMENT = core.Experiment(
    __file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell, derived, memory=core.language_memory
)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
