"""How fast are the shared parts, each against a plain form and a reference implementation?

Notebook    logic journal: trainable gates, 48 x 20; else ours
Setup       Implementations of one operation take turns in one process on one thread (of two
            processes each has one), with subnormal numbers set to 0 and freed memory kept. All but
            TransformerConv and LogicDense are asserted to compute the same. A step is forward,
            backward, clipping and Adam; for logic gates forward, backward and SGD. Graphs: four
            layers of width 100 on one batch of 32 PATTERN graphs, attention on 16; feed-forwards
            are as wide as GIN's. Operation: ours; plain form; reference (where there are any):
            - GIN step and sum over neighbours: a dense product with the adjacency; none; GINConv of
              torch_geometric, along a list of edges or a sparse matrix (CSR).
            - gating step: packed nodes, one weight per hop; padded nodes, one logit per pair.
            - bare gating step: gating without projections.
            - attention over 5 powers, step: packed nodes, logits from precomputed powers of the
              transition matrix, 4 heads; padded nodes; TransformerConv of torch_geometric
              (attention by content along edges, another function).
            - powers of the transition matrix: each from the one before; torch.linalg.matrix_power.
            - GIN step with gradient log: a GIN step that records all gradients.
            - causal attention, sequences x tokens, forward and backward, with a fixed position
              bias: softmax of masked logits; none; torch's fused attention.
            - logic layer, forward and backward: a softmax over 16 gates by four coefficients, since
              any sum of the 16 is c0 + c1 a + c2 b + c3 ab; the 16 gates one by one; torchlogix's
              LogicDense, with random wires of its own.
            - sparse connections: a logic layer whose two inputs per unit are looked up; a dense
              product with rows of the identity, as in the journal.
            - all 16 gates, step: the journal's [9, 512, 512, 1], batch 1024, gates one by one. Its
              JAX may have fused them; torch stores each.
            - packed Life, 512 x 512: exp_logic_circuit.py's smallest circuit on words of 64 cells,
              packed before; rolled bytes; SciPy's convolution.
            - two trials (GIN of exp_gin_vs_gating.py, 30 s or more each, with start-up): two
              processes; one process; two under torchrun.
Hypothesis  The journal: all 16 gates are "very very slow to train -- relu is fast"; optimised
            sparse connections would speed it up. Ours: a GIN step takes a third of the time of
            GINConv along edges, a step of gating up to 1.4 and of attention up to 2.2 times a GIN
            step.
Rule        5 seeds: other graphs, weights, wires and boards. Attention takes 16 graphs, since
            TransformerConv needs 50 MB per graph. Medians of 15 interleaved rounds; 4 seeds and one
            round for the two processes.

            Plain form / ours and reference / ours: time over ours, above 1 if ours is faster. Base
            step: a GIN step on the same graphs, for logic gates a ReLU step. We read "slow to
            train" as time per step; very slow: over 3 base steps. Speed up: faster at all, at one
            of the sizes tried.

            Goals of ours, set before the run. GIN: 3 times as fast as GINConv along edges, 1.5
            times as fast as with CSR. Gating, attention and a GIN step with gradient log: under
            1.4, 2.2 and 1.03 base steps. Logic layer: 3.5 times as fast as both others. Packed
            Life: 1.5 times as fast as rolled bytes. Two processes: 1.8 times as fast as one. They
            were chosen knowing an earlier measurement on another machine, which had 3.25, 1.76,
            1.38, 2.23 and 1.01 for the graphs and 1.71 for the processes; exp_gating_speed.py has
            since measured 1.45 for gating here.
Cost        34 min on 2 cores, 1.4 GB; nothing else may compute meanwhile. Install the references
            first (pip install --no-deps -r requirements-peers.txt), or repeat with --fresh.
"""

import copy
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import core
from core import OURS, Check, Claim
from exp_logic_circuit import PackedLife, read_netlist

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

try:
    import torch_geometric.nn as geometric
except ImportError:
    geometric = None
try:
    import torchlogix.layers as torchlogix
except ImportError:
    torchlogix = None

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
OPERATIONS = (
    "gin", "gin-csr", "sum", "sum-csr", "gating", "bare-gating", "attention", "powers", "log",
    "causal", "logic-layer", "wires", "gates", "life", "processes",
)  # fmt: skip
NETLIST = Path(__file__).with_name("plots") / "logic_circuit-circuit.v"


