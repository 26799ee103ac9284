"""How fast are the shared parts, each against a plain form and a reference implementation?

Notebook    logic journal: trainable gates, "very very slow to train"; else ours
Setup       An operation is timed beside other implementations of the same work, which take turns
            in one process on one thread (all but the two processes below). That they compute the
            same is asserted first, except for TransformerConv and LogicDense. A step is forward,
            backward, clipping and Adam; for logic gates forward, backward and SGD. Graphs: four
            layers of width 100 on one batch of 32 PATTERN graphs, attention on 16 graphs, since
            TransformerConv needs 50 MB per graph; feed-forwards are as wide as GIN's; bare gating
            has no projections. Plain forms:
            - gating and attention: a padded layer with one logit per pair.
            - powers of the transition matrix: torch.linalg.matrix_power.
            - logic layer: the 16 gates one by one. Their weighted sum is c0 + c1 a + c2 b + c3 ab:
              our layer computes these four coefficients.
            - Life: rolled bytes. Packed Life: exp_logic_circuit.py's smallest circuit on words of
              64 cells. Both on a board of 512 x 512.
            References, where they are installed: GINConv and TransformerConv of torch_geometric,
            along a list of edges or a sparse matrix (CSR); torch's fused attention; LogicDense of
            torchlogix; SciPy's convolution. Logic gates: the journal's [9, 512, 512, 1] with a
            batch of 1,024. Processes: two GIN trials of exp_gin_vs_gating.py, each of about 30 s,
            start-up counted.
Hypothesis  The journal: all 16 gates are very slow to train, ReLU is fast. Ours: a GIN step takes a
            third of the time of GINConv along edges, a step of gating up to 1.4 and of attention up
            to 2.2 times a GIN step.
Rule        5 seeds: other graphs, weights, wires and boards. Medians of 15 interleaved rounds,
            processes timed once per seed; ratios of times. A check holds if its 95% interval lies
            inside its bounds and fails if it lies outside. We read "slow to train" as time per
            step. Base step: a GIN step for graphs, a ReLU step for logic gates. Very slow: over 3
            base steps. For causal attention "ours" is masked softmax, "reference" is fused, and
            8 x 512 is sequences x tokens; for processes "ours" is two processes, "plain form" one,
            "reference" two under torchrun. Goals, set before the run: GIN 3 times as fast as along
            edges and 1.5 times as CSR; gating under 1.4, attention under 2.2 and the gradient log
            under 1.03 base steps; packed Life 1.5 times as fast as rolled bytes; a logic layer 3.5
            times as fast as both others; two processes 1.8 times as fast as one.
Cost        19 min on 2 cores; nothing else may compute meanwhile. The references:
            pip install --no-deps -r requirements-peers.txt
"""

import copy
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import core
from core import OURS, Check, Claim
from exp_logic_circuit import PackedLife, convolution_step, read_netlist

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

try:
    import torch_geometric.nn as geometric
except ImportError:
    geometric = None
try:
    import torchlogix.layers as torchlogix
except ImportError:
    torchlogix = None

OPERATIONS = (
    "gin", "gin-csr", "sum", "sum-csr", "gating", "bare-gating", "attention", "powers", "log",
    "causal", "logic-layer", "gates", "gates-as-written", "life", "processes",
)  # fmt: skip
NETLIST = Path(__file__).with_name("plots") / "logic_circuit-circuit.v"
parser = core.make_parser(__doc__, seeds=5, ablation_seeds=5)
parser.add_argument(
    "--operation", nargs="+", choices=OPERATIONS, default=["gin"], help="what is timed"
)
parser.add_argument("--dim", nargs="+", type=core.layer_width, default=[100], help="width")
parser.add_argument(
    "--graphs", nargs="+", type=core.integer(1, 1000), default=[32], help="graphs in the batch"
)
parser.add_argument(
    "--length",
    nargs="+",
    type=core.integer(2, 4096),
    default=[512],
    help="tokens of a sequence in causal attention; 4,096 in all",
)
parser.add_argument(
    "--units", nargs="+", type=core.integer(5, 4096), default=[128], help="units of a logic layer"
)
parser.add_argument(
    "--board", nargs="+", type=core.integer(3, 4096), default=[512], help="rows of Life's board"
)
parser.add_argument(
    "--netlist",
    nargs="+",
    type=core.input_file,
    default=[core.input_file(NETLIST)],
    help="the circuit that advances the board, as exp_logic_circuit.py writes it",
)
parser.add_argument(
    "--rounds", nargs="+", type=core.positive_int, default=[15], help="rounds that are timed"
)

