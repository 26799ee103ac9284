"""Which loss, optimizer or regulariser makes trainable logic gates learn Life, or learn sooner?

Notebook    logic journal: only one is relu ("what are my options?"), 48 x 20, 48 x 48, regulariser
Setup       A unit computes a = A x + a0 and b = B x + b0 and adds up gates of them in polynomial
            form, each with a trained weight; the last unit does so, too. [9, 48, 48, 1], batch
            512, plain gradient descent at 0.1 on the mean squared error; a step is the journal's
            epoch. The gates are all 16, or AND, XOR, OR and NAND, and start at 1 / G.
            What the journal leaves open, and what we took:
            - Share of live cells 0.254: it gives the 0.29 that the journal predicts whatever the
              input, and plateaus near its losses. 0.485 gives 0.29, too, so it is run as well.
            - Weights and biases from N(0, 0.01^2), the scale of JAX's own examples; a new batch
              for every step, the simplest generator.
            - "Force some gates": the entropy of a unit's gates, in the loss. A gate's share of
              its unit is its squared weight over their sum, or its part in a softmax. Strengths
              0.001 and 0.01, found on other seeds; for the four gates 0.0001, too.
            - L1: the sum of all absolute parameters, in the loss, times 1e-6, 1e-5 or 1e-4.
            - Other losses: absolute error, and cross-entropy with the output as a logit. Momentum
              0.9; Adam at 0.001, its usual rate.
Hypothesis  A term that forces gates "might make the network have to pick something instead of
            just guessing an average"; regularisation may be "very very important", and may make
            the four gates converge more quickly. Ours: in equal parts the 16 gates add up to 1/2
            whatever a and b, so no operand gets a gradient, and no other loss and no momentum
            changes that. Adam divides a gradient by its size: it starts them. Regularisers make
            the four gates sparser, not faster.
Rule        16 paired seeds from 200 on, 8 for ablations; 0 to 15 were seen before. Loss: exact,
            over all 512 neighbourhoods with their chances, at every step. A network starts when
            its loss falls below 0.15 within 10,000 steps, and stays if it is never below 0.19.
            Forced gates pick if the largest share of a unit is over 0.9 on average; they help if
            more networks start than without. Converged: below 0.08, the level that the journal
            reads for four gates at step 5,000. Regularisation is very important if more than half
            of the networks of all 16 gates converge with some regulariser. Sooner: at most 0.9 of
            the steps to 0.08, since single runs would not show less; a network that never gets
            there counts with 8,000, the last step. Slope: norm of the gradient of the first layer's
            operands, median of the first 1,000 steps; small: below 0.1 of that of four gates.
            Effective number: exponential of the entropy of the shares, of squared weights for the
            48 inputs of an operand in the second layer, of gates for a unit; taken when the loss
            is first below 0.08, or else at the end. Right: share of the 512 neighbourhoods, over
            0.99. "At the end" of a network that blows up is the last look before.
Cost        17 min on 2 cores; `--gates four --steps 5000 --seeds 4` under 1 min
"""

import core
from core import OURS, Check, Claim

import numpy as np
import torch
import torch.nn.functional as F

GATE_SETS = {
    "all": core.LOGIC_GATES,
    "all-relu": ("RELU", *core.LOGIC_GATES[1:]),
    "four": ("AND", "XOR", "OR", "NAND"),
    "two": ("AND", "OR"),
}


def penalty(text):
    """argparse type: a finite float >= 0."""
    return 0.0 if text.strip() == "0" else core.positive_float(text)


parser = core.make_parser(__doc__, seeds=16, ablation_seeds=8)
parser.set_defaults(first_seed=200)  # tolerances were chosen knowing 0 to 15
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
    type=core.probability,
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