def shipped_netlist():
    """The circuit of exp_logic_circuit.py's entry. Where it is missing only Life needs it."""
    if NETLIST.is_file():
        return core.input_file(NETLIST)
    missing = core.InputFile("missing")  # a text that stands for no file
    missing.path = str(NETLIST)
    return missing


parser = core.make_parser(__doc__, seeds=5, ablation_seeds=4)
parser.set_defaults(device="cpu")
parser.add_argument(
    "--operation", nargs="+", choices=OPERATIONS, default=["gin"], help="what is timed"
)
width_for_heads = core.checked_type(
    int, lambda x: 4 <= x <= 8192 and x % 4 == 0, "a multiple of 4 (the heads) from 4 to 8,192"
)
parser.add_argument("--dim", nargs="+", type=width_for_heads, default=[100], help="width")
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
    default=[shipped_netlist()],
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
    "causal attention, 4 x 1024": {"operation": "causal", "length": 1024},
    "logic layer, 128 units": {"operation": "logic-layer"},
    "logic layer, 1024 units": {"operation": "logic-layer", "units": 1024},
    "sparse connections, 48 units": {"operation": "wires", "units": 48},
    "sparse connections, 512 units": {"operation": "wires", "units": 512},
    "all 16 gates, step": {"operation": "gates", "units": 512},
    "packed Life": {"operation": "life"},
}
ABLATIONS = {"two trials by two processes": {"operation": "processes"}}
COLUMNS = ["ours, ms", "plain form / ours", "reference / ours", "ours / base step"]
TINY = {"graphs": 2, "dim": 8, "length": 16, "units": 8, "board": 8, "rounds": 1}

LAYERS = 4
HEADS = 4
POWERS = (0, 1, 2, 3, 4)
TOKENS = 4096  # in causal attention, over all sequences
EPOCHS = 700  # of a trial that is run by one process and by two
CALLS = 20  # of what is too short to be timed once


def trial(config, seed, job):
    """Time the arm's operation and what it is compared with, in turns."""
    if config.operation == "processes":
        return time_processes(config, seed)
    calls = make_calls(config, seed, job.device)
    checksum = calls.pop("checksum", calls["ours"])
    core.keep_freed_blocks()
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
        "one process, s": math.nan,
        "checksum": float(checksum()),  # not a measurement: shows that seeds and flags matter
    }


def make_calls(config, seed, device):
    """{"ours", and some of "plain", "reference", "base": the function to be timed}.

    "checksum", else "ours", returns a number that depends on what was computed.
    """
    operation = config.operation
    if operation in ("sum", "sum-csr"):
        return time_sum(config, seed, device)
    if operation == "powers":
        return time_powers(config, seed, device)
    if operation == "causal":
        return time_causal_attention(config, seed, device)
    if operation in ("logic-layer", "wires"):
        return time_logic_layer(config, seed, device)
    if operation == "gates":
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
    operation = config.operation
    batch = core.GraphBatch(core.PatternData(seed).first(config.graphs), device)
    with core.initialised_from(seed):
        gin = make_model([core.GINLayer(config.dim) for _ in range(LAYERS)], config.dim, device)
        ours = gin
        if operation in ("gating", "bare-gating", "attention"):
            layers = [make_layer(config) for _ in range(LAYERS)]
            ours = make_model(layers, config.dim, device)
        reference = make_reference(config, ours, batch, device)
    calls = {}
    if operation not in ("gin", "gin-csr"):
        calls["base"] = make_step(copy.deepcopy(gin), batch)
    if operation in ("gating", "attention"):
        calls["plain"] = make_step(make_plain(config, ours, batch), batch)
    if reference is not None:
        calls["reference"] = make_step(reference, batch)
    log = core.GradientLog(ours) if operation == "log" else None
    calls["ours"] = make_step(ours, batch, log)
    return calls


def make_plain(config, ours, batch):
    """The model with PaddedAttention for its PositionAttention, with the same weights."""
    plain = copy.deepcopy(ours)
    for layer in plain.layers:
        mixing = PaddedAttention(config.dim, **settings_of(config.operation))
        mixing.load_state_dict(layer.mixing.state_dict())
        layer.mixing = mixing
    torch.testing.assert_close(plain(batch), ours(batch), rtol=1e-3, atol=1e-3)
    return plain


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


