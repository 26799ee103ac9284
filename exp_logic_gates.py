"""Which sets of trainable logic gates learn Conway's Life, and where do the others stop?

Notebook    logic journal: trainable gates, only one is relu, learning rate, lesser gate, 48 x 48,
            regulariser
Setup       Input: the 3 x 3 cells; target: the centre's next state. Every unit outputs a weighted
            sum of gates of a = A x + a0 and b = B x + b0, as polynomials (AND is ab); all weights
            are trained. AND, XOR, OR and NAND are called four gates. [9, 48, 48, 1], batch 512.
            Each of G gates starts at 1 / G; in the journal's earlier [9, 512, 512, 1], at uniform
            values normalised to sum 1. A step, the journal's epoch, is plain SGD at 0.1 on the mean
            squared error of a batch. exp_speed has the time of a step ("very very slow"). Left open
            by the journal, chosen by us:
            - Share of live cells 0.254, in arms named so 0.485: at both 0.29 of the centres live
              next, which the journal's networks predict for all inputs. At 0.254 the best linear
              and quartic polynomials of the cells have losses of 0.161 and 0.075, near its 0.164
              and 0.074; at 0.485 of 0.153 and 0.092.
            - A new batch for every step: with only 512 neighbourhoods a fixed set would hardly
              differ.
            - Batch of the 512 units: 1024 and 128, since the journal says "128 (wait, 1024?)"; for
              ReLU, AND, XOR and OR at a rate of 0.01 only 128, to save time.
            - Weights and biases from N(0, 0.01^2), the scale of JAX's own examples.
Hypothesis  All 16 gates, or 15 and ReLU, stay at 0.2 and predict 0.3 for all inputs. ReLU, AND, XOR
            and OR learn, and take ten times the steps at 0.01. With 48 units, AND, XOR, OR and NAND
            learn without ReLU, but take 5 to 10 times as many steps; AND and OR take a few more.
            Ours: the journal suspects that the gates are not non-linear enough, but the best linear
            function is better than 0.2. At equal weights the 16 gates add up to 1/2 whatever a and
            b; uniform weights break this symmetry, and the loss stays at 0.2 all the same.
Rule        20 paired seeds from 300 on, 8 for all 16 gates and for 512 units. One share of live
            cells is enough, and one of the batch sizes run; for a ratio or a difference of two arms
            the share counts whose mean favours the journal.

            Loss: mean squared error over all 512 neighbourhoods, weighted by their probability in
            training, every 10 steps; the loss after n steps is the lowest so far. "0.2" means 0.19
            to 0.21, judged for networks that never blow up. The same prediction for all inputs
            means that the outputs have a mean of 0.25 to 0.35 and a standard deviation (spread)
            below 0.05.

            512 units: a loss is reached if the mean is at most 0.01 above it: 0.1 for 0.09; 0.18,
            0.165 and 0.084 for 0.17, "0.15-6" and 0.074.

            48 units: more than half of the networks have to get below the journal's loss within 1.5
            times its steps, since it reports single runs; one that blows up before does not.

            Ratios of steps are judged by the mean of their log10. Ten times means 7 to 13 times the
            steps to 0.15, log10 from 0.845 to 1.114. "Like 5-10x" means 4 to 12 times the steps to
            the journal's losses 0.0315 and 0.0139, from 0.602 to 1.079. Sooner means at most 0.9 of
            the steps to 0.08, so that AND and OR over the four gates is above 0.046. At 48 units a
            network that never gets there, mostly since it blew up, counts with the last step of its
            arm, or slow networks would drop out; at 512 units, and with ReLU, such seeds are left
            out. A ratio is open unless over half of the seeds get there in both arms.

            Never below: share of networks whose loss is never below the number. Blew up: the loss
            of a batch is not finite.
Cost        37 min on 2 cores; `--lr 0.1 0.05 --steps 5000 --seeds 4` 1 min
"""

import functools
import itertools
import math

import core
from core import OURS, Check, Claim

import numpy as np
import torch

GATE_SETS = {
    "four": ("AND", "XOR", "OR", "NAND"),
    "two": ("AND", "OR"),
    "four-relu": ("RELU", "AND", "XOR", "OR"),
    "all": core.LOGIC_GATES,
    "all-relu": ("RELU", *core.LOGIC_GATES[1:]),  # in the place of FALSE, as in the journal
}