FOUR = {"gates": "four", "steps": 8000}
ADAM = {"optimizer": "adam", "lr": 1e-3}
ARMS = {  # the baseline first; a run with flags takes these
    "all 16 gates": {},
    "all 16, forced 0.001": {"force": 1e-3},
    "all 16, forced 0.01": {"force": 1e-2},
    "all 16, Adam": ADAM,
    "four gates": FOUR,
    "four, over their sum": {**FOUR, "normalise": "sum"},
}
ABLATIONS = {  # what else the claims read
    "all 16, L1 1e-5": {"l1": 1e-5},
    "all 16, over their sum": {"normalise": "sum"},
    "all 16, softmax forced 0.001": {"normalise": "softmax", "force": 1e-3},
    "all 16, softmax forced 0.01": {"normalise": "softmax", "force": 1e-2},
    "all 16, momentum": {"optimizer": "momentum"},
    "all 16, absolute error": {"loss": "absolute"},
    "all 16, cross-entropy": {"loss": "cross-entropy"},
    "all 16 with ReLU, Adam": {"gates": "all-relu", **ADAM},
    "all 16, alive 0.485": {"alive": 0.485},
    "all 16, Adam, alive 0.485": {**ADAM, "alive": 0.485},
    "four, L1 1e-6": {**FOUR, "l1": 1e-6},
    "four, L1 1e-5": {**FOUR, "l1": 1e-5},
    "four, L1 1e-4": {**FOUR, "l1": 1e-4},
    "four, forced 0.0001": {**FOUR, "force": 1e-4},
    "four, forced 0.001": {**FOUR, "force": 1e-3},
    "four, softmax": {**FOUR, "normalise": "softmax"},
    "four, softmax forced 0.0001": {**FOUR, "normalise": "softmax", "force": 1e-4},
    "four, softmax forced 0.001": {**FOUR, "normalise": "softmax", "force": 1e-3},
    "four, Adam": {**FOUR, **ADAM},
}
COLUMNS = ["lowest loss", "steps to 0.08", "inputs per operand", "gates per unit", "blows up"]
ROWS = [  # of the entry's table; all arms stand in its CSV
    "all 16 gates",
    "all 16, forced 0.01",
    "all 16, Adam",
    "four gates",
    "four, over their sum",
    "four, L1 1e-5",
    "four, forced 0.001",
    "four, softmax forced 0.001",
    "four, Adam",
]
TINY = {"width": 6, "batch": 32, "steps": 20}

CONVERGED = 0.08  # what the journal reads for four gates at step 5000
LOST = 1e6  # a loss from which no network returns
EVERY = 10  # steps between two points of a curve


def trial(config, seeds, job):
    """Train one network per seed on fresh batches; follow its loss over all neighbourhoods."""
    sizes = [core.CELLS, config.width, config.width, 1]
    gates = GATE_SETS[config.gates]
    network = core.dense_gate_network(sizes, seeds, gates, normalise=config.normalise)
    history = train(network.to(job.device), seeds, config)
    return [measure(history, row, config) for row in range(len(seeds))]


def train(network, seeds, config):
    """Train S networks on fresh batches; returns the arrays that `measure` reads.

    It ends early when every network has blown up. Nothing passes from one network to another.
    """
    device = network[0].gates.weight.device
    inputs, target = core.all_neighbourhoods(len(seeds), device)
    chance = torch.from_numpy(core.neighbourhood_chances(config.alive)).float().to(device)
    batches = core.neighbourhood_batches(seeds, config.alive, config.batch, device)
    optimizer = make_optimizer(network, config)
    losses = torch.full((config.steps + 1, len(seeds)), torch.nan)
    slopes = torch.zeros(config.steps, len(seeds))
    looks = []

    for step in range(config.steps + 1):
        output = network(inputs)
        prediction = output.detach()
        if config.loss == "cross-entropy":
            prediction = prediction.sigmoid()
        losses[step] = (chance * (prediction - target).square()).sum(dim=1)
        if step % EVERY == 0:
            looks.append(look(network))
            if not (losses[step] < LOST).any():
                break
        if step == config.steps:
            break
        counts = next(batches)
        drawn = torch.where(counts > 0, loss_of_each(output, target, config.loss), 0.0)
        loss = (counts * drawn).sum() / config.batch
        optimizer.zero_grad()
        (loss + penalties(network, config)).backward()
        slopes[step] = network[0].operands.weight.grad.flatten(1).norm(dim=1)
        optimizer.step()
    return {
        "loss": losses.numpy(),
        "slope": slopes.numpy(),
        "look": torch.stack(looks).cpu().numpy(),
        "right": ((prediction > 0.5) == (target > 0.5)).float().mean(dim=1).cpu().numpy(),
    }