ARMS = {  # a run with flags takes these
    "GIN step, edge list": {},
    "GIN step, CSR": {"operation": "gin-csr"},
    "sum over neighbours, edge list": {"operation": "sum"},
    "sum over neighbours, CSR": {"operation": "sum-csr"},
    "gating step": {"operation": "gating"},
    "bare gating step": {"operation": "bare-gating"},
    "attention over 5 powers, step": {"operation": "attention", "graphs": 16},  # for memory
    "powers of the transition matrix": {"operation": "powers"},
    "GIN step with gradient log": {"operation": "log"},
    "causal attention, 8 x 512": {"operation": "causal"},
    "causal attention, 2 x 2048": {"operation": "causal", "length": 2048},
    "logic layer, 128 units": {"operation": "logic-layer"},
    "logic layer, 1024 units": {"operation": "logic-layer", "units": 1024},
    "all 16 gates, as written, step": {"operation": "gates-as-written"},
    "all 16 gates, four coefficients, step": {"operation": "gates"},
    "packed Life": {"operation": "life"},
}
ABLATIONS = {"two trials by two processes": {"operation": "processes"}}
COLUMNS = ["ours, ms", "plain form / ours", "reference / ours", "ours / base step"]
ROWS = [*ARMS, *ABLATIONS]
TINY = {"graphs": 2, "dim": 8, "length": 16, "units": 8, "board": 8, "rounds": 1}

LAYERS = 4
HEADS = 4
POWERS = (0, 1, 2, 3, 4)
TOKENS = 4096  # in causal attention, over all sequences
EPOCHS = 400  # of a trial that is run by one process and by two
CALLS = 20  # of what is too short to be timed once


def trial(config, seed, job):
    """Time the arm's operation and what it is compared with, in turns."""
    if config.operation == "processes":
        return time_processes(config, seed)
    calls = make_calls(config, seed, job.device)
    check = calls.pop("check", calls["ours"])
    torch.set_flush_denormal(True)  # subnormal numbers would slow some seeds down
    try:
        seconds = core.interleaved_medians(calls, config.rounds, job.device)
    finally:
        torch.set_flush_denormal(False)
    return {
        "ours, ms": 1000 * seconds["ours"],
        "plain form / ours": seconds.get("plain", math.nan) / seconds["ours"],
        "reference / ours": seconds.get("reference", math.nan) / seconds["ours"],
        "ours / base step": seconds["ours"] / seconds.get("base", math.nan),
        "one process / torchrun": math.nan,
        "number to compare": float(check()),
    }


def make_calls(config, seed, device):
    """{"ours", "plain", "reference", "base": function}; "check": a function of a number."""
    operation = config.operation
    if operation in ("sum", "sum-csr"):
        return time_sum(config, seed, device)
    if operation == "powers":
        return time_powers(config, seed, device)
    if operation == "causal":
        return time_causal_attention(config, seed, device)
    if operation == "logic-layer":
        return time_logic_layer(config, seed, device)
    if operation in ("gates", "gates-as-written"):
        return time_gates(config, seed, device)
    if operation == "life":
        return time_life(config, seed)
    return time_graph_step(config, seed, device)


# Graphs


class Along(nn.Module):
    """A convolution of torch_geometric along the edges, in place of mixing: [V, D] -> [V, D]."""

    def __init__(self, convolution, edges, gin=None):
        super().__init__()
        self.convolution = convolution
        self.edges = edges
        self.norm = None if gin is None else gin.norm

    def forward(self, x, batch):
        if self.norm is None:
            return self.convolution(x, self.edges)
        return x + self.norm(self.convolution((x.relu(), x), self.edges)).relu()


