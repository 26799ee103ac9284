"""How fast are GIN, gating and attention here, each against its rivals, and what do the log, the harness and more ranks cost?

Entry       graph notebook, 13/3 ("Positional gating is much faster than gin somehow")
Hypothesis  Ours. On PATTERN's graphs a step of GIN by dense products takes a fifth of the time of torch_geometric's GINConv
            along an edge list, two thirds of its CSR form's; drafts gave a third: linear layers, which both need, bound it, and the
            sums alone are 8 and 2 times as fast. At equal width, gating by hops takes at most 1.3 times as long as GIN, of
            which two projections more take 0.25 at least; attention over 5 powers with 4 heads 2.2; both are faster than a plain
            padded form and TransformerConv. The gradient log costs 3%, a trial's bookkeeping 0.1 s; two ranks do 1.8 times as much.
Rule        Medians of interleaved rounds in one process, arms with the same weights where they compute the same, which is asserted;
            5 seeds, other graphs each. Ranks: torchrun over the same grid, in turns, with start-up. A claim stands if the 95%
            interval of the geometric mean is in its range, and falls if out of it. As recorded: one thread; `--threads 2` beside.
Cost        about 10 min with --jobs 1, as recorded. The peer, where installed: pip install --no-deps -r requirements-peers.txt
Quick       `--part gin mixing log --rounds 3 --seeds 3`
"""

import copy
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, at_least, one_of

TIMED = ("harness", "gin", "mixing", "stacks", "log", "ranks")  # the harness first: a collection also visits an imported peer
SIZES = ("layers", "dim", "graphs")
FLAGS = [
    Flag("part", one_of(*TIMED, "training"), TIMED, "what is timed; training: what the ranks run"),
    *(flag for flag in core.OVERFIT_FLAGS if flag.key in SIZES),
    Flag("trials", at_least(1), (12,), "trials that do nothing, for the harness; that train, for the ranks"),
    Flag("rounds", at_least(1), (15,), "timed rounds, behind two that are not"),
]
POWERS, HEADS, STEPS = (0, 1, 2, 3, 4), 4, 100
USUAL = {flag.key: flag.default[0] for flag in core.OVERFIT_FLAGS} | {"lr": 1e-3, "degree": "on"}
GENERAL = {"activation": "softmax", "stack": POWERS, "distance": "off", "heads": HEADS}
KINDS = {"gin": {"model": "gin"}, "gating": {"model": "position"}, "attention": {"model": "position"} | GENERAL}


class Along(nn.Module):
    """torch_geometric's convolution along the edges, in place of mixing; with a GIN layer's norm, of that layer."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None = None):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: torch.Tensor, batch: core.GraphBatch) -> torch.Tensor:
        edges = batch.cache["edges"]
        return x + self.norm(self.conv((x.relu(), x), edges)).relu() if self.norm else self.conv(x, edges)


class Padded(nn.Module):
    """Position mixing as one would first write it: all slots, one logit a pair and head from a linear layer over its powers."""

    def __init__(self, mixing: core.PositionMixing):
        super().__init__()
        self.mixing = mixing

    def forward(self, x: torch.Tensor, batch: core.GraphBatch) -> torch.Tensor:
        own, stack, (b, n) = self.mixing, core.adjacency_stack(batch, self.mixing.powers), batch.shape
        vectors = (stack.hop if own.distance else stack.values).permute(0, 2, 3, 1)  # [B, N, N, K]
        logits = own.pair(vectors).permute(0, 3, 1, 2).masked_fill(~stack.reachable[:, None], -torch.inf)
        weight = logits.softmax(-1).nan_to_num() if own.average else logits.sigmoid()
        value = own.value(batch.pad(x).flatten(0, 1)).view(b, n, own.heads, -1).transpose(1, 2)
        return own.out(batch.pack((weight @ value).transpose(1, 2).reshape(b, n, -1)))


def plain(module: nn.Module) -> nn.Module:
    """A copy whose linear layers are torch's own, as a user of the peer has them."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, core.Linear):
            part.__class__ = nn.Linear
    return module