def make_optimizer(network, config):
    """Plain gradient descent, with momentum, or Adam."""
    if config.optimizer == "adam":
        return torch.optim.Adam(network.parameters(), config.lr)
    momentum = 0.9 if config.optimizer == "momentum" else 0.0
    return torch.optim.SGD(network.parameters(), config.lr, momentum=momentum)


def loss_of_each(output, target, loss):
    """The loss of every network on every neighbourhood: [S, 512]."""
    target = target.expand_as(output)
    if loss == "absolute":  # with a round tip, so that its slope has no jump at 0
        return F.smooth_l1_loss(output, target, reduction="none", beta=1e-3)
    if loss == "cross-entropy":
        return F.binary_cross_entropy_with_logits(output, target, reduction="none")
    return (output - target).square()


def penalties(network, config):
    """What the regularisers add to the loss: the sum over all networks."""
    total = torch.zeros((), device=network[0].gates.weight.device)
    if config.l1 > 0:
        total = total + config.l1 * absolute_sum(network)
    if config.force > 0:
        for layer in network:
            total = total + config.force * entropy(gate_shares(layer.gates)).sum()
    return total


def absolute_sum(network):
    """Sum of the absolute values of all parameters."""
    return sum(parameter.abs().sum() for parameter in network.parameters())


def entropy(share):
    """Entropy of the shares along the last dimension; its exponential is an effective number."""
    return -torch.xlogy(share, share.clamp(min=1e-30)).sum(dim=-1)


def shares_of_squares(weight):
    """Shares of the squared weights along the last dimension, float64."""
    # In float32 the last bit of a logarithm depends on its place in the array.
    square = weight.double().square()
    return square / square.sum(dim=-1, keepdim=True).clamp(min=1e-30)


def gate_shares(gates):
    """What each gate has of its unit: its part in the softmax, or of the squared weights."""
    if gates.normalise == "softmax":
        return gates.weight.double().softmax(dim=-1)
    return shares_of_squares(gates.weight)


@torch.no_grad()
def look(network):
    """Inputs per operand of the second layer, gates per unit, largest share of a gate: [3, S]."""
    inputs = entropy(shares_of_squares(network[1].operands.weight)).exp()
    shares = torch.cat([gate_shares(layer.gates) for layer in network], dim=1)
    gates = entropy(shares).exp()
    largest = shares.amax(dim=-1)
    return torch.stack([inputs.mean(dim=1), gates.mean(dim=1), largest.mean(dim=1)])


