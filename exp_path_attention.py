"""What does path attention on pairs need to learn a 3-colouring: two weights, and which activation in hidden layers?

Entry       graph notebook, 13/4 ("simple og transformer")
Hypothesis  The notebook: "need 2 weights to break transetivity", so one for both heads is not enough; which activation is open
            ("not sure if I want softmax here in hidden layers.. other options are relu and gaussian"). Ours: told of neighbours, a
            pair of nodes further apart is only known through path attention. Softmax is worst, since a row of its scores adds up to
            one, whatever the paths; scores of mean 0 and variance 1 are best.
Rule        5 paired seeds. A pair's features are (P^0, P^1)[i, j], P = D^-1 A, normed: neighbours and nothing beyond. Three layers
            of feed-forward and path attention, trained on the pyramids with 3 to 6 rows; score: mean of both recalls (same colour,
            another) over pairs i != j of the next pyramid (test) and of the trained ones; beyond: of the next, further apart than
            neighbours. A claim stands if the 95% interval of every check lies in its range, and falls if one lies outside.
Cost        about 6 min on 2 cores
Quick       `--activation none softmax off --steps 150 --seeds 3`
"""

import torch
from torch import Tensor, nn

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim, Flag, at_least, one_of

ACTIVATIONS = (*core.EDGE_ACTIVATIONS, "off")
FLAGS = [
    Flag("activation", one_of(*ACTIVATIONS), ACTIVATIONS, "of path attention's scores; off: no path attention"),
    Flag("weights", one_of("two", "one"), ("two", "one"), "weights of a pair's features for the two heads, or one for both"),
    Flag("receptive-field", at_least(1), (1,), "r: a pair's features are (P^0 .. P^r)[i, j], P = D^-1 A"),
    Flag("depth", at_least(1), (3,), "layers"),
    Flag("dim", at_least(1), (16,), "channels of a pair"),
    Flag("lr", at_least(0.0, float, above=True), (3e-3,), "Adam's learning rate; falls linearly to 0"),
    Flag("steps", at_least(1), (1500,), "steps, each on all pairs of all trained pyramids"),
    Flag("train-up-to", at_least(3), (6,), "train on the pyramids with 3 rows to this many; the test has one more"),
]


def cell(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != "weights" or config["activation"] != "off"}


class Pairs:
    """All ordered pairs of a pyramid: edge [N, N, r + 1], the powers; label [N * N]: 1 for one colour, 0 for another, IGNORED for a
    node with itself; beyond [N * N] bool: not neighbours."""

    def __init__(self, rows: int, receptive_field: int):
        pyramid = core.pyramid(rows)
        n = len(pyramid.row)
        adjacency = torch.zeros(1, n, n)
        adjacency[0, *pyramid.edges.T] = adjacency[0, *pyramid.edges.T[::-1]] = 1
        powers = core.transition_powers(adjacency, torch.ones(1, n, dtype=torch.bool), range(receptive_field + 1))
        colour, own = torch.from_numpy(pyramid.colour), torch.eye(n, dtype=torch.bool)
        label = (colour[:, None] == colour).long().masked_fill(own, core.IGNORED)
        parts = powers[0].permute(1, 2, 0), label.flatten(), (adjacency[0] == 0).flatten()
        self.edge, self.label, self.beyond = (part.to(core.Runtime.device) for part in parts)


class PairClassifier(nn.Module):
    """Features [N, N, r + 1], normed as training pairs are -> Linear -> layers -> Linear to 2 logits: [N * N, 2]."""

    def __init__(self, config: dict, train: list[Pairs]):
        super().__init__()
        known = torch.cat([pairs.edge.flatten(0, 1) for pairs in train])
        self.mean, self.spread = known.mean(0), known.std(0)
        shared = config.get("weights") == "one"
        self.embed, self.readout = core.Linear(known.shape[1], config["dim"]), core.Linear(config["dim"], 2)
        layers = [core.EdgeLayer(config["dim"], config["activation"], shared) for _ in range(config["depth"])]
        self.layers = nn.Sequential(*layers)

    def forward(self, edge: Tensor) -> Tensor:
        x = self.embed(((edge - self.mean) / self.spread).flatten(0, 1)).view(*edge.shape[:2], -1)
        return self.readout(self.layers(x).flatten(0, 1))


