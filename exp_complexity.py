"""What do the notebook's four ways to attend over pairs of nodes cost, and where does their n^3 take over?

Entry       graph notebook, 13/4 ("Complexity of 3 coloring using transformer+edge bias vs simple og transformer")
Hypothesis  Weights: 8e^2 + 2e + 12d^2 with edge bias, 8e^2 + 2e simple. MACs: 8n^2 e^2 in the edge feed-forward, 8n d^2 in that of
            nodes, 3nd + n^2 d in attention; no n^3, all grows like n^2. Ours: attention takes 4n d^2 + 2n^2 d, path and cluster
            2n^2 e + n^3, most of it n^3 from n = 2e on; in time later, as a product does more MACs a second than the heads before.
Rule        One forward pass; 5 seeds: other weights and inputs, timed again, interleaved. Powers of a run's three largest sizes;
            "like n^2" is nearer to 2 than to 1 or 3. A claim stands if every check's 95% interval is in range, falls if one is out.
Cost        about 80 s with --jobs 1, as recorded (a second process disturbs the times); 2.3 GB a process
Quick       `--nodes 256 64 128 512 --seeds 3`
"""

import numpy as np
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

import core_old as core
from core_old import ANY_ABOVE, Check, Claim

PRODUCTS, MODELS = ("path", "cluster"), ("edge-bias", "simple", "path", "cluster")
FLAGS = [
    core.Flag("model", core.one_of(*MODELS), MODELS, "way to attend"),
    core.Flag("nodes", core.at_least(1), (256, 32, 64, 128, 512, 1024), "nodes n of the graph"),
    core.Flag("edge-dim", core.at_least(1), (8, 2, 32), "features e of a pair"),
    core.Flag("dim", core.at_least(1), (100,), "features d of a node"),
    core.Flag("heads", core.at_least(1), (2,), "heads of attention with edge bias"),
]
UNKNOWN = {torch.ops.mkldnn._linear_pointwise: lambda x, w, *_, **__: 2 * x[0] * x[1] * w[0]} if core.HAS_ONEDNN else {}


def build(c: dict) -> torch.nn.Module:
    if c["model"] == "edge-bias":
        attention = core.EdgeBiasAttention(c["dim"], c["heads"], c["edge_dim"])
        return core.TransformerLayer(attention, core.FeedForward(c["dim"], 4 * c["dim"]), c["dim"], ("layer", "layer"))
    return core.EdgeLayer(c["edge_dim"]) if c["model"] == "simple" else core.EdgeProduct(c["edge_dim"], c["model"])


def formulas(c: dict) -> tuple[int, int, int, int]:
    """Weights; MACs as in the notebook (where it names none, weights x pairs); corrected MACs; bytes at the peak: e features a pair
    with 4e hidden and e new ones, beside normed nodes, queries, keys, values; without a feed-forward, with three matrices."""
    n, e, d, heads = (c.get(key, 0) for key in ("nodes", "edge_dim", "dim", "heads"))
    noted, right, edges = 3 * n * d + n**2 * d + 8 * n * d**2, 12 * n * d**2 + 2 * n**2 * d + heads * n**2 * e, 8 * n**2 * e**2
    return {
        "edge-bias": (8 * e**2 + 2 * e + 12 * d**2, edges + 2 * n**2 * e + noted, edges + right, 24 * e * n**2 + 16 * n * d),
        "simple": (8 * e**2 + 2 * e, edges + 2 * n**2 * e, edges + 2 * n**2 * e + n**3, 24 * e * n**2),
    }.get(c["model"], (2 * e, 2 * n**2 * e, 2 * n**2 * e + n**3, 4 * (e + 3) * n**2))


@torch.no_grad()
def trial(config: dict, seed: int) -> dict:
    n, e, d, rng = config["nodes"], config["edge_dim"], config.get("dim", 0), core.stream(seed, "train")
    with core.initialised_from(seed):
        model = build(config).to(core.Runtime.device)
    x, edge = (torch.from_numpy(rng.standard_normal(shape, np.float32)).to(core.Runtime.device) for shape in ((n, d), (n, n, e)))
    arms = {"forward": lambda: model(x, edge) if d else model(edge)}
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter, MemTracker() as tracker:
        arms["forward"]()
    macs = {name.partition(".")[2]: sum(by_op.values()) / 2 for name, by_op in counter.get_flop_counts().items()}  # by module
    weights = sum(w.numel() for w in model.parameters() if w.dim() == 2)  # no biases, no norms
    peak = tracker.get_tracker_snapshot("peak")[edge.device]["Total"] - sum(w.nbytes for w in model.parameters())
    noted, noted_macs, right_macs, memory = formulas(config)
    result = {"weights": weights, "weights_missed": weights - noted, "macs": macs[""], "macs_missed": 1 - noted_macs / macs[""]}
    result |= {"macs_error": macs[""] / right_macs - 1, "megabytes": peak / 1e6, "memory_missed": 1 - memory / peak}
    if config["model"] == "edge-bias":
        edges, attention = macs["mixing.edge_feedforward"], macs["mixing"] - macs["mixing.edge_feedforward"] - macs["mixing.bias"]
        result |= {"edges_missed": 1 - 8 * n**2 * e**2 / edges, "nodes_missed": 1 - 8 * n * d**2 / macs["feedforward"]}
        result["attention_missed"] = 1 - (3 * n * d + n**2 * d) / attention
    if config["model"] in PRODUCTS:
        pairs, heads = edge.flatten(0, 1), (model.first, model.second)
        one, other = (head(pairs).view(n, n) for head in heads)
        arms |= {"heads": lambda: [head(pairs) for head in heads], "product": lambda: one @ (other.mT if model.swap else other)}
    seconds = core.interleaved_medians(arms, 7)
    if config["model"] in PRODUCTS:
        result["time_of_product_over_heads"] = seconds["product"] / seconds["heads"]
        result["macs_of_product_over_heads"] = macs[""] / (macs["first"] + macs["second"]) - 1
    return result | {"time_ms": 1e3 * seconds["forward"]}