class PaddedAttention(core.PositionAttention):
    """Position attention as one would first write it: all slots, one logit per pair and head."""

    def forward(self, x, batch):
        vectors, reachable = core.pair_encoding(batch, self.powers, self.encoding)
        logits = self.pair(vectors.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        logits = logits.masked_fill(~reachable[:, None], -math.inf)
        if self.activation == "softmax":
            weight = logits.softmax(-1).nan_to_num()
        else:
            weight = logits.sigmoid()
        b, n = batch.shape
        value = self.value(batch.pad(x).flatten(0, 1)).view(b, n, self.heads, -1).transpose(1, 2)
        mixed = (weight @ value).transpose(1, 2).reshape(b, n, -1)
        return self.out(batch.pack(mixed))


def time_graph_step(config, seed, device):
    """Training steps of GIN, gating or attention."""
    batch = core.GraphBatch(core.PatternData(seed).first(config.graphs), device)
    with core.initialised_from(seed):
        base = make_model([core.GINLayer(config.dim) for _ in range(LAYERS)], config.dim, device)
        own = base
        if config.operation in ("gating", "bare-gating", "attention"):
            layers = [make_layer(config) for _ in range(LAYERS)]
            own = make_model(layers, config.dim, device)
    plain = copy.deepcopy(own)
    calls = {"base": make_step(copy.deepcopy(base), batch)}
    if config.operation in ("gating", "attention"):
        for layer in plain.layers:
            mixing = PaddedAttention(config.dim, **settings_of(config.operation))
            mixing.load_state_dict(layer.mixing.state_dict())
            layer.mixing = mixing
        torch.testing.assert_close(plain(batch), own(batch), rtol=1e-3, atol=1e-3)
        calls["plain"] = make_step(plain, batch)
    reference = make_reference(config, own, batch, device)
    if reference is not None:
        calls["reference"] = make_step(reference, batch)
    log = core.GradientLog(own) if config.operation == "log" else None
    calls["ours"] = make_step(own, batch, log)
    return calls


def settings_of(operation):
    """Settings of PositionAttention: gating by hops, or softmax over five powers with 4 heads."""
    if operation == "gating":
        return {}
    return {"activation": "softmax", "powers": POWERS, "encoding": "powers", "heads": HEADS}


def make_layer(config):
    """One layer of the operation, its feed-forward as wide as GIN's: [V, D] -> [V, D]."""
    if config.operation == "bare-gating":
        mixing = core.BareGating()
    else:
        mixing = core.PositionAttention(config.dim, **settings_of(config.operation))
    return core.TransformerLayer(mixing, core.FeedForward(config.dim, config.dim), config.dim)


def make_model(layers, dim, device):
    """A node classifier of these layers."""
    return core.NodeClassifier(layers, dim).to(device)


def make_reference(config, own, batch, device):
    """The model with torch_geometric's layers, or None where there is none to compare with."""
    if geometric is None or config.operation not in ("gin", "gin-csr", "attention"):
        return None
    reference = copy.deepcopy(own)
    edges = list_edges(batch, config.operation == "gin-csr")
    for place, layer in enumerate(reference.layers):
        if config.operation in ("gin", "gin-csr"):
            convolution = geometric.GINConv(copy.deepcopy(layer.mlp), train_eps=True)
            convolution.nn.load_state_dict(layer.mlp.state_dict())  # GINConv draws new weights
            reference.layers[place] = Along(convolution, edges, layer)
        else:
            convolution = geometric.TransformerConv(config.dim, config.dim // HEADS, HEADS)
            layer.mixing = Along(convolution, edges)
    if config.operation in ("gin", "gin-csr"):
        torch.testing.assert_close(reference(batch), own(batch), rtol=1e-3, atol=1e-3)
    return reference.to(device)


def list_edges(batch, csr):
    """The batch's edges as torch_geometric takes them: [2, E] of packed nodes, or a CSR matrix."""
    sizes = batch.nodes.sum(1).tolist()
    blocks = []
    for adjacency, size in zip(batch.adjacency, sizes, strict=True):
        blocks.append(adjacency[:size, :size])
    whole = torch.block_diag(*blocks)
    return whole.to_sparse_csr() if csr else whole.nonzero().T.contiguous()


def make_step(model, batch, log=None):
    """A function that does one training step on the batch and returns its loss."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = core.class_weighted_cross_entropy(model(batch), batch.label)
        loss.backward()
        if log is not None:
            log.record()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        return loss.detach()

    return step


def time_sum(config, seed, device):
    """The sum over neighbours alone, forward and backward."""
    batch = core.GraphBatch(core.PatternData(seed).first(config.graphs), device)
    values = core.stream(seed, "init").standard_normal((len(batch.label), config.dim), np.float32)
    x = torch.from_numpy(values).to(device).requires_grad_()

    def backward(total):
        x.grad = None
        total.square().sum().backward()
        return x.grad.abs().mean()

    calls = {"ours": lambda: backward(core.sum_over_neighbours(x, batch))}
    if geometric is not None:
        edges = list_edges(batch, config.operation == "sum-csr")
        convolution = geometric.GINConv(nn.Identity())
        theirs = convolution.propagate(edges, x=(x, x))
        torch.testing.assert_close(theirs, core.sum_over_neighbours(x, batch), rtol=1e-3, atol=1e-3)
        calls["reference"] = lambda: backward(convolution.propagate(edges, x=(x, x)))
    return calls


def time_powers(config, seed, device):
    """The powers 0 to 4 of the transition matrix of every graph."""
    batch = core.GraphBatch(core.PatternData(seed).first(config.graphs), device)
    step = batch.adjacency / batch.adjacency.sum(-1, keepdim=True).clamp(min=1)
    real = batch.nodes[:, None, :, None] & batch.nodes[:, None, None, :]

    def ours():
        return core.transition_powers(batch.adjacency, batch.nodes, POWERS).square().sum()

    def plain():
        return torch.stack([torch.linalg.matrix_power(step, power) for power in POWERS], dim=1)

    theirs = (plain() * real).square().sum()
    torch.testing.assert_close(ours(), theirs, rtol=1e-4, atol=0)
    return {"ours": ours, "plain": plain}


# Text


def time_causal_attention(config, seed, device):
    """Causal attention with a position bias, forward and backward: masked softmax, and fused."""
    length = config.length
    rng = core.stream(seed, "init")
    shape = (max(TOKENS // length, 1), HEADS, length, 32)
    drawn = [torch.from_numpy(rng.standard_normal(shape, np.float32)) for _ in range(3)]
    query, key, value = (tensor.to(device).requires_grad_() for tensor in drawn)
    position = torch.arange(length, device=device)
    distance = position - position[:, None]
    keep = distance <= 0
    bias = 0.1 * distance.float()
    masked_bias = bias.masked_fill(~keep, -math.inf)

    def backward(mixed):
        query.grad = None
        mixed.square().sum().backward()
        return query.grad.abs().mean()

    def ours():
        logits = query @ key.mT / math.sqrt(query.shape[-1]) + bias
        return backward(core.masked_softmax(logits, keep) @ value)

    def fused():
        return backward(F.scaled_dot_product_attention(query, key, value, attn_mask=masked_bias))

    torch.testing.assert_close(ours(), fused(), rtol=1e-3, atol=1e-6)
    return {"ours": ours, "reference": fused}


# Logic gates


class GatesAsWritten(nn.Module):
    """A GateLayer that computes all 16 gates and their weighted sum: [S, m, B] -> [S, n, B]."""

    def __init__(self, layer):
        super().__init__()
        self.operands = layer.operands
        self.gates = layer.gates

    def forward(self, x):
        a, b = self.operands(x).unbind(1)
        weight = self.gates.weight
        if self.gates.normalise == "softmax":
            weight = weight.softmax(dim=-1)
        return (all_gates(a, b) * weight[:, :, None]).sum(dim=-1)


def all_gates(a, b):
    """The 16 gates of core.LOGIC_GATES, [..., 16]."""
    both = a * b
    first_eight = [a * 0, both, a - both, a, b - both, b, a + b - 2 * both, a + b - both]
    complements = [1 - gate for gate in reversed(first_eight)]
    return torch.stack(first_eight + complements, dim=-1)


def time_logic_layer(config, seed, device):
    """Forward and backward through one wired layer, a softmax over 16 gates in each unit."""
    units = config.units
    rng = core.stream(seed, "init")
    wires = core.draw_wires(units, units, rng)
    weight = torch.from_numpy(rng.standard_normal((1, units, 16), np.float32))
    mixture = core.GateMixture(weight, normalise="softmax")
    own = core.GateLayer(core.WiredOperands(wires[None], units), mixture).to(device)
    plain = GatesAsWritten(own)
    inputs = torch.from_numpy(rng.random((1, units, 512), np.float32)).to(device)
    x = inputs.requires_grad_()
    torch.testing.assert_close(plain(x), own(x), rtol=1e-3, atol=1e-4)

    def ours():
        return repeat_backward(own, x)

    calls = {"ours": ours, "plain": lambda: repeat_backward(plain, x)}
    if torchlogix is not None:
        reference = torchlogix.LogicDense(units, units).to(device)
        flat = x.detach()[0].T.contiguous().requires_grad_()  # [B, units]
        calls["reference"] = lambda: repeat_backward(reference, flat)
    return calls


def repeat_backward(layer, x):
    """Forward and backward CALLS times; mean gradient of the input."""
    for _ in range(CALLS):
        x.grad = None
        layer(x).square().sum().backward()
    return x.grad.abs().mean()


def time_gates(config, seed, device):
    """Training steps of the journal's network: all 16 gates, and ReLU units for the base."""
    sizes = [core.CELLS, 4 * config.units, 4 * config.units, 1]
    cells = core.stream(seed, "val").integers(512, size=1024)
    x = torch.from_numpy(core.NEIGHBOURHOODS[cells].T.copy())[None].to(device)
    target = torch.from_numpy(core.LIFE[cells]).to(device)
    all_16 = core.dense_gate_network(sizes, [seed], core.LOGIC_GATES, start="uniform").to(device)
    as_written = core.GateNetwork(*[GatesAsWritten(layer) for layer in copy.deepcopy(all_16)])
    torch.testing.assert_close(as_written(x), all_16(x), rtol=1e-3, atol=1e-5)
    relu = core.dense_gate_network(sizes, [seed], ("RELU",)).to(device)
    for layer in relu:
        layer.gates.weight.requires_grad_(False)
    own = as_written if config.operation == "gates-as-written" else all_16
    return {"ours": make_gate_step(own, x, target), "base": make_gate_step(relu, x, target)}


def make_gate_step(network, x, target):
    """A function that does one step of plain gradient descent and returns its loss."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01)

    def step():
        optimizer.zero_grad()
        loss = (network(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def time_life(config, seed):
    """Generations of a board: a learned circuit, rolled bytes, SciPy's convolution."""
    circuit = read_netlist(Path(config.netlist.path))
    board = core.stream(seed, "val").random((config.board, config.board)) < 0.3
    packed = PackedLife(circuit, board)
    cells = board.astype(np.uint8)

    def rolled():
        row = cells + np.roll(cells, 1, axis=1) + np.roll(cells, -1, axis=1)
        total = row + np.roll(row, 1, axis=0) + np.roll(row, -1, axis=0)
        return (total == 3) | ((total == 4) & board)

    def ours():
        for _ in range(CALLS):
            packed.step()

    def plain():
        for _ in range(CALLS):
            rolled()

    def reference():
        for _ in range(CALLS):
            convolution_step(board)

    packed.step()
    alive = packed.board()
    if (alive != rolled()).any() or (alive != convolution_step(board)).any():
        raise ArithmeticError("two implementations of Life differ")

    def check():
        return alive.sum() / len(circuit.gates)

    return {"ours": ours, "plain": plain, "reference": reference, "check": check}


# Processes


def time_processes(config, seed):
    """Two trials of exp_gin_vs_gating.py: by one process, by two, and by two under torchrun."""
    one, scores = run_trials(config, seed, ["--jobs", "1"])
    two, scores_of_two = run_trials(config, seed, ["--jobs", "2"])
    torchrun, scores_of_torchrun = run_trials(config, seed, ["--jobs", "1"], ranks=2)
    if scores != scores_of_two or scores != scores_of_torchrun:
        raise ArithmeticError("one process and two find different numbers")
    return {
        "ours, ms": 1000 * two,
        "plain form / ours": one / two,
        "reference / ours": torchrun / two,
        "ours / base step": math.nan,
        "one process / torchrun": one / torchrun,
        "number to compare": sum(scores),
    }


def run_trials(config, seed, options, ranks=None):
    """Seconds that the two trials take, with all that starts and ends a run; their best scores."""
    command = [sys.executable]
    if ranks is not None:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += [str(Path(__file__).with_name("exp_gin_vs_gating.py")), "--no-log"]
    command += ["--arms", "GIN", "--seeds", "2", "--first-seed", str(2 * seed)]
    command += ["--epochs", str(EPOCHS), "--graphs", str(config.graphs)]
    command += ["--dim", str(config.dim), *options]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [*command, "--runs", folder],
            check=True,
            capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        seconds = time.perf_counter() - start
        records = [core.read_record(path) for path in sorted(Path(folder).rglob("*.npz"))]
    return seconds, [result["best score"] for result, _ in records]


LOGIC_LAYERS = ("logic layer, 128 units", "logic layer, 1024 units")
CLAIMS = [
    Claim(
        "A step with all 16 gates, as the journal writes them, takes over 3 times a ReLU step",
        "trainable gates",
        Check("ours / base step", above=3, arm="all 16 gates, as written, step"),
    ),
    Claim(
        "A GIN step is over 3 times as fast as with GINConv along an edge list",
        OURS,
        Check("reference / ours", above=3, arm="GIN step, edge list"),
    ),
    Claim(
        "A GIN step is over 1.5 times as fast as with GINConv and CSR",
        OURS,
        Check("reference / ours", above=1.5, arm="GIN step, CSR"),
    ),
    Claim(
        "A gating step takes under 1.4 GIN steps, "
        "and a step of attention over five powers under 2.2",
        OURS,
        Check("ours / base step", below=1.4, arm="gating step"),
        Check("ours / base step", below=2.2, arm="attention over 5 powers, step"),
    ),
    Claim(
        "The gradient log adds less than 3% to a GIN step",
        OURS,
        Check("ours / base step", below=1.03, arm="GIN step with gradient log"),
    ),
    Claim(
        "Packed Life is over 1.5 times as fast as rolled bytes",
        OURS,
        Check("plain form / ours", above=1.5, arm="packed Life"),
    ),
    Claim(
        "With four coefficients, a logic layer is over 3.5 times as fast as torchlogix "
        "and the 16 gates, at 128 and at 1024 units",
        OURS,
        *(
            Check(metric, above=3.5, arm=arm)
            for metric in ("reference / ours", "plain form / ours")
            for arm in LOGIC_LAYERS
        ),
    ),
    Claim(
        "Two processes do two trials over 1.8 times as fast as one, also under torchrun",
        OURS,
        Check("plain form / ours", above=1.8, arm="two trials by two processes"),
        Check("one process / torchrun", above=1.8, arm="two trials by two processes"),
    ),
]


def plot(run):
    """{name of the file: figure}."""
    return {"ratios": draw_ratios(run)}


def draw_ratios(run):
    """Ratios of times of every operation and seed, on a logarithmic axis."""
    arms = list(run.arms)
    figure, axes = core.new_figure(
        run,
        "Time of plain forms and references over ours",
        "Ratios of times for every operation and seed",
        height=0.36 * len(arms) + 1.6,
    )
    axis = axes[0, 0]
    marks = {"plain form / ours": ("o", "#0072B2"), "reference / ours": ("s", "#D55E00")}
    for metric, (mark, colour) in marks.items():
        axis.plot([], [], mark, color=colour, label=metric)
        for place, arm in enumerate(arms):
            ratios = run.values(arm, metric)
            axis.plot(ratios, [place] * len(ratios), mark, color=colour, alpha=0.6)
    core.draw_levels(axis.axvline, {"as fast as ours": 1.0})
    axis.set_xscale("log")
    axis.set_yticks(range(len(arms)), arms)
    axis.invert_yaxis()
    axis.set_xlabel("time over ours, ratio")
    axis.legend(fontsize=9)
    return figure


if __name__ == "__main__":
    core.main(
        parser,
        ARMS,
        ABLATIONS,
        trial,
        CLAIMS,
        plot,
        COLUMNS,
        TINY,
        timing=True,
        rows=[*ARMS, *ABLATIONS],
    )