@torch.no_grad()
def score(model: nn.Module, parts: list[Pairs], beyond: bool = False) -> Tensor:
    """Mean of both recalls, over all pairs or over those beyond neighbours."""
    label = torch.cat([pairs.label.masked_fill(~pairs.beyond, core.IGNORED) if beyond else pairs.label for pairs in parts])
    return core.class_recalls(core.confusion(torch.cat([model(pairs.edge) for pairs in parts]), label)).mean()


def trial(config: dict, seed: int) -> dict:
    top, losses, curve = config["train_up_to"], [], []
    train, test = ([Pairs(rows, config["receptive_field"]) for rows in sizes] for sizes in (range(3, top + 1), [top + 1]))
    with core.initialised_from(seed):
        model = PairClassifier(config, train).to(core.Runtime.device)
    label, optimizer = torch.cat([pairs.label for pairs in train]), torch.optim.Adam(model.parameters(), fused=True)
    for twentieth in range(21):
        for _ in range(twentieth * config["steps"] // 20 - len(losses)):
            optimizer.param_groups[0]["lr"] = config["lr"] * (1 - len(losses) / config["steps"])
            optimizer.zero_grad(set_to_none=True)
            loss = core.class_weighted_cross_entropy(torch.cat([model(pairs.edge) for pairs in train]), label)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curve.append(score(model, test))
    loss, curve = (torch.stack(values).cpu().numpy() for values in (losses, curve))
    result = {"test": curve[-1], "beyond": score(model, test, beyond=True), "train": score(model, train)}
    return {name: float(value) for name, value in result.items()} | {
        "loss": loss, "curve": curve, "diverged": core.diverged_at(loss)
    }  # fmt: skip


def more(one: dict, other: dict) -> Check:
    return Check("test", (0.0, ANY_ABOVE), one, other)


ONE, OFF, HIDDEN = {"weights": "one"}, {"activation": "off"}, [{"activation": name} for name in core.EDGE_ACTIVATIONS]
PLAIN, RELU, SOFTMAX, GAUSSIAN = ({"activation": name} for name in ("none", "relu", "softmax", "gaussian"))
CLAIMS = [
    Claim("two weights are needed: one for both heads scores less", "13/4", [more(PLAIN, PLAIN | ONE)]),
    Claim("with every activation (our question)", "13/4", [more(arm, arm | ONE) for arm in HIDDEN]),
    Claim("without path attention pairs beyond neighbours cannot be told (our question)", "13/4",
          [Check("beyond", (ANY_BELOW, 0.55), OFF)]),
    Claim("with it they can: over 0.7 (our question)", "13/4", [Check("beyond", (0.7, ANY_ABOVE), PLAIN)]),
    *(Claim(f"softmax in hidden layers is worse than {arm['activation']} (our question)", "13/4", [more(arm, SOFTMAX)])
      for arm in (PLAIN, RELU, GAUSSIAN)),
    *(Claim(f"scores of mean 0 and variance 1 are better than {arm['activation']} (our question)", "13/4", [more(GAUSSIAN, arm)])
      for arm in (PLAIN, RELU)),
]  # fmt: skip


def headline(run: core.Run) -> str:
    return f"score on the next pyramid: {core.extremes(run, 'test')}"


def figures(run: core.Run) -> list[core.Figure]:
    panels = [key for key in core.varying(run.cells) if key != "activation"]
    lines = lambda cell, result: {f"activation {cell['activation']}": result["curve"]}  # noqa: E731
    return [core.dots_figure(core.by_arm(run, ["test", "beyond"]), "score", headline(run), "balanced accuracy"),
            core.curves_figure(run, "curves", f"{headline(run)}, by step", lines, panels, "steps done, %", "balanced accuracy",
                               every=5)]  # fmt: skip


SMOKE = {"depth": (2,), "dim": (4,), "steps": (4,), "train_up_to": (3,)}
METRICS = ["test", "beyond", "train"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
