"""Which loss, optimizer or regulariser makes trainable logic gates learn Life, or learn sooner?

Notebook    logic journal: only one is relu (a question), 48 x 20, 48 x 48, regulariser
Setup       Input: the 3 x 3 cells; target: the centre's next state. Every unit outputs a weighted
            sum of gates of a = A x + a0 and b = B x + b0, as polynomials (AND is ab); all weights
            are trained. [9, 48, 48, 1], batch 512, plain SGD at 0.1 on the mean squared error; a
            step is the journal's epoch. The gates are all 16, or AND, XOR, OR and NAND (four
            gates); each of G gates starts at 1 / G. Left open by the journal, chosen by us:
            - Share of live cells 0.254, for Adam 0.485, too.
            - Weights and biases from N(0, 0.01^2), a new batch for every step; logic_gates has the
              reasons.
            - "Force some gates": the entropy of each unit's gate shares is added to the loss, times
              0.01 or 0.03 for all 16, 0.0001 or 0.001 for four. A gate's share is its part of its
              unit's squared weights, or of a softmax.
            - L1: the sum of all absolute parameters times 1e-6 or 1e-5.
            - Gates normalised to sum 1 count as regularised, too, which favours the journal.
            - Other losses: absolute error; cross-entropy, the output as a logit, at 0.01 (at 0.1 it
              diverges). Momentum 0.9; Adam at 0.001, its usual rate.
Hypothesis  A term that forces gates "might make the network have to pick something instead of just
            guessing an average"; regularisation may be "very very important". Whether regularisers
            make the four gates converge more quickly is its question. Ours: at equal weights the 16
            gates add up to 1/2 whatever a and b, so no operand gets a gradient, and no other loss
            and no momentum changes that. Adam rescales gradients, so its networks leave the
            plateau. Regularisers make the four gates sparser.
Rule        16 paired seeds from 400 on, 12 for ablations. "Most" means more than 0.5 of the
            networks. Where the journal leaves a setting open, one of those tried is enough; that
            the best of several regularisers counts favours the journal. That a regulariser makes
            four gates learn sooner was judged as its statement (refuted) until after the run; it is
            a question there, so the claim is ours.

            Loss: mean squared error over all 512 neighbourhoods, weighted by their probability, at
            every step. The best constant has 0.21. Leaves the plateau: the loss falls below 0.15
            within 10,000 steps. A network stays there if its loss never falls below 0.19.

            Regularisation is very important if most networks of all 16 gates leave the plateau with
            some regulariser, and not without. Forced gates pick if the largest share of a unit is
            over 0.9 on average, at the end. On seeds 0 to 15, seen before, 9 of 16 networks forced
            at 0.01 left the plateau, none fell below 0.08 and 9 blew up; without, none left it. On
            other seeds networks of all 16 forced at 0.001 picked gates and stayed on the plateau,
            and with L1 at 1e-4 none learned.

            Steps to 0.08: a network that never gets there counts with its last step, 8,000 for four
            gates and 10,000 for all 16. The journal reads this loss for four gates at step 5,000.
            Sooner means at most 0.9 of the steps.

            Gradient norm: of the first layer's operands, at the first step, and as the median over
            the first 1,000 steps; it is small if below 1e-6 (about 4e-4 for four gates of other
            seeds). With a penalty, its gradient is included.

            Inputs per operand and gates per unit: effective numbers, the exponential of the entropy
            of an operand's shares of squared weights (second layer, 48 inputs), or of a unit's
            shares of gates. They are taken when the loss is first below 0.08, or else at the end.
            Right is the share of the 512 neighbourhoods with output over 0.5 exactly if the centre
            lives, at the end; nearly all means over 0.99. Blows up: the loss passes 1e6. The end is
            then the last measurement before, of one every 10 steps.
Cost        17 min on 2 cores; `--lr 0.05 --seeds 4` 1 min
"""

import core
from core import OURS, Check, Claim
from exp_logic_gates import GATE_SETS, best_losses

import numpy as np
import torch
import torch.nn.functional as F


def penalty(text):
    """argparse type: a finite float >= 0."""
    return 0.0 if text.strip() == "0" else core.positive_float(text)


