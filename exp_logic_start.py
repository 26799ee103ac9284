"""DOC

Notebook    logic journal: 48 x 20
Setup       x
Hypothesis  x
Rule        x
Cost        x
"""

import argparse
import itertools

import core
from core import OURS, Check, Claim

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

GATE_SETS = {
    "all": core.LOGIC_GATES,
    "all-relu": ("RELU", *core.LOGIC_GATES[1:]),
    "four": ("AND", "XOR", "OR", "NAND"),
    "two": ("AND", "OR"),
}


def penalty(text):
    """argparse type: a finite float >= 0."""
    return 0.0 if text.strip() == "0" else core.positive_float(text)


def probability(text):
    """argparse type: a number above 0 and below 1."""
    share = core.positive_float(text)
    if share >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1; give a number between 0 and 1")
    return share


parser = core.make_parser(__doc__, seeds=16, ablation_seeds=8)
parser.add_argument(
    "--gates",
    nargs="+",
    choices=["all", "all-relu", "four"],
    default=["all"],
    help="all 16; all 16 with ReLU in the place of FALSE; AND, XOR, OR and NAND",
)
parser.add_argument(
    "--normalise",
    nargs="+",
    choices=["none", "sum", "softmax"],
    default=["none"],
    help="a unit's gate weights as they are, over their sum, or in a softmax",
)
parser.add_argument(
    "--force",
    nargs="+",
    type=penalty,
    default=[0.0],
    help="weight in the loss of the entropy of every unit's gates",
)
parser.add_argument(
    "--l1", nargs="+", type=penalty, default=[0.0], help="weight in the loss of all |parameters|"
)
parser.add_argument(
    "--loss",
    nargs="+",
    choices=["squared", "absolute", "cross-entropy"],
    default=["squared"],
    help="what is minimised; for the cross-entropy the output is a logit",
)
parser.add_argument(
    "--optimizer",
    nargs="+",
    choices=["sgd", "momentum", "adam"],
    default=["sgd"],
    help="plain gradient descent, with momentum 0.9, or Adam",
)
parser.add_argument(
    "--lr", nargs="+", type=core.positive_float, default=[0.1], help="learning rate"
)
parser.add_argument(
    "--alive",
    nargs="+",
    type=probability,
    default=[0.254],
    help="share of live cells in the neighbourhoods drawn",
)
parser.add_argument(
    "--width", nargs="+", type=core.layer_width, default=[48], help="units of both hidden layers"
)
parser.add_argument(
    "--batch", nargs="+", type=core.positive_int, default=[512], help="neighbourhoods per step"
)
parser.add_argument(
    "--steps", nargs="+", type=core.positive_int, default=[10_000], help="training steps"
)

ARMS = {"all 16 gates": {}}
ABLATIONS = {}
COLUMNS = ["lowest loss"]
TINY = {"width": 6, "batch": 32, "steps": 20}

LOST = 1e6  # loss of a batch from which no network returns
EVERY = 10  # steps between two points of a curve


def trial(config, seeds, job):
    """Train one network per seed on fresh batches; follow its loss over all neighbourhoods."""
    sizes = [core.CELLS, config.width, config.width, 1]
    network = dense_gate_network(sizes, seeds, GATE_SETS[config.gates], config.normalise)
    history = train(network.to(job.device), seeds, config)
    return [measure(history, row, config) for row in range(len(seeds))]


class DenseOperands(nn.Module):
    """Trained operands a = A x + a0 and b = B x + b0: [S, m, B] -> [S, 2, n, B].

    weight [S, 2n, m], bias [S, 2n, 1]: of all a, then of all b. Source: logic journal.
    """

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x):
        return torch.baddbmm(self.bias, self.weight, x).unflatten(1, (2, -1))


def normal_weights(rngs, *shape):
    """[S, *shape] from N(0, 0.01^2), each seed's part from its own generator."""
    return torch.from_numpy(np.stack([rng.normal(0, 0.01, shape) for rng in rngs])).float()


