"""Up to which density does attention along edges beat a dense mask, and in which form: edge list or CSR matrix?

Entry       question-answering notebook, "Visualisations": "graph memory usage/ flops/ runtime against sequence length and sparsity"
Hypothesis  Ours. Dense attention takes N^2 in time and memory; the edge list (core.edge_attention) and CSR follow the edges. The
            list is faster than fused attention up to 10% of all pairs, slower at 30%, and at least as fast as torch_geometric's
            TransformerConv; CSR is faster still from 1% of 2048 nodes on. Plain attention takes 1.5 times as long where freed
            blocks are returned to the system.
Rule        Forward and backward from queries, keys, values on, interleaved, one thread; 5 seeds (inputs; graph with loops).
            Memory: the most that a call adds in a process of its own. Plain attention, which no density changes, beyond 1024 nodes
            at 1% alone, beyond 4096 untimed; the peer, without types, up to 10^6 edges; nothing beyond 1000 edges a node. A claim
            stands if every check's 95% interval is in its range, falls if one is out. Pilots were seen on seed 1000.
Cost        about 8 min with --jobs 1, as recorded. The peer, where installed: pip install --no-deps -r requirements-peers.txt
Quick       `--length 2048 512 --density 0.01 0.1 --seeds 3`
"""

import math
import sys
import warnings
from itertools import product

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, at_least, one_of

FLAGS = [
    Flag("length", at_least(2), (2048, 512, 1024, 4096, 8192), "nodes N"),
    Flag("density", core.probability, (0.01, 0.001, 0.1, 0.3), "share of all pairs that are joined, beside loops"),
    Flag("memory", one_of("on", "off"), ("on",), "measure memory, too, in a process for each form"),
    Flag("dim", at_least(1), (64,), "width D"),
    Flag("heads", at_least(1), (4,), "heads H"),
    Flag("rounds", at_least(1), (8,), "timed rounds up to 512 nodes, fewer beyond, behind two that are not"),
]
PEER = core.optional("torch_geometric.nn")
KINDS, SMALL = ("plain", "fused", "edges", "csr", "peer"), {"length": 64}  # to count FLOPs, and to warm up a process
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")


def calls_of(c: dict, seed: int) -> tuple[dict, int]:
    """For each kind a call that returns what it mixes [N, H, D/H] and gradients of queries, keys, values; the number of edges."""
    n, heads, width, rng = c["length"], c["heads"], c["dim"] // c["heads"], core.stream(seed, "train")
    joined = torch.from_numpy(rng.random((n, n), np.float32) < c["density"]).fill_diagonal_(True)
    e = core.Edges(*joined.nonzero().T.contiguous().flip(0), torch.from_numpy(rng.integers(len(core.KINDS), size=n)))
    *inputs, direction = torch.from_numpy(rng.standard_normal((4, n, heads, width), np.float32))
    query, key, value, types = (x.requires_grad_() for x in [*inputs, torch.zeros(len(core.KINDS) ** 2, heads)])
    forms, index = core.attention_forms(query, key, value, types, e), torch.stack([e.source, e.target])

    def call(kind: str) -> list[torch.Tensor]:
        if kind == "peer":  # its message passing, behind its linear layers
            layer = PEER.TransformerConv(width, width, heads)
            out = layer.propagate(index, query=query * math.sqrt(width), key=key, value=value, edge_attr=None)
        else:
            out = forms[kind]()
        return [out.detach(), *torch.autograd.grad(out, [query, key, value] + [types] * (kind != "peer"), direction)[:3]]

    most = {"plain": n <= 1024 or c["density"] == 0.01, "peer": PEER and c["density"] * n**2 < 1e6}
    return {kind: lambda kind=kind: call(kind) for kind in KINDS if most.get(kind, True)}, len(e.source)


def trial(config: dict, seed: int) -> dict:
    run = lambda: measured(config, seed)  # noqa: E731
    return core.in_fork(run) if config["memory"] == "on" else run()  # so that this process stays without freed blocks