parser = core.make_parser(__doc__, seeds=16, ablation_seeds=12)
parser.set_defaults(first_seed=400)  # other logic scripts use those below
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
    help="a unit's gate weights as they are, normalised to sum 1, or in a softmax",
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
    help="plain SGD, SGD with momentum 0.9, or Adam",
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
    "all 16, forced 0.01": {"force": 1e-2},
    "all 16, Adam": ADAM,
    "four gates": FOUR,
    "four, gates normalised to sum 1": {**FOUR, "normalise": "sum"},
}
ABLATIONS = {  # what else the claims read
    "all 16, forced 0.03": {"force": 3e-2},
    "all 16, softmax forced 0.01": {"normalise": "softmax", "force": 1e-2},
    "all 16, L1 1e-5": {"l1": 1e-5},
    "all 16, gates normalised to sum 1": {"normalise": "sum"},
    "all 16, momentum": {"optimizer": "momentum"},
    "all 16, absolute error": {"loss": "absolute"},
    "all 16, cross-entropy": {"loss": "cross-entropy", "lr": 0.01},  # at 0.1 it diverges
    "all 16 with ReLU, Adam": {"gates": "all-relu", **ADAM},
    "all 16, Adam, alive 0.485": {**ADAM, "alive": 0.485},
    "four, L1 1e-6": {**FOUR, "l1": 1e-6},
    "four, L1 1e-5": {**FOUR, "l1": 1e-5},
    "four, forced 0.0001": {**FOUR, "force": 1e-4},
    "four, forced 0.001": {**FOUR, "force": 1e-3},
}
COLUMNS = [
    "lowest loss",
    "leaves the plateau",
    "steps to 0.08",
    "inputs per operand",
    "gates per unit",
    "blows up",
]
ROWS = [  # of the entry's table; all arms stand in its CSV
    "all 16 gates",
    "all 16, forced 0.01",
    "all 16, forced 0.03",
    "all 16, Adam",
    "all 16 with ReLU, Adam",
    "four gates",
    "four, gates normalised to sum 1",
    "four, L1 1e-5",
    "four, forced 0.001",
]
TINY = {"width": 6, "batch": 32, "steps": 20}

LEVEL = 0.08  # what the journal reads for four gates at step 5000
LOST = 1e6  # a loss from which no network returns
EVERY = 10  # steps between two measurements, and between two points of a curve


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
    gradient_norms = torch.zeros(config.steps, len(seeds))
    measurements = []

    for step in range(config.steps + 1):
        output = network(inputs)
        prediction = output.detach()
        if config.loss == "cross-entropy":
            prediction = prediction.sigmoid()
        losses[step] = (chance * (prediction - target).square()).sum(dim=1)
        if step % EVERY == 0:
            right = ((prediction > 0.5) == (target > 0.5)).double().mean(dim=1)
            measurements.append(torch.cat([measure_sparsity(network), right[None]]))
            if not (losses[step] < LOST).any():
                break
        if step == config.steps:
            break
        counts = next(batches)
        drawn = torch.where(counts > 0, loss_of_each(output, target, config.loss), 0.0)
        loss = (counts * drawn).sum() / config.batch
        optimizer.zero_grad()
        (loss + penalties(network, config)).backward()
        gradient_norms[step] = network[0].operands.weight.grad.flatten(1).norm(dim=1)
        optimizer.step()
    return {
        "loss": losses.numpy(),
        "gradient norm": gradient_norms.numpy(),
        "measurements": torch.stack(measurements).cpu().numpy(),  # [T / 10, 4, S]
    }


def make_optimizer(network, config):
    """Plain SGD, SGD with momentum, or Adam."""
    if config.optimizer == "adam":
        return torch.optim.Adam(network.parameters(), config.lr)
    momentum = 0.9 if config.optimizer == "momentum" else 0.0
    return torch.optim.SGD(network.parameters(), config.lr, momentum=momentum)


def loss_of_each(output, target, loss):
    """The loss of every network on every neighbourhood: [S, 512]."""
    target = target.expand_as(output)
    if loss == "absolute":  # with a round tip, so that its gradient has no jump at 0
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
def measure_sparsity(network):
    """Inputs per operand of the second layer, gates per unit, largest share of a gate: [3, S]."""
    inputs = entropy(shares_of_squares(network[1].operands.weight)).exp()
    shares = torch.cat([gate_shares(layer.gates) for layer in network], dim=1)
    gates = entropy(shares).exp()
    largest = shares.amax(dim=-1)
    return torch.stack([inputs.mean(dim=1), gates.mean(dim=1), largest.mean(dim=1)])


