"""DOC

Notebook    logic journal: 48 x 20
Setup       x
Hypothesis  x
Rule        x
Cost        x
"""

import math

import core
from core import OURS, Check, Claim
from exp_logic_start import (
    GATE_SETS,
    DenseOperands,
    add_l1,
    dense_gate_network,
    every_neighbourhood,
    penalty,
    probability,
)

import numpy as np
import torch


def limit(text):
    """argparse type: a number > 0, or inf for no limit."""
    return math.inf if text.strip() == "inf" else core.positive_float(text)


parser = core.make_parser(__doc__, seeds=16)
parser.add_argument(
    "--gates",
    nargs="+",
    choices=["four", "two"],
    default=["four"],
    help="AND, XOR, OR and NAND; or AND and OR alone",
)
parser.add_argument(
    "--normalise",
    nargs="+",
    choices=["none", "sum", "project", "softmax"],
    default=["none"],
    help="a unit's gate weights as they are, over their sum in each forward pass, "
    "divided by their sum after each step, or in a softmax",
)
parser.add_argument(
    "--operands",
    nargs="+",
    choices=["linear", "tanh"],
    default=["linear"],
    help="operands of the gates as they are, or through tanh",
)
parser.add_argument(
    "--alive",
    nargs="+",
    type=probability,
    default=[0.254],
    help="share of live cells in the neighbourhoods drawn",
)
parser.add_argument(
    "--counts",
    nargs="+",
    choices=["drawn", "expected"],
    default=["drawn"],
    help="how often a batch has each of the 512 neighbourhoods: as drawn, or as expected",
)
parser.add_argument(
    "--left-out",
    nargs="+",
    choices=["nothing", "8 or 9"],
    default=["nothing"],
    help="neighbourhoods left out of the loss: none, or those with 8 or 9 live cells",
)
parser.add_argument(
    "--optimizer", nargs="+", choices=["sgd", "adam"], default=["sgd"], help="plain, or Adam"
)
parser.add_argument(
    "--lr", nargs="+", type=core.positive_float, default=[0.1], help="learning rate"
)
parser.add_argument(
    "--clip", nargs="+", type=limit, default=[math.inf], help="largest norm of a gradient"
)
parser.add_argument(
    "--largest-weight",
    nargs="+",
    type=limit,
    default=[math.inf],
    help="weights and biases of the operands are clipped to ± this after each step",
)
parser.add_argument(
    "--largest-gate", nargs="+", type=limit, default=[math.inf], help="the same of gate weights"
)
parser.add_argument(
    "--l1", nargs="+", type=penalty, default=[0.0], help="weight in the loss of all |parameters|"
)
parser.add_argument(
    "--width", nargs="+", type=core.layer_width, default=[48], help="units of both hidden layers"
)
parser.add_argument(
    "--batch", nargs="+", type=core.positive_int, default=[512], help="neighbourhoods per step"
)
parser.add_argument(
    "--steps", nargs="+", type=core.integer(2), default=[12_000], help="training steps"
)

ARMS = {"four gates": {}}
ABLATIONS = {}
COLUMNS = ["step of blow-up", "blows up", "8 or 9 live cells", "lowest loss", "right"]
TINY = {"width": 6, "batch": 64, "steps": 30}

LOST = 1e6  # loss of a batch from which no network returns
USUAL = 100  # steps before the first sign that say what was usual
EVERY = 10  # steps between two looks at weights and errors


def trial(config, seeds, job):
    """Train one network per seed until it blows up; find out at which neighbourhood it began."""
    sizes = [core.CELLS, config.width, config.width, 1]
    normalise = "none" if config.normalise == "project" else config.normalise
    operands = TanhOperands if config.operands == "tanh" else DenseOperands
    network = dense_gate_network(sizes, seeds, GATE_SETS[config.gates], normalise, operands)
    history = train(network.to(job.device), seeds, config)
    return [measure(history, row, config.steps) for row in range(len(seeds))]


class TanhOperands(DenseOperands):
    """The same between -1 and 1; near 0, where training starts, tanh changes nothing."""

    def forward(self, x):
        return super().forward(x).tanh()


def train(network, seeds, config):
    """Train S networks; returns what was seen before each step, {name: [T, S, ...]}.

    It ends when every network has blown up. A network that has blown up harms no other.
    """
    device = network[0].gates.weight.device
    inputs, target = every_neighbourhood(len(seeds), device)
    chance = torch.from_numpy(core.neighbourhood_chances(config.alive)).float().to(device)
    live_cells = torch.from_numpy(core.CELLS_ALIVE).to(device)
    counted = torch.ones(512, device=device)
    if config.left_out == "8 or 9":
        counted = (live_cells < 8).float()
    batches = core.neighbourhood_batches(seeds, config.alive, config.batch, device)
    expected = (config.batch * chance).expand(len(seeds), -1)
    optimizer = make_optimizer(network, config)

    rows = []
    looks = []
    for step in range(config.steps):
        output = network(inputs)
        counts = next(batches) if config.counts == "drawn" else expected
        error = torch.where(counts > 0, output - target, 0.0)
        each = counted * counts * error.square() / config.batch  # [S, 512]
        seen = each.detach()
        loss = seen.sum(dim=1)
        largest, worst = seen.max(dim=1)
        rows.append(torch.stack([loss, live_cells[worst].float(), largest / loss]))
        if step % EVERY == 0:
            looks.append(look(network, output.detach() - target, live_cells))
            if not (loss < LOST).any():
                break
        optimizer.zero_grad()
        each.sum().backward()
        if config.l1 > 0:
            add_l1(network, config.l1)
        clip_gradients(network, config.clip)
        optimizer.step()
        constrain(network, config)
    right = (network(inputs).detach() > 0.5) == (target > 0.5)
    return {"batch": torch.stack(rows).cpu().numpy(), "looks": torch.stack(looks).cpu().numpy(), "right": right.float().mean(1).numpy()}
