"""At which length and sparsity does attention along links beat dense attention, and at what cost?

Notebook    question-answering notebook: visualisations
Setup       The notebook plans to graph memory, FLOPs and runtime against sequence length and
            sparsity. Four implementations of one attention, in torch alone, forward and backward on
            random graphs of N nodes and E links (self-links included), width D = 64 in 4 heads:
            - fused: torch's scaled_dot_product_attention with a mask.
            - plain: masked logits of all pairs.
            - edge list: rows are gathered, multiplied and added up for each link.
            - CSR: logits by sampled_addmm, sums by embedding_bag, one head after another.
            The question reader is timed, too: forward and backward of six layers with shared
            weights on 4 generated questions of 2 hops, with half as many entities and passages as
            facts. Fused attention is missing there, as on a CPU it gives the links' learned bias no
            gradient.
Hypothesis  The notebook predicts nothing. Ours, after one trial with another seed: fused attention
            grows with the square of the length, attention along links with the number of links.
            An edge list moves the 64 channels of each link several times, so fused attention is
            faster where a tenth of the pairs is joined. A graph of text has some 7 links per node
            at any length, so a reader gains from links once it has many facts.
Rule        5 seeds. All numbers are per call, the reader's for 4 questions together.

            Time: in ms, median of 9 interleaved rounds, one thread; glibc is set to keep freed
            blocks (mallopt), since returning large ones slows plain attention up to 1.7 times.
            Memory: in MB (10^6 bytes), the most that torch's allocator holds beyond the inputs; the
            mask, 4 N^2 bytes for fused attention and N^2 for plain, is an input and not counted.
            FLOPs: in MFLOP (10^6), torch's FlopCounterMode, plus 14 N^2 D for fused attention and
            12 E D along links, two per multiply-add, without the softmax. CSR is given the edge
            list's count.

            "Edge list's time / plain's" and the like divide the one implementation's time, memory
            or FLOPs by the other's. Growth, in the same rounds: fused attention's time over that at
            a quarter of the nodes (at 4096 nodes; like the square: 12 to 20); time along links over
            that at a third of the links (at 300 per node; like the links: 2.4 to 3.6).

            Share of joined pairs: of all ordered node pairs that are joined, self-links included.
            Tokens: nodes; for the reader, the words of one question's passages.

            These bounds, and the sizes that the claims compare, were chosen after that one trial,
            on the same kind of machine. CSR uses sampled_addmm and embedding_bag, since torch's
            gradient of a product with a CSR matrix would go through a dense one.
Cost        5 min on 1 core; nothing else may compute meanwhile
"""

import functools
import itertools
import math
import os
import warnings
from typing import NamedTuple

import core
from core import OURS, Check, Claim

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no two lines for each profile
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
parser = core.make_parser(__doc__, seeds=5)
parser.set_defaults(device="cpu")
parser.add_argument(
    "--system",
    nargs="+",
    choices=["attention", "reader"],
    default=["attention"],
    help="attention alone on a random graph, or the whole question reader",
)
parser.add_argument(
    "--nodes", nargs="+", type=core.integer(8, 16_384), default=[1024], help="of a random graph"
)
parser.add_argument(
    "--links",
    nargs="+",
    type=core.positive_float,
    default=[8.0],
    help="of a node of the random graph, on average, beside the one to itself",
)
parser.add_argument(
    "--facts", nargs="+", type=core.integer(12, 400), default=[64], help="of a question"
)

ARMS = {  # sizes; the implementations are metrics
    "1024 nodes, 8 links each": {},
    "512 nodes, 8 links each": {"nodes": 512},
    "2048 nodes, 8 links each": {"nodes": 2048},
    "4096 nodes, 8 links each": {"nodes": 4096},
    "1024 nodes, 100 links each": {"links": 100.0},
    "1024 nodes, 300 links each": {"links": 300.0},
}
ABLATIONS = {  # the whole reader
    "reader, 16 facts": {"system": "reader", "facts": 16},
    "reader, 64 facts": {"system": "reader"},
    "reader, 256 facts": {"system": "reader", "facts": 256},
}
COLUMNS = [
    "edge list's time / plain's",
    "edge list's memory / plain's",
    "edge list's FLOPs / plain's",
    "edge list's time / fused's",
    "CSR's time / fused's",
]
TINY = {"nodes": 24, "links": 4.0, "facts": 12}