def make_reference(config, ours, batch, device):
    """The model with torch_geometric's layers, or None where there is none to compare with."""
    if geometric is None or config.operation not in ("gin", "gin-csr", "attention"):
        return None
    reference = copy.deepcopy(ours)
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
        torch.testing.assert_close(reference(batch), ours(batch), rtol=1e-3, atol=1e-3)
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
        total = convolution.propagate(edges, x=(x, x))
        torch.testing.assert_close(total, core.sum_over_neighbours(x, batch), rtol=1e-3, atol=1e-3)
        calls["reference"] = lambda: backward(convolution.propagate(edges, x=(x, x)))
    return calls


def time_powers(config, seed, device):
    """The powers 0 to 4 of the transition matrix of every graph: [B, 5, N, N]."""
    batch = core.GraphBatch(core.PatternData(seed).first(config.graphs), device)

    def ours():
        return core.transition_powers(batch.adjacency, batch.nodes, POWERS)

    def plain():
        step = batch.adjacency / batch.adjacency.sum(-1, keepdim=True).clamp(min=1)
        powers = [torch.linalg.matrix_power(step, power) for power in POWERS]
        powers[0] = powers[0] * batch.nodes[:, :, None]  # no node, no identity
        return torch.stack(powers, dim=1)

    torch.testing.assert_close(ours(), plain(), rtol=1e-4, atol=1e-6)
    return {"ours": ours, "plain": plain, "checksum": lambda: ours().square().sum()}


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

    def attend():
        logits = query @ key.mT / math.sqrt(query.shape[-1]) + bias
        weight = logits.masked_fill(~keep, -math.inf).softmax(-1)  # as core.CausalAttention
        return weight @ value

    def attend_fused():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=masked_bias)

    def backward(mixed):
        grads = torch.autograd.grad(mixed.square().sum(), (query, key, value))
        return grads[0].abs().mean()

    torch.testing.assert_close(attend(), attend_fused(), rtol=1e-3, atol=1e-5)
    return {"ours": lambda: backward(attend()), "reference": lambda: backward(attend_fused())}


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
    ours = core.GateLayer(core.WiredOperands(wires[None], units), mixture).to(device)
    if config.operation == "wires":
        plain = core.GateLayer(identity_operands(wires, units), mixture).to(device)
    else:
        plain = GatesAsWritten(ours)
    inputs = torch.from_numpy(rng.random((1, units, 512), np.float32)).to(device)
    x = inputs.requires_grad_()
    torch.testing.assert_close(plain(x), ours(x), rtol=1e-3, atol=1e-4)
    calls = {"ours": lambda: repeat_backward(ours, x), "plain": lambda: repeat_backward(plain, x)}
    if torchlogix is not None and config.operation == "logic-layer":
        with core.initialised_from(seed):
            reference = torchlogix.LogicDense(units, units).to(device)
        flat = x.detach()[0].T.contiguous().requires_grad_()  # [B, units]
        calls["reference"] = lambda: repeat_backward(reference, flat)
    return calls


def identity_operands(wires, units):
    """Fixed operands by a dense product with rows of the identity, as the journal has them."""
    rows = torch.eye(units)[torch.from_numpy(wires).flatten()]
    operands = core.DenseOperands(rows[None], torch.zeros(1, 2 * units, 1), units)
    return operands.requires_grad_(False)


def repeat_backward(layer, x):
    """Forward and backward CALLS times; mean gradient of the input."""
    for _ in range(CALLS):
        x.grad = None
        layer(x).square().sum().backward()
    return x.grad.abs().mean()


def time_gates(config, seed, device):
    """Training steps of the journal's network: all 16 gates as written, ReLU units for the base."""
    sizes = [core.CELLS, config.units, config.units, 1]
    cells = core.stream(seed, "val").integers(512, size=1024)
    x = torch.from_numpy(core.NEIGHBOURHOODS[cells].T.copy())[None].to(device)
    target = torch.from_numpy(core.LIFE[cells]).to(device)
    all_16 = core.dense_gate_network(sizes, [seed], core.LOGIC_GATES, start="uniform").to(device)
    as_written = core.GateNetwork(*[GatesAsWritten(layer) for layer in all_16])
    torch.testing.assert_close(as_written(x), all_16(x), rtol=1e-3, atol=1e-5)
    relu = core.dense_gate_network(sizes, [seed], ("RELU",)).to(device)
    for layer in relu:
        layer.gates.weight.requires_grad_(False)
    return {"ours": make_gate_step(as_written, x, target), "base": make_gate_step(relu, x, target)}


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