def measure(history, row, config):
    """The results of one network."""
    loss = history["loss"][:, row]
    measurements = history["measurements"][:, :, row]
    finite = np.flatnonzero(loss < LOST)
    last = finite[-1]
    below = np.flatnonzero(loss < LEVEL)
    gets_there = len(below) > 0
    step = below[0] if gets_there else last
    inputs, gates, _, _ = measurements[step // EVERY]
    _, _, largest_share, right = measurements[last // EVERY]
    gradient_norm = history["gradient norm"][:1000, row]
    lowest = loss[finite].min()
    curve = np.where(loss < 0.35, loss, 0.35)
    return {
        "lowest loss": lowest,
        "leaves the plateau": float(lowest < 0.15),
        "never below 0.19": float(lowest >= 0.19),
        "steps to 0.08": float(step if gets_there else config.steps),
        "inputs per operand": inputs,
        "gates per unit": gates,
        "largest share": largest_share,
        "right": right,
        "blows up": float(last < config.steps),
        "first gradient norm": gradient_norm[0],
        "gradient norm": np.median(gradient_norm),
        "loss by step": curve[::EVERY],
    }


FORCED = ("all 16, forced 0.01", "all 16, forced 0.03", "all 16, softmax forced 0.01")
REGULARISED = (*FORCED, "all 16, L1 1e-5", "all 16, gates normalised to sum 1")
FOUR_REGULARISED = (
    "four, gates normalised to sum 1",
    "four, L1 1e-6",
    "four, L1 1e-5",
    "four, forced 0.0001",
    "four, forced 0.001",
)
CLAIMS = [
    Claim(
        "Regularisation is very important: most networks of all 16 gates leave the plateau with "
        "some regulariser, but not without",
        "48 x 20",
        Check("leaves the plateau", above=0.5, rate=True, any_arm=REGULARISED),
        Check("leaves the plateau", below=0.5, rate=True, arm="all 16 gates"),
    ),
    Claim(
        "A term that forces gates makes networks of all 16 pick gates, and more of them leave the "
        "plateau of guessing an average",
        "48 x 48",
        Check("largest share", above=0.9, any_arm=FORCED),
        Check("leaves the plateau", above=0, rate=True, any_arm=FORCED, minus="all 16 gates"),
    ),
    Claim(
        "Four gates fall below 0.08 sooner with a regulariser",
        OURS,
        Check("steps to 0.08", below=0.9, any_arm=FOUR_REGULARISED, over="four gates"),
    ),
    Claim(
        "With Adam most networks of all 16 gates leave the plateau, at both shares of live cells",
        OURS,
        Check("leaves the plateau", above=0.5, rate=True, arm="all 16, Adam"),
        Check("leaves the plateau", above=0.5, rate=True, arm="all 16, Adam, alive 0.485"),
    ),
    Claim(
        "With the absolute error, the cross-entropy or momentum most networks of all 16 gates "
        "stay on the plateau",
        OURS,
        Check("never below 0.19", above=0.5, rate=True, arm="all 16, absolute error"),
        Check("never below 0.19", above=0.5, rate=True, arm="all 16, cross-entropy"),
        Check("never below 0.19", above=0.5, rate=True, arm="all 16, momentum"),
    ),
    Claim(
        "With all 16 gates the first operands have no gradient at first, and one below 1e-6 in the "
        "median of 1,000 steps",
        OURS,
        Check("first gradient norm", equals=0.0, arm="all 16 gates"),
        Check("gradient norm", below=1e-6, arm="all 16 gates"),
    ),
    Claim(
        "With Adam and ReLU in the place of FALSE, 16 gates get nearly all neighbourhoods right",
        OURS,
        Check("right", above=0.99, arm="all 16 with ReLU, Adam"),
    ),
    Claim(
        "Regularisers make four gates sparser: an L1 penalty of 1e-5 leaves fewer inputs per "
        "operand, forcing at 0.001 fewer gates per unit",
        OURS,
        Check("inputs per operand", below=1, arm="four, L1 1e-5", over="four gates"),
        Check("gates per unit", below=1, arm="four, forced 0.001", over="four gates"),
    ),
]


def plot(run):
    """{name of the file: figure}."""
    baseline = next(iter(run.arms.values()))
    best = best_losses(baseline["alive"])
    return {
        "loss": core.draw_points(
            run,
            "lowest loss",
            "Of all that was tried only Adam and forced gates move all 16 gates off the plateau",
            "Lowest loss of each network of 16 gates within 10,000 steps, a dot per seed",
            "mean squared error",
            arms=[arm for arm in run.arms if arm.startswith("all 16")],
            levels={"best constant": best["the mean"], "best linear function": best["linear"]},
        ),
        "steps": core.draw_points(
            run,
            "steps to 0.08",
            "No regulariser that was tried makes four gates learn sooner",
            "Steps to a loss of 0.08, a dot per seed; the last step where it is never reached",
            "steps",
            arms=["four gates", *FOUR_REGULARISED],
            levels={"journal: below 0.08 after 5,000": 5000},
        ),
        "sparsity": draw_sparsity(run),
    }


def draw_sparsity(run):
    """Effective inputs per operand and gates per unit of the arms with four gates."""
    arms = [arm for arm in ("four gates", *FOUR_REGULARISED) if run.shows(arm)]
    if not arms:
        return None
    figure, axes = core.new_figure(
        run,
        "L1 at 1e-5 leaves fewer inputs per operand, forcing at 0.001 fewer gates per unit",
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