def build(config: dict, seed: int, kind: str) -> nn.Module:
    return core.build_model(USUAL | {"hidden": config["dim"]} | config | KINDS[kind], seed)


def stepper(model: nn.Module, batch: core.GraphBatch, log: object | None = None) -> Callable:
    """A training step as a call."""
    optimizer, log = torch.optim.Adam(model.parameters(), lr=USUAL["lr"], fused=True), log or core.GradientLog(model)
    return lambda: core.training_step(model, batch, optimizer, log, USUAL["clip"])


def along_edges(graphs: list[core.Graph], csr: bool) -> core.GraphBatch:
    """The graphs with their edges as torch_geometric takes them: source and target [2, E], or a sparse matrix."""
    batch = core.GraphBatch(graphs, core.Runtime.device)
    blocks = torch.block_diag(*(one[:size, :size] for one, size in zip(batch.adjacency, batch.sizes, strict=True)))
    batch.cache["edges"] = blocks.to_sparse_csr() if csr else blocks.nonzero().T.contiguous()
    return batch


def same(one: nn.Module, other: nn.Module, batch: core.GraphBatch, there: core.GraphBatch) -> Callable:
    """A training step of the other model, which has to compute what the one does."""
    torch.testing.assert_close(one(batch), other(there), rtol=1e-3, atol=1e-3)
    return stepper(other, there)


def gin(config: dict, seed: int, graphs: list[core.Graph]) -> dict[str, float]:
    """A training step; and, alone, the sum over neighbours, forward and backward."""
    batch, own = core.GraphBatch(graphs, core.Runtime.device), build(config, seed, "gin")
    x = torch.randn(len(batch.label), config["dim"], device=core.Runtime.device, requires_grad=True)
    steps, sums = {"own": stepper(own, batch)}, {"own": lambda: batch.mix(batch.adjacency, x).sum().backward()}
    for name in ("edge_list", "csr") if (peer := core.optional("torch_geometric.nn")) else ():
        other, there = plain(own), along_edges(graphs, name == "csr")
        for i, layer in enumerate(other.layers):
            conv = peer.GINConv(copy.deepcopy(layer.mlp), train_eps=True)  # draws weights of its own
            conv.nn.load_state_dict(layer.mlp.state_dict())
            other.layers[i] = Along(conv, layer.norm)
        steps[name] = same(own, other, batch, there)
        sums[name] = lambda conv=conv, e=there.cache["edges"]: conv.propagate(e, x=(x, x)).sum().backward()
    step, total = (core.interleaved_medians(arms, config["rounds"]) for arms in (steps, sums))
    result = {f"time_gin_{name}": step[name] / step["own"] for name in step} | {"time_own_ms": 1000 * step["own"]}
    return result | {f"time_sum_{name}": total[name] / total["own"] for name in total}