def roll_bytes(cells):
    """The next generation of a board [H, W] uint8 that wraps around: bool."""
    row = cells + np.roll(cells, 1, axis=1) + np.roll(cells, -1, axis=1)
    total = row + np.roll(row, 1, axis=0) + np.roll(row, -1, axis=0)
    return (total == 3) | ((total == 4) & (cells == 1))


def convolve(cells):
    """The same by SciPy; ndimage is faster than signal.convolve2d."""
    kernel = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], dtype=np.uint8)
    around = ndimage.convolve(cells, kernel, mode="wrap")
    return (around == 3) | ((cells == 1) & (around == 2))


def time_life(config, seed):
    """Generations of a board: a learned circuit, rolled bytes, SciPy's convolution."""
    circuit = read_netlist(Path(config.netlist.path))
    board = core.stream(seed, "val").random((config.board, config.board)) < 0.3
    packed = PackedLife(circuit, board)
    cells = board.astype(np.uint8)
    packed.step()
    alive = packed.board()
    if (alive != roll_bytes(cells)).any() or (alive != convolve(cells)).any():
        raise ArithmeticError("two implementations of Life differ")

    def repeat(step):
        for _ in range(CALLS):
            step()

    return {
        "ours": lambda: repeat(packed.step),
        "plain": lambda: repeat(lambda: roll_bytes(cells)),
        "reference": lambda: repeat(lambda: convolve(cells)),
        "checksum": lambda: alive.sum() / len(circuit.gates),
    }


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
        "one process, s": one,
        "checksum": sum(scores),
    }


def run_trials(config, seed, options, ranks=None):
    """Seconds that the two trials take, with all that starts and ends a run; their best scores."""
    command = [sys.executable]
    if ranks is not None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        command += [*launcher, f"--master-port={port}"]
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


CLAIMS = [
    Claim(
        "A step with all 16 gates, as the journal writes them, takes over 3 times a ReLU step",
        "trainable gates",
        Check("ours / base step", above=3, arm="all 16 gates, step"),
    ),
    Claim(
        "Optimised sparse connections would speed up a layer with two fixed inputs per unit",
        "48 x 20",
        Check(
            "plain form / ours",
            above=1,
            any_arm=("sparse connections, 48 units", "sparse connections, 512 units"),
        ),
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
        "With four coefficients, a logic layer is over 3.5 times as fast as torchlogix's layer of "
        "16 gates and as the 16 gates one by one, at 128 and at 1024 units",
        OURS,
        Check("reference / ours", above=3.5, arm="logic layer, 128 units"),
        Check("reference / ours", above=3.5, arm="logic layer, 1024 units"),
        Check("plain form / ours", above=3.5, arm="logic layer, 128 units"),
        Check("plain form / ours", above=3.5, arm="logic layer, 1024 units"),
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
        "Of the references only torch's fused causal attention is faster than ours",
        "Ratios of times for every operation and seed",
        height=0.36 * len(arms) + 1.6,
    )
    axis = axes[0, 0]
    marks = {
        "plain form / ours": ("o", "#0072B2"),
        "reference / ours": ("s", "#D55E00"),
        "ours / base step": ("|", "#666666"),
    }
    for metric, (mark, colour) in marks.items():
        axis.plot([], [], mark, color=colour, label=metric)
        for place, arm in enumerate(arms):
            ratios = run.values(arm, metric)
            axis.plot(ratios, [place] * len(ratios), mark, color=colour, alpha=0.6)
    core.draw_levels(axis.axvline, {"equally fast": 1.0})
    axis.set_xscale("log")
    axis.set_yticks(range(len(arms)), arms)
    axis.invert_yaxis()
    axis.set_xlabel("ratio of times")
    axis.legend(fontsize=9)
    return figure


ROWS = list(ARMS | ABLATIONS)  # of the table: it is the point of this script

if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY, timing=True, rows=ROWS)