DIM, HEADS = 64, 4
LAYERS, QUESTIONS = 6, 4  # of the reader, which has one layer's weights for all
ROUNDS = 9
UNITS = {"time": "ms", "memory": "MB", "FLOPs": "MFLOP"}
GROWTH = {  # metric: (the implementation whose time grows, what the time is divided by)
    "fused's time / at a quarter of the nodes": ("fused", "fused, a quarter of the nodes"),
    "edge list's time / at a third of the links": ("edge list", "edge list, a third of the links"),
    "CSR's time / at a third of the links": ("CSR", "CSR, a third of the links"),
}


def trial(config, seed, job):
    """Time all implementations on the same inputs in turns, count their memory and FLOPs."""
    if job.device.type != "cpu":
        raise core.UsageError("--device: this script measures a CPU; give cpu")
    core.keep_freed_blocks()
    smaller = {}
    if config.system == "attention":
        calls, pairs, tokens = attention_calls(config.nodes, config.links, seed)
        smaller = smaller_calls(config.nodes, config.links, seed)
    else:
        calls, pairs, tokens = reader_calls(config.facts, seed)
    seconds = core.interleaved_medians(calls | smaller, ROUNDS)
    nodes = pairs.keep.shape[-1]
    links = len(pairs.target)
    result = {"tokens": tokens, "nodes": nodes}
    result["share of joined pairs"] = links / pairs.keep.numel()
    if config.system == "reader":
        links *= LAYERS  # at each of which it attends
    for name, unit in itertools.product(IMPLEMENTATIONS, UNITS.values()):
        result[f"{name}, {unit}"] = math.nan
    for name, call in calls.items():
        result[f"{name}, ms"] = 1e3 * seconds[name]
        result[f"{name}, MB"] = peak_memory(call) / 1e6
        result[f"{name}, MFLOP"] = count_flops(calls, name, nodes, links) / 1e6
    for dense, name in itertools.product(("fused", "plain"), IMPLEMENTATIONS):
        for measure, unit in UNITS.items():
            ratio = result[f"{name}, {unit}"] / result[f"{dense}, {unit}"]
            result[f"{name}'s {measure} / {dense}'s"] = ratio
    for metric, (name, at_smaller) in GROWTH.items():
        result[metric] = seconds.get(name, math.nan) / seconds.get(at_smaller, math.nan)
    return result


def peak_memory(call):
    """The most that torch's allocator holds for a call at any time, in bytes."""
    with profile(profile_memory=True) as profiled:
        call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def count_flops(calls, name, nodes, links):
    """FLOPs of a call; torch counts its matrix products, not fused ones or those along links."""
    with FlopCounterMode(display=False) as counter:
        calls["edge list" if name == "CSR" else name]()
    if name == "plain":
        added = 0
    elif name == "fused":
        added = 14 * nodes**2 * DIM
    else:
        added = 12 * links * DIM
    return counter.get_total_flops() + added


# Implementations: query, key, value [N, H, D/H] -> [N, H, D/H]


class Pairs(NamedTuple):
    """Which nodes are joined, target first: keep [N, N] or [B, N, N] bool.

    mask is the same as 0 and -inf, of which fused attention would else make a copy in each call.
    The same as E links between all nodes, sorted by target: target, source [E]; first [B * N + 1]
    is where the links into each node begin.
    """

    keep: torch.Tensor
    mask: torch.Tensor
    target: torch.Tensor
    source: torch.Tensor
    first: torch.Tensor