def measure(history, row, config):
    """The results of one network."""
    loss = history["loss"][:, row]
    lasting = np.flatnonzero(loss < LOST)
    below = np.flatnonzero(loss < CONVERGED)
    seen_at = below[0] if len(below) > 0 else lasting[-1]
    seen = history["look"][seen_at // EVERY, :, row]
    slope = history["slope"][:1000, row]
    lowest = loss[lasting].min()
    curve = np.where(loss < 0.35, loss, 0.35)
    return {
        "lowest loss": lowest,
        "starts": float(lowest < 0.15),
        "converges": float(lowest < CONVERGED),
        "steps to 0.08": float(seen_at) if len(below) > 0 else float(config.steps),
        "inputs per operand": seen[0],
        "gates per unit": seen[1],
        "largest share": history["look"][lasting[-1] // EVERY, 2, row],
        "right": history["right"][row],
        "blows up": float(lasting[-1] < config.steps),
        "first slope": slope[0],
        "slope": np.median(slope),
        "loss by step": curve[::EVERY],
    }


FORCED = (
    "all 16, forced 0.001",
    "all 16, forced 0.01",
    "all 16, softmax forced 0.001",
    "all 16, softmax forced 0.01",
)
REGULARISED = (*FORCED, "all 16, L1 1e-5", "all 16, over their sum")
SOONER = (
    "four, over their sum",
    "four, L1 1e-6",
    "four, L1 1e-5",
    "four, L1 1e-4",
    "four, forced 0.0001",
    "four, forced 0.001",
    "four, softmax",
    "four, softmax forced 0.0001",
    "four, softmax forced 0.001",
)
CLAIMS = [
    Claim(
        "Regularisation is very important: with it most networks of all 16 gates converge",
        "48 x 20",
        Check("converges", above=0.5, rate=True, any_arm=REGULARISED),
    ),
    Claim(
        "A term that forces gates makes a network of all 16 pick gates, not guess an average",
        "48 x 48",
        Check("largest share", above=0.9, any_arm=FORCED),
        Check("starts", above=0, rate=True, any_arm=FORCED, minus="all 16 gates"),
    ),
    Claim(
        "A regulariser makes the four gates converge sooner",
        "regulariser",
        Check("steps to 0.08", below=0.9, any_arm=SOONER, over="four gates"),
    ),
    Claim(
        "Adam starts all 16 gates, at both shares of live cells",
        OURS,
        Check("lowest loss", below=0.15, arm="all 16, Adam"),
        Check("lowest loss", below=0.15, arm="all 16, Adam, alive 0.485"),
    ),
    Claim(
        "With the absolute error, the cross-entropy or momentum all 16 gates stay at 0.2",
        OURS,
        Check("lowest loss", above=0.19, arm="all 16, absolute error"),
        Check("lowest loss", above=0.19, arm="all 16, cross-entropy"),
        Check("lowest loss", above=0.19, arm="all 16, momentum"),
    ),
    Claim(
        "All 16 gates stay because they cancel: no operand has a gradient, then a small one",
        OURS,
        Check("first slope", equals=0.0, arm="all 16 gates"),
        Check("slope", below=0.1, arm="all 16 gates", over="four gates"),
        Check("lowest loss", above=0.19, arm="all 16 gates"),
        Check("lowest loss", above=0.19, arm="all 16, alive 0.485"),
    ),
    Claim(
        "With Adam and ReLU in the place of FALSE, 16 gates get nearly all neighbourhoods right",
        OURS,
        Check("right", above=0.99, arm="all 16 with ReLU, Adam"),
    ),
    Claim(
        "An L1 penalty of 1e-5 makes the operands of four gates sparser, and forcing their gates",
        OURS,
        Check("inputs per operand", below=1, arm="four, L1 1e-5", over="four gates"),
        Check("gates per unit", below=1, arm="four, forced 0.001", over="four gates"),
    ),
]


def plot(run):
    """{name of the file: figure}."""
    return {
        "loss": core.draw_curves(
            run,
            "loss by step",
            "Adam starts all 16 gates at once; forced gates start late; plain descent never does",
            "Loss over all 512 neighbourhoods (cut at 0.35), a line per seed",
            "step / 10",
            "mean squared error",
            panels={
                "all 16 gates": ["all 16 gates", "all 16, forced 0.01", "all 16, Adam"],
                "four gates": ["four gates", "four, forced 0.001", "four, Adam"],
            },
            levels={"best constant": 0.206, "best linear function": 0.161},
        ),
        "steps": core.draw_points(
            run,
            "steps to 0.08",
            "Steps that four gates take to a loss of 0.08, by regulariser",
            "Steps to a loss of 0.08, a dot per seed; the last step where it is never reached",
            "steps",
            arms=["four gates", *SOONER, "four, Adam"],
            levels={"journal: below 0.08 after 5,000": 5000},
        ),
        "sparsity": draw_sparsity(run),
    }


def draw_sparsity(run):
    """Effective inputs per operand and gates per unit of the arms with four gates."""
    arms = [arm for arm in ("four gates", *SOONER, "four, Adam") if run.shows(arm)]
    if not arms:
        return None
    figure, axes = core.new_figure(
        run,
        "How sparse four gates are when the loss first falls below 0.08",
        "Effective numbers when the loss first falls below 0.08, or at the end; a dot per seed",
        columns=2,
        height=0.25 * len(arms) + 1.6,
        sharey=True,
    )
    places = (("inputs per operand", "of 48"), ("gates per unit", "of 4"))
    for axis, (metric, among) in zip(axes[0], places, strict=True):
        for row, arm in enumerate(arms):
            values = run.values(arm, metric)
            axis.plot(values, [row] * len(values), "o", color="#0072B2", alpha=0.5, markersize=5)
            axis.plot(values.mean(), row, "|", color="black", markersize=16, markeredgewidth=2.5)
        axis.set(xlabel=f"{metric}, {among}", yticks=range(len(arms)))
    axes[0, 0].set_yticklabels(arms)
    axes[0, 0].invert_yaxis()
    return figure


if __name__ == "__main__":
    core.main(
        parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY, seeds_per_batch=8, rows=ROWS
    )