def measured(config: dict, seed: int) -> dict:
    n, results, nothing = config["length"], {}, dict.fromkeys(KINDS, math.nan)
    calls, edges = calls_of(config, seed) if config["density"] * n < 1000 else ({}, math.nan)
    small, few = calls_of(config | SMALL, seed)
    megabytes, rounds = dict(nothing), max(1, config["rounds"] * min(n, 512) // n)
    if config["memory"] == "on":
        core.keep_large_blocks(False)
        megabytes |= {kind: max(core.added_mb(calls[kind], small[kind]), 4.096e-3) for kind in calls}  # a page at least
    timed = {k: lambda k=k: results.update({k: calls[k]()}) for k in calls if k != "plain" or n <= 4096}
    core.keep_large_blocks()
    seconds, returned = nothing | core.interleaved_medians(timed, rounds), math.nan
    if "plain" in timed:
        core.keep_large_blocks(False)
        returned = core.interleaved_medians({"plain": timed["plain"]}, rounds)["plain"] / seconds["plain"]
        core.keep_large_blocks()
    with FlopCounterMode(display=False) as counter:
        small["plain"]()
    first, *others = [*results.values()] or [[]]
    off = [float((x - y).abs().max() / y.abs().max()) for other in others for x, y in zip(other, first, strict=True)]
    result = {"edges": edges, "largest_difference": max(off, default=math.nan), "time_returned_over_kept": returned}
    formula = core.attention_flops(SMALL["length"], few, config["dim"], config["heads"])["plain"]
    result |= {"flops_ratio": counter.get_total_flops() / formula, "calls": float(rounds * len(timed))}
    result |= {f"gflop_{kind}": n / 1e9 for kind, n in core.attention_flops(n, edges, config["dim"], config["heads"]).items()}
    for kind in KINDS:
        result |= {f"time_{kind}_ms": 1e3 * seconds[kind], f"{kind}_mb": megabytes[kind]}
        result[f"time_{kind}_over_edges"] = seconds[kind] / seconds["edges"]
        result[f"mb_{kind}_over_csr"] = megabytes[kind] / megabytes["csr"]
    return result


def cell(config: dict) -> dict:
    core.require_heads(config)
    if config["memory"] == "on" and (sys.platform != "linux" or torch.cuda.is_available()):
        raise core.UsageError("--memory on: needs Linux and, as it forks, no GPU (CUDA_VISIBLE_DEVICES=); give --memory off")
    return config


def memory(config: dict) -> tuple[str, float]:
    pairs, edges = config["length"] ** 2, config["density"] * config["length"] ** 2
    dense = 27 * config["heads"] * pairs * (config["length"] <= 1024 or config["density"] == 0.01)
    need = 12 * pairs + dense + (200 + 16 * config["heads"] + 36 * config["dim"] * (edges < 1e6)) * edges
    return f"--length {config['length']}", 500 + need / 1e6 * (edges < 1000 * config["length"])


def derived(run: core.Run) -> dict[str, np.ndarray]:
    at = {(c["length"], c["density"]): i for i, c in reversed([*enumerate(run.cells)])}  # the first of the other flags' values
    found, (lengths, densities) = {}, (sorted(set(values)) for values in zip(*at, strict=True))
    length, density = run.cells[0]["length"], run.cells[0]["density"]

    def seen(metric: str, cells: dict) -> dict:
        """Sizes at which all seeds have the metric, with its values."""
        values = {size: run.values(i, metric) for size, i in cells.items()}
        return {size: value for size, value in values.items() if np.isfinite(value).all()}

    lines = {"length": {n: at[n, density] for n in lengths}, "density": {d: at[length, d] for d in densities}}
    for (key, cells), kind, metric in product(lines.items(), KINDS, ("time_{}_ms", "{}_mb")):
        values = seen(metric.format(kind), cells)
        if len(values) > 1:  # the three largest
            found[f"power of {metric.format(kind)} in {key}"] = core.fitted_power([*values][-3:], [*values.values()][-3:])
        elif len(cells) > 1:
            found[f"power of {metric.format(kind)} in {key}"] = np.full(len(run.seeds), np.nan)
    for kind, n in product(("edges", "csr"), lengths):  # where fused takes as long
        fused, other = (seen(f"time_{k}_ms", {d: at[n, d] for d in densities}) for k in ("fused", kind))
        if other:
            found[f"crossover density, {kind}, {n} nodes"] = core.crossing([*other], [np.divide(other[d], fused[d]) for d in other])
    return found


def ratio(metric: str, claimed: tuple, cells: list[tuple]) -> list[Check]:
    return [Check(metric, claimed, {"length": n, "density": d}, scale="ratio") for n, d in cells]


def power(claimed: tuple, key: str, *metrics: str) -> list[Check]:
    return [Check(f"power of {metric} in {key}", claimed, None) for metric in metrics]


OURS, MORE, LESS, ALL = "Visualisations (our question)", (1, ANY_ABOVE), (ANY_BELOW, 1), (512, 1024, 2048, 4096, 8192)
BOTH = [(n, d) for n, d in product(ALL, (0.001, 0.01, 0.1, 0.3)) if d * n**2 < 1e6]  # where the peer is measured
CLAIMS = [Claim(text, OURS, checks) for text, checks in [
    ("dense attention takes N^2: time fused, memory plain", power((1.8, 2.2), "length", "time_fused_ms", "plain_mb")),
    ("edge list and CSR take time like edges", power((0.8, 1.2), "density", "time_edges_ms", "time_csr_ms")),
    ("the list is faster than fused up to 10%", ratio("time_fused_over_edges", MORE, product(ALL, (0.001, 0.01, 0.1)))),
    ("and slower at 30%", ratio("time_fused_over_edges", LESS, product(ALL[:3], (0.3,)))),
    ("it is at least as fast as torch_geometric", ratio("time_peer_over_edges", MORE, BOTH)),
    ("and that from 10 thousand edges on", ratio("time_peer_over_edges", MORE, [x for x in BOTH if x[0] ** 2 * x[1] > 1e4])),
    ("from 2048 nodes and 1% on CSR is faster", ratio("time_csr_over_edges", LESS, product(ALL[2:], (0.01, 0.1)))),
    ("up to 1% CSR needs less memory than fused and list, of 2048 nodes and more",
     [c for k in KINDS[1:3] for c in ratio(f"mb_{k}_over_csr", MORE, product(ALL[2:], (0.001, 0.01)))]),
    ("at 10%, too, it needs less than fused", ratio("mb_fused_over_csr", MORE, product(ALL[2:], (0.1,)))),
    ("plain takes 1.5 times as long where blocks are returned",
     ratio("time_returned_over_kept", (1.5, ANY_ABOVE), product((2048, 4096), (0.01,)))),
    ("FLOPs of plain attention are the formula's", [Check("flops_ratio", (1 - 1e-9, 1 + 1e-9))]),
    ("all agree, gradients too, within 1e-5 of the largest",
     [Check("largest_difference", (ANY_BELOW, 1e-5), {"density": d}) for d in (0.001, 0.01, 0.1, 0.3)]),
]]  # fmt: skip


def headline(run: core.Run) -> str:
    return f"time of fused attention over that of the edge list: {core.extremes(run, 'time_fused_over_edges')}"


def figures(run: core.Run) -> list[core.Figure]:
    run = core.only(run, sorted(range(len(run.cells)), key=lambda i: run.cells[i]["density"]))  # panels in order
    at = {(c["length"], c["density"]): i for i, c in reversed([*enumerate(run.cells)])}
    lengths, densities = (sorted(set(values)) for values in zip(*at, strict=True))
    most, drawn = f"MB that the edge list adds: {core.extremes(run, 'edges_mb')}", []
    for what, metric in {"time": "time_{}_ms", "memory": "{}_mb"}.items():
        times, texts = np.full((len(lengths), len(densities)), np.nan), np.full((len(lengths), len(densities)), "not measured")
        for (y, n), (x, d) in product(enumerate(lengths), enumerate(densities)):
            mean = {kind: float(np.mean(run.values(at[n, d], metric.format(kind)))) for kind in KINDS}
            best = min(mean, key=lambda kind: np.nan_to_num(mean[kind], nan=math.inf))
            if math.isfinite(mean[best]):
                times[y, x], texts[y, x] = mean["fused"] / mean[best], f"{best} {core.brief(mean['fused'] / mean[best])}x"
        told, names = f"The kind with least {what}, and how many times less it takes than fused", ("nodes", "joined pairs")
        shares = [f"{100 * d:g}%" for d in densities]
        drawn.append(core.matrix_figure(f"least-{what}", np.log(times), lengths, shares, names, told, texts, 5.0))
    sweeps = {"time": (headline(run), [f"time_{kind}_ms" for kind in KINDS], "milliseconds")}
    sweeps["memory"] = (most, [f"{kind}_mb" for kind in KINDS], "MB")
    return drawn + [core.sweep_figure(run, name, what[0], "length", *what[1:], ["density"], "xy") for name, what in sweeps.items()]


SMOKE = {"length": (16, 32), "density": (0.1, 0.3), "memory": ("off",), "dim": (8,), "heads": (2,), "rounds": (1,)}
METRICS = ["time_fused_over_edges", *(f"time_{kind}_ms" for kind in KINDS), *(f"{kind}_mb" for kind in KINDS)]
METRICS += ["time_peer_over_edges", "time_returned_over_kept", *(f"gflop_{kind}" for kind in KINDS[:3]), "largest_difference"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell, derived, memory)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