parser = core.make_parser(__doc__, seeds=20, ablation_seeds=8)
parser.set_defaults(first_seed=300)  # tolerances were chosen knowing 0 to 15
parser.add_argument(
    "--gates",
    nargs="+",
    choices=list(GATE_SETS),
    default=["four"],
    help="AND XOR OR NAND; AND OR; ReLU AND XOR OR; all 16; all 16 with ReLU in place of FALSE",
)
parser.add_argument(
    "--start",
    nargs="+",
    choices=["constant", "uniform"],
    default=["constant"],
    help="initial weights of a unit's G gates: 1 / G, or uniform and normalised to sum 1",
)
parser.add_argument(
    "--width", nargs="+", type=core.layer_width, default=[48], help="units of both hidden layers"
)
parser.add_argument(
    "--lr", nargs="+", type=core.positive_float, default=[0.1], help="learning rate of plain SGD"
)
parser.add_argument(
    "--batch", nargs="+", type=core.positive_int, default=[512], help="neighbourhoods per step"
)
parser.add_argument(
    "--steps", nargs="+", type=core.positive_int, default=[15_000], help="training steps"
)
parser.add_argument(
    "--alive", nargs="+", type=core.probability, default=[0.254], help="share of live cells"
)
parser.add_argument(
    "--init-std",
    nargs="+",
    type=core.positive_float,
    default=[0.01],
    help="standard deviation of initial weights and biases",
)

LARGE = {"width": 512, "batch": 1024, "start": "uniform", "steps": 1500}
LARGE_128 = LARGE | {"batch": 128, "gates": "four-relu"}
ARMS = {  # the baseline first; a run with flags takes these
    "AND XOR OR NAND": {},
    "AND XOR OR NAND, alive 0.485": {"alive": 0.485},
    "AND OR": {"gates": "two", "steps": 17_400},
    "AND OR, alive 0.485": {"gates": "two", "steps": 17_400, "alive": 0.485},
    "ReLU AND XOR OR": {"gates": "four-relu"},
    "ReLU AND XOR OR, alive 0.485": {"gates": "four-relu", "alive": 0.485},
}
ABLATIONS = {  # what else the claims read
    "all 16": {"gates": "all", "steps": 10_000},
    "all 16, uniform start": {"gates": "all", "steps": 10_000, "start": "uniform"},
    "512 units, all 16": {"gates": "all", **LARGE},
    "512 units, ReLU and 15": {"gates": "all-relu", **LARGE},
    "512 units, ReLU and 15, lr 0.01": {"gates": "all-relu", **LARGE, "lr": 0.01, "steps": 500},
    "512 units, ReLU AND XOR OR": {"gates": "four-relu", **LARGE},
    "512 units, ReLU AND XOR OR, batch 128": LARGE_128,
    "512 units, ReLU AND XOR OR, batch 128, alive 0.485": {**LARGE_128, "alive": 0.485},
    "512 units, ReLU AND XOR OR, batch 128, lr 0.01": {**LARGE_128, "lr": 0.01, "steps": 15_000},
    "512 units, ReLU AND XOR OR, batch 128, lr 0.01, alive 0.485": {
        **LARGE_128, "lr": 0.01, "steps": 15_000, "alive": 0.485,
    },
}  # fmt: skip
COLUMNS = ["lowest loss", "blew up", "steps to 0.08", "never below 0.0315", "never below 0.0139"]
ROWS = [  # of the entry's table; all arms stand in its CSV
    *ARMS,
    "all 16",
    "512 units, ReLU AND XOR OR",
    "512 units, ReLU AND XOR OR, batch 128, lr 0.01",
]
TINY = {"width": 6, "batch": 16, "steps": 20}

CHECK_EVERY = 10  # steps
STEPS = (300, 500, 1000, 1200, 1500, 3000, 5000, 10_000, 15_000)  # where the journal reads a loss
PREDICTED = (300, 500, 1200)  # where it reads the predictions
LEVELS = (0.15, 0.08, 0.0315, 0.0139)  # whose steps are counted
REACHED = (  # a loss that the journal reads, and 1.5 times its step
    (0.0315, 3750), (0.147, 3750), (0.15, 4500), (0.08, 7500), (0.08, 10_500), (0.0139, 14_922),
    (0.0431, 17_366),
)  # fmt: skip