def dense_gate_network(sizes, seeds, gates, normalise="none", operands=DenseOperands):
    """The journal's network: trained operands and gates that start in equal parts, 1 / G each.

    operands: the class of the operands, DenseOperands or one derived from it.
    """
    rngs = [core.stream(seed, "init") for seed in seeds]
    layers = []
    for inputs, units in itertools.pairwise(sizes):
        weight = normal_weights(rngs, 2 * units, inputs)
        bias = normal_weights(rngs, 2 * units, 1)
        parts = torch.full((len(seeds), units, len(gates)), 1 / len(gates))
        mixture = core.GateMixture(parts, gates, normalise)
        layers.append(core.GateLayer(operands(weight, bias), mixture))
    return core.GateNetwork(*layers)


def train(network, seeds, config):
    """Train S networks on fresh batches; returns the history of each as {name: [T, ...]}."""
    device = network[0].gates.weight.device
    inputs = torch.from_numpy(core.NEIGHBOURHOODS.T.copy()).to(device)
    inputs = inputs.expand(len(seeds), -1, -1)  # [S, 9, 512]
    target = torch.from_numpy(core.LIFE).to(device)
    chance = torch.from_numpy(core.neighbourhood_chances(config.alive)).float().to(device)
    chance = chance.expand(len(seeds), 1, 512).mT
    batches = core.neighbourhood_batches(seeds, config.alive, config.batch, device)
    optimizer = make_optimizer(network, config)
    loss = torch.full((config.steps + 1, len(seeds)), torch.nan)
    slope = torch.zeros(config.steps, len(seeds))
    effective = []
    for step in range(config.steps + 1):
        output = network(inputs)
        prediction = output.detach()
        if config.loss == "cross-entropy":
            prediction = prediction.sigmoid()
        error = prediction - target
        loss[step] = torch.bmm(error.square().unsqueeze(1), chance)[:, 0, 0]
        if step % EVERY == 0:
            effective.append(effective_numbers(network))
            if not (loss[step] < LOST).any():
                break
        if step == config.steps:
            break
        counts = next(batches)
        drawn = torch.where(counts > 0, loss_of_each(output, target, config.loss), 0.0)
        total = (counts / config.batch * drawn).sum() + penalties(network, config)
        optimizer.zero_grad()
        total.backward()
        slope[step] = network[0].operands.weight.grad.flatten(1).norm(dim=1)
        optimizer.step()
    right = (prediction > 0.5) == (target > 0.5)
    return {"loss": loss.numpy(), "slope": slope.numpy(), "effective": torch.stack(effective), "right": right}


def make_optimizer(network, config):
    if config.optimizer == "adam":
        return torch.optim.Adam(network.parameters(), config.lr)
    momentum = 0.9 if config.optimizer == "momentum" else 0.0
    return torch.optim.SGD(network.parameters(), config.lr, momentum=momentum)


def loss_of_each(output, target, loss):
    target = target.expand_as(output)
    if loss == "absolute":  # but for a smooth tip
        return F.smooth_l1_loss(output, target, reduction="none", beta=1e-3)
    if loss == "cross-entropy":
        return F.binary_cross_entropy_with_logits(output, target, reduction="none")
    return (output - target).square()


def entropy(share):
    return -torch.special.xlogy(share, share.clamp(min=1e-30)).sum(dim=-1)


def shares_of_squares(weight):
    square = weight.double().square()
    return square / square.sum(dim=-1, keepdim=True).clamp(min=1e-30)


def gate_shares(gates):
    if gates.normalise == "softmax":
        return gates.weight.double().softmax(dim=-1)
    return shares_of_squares(gates.weight)


def penalties(network, config):
    total = 0.0
    if config.l1 > 0:
        for parameter in network.parameters():
            total = total + config.l1 * parameter.abs().sum()
    if config.force > 0:
        for layer in network:
            total = total + config.force * entropy(gate_shares(layer.gates)).sum()
    return total


@torch.no_grad()
def effective_numbers(network):
    """[2, S]"""
    inputs = entropy(shares_of_squares(network[1].operands.weight)).exp().mean(dim=1)
    gates = torch.cat([entropy(gate_shares(layer.gates)) for layer in network], dim=1)
    return torch.stack([inputs, gates.exp().mean(dim=1)])


def measure(history, row, config):
    loss = history["loss"][:, row]
    return {"lowest loss": np.nanmin(loss)}