def mixing(config: dict, seed: int, graphs: list[core.Graph]) -> dict[str, float]:
    batch, result = core.GraphBatch(graphs, core.Runtime.device), {}
    models = {kind: build(config, seed, kind) for kind in KINDS}
    arms = {kind: stepper(model, batch) for kind, model in models.items()}
    for kind in ("gating", "attention"):
        other = plain(models[kind])
        for layer in other.layers:
            layer.mixing = Padded(layer.mixing)
        arms[f"{kind}_padded"] = same(models[kind], other, batch, batch)
    if peer := core.optional("torch_geometric.nn"):
        other = plain(models["attention"])
        for layer in other.layers:
            layer.mixing = Along(peer.TransformerConv(config["dim"], config["dim"] // HEADS, HEADS))
        arms["peer"] = stepper(other, along_edges(graphs, False))
    x = torch.randn(len(batch.label), config["dim"], device=core.Runtime.device, requires_grad=True)
    projections = [(layer.mixing.value, layer.mixing.out) for layer in models["gating"].layers]
    arms["projections"] = lambda: sum(out(value(x)).sum() for value, out in projections).backward()
    seconds = core.interleaved_medians(arms, config["rounds"])
    result |= {"time_own_ms": 1000 * seconds["gin"], "time_projections": 1 + seconds["projections"] / seconds["gin"]}
    for kind in ("gating", "attention"):
        result |= {f"time_{kind}": seconds[kind] / seconds["gin"], f"time_{kind}_padded": seconds[f"{kind}_padded"] / seconds[kind]}
        result |= {f"time_{kind}_peer": seconds["peer"] / seconds[kind]} if "peer" in seconds else {}
    return result


def stacks(config: dict, seed: int, graphs: list[core.Graph]) -> dict[str, float]:
    batch = core.GraphBatch(graphs, core.Runtime.device)
    step = batch.adjacency / batch.adjacency.sum(-1, keepdim=True).clamp(min=1)

    def literal() -> torch.Tensor:
        return torch.stack([torch.linalg.matrix_power(step, k) for k in POWERS], 1)

    own = partial(core.transition_powers, batch.adjacency, batch.nodes, POWERS)
    keep = (batch.nodes[:, None, :, None] & batch.nodes[:, None, None, :]).float()
    torch.testing.assert_close(own(), literal() * keep)
    seconds = core.interleaved_medians({"own": own, "literal": literal}, config["rounds"])
    return {"time_own_ms": 1000 * seconds["own"], "time_powers": seconds["literal"] / seconds["own"]}


def log(config: dict, seed: int, graphs: list[core.Graph]) -> dict[str, float]:
    batch, models = core.GraphBatch(graphs, core.Runtime.device), [build(config, seed, "gin") for _ in range(2)]
    norm = lambda: nn.utils.get_total_norm([p.grad for p in models[1].parameters()])  # noqa: E731
    silent = SimpleNamespace(before_step=norm, after_step=lambda: None)
    arms = {"on": stepper(models[0], batch), "off": stepper(models[1], batch, silent)}
    seconds = core.interleaved_medians(arms, config["rounds"])
    return {"time_own_ms": 1000 * seconds["off"], "time_log": seconds["on"] / seconds["off"]}


def harness(config: dict, seed: int, graphs: list[core.Graph]) -> dict[str, float]:
    """What a trial costs beside its own work, most of all its record."""
    nothing = core.Experiment(__file__, __doc__, [], lambda config, seed: {}, [], list, str, [], {})
    with tempfile.TemporaryDirectory() as folder:
        once = partial(core.run_together, nothing, [core.Trial(config, seed, Path(folder) / "0-0.npz")])
        own = core.Runtime.checkpoint
        seconds = core.interleaved_medians({"once": once}, config["trials"])["once"]
        core.Runtime.checkpoint = own
    return {"time_own_ms": 1000 * seconds}


def seconds_on(processes: int, config: dict) -> float:
    """Of training trials under torchrun, with start-up, in folders of their own."""
    with tempfile.TemporaryDirectory() as folder:
        where = ["--no-log", "--runs", f"{folder}/runs", "--plots", f"{folder}/plots", "--logbook", f"{folder}/logbook.md"]
        work = ["--part", "training", "--seeds", config["trials"], *(x for key in SIZES for x in (f"--{key}", config[key]))]
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", __file__, "--jobs", "1"]
        start = time.perf_counter()
        subprocess.run([*torchrun, *map(str, work), *where], check=True, capture_output=True)
        return time.perf_counter() - start


def ranks(config: dict, seed: int, graphs: list[core.Graph]) -> dict[str, float]:
    two, one = seconds_on(2, config), seconds_on(1, config)
    return {"time_own_ms": 1000 * two, "time_ranks": one / two}


def training(config: dict, seed: int, graphs: list[core.Graph]) -> dict[str, float]:
    step = stepper(build(config, seed, "gin"), core.GraphBatch(graphs, core.Runtime.device))
    return {"loss": float(torch.stack([step()[1] for _ in range(STEPS)])[-1])}


def trial(config: dict, seed: int) -> dict:
    graphs = core.PatternData(seed).first(config["graphs"], "shuffled") if "graphs" in config else []
    work = math.prod(value for value in config.values() if isinstance(value, int))
    return {f"time_{name}": np.nan for name in ("own_ms", *RATIOS)} | {"work": work} | PARTS[config["part"]](config, seed, graphs)


def cell(config: dict) -> dict:
    if config["dim"] % HEADS:
        raise core.UsageError(f"--dim {config['dim']}: {HEADS} heads do not divide it; choose a multiple")
    read = {"harness": ("trials",), "training": SIZES, "ranks": (*SIZES, "trials")}
    return {key: config[key] for key in ("part", *read.get(config["part"], (*SIZES, "rounds")))}


PARTS = {part.__name__: part for part in (harness, gin, mixing, stacks, log, ranks, training)}
RATIOS = {  # what is timed: the part, what is claimed, and between which ratios it lies
    "gin_edge_list": ("gin", "GIN: 5 times as fast as GINConv along an edge list", 5, ANY_ABOVE),
    "gin_csr": ("gin", "and 1.5 times as its CSR form", 1.5, ANY_ABOVE),
    "sum_edge_list": ("gin", "its sum over neighbours alone is 8 times as fast as along an edge list", 8, ANY_ABOVE),
    "sum_csr": ("gin", "and 2 times as in CSR form", 2, ANY_ABOVE),
    "gating": ("mixing", "gating takes at most 1.3 times as long as GIN", ANY_BELOW, 1.3),
    "projections": ("mixing", "GIN with gating's two projections more, and nothing else, at least 1.25 times", 1.25, ANY_ABOVE),
    "attention": ("mixing", "attention over 5 powers with 4 heads at most 2.2 times", ANY_BELOW, 2.2),
    "gating_padded": ("mixing", "gating is faster than its plain padded form", 1, ANY_ABOVE),
    "attention_padded": ("mixing", "so is attention", 1, ANY_ABOVE),
    "gating_peer": ("mixing", "gating is faster than TransformerConv", 1, ANY_ABOVE),
    "attention_peer": ("mixing", "so is attention over 5 powers", 1, ANY_ABOVE),
    "powers": ("stacks", "a stack is made faster than by powers of its matrix", 1, ANY_ABOVE),
    "log": ("log", "the gradient log costs 3% of a step at most", ANY_BELOW, 1.03),
    "own_ms": ("harness", "a trial's bookkeeping takes less than 100 ms", ANY_BELOW, 100),
    "ranks": ("ranks", "two ranks do 1.8 times the trials of one", 1.8, ANY_ABOVE),
}
CLAIMS = [
    Claim(f"{text} (our question)", "13/3", [Check(f"time_{name}", claimed, {"part": part}, scale="ratio")])
    for name, (part, text, *claimed) in RATIOS.items()
]


def headline(run: core.Run) -> str:
    return f"GIN along an edge list over dense GIN: {core.extremes(run, 'time_gin_edge_list')}"


def derived(run: core.Run) -> dict[str, np.ndarray]:
    """Every ratio that was timed, in the order of the claims."""
    told = {name: [run.values(i, f"time_{name}") for i in range(len(run.cells))] for name in RATIOS if name != "own_ms"}
    return {name: rows[0] for name, found in told.items() if len(rows := [row for row in found if np.isfinite(row).all()]) == 1}


def figures(run: core.Run) -> list[core.Figure]:
    rows = {name.replace("_", " "): {"ratio": values} for name, values in derived(run).items()}
    return [core.dots_figure(rows, "ratios", headline(run), "ratio of times", "log", {"equal": 1.0})]


SMOKE = {"part": ("gin", "mixing", "stacks", "log", "training"), "layers": (1,), "dim": (8,), "graphs": (2,), "rounds": (1,),
         "trials": (1,)}  # fmt: skip
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, ["time_own_ms"], SMOKE, cell, derived)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