def cell(config: dict) -> dict:
    if config["model"] != "edge-bias":
        config = {key: value for key, value in config.items() if key not in ("dim", "heads")}
    elif config["dim"] % config["heads"]:
        raise core.UsageError(f"--heads {config['heads']}: does not divide --dim {config['dim']}; choose a divisor")
    return config


def memory(config: dict) -> tuple[str, float]:
    return f"--nodes {config['nodes']}", 700 + 2 * formulas(config)[3] / 1e6  # freed blocks are kept, so that the next size adds


def derived(run: core.Run) -> dict[str, np.ndarray]:
    at = {(c["model"], c["nodes"], c["edge_dim"]): i for i, c in reversed([*enumerate(run.cells)])}  # the first --dim and --heads
    models, nodes, edge_dims = (sorted(set(values)) for values in zip(*at, strict=True))
    found = {"largest macs_error": np.max([np.abs(run.values(i, "macs_error")) for i in at.values()], 0)}
    for model in models:
        lines = {f"nodes, {model}, e = {e}": {n: at[model, n, e] for n in nodes[-3:]} for e in (edge_dims[0], edge_dims[-1])}
        lines |= {f"e, {model}, {nodes[-1]} nodes": {e: at[model, nodes[-1], e] for e in edge_dims[-3:]}}
        for line, cells in lines.items():
            for metric in ("time_ms", "megabytes") if len(cells) > 1 else ():
                found[f"power of {metric} in {line}"] = core.fitted_power([*cells], [run.values(i, metric) for i in cells.values()])
        for e in edge_dims if model in PRODUCTS else ():  # nodes where both take as long, between two sizes; else NaN
            ratios = [run.values(at[model, n, e], "time_of_product_over_heads") for n in nodes]
            found[f"takeover over 2e, {model}, e = {e}"] = core.crossing(nodes, ratios) / (2 * e)
    return found


EXACT, NEAR, SQUARE, LATER, POWER = (-1e-9, 1e-9), (-0.05, 0.05), (1.5, 2.5), (2, ANY_ABOVE), "power of time_ms in nodes, "
CLAIMS = [
    Claim("8e^2 + 2e + 12d^2 weights; simple 8e^2 + 2e", "13/4", [Check("weights_missed", EXACT, {"model": m}) for m in MODELS]),
    Claim("edge feed-forward: 8n^2 e^2 MACs; other: 8n d^2", "13/4", [Check(m, EXACT) for m in ("edges_missed", "nodes_missed")]),
    Claim("3nd + n^2 d in attention, within 5%", "13/4", [Check("attention_missed", NEAR)]),
    Claim("no n^3 in path and cluster, within 5%", "13/4", [Check("macs_missed", NEAR, {"model": m}) for m in PRODUCTS]),
    Claim("the corrected MACs are those counted (our question)", "13/4", [Check("largest macs_error", EXACT, None)]),
    Claim("time grows like n^2 with edge bias", "13/4", [Check(f"{POWER}edge-bias, e = {e}", SQUARE, None) for e in (2, 32)]),
    Claim("so does that of the simple one with 32 features", "13/4", [Check(f"{POWER}simple, e = 32", SQUARE, None)]),
    Claim("and of path, cluster", "13/4", [Check(f"{POWER}{m}, e = {e}", SQUARE, None) for m in PRODUCTS for e in (2, 32)]),
    Claim("in time n^3 takes over at more than twice the nodes where it does in MACs (our question)", "13/4",
          [Check(f"takeover over 2e, {m}, e = {e}", LATER, None, scale="ratio") for m in PRODUCTS for e in (2, 8, 32)]),
    Claim("bytes: 24n^2 e or 4n^2 (e + 3) (our question)", "13/4", [Check("memory_missed", NEAR, {"model": m}) for m in MODELS]),
]  # fmt: skip


def headline(run: core.Run) -> str:
    return f"milliseconds of a forward pass: {core.extremes(run, 'time_ms')}"


def figures(run: core.Run) -> list[core.Figure]:
    run = core.only(run, sorted(range(len(run.cells)), key=lambda i: run.cells[i]["edge_dim"]))  # panels in order
    drawn = [core.sweep_figure(run, "time", headline(run), "nodes", ["time_ms"], "milliseconds", ["edge_dim"], "xy")]
    if (products := core.only(run, [i for i, c in enumerate(run.cells) if c["model"] in PRODUCTS])).cells:
        ratios = ["time_of_product_over_heads", "macs_of_product_over_heads"]
        finding = f"Time of the n^3 product over that of the heads: {core.extremes(products, ratios[0])}"
        drawn.append(core.sweep_figure(products, "product", finding, "nodes", ratios, "ratio", ["edge_dim"], "xy", {"equal": 1.0}))
    return drawn


SMOKE = {"nodes": (4, 8), "dim": (8,)}
METRICS = ["time_ms", "macs", "macs_missed", "megabytes", "memory_missed", "weights", "weights_missed", "macs_error"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell, derived, memory)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