def trial(config, seed, job):
    """Train a network on fresh batches of neighbourhoods; follow its loss over all 512."""
    network = core.dense_gate_network(
        [core.CELLS, config.width, config.width, 1],
        [seed],
        GATE_SETS[config.gates],
        start=config.start,
        std=config.init_std,
    )
    outputs, blow_up = train_on_life(network.to(job.device), seed, config)

    loss = exact_losses(outputs, config.alive)
    lowest = np.fmin.accumulate(loss)  # a blow-up, NaN, does not lower it
    result = {
        "lowest loss": lowest[-1],
        "blew up": float(math.isfinite(blow_up)),
        "best linear loss": best_losses(config.alive)["linear"],
        "loss by step": np.minimum(loss, 1.0),
    }
    for steps in STEPS:
        result[f"loss after {steps}"] = loss_after(steps, lowest, config.steps)
    for steps in PREDICTED:
        mean = spread = math.nan
        if steps <= config.steps:
            mean, spread = mean_and_spread(outputs[steps // CHECK_EVERY], config.alive)
        result[f"mean output after {steps}"] = mean
        result[f"spread after {steps}"] = spread
    for level in LEVELS:
        result[f"steps to {level}"] = steps_to(level, loss)
    for level in (0.0315, 0.0139):
        result[f"never below {level}"] = float(lowest[-1] >= level)
    for level, steps in REACHED:
        result[f"below {level} by step {steps}"] = float(steps_to(level, loss) <= steps)
    return result


def train_on_life(network, seed, config):
    """Train one network by plain SGD on fresh batches of neighbourhoods.

    Returns its outputs on all 512 every CHECK_EVERY steps, [T, 512], NaN after a blow-up, and
    the step at which the loss of a batch was no longer finite, NaN without one.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=config.lr)
    device = parameters[0].device
    inputs, target = core.all_neighbourhoods(1, device)  # [1, 9, 512], [512]
    batches = core.neighbourhood_batches([seed], config.alive, config.batch, device)
    outputs = np.full((config.steps // CHECK_EVERY + 1, 512), np.nan, dtype=np.float32)

    for step in range(config.steps + 1):
        if step % CHECK_EVERY == 0:
            with torch.no_grad():
                outputs[step // CHECK_EVERY] = network(inputs)[0].cpu()
        if step == config.steps:
            break
        counts = next(batches)[0]  # [512]: how often each neighbourhood was drawn
        drawn = counts.nonzero().squeeze(1)
        error = network(inputs[:, :, drawn])[0] - target[drawn]
        loss = (counts[drawn] * error.square()).sum() / config.batch
        if not loss.isfinite():
            return outputs, float(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return outputs, math.nan


def exact_losses(outputs, alive):
    """Mean squared errors over all 512, weighted by probability: [T, 512] -> [T]."""
    error = outputs.astype(np.float64) - core.LIFE
    return np.square(error) @ core.neighbourhood_chances(alive)


def mean_and_spread(output, alive):
    """Mean and standard deviation of an output [512], weighted by probability."""
    chance = core.neighbourhood_chances(alive)
    output = output.astype(np.float64)
    mean = chance @ output
    return mean, math.sqrt(chance @ np.square(output - mean))


def loss_after(steps, lowest, trained):
    """Lowest loss [T] of the first steps; NaN if the network was not trained for so many."""
    return lowest[steps // CHECK_EVERY] if steps <= trained else math.nan


def steps_to(level, loss):
    """Steps until the loss [T] is below the level for the first time; NaN if it never is."""
    below = np.flatnonzero(loss < level)
    return float(CHECK_EVERY * below[0]) if len(below) > 0 else math.nan


@functools.cache
def best_losses(alive):
    """{name: loss} of always 0, of the mean, and of the best polynomial of each degree to 4.

    Exact, over all 512 neighbourhoods; a network that does no better stops there.
    """
    chance = core.neighbourhood_chances(alive)
    root = np.sqrt(chance)
    cells = core.NEIGHBOURHOODS.astype(np.float64)
    features = []
    found = {"always 0": float(chance @ core.LIFE)}
    for degree, name in enumerate(("the mean", "linear", "quadratic", "cubic", "quartic")):
        for chosen in itertools.combinations(range(core.CELLS), degree):
            features.append(cells[:, list(chosen)].prod(axis=1))
        columns = np.stack(features, axis=1)
        fit = np.linalg.lstsq(columns * root[:, None], core.LIFE * root, rcond=None)[0]
        found[name] = float(chance @ np.square(columns @ fit - core.LIFE))
    return found


FOUR = ("AND XOR OR NAND", "AND XOR OR NAND, alive 0.485")
TWO = ("AND OR", "AND OR, alive 0.485")
WITH_RELU = ("ReLU AND XOR OR", "ReLU AND XOR OR, alive 0.485")
SLOW = (
    "512 units, ReLU AND XOR OR, batch 128, lr 0.01",
    "512 units, ReLU AND XOR OR, batch 128, lr 0.01, alive 0.485",
)
FAST = (
    "512 units, ReLU AND XOR OR, batch 128",
    "512 units, ReLU AND XOR OR, batch 128, alive 0.485",
)
TENFOLD = "log10 steps to 0.15, lr 0.01 over 0.1"
LOWER = "lowest loss, lr 0.01 minus 0.1"
WITHOUT_RELU = "log10 steps to {}, four gates over ReLU"
SOONER = "log10 steps to 0.08, AND OR over four gates"
LAST_STEP = {  # what a network counts with that never gets to a loss
    **dict.fromkeys(FOUR, 15_000),
    **dict.fromkeys(TWO, 17_400),
}


def across(run):
    """Ratios and differences of two arms, at the share of live cells that favours the journal."""
    differences = [
        run.values(slow, "lowest loss") - run.values(fast, "lowest loss")
        for slow, fast in zip(SLOW, FAST, strict=True)
    ]
    sooner = log_ratios(run, 0.08, TWO, FOUR)
    found = {
        TENFOLD: nearest(log_ratios(run, 0.15, SLOW, FAST), low=10, high=10),
        LOWER: min(differences, key=np.mean),
        SOONER: max(sooner, key=np.mean, default=np.zeros(0)),
    }
    for level in (0.0315, 0.0139):
        ratios = log_ratios(run, level, FOUR, WITH_RELU)
        found[WITHOUT_RELU.format(level)] = nearest(ratios, low=5, high=10)
    return found


def log_ratios(run, level, arms, others):
    """log10 of the steps to a loss in one arm over those in another: a list of [n].

    arms and others are pairs, for either share of live cells. A share is left out unless over
    half of its seeds get there in both arms.
    """
    ratios = []
    for arm, other in zip(arms, others, strict=True):
        steps = run.values(arm, f"steps to {level}")
        other_steps = run.values(other, f"steps to {level}")
        get_there = np.isfinite(steps) & np.isfinite(other_steps)
        if get_there.mean() > 0.5:
            logs = np.log10(or_last_step(steps, arm) / or_last_step(other_steps, other))
            ratios.append(logs[np.isfinite(logs)])
    return ratios


def or_last_step(steps, arm):
    """The steps [S]; in place of NaN what LAST_STEP says of the arm, NaN if nothing."""
    return np.where(np.isfinite(steps), steps, LAST_STEP.get(arm, math.nan))


def nearest(ratios, low, high):
    """The log10 ratios whose mean is nearest to a ratio from low to high; empty without any."""
    low = math.log10(low)
    high = math.log10(high)
    return min(ratios, key=lambda logs: distance_to(logs.mean(), low, high), default=np.zeros(0))


def distance_to(value, low, high):
    """How far a value lies outside low to high."""
    return max(low - value, value - high, 0.0)


def constant_prediction(arm, steps):
    """Checks that after these steps an arm's loss is 0.2 and its output 0.3 for all inputs."""
    checks = []
    for step in steps:
        checks += [
            Check(f"loss after {step}", between=(0.19, 0.21), arm=arm, unless="blew up"),
            Check(f"mean output after {step}", between=(0.25, 0.35), arm=arm, unless="blew up"),
            Check(f"spread after {step}", below=0.05, arm=arm, unless="blew up"),
        ]
    return checks


def reached(metric, arms):
    """A Check that more than half of the networks of one of these arms reached a loss."""
    return Check(metric, above=0.5, rate=True, any_arm=arms)


CLAIMS = [
    Claim(
        "With all 16 gates, 512 units that do not blow up still have a loss of 0.2 after 1500 "
        "steps",
        "trainable gates",
        Check("loss after 1500", between=(0.19, 0.21), arm="512 units, all 16", unless="blew up"),
    ),
    Claim(
        "With ReLU and 15 gates, 512 units that do not blow up still have a loss of 0.2 after 300 "
        "and 1200 steps, and predict about 0.3 for all inputs",
        "only one is relu",
        *constant_prediction("512 units, ReLU and 15", (300, 1200)),
    ),
    Claim(
        "At a learning rate of 0.01 ReLU and 15 gates still have a loss of 0.2 after 500 steps, "
        "and predict about 0.29 for all inputs",
        "learning rate",
        *constant_prediction("512 units, ReLU and 15, lr 0.01", (500,)),
    ),
    Claim(
        "At a learning rate of 0.01 ReLU, AND, XOR and OR still have a loss of 0.2 after 1500 "
        "steps",
        "lesser gate",
        Check("loss after 1500", between=(0.19, 0.21), any_arm=SLOW, unless="blew up"),
    ),
    Claim(
        "At a learning rate of 0.1 ReLU, AND, XOR and OR reach a loss of 0.09 within 1500 steps",
        "lesser gate",
        Check("loss after 1500", below=0.1, any_arm=(*FAST, "512 units, ReLU AND XOR OR")),
    ),
    Claim(
        "At a learning rate of 0.01 the loss of ReLU, AND, XOR and OR is 0.2 after 1000 steps and "
        'reaches 0.17, "0.15-6" and 0.074 within 3000, 5000 and 15000',
        "lesser gate",
        Check("loss after 1000", between=(0.19, 0.21), any_arm=SLOW, unless="blew up"),
        Check("loss after 3000", below=0.18, any_arm=SLOW),
        Check("loss after 5000", below=0.165, any_arm=SLOW),
        Check("loss after 15000", below=0.084, any_arm=SLOW),
    ),
    Claim(
        "With ReLU, AND, XOR and OR, a tenth of the learning rate takes 10 times the steps to 0.15",
        "lesser gate",
        Check(TENFOLD, between=(0.845, 1.114)),
    ),
    Claim(
        "With ReLU, AND, XOR and OR, ten times the steps at a tenth of the learning rate end with "
        "a lower loss",
        "lesser gate",
        Check(LOWER, below=0),
    ),
    Claim(
        "Most networks of ReLU, AND, XOR and OR fall below 0.0315 within 3750 steps (journal: "
        "2500)",
        "48 x 48",
        reached("below 0.0315 by step 3750", WITH_RELU),
    ),
    Claim(
        "Most networks of four gates fall below 0.147 within 3750 steps and below 0.08 within 7500 "
        "(journal: 2500 and 5000)",
        "48 x 48",
        reached("below 0.147 by step 3750", FOUR),
        reached("below 0.08 by step 7500", FOUR),
    ),
    Claim(
        "Most networks of four gates fall below 0.0139 within 14922 steps, before any blow-up "
        "(journal: 9948)",
        "48 x 48",
        reached("below 0.0139 by step 14922", FOUR),
    ),
    Claim(
        "Four gates take 5 to 10 times as many steps as ReLU, AND, XOR and OR to 0.0315 and to "
        "0.0139",
        "48 x 48",
        Check(WITHOUT_RELU.format(0.0315), between=(0.602, 1.079)),
        Check(WITHOUT_RELU.format(0.0139), between=(0.602, 1.079)),
    ),
    Claim(
        "All 16 gates still have a loss of 0.2 after 10000 steps",
        "48 x 48",
        Check("loss after 10000", between=(0.19, 0.21), arm="all 16", unless="blew up"),
    ),
    Claim(
        "Most networks of AND and OR fall below 0.15 within 4500 steps and below 0.08 within 10500 "
        "(journal: 3000 and 7000)",
        "regulariser",
        reached("below 0.15 by step 4500", TWO),
        reached("below 0.08 by step 10500", TWO),
    ),
    Claim(
        "Most networks of AND and OR fall below 0.0431 within 17366 steps, before any blow-up "
        "(journal: 11577)",
        "regulariser",
        reached("below 0.0431 by step 17366", TWO),
    ),
    Claim(
        "Four gates get to 0.08 sooner than AND and OR alone",
        "regulariser",
        Check(SOONER, above=0.046),
    ),
    Claim(
        "The best linear function of the cells has a loss below 0.19, so that 0.2 is not the limit "
        "of gates without non-linearity",
        OURS,
        Check("best linear loss", below=0.19, arm="all 16"),
    ),
    Claim(
        "From uniform weights, which break the symmetry, all 16 gates still have a loss of 0.2 "
        "after 10000 steps",
        OURS,
        Check(
            "loss after 10000", between=(0.19, 0.21), arm="all 16, uniform start", unless="blew up"
        ),
    ),
]


def plot(run):
    """{name of the file: figure}."""
    return {
        "loss": draw_losses(
            run,
            "ReLU, AND, XOR and OR learn soon; without ReLU few get below 0.03, and all 16 gates "
            "stay at 0.206",
            "Lowest loss so far by step, a line per network; dashed: the best polynomials of "
            "degree 0 to 4",
            {
                "alive 0.254": ["AND XOR OR NAND", "AND OR", "ReLU AND XOR OR", "all 16"],
                "alive 0.485": [
                    "AND XOR OR NAND, alive 0.485",
                    "AND OR, alive 0.485",
                    "ReLU AND XOR OR, alive 0.485",
                ],
            },
            top=0.22,
            lowest_so_far=True,
        ),
        "lowest": core.draw_points(
            run,
            "lowest loss",
            "Nearly all networks of ReLU, AND, XOR and OR pass the journal's 0.0139; few without "
            "ReLU do",
            "Lowest loss of each network of 48 units, by set of gates",
            "lowest loss, over all 512 neighbourhoods",
            arms=[*ARMS, "all 16", "all 16, uniform start"],
            levels={"journal, with ReLU": 0.0315, "journal, without": 0.0139},
            scale="log",
        ),
    }


def draw_losses(run, title, shows, panels, top, bottom=0.0, lowest_so_far=False):
    """Exact loss by step, a thin line per network, with the losses of the best polynomials.

    panels {title: [arms]}, of one share of live cells each. Arms that the run lacks are left
    out, all arms are drawn where panels has none of them. bottom: above 0 the axis
    is logarithmic. lowest_so_far: instead of the loss, which may rise and fall at every step.
    """
    present = {name: [arm for arm in arms if run.shows(arm)] for name, arms in panels.items()}
    present = {name: arms for name, arms in present.items() if arms}
    if not present:
        present = {"": list(run.arms)}
    figure, axes = core.new_figure(
        run, title, shows, columns=len(present), width=5.5 * max(len(present), 2), height=4.8,
        sharey=True,
    )  # fmt: skip
    for axis, (panel, arms) in zip(axes[0], present.items(), strict=True):
        for arm in arms:
            colour = core.arm_colour(run, arm)
            for result in run.results(arm):
                loss = result["loss by step"]
                if lowest_so_far:
                    loss = np.fmin.accumulate(loss)
                steps = CHECK_EVERY * np.arange(len(loss))
                axis.plot(steps, loss, color=colour, linewidth=0.8, alpha=0.6)
            axis.plot([], [], color=colour, linewidth=2, label=arm)
        settings = [run.arms[run.shown_name(arm)] for arm in arms]
        shares = {row["alive"] for row in settings}
        if len(shares) == 1:
            for loss in best_losses(shares.pop()).values():
                axis.axhline(loss, color="black", linestyle="--", linewidth=0.7)
        axis.set(title=panel, xlabel="step")
        core.legend_below(axis, columns=2)
    axes[0, 0].set(ylabel="loss, over all 512 neighbourhoods", ylim=(bottom, top))
    if bottom > 0:
        axes[0, 0].set_yscale("log")
    return figure


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY, across=across, rows=ROWS)
