"""Where does content attention stop, and is that the best it could do?

Entry       graph notebook, "Content attention: unit testing with and without distance"
Hypothesis  Content attention reaches 0.61 within 7 to 8 epochs and stays, whatever its width, except that 3 is worse. Ours: without
            distance it cannot tell the nodes of a graph with one symbol apart, so no width and no training passes the ceiling: the
            best balanced accuracy of any function of (graph, own symbol). What it reaches early is the ceiling of the own symbol
            alone; many more steps bring it to that of the graph. On fresh graphs it scores 0.5: their symbols say nothing. With
            distance nodes differ; it passes the ceiling and overfits: above 0.9.
Rule        5 paired seeds; 32 graphs, one batch, one step an epoch, 4 layers. Score: mean of both class recalls on the same graphs.
            Plateau: its median over epochs 20 to 100. A claim stands if the 95% interval of every check lies in its range, and
            falls if one lies wholly outside (CLAIMS, below; fixed before the first full run).
Cost        about 6 min on 2 cores with the defaults, all without distance. With distance, two entries of their own, about 12 min:
            `--distance on --epochs 200 --order stored` and `--distance on --epochs 200 --order shuffled --dim 100 16`
Quick       `--dim 100 3 --order stored --epochs 300 --seeds 3`
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core_old as core
from core_old import ANY_ABOVE, ANY_BELOW, Check, Claim

FIXED = {"model": "content", "norm": "layer", "norm_order": "first", "mixed_norm": "none", "feedforward_norm": "none",
         "degree": "off", "readout": "plain"}  # fmt: skip
GRID = {"dim": (100, 3, 16, 50, 200), "distance": ("off",), "order": ("stored", "shuffled"), "epochs": (1000,)}
FLAGS = core.overfit_flags((*FIXED, "activation", "norm_mask", "unreachable", "divide"), **GRID)
TEST_GRAPHS = 200  # in each of two tests: the training graphs' patterns, and fresh ones


class BySymbol(nn.Module):
    """A content model without distance, computed once a (graph, symbol) instead of once a node: the same function, much faster.
    To attention, n equal keys are one key with log n added to its logit."""

    def __init__(self, model: core.NodeClassifier):
        super().__init__()
        self.model = model

    def forward(self, batch: core.GraphBatch) -> Tensor:
        b, symbols = batch.shape[0], core.PATTERN_SYMBOLS
        group = batch.slot // batch.shape[1] * symbols + batch.feature  # [V]
        count = torch.bincount(group, minlength=b * symbols).view(b, 1, 1, symbols)
        x = self.model.embed(torch.eye(symbols, device=count.device).repeat(b, 1))  # [B * 3, D]
        for layer in self.model.layers:
            attention, normed = layer.mixing, layer.norm1(x)
            query, key, value = (
                project(normed).view(b, symbols, attention.heads, -1).transpose(1, 2)
                for project in (attention.query, attention.key, attention.value)
            )
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=count.log())
            x = x + attention.out(mixed.transpose(1, 2).reshape(x.shape))
            x = x + layer.feedforward(layer.norm2(x))
        return self.model.readout(x).index_select(0, group)


def ceilings(graphs: list[core.Graph]) -> tuple[float, float]:
    """Best balanced accuracy on these graphs of any function of (graph, own symbol), and of any function of the own symbol: nodes
    that it cannot tell apart get the class of which they are the larger share."""
    count = [np.bincount(3 * graph.label.astype(int) + graph.feature, minlength=6).reshape(2, 3) for graph in graphs]
    share = count / np.sum(count, (0, 2))[:, None]  # [graphs, class, symbol]
    return share.max(1).sum() / 2, share.sum(0).max(0).sum() / 2


def trial(config: dict, seed: int) -> dict:
    model, data, size = core.build_model(FIXED | config, seed), core.PatternData(seed), config["graphs"]
    model = model if config["distance"] == "on" else BySymbol(model)
    result, graphs = core.overfit(config, seed, model), data.first(size, config["order"])
    score, (ceiling, symbol_ceiling) = result["recall"].mean(1).double().numpy(), ceilings(graphs)
    plateau = np.median(score[min(20, len(score) // 2) : 101])
    result |= {"curve": score - ceiling, "symbol_curve": np.full_like(score, symbol_ceiling - ceiling), "start": score[0]}
    result |= {"ceiling": ceiling, "symbol_ceiling": symbol_ceiling, "shortfall": ceiling - result["best"], "plateau": plateau}
    result |= {"early_gap": plateau - symbol_ceiling, "epochs_to_plateau": np.argmax(score >= plateau - 0.005)}
    result |= {"grad_weight": np.nanmedian(core.ratio_to_weight(result)[1])}  # over all modules and steps
    step = data.per_pattern  # each of the 100 patterns with its first graphs: is 0.61 usual?
    usual = np.array([ceilings(data[i : i + min(size, step)]) for i in range(0, len(data), step)])
    result |= dict(zip(("rank_ceiling", "rank_symbol_ceiling"), (usual < 0.61).mean(0), strict=True))
    test, patterns = core.PatternData(seed, "test"), sorted({graph.pattern for graph in graphs})
    each = min(max(1, TEST_GRAPHS // len(patterns)), test.per_pattern)
    known = [graph for p in patterns for graph in test[p * test.per_pattern : p * test.per_pattern + each]]
    for name, held_out in (("known", known), ("fresh", core.PatternData(seed, "test", fresh=True)[:TEST_GRAPHS])):
        counts = core.confusion(*core.evaluate(model, core.batches_of(held_out, 32)))
        result[f"{name}_score"] = float(core.class_recalls(counts).mean())
    return result


def cell(config: dict) -> dict:
    return {key: value for key, value in core.overfit_cell(FIXED | config).items() if key in config}


ORDERS, ON, USUAL, SAME = ({}, {"order": "shuffled"}), {"distance": "on", "epochs": 200}, (0.025, 0.975), (-0.01, 0.01)
CLAIMS = [
    Claim("the score starts at 0.5 and stops at 0.61", "content", [Check("start", (0.45, 0.55)), Check("plateau", (0.6, 0.62))]),
    Claim("it is there after 7 to 8 epochs", "content", [Check("epochs_to_plateau", (6, 9))]),
    Claim("another width stops at the same score", "content", [Check("plateau", SAME, {"dim": d}, {}) for d in (16, 50, 200)]),
    Claim("width 3 hurts", "content", [Check(score, (ANY_BELOW, 0.0), {"dim": 3}, {}) for score in ("plateau", "best")]),
    Claim("memorization is impossible: the ceiling is low", "content", [Check("ceiling", (ANY_BELOW, 0.9), arm) for arm in ORDERS]),
    Claim("0.61 is a usual ceiling of 32 graphs with one pattern: of the graph, of the own symbol (our question)", "content",
          [Check("rank_ceiling", USUAL), Check("rank_symbol_ceiling", USUAL)]),
    Claim("it stops early at the own symbol's ceiling (our question)", "content", [Check("early_gap", (-0.005, 0.005))]),
    Claim("with shuffled graphs, too (our question)", "content", [Check("early_gap", (-0.005, 0.005), {"order": "shuffled"})]),
    Claim("1000 epochs bring it to the graph's ceiling (our question)", "content",
          [Check("shortfall", (ANY_BELOW, 0.005), arm) for arm in ORDERS]),
    Claim("gradients are small: grad/weight below 0.001", "content", [Check("grad_weight", (ANY_BELOW, 0.001))]),
    Claim("test score is 0.5, on fresh graphs", "content", [Check("fresh_score", (0.49, 0.51), arm) for arm in ORDERS]),
    Claim("new graphs with the trained pattern score more (our question)", "content", [Check("known_score", (0.5, ANY_ABOVE))]),
    Claim("with distance it passes content's ceiling", "next actions", [Check("shortfall", (ANY_BELOW, 0.0), ON)]),
    Claim("with distance it overfits: above 0.9", "next actions", [Check("best", (0.9, ANY_ABOVE), ON)]),
]  # fmt: skip


def headline(run: core.Run) -> str:
    return f"graph ceiling less best score: {core.extremes(run, 'shortfall')}"


def figures(run: core.Run) -> list[core.Figure]:
    varies = core.varying(run.cells)
    curves = core.curves_figure(
        run, "score", f"Early stop less the own symbol's ceiling: {core.extremes(run, 'early_gap')}",
        lambda cell, result: {"score": result["curve"], "ceiling of the own symbol": result["symbol_curve"]},
        varies, "epoch (log above 10)", "score less the graph's ceiling")  # fmt: skip
    for axes in curves.figure.axes:
        axes.set_xscale("symlog", linthresh=10)
        axes.axhline(0, color="black", linestyle="--", linewidth=1)
    finding = f"Graph ceiling less best score: {core.extremes(run, 'shortfall')}"
    scores = ["plateau", "symbol_ceiling", "best", "ceiling"]
    y, panels, lines = "balanced accuracy", [key for key in varies if key != "dim"], {"notebook": 0.61}
    widths = (core.sweep_figure(run, "width", finding, "dim", scores, y, panels, log="x", lines=lines) if "dim" in varies
              else core.dots_figure(core.by_arm(run, scores), "width", finding, y, lines=lines))  # fmt: skip
    return [curves, widths]


SMOKE = {"layers": (2,), "dim": (8,), "hidden": (8,), "graphs": (4,), "epochs": (3,), "order": ("stored",)}
METRICS = ["best", "ceiling", "shortfall", "plateau", "symbol_ceiling", "epochs_to_plateau", "fresh_score", "known_score"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))