def join_pairs(keep):
    """Pairs of keep."""
    n = keep.shape[-1]
    target, source = keep.flatten(0, -2).nonzero().unbind(1)
    first = torch.searchsorted(target, torch.arange(keep.numel() // n + 1))
    mask = torch.zeros(keep.shape).masked_fill(~keep, -math.inf)
    return Pairs(keep, mask, target, source + target // n * n, first)


def attend_plain(query, key, value, pairs):
    logits = query.transpose(0, 1) @ key.permute(1, 2, 0)
    weight = logits.masked_fill(~pairs.keep, -math.inf).softmax(2)
    return (weight @ value.transpose(0, 1)).transpose(0, 1)


def attend_fused(query, key, value, pairs):
    parts = [x.transpose(0, 1)[None] for x in (query, key, value)]
    mixed = F.scaled_dot_product_attention(*parts, pairs.mask, scale=1.0)
    return mixed[0].transpose(0, 1)


def softmax_by_target(logits, pairs):
    """Softmax over the links into each node: [E, H] -> [E, H]."""
    none = logits.new_zeros(len(pairs.first) - 1, logits.shape[1])
    place = pairs.target[:, None].expand_as(logits)
    top = none.scatter_reduce(0, place, logits.detach(), "amax", include_self=False)
    weight = (logits - top.index_select(0, pairs.target)).exp()
    total = none.index_add(0, pairs.target, weight)
    return weight / total.index_select(0, pairs.target)


def attend_edge_list(query, key, value, pairs, bias=0.0):
    """bias [E, H] is added to the logits."""
    logits = query.index_select(0, pairs.target) * key.index_select(0, pairs.source)
    weight = softmax_by_target(logits.sum(2) + bias, pairs)
    messages = weight[:, :, None] * value.index_select(0, pairs.source)
    return torch.zeros_like(value).index_add(0, pairs.target, messages)


def attend_csr(query, key, value, pairs):
    size = (len(query), len(query))
    zeros = query.new_zeros(len(pairs.source))
    pattern = torch.sparse_csr_tensor(
        pairs.first, pairs.source, zeros, size, check_invariants=False
    )
    mixed = []
    for head in range(HEADS):
        product = torch.sparse.sampled_addmm(pattern, query[:, head], key[:, head].T, beta=0.0)
        weight = softmax_by_target(product.values()[:, None], pairs).squeeze(1)
        rows = value[:, head].contiguous()
        mixed.append(
            F.embedding_bag(
                pairs.source,
                rows,
                pairs.first,
                mode="sum",
                per_sample_weights=weight,
                include_last_offset=True,
            )
        )
    return torch.stack(mixed, dim=1)


IMPLEMENTATIONS = {
    "fused": attend_fused,
    "plain": attend_plain,
    "edge list": attend_edge_list,
    "CSR": attend_csr,
}


def attention_calls(n, links, seed):
    """({implementation: its call}, Pairs, tokens); a call returns gradients."""
    rng = core.stream(seed, "train")
    keep = torch.from_numpy(rng.random((n, n)) < links / n).fill_diagonal_(True)
    drawn = torch.from_numpy(rng.standard_normal((4, n, HEADS, DIM // HEADS), np.float32))
    *inputs, direction = drawn
    for x in inputs:
        x.requires_grad_()
    pairs = join_pairs(keep)

    def call(attend):
        return torch.autograd.grad(attend(*inputs, pairs), inputs, direction)

    calls = {name: functools.partial(call, attend) for name, attend in IMPLEMENTATIONS.items()}
    return calls, pairs, n


def smaller_calls(n, links, seed):
    """{name: call} on a graph with a quarter of the nodes, or a third of the links per node."""
    fewer_nodes, _, _ = attention_calls(n // 4, links, seed)
    fewer_links, _, _ = attention_calls(n, links / 3, seed)
    return {
        "fused, a quarter of the nodes": fewer_nodes["fused"],
        "edge list, a third of the links": fewer_links["edge list"],
        "CSR, a third of the links": fewer_links["CSR"],
    }


class LinkLayer(core.GraphLayer):
    """A GraphLayer along an edge list: bias [E, H] in place of [B, H, N, N]."""

    def forward(self, x, bias, batch):
        inputs = self.inputs(self.norm1(x)).unflatten(2, (3, self.heads, -1)).flatten(0, 1)
        query, key, value = inputs.unbind(1)
        query = query / math.sqrt(query.shape[2])
        mixed = attend_edge_list(query, key, value, batch.pairs, bias)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.last(self.first(self.norm2(x)).relu())


class LinkReader(core.QuestionReader):
    """A QuestionReader along an edge list."""

    def attention_bias(self, batch):
        types = len(core.NODE_TYPES)
        node_type = batch.node_type.flatten()
        pair = node_type[batch.pairs.target] * types + node_type[batch.pairs.source]
        return F.embedding(batch.link_of_pair * types**2 + pair, self.link_bias)


def reader_calls(facts, seed):
    """The same for the question reader."""
    half = facts // 2
    world = core.World(half, facts=facts, passages=half)
    source = core.QuestionSource(world, (2,))
    questions = source.draw(core.stream(seed, "train"), QUESTIONS)
    batch = core.QuestionBatch(questions)
    batch.pairs = join_pairs(batch.link != core.NO_LINK)
    batch.link_of_pair = batch.link[batch.pairs.keep]

    def call(make_reader, make_layer):
        with core.initialised_from(seed):
            layers = [make_layer(DIM, HEADS)] * LAYERS
            reader = make_reader(len(source.words), DIM, HEADS, layers)
        return functools.partial(gradients, reader)

    def gradients(reader):
        loss = F.cross_entropy(reader(batch), batch.answer)
        return torch.autograd.grad(loss, list(reader.parameters()))

    calls = {
        "plain": call(core.QuestionReader, core.GraphLayer),
        "edge list": call(LinkReader, LinkLayer),
    }
    return calls, batch.pairs, sum(slot == core.TEXT for slot in questions[0].slot)


CLAIMS = [
    Claim(
        "The time of fused attention grows with the square of the length, from 1024 to 4096 nodes",
        OURS,
        Check(
            "fused's time / at a quarter of the nodes",
            between=(12, 20),
            arm="4096 nodes, 8 links each",
        ),
    ),
    Claim(
        "From 100 to 300 links per node, time along links grows like their number, "
        "for edge list and CSR",
        OURS,
        Check(
            "edge list's time / at a third of the links",
            between=(2.4, 3.6),
            arm="1024 nodes, 300 links each",
        ),
        Check(
            "CSR's time / at a third of the links",
            between=(2.4, 3.6),
            arm="1024 nodes, 300 links each",
        ),
    ),
    Claim(
        "With 8 links per node an edge list is faster than fused attention at 1024, 2048 and "
        "4096 nodes; with 100 links it is slower at 1024",
        OURS,
        Check("edge list's time / fused's", below=1, arm="1024 nodes, 8 links each"),
        Check("edge list's time / fused's", below=1, arm="2048 nodes, 8 links each"),
        Check("edge list's time / fused's", below=1, arm="4096 nodes, 8 links each"),
        Check("edge list's time / fused's", above=1, arm="1024 nodes, 100 links each"),
    ),
    Claim(
        "Against plain attention, an edge list saves the question reader time and memory at 256 "
        "facts, and costs more of both at 16",
        OURS,
        Check("edge list's time / plain's", below=1, arm="reader, 256 facts"),
        Check("edge list's memory / plain's", below=1, arm="reader, 256 facts"),
        Check("edge list's time / plain's", above=1, arm="reader, 16 facts"),
        Check("edge list's memory / plain's", above=1, arm="reader, 16 facts"),
    ),
]


def plot(run):
    """{name of the file: figure}."""
    return {
        "length": draw_sweep(
            run,
            "With 8 links per node an edge list is faster than fused at 1024 to 4096 nodes",
            "Attention on random graphs, 8 links per node",
            "nodes",
            [
                "512 nodes, 8 links each",
                "1024 nodes, 8 links each",
                "2048 nodes, 8 links each",
                "4096 nodes, 8 links each",
            ],
        ),
        "density": draw_sweep(
            run,
            "Where a tenth of the pairs is joined, fused attention is fastest",
            "Attention on random graphs of 1024 nodes",
            "share of joined pairs",
            [
                "1024 nodes, 8 links each",
                "1024 nodes, 100 links each",
                "1024 nodes, 300 links each",
            ],
        ),
        "reader": draw_sweep(
            run,
            "The question reader gains time and memory by an edge list at 256 facts, not at 16",
            "The question reader on 4 questions of 16, 64 and 256 facts",
            "tokens",
            ["reader, 16 facts", "reader, 64 facts", "reader, 256 facts"],
        ),
    }


def draw_sweep(run, title, shows, size, arms):
    """Time, memory and FLOPs against a size: dots for seeds, lines for means; None without arms."""
    arms = [arm for arm in arms if run.shows(arm)]
    if not arms:
        return None
    figure, axes = core.new_figure(run, title, shows, columns=3, width=11.0, height=3.8)
    x = [run.values(arm, size) for arm in arms]
    for axis, (measure, unit) in zip(axes[0], UNITS.items(), strict=True):
        for name, colour in zip(IMPLEMENTATIONS, core.MORE_COLOURS, strict=False):
            y = [run.values(arm, f"{name}, {unit}") for arm in arms]
            if np.isnan(y).any():
                continue
            style = ":" if name == "CSR" else "-"  # where it lies on the edge list
            axis.plot(np.mean(x, 1), np.mean(y, 1), style, color=colour, linewidth=2, label=name)
            axis.plot(x, y, ".", color=colour, markersize=5)
        axis.set(xscale="log", yscale="log", xlabel=size, title=f"{measure}, {unit}")
        axis.set_xticks(np.mean(x, 1), [core.format_number(one) for one in np.mean(x, 1)])
        axis.xaxis.minorticks_off()
    axes[0, 0].legend(fontsize=9)
    return figure


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY, timing=True)
