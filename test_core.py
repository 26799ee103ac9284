"""core.py against independent oracles: torch's own, NumPy, exact counts; then the harness."""

import argparse
import contextlib
import csv
import importlib.util
import itertools
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import tracemalloc
import urllib.parse
from fractions import Fraction
from pathlib import Path

import core
import exp_attention_ablation as ablation
import exp_query_node as query_node
from core import OURS, Check, Claim

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.signal import convolve2d
from scipy.sparse import csgraph
from torch import nn

DIM = 8


@pytest.fixture(autouse=True)
def one_thread_and_fixed_draws():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_graph(n, edges, seed=0):
    """A core.Graph of n nodes with these edges, random symbols and alternating labels."""
    adjacency = np.zeros((n, n), dtype=bool)
    for i, j in edges:
        adjacency[i, j] = adjacency[j, i] = True
    feature = np.random.default_rng(seed).integers(core.SYMBOLS, size=n, dtype=np.uint8)
    label = (np.arange(n) % 2).astype(np.uint8)
    bits = [adjacency[i, j] for i in range(n) for j in range(i + 1, n)]
    return core.Graph(np.packbits(bits), feature, label, 0, np.full(n, -1))


SPARSE = make_graph(9, [(0, 1), (1, 2), (2, 3), (3, 4), (1, 5), (5, 6), (2, 7), (7, 8), (0, 5)])
ISLANDS = make_graph(6, [(0, 1), (1, 2), (3, 4)], seed=1)  # node 5 has no edge
TRIANGLE = make_graph(3, [(0, 1), (1, 2), (0, 2)], seed=2)
GRAPHS = [ISLANDS, SPARSE, TRIANGLE]


def rows_of(graphs, index):
    """The packed rows of one graph."""
    start = sum(len(graph.feature) for graph in graphs[:index])
    return slice(start, start + len(graphs[index].feature))


def random_nodes(batch, dim=DIM, seed=0):
    """[V, dim] with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(batch.label), dim, generator=generator, requires_grad=True)


def randomised(module, seed=0):
    """The module with every parameter drawn anew, so that none is 0 or 1 by its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.7, generator=generator)
    return module


def gradients(output, *inputs):
    """Gradients of a fixed random projection of the output."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    return torch.autograd.grad((output * weight).sum(), inputs, retain_graph=True)


def differs(a, b):
    """Whether two results differ by more than rounding."""
    return bool((a - b).norm() > 1e-4 * b.norm())


def numpy_of(tensor):
    return tensor.detach().double().numpy()


def assert_close(found, expected, rtol=1e-4, atol=1e-4):
    """Tensors, arrays or lists agree to the precision of float32; NaN equals NaN."""
    found, expected = (numpy_of(x) if torch.is_tensor(x) else x for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol, atol)


def affine(linear, x):
    """nn.Linear in NumPy's float64."""
    return x @ numpy_of(linear.weight).T + numpy_of(linear.bias)


def adjacency_of(graphs):
    """Block-diagonal adjacency of the packed nodes, [V, V] float64."""
    n = sum(len(graph.feature) for graph in graphs)
    adjacency = np.zeros((n, n))
    for b, graph in enumerate(graphs):
        rows = rows_of(graphs, b)
        adjacency[rows, rows] = graph.adjacency()
    return adjacency


# Seeds


def test_streams_are_repeatable_and_independent():
    assert core.stream(3, "train", 5).random() == core.stream(3, "train", 5).random()
    keys = [
        (3, "train", 5),
        (3, "train", 6),
        (4, "train", 5),
        (3, "val", 5),
        (3, "train"),
        (3, "train", 5, 0),
    ]
    assert len({core.stream(*key).random() for key in keys}) == len(keys)


def test_initial_weights_depend_on_the_seed_alone():
    def weight(seed):
        with core.initialised_from(seed):
            return nn.Linear(4, 4).weight

    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = weight(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(weight(5), one)
    assert differs(weight(6), one)


# Data


def test_graph_stores_its_adjacency():
    edges = [(0, 3), (1, 2), (4, 2)]
    expected = np.zeros((5, 5), dtype=bool)
    for i, j in edges:
        expected[i, j] = expected[j, i] = True
    adjacency = make_graph(5, edges).adjacency()
    assert adjacency.dtype == bool
    np.testing.assert_array_equal(adjacency, expected)


@pytest.mark.parametrize("index", [0, 99, 100, 9999])
def test_graph_holds_its_pattern(index):
    data = core.PatternData(0)
    graph = data[index]
    pattern = data.pattern(index)
    place = np.flatnonzero(graph.label)
    source = graph.source[place]

    assert graph.pattern == index // 100
    assert sorted(source) == list(range(len(pattern.feature)))
    assert (graph.source[graph.label == 0] == -1).all()
    inside = graph.adjacency()[np.ix_(place, place)]
    np.testing.assert_array_equal(inside, pattern.adjacency[np.ix_(source, source)])
    np.testing.assert_array_equal(graph.feature[place], pattern.feature[source])


def test_splits_share_patterns():
    train = core.PatternData(1)
    val = core.PatternData(1, "val")
    test = core.PatternData(1, "test")
    assert (len(train), len(val), len(test)) == (10_000, 2_000, 2_000)
    for split in (val, test):
        np.testing.assert_array_equal(train.pattern(250).adjacency, split.pattern(50).adjacency)
        assert not np.array_equal(train[200].edges, split[40].edges)
    assert {graph.pattern for graph in train.first(32)} == {0}


def test_fresh_patterns_are_never_shared():
    def text(pattern):
        return pattern.adjacency.tobytes() + pattern.feature.tobytes()

    train = core.PatternData(1)
    fresh = core.PatternData(1, fresh=True)
    known = {text(train.pattern(100 * i)) for i in range(100)}
    drawn = {text(fresh.pattern(i)) for i in range(50)}
    drawn |= {text(core.PatternData(1, "test", fresh=True).pattern(i)) for i in range(50)}
    assert len(drawn) == 100
    assert not known & drawn
    assert [graph.pattern for graph in fresh.first(3)] == [0, 1, 2]


def test_any_graph_can_be_drawn_by_itself():
    in_order = core.PatternData(2).first(4)[3]
    alone = core.PatternData(2)[3]
    for a, b in zip(in_order, alone, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(core.PatternData(3)[3].edges, alone.edges)


def test_shuffled_graphs_are_a_part_of_the_split_in_an_order_of_the_seed():
    data = core.PatternData(3, "val")
    every = core.shuffled(data, len(data))
    numbers = [graph.pattern for graph in every]
    assert sorted(numbers) == sorted(index // data.per_pattern for index in range(len(data)))
    assert numbers != sorted(numbers)
    for ours, first in zip(core.shuffled(core.PatternData(3, "val"), 5), every, strict=False):
        assert np.array_equal(ours.edges, first.edges)
    assert [graph.pattern for graph in core.shuffled(core.PatternData(4, "val"), 50)] != numbers[
        :50
    ]


def test_graphs_outside_the_split_are_refused():
    data = core.PatternData(0, "val")
    for index in (-1, 2000):
        with pytest.raises(IndexError):
            data[index]
    with pytest.raises(core.UsageError, match="--graphs 2001"):
        data.first(2001)


def standard_error(p, n):
    return math.sqrt(p * (1 - p) / n)


def test_generator_draws_the_authors_process(monkeypatch):
    """Counts lie within five standard errors of their expectation.

    Which nodes share a community is seen by drawing the same graphs with chance 1 inside and
    chance 0 between: the communities are then cliques.
    """
    sample = core.PatternData(11, fresh=True).first(300)
    monkeypatch.setattr(core, "EDGE_INSIDE", 1.0)
    monkeypatch.setattr(core, "EDGE_BETWEEN", 0.0)
    revealed = core.PatternData(11, fresh=True).first(300)

    hidden_sizes = []
    block_sizes = []
    place = []
    edges = {"pattern": [], "joining": [], "inside": [], "between": []}
    for graph, clear in zip(sample, revealed, strict=True):
        adjacency = graph.adjacency()
        hidden = graph.label == 1
        hidden_sizes.append(hidden.sum())
        place.extend(np.flatnonzero(hidden) / (len(hidden) - 1))
        same = (clear.adjacency() | np.eye(len(hidden), dtype=bool))[~hidden][:, ~hidden]
        np.testing.assert_array_equal(same @ same, same)  # cliques without a link
        communities = np.unique(same, axis=0)
        assert len(communities) == 5
        block_sizes.extend(communities.sum(1))

        upper = np.triu(np.ones_like(same), 1)
        outside = adjacency[~hidden][:, ~hidden]
        edges["inside"].append(outside[same & upper])
        edges["between"].append(outside[~same & upper])
        edges["joining"].append(adjacency[hidden][:, ~hidden].ravel())
        within = adjacency[hidden][:, hidden]
        edges["pattern"].append(within[np.triu_indices(len(within), 1)])

    expected = {"pattern": 0.5, "joining": 0.5, "inside": 0.5, "between": 0.35}
    for name, p in expected.items():
        found = np.concatenate(edges[name])
        assert abs(found.mean() - p) < 5 * standard_error(p, len(found)), name
    for sizes in (hidden_sizes, block_sizes):  # uniform on 5, ..., 34
        assert (min(sizes), max(sizes)) == (5, 34)
        spread = math.sqrt((30**2 - 1) / 12 / len(sizes))
        assert abs(np.mean(sizes) - 19.5) < 5 * spread
    assert abs(np.mean(place) - 0.5) < 5 * math.sqrt(1 / 12 / len(place))

    symbols = np.concatenate([graph.feature for graph in sample])
    share = np.bincount(symbols, minlength=3) / len(symbols)
    assert np.abs(share - 1 / 3).max() < 5 * standard_error(1 / 3, len(symbols))


@pytest.mark.parametrize("padding", [False, True])
def test_batch_holds_its_graphs(padding):
    batch = core.GraphBatch(GRAPHS, padding=padding)
    assert batch.shape == (3, 9)
    assert len(batch.label) == (27 if padding else 18)
    for b, graph in enumerate(GRAPHS):
        n = len(graph.feature)
        adjacency = torch.from_numpy(graph.adjacency()).float()
        rows = slice(9 * b, 9 * b + n) if padding else rows_of(GRAPHS, b)
        assert torch.equal(batch.adjacency[b], F.pad(adjacency, (0, 9 - n, 0, 9 - n)))
        assert batch.nodes[b].tolist() == [True] * n + [False] * (9 - n)
        assert batch.label[rows].tolist() == graph.label.tolist()
        assert batch.feature[rows].tolist() == graph.feature.tolist()
        assert torch.equal(batch.degree[rows], adjacency.sum(1))
        assert batch.size[rows].tolist() == [n] * n
        if padding:
            rest = slice(9 * b + n, 9 * b + 9)
            assert batch.label[rest].tolist() == [core.IGNORED] * (9 - n)
            assert batch.degree[rest].tolist() == [0] * (9 - n)


def test_pad_places_each_graph_in_its_own_row_and_pack_undoes_it():
    batch = core.GraphBatch(GRAPHS)
    x = random_nodes(batch)
    padded = batch.pad(x)
    for b, graph in enumerate(GRAPHS):
        n = len(graph.feature)
        assert torch.equal(padded[b, :n], x[rows_of(GRAPHS, b)])
        assert padded[b, n:].eq(0).all()
    assert torch.equal(batch.pack(padded), x)


# Masks

KEEP = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()


def wild(logits, keep):
    """The logits with other values, infinite ones too, where the mask drops them."""
    other = torch.full_like(logits, 1e30)
    other[:, ::2] = math.inf
    other[:, 1] = math.nan
    return torch.where(keep, logits, other).detach().requires_grad_()


def test_masked_softmax_is_a_softmax_of_what_is_kept():
    logits = torch.randn(4, 4, dtype=torch.double, requires_grad=True)
    weight = core.masked_softmax(logits, KEEP)
    assert_close(weight[0], logits[0].softmax(0))
    assert_close(weight[1, ::2], logits[1, ::2].softmax(0))
    assert weight[2].eq(0).all()  # a row that keeps nothing
    assert weight[3].tolist() == [0, 0, 0, 1]
    assert torch.autograd.gradcheck(lambda x: core.masked_softmax(x, KEEP), logits)


def test_masked_softmax_takes_another_dimension():
    logits = torch.randn(4, 4)
    turned = core.masked_softmax(logits.T, KEEP.T, dim=0).T
    assert_close(turned, core.masked_softmax(logits, KEEP))


def test_masked_sigmoid_is_a_sigmoid_of_what_is_kept():
    logits = torch.randn(4, 4, dtype=torch.double, requires_grad=True)
    gate = core.masked_sigmoid(logits, KEEP)
    assert_close(gate, torch.where(KEEP, 1 / (1 + torch.exp(-logits)), 0.0))
    assert torch.autograd.gradcheck(lambda x: core.masked_sigmoid(x, KEEP), logits)


@pytest.mark.parametrize("activation", [core.masked_softmax, core.masked_sigmoid])
def test_masked_entries_leak_nothing(activation):
    logits = torch.randn(4, 4, requires_grad=True)
    other = wild(logits, KEEP)
    weight = activation(logits, KEEP)
    assert torch.equal(activation(other, KEEP), weight)
    assert weight[~KEEP].eq(0).all()

    (grad,) = gradients(weight, logits)
    (other_grad,) = gradients(activation(other, KEEP), other)
    assert torch.equal(other_grad, grad)
    assert grad[~KEEP].eq(0).all()
    assert grad[0].ne(0).all()


def power_vectors(graph, powers, encoding):
    """What core.pair_encoding promises, for one graph in NumPy's float64: [n, n, K]."""
    adjacency = graph.adjacency().astype(np.float64)
    n = len(adjacency)
    step = np.zeros((n, n))
    for i in range(n):
        for j in np.flatnonzero(adjacency[i]):
            step[i, j] = 1 / adjacency[i].sum()
    vectors = np.stack([np.linalg.matrix_power(step, k) for k in powers], -1)
    if encoding == "powers":
        return vectors
    hop = np.zeros_like(vectors)
    for i, j in itertools.product(range(n), range(n)):
        met = np.flatnonzero(vectors[i, j])
        if len(met):
            hop[i, j, met[0]] = 1
    return hop


@pytest.mark.parametrize("encoding", ["powers", "hop"])
@pytest.mark.parametrize("powers", [(0, 1), (1,), (0, 2), (0, 1, 2, 3)])
def test_pair_encoding_against_numpy(powers, encoding):
    batch = core.GraphBatch(GRAPHS)
    vectors, reachable = core.pair_encoding(batch, powers, encoding)
    for b, graph in enumerate(GRAPHS):
        n = len(graph.feature)
        expected = power_vectors(graph, powers, encoding)
        found = vectors[b, :, :n, :n].permute(1, 2, 0)
        assert_close(found, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(reachable[b, :n, :n], expected.any(-1))
        for padding in (vectors[b, :, n:], vectors[b, :, :, n:], reachable[b, n:]):
            assert not padding.any()
        assert not reachable[b, :, n:].any()


def test_hops_are_shortest_paths():
    batch = core.GraphBatch([ISLANDS])
    hops, reachable = core.pair_encoding(batch, (0, 1, 2), "hop")
    distance = csgraph.shortest_path(ISLANDS.adjacency().astype(float), unweighted=True)
    for k in range(3):
        np.testing.assert_array_equal(hops[0, k], distance == k)
    np.testing.assert_array_equal(reachable[0], np.isfinite(distance))


def test_pair_encoding_is_computed_once_per_batch_and_kind():
    batch = core.GraphBatch(GRAPHS)
    hops, _ = core.pair_encoding(batch, (0, 1), "hop")
    assert core.pair_encoding(batch, [0, 1], "hop")[0] is hops
    assert core.pair_encoding(batch, (0, 1), "powers")[0] is not hops
    assert core.pair_encoding(batch, (0, 2), "hop")[0] is not hops


# Layers


@pytest.mark.parametrize("gate_bias", ["none", "graph", "degree"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("powers", [(0, 1), (1,), (0, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_mixing_by_hop_is_mixing_by_pair(heads, padding, powers, activation, gate_bias):
    batch = core.GraphBatch(GRAPHS, padding=padding)
    layer = core.PositionAttention(DIM, heads, powers, activation=activation, gate_bias=gate_bias)
    randomised(layer)
    x = random_nodes(batch)
    inputs = (x, *layer.pair.parameters())
    by_hop = layer.mix_by_hop(x, batch)
    by_pair = layer.mix_by_pair(x, batch)
    assert_close(by_hop, by_pair)
    for a, b in zip(gradients(by_hop, *inputs), gradients(by_pair, *inputs), strict=True):
        assert_close(a, b, rtol=1e-3)


def attention_oracle(layer, graph, x, settings):
    """PositionAttention of one graph, node by node and head by head in NumPy's float64."""
    vectors = power_vectors(graph, settings["powers"], settings["encoding"])
    weight = numpy_of(layer.pair.weight)
    bias = numpy_of(layer.pair.bias)
    value = affine(layer.value, x)
    n = len(value)
    width = DIM // settings["heads"]
    counted = {"none": np.ones(n), "graph": np.full(n, n), "degree": 1 + graph.adjacency().sum(1)}
    mixed = np.zeros_like(value)
    for i, h in itertools.product(range(n), range(settings["heads"])):
        logit = np.full(n, settings["unreachable"], dtype=np.float64)
        for j in np.flatnonzero(vectors[i].any(-1)):
            logit[j] = weight[h] @ vectors[i, j] + bias[h]
        logit -= np.log(counted[settings["gate_bias"]][i])
        weights = np.exp(logit)
        if settings["activation"] == "sigmoid":
            weights = weights / (1 + weights)
        elif weights.any():
            weights = weights / weights.sum()
        head = slice(h * width, (h + 1) * width)
        mixed[i, head] = weights @ value[:, head]
    return affine(layer.out, mixed / settings["divide_by"])


@pytest.mark.parametrize("gate_bias", ["none", "graph", "degree"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("encoding", ["hop", "powers"])
@pytest.mark.parametrize("powers", [(0, 1, 2), (1, 2)])
@pytest.mark.parametrize("unreachable, divide_by", [(-math.inf, 1.0), (-math.inf, 3.0), (0.7, 3.0)])
def test_position_attention_against_numpy(
    powers, encoding, activation, unreachable, divide_by, gate_bias
):
    settings = {
        "heads": 2,
        "powers": powers,
        "encoding": encoding,
        "activation": activation,
        "unreachable": unreachable,
        "divide_by": divide_by,
        "gate_bias": gate_bias,
    }
    layer = randomised(core.PositionAttention(DIM, **settings))
    if unreachable > -math.inf:
        layer.unreachable.data.fill_(unreachable)  # as it was before randomised()
    batch = core.GraphBatch(GRAPHS)
    x = random_nodes(batch)
    found = layer(x, batch)
    for b, graph in enumerate(GRAPHS):
        rows = rows_of(GRAPHS, b)
        expected = attention_oracle(layer, graph, numpy_of(x)[rows], settings)
        assert_close(found[rows], expected)


def test_unreachable_logit_is_learned_per_head_or_masked():
    assert core.PositionAttention(DIM, 2).unreachable is None
    layer = randomised(core.PositionAttention(DIM, 2, unreachable=-1.5))
    started = core.PositionAttention(DIM, 2, unreachable=-1.5)
    assert started.unreachable.tolist() == [-1.5, -1.5]
    batch = core.GraphBatch(GRAPHS)
    (grad,) = gradients(layer(random_nodes(batch), batch), layer.unreachable)
    assert grad.abs().min() > 1e-3

    islands = rows_of(GRAPHS, 0)
    x = random_nodes(batch)
    other = x.detach().clone()
    other[islands][3:] += 1  # no path from here to nodes 0, 1, 2
    apart = randomised(core.PositionAttention(DIM, 2))
    assert torch.equal(apart(other, batch)[:3], apart(x, batch)[:3])
    assert differs(layer(other, batch)[:3], layer(x, batch)[:3])


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("encoding", ["hop", "powers"])
def test_node_that_reaches_nothing_takes_in_nothing(encoding, activation):
    batch = core.GraphBatch([ISLANDS])
    layer = core.PositionAttention(DIM, 2, (1,), encoding, activation)
    x = random_nodes(batch)
    out = layer(x, batch)
    assert_close(out[5], layer.out.bias)
    assert differs(out[3], layer.out.bias)
    for grad in gradients(out, x, *layer.parameters()):
        assert grad.isfinite().all()


def test_open_gates_sum_like_gin():
    batch = core.GraphBatch(GRAPHS)
    layer = core.PositionAttention(DIM)
    with torch.no_grad():
        layer.pair.weight.zero_()
        layer.pair.bias.fill_(100.0)  # sigmoid is 1 in float32
    x = random_nodes(batch)
    expected = numpy_of(x) + adjacency_of(GRAPHS) @ numpy_of(x)
    assert_close(layer.mix_by_hop(x, batch), expected)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="3 heads do not divide width 8"):
        core.PositionAttention(DIM, heads=3)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relu(x):
    return np.maximum(x, 0)


def batch_norm(norm, x):
    """nn.BatchNorm1d in training mode, in NumPy's float64."""
    scaled = (x - x.mean(0)) / np.sqrt(x.var(0) + norm.eps)
    return scaled * numpy_of(norm.weight) + numpy_of(norm.bias)


def layer_norm(norm, x):
    """nn.LayerNorm in NumPy's float64."""
    mean = x.mean(1, keepdims=True)
    variance = x.var(1, keepdims=True)
    scaled = (x - mean) / np.sqrt(variance + norm.eps)
    return scaled * numpy_of(norm.weight) + numpy_of(norm.bias)


NORMS = {"batch": batch_norm, "layer": layer_norm, "none": lambda norm, x: x}


@pytest.mark.parametrize("heads", [1, 2])
def test_content_attention_is_torchs_multihead_attention(heads):
    batch = core.GraphBatch(GRAPHS)
    x = random_nodes(batch)
    ours = randomised(core.ContentAttention(DIM, heads))
    theirs = torch.nn.MultiheadAttention(DIM, heads, batch_first=True)
    parts = (ours.query, ours.key, ours.value)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    out = ours(x, batch)
    for b in range(len(GRAPHS)):
        part = x[rows_of(GRAPHS, b)][None]
        expected = theirs(part, part, part, need_weights=False)[0][0]
        assert_close(out[rows_of(GRAPHS, b)], expected, rtol=1e-3)
    assert all(grad.isfinite().all() for grad in gradients(out, x, *ours.parameters()))


def test_content_attention_adds_a_bias_per_hop_and_head():
    batch = core.GraphBatch([SPARSE])
    x = random_nodes(batch)
    layer = randomised(core.ContentAttention(DIM, 2, (0, 1, 2)))
    hops = power_vectors(SPARSE, (0, 1, 2), "hop")
    bias = hops @ numpy_of(layer.pair.weight).T + numpy_of(layer.pair.bias)
    query, key, value = (
        affine(part, numpy_of(x)) for part in (layer.query, layer.key, layer.value)
    )
    mixed = np.zeros_like(value)
    for h, head in enumerate((slice(0, DIM // 2), slice(DIM // 2, DIM))):
        logits = query[:, head] @ key[:, head].T / np.sqrt(DIM // 2) + bias[..., h]
        weights = np.exp(logits - logits.max(1, keepdims=True))
        mixed[:, head] = weights / weights.sum(1, keepdims=True) @ value[:, head]
    assert_close(layer(x, batch), affine(layer.out, mixed), rtol=1e-3)


def test_content_attention_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError):
        core.ContentAttention(DIM, DIM + 1)


def test_add_degree_against_numpy():
    batch = core.GraphBatch(GRAPHS)
    x = random_nodes(batch)
    layer = randomised(core.AddDegree(DIM))
    share = [graph.adjacency().sum(1) / (len(graph.feature) - 1) for graph in GRAPHS]
    expected = numpy_of(x) + affine(layer.project, np.concatenate(share)[:, None])
    assert_close(layer(x, batch), expected)


@pytest.mark.parametrize("divide_by", [1.0, 7.0])
def test_bare_gating_against_numpy(divide_by):
    batch = core.GraphBatch(GRAPHS)
    x = random_nodes(batch)
    layer = core.BareGating(divide_by)
    nodes = numpy_of(x)
    neighbours = adjacency_of(GRAPHS) @ nodes
    start = (0.5 * nodes + 0.5 * neighbours) / divide_by
    assert_close(layer(x, batch), start)

    randomised(layer)
    w1, w2 = layer.w1.item(), layer.w2.item()
    expected = (sigmoid(w1) * nodes + sigmoid(w2) * neighbours) / divide_by
    assert_close(layer(x, batch), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_feedforward_against_numpy(norm):
    batch = core.GraphBatch(GRAPHS)
    x = random_nodes(batch)
    layer = randomised(core.FeedForward(DIM, 12, norm))
    hidden = relu(NORMS[norm](layer.norm, affine(layer.first, numpy_of(x))))
    assert_close(layer(x), affine(layer.last, hidden), rtol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_relu_in_place_keeps_the_gradients(norm):
    x = torch.randn(18, DIM, requires_grad=True)
    layer = randomised(core.FeedForward(DIM, 12, norm))
    copied = layer.last(layer.norm(layer.first(x)).relu())
    inputs = (x, *layer.parameters())
    found = gradients(layer(x), *inputs)
    for a, b in zip(found, gradients(copied, *inputs), strict=True):
        assert_close(a, b, rtol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_transformer_layer_normalises_before_each_part(norm):
    batch = core.GraphBatch(GRAPHS)
    x = random_nodes(batch)
    layer = core.TransformerLayer(core.BareGating(), core.FeedForward(DIM, 12), DIM, norm)
    randomised(layer)
    apply_norm = NORMS[norm]

    nodes = numpy_of(x)
    inner = apply_norm(layer.norm1, nodes)
    own = sigmoid(layer.mixing.w1.item())
    gate = sigmoid(layer.mixing.w2.item())
    half = nodes + own * inner + gate * adjacency_of(GRAPHS) @ inner
    feedforward = layer.feedforward
    hidden = relu(affine(feedforward.first, apply_norm(layer.norm2, half)))
    expected = half + affine(feedforward.last, hidden)
    assert_close(layer(x, batch), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("divide_by", [1.0, 7.0])
def test_gin_layer_against_numpy(divide_by):
    batch = core.GraphBatch(GRAPHS)
    x = random_nodes(batch)
    layer = core.GINLayer(DIM, divide_by)
    assert layer.eps.item() == 0
    randomised(layer)

    nodes = numpy_of(x)
    total = (1 + layer.eps.item()) * nodes + adjacency_of(GRAPHS) @ relu(nodes)
    mlp = layer.mlp
    hidden = relu(batch_norm(mlp.norm, affine(mlp.first, total / divide_by)))
    expected = nodes + relu(batch_norm(layer.norm, affine(mlp.last, hidden)))
    assert_close(layer(x, batch), expected, rtol=1e-3, atol=1e-3)


def attention_layer(**changes):
    return core.PositionAttention(DIM, **changes)


def transformer_layer(norm="layer", **changes):
    feedforward = core.FeedForward(DIM, 12)
    return core.TransformerLayer(attention_layer(**changes), feedforward, DIM, norm)


def content_layer(**changes):
    return core.ContentAttention(DIM, **changes)


def gin_layer(**changes):
    return core.GINLayer(DIM, **changes)


def in_eval(build, **changes):
    """The layer as seed 0 makes it, in evaluation mode, where batch norm keeps its scale."""
    with core.initialised_from(0):
        return build(**changes).eval()


@pytest.mark.parametrize(
    "build, change",
    [
        (attention_layer, {"heads": 2}),
        (attention_layer, {"powers": (0, 1, 2)}),
        (attention_layer, {"encoding": "powers"}),
        (attention_layer, {"activation": "softmax"}),
        (attention_layer, {"unreachable": 0.0}),
        (attention_layer, {"divide_by": 3.0}),
        (attention_layer, {"gate_bias": "graph"}),
        (attention_layer, {"gate_bias": "degree"}),
        (content_layer, {"heads": 2}),
        (content_layer, {"powers": (0, 1)}),
        (transformer_layer, {"norm": "batch"}),
        (transformer_layer, {"norm": "none"}),
        (core.BareGating, {"divide_by": 3.0}),
        (gin_layer, {"divide_by": 3.0}),
    ],
)
def test_every_argument_of_a_layer_changes_its_result(build, change):
    batch = core.GraphBatch(GRAPHS)
    x = random_nodes(batch)
    assert differs(in_eval(build, **change)(x, batch), in_eval(build)(x, batch))


@pytest.mark.parametrize("change", [{"norm": "layer"}, {"norm": "batch"}])
def test_every_argument_of_the_feedforward_changes_its_result(change):
    def build(norm="none"):
        with core.initialised_from(0):
            return core.FeedForward(DIM, 12, norm)

    x = torch.randn(18, DIM)
    assert differs(build(**change)(x), build()(x))


MIXINGS = {
    "gating by hop": lambda: attention_layer(heads=2, powers=(0, 1, 2)),
    "softmax by hop": lambda: attention_layer(heads=2, activation="softmax"),
    "gating by power": lambda: attention_layer(encoding="powers", gate_bias="graph"),
    "softmax with unreachable pairs": lambda: attention_layer(
        activation="softmax", unreachable=0.5
    ),
    "gating with unreachable pairs": lambda: attention_layer(unreachable=0.5),
    "content attention": lambda: content_layer(heads=2),
    "content attention with distance": lambda: content_layer(powers=(0, 1)),
    "degree as an input": lambda: core.AddDegree(DIM),
    "bare gating": core.BareGating,
    "transformer layer": transformer_layer,
    "GIN": gin_layer,
}


@pytest.mark.parametrize("name", MIXINGS)
def test_padding_leaks_nothing(name):
    """What stands in the padding reaches no real node, forward or backward."""
    layer = randomised(in_eval(MIXINGS[name]))
    packed = core.GraphBatch(GRAPHS)
    padded = core.GraphBatch(GRAPHS, padding=True)
    real = padded.label != core.IGNORED
    x = random_nodes(padded)
    out = layer(x, padded)[real]
    moved = torch.where(real[:, None], x, x + 100)
    assert torch.equal(layer(moved, padded)[real], out)
    (grad,) = gradients(out, x)
    assert grad[~real].eq(0).all()
    assert grad[real].ne(0).any(1).all()
    assert_close(layer(x[real], packed), out)


@pytest.mark.parametrize("name", MIXINGS)
def test_graphs_of_a_batch_leak_nothing_into_each_other(name):
    layer = randomised(in_eval(MIXINGS[name]))
    batch = core.GraphBatch(GRAPHS)
    x = random_nodes(batch)
    out = layer(x, batch)
    for b, graph in enumerate(GRAPHS):
        rows = rows_of(GRAPHS, b)
        alone = layer(x[rows], core.GraphBatch([graph]))
        assert_close(out[rows], alone)
        (grad,) = gradients(out[rows], x)
        assert grad[rows].ne(0).any()
        grad[rows] = 0
        assert grad.eq(0).all()


# Models


def test_subtract_mean_against_numpy():
    x = torch.randn(18, DIM) + 3
    expected = numpy_of(x) - numpy_of(x).mean(0)
    assert_close(core.SubtractMean()(x), expected)


@pytest.mark.parametrize("before_readout", [None, core.SubtractMean()])
def test_node_classifier_against_numpy(before_readout):
    batch = core.GraphBatch(GRAPHS)
    layers = [core.BareGating(), core.BareGating(divide_by=3.0)]
    model = randomised(core.NodeClassifier(layers, DIM, before_readout))
    symbols = np.concatenate([graph.feature for graph in GRAPHS])
    x = affine(model.embed, np.eye(3)[symbols])
    for layer, divide_by in zip(layers, (1.0, 3.0), strict=True):
        neighbours = adjacency_of(GRAPHS) @ x
        own, gate = sigmoid(layer.w1.item()), sigmoid(layer.w2.item())
        x = (own * x + gate * neighbours) / divide_by
    if before_readout is not None:
        x = x - x.mean(0)
    expected = affine(model.readout, x)
    assert_close(model(batch), expected)


@pytest.mark.parametrize("name", MIXINGS)
def test_models_follow_a_renumbering_of_the_nodes(name):
    with core.initialised_from(0):
        model = core.NodeClassifier([MIXINGS[name](), MIXINGS[name]()], DIM).eval()
    order = [3, 0, 8, 5, 1, 7, 2, 6, 4]
    place = {node: i for i, node in enumerate(order)}
    row, column = np.nonzero(SPARSE.adjacency())
    edges = [(place[i], place[j]) for i, j in zip(row, column, strict=True)]
    renumbered = make_graph(9, edges)._replace(feature=SPARSE.feature[order])
    found = model(core.GraphBatch([renumbered]))
    expected = model(core.GraphBatch([SPARSE]))[order]
    assert_close(found, expected, rtol=1e-3)


# Questions on graphs

SMALL_WORLD = core.World(entities=5, facts=9, passages=3, candidates=3, names=12)
WORLDS = [
    (1, core.World()),
    (2, core.World(restated=7, passages=5)),
    (3, SMALL_WORLD),
    (1, core.World(2, 3, 4, 0, 3, 2, 2)),
]
HAND_WRITTEN = {
    "start": "New York",
    "relations": ["twin of", "mayor"],
    "answer": "Ann Lee",
    "candidates": ["Ann Lee", "Bob"],
    "entities": ["New York City"],
    "passages": ["New York City is the twin of new york. Is it?", "Bob met ANN LEE! Leeds slept."],
}


def drawn(count=3, hops=2, seed=0, world=SMALL_WORLD):
    return core.draw_questions(np.random.default_rng(seed), count, hops, world)


def words_by_node(question):
    """{node: {slot: its words in order}}."""
    found = [{} for _ in question.node_type]
    for word, node, slot in zip(question.word, question.node, question.slot, strict=True):
        found[node].setdefault(slot, []).append(word)
    return found


def read_back(question):
    """(sentences, name of each entity node), from words alone; a sentence is (subject, relation,
    object, passage, step)."""
    words = words_by_node(question)
    mentions = [n for n, kind in enumerate(question.node_type) if kind == core.SUBJECT]
    sentences = []
    for subject in mentions:
        other = subject + 1
        assert question.node_type[other] == core.OBJECT
        assert question.sentence[other] == question.sentence[subject]
        assert question.step[other] == question.step[subject]
        assert words[subject][core.RELATION] == words[other][core.RELATION]
        fact = (*words[subject][core.NAME], *words[other][core.RELATION], *words[other][core.NAME])
        sentences.append((*fact, question.passage[subject], question.step[subject]))
    kinds = (core.ENTITY, core.CANDIDATE)
    entities = [n for n, kind in enumerate(question.node_type) if kind in kinds]
    return sentences, {n: words[n][core.NAME][0] for n in entities}


def every_chain(facts, hops):
    """All (relations, entities on the way) of different relations that meet no entity twice."""
    found = [((), (start,)) for start in sorted({fact[0] for fact in facts})]
    for _ in range(hops):
        found = [
            ((*relations, relation), (*path, other))
            for relations, path in found
            for one, relation, other in sorted(facts)
            if one == path[-1] and relation not in relations and other not in path
        ]
    return found


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_chains_are_all_there_are(hops):
    target = np.random.default_rng(hops).integers(-1, 4, (20, 4, 3))  # loops, too
    path, exists, orders = core.follow_chains(target, hops)
    assert sorted(map(tuple, orders)) == sorted(itertools.permutations(range(3), hops))
    for q in range(20):
        facts = {(e, r, int(target[q, e, r])) for e, r in np.ndindex(4, 3) if target[q, e, r] >= 0}
        seen = [
            (tuple(orders[c]), tuple(path[:, q, e, c]))
            for e, c in zip(*exists[q].nonzero(), strict=True)
        ]
        assert sorted(seen) == sorted(every_chain(facts, hops))
    assert exists.any()
    assert not exists.all()


@pytest.mark.parametrize(("hops", "world"), WORLDS, ids=str)
def test_a_drawn_question_has_one_answer_and_exact_guesses(hops, world):
    for question in drawn(20, hops, world=world):
        sentences, named = read_back(question)
        words = words_by_node(question)
        facts = {sentence[:3] for sentence in sentences}
        assert len({fact[:2] for fact in facts}) == len(facts) == world.facts
        assert all(one != other for one, _, other in facts)
        assert len(sentences) == world.facts + world.restated
        start = named[question.start]
        answer = named[question.answer]
        query = [words[0][slot][0] for slot in range(1 + hops)]
        chains = every_chain(facts, hops)
        (path,) = [
            path for relations, path in chains if relations == tuple(query[1:]) and path[0] == start
        ]
        assert query[0] == start
        assert path[-1] == answer
        candidates = [named[n] for n in named if question.node_type[n] == core.CANDIDATE]
        assert len(candidates) == world.candidates
        assert answer in candidates
        asked = [chain for chain in chains if chain[0] == tuple(query[1:])]
        for chance, known in ((question.query_blind, chains), (question.start_blind, asked)):
            ends = [path[-1] for _, path in known if path[-1] in candidates]
            assert math.isclose(chance, max(map(ends.count, ends)) / len(ends))
        for one, relation, other, _, step in sentences:
            gold = [
                i + 1
                for i in range(hops)
                if (one, relation, other) == (path[i], query[i + 1], path[i + 1])
            ]
            assert [step] == (gold or [0])
        homes = [sentence[3] for sentence in sentences]
        counts = [homes.count(home) for home in sorted(set(homes))]
        assert len(counts) == world.passages
        assert max(counts) <= min(counts) + 1
        for home in set(homes):
            stated = [sentence[:3] for sentence in sentences if sentence[3] == home]
            assert words[home] == {core.TEXT: list(itertools.chain(*stated))}
        assert len(set(named.values())) == world.entities
        assert all(2 <= name < 2 + world.names for name in named.values())
        assert all(2 + world.names <= fact[1] < 2 + world.names + world.relations for fact in facts)
        for node, entity in enumerate(question.entity):
            if entity >= 0:  # a mention belongs to the entity of its name
                assert words[node][core.NAME] == [named[entity]]


def test_a_drawn_question_is_uniform_among_its_chains():
    places = []
    answers = []
    for question in drawn(400, 2):
        sentences, named = read_back(question)
        nodes = {name: node for node, name in named.items()}
        chains = every_chain({sentence[:3] for sentence in sentences}, 2)
        chains = sorted((relations, tuple(nodes[e] for e in path)) for relations, path in chains)
        words = words_by_node(question)
        asked = (words[0][1][0], words[0][2][0])
        own = [relations == asked and path[0] == question.start for relations, path in chains]
        places.append((own.index(True) + 0.5) / len(chains))
        answers.append(question.answer)
    assert abs(np.mean(places) - 0.5) < 4 * np.sqrt(1 / 12 / 400)
    assert min(np.bincount(answers)[1:]) > 400 / 5 - 4 * np.sqrt(400 * 0.16)


def test_questions_are_repeatable_and_held_out_ones_the_same_for_all():
    source = core.QuestionSource(SMALL_WORLD, (1, 3))
    assert drawn() == drawn()
    assert drawn() != drawn(seed=1)
    held_out = source.held_out("test", 3)
    assert [[one.hops for one in questions] for questions in held_out.values()] == [
        [1] * 3,
        [3] * 3,
    ]
    assert held_out == core.QuestionSource(SMALL_WORLD, (3, 1)).held_out("test", 3)
    assert held_out != source.held_out("val", 3)
    hops = [one.hops for one in source.draw(core.stream(0, "train"), 200)]
    assert set(hops) == {1, 3}
    assert abs(hops.count(1) - 100) < 4 * np.sqrt(50)


@pytest.mark.parametrize(
    ("changes", "hops", "flag"),
    [
        ({}, (4,), "--hops 4"),
        ({"entities": 3, "candidates": 3, "facts": 8}, (3,), "--hops 3"),
        ({"relations": 2, "facts": 9}, (3,), "--hops 3"),
        ({"facts": 2, "passages": 2}, (3,), "--hops 3"),
        ({"candidates": 9}, (1,), "--candidates 9"),
        ({"names": 7}, (1,), "--entities 8"),
        ({"facts": 25}, (1,), "--facts 25"),
        ({"restated": 17}, (1,), "--restated 17"),
        ({"passages": 17}, (1,), "--passages 17"),
    ],
    ids=str,
)
def test_worlds_without_questions_are_refused(changes, hops, flag):
    with pytest.raises(core.UsageError, match=f"^{flag}: at most"):
        core.QuestionSource(core.World(**changes), hops)


def test_questions_of_no_hop_are_refused():
    with pytest.raises(core.UsageError, match=r"^--hops 0: at least 1"):
        core.QuestionSource(core.World(), (0, 1))


def test_links_against_their_definition():
    questions = [*drawn(2, 3), query_node.read_question(HAND_WRITTEN)]
    questions[2] = questions[2]._replace(word=tuple(range(len(questions[2].word))))
    link = core.QuestionBatch(questions).link
    mentions = (core.SUBJECT, core.OBJECT)
    for q, question in enumerate(questions):
        columns = list(zip(*question[:4], strict=True))
        for (i, one), (j, other) in itertools.product(enumerate(columns), repeat=2):
            expected = "none"
            if i == j:
                expected = "self"
            elif one[0] in mentions and other[0] in mentions:
                if one[3] == other[3]:
                    expected = "sentence"
                elif one[1] == other[1]:
                    expected = "coreference"
            elif one[0] in mentions or other[0] in mentions:
                mention, owner = (one, j) if one[0] in mentions else (other, i)
                if mention[2] == owner:
                    expected = "passage"
                elif mention[1] == owner:
                    expected = "entity"
            assert core.LINKS[link[q, i, j]] == expected
        assert not link[q, len(columns) :].any()
        assert not link[q, :, len(columns) :].any()


def write_questions(folder, rows):
    path = folder / "own.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return path


def as_row(question):
    """A drawn question as a user's row: names "name7", relations "rel207", one sentence a fact."""
    sentences, named = read_back(question)
    passages = {}
    for one, relation, other, home, _ in sentences:
        passages.setdefault(home, []).append(f"Name{one} rel{relation} NAME{other}.")
    words = words_by_node(question)[0]
    kinds = {n: question.node_type[n] for n in named}
    return {
        "start": f"name{words[0][0]}",
        "relations": [f"rel{words[slot][0]}" for slot in range(1, 1 + question.hops)],
        "answer": f"name{named[question.answer]}",
        "candidates": [f"name{named[n]}" for n in named if kinds[n] == core.CANDIDATE],
        "entities": [f"name{name}" for name in named.values()],
        "passages": [" ".join(stated) for stated in passages.values()],
    }


def canonical(question):
    """A question up to the order of its entities: words and links of nodes, by name."""
    words = [
        {slot: [w for w in bag if w != "."] for slot, bag in node.items()}
        for node in words_by_node(question)
    ]
    link = core.link_nodes(*(np.array([column]) for column in question[:4]))[0]
    key = [f"{kind} {one}" for kind, one in zip(question.node_type, words, strict=True)]
    links = sorted((key[i], key[j], int(link[i, j])) for i, j in zip(*link.nonzero(), strict=True))
    return sorted(key), links, key[question.start], key[question.answer], question.hops


@pytest.mark.parametrize(("hops", "world"), WORLDS[:3], ids=str)
def test_a_question_written_as_text_is_the_same_graph(hops, world):
    for question in drawn(3, hops, world=world):
        read = query_node.read_question(as_row(question))
        names = question.word
        relations = 2 + world.names
        words = tuple(f"rel{word}" if word >= relations else f"name{word}" for word in names)
        assert canonical(read) == canonical(question._replace(word=words))
        assert math.isnan(read.query_blind)


def test_names_of_several_words_are_found_longest_first():
    read = query_node.read_question(HAND_WRITTEN)
    said = words_by_node(read)
    kinds = [core.NODE_TYPES[kind] for kind in read.node_type]
    assert kinds == [
        "query", "candidate", "candidate", "entity", "entity",
        "passage", "subject", "object", "passage", "subject", "object",
    ]  # fmt: skip
    assert said[0] == {0: ["new", "york"], 1: ["twin", "of"], 2: ["mayor"]}
    twin = ["is", "the", "twin", "of"]
    assert said[6:8] == [{0: ["new", "york", "city"], 1: twin}, {0: ["new", "york"], 1: twin}]
    assert said[9:] == [{0: ["bob"], 1: ["met"]}, {0: ["ann", "lee"], 1: ["met"]}]
    assert said[8][core.TEXT] == ["bob", "met", "ann", "lee", "!", "leeds", "slept", "."]
    assert read.entity == (-1, 1, 2, 3, 4, -1, 4, 3, -1, 2, 1)
    assert read.sentence[6] == read.sentence[7] != read.sentence[9] == read.sentence[10]


def row_about(passages, candidates, start="Asha"):
    return {
        "start": start, "relations": ["was born in"], "answer": candidates[0],
        "candidates": candidates, "passages": passages,
    }  # fmt: skip


def mentions_of(row):
    """(name of the entity, number of the sentence) of each mention."""
    read = query_node.read_question(row)
    words = words_by_node(read)
    return [
        ("".join(words[entity][core.NAME]), sentence)
        for entity, sentence in zip(read.entity, read.sentence, strict=True)
        if sentence >= 0
    ]


@pytest.mark.parametrize(
    ("passages", "candidates"),
    [
        (["Asha was born in राम. She paints.", "Bina was born in रोम."], ["राम", "रोम"]),
        (["Asha was born in C++.", "Lee was born in C#."], ["C++", "C#"]),
        (["Asha was born in Ma\u0301laga.", "Ulf was born in Ko\u0308ln."], ["Málaga", "Köln"]),
        (["Asha was born in MÁLAGA.", "Ulf: Straße."], ["Málaga", "STRASSE"]),
        (["Ashaは東京で生まれた。京都は古い。"], ["東京", "京都"]),
        (["Asha出生在北京。上海很大。"], ["北京", "上海"]),
        (["Ashaเกิดที่กรุงเทพ.", "เชียงใหม่อยู่เหนือ"], ["กรุงเทพ", "เชียงใหม่"]),
        (
            ["Asha was born in 'St. Louis'. St Louis is no St. Louis!", "O'Neil"],
            ["St. Louis", "O'Neil"],
        ),
        (
            ["Asha \U0001f469\u200d\U0001f680 \U0001f469\u200d\U0001f52c"],
            ["\U0001f469\u200d\U0001f680", "\U0001f469\u200d\U0001f52c"],
        ),
    ],
    ids=[
        "marks",
        "signs",
        "decomposed",
        "case",
        "Japanese",
        "Chinese",
        "Thai",
        "abbreviation",
        "joined",
    ],
)
def test_names_of_any_script_are_told_apart_and_found(passages, candidates):
    found = mentions_of(row_about(passages, candidates))
    names = {"".join(query_node.read_tokens(name)[0]) for name in candidates}
    assert len(names) == 2
    assert names <= {name for name, _ in found}
    assert found[:2] == [("asha", 0), ("".join(query_node.read_tokens(candidates[0])[0]), 0)]


def test_a_name_with_a_full_stop_joins_no_sentences():
    row = row_about(
        ["Asha was the best. Louis left. Bob saw St. Louis. Asha!"], ["St. Louis", "Bob"]
    )
    assert mentions_of(row) == [("asha", 0), ("bob", 2), ("st.louis", 2), ("asha", 3)]


@pytest.mark.parametrize("pair", [["Rome", "ROME"], ["Zo\u00eb", "Zoe\u0308"], ["a b", "a  b"]])
def test_candidates_that_read_alike_are_refused_with_their_line(pair, tmp_path):
    rows = [HAND_WRITTEN] * 6 + [row_about(["Asha slept."], [*pair, "Oslo"])] + [HAND_WRITTEN] * 5
    with pytest.raises(
        core.UsageError, match=r"own\.jsonl: line 7: two of the candidates read alike"
    ):
        query_node.QuestionFile(write_questions(tmp_path, rows))


def test_a_long_text_takes_memory_in_proportion(tmp_path):
    used = []
    for letters in (100_000, 200_000):
        long_word = row_about(["Asha slept. " + "x" * letters], ["Rome", "Oslo"])
        sentence = row_about(
            ["Asha " + "Oslo met " * 200 + "y " * (letters // 20)], ["Rome", "Oslo"]
        )
        path = write_questions(tmp_path, [HAND_WRITTEN] * 9 + [long_word, sentence])
        tracemalloc.start()
        read = query_node.QuestionFile(path)
        used.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        longest = max(read.training + read.testing, key=lambda one: len(one.word))
        assert len(longest.word) < letters // 20 + 201 * (2 + query_node.SENTENCE_WORDS) + 1000
    assert used[1] < 2.2 * used[0]
    assert used[1] < 150e6
    with pytest.raises(core.UsageError, match=r"line 10: .* names and mentions, at most 512"):
        rows = [HAND_WRITTEN] * 9 + [row_about(["Oslo " * 600], ["Oslo", "Rome"])]
        query_node.QuestionFile(write_questions(tmp_path, rows))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(({key: None}, key) for key in ("start", "answer", "relations", "passages", "candidates")),
        ({"start": ["a"]}, "start"),
        ({"passages": "a text"}, "passages"),
        ({"candidates": []}, "candidates"),
        ({"relations": ["a", 3]}, "relations"),
        ({"entities": [" "]}, "entities"),
        ({"answer": "nobody"}, "does not stand among"),
        ({"relations": ["a"] * 4}, "more than 3"),
        (b'{"start": "a"', "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not an object"),
    ],
    ids=str,
)
def test_a_bad_question_is_named_with_its_line(change, said, tmp_path):
    rows = [HAND_WRITTEN] * 12
    rows[6] = change if isinstance(change, bytes) else HAND_WRITTEN | change
    with pytest.raises(core.UsageError, match=rf"^--questions .*own\.jsonl: line 7: .*{said}"):
        query_node.QuestionFile(write_questions(tmp_path, rows))


def test_a_file_holds_every_fifth_question_out(tmp_path):
    rows = [
        HAND_WRITTEN | {"start": f"city{i}", "relations": ["r"] * (1 + i % 2)} for i in range(12)
    ]
    read = query_node.QuestionFile(write_questions(tmp_path, rows))
    starts = [read.words[one.word[0]] for one in read.testing]
    assert starts == ["city4", "city9"]
    assert read.hops == (1, 2)
    assert {h: len(questions) for h, questions in read.held_out("test", 9).items()} == {1: 1, 2: 1}
    drawn_starts = [read.words[one.word[0]] for one in read.draw(np.random.default_rng(0), 99)]
    assert sorted(drawn_starts) == sorted(f"city{i}" for i in range(12) if i % 5 != 4)
    with pytest.raises(core.UsageError, match="at least 10 questions"):
        query_node.QuestionFile(write_questions(tmp_path, rows[:9]))
    with pytest.raises(argparse.ArgumentTypeError, match="at least 10 questions"):
        query_node.question_file(str(write_questions(tmp_path, rows[:9])))  # before any trial


def mixed_questions():
    """Questions of several sizes, one of them read from text."""
    read = query_node.read_question(HAND_WRITTEN)
    number = {word: 2 + i for i, word in enumerate(dict.fromkeys(read.word))}
    read = read._replace(word=tuple(number[word] for word in read.word))
    return [*drawn(1, 1), *drawn(1, 3, world=core.World()), read, *drawn(1, 2, 5)]


def question_reader(dim=8, depth=2):
    """A reader in float64, every weight random."""
    reader = core.QuestionReader(210, dim, 2, [core.GraphLayer(dim, 2)] * depth)
    return randomised(reader).double()


def question_batch(questions):
    batch = core.QuestionBatch(questions)
    batch.word_weight = batch.word_weight.double()
    return batch


def moved_rows(one, other):
    """Which questions' logits differ beyond rounding."""
    return (~torch.isclose(one, other, rtol=1e-6, atol=1e-6)).any(1).tolist()


def states_by_node(reader, question):
    """The reader from its definition, a node and a head at a time: last states [N, D]."""
    columns = [np.array([column]) for column in question[:4]]
    link = core.link_nodes(*columns)[0]
    kind = question.node_type
    words = words_by_node(question)

    def said(node):
        return sum(
            reader.embed.word.weight[bag].mean(0) @ reader.embed.slot[slot]
            for slot, bag in words[node].items()
        )

    rows = []
    for node in range(len(kind)):
        row = said(node) + reader.node_type.weight[kind[node]]
        if question.entity[node] == question.start:
            row = row + reader.inject(said(0))
        rows.append(row)
    x = torch.stack(rows)
    bias = reader.link_bias.view(len(core.LINKS), len(core.NODE_TYPES), len(core.NODE_TYPES), -1)
    for layer in reader.layers:
        query, key, value = layer.inputs(layer.norm1(x)).view(len(kind), 3, 2, -1).unbind(1)
        mixed = []
        for target in range(len(kind)):
            sources = link[target].nonzero()[0]
            logits = (query[target] * key[sources]).sum(-1) / math.sqrt(key.shape[2])
            at = (link[target, sources], kind[target], [kind[source] for source in sources])
            weight = (logits + bias[at]).softmax(0)
            mixed.append((weight[..., None] * value[sources]).sum(0).flatten())
        x = x + layer.out(torch.stack(mixed))
        x = x + layer.last(layer.first(layer.norm2(x)).relu())
    return reader.norm(x)


def test_question_reader_against_its_definition():
    questions = mixed_questions()
    reader = question_reader()
    logits = reader(question_batch(questions))
    for question, row in zip(questions, logits, strict=True):
        scores = reader.readout(states_by_node(reader, question)).squeeze(1)
        chosen = [n for n, kind in enumerate(question.node_type) if kind == core.CANDIDATE]
        torch.testing.assert_close(row[chosen], scores[chosen])
        others = torch.ones(len(row), dtype=torch.bool)
        others[chosen] = False
        assert (row[others] == -math.inf).all()


def test_questions_of_a_batch_and_their_padding_leak_nothing():
    questions = mixed_questions()
    reader = question_reader()
    logits = reader(question_batch(questions))
    for q, question in enumerate(questions):
        alone = reader(question_batch([question]))
        torch.testing.assert_close(alone[0], logits[q, : alone.shape[1]])
    changed = list(questions)
    changed[1] = changed[1]._replace(word=changed[1].word[::-1])
    assert moved_rows(reader(question_batch(changed)), logits) == [False, True, False, False]


def test_the_reader_reads_query_start_and_passages_alone_through_links():
    questions = mixed_questions()
    reader = question_reader()
    logits = reader(question_batch(questions))
    asked = [
        word + 1 if node == 0 else word
        for word, node in zip(questions[1].word, questions[1].node, strict=True)
    ]
    for change in (
        {"word": tuple(asked)},
        {"start": questions[1].answer},
        {"sentence": questions[1].sentence[::-1]},
    ):
        changed = [questions[0], questions[1]._replace(**change), *questions[2:]]
        assert moved_rows(reader(question_batch(changed)), logits) == [False, True, False, False]
    batch = question_batch(questions)
    x = torch.randn(*batch.shape, 8, dtype=torch.float64)
    far = torch.where(batch.link[0, 5, :, None] == core.NO_LINK, torch.randn_like(x[0]), x[0])
    layer = reader.layers[0]
    bias = reader.attention_bias(batch)
    one = layer(x, bias, batch)[0, 5]
    other = layer(torch.cat([far[None], x[1:]]), bias, batch)[0, 5]
    assert torch.equal(one, other)


def test_shared_layers_are_counted_once():
    layer = core.GraphLayer(8, 2)
    linear = 9 * 24 + 9 * 8 + 9 * 16 + 17 * 8
    own = 50 * 8 + core.SLOTS * 64 + len(core.NODE_TYPES) * 8 + 72
    rest = len(core.LINKS) * len(core.NODE_TYPES) ** 2 * 2 + 16 + 9
    for depth in (1, 3):
        reader = core.QuestionReader(50, 8, 2, [layer] * depth)
        assert len(reader.layers) == depth
        assert sum(p.numel() for p in reader.parameters()) == 32 + linear + own + rest


def reader_and_batches(seed, dim=8, hops=(1, 2)):
    source = core.QuestionSource(SMALL_WORLD, hops)
    with core.initialised_from(seed):
        reader = core.QuestionReader(len(source.words), dim, 2, [core.GraphLayer(dim, 2)] * 2)
    rng = core.stream(seed, "train")
    batches = (core.QuestionBatch(source.draw(rng, 16)) for _ in itertools.count())
    return source, reader, batches


def test_training_a_reader_is_plain_adamw_and_repeats():
    source, reader, batches = reader_and_batches(3)
    validation = {"1 hop": [core.QuestionBatch(source.held_out("val", 30)[1])]}
    history = core.train_reader(reader, batches, steps=20, lr=0.02, validation=validation, points=4)
    _, plain, batches = reader_and_batches(3)
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    right = []
    for step in range(21):
        if step % 5 == 0:
            batch = validation["1 hop"][0]
            right.append(float((plain(batch).argmax(1) == batch.answer).float().mean()))
        batch = next(batches)
        loss = -plain(batch).log_softmax(1)[torch.arange(16), batch.answer].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 0.02 * min((step + 1) / 100, (20 - step) / 6)
        losses.append(loss.item())
        optimizer.step()
    np.testing.assert_allclose(history["loss"], losses[:20], rtol=1e-4)
    np.testing.assert_allclose(history["1 hop"], right, atol=0.04)
    _, again, batches = reader_and_batches(3)
    repeated = core.train_reader(again, batches, steps=20, lr=0.02)
    assert np.array_equal(repeated["loss"], history["loss"])
    assert all(map(torch.equal, again.state_dict().values(), reader.state_dict().values()))


def test_one_hop_is_learned():
    source, reader, batches = reader_and_batches(0, dim=32, hops=(1,))
    held_out = source.held_out("test", 100)[1]
    core.train_reader(reader, batches, steps=150, lr=1e-2)
    right = core.answered(reader, [core.QuestionBatch(held_out)]).float().mean()
    assert right > np.mean([one.query_blind for one in held_out]) + 0.3


# Life's data and logic gates

RELAXED = {  # each gate as it is usually written
    "FALSE": lambda a, b: 0 * a,
    "AND": lambda a, b: a * b,
    "A AND NOT B": lambda a, b: a - a * b,
    "A": lambda a, b: a,
    "B AND NOT A": lambda a, b: b - a * b,
    "B": lambda a, b: b,
    "XOR": lambda a, b: a + b - 2 * a * b,
    "OR": lambda a, b: a + b - a * b,
    "NOR": lambda a, b: 1 - (a + b - a * b),
    "XNOR": lambda a, b: 1 - (a + b - 2 * a * b),
    "NOT B": lambda a, b: 1 - b,
    "A OR NOT B": lambda a, b: 1 - b + a * b,
    "NOT A": lambda a, b: 1 - a,
    "B OR NOT A": lambda a, b: 1 - a + a * b,
    "NAND": lambda a, b: 1 - a * b,
    "TRUE": lambda a, b: 1 + 0 * a,
    "RELU": lambda a, b: np.maximum(a, 0),
}


def all_cells(seeds=1):
    """All 512 neighbourhoods as input of S networks: [S, 9, 512]."""
    return core.all_neighbourhoods(seeds)[0]


def test_life_is_the_rule_of_the_game():
    board = np.random.default_rng(0).random((40, 50)) < 0.4
    around = convolve2d(board, [[1, 1, 1], [1, 0, 1], [1, 1, 1]], mode="valid")
    expected = (around == 3) | (board[1:-1, 1:-1] & (around == 2))
    windows = np.lib.stride_tricks.sliding_window_view(board, (3, 3)).reshape(*expected.shape, 9)
    np.testing.assert_array_equal(core.LIFE[windows @ 2 ** np.arange(9)[::-1]], expected)
    np.testing.assert_array_equal(core.CELLS_ALIVE, [i.bit_count() for i in range(512)])


def test_chances_of_neighbourhoods():
    chance = core.neighbourhood_chances(0.254)
    assert chance.sum() == pytest.approx(1)
    np.testing.assert_allclose(chance, [0.254**k * 0.746 ** (9 - k) for k in core.CELLS_ALIVE])


def test_batches_of_neighbourhoods_are_drawn_with_their_chances():
    batches = core.neighbourhood_batches([3, 4], 0.254, 512)
    counts = torch.stack([next(batches) for _ in range(300)]).double()  # [300, 2, 512]
    assert (counts.sum(-1) == 512).all()
    expected = 300 * 512 * core.neighbourhood_chances(0.254)
    often = expected > 5
    for row in range(2):
        seen = counts[:, row].sum(0).numpy()
        seen = np.append(seen[often], seen[~often].sum())
        wanted = np.append(expected[often], expected[~often].sum())
        assert stats.chisquare(seen, wanted).pvalue > 1e-4
    alone = core.neighbourhood_batches([4], 0.254, 512)
    assert torch.equal(torch.stack([next(alone)[0] for _ in range(70)]).double(), counts[:70, 1])


def test_a_gates_number_is_its_truth_table_and_gives_its_polynomial_exactly():
    corners = list(itertools.product((0, 1), repeat=2))
    for number, name in enumerate(core.LOGIC_GATES):
        bits = [number >> 3 & 1, number >> 2 & 1, number >> 1 & 1, number & 1]
        assert core.truth_table(torch.tensor(number)).tolist() == bits
        assert [RELAXED[name](a, b) for a, b in corners] == bits
        c0, c1, c2, c3 = (torch.tensor(bits).float() @ core.FROM_CORNERS).tolist()
        for a, b in itertools.product((-2, 0, 3, 5), repeat=2):  # integers: exact in floats
            assert c0 + c1 * a + c2 * b + c3 * a * b == RELAXED[name](a, b)


GATE_SETS = (core.LOGIC_GATES, ("AND", "XOR", "OR", "NAND"), ("RELU", *core.GATES[1:16]))


@pytest.mark.parametrize("normalise", ["none", "sum", "softmax"])
@pytest.mark.parametrize("gates", GATE_SETS, ids=len)
def test_coefficients_are_the_weighted_sum_of_the_gates(gates, normalise):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 2, 3, 7))
    weight = rng.random((2, 3, len(gates)))
    share = {
        "none": weight,
        "sum": weight / weight.sum(-1, keepdims=True),
        "softmax": np.exp(weight) / np.exp(weight).sum(-1, keepdims=True),
    }[normalise]
    expected = sum(share[..., g, None] * RELAXED[name](a, b) for g, name in enumerate(gates))

    mixture = core.GateMixture(torch.from_numpy(weight), gates, normalise).double()
    operands = torch.from_numpy(np.stack([a, b], 1)).requires_grad_()
    found = core.mix_gates(operands, mixture.coefficients())
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-10)
    assert torch.autograd.gradcheck(
        lambda x, w: core.mix_gates(x, mixture.coefficients()), (operands, mixture.weight)
    )


def test_relu_of_one_operand():
    mixture = core.GateMixture(torch.tensor([[[2.0], [3.0]]]), ("RELU",))
    found = core.mix_gates(torch.tensor([[[[-1.0, 1.0], [2.0, -2.0]]]]), mixture.coefficients())
    assert found.tolist() == [[[0, 2], [6, 0]]]


def test_truth_tables_are_linear_between_their_corners():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, 4))
    a, b = rng.random((2, 2, 3, 7))
    entry = 1 / (1 + np.exp(-logits))[..., None]
    upper = (1 - b) * entry[:, :, 2] + b * entry[:, :, 3]
    lower = (1 - b) * entry[:, :, 0] + b * entry[:, :, 1]
    operands = torch.from_numpy(np.stack([a, b], 1)).float()
    tables = core.TruthTables(torch.from_numpy(logits).float())
    found = core.mix_gates(operands, tables.coefficients())
    np.testing.assert_allclose(found.detach(), (1 - a) * lower + a * upper, rtol=1e-5, atol=1e-6)


def test_hardening_takes_the_heaviest_gate_and_the_nearest_table():
    corners = torch.tensor([[0.0, 0, 1, 1], [0, 1, 0, 1]])
    for number in range(16):
        expected = core.truth_table(torch.tensor(number))
        mixture = core.GateMixture(torch.eye(16)[number].view(1, 1, 16) + 0.1)
        tables = core.TruthTables((2 * expected - 1).view(1, 1, 4))
        for gates in (mixture, tables):
            assert gates.hardened().item() == number
            layer = core.GateLayer(core.WiredOperands(np.array([[[0], [1]]]), 2), gates)
            assert torch.equal(layer.hardened(corners[None])[0, 0], expected)
    few = core.GateMixture(torch.tensor([[[0.1, 0.2]]]), ("AND", "OR"))
    assert core.GATES[few.hardened().item()] == "OR"


@pytest.mark.parametrize(("inputs", "units"), [(9, 128), (9, 5), (128, 64), (2, 1), (3, 2)])
def test_wires_use_every_input_and_never_one_twice(inputs, units):
    for seed in range(20):
        wires = core.draw_wires(inputs, units, np.random.default_rng(seed))
        assert wires.shape == (2, units)
        assert (wires[0] != wires[1]).all()
        used = np.bincount(wires.ravel(), minlength=inputs)
        assert len(used) == inputs
        assert used.sum() == 2 * units
        if units == 128:
            assert used.min() >= 20  # 28 each, but for those rewired away from a twin
            assert used.max() <= 40


@pytest.mark.parametrize(("inputs", "units"), [(1, 3), (9, 4)])
def test_what_cannot_be_wired_is_refused(inputs, units):
    with pytest.raises(ValueError, match="cannot use"):
        core.draw_wires(inputs, units, np.random.default_rng(0))


def test_wired_operands_read_their_wires():
    rng = np.random.default_rng(0)
    wires = np.stack([core.draw_wires(5, 4, rng) for _ in range(3)])
    x = torch.randn(3, 5, 7)
    found = core.WiredOperands(wires, 5)(x)
    for s, side, unit in itertools.product(range(3), range(2), range(4)):
        assert torch.equal(found[s, side, unit], x[s, wires[s, side, unit]])


@pytest.mark.parametrize("gates", ["softmax", "tables"])
def test_a_wired_network_starts_by_passing_an_input_on(gates):
    network = core.wired_gate_network((9, 16, 16, 8, 4, 2, 1), [3, 4], gates, 0.9)
    output = network.hardened(all_cells(2))
    for seed in range(2):
        assert any(torch.equal(output[seed], cell) for cell in all_cells()[0])
    c = network[0].gates.coefficients()[0, 0].tolist()
    found = c[0] + 0.3 * c[1] + 0.8 * c[2] + 0.24 * c[3]
    if gates == "softmax":  # 0.9 of A, the rest in equal parts
        rest = sum(RELAXED[name](0.3, 0.8) for name in core.LOGIC_GATES if name != "A")
        assert found == pytest.approx(0.9 * 0.3 + 0.1 / 15 * rest, rel=1e-5)
    else:  # 0.1 where A is 0, 0.9 where it is 1
        assert found == pytest.approx(0.7 * 0.1 + 0.3 * 0.9, rel=1e-5)


@pytest.mark.parametrize(
    "names", [("AND", "XOR", "OR", "NAND"), ("RELU",), ("RELU", *core.LOGIC_GATES[1:])]
)
def test_dense_gate_network_against_numpy(names):
    network = core.dense_gate_network([9, 6, 5, 1], [3, 4], names, std=0.3)
    torch.manual_seed(0)
    for layer in network:
        nn.init.normal_(layer.gates.weight)
    found = network(all_cells(2)).detach()
    for seed in range(2):
        x = core.NEIGHBOURHOODS.T.astype(np.float64)
        for layer in network:
            weight = layer.operands.weight[seed].detach().double().numpy()
            both = weight @ x + layer.operands.bias[seed].detach().double().numpy()
            share = layer.gates.weight[seed].detach().double().numpy()
            a, b = both[: len(share)], both[-len(share) :]
            x = sum(share[:, g, None] * RELAXED[name](a, b) for g, name in enumerate(names))
        np.testing.assert_allclose(found[seed], x[0], rtol=1e-3, atol=1e-5)


def test_uniform_gates_sum_to_one_and_constant_ones_are_equal():
    for start in ("uniform", "constant"):
        network = core.dense_gate_network([9, 6, 1], [3], ("AND", "OR"), start=start)
        weight = network[0].gates.weight
        torch.testing.assert_close(weight.sum(-1), torch.ones(1, 6))
        assert (weight[..., 0] == weight[..., 1]).all() == (start == "constant")


def test_a_dense_gate_network_starts_small():
    network = core.dense_gate_network((9, 200, 1), [3, 4], ("AND", "OR"), std=0.02)
    assert network[0].operands.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert network[0].operands.bias.std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(network[0].operands.weight[0], network[0].operands.weight[1])


# Metrics


def test_loss_against_a_weighted_mean_and_torch():
    logits = torch.randn(40, 2)
    label = torch.randint(2, (40,), generator=torch.Generator().manual_seed(0))
    label[:7] = 0
    label[30:] = core.IGNORED
    found = core.class_weighted_cross_entropy(logits, label)

    kept = label[:30].numpy()
    share = np.array([(kept == 1).mean(), (kept == 0).mean()])  # of the other class
    scores = np.exp(numpy_of(logits[:30]))
    loss = -np.log(scores[np.arange(30), kept] / scores.sum(1))
    expected = (share[kept] * loss).sum() / share[kept].sum()
    assert_close(found, expected)
    weight = torch.from_numpy(share).float()
    assert_close(found, F.cross_entropy(logits[:30], label[:30], weight=weight))
    assert differs(found, F.cross_entropy(logits[:30], label[:30]))


def test_recalls_of_known_predictions():
    logits = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0], [2, 1], [0, 1]])
    label = torch.tensor([0, 0, 1, core.IGNORED, 0, core.IGNORED])
    assert_close(core.class_recalls(logits, label), [2 / 3, 1])
    absent = core.class_recalls(logits[:2], label[:2])
    assert absent.tolist() == [0.5, 0.0]


def test_ranking_accuracy_counts_pairs():
    rng = np.random.default_rng(0)
    label = rng.integers(2, size=200)
    logits = rng.integers(-4, 5, size=(200, 2))  # integers: many ties, all of them exact
    margin = logits[:, 1] - logits[:, 0]
    high = margin[label == 1][:, None]
    low = margin[label == 0][None]
    expected = (high > low).mean() + 0.5 * (high == low).mean()
    u = stats.mannwhitneyu(high.ravel(), low.ravel()).statistic
    assert_close(u / high.size / low.size, expected)

    ignored = torch.full((20,), core.IGNORED)
    logits = torch.cat([torch.from_numpy(logits).float(), 9 * torch.randn(20, 2)])
    found = core.ranking_accuracy(logits, torch.cat([torch.from_numpy(label), ignored]))
    assert_close(found, expected)


def test_ranking_accuracy_of_one_class_is_undefined():
    logits = torch.tensor([[0.0, 1], [0, 5]])
    assert core.ranking_accuracy(logits, torch.tensor([0, 1])) == 1
    assert core.ranking_accuracy(logits, torch.tensor([1, 0])) == 0
    for label in (0, 1):
        assert core.ranking_accuracy(logits, torch.tensor([label, label])).isnan()


def test_score_describes_scored_nodes_only():
    logits = torch.randn(30, 2)
    label = torch.arange(30) % 2
    label[20:] = core.IGNORED
    logits[20:] = math.nan
    found = core.score_logits(logits, label)
    margin = numpy_of(logits[:20, 1]) - numpy_of(logits[:20, 0])
    expected = [margin.mean(), margin.std(ddof=1)]
    assert_close(found["margin"], expected)
    assert torch.equal(found["recall"], core.class_recalls(logits[:20], label[:20]))
    assert torch.equal(found["auc"], core.ranking_accuracy(logits[:20], label[:20]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_score_of_a_diverged_model_is_undefined(value):
    logits = torch.randn(20, 2)
    logits[3, 0] = value
    found = core.score_logits(logits, torch.arange(20) % 2)
    assert found["recall"].isnan().all()
    assert found["auc"].isnan()
    assert not found["margin"].isfinite().any()


@pytest.mark.parametrize(
    "curve, expected",
    [([9, 0, 1, 0, 3], 2.0), ([5, 9, 1, 2], 1.0), ([1, 1, 1, 1], 0.0), ([7, -7, 3, 1, 2, 0], 1.5)],
)
def test_oscillation_is_the_mean_change_in_the_second_half(curve, expected):
    assert core.oscillation(curve) == pytest.approx(expected)


# Gradient log


def test_logged_norms_are_the_norms():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.unused = nn.Parameter(torch.ones(5))
    log = core.GradientLog(model)
    assert log.names == ["unused", "0.weight", "0.bias", "1.weight", "1.bias"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(2):
        optimizer.zero_grad()
        model(torch.randn(6, 3)).square().sum().backward()
        weight = [np.linalg.norm(numpy_of(p)) for p in model.parameters()]
        gradient = [0]
        gradient += [np.linalg.norm(numpy_of(p.grad)) for p in log.parameters[1:]]
        log.record()
        optimizer.step()
        assert model.unused.grad is None
        assert min(gradient[1:]) > 0
        assert_close(log.rows["weight"][step], weight)
        assert_close(log.rows["gradient"][step], gradient)


def test_gradient_over_weight_by_parameter_and_by_module():
    history = {
        "names": ["a.weight", "b.eps", "a.bias"],
        "gradient": np.array([[3.0, 1.0, 4.0], [0.0, 2.0, 1.0]], dtype=np.float32),
        "weight": np.array([[6.0, 2.0, 8.0], [1.0, 0.0, 0.0]], dtype=np.float32),
    }
    ratio = core.grad_over_weight(history)
    assert list(ratio) == ["a.weight", "b.eps", "a.bias"]
    assert_close(ratio["a.weight"], [0.5, 0.0])
    assert_close(ratio["b.eps"], [0.5, math.nan])
    assert_close(ratio["a.bias"], [0.5, math.nan])

    joined = core.grad_over_weight(history, by="module")
    assert list(joined) == ["a", "b.eps"]
    assert_close(joined["a"], [5 / 10, 1 / 1])
    assert_close(joined["b.eps"], [0.5, math.nan])


# Training

LR = 0.01
CLIP = 0.05
MODELS = ["plain", "batch norm", "GIN", "dropout"]
PATTERN = core.PatternData(7).first(3)


def pattern_batch():
    return core.GraphBatch(PATTERN)


def pattern_batches():
    return [core.GraphBatch([graph]) for graph in PATTERN]


def build(name, seed=0):
    with core.initialised_from(seed):
        if name == "GIN":
            layers = [core.GINLayer(DIM)]
        else:
            layers = [transformer_layer("batch" if name == "batch norm" else "layer")]
        before_readout = nn.Dropout(0.5) if name == "dropout" else None
        return core.NodeClassifier(layers, DIM, before_readout)


def fit(name, batches, seed=0, epochs=5, lr=LR, clip=CLIP, **options):
    """(model, history) of core.train."""
    torch.manual_seed(1)  # for dropout
    model = build(name)
    history = core.train(model, batches, seed=seed, lr=lr, epochs=epochs, clip=clip, **options)
    return model, history


def train_by_hand(name, batch, epochs=5, fused=True):
    """(model, losses, [score after 0, 1, ... epochs]) of a loop of torch's own parts."""
    torch.manual_seed(1)
    model = build(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=fused)
    losses = []
    scores = [separate_score(model, [batch])]
    for _ in range(epochs):
        model.train()
        loss = core.class_weighted_cross_entropy(model(batch), batch.label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
        scores.append(separate_score(model, [batch]))
    return model, losses, scores


def separate_score(model, batches):
    """Recalls, AUC and margin, in NumPy, of an evaluation outside of core."""
    model.eval()
    logits = np.concatenate([numpy_of(model(batch)) for batch in batches])
    label = np.concatenate([batch.label.numpy() for batch in batches])
    margin = logits[:, 1] - logits[:, 0]
    recall = [(margin[label == 0] <= 0).mean(), (margin[label == 1] > 0).mean()]
    auc = (margin[label == 1][:, None] > margin[label == 0]).mean()
    return {"recall": recall, "auc": auc, "margin": [margin.mean(), margin.std(ddof=1)]}


def scores_agree(history, scores):
    """Whether the curves are those of separate evaluations; one node may round to the other
    class."""
    tolerance = {"recall": 0.02, "auc": 0.01, "margin": 1e-3}
    return all(
        np.allclose(history[name], [one[name] for one in scores], rtol=1e-3, atol=atol)
        for name, atol in tolerance.items()
    )


def same_bits(one, other):
    """Whether two histories are identical."""
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_training_follows_torchs_plain_adam():
    batch = pattern_batch()
    _, losses, scores = train_by_hand("plain", batch, fused=False)
    model, history = fit("plain", [batch])
    assert_close(history["loss"], losses)
    assert scores_agree(history, scores)
    assert history["gradient_norm"].max() > CLIP  # the clip was at work
    assert history["names"] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_a_separate_evaluation(name):
    batch = pattern_batch()
    _, _, scores = train_by_hand(name, batch)
    _, history = fit(name, [batch])
    assert scores_agree(history, scores)


@pytest.mark.parametrize("name", ["batch norm", "GIN", "dropout"])
def test_scores_of_training_passes_would_be_wrong(name, monkeypatch):
    """The test above sees a shortcut that is taken although its logits are not equal."""
    batch = pattern_batch()
    _, _, scores = train_by_hand(name, batch)
    monkeypatch.setattr(core.torch, "equal", lambda a, b: True)
    _, history = fit(name, [batch])
    assert not scores_agree(history, scores)


def count_evaluations(monkeypatch):
    """A list that grows by one with every call of core.evaluate."""
    calls = []
    evaluate = core.evaluate

    def counted(model, batches):
        calls.append(len(batches))
        return evaluate(model, batches)

    monkeypatch.setattr(core, "evaluate", counted)
    return calls


def test_shortcut_gives_the_history_of_evaluations(monkeypatch):
    batch = pattern_batch()
    calls = count_evaluations(monkeypatch)
    _, quick = fit("plain", [batch])
    assert len(calls) == 2  # the first and the last
    calls.clear()
    _, full = fit("plain", [batch], held_out=[batch])
    assert len(calls) == 6  # each of 5 epochs and the last
    np.testing.assert_array_equal(quick["loss"], full["loss"])
    full_scores = [{k: full[k][t] for k in ("recall", "auc", "margin")} for t in range(6)]
    assert scores_agree(quick, full_scores)


@pytest.mark.parametrize("name", ["batch norm", "dropout"])
def test_shortcut_is_not_taken_where_modes_differ(name, monkeypatch):
    calls = count_evaluations(monkeypatch)
    fit(name, [pattern_batch()])
    assert len(calls) == 6


def test_shortcut_is_not_taken_where_dropout_does_not_show_at_the_start(monkeypatch):
    model = build("dropout")
    with torch.no_grad():
        model.readout.weight.zero_()
        model.readout.bias.zero_()
    calls = count_evaluations(monkeypatch)
    core.train(model, [pattern_batch()], seed=0, lr=LR, epochs=5, clip=CLIP)
    assert len(calls) == 6


@pytest.mark.parametrize("name", ["plain", "batch norm"])
def test_held_out_graphs_are_scored_and_not_trained_on(name):
    batch, held_out = pattern_batch(), core.GraphBatch(core.PatternData(7, "val").first(2))
    model, history = fit(name, [batch], held_out=[held_out])
    _, alone = fit(name, [batch])
    np.testing.assert_array_equal(history["loss"], alone["loss"])
    assert not np.allclose(history["margin"], alone["margin"], rtol=1e-3)
    last = {key: history[key][-1:] for key in ("recall", "auc", "margin")}
    assert scores_agree(last, [separate_score(model, [held_out])])


def test_scores_pool_the_nodes_of_all_batches():
    batches = pattern_batches()
    model, history = fit("plain", batches, epochs=2)
    assert history["loss"].shape == history["gradient_norm"].shape == (6,)
    assert history["weight"].shape == (6, len(history["names"]))
    assert history["recall"].shape == history["margin"].shape == (3, 2)
    scores = [separate_score(build("plain"), batches), separate_score(model, batches)]
    ends = {key: history[key][[0, -1]] for key in ("recall", "auc", "margin")}
    assert scores_agree(ends, scores)


def test_every_epoch_takes_each_batch_once_in_an_order_of_the_seed():
    def losses(seed):
        _, history = fit("plain", batches, seed=seed, epochs=6, lr=1e-12)  # weights stand still
        return history["loss"].reshape(6, 3)

    batches = pattern_batches()
    model = build("plain")
    each = [core.class_weighted_cross_entropy(model(b), b.label).item() for b in batches]
    order = losses(0)
    for epoch in order:
        assert_close(sorted(epoch), sorted(each))
    assert min(np.diff(sorted(each))) > 1e-4 * max(each)
    assert not np.allclose(order, order[:1], rtol=1e-4)
    assert not np.allclose(order, losses(1), rtol=1e-4)


@pytest.mark.parametrize("change", [{"lr": 2 * LR}, {"clip": 1e-9}])
def test_every_argument_of_training_changes_its_losses(change):
    batches = pattern_batches()
    _, plain = fit("plain", batches)
    _, changed = fit("plain", batches, **change)
    assert not np.allclose(changed["loss"], plain["loss"], rtol=1e-4)


@pytest.mark.parametrize("name", ["plain", "batch norm", "GIN"])
def test_same_seed_twice_gives_the_same_bits(name):
    one, one_history = fit(name, pattern_batches(), epochs=3)
    two, two_history = fit(name, pattern_batches(), epochs=3)
    assert same_bits(one_history, two_history)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


class SilentLog(core.GradientLog):
    """A log that touches neither weights nor gradients."""

    def record(self):
        self.rows["weight"].append(torch.zeros(1))
        self.rows["gradient"].append(torch.zeros(1))


@pytest.mark.parametrize("name", ["plain", "GIN"])
def test_logging_only_reads(name, monkeypatch):
    logged, history = fit(name, pattern_batches(), epochs=3)
    monkeypatch.setattr(core, "GradientLog", SilentLog)
    silent, silent_history = fit(name, pattern_batches(), epochs=3)
    np.testing.assert_array_equal(history["loss"], silent_history["loss"])
    for a, b in zip(logged.parameters(), silent.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradients_are_logged_before_clipping():
    _, history = fit("plain", pattern_batches())
    total = np.sqrt(np.square(history["gradient"].astype(np.float64)).sum(1))
    assert_close(total, history["gradient_norm"])
    assert total.max() > 1.5 * CLIP


def test_a_diverged_training_is_a_result():
    model = build("plain")
    with torch.no_grad():
        model.readout.weight.fill_(1e38)
    history = core.train(model, [pattern_batch()], seed=0, lr=LR, epochs=3, clip=CLIP)
    assert np.isnan(history["recall"]).all()
    assert np.isnan(history["auc"]).all()


# Checkpoints


class Interruption(Exception):
    """Stands for a kill."""


def interrupt(model, calls):
    """Let the model's forward fail after so many calls."""
    counter = itertools.count()

    def hook(module, inputs):
        if next(counter) == calls:
            raise Interruption

    model.register_forward_pre_hook(hook)


KEPT_AND_RELEASED = """
import core, ctypes, os, torch
accepted = ctypes.CDLL(None).mallopt(-3, 2**30)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
core.keep_freed_blocks()
torch.ones(2**26)
kept = resident()
core.release_freed_blocks()
print(accepted, kept - resident())
"""


def test_kept_memory_is_released():
    """An older glibc refuses so high a threshold: it keeps nothing that could be released."""
    command = [sys.executable, "-c", KEPT_AND_RELEASED]
    done = subprocess.run(command, cwd=core.REPOSITORY, capture_output=True, text=True, check=True)
    accepted, released = [int(word) for word in done.stdout.split()]
    size = 4 * 2**26  # bytes
    assert released > 0.9 * size if accepted else released < 0.1 * size


def test_interleaved_functions_take_turns_and_the_median_is_theirs(monkeypatch):
    clock = iter(range(0, 10_000))
    monkeypatch.setattr(core.time, "perf_counter", lambda: next(clock))
    called = []

    def slow():
        called.append("slow")
        for _ in range(9):
            next(clock)

    found = core.interleaved_medians({"fast": lambda: called.append("fast"), "slow": slow}, 3)
    assert found == {"fast": 1.0, "slow": 10.0}
    assert called == ["fast", "slow"] * 5


@pytest.mark.parametrize(
    "name, count, calls",
    [
        ("plain", 1, 5),  # in the training pass of epoch 4
        ("plain", 1, 7),  # in the last evaluation, after all epochs
        ("batch norm", 1, 7),
        ("GIN", 3, 16),  # between two batches of an epoch
    ],
)
def test_interrupted_training_goes_on_to_the_same_bits(name, count, calls, tmp_path, monkeypatch):
    monkeypatch.setattr(core, "CHECKPOINT_SECONDS", -1.0)
    batches = pattern_batches()[:count]
    arguments = {"seed": 0, "lr": LR, "epochs": 6, "clip": CLIP}
    whole = build(name)
    expected = core.train(whole, batches, **arguments)

    path = tmp_path / "state.checkpoint"
    killed = build(name)
    interrupt(killed, calls)
    with pytest.raises(Interruption):
        core.train(killed, batches, **arguments, checkpoint=core.Checkpoint(path))

    resumed = build(name, seed=9)  # other weights: those of the checkpoint count
    history = core.train(resumed, batches, **arguments, checkpoint=core.Checkpoint(path))
    assert same_bits(history, expected)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_no_checkpoint_is_written_within_a_minute(tmp_path):
    path = tmp_path / "state.checkpoint"
    fit("plain", pattern_batches(), epochs=2, checkpoint=core.Checkpoint(path))
    assert not path.exists()


# Pyramids

NUMBERS = np.array([2**57 - 13, 0x1E3779B97F4A7C15])  # a modulus and a multiplier


def exact_powers(n, edges, field):
    """P^0 .. P^field as Fractions: [field + 1][n][n]."""
    neighbours = [[] for _ in range(n)]
    for i, j in edges:
        neighbours[i].append(j)
        neighbours[j].append(i)
    powers = [[[Fraction(int(i == j)) for j in range(n)] for i in range(n)]]
    for _ in range(field):
        last = powers[-1]
        power = []
        for i in range(n):
            sums = [sum((last[m][j] for m in neighbours[i]), Fraction(0)) for j in range(n)]
            power.append([total / max(len(neighbours[i]), 1) for total in sums])
        powers.append(power)
    return powers


def exact_vectors(base, field):
    """{(i, j): (P^0 .. P^field)[i, j]} as Fractions."""
    pyramid = core.pyramid(base)
    n = len(pyramid.row)
    powers = exact_powers(n, pyramid.edges.tolist(), field)
    pairs = itertools.product(range(n), repeat=2)
    return {(i, j): tuple(power[i][j] for power in powers) for i, j in pairs}


@pytest.mark.parametrize("base", range(1, 7))
def test_pyramid_is_the_triangle_and_its_only_colouring(base):
    p = core.pyramid(base)
    places = list(zip(p.row.tolist(), p.column.tolist(), strict=True))
    assert places == [(row, column) for row in range(base) for column in range(row + 1)]

    steps = {(0, 1), (1, 0), (1, 1), (0, -1), (-1, 0), (-1, -1)}
    adjacent = set()
    for i, j in itertools.combinations(range(len(places)), 2):
        if (places[j][0] - places[i][0], places[j][1] - places[i][1]) in steps:
            adjacent.add((i, j))
    assert {tuple(sorted(edge)) for edge in p.edges.tolist()} == adjacent
    assert len(p.edges) == len(adjacent)

    assert all(p.colour[i] != p.colour[j] for i, j in adjacent)
    if base <= 4:
        proper = []
        for colours in itertools.product(range(3), repeat=len(places)):
            if all(colours[i] != colours[j] for i, j in adjacent):
                proper.append(colours)
        assert tuple(p.colour) in proper
        assert len(proper) == (3 if base == 1 else 6)  # only the colours' names can change


@pytest.mark.parametrize(
    ("base", "field"), [(1, 0), (1, 3), (2, 1), (3, 2), (4, 5), (6, 2), (6, 7), (4, 20)]
)
@pytest.mark.parametrize("modulus", [2**57 - 13, 2**56 - 5])
def test_pair_codes_are_equal_exactly_where_fractions_are(base, field, modulus):
    """Powers of 12 pass the modulus from the 16th on."""
    p = core.pyramid(base)
    codes = core.pair_codes(len(p.row), p.edges, field, modulus, int(NUMBERS[1]))
    vectors = exact_vectors(base, field)
    together = {(vector, int(codes[pair])) for pair, vector in vectors.items()}
    assert len(together) == len(set(vectors.values())) == len(np.unique(codes))
    assert all((code == 0) == (not any(vector)) for vector, code in together)


def test_pair_codes_reduce_by_the_modulus():
    p = core.pyramid(4)
    one = core.pair_codes(10, p.edges, 20, 2**57 - 13, 987654321)
    other = core.pair_codes(10, p.edges, 20, 2**57 - 15, 987654321)
    assert (one != other).any()


def test_pair_codes_refuse_a_degree_that_does_not_divide():
    star = np.array([[0, i] for i in range(1, 6)])  # degree 5
    with pytest.raises(ValueError, match="multiple of every degree"):
        core.pair_codes(6, star, 1, 101, 3)
    codes = core.pair_codes(6, star, 1, 2**57 - 13, 3, scale=5)
    assert len(np.unique(codes)) == 4  # itself, out of the hub, into it, not reached


# English text and language models


def make_documents(rng, count=60):
    """Documents of a few paragraphs of 30 random words."""
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(300)]
    documents = []
    for _ in range(count):
        paragraphs = [" ".join(rng.choice(words, 30)) for _ in range(rng.integers(1, 6))]
        documents.append("\n\n".join(paragraphs))
    return documents


def write_text(folder, joint="\n\n", prefix=b"", name="own.txt"):
    """A file of about 100 kB whose paragraphs are joined by `joint`."""
    documents = make_documents(np.random.default_rng(2), 200)
    paragraphs = [p for document in documents for p in document.split("\n\n")]
    path = folder / name
    path.write_bytes(prefix + joint.join(paragraphs).encode())
    return path


def as_characters(part):
    return part.tobytes().decode()


def test_parts_of_a_text_share_no_passage():
    documents = make_documents(np.random.default_rng(0))
    documents[3] += "\n\n" + documents[2]  # once more in another training document
    documents[-1] += "\n\n" + documents[0]  # held out, but trained on
    copied = documents[1].split("\n\n")[0][:90]
    documents[-1] += "\n\nnew words here " + copied
    text = core.split_text(documents)
    train = as_characters(text.train)
    held_out = as_characters(text.held_out)
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", f"{train}\n\n{held_out}")]
    assert len(set(paragraphs)) == len(paragraphs)

    def eights(part):
        found = set()
        for paragraph in re.split(r"\n\n+", part):
            words = paragraph.split()
            found |= {tuple(words[i : i + 8]) for i in range(len(words) - 7)}
        return found

    assert not eights(train) & eights(held_out)
    for document in documents[:50]:  # trained on by whole documents
        assert all(paragraph in train for paragraph in document.split("\n\n"))
    assert len(held_out) > 0.04 * len(train)
    assert "new words here" not in held_out
    assert documents[-1].split("\n\n")[0] in held_out


def test_the_standard_library_speaks_english():
    text = core.load_text(core.LIBRARY)
    train = as_characters(text.train)
    assert len(text.train) > 5e5
    assert 0.03 < len(text.held_out) / len(text.train) < 0.2
    assert train.count(" the ") > 3000
    assert ablation.text_source("library") == ablation.text_source(core.LIBRARY) == core.LIBRARY


def test_docstrings_of_a_source():
    source = (
        '"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        "Three."\n        "no"\n'
    )
    assert core.docstrings(source) == "One.\n\nTwo.\n\nThree."


@pytest.mark.parametrize("joint", ["\n\n", "\n", " "])
def test_an_own_text_is_split_by_paragraphs_lines_or_pieces(joint, tmp_path):
    path = write_text(tmp_path, joint)
    text = core.load_text(ablation.text_source(str(path)))
    whole = path.read_text()
    words = as_characters(text.train).split() + as_characters(text.held_out).split()
    assert whole.startswith(as_characters(text.train).split()[0])
    assert len(words) > 0.9 * len(whole.split())
    assert min(len(text.train), len(text.held_out)) >= core.MIN_BYTES


def test_an_own_text_is_known_by_its_characters_alone(tmp_path):
    plain = write_text(tmp_path)
    marked = write_text(tmp_path, prefix=b"\xef\xbb\xbf", name="marked.txt")
    other = write_text(tmp_path, "\n", name="other.txt")
    sources = [ablation.text_source(str(path)) for path in (plain, marked, other)]
    assert sources[0] == sources[1] != sources[2]
    assert core.settings_key({"text": sources[0]}) == core.settings_key({"text": sources[1]})
    assert sources[1].path == str(marked)
    text = core.load_text(sources[1])
    assert text.train[0] != 0xEF
    assert len(text.digest()) == 16


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "regular file"),
        (b"\xff\xfe\x00", "not a UTF-8"),
        (b"short", "too short"),
        (b"", "too short"),
        (b"the same paragraph\n\n" * 9000, "too short"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(content, said, tmp_path):
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(argparse.ArgumentTypeError, match=rf"own\.txt.*{said}"):
        ablation.text_source(str(path))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--dim", "9999"], "--dim"),
        (["--batch", "100000"], "--batch"),
        (["--length", "100000"], "--length"),
        (["--text", "no/such/file"], "--text"),
    ],
)
def test_a_size_that_is_too_large_is_refused_by_its_own_flag(flags, named, capsys):
    parser = core.make_parser("Test.", seeds=1)
    ablation.add_language_flags(parser, layers=2, dim=128, heads=4, steps=250)
    with pytest.raises(SystemExit) as end:
        core.parse(parser, flags)
    assert end.value.code == 2
    assert f"argument {named}:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"heads": 3}, "--heads 3"),
        ({"heads": 128}, "--heads 128"),
        ({"length": 400}, "--length 400"),
        ({"length": 256, "batch": 128}, "--batch 128"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(sizes, named):
    usual = {"dim": 128, "heads": 4, "length": 128, "batch": 8}
    text = core.Text(np.zeros(999, np.uint8), np.zeros(300, np.uint8))
    ablation.check_language_flags(argparse.Namespace(**usual), text)
    with pytest.raises(core.UsageError, match=named):
        ablation.check_language_flags(argparse.Namespace(**usual | sizes), text)


ACTIVATIONS = ("softmax", "sigmoid", "tanh", "none")
OPTIONS = [  # of CausalAttention
    {},
    {"qk_activ": "gelu"},
    {"qk_norm": "fro_norm"},
    {"qk_norm": "rms_norm", "qk_activ": "gelu"},
    {"post_attn_norm": "rms_norm"},
    {"position": "rotary"},
    {"position": "none", "qk_norm": "fro_norm"},
    {"query_dim": 8},
]


def make_attention(activation, options):
    """A CausalAttention of width 12 and 2 heads with large weights and random slopes."""
    layer = core.CausalAttention(12, 2, attn_activ=activation, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def attention_by_definition(layer, x, length):
    """One sequence [T, D], one head, query and key at a time, in float64."""
    weights = {name: p.detach().double().numpy() for name, p in layer.named_parameters()}
    inputs = x.double().numpy() @ weights["inputs.weight"].T + weights["inputs.bias"]
    query, key, gate, value = np.split(inputs, np.cumsum(layer.sizes)[:3], axis=1)
    value = gate * stats.norm.cdf(gate) * value
    mixed = []
    for head in range(2):
        q, k, v = (np.split(part, 2, axis=1)[head] for part in (query, key, value))
        out = np.zeros_like(v)
        for i in range(length):
            logits = []
            for j in range(i + 1):
                a, b = (prepare_by_definition(layer, part) for part in (q[i], k[j]))
                if layer.position == "rotary":
                    a, b = turn(a, i), turn(b, j)
                logit = a @ b / np.sqrt(len(a))
                if layer.position == "linear":
                    logit += np.log1p(np.exp(weights["slope"][head])) * (j - i)
                logits.append(logit)
            logits = np.array(logits)
            by_name = {
                "softmax": np.exp(logits) / np.exp(logits).sum(),
                "sigmoid": 1 / (1 + np.exp(-logits)),
                "tanh": np.tanh(logits),
                "none": logits,
            }
            out[i] = by_name[layer.attn_activ] @ v[: i + 1]
            if layer.post_attn_norm == "rms_norm":
                out[i] /= np.sqrt((out[i] ** 2).mean())
        mixed.append(out)
    return np.concatenate(mixed, axis=1) @ weights["out.weight"].T + weights["out.bias"]


def prepare_by_definition(layer, x):
    if layer.qk_activ == "gelu":
        x = x * stats.norm.cdf(x)
    if layer.qk_norm == "none":
        return x
    size = np.sqrt((x**2).sum())
    return x / size * (np.sqrt(len(x)) if layer.qk_norm == "rms_norm" else 1.0)


def turn(x, at):
    """Rotary position by complex numbers."""
    half = len(x) // 2
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * at / 10000 ** (np.arange(half) / half))
    return np.concatenate([pairs.real, pairs.imag])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_causal_attention_against_its_definition(activation, options):
    layer = make_attention(activation, options)
    x = 2 * torch.randn(2 * 5, 12)
    found = layer(x, (2, 5)).detach().numpy()
    for row in range(2):
        part = slice(5 * row, 5 * row + 5)
        expected = attention_by_definition(layer, x[part], 5)
        close = {"rtol": 2e-3, "atol": 2e-4 * np.abs(expected).max()}
        np.testing.assert_allclose(found[part], expected, **close)


def test_a_norm_over_the_whole_tensor():
    x = torch.randn(2, 3, 4)
    whole = core.divide_by_norm(x, "fro_norm", None)
    torch.testing.assert_close(whole, x / x.norm())
    assert torch.equal(core.divide_by_norm(x, "none"), x)


def test_rotary_logits_depend_on_the_distance_alone():
    query, key = torch.randn(2, 8, dtype=torch.float64)
    turned = [core.rotate(x.expand(1, 1, 9, 8)) for x in (query, key)]
    logits = (turned[0] @ turned[1].mT)[0, 0]
    for distance in range(-8, 9):
        diagonal = logits.diagonal(distance)
        torch.testing.assert_close(  # the angles are float32
            diagonal, diagonal[:1].expand(len(diagonal)), rtol=1e-5, atol=1e-5
        )
    assert logits.diagonal(1)[0] != logits.diagonal(-1)[0]


def make_language_model(activation="softmax", options=None, dim=12):
    with core.initialised_from(3):
        mixing = core.CausalAttention(dim, 2, attn_activ=activation, **(options or {}))
        layer = core.TransformerLayer(mixing, core.FeedForward(dim, 2 * dim), dim)
        return core.LanguageModel([layer], dim)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_prediction_sees_what_follows_or_another_window(activation, options):
    model = make_language_model(activation, options)
    tokens = torch.arange(14).view(2, 7) * 17 % 256
    changed = tokens.clone()
    changed[0, 4:] = (changed[0, 4:] + 31) % 256
    one, other = (model(each).view(2, 7, 256) for each in (tokens, changed))
    assert torch.equal(one[0, :4], other[0, :4])
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[0, 4:], other[0, 4:])
    gradient = torch.autograd.grad(one[0, 2].square().sum(), model.embed.weight)[0]
    seen = gradient.abs().sum(1) > 0
    assert seen[tokens[0, :3]].all() and not seen[tokens[0, 3:]].any()


def own_text(rng=0):
    """A Text of random bytes."""
    generator = np.random.default_rng(rng)
    train, held_out = (generator.integers(256, size=n, dtype=np.uint8) for n in (5000, 600))
    return core.Text(train, held_out)


def test_training_on_text_is_plain_adamw():
    text = own_text()
    settings = {"seed": 5, "lr": 1e-2, "steps": 20, "batch": 4, "length": 16}
    trained = make_language_model()
    found = core.train_on_text(trained, text, **settings)
    model = make_language_model()
    rng = core.stream(5, "order")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses = []
    norms = []
    for step in range(20):
        starts = rng.integers(len(text.train) - 16, size=4)
        rows = np.stack([text.train[s : s + 17] for s in starts]).astype(np.int64)
        rows = torch.from_numpy(rows)
        loss = F.cross_entropy(model(rows[:, :-1]).view(4, 16, 256).mT, rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        for group in optimizer.param_groups:
            group["lr"] = (0.5e-2, 1e-2)[step > 0]  # a tenth of the steps is two
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(found["loss"], losses, rtol=1e-4)
    np.testing.assert_allclose(found["gradient_norm"], norms, rtol=1e-3)
    starts = np.linspace(0, len(text.held_out) - 17, 256).astype(int)
    rows = np.stack([text.held_out[s : s + 17] for s in starts]).astype(np.int64)
    rows = torch.from_numpy(rows)
    with torch.no_grad():
        expected = F.cross_entropy(model(rows[:, :-1]).view(-1, 16, 256).mT, rows[:, 1:]).item()
    assert abs(core.held_out_loss(trained, text, 16) - expected) < 1e-3
    assert trained.training


def test_micro_batches_are_one_large_batch():
    text = own_text()
    starts = np.arange(0, 80, 20)
    whole = core.cut_windows(text.train, starts, 8, "cpu")
    halves = [core.cut_windows(text.train, part, 8, "cpu") for part in (starts[:2], starts[2:])]
    found = []
    for batches in ([whole], halves):
        model = make_language_model()
        optimizer = core.language_optimizer(model, 1e-2)
        found.append([core.language_step(model, optimizer, 1e-2, batches) for _ in range(3)])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_a_language_model_that_diverges_is_a_result():
    settings = {"seed": 0, "lr": 1e30, "steps": 10, "batch": 2, "length": 8}
    found = core.train_on_text(make_language_model(), own_text(), **settings)
    assert not math.isfinite(found["loss"][-1])


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"lr": 2e-2}, {"steps": 11}, {"batch": 3}, {"length": 9}], ids=str
)
def test_every_argument_of_training_on_text_changes_its_loss(change):
    settings = {"seed": 5, "lr": 1e-2, "steps": 10, "batch": 2, "length": 8}
    one, other = (
        core.train_on_text(make_language_model(), own_text(), **settings | each)["loss"][-1]
        for each in ({}, change)
    )
    assert abs(one - other) > 1e-4 * abs(one)


# Sections 10 to 17: the harness

HERE = Path(core.__file__).parent
PATIENCE = 120  # seconds that any subprocess may take on a busy machine
TOY = '''"""Does the toy add up?

Notebook    graph notebook: opening, 6/3
Setup       Nothing is trained.
Hypothesis  Two is more than one.
Rule        3 paired seeds.
Cost        1 s
"""

import os
import time

import core
from core import OURS, Check, Claim

import numpy as np
import torch

if __name__ == "__mp_main__":
    exec(os.environ.get("TOY_IMPORT", ""))

parser = core.make_parser(__doc__, seeds=3)
parser.add_argument("--size", nargs="+", type=core.integer(1, 64), default=[1], help="size")
parser.add_argument("--rate", nargs="+", type=core.any_number, default=[0.5], help="rate")
parser.add_argument("--text", nargs="+", type=core.input_file, default=[None], help="a text")
parser.add_argument("--dim", nargs="+", type=core.layer_width, default=[4], help="width")

ARMS = {"plain": {}, "double": {"size": 2}}
ABLATIONS = {"a | <b> `c` $x_y$ \\u00fc": {"rate": 1.0}}
COLUMNS = ["sum", "spread"]
TINY = {"dim": 2}


def trial(config, seed, job):
    """What a test does to a trial stands in TOY."""
    exec(os.environ.get("TOY", ""))
    with core.initialised_from(seed):
        noise = torch.randn(100, config.dim) @ torch.randn(config.dim, 7)
    x = config.size + config.rate * noise.double().numpy() / 100
    if config.text is not None:
        with open(config.text.path) as file:
            x = x + len(file.read())
    return {"sum": x.mean(), "spread": x.std(), "name": f"seed {seed}", "curve": x[:, 0]}


def stacked_trial(config, seeds, job):
    """The same for a stack of seeds."""
    exec(os.environ.get("TOY", ""))
    return [{"sum": seed, "spread": len(seeds)} for seed in seeds]


CLAIMS = [
    Claim("Two is more than one.", "6/3",
          Check("sum", above=0.5, arm="double", minus="plain")),
    Claim("The rate | <b> <!-- entries --> does nothing.", OURS,
          Check("sum", between=(-0.1, 0.1), arm=list(ABLATIONS)[0], minus="plain")),
    Claim("Over all arms the sum is large.", "opening", Check("total", above=100)),
]


def across(run):
    return {"total": sum(run.values(arm, "sum") for arm in run.tables)}


def plot(run):
    figure = core.draw_curves(run, "curve", "It goes up", "A curve", "epoch", "y")
    return {"curve": figure, "note.txt": "some text"}


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY, across=across)
'''
HOSTILE_ARM = "a | <b> `c` $x_y$ ü"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with core.py and exp_toy.py, and ways to run the toy in it."""
    for name in (*core.GROUP_VARIABLES, "TOY", "TOY_IMPORT"):
        monkeypatch.delenv(name, raising=False)
    return Lab(tmp_path / "lab")


class Lab:
    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        shutil.copy(core.__file__, folder / "core.py")
        self.script = folder / "exp_toy.py"
        self.script.write_text(TOY, encoding="utf-8")
        self.log = folder / "logbook.md"

    def placed(self, argv):
        """argv with the flags, if it lacks them, that keep a run out of the repository."""
        argv = list(argv)
        for flag, value in (
            ("--jobs", 1),
            ("--runs", self.folder / "runs"),
            ("--logbook", self.log),
            ("--plots", self.folder / "plots"),
        ):
            if flag not in argv:
                argv += [flag, str(value)]
        return argv

    def toy(self):
        """The script as a module."""
        spec = importlib.util.spec_from_file_location("exp_toy", self.script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def run(self, *argv, toy=None, **changes):
        """Run in this process; returns the module."""
        toy = self.toy() if toy is None else toy
        core.read_module.cache_clear()
        core.main(
            toy.parser,
            changes.get("arms", toy.ARMS),
            changes.get("ablations", toy.ABLATIONS),
            changes.get("trial", toy.trial),
            changes.get("claims", toy.CLAIMS),
            changes.get("plot", toy.plot),
            toy.COLUMNS,
            toy.TINY,
            across=changes.get("across", toy.across),
            seeds_per_batch=changes.get("seeds_per_batch", 1),
            timing=changes.get("timing", False),
            argv=self.placed(argv),
        )
        return toy

    def start(self, *argv, python=(), env=None, **popen):
        """Start a process that runs the toy, in a session of its own."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        popen = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": self.folder} | popen
        return subprocess.Popen(
            [sys.executable, *python, popen.pop("script", "exp_toy.py"), *argv],
            env=clean | (env or {}), text=True, start_new_session=True, **popen,
        )  # fmt: skip

    def finish(self, *argv, **more):
        """Run a process to its end: (exit status, stdout, stderr)."""
        process = self.start(*argv, **more)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err

    def records(self, name="runs"):
        """{file: bytes of its arrays}."""
        found = {}
        for path in sorted((self.folder / name / "toy").glob("*.npz")):
            with np.load(path, allow_pickle=False) as file:
                found[path.name] = {n: file[n].tobytes() for n in file.files if n}
        return found

    def everything(self):
        """{path: content} of all files but code."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        paths = [path for path in paths if path.suffix not in (".py", ".pyc")]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}


def complaints(err):
    """Lines of stderr other than progress."""
    return [x for x in err.splitlines() if not re.match(r"(toy: \d|\d+/\d+ )", x)]


# --- statistics and claims


def fake_run(arms, tables=None, across=None):
    """A core.Run of {arm: {metric: values}}; the settings of an arm are its name."""
    n = max(len(values) for metrics in arms.values() for values in metrics.values())
    results = {
        arm: [dict(zip(metrics, row, strict=True)) for row in zip(*metrics.values(), strict=True)]
        for arm, metrics in arms.items()
    }
    settings = {arm: {"arm": arm} for arm in arms}
    run = core.Run(settings, list(range(n)), results, settings if tables is None else tables, 0.0)
    run.across = across or {}
    return run


def test_mean_interval_is_student_t():
    values = [1.0, 2.0, 4.0, 9.0]
    found = core.mean_interval(values)
    half = 3.182446305284263 * 3.559026084010437 / 2  # t(0.975, 3 degrees) * sd / sqrt(4)
    assert found.estimate == 4
    assert (found.low, found.high) == pytest.approx((4 - half, 4 + half), rel=1e-12)
    assert core.mean_interval([5.0])[:3] == (5, -math.inf, math.inf)
    assert core.mean_interval([1.0, math.inf]).high == math.inf
    assert math.isnan(core.mean_interval([]).estimate)
    assert core.mean_interval([2.0, 2.0])[:3] == (2, 2, 2)


def test_ratio_interval_is_that_of_the_logarithms():
    found = core.ratio_interval([2.0, 8.0], [1.0, 1.0])
    half = 12.706204736174694 * math.log(4) / 2  # t(0.975, 1) * sd(log) / sqrt(2)
    assert found.estimate == pytest.approx(4)
    assert found.low == pytest.approx(math.exp(math.log(4) - half))
    assert found.high == pytest.approx(math.exp(math.log(4) + half))
    zero = core.ratio_interval([0.0, 1.0], [1.0, 1.0])
    assert (zero.low, zero.high) == (0, math.inf)


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (1, 7), (12, 20)])
def test_rate_interval_is_exact(hits, n):
    found = core.rate_interval([1] * hits + [0] * (n - hits))

    def at_most(k, p):
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))

    assert found.estimate == hits / n
    if hits > 0:
        assert 1 - at_most(hits - 1, found.low) == pytest.approx(0.025)
    else:
        assert found.low == 0
    if hits < n:
        assert at_most(hits, found.high) == pytest.approx(0.025)
    else:
        assert found.high == 1


def test_rate_difference_counts_only_seeds_that_differ():
    hits = np.array([1] * 6 + [1] * 2 + [0] * 2)
    base = np.array([0] * 6 + [1] * 2 + [0] * 2)
    found = core.rate_difference_interval(hits, base)
    lowest = 0.025 ** (1 / 6)  # of 6 wins out of 6
    assert found.estimate == pytest.approx(0.6)
    assert (found.low, found.high) == pytest.approx((0.6 * (2 * lowest - 1), 0.6))
    assert core.rate_difference_interval(base, base)[:3] == (0, -math.inf, math.inf)


FOUR = fake_run(
    {
        "small": {"x": [1.0, 1.1, 0.9, 1.0], "hit": [0, 0, 0, 0], "skip": [0, 0, 0, 1]},
        "large": {"x": [2.0, 2.1, 1.9, 2.0], "hit": [1, 1, 1, 1], "skip": [0, 0, 0, 0]},
        "wild": {"x": [-9.0, 9.0, 1.0, 3.0], "hit": [0, 1, 0, 1], "skip": [1, 1, 1, 1]},
        "seven": {"x": [7.0, 7.0, 7.0, 7.0], "hit": [1, 0, 1, 1], "skip": [0, 0, 0, 0]},
        "broken": {"x": [1.0, math.nan, 1.0, 1.0], "hit": [0, 0, 0, 0], "skip": [0, 0, 0, 0]},
    },
    across={"total": [10.0, 10.1, 9.9, 10.0]},
)


@pytest.mark.parametrize(
    ("check", "outcome"),
    [
        (Check("x", below=1.5, arm="small"), "holds"),
        (Check("x", below=0.5, arm="small"), "fails"),
        (Check("x", below=1.05, arm="small"), "open"),
        (Check("x", above=0.5, arm="small"), "holds"),
        (Check("x", above=1.5, arm="small"), "fails"),
        (Check("x", between=(0.5, 1.5), arm="small"), "holds"),
        (Check("x", between=(1.5, 2.5), arm="small"), "fails"),
        (Check("x", between=(0.95, 2.5), arm="small"), "open"),
        (Check("x", above=0, arm="wild"), "open"),
        (Check("x", below=99, arm="broken"), "open"),
        (Check("x", equals=7, arm="seven"), "holds"),
        (Check("x", equals=7.000001, arm="seven"), "fails"),
        (Check("x", equals=1, arm="small"), "fails"),  # the mean is, single seeds are not
        (Check("x", equals=7, arm="broken"), "open"),  # NaN is no evidence
        (Check("x", above=0.9, arm="large", minus="small"), "holds"),
        (Check("x", above=1.1, arm="large", minus="small"), "fails"),
        (Check("x", between=(1.8, 2.2), arm="large", over="small"), "holds"),
        (Check("x", below=1, arm="large", over="small"), "fails"),
        (Check("x", below=1, arm="wild", over="small"), "open"),  # no ratio of what is negative
        (Check("hit", above=0.3, arm="large", rate=True), "holds"),
        (Check("hit", above=0.5, arm="large", rate=True), "open"),  # 4 of 4: above 0.398
        (Check("hit", above=0.7, arm="small", rate=True), "fails"),
        (Check("hit", above=-0.3, arm="large", minus="small", rate=True), "holds"),
        (Check("hit", above=0.0, arm="large", minus="small", rate=True), "open"),
        (Check("hit", below=-0.3, arm="large", minus="small", rate=True), "fails"),
        (Check("hit", above=0.0, arm="large", minus="large", rate=True), "open"),
        (Check("x", below=0.95, arm="small", unless="skip"), "open"),
        (Check("x", below=1.5, arm="wild", unless="skip"), "open"),  # no seed is left
        (Check("x", equals=1.5, arm="wild", unless="skip"), "open"),
        (Check("x", equals=1, arm="large", minus="small"), "holds"),
        (Check("x", above=6, any_arm=("small", "seven")), "holds"),
        (Check("x", above=6, any_arm=("small", "large")), "fails"),
        (Check("x", above=6, any_arm=("small", "wild")), "open"),
        (Check("total", between=(9, 11)), "holds"),
        (Check("total", below=9), "fails"),
    ],
)
def test_check(check, outcome):
    found = [check.judge(FOUR, arm).outcome for arm in check.any_arm or [check.arm]]
    assert core.outcome_of_any(found) == outcome


@pytest.mark.parametrize(
    "bounds",
    [
        {},
        {"above": 1, "below": 2},
        {"above": 1, "equals": 2},
        {"above": 1, "minus": "b", "over": "c"},
        {"equals": 1, "over": "b"},
        {"above": 1, "any_arm": ("a", "b"), "minus": ("c",)},
    ],
)
def test_a_check_that_cannot_be_judged_is_refused(bounds):
    with pytest.raises(ValueError, match="x: give"):
        Check("x", **bounds)


def test_each_of_any_arm_can_have_an_arm_of_its_own_to_be_compared_with():
    bases = {"large": "seven", "seven": "small"}
    check = Check("x", above=-math.inf, any_arm=tuple(bases), minus=tuple(bases.values()))
    assert set(check.arms()) == {"large", "seven", "small"}
    for arm, base in bases.items():
        expected = (FOUR.values(arm, "x") - FOUR.values(base, "x")).mean()
        assert check.judge(FOUR, arm).estimate == pytest.approx(expected)
    plain = Claim("C.", "6/3", check).judge(FOUR)[1]
    assert "(large)" in core.list_values(plain)
    several = [Check("x", above=0, arm="large", minus=base) for base in ("seven", "small")]
    words = core.list_values(Claim("C.", "6/3", *several).judge(FOUR)[1])
    assert "(less seven)" in words and "(less small)" in words


@pytest.mark.parametrize("half, shown", [(99.4, "99"), (99.5, "100"), (1234.5, "1,234")])
def test_half_widths_have_two_digits_and_no_exponent(half, shown):
    assert core.format_half_width(core.Interval(5.0, 5.0 - half, 5.0 + half)) == shown


def test_a_rate_with_nan_is_open():
    assert core.rate_interval([1, 0, math.nan]).low == -math.inf


def test_what_claims_lack_is_named_by_arms_or_by_flags():
    run = fake_run({"one": {"x": [1.0]}}, {"one": {"arm": "one"}, "two": {"arm": "two"}})
    of_an_arm = Claim("C.", "6/3", Check("x", above=0, arm="two"))
    across_arms = Claim("C.", "6/3", Check("x", above=0, arm="one"), Check("total", above=0))
    for claim in (of_an_arm, across_arms):
        assert not claim.can_be_judged(run)
        assert core.missing_for([claim], run, {}) == "--arms 'two'"
        assert core.missing_for([claim], run, {"arm": ["one"]}) == "--arm two"


def test_unless_leaves_out_seeds_of_both_arms():
    run = fake_run(
        {
            "a": {"x": [1.0, 1.0, 50.0, 1.0], "skip": [0, 0, 1, 0]},
            "b": {"x": [0.0, 0.0, 0.0, 50.0], "skip": [0, 0, 0, 1]},
        }
    )
    check = Check("x", equals=1, arm="a", minus="b", unless="skip")
    assert check.judge(run, "a").outcome == "holds"
    assert Check("x", equals=1, arm="a", minus="b").judge(run, "a").outcome == "fails"


def test_an_ablation_with_fewer_seeds_is_paired_with_the_first_ones():
    run = fake_run({"many": {"x": [1.0, 1.0, 9.0, 9.0]}, "few": {"x": [0.0, 0.0]}})
    assert Check("x", equals=1, arm="many", minus="few").judge(run, "many").outcome == "holds"
    assert Check("x", equals=-1, arm="few", minus="many").judge(run, "few").outcome == "holds"
    assert Check("x", equals=1, arm="many").judge(run, "many").outcome == "fails"


def test_a_claim_is_as_good_as_its_worst_check():
    holds = Check("x", above=0.5, arm="small")
    fails = Check("x", above=5, arm="small")
    undecided = Check("x", above=0, arm="wild")
    assert Claim("A.", "6/3", holds, holds).judge(FOUR)[0] == "reproduced"
    assert Claim("A.", "6/3", holds, undecided).judge(FOUR)[0] == "inconclusive"
    assert Claim("A.", "6/3", undecided, fails, holds).judge(FOUR)[0] == "refuted"
    assert Claim("A.", OURS, holds).judge(FOUR)[0] == "supported"
    assert Claim("A.", OURS, fails).judge(FOUR)[0] == "rejected"
    assert Claim("A.", OURS, undecided).judge(FOUR)[0] == "inconclusive"


def test_one_of_several_arms_has_to_hold_all_checks():
    run = fake_run(
        {
            "low": {"x": [1.0, 1.1, 0.9], "y": [1.0, 1.1, 0.9]},
            "high": {"x": [5.0, 5.1, 4.9], "y": [5.0, 5.1, 4.9]},
            "both": {"x": [5.0, 5.1, 4.9], "y": [1.0, 1.1, 0.9]},
        }
    )
    one = ("low", "high")
    apart = [Check("x", above=3, any_arm=one), Check("y", below=3, any_arm=one)]
    assert Claim("A.", "6/3", *apart).judge(run)[0] == "refuted"
    three = (*one, "both")
    together = [Check("x", above=3, any_arm=three), Check("y", below=3, any_arm=three)]
    verdict, measured = Claim("A.", "6/3", *together).judge(run)
    assert verdict == "reproduced"
    assert [one.arm for one in measured if one.outcome == "holds"].count("both") == 2
    assert core.brief(measured) == "x 5 ± 0.25; y 1 ± 0.25; in 1 of 3 arms (both)"
    assert core.list_measured(measured).count("(low)") == 2
    mixed = [*together, Check("y", above=3, arm="low")]
    assert Claim("A.", "6/3", *mixed).judge(run)[0] == "refuted"


def test_of_many_values_an_entry_shows_the_ends():
    run = fake_run({f"arm {i}": {"x": [float(i)]} for i in (3, 1, 5, 2, 4)})
    checks = [Check("x", equals=0, arm=arm) for arm in run.arms]
    other = [Check("x", equals=9, arm="arm 3"), Check("x", equals=9, arm="arm 4")]
    verdict, measured = Claim("A.", "6/3", *checks, *other).judge(run)
    assert verdict == "refuted"
    ends = "x 1 (arm 1) to 5 (arm 5), 5 checks"
    assert core.brief(measured) == f"{ends}; 3 (arm 3); 4 (arm 4)"
    assert core.brief(measured[:4]) == core.list_measured(measured[:4])
    open_too = [measured[0]._replace(estimate=math.nan, words="nan"), *measured[1:5]]
    assert "nan" in core.brief(open_too)
    _, alike = Claim("A.", "6/3", *[Check("x", equals=3, arm="arm 3")] * 5).judge(run)
    assert core.brief(alike) == "x 3 (5 checks)"


def test_a_claim_is_judged_where_the_settings_are_whatever_their_name():
    tables = {"one": {"n": 1}, "two": {"n": 2}}
    values = [{"x": 1.0}, {"x": 1.0}]

    def run_of(arms):
        return core.Run(arms, [0, 1], dict.fromkeys(arms, values), tables, 0.0)

    claim = Claim("A.", OURS, Check("x", above=0, arm="two", minus="one"))
    over_all = Claim("A.", OURS, Check("total", above=0))
    whole = run_of({"one": {"n": 1}, "otherwise named": {"n": 2}})
    assert claim.can_be_judged(whole) and over_all.can_be_judged(whole)
    part = run_of({"two": {"n": 2}})
    assert not claim.can_be_judged(part) and not over_all.can_be_judged(part)
    changed = run_of({"one": {"n": 1, "m": 5}, "two": {"n": 2, "m": 5}})
    assert not claim.can_be_judged(changed) and not over_all.can_be_judged(changed)


def test_the_conclusion_counts_notebook_and_ours_apart():
    claims = [Claim("A.", "6/3"), Claim("B.", "6/3"), Claim("C.", OURS)]
    verdicts = ["reproduced", "refuted", "supported"]
    text = core.conclude([(c, v, "") for c, v in zip(claims, verdicts, strict=True)])
    notebook, ours = text.split(". ")
    assert "2 " in notebook and "1 is reproduced (A)" in notebook and "1 is refuted (B)" in notebook
    assert "claim of ours is supported (C)" in ours
    many = [(Claim(f"A{i}.", "6/3"), "reproduced", "") for i in range(8)]
    text = core.conclude([*many, (claims[1], "refuted", "")])
    assert "8 are reproduced, " in text and "refuted (B)" in text  # only the unexpected is named
    text = core.conclude([*many, (claims[2], "supported", "")])
    assert "Of 8 statements" in text and "supported (C)" in text  # a single one is named


@pytest.mark.parametrize(
    ("x", "text"),
    [(0.012345, "0.0123"), (1234567.0, "1,234,567"), (999.9, "1,000"), (math.nan, "–"), (0, "0")],
)
def test_format_number(x, text):
    assert core.format_number(x) == text


# --- flags and arms

ROWS = {"plain": {}, "double": {"size": 2}, "fast": {"rate": 2.0}}
MORE = {"wide": {"dim": 8}, "double, fast": {"size": 2, "rate": 2.0}}


@pytest.mark.parametrize(
    ("argv", "arms"),
    [
        # without flags: both tables
        ("", {"plain": (1, 0.5, 4), "double": (2, 0.5, 4), "fast": (1, 2.0, 4),
              "wide": (1, 0.5, 8), "double, fast": (2, 2.0, 4)}),
        # one value: in every row of ARMS, names stay
        ("--dim 16", {"plain": (1, 0.5, 16), "double": (2, 0.5, 16), "fast": (1, 2.0, 16)}),
        # a row that sets the same otherwise is dropped
        ("--size 4", {"plain": (4, 0.5, 4), "fast": (4, 2.0, 4)}),
        ("--rate 3", {"plain": (1, 3.0, 4), "double": (2, 3.0, 4)}),
        # rows that become equal merge; what equals a row of a table has its name
        ("--size 2", {"double": (2, 0.5, 4), "double, fast": (2, 2.0, 4)}),
        ("--dim 8", {"wide": (1, 0.5, 8), "double": (2, 0.5, 8), "fast": (1, 2.0, 8)}),
        ("--size 2 --rate 2", {"double, fast": (2, 2.0, 4)}),
        # the default, given: the rows of ARMS as they are
        ("--dim 4", {"plain": (1, 0.5, 4), "double": (2, 0.5, 4), "fast": (1, 2.0, 4)}),
        ("--size 1", {"plain": (1, 0.5, 4), "fast": (1, 2.0, 4)}),
        # several values: a grid; a value given twice counts once
        ("--dim 4 16 4", {"plain": (1, 0.5, 4), "plain, dim 16": (1, 0.5, 16),
                          "double": (2, 0.5, 4), "double, dim 16": (2, 0.5, 16),
                          "fast": (1, 2.0, 4), "fast, dim 16": (1, 2.0, 16)}),
        ("--size 1 3 --rate 0.5", {"plain": (1, 0.5, 4), "plain, size 3": (3, 0.5, 4)}),
        ("--size 1 3 --rate 0.5 -1e2",
         {"plain": (1, 0.5, 4), "plain, size 1, rate -100": (1, -100.0, 4),
          "plain, size 3, rate 0.5": (3, 0.5, 4), "plain, size 3, rate -100": (3, -100.0, 4)}),
        # --arms: rows of both tables, also twice
        ("--arms wide plain wide", {"wide": (1, 0.5, 8), "plain": (1, 0.5, 4)}),
        ("--arms wide --rate 3", {"wide": (1, 3.0, 8)}),
        # two values that look the same are two arms
        ("--rate 0.1 0.10000001 --arms plain", 2),
    ],
)  # fmt: skip
def test_flags_choose_arms(lab, argv, arms):
    parser = lab.toy().parser
    options, base, given = core.parse(parser, argv.split())
    chosen = core.choose_arms(ROWS, MORE, base, given, options)
    if isinstance(arms, int):
        assert len(chosen) == arms
        return
    found = {name: (row["size"], row["rate"], row["dim"]) for name, row in chosen.items()}
    assert found == arms


def test_parse_tells_defaults_from_values_given(lab):
    argv = ["--rate", "-1e2", "-.5", "-inf", "3", "--runs", "~/x", "--note", "-1 is less"]
    options, base, given = core.parse(lab.toy().parser, argv)
    assert base == {"size": 1, "rate": 0.5, "text": None, "dim": 4}
    assert given == {"rate": [-100.0, -0.5, -math.inf, 3.0]}
    assert options.runs == Path.home() / "x"
    assert options.note == "-1 is less"
    assert core.parse(lab.toy().parser, ["--rate", "0.5"])[2] == {"rate": [0.5]}


def test_a_choice_may_look_like_a_negative_number(lab):
    parser = lab.toy().parser
    parser.add_argument("--mask", nargs="+", choices=["-1", "-inf", "none"], default=["none"])
    assert core.parse(parser, ["--mask", "-1", "-inf"])[2] == {"mask": ["-1", "-inf"]}


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (core.integer(2, 5), {"2": 2, "5": 5}, ["1", "6", "2.0", "", "x", "1e0"]),
        (core.positive_int, {"1": 1}, ["0", "-1"]),
        (core.layer_width, {"8": 8}, ["0", "1000000"]),
        (core.any_number, {"-1e2": -100.0, "-inf": -math.inf}, ["nan", "x", ""]),
        (core.positive_float, {"1e-5": 1e-5}, ["0", "-1", "inf", "nan"]),
        (core.probability, {"0.25": 0.25}, ["0", "1", "1.5", "-0.5", "nan", "half"]),
        (core.int_tuple, {"0,2,3": (0, 2, 3), "1": (1,)}, ["2,1", "1,1", "-1", "", "1,", "a"]),
        (core.input_file, {}, ["/nonexistent", "/dev/null", ".", "~nobody-of/x", "x" * 300]),
    ],
    ids=["integer", "positive_int", "width", "number", "positive", "share", "tuple", "file"],
)
def test_types(read, good, bad):
    for text, value in good.items():
        assert read(text) == value
        assert type(read(text)) is type(value)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(text))):
            read(text)


def test_grid_names_every_combination():
    table = core.grid(learning_rate=[1e-4, 1e-5], hops=[(0, 1), (2,)])
    assert len(table) == 4
    assert table["learning rate 1e-05, hops 0,1"] == {"learning_rate": 1e-5, "hops": (0, 1)}


GROUP_OF_TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--dim", "1000000"], "--dim"),
        (["--threads", "100000"], "--threads"),
        (["--jobs", "100000"], "--jobs"),
        (["--seeds", "0"], "--seeds"),
        (["--seeds", "100000"], "--seeds"),
        (["--first-seed", "-5"], "--first-seed"),
        (["--rate", *map(str, range(40_000))], "--rate"),
        (["--rate", *map(str, range(300)), "--size", *map(str, range(1, 60))], "--size"),
        (["--rate", "nan"], "--rate"),
        (["--rate"], "--rate"),
        (["--size", "1.5"], "'1.5'"),
        (["--arms", "plain", "nothing"], "'nothing'"),
        (["--arms", "double", "--size", "3"], "--size"),
        (["--see", "3"], "--see"),
        (["stray"], "stray"),
        (["--note", "caf\udce9"], "UTF-8"),
        (["--note", " "], "--note"),
        (["--rate", "1", "--rate", "2"], "--rate: given twice"),
        (["--arms", "plain", "--arms=double"], "--arms: given twice"),
        (["--seeds", "1", "--seeds", "2"], "--seeds: given twice"),
        (["--note", "A note.", "--no-log"], "--note"),
        (["--device", "tpu"], "--device"),
        (["--text", "/nonexistent"], "--text"),
        (["--text", "/dev/null"], "--text"),
        (["--text", "x" * 300], "--text"),
        (["--logbook", "{lab}/exp_toy.py"], "--logbook"),
        (["--logbook", "{lab}"], "--logbook"),
        (["--logbook", "/dev/null"], "--logbook"),
        (["--logbook", "{lab}/exp_toy.py/x.md"], "--logbook"),
        (["--plots", "{lab}/exp_toy.py"], "--plots"),
        (["--plots", "/dev/null/x"], "--plots"),
        (["--runs", "{lab}/exp_toy.py"], "--runs"),
        (["--runs", "{lab}/" + "x" * 300], "--runs"),
        (["--runs", ""], "--runs"),
        (["--logbook", "{lab}/" + "x" * 300], "--logbook"),
        (["--logbook", "~nobody-of/x.md"], "--logbook"),
        (["--rate", "-nan"], "'-nan'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:24],
)
def test_bad_input_is_one_line(lab, capsys, argv, words):
    toy = lab.toy()
    before = lab.everything()
    argv = lab.placed(word.replace("{lab}", str(lab.folder)) for word in argv)
    with pytest.raises(SystemExit) as end:
        core.main(toy.parser, toy.ARMS, toy.ABLATIONS, toy.trial, toy.CLAIMS, toy.plot,
                  toy.COLUMNS, toy.TINY, across=toy.across, argv=argv)  # fmt: skip
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and words in err
    assert lab.everything() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is missing")
def test_a_missing_gpu_is_one_line(lab, capsys):
    with pytest.raises(SystemExit) as end:
        lab.run("--device", "cuda")
    assert end.value.code == 2
    assert "--device cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"RANK": "", "WORLD_SIZE": ""},
        GROUP_OF_TWO,
        {**GROUP_OF_TWO, "MASTER_PORT": "29500x"},
        {**GROUP_OF_TWO, "MASTER_PORT": "99999"},
        {**GROUP_OF_TWO, "RANK": "2", "MASTER_PORT": "29500"},
        {**GROUP_OF_TWO, "RANK": "1", "MASTER_PORT": "1"},
        {**GROUP_OF_TWO, "MASTER_PORT": "free"},
        {**GROUP_OF_TWO, "MASTER_PORT": "free", "MASTER_ADDR": "no-such-host.invalid"},
    ],
    ids=lambda environment: " ".join(environment.values()),
)
def test_what_a_launcher_left_behind_is_one_line(lab, capfd, monkeypatch, environment):
    monkeypatch.setattr(core, "GROUP_SECONDS", 1.0)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(free_port()) if value == "free" else value)
    started = time.monotonic()
    with pytest.raises(SystemExit) as end:
        lab.run()
    assert end.value.code == 2
    assert time.monotonic() - started < PATIENCE
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "RANK" in err


@pytest.mark.parametrize("world", [1, 2])
def test_a_script_that_measures_time_refuses_torchrun(lab, capsys, monkeypatch, world):
    group = argparse.Namespace(rank=0, world=world)
    monkeypatch.setattr(core, "join_group", lambda identity: group)
    with pytest.raises(SystemExit) as end:
        lab.run("--no-log", timing=True)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "torchrun" in err


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


# --- reach

REPOSITORY_FILES = {
    "exp_a.py": '''
import numpy as np
import helper
import other as alias
from helper import shared, Base as Renamed

LIMIT = 3
UNUSED = 4
TABLE = {}
TABLE.update(x=1)
for word in ("a", "b"):
    FILLED = word
try:
    import nothing_here
except ImportError:
    def fallback(): return 1

class Model(Renamed):
    """A docstring."""
    def forward(self):
        def inner():
            return alias.deep()
        return inner

def trial(config, seed, job):
    """Says what it does."""
    model = Model()  # a comment
    return helper.measure(model, LIMIT, TABLE, FILLED), shared(), fallback()

def plot(run):
    return drawn(run)

def drawn(run):
    return 1
''',
    "helper.py": """
import other
DEFAULT = 5
def measure(model, limit, table, filled, more=DEFAULT): return model
def shared(): return other.CONSTANT + 0
def lonely(): return 1
class Base:
    size = other.SIZE
    def method(self): return 1
class Stranger: pass
""",
    "other.py": """
CONSTANT = 1
SIZE = 2
LONELY = 3
def deep(): return deeper()
def deeper(): return 1
""",
}


@pytest.mark.parametrize(
    ("file", "old", "new", "matters"),
    [
        ("exp_a.py", "LIMIT = 3", "LIMIT = 4", True),
        ("exp_a.py", "TABLE.update(x=1)", "TABLE.update(x=2)", True),
        ("exp_a.py", '("a", "b")', '("a", "c")', True),
        ("exp_a.py", "def fallback(): return 1", "def fallback(): return 2", True),
        ("exp_a.py", "return inner", "return None", True),
        ("exp_a.py", "shared(), ", "shared(), 1, ", True),
        ("helper.py", "return model", "return limit", True),
        ("helper.py", "DEFAULT = 5", "DEFAULT = 6", True),  # a default argument
        ("helper.py", "other.CONSTANT + 0", "other.CONSTANT + 1", True),
        ("helper.py", "def method(self): return 1", "def method(self): return 2", True),
        ("other.py", "CONSTANT = 1", "CONSTANT = 2", True),
        ("other.py", "SIZE = 2", "SIZE = 3", True),
        ("other.py", "def deeper(): return 1", "def deeper(): return 2", True),
        ("exp_a.py", "UNUSED = 4", "UNUSED = 5", False),
        ("exp_a.py", "# a comment", "# another", False),
        ("exp_a.py", "Says what it does.", "Says it\n    in two lines.", False),
        ("exp_a.py", '"""A docstring."""', '"""Another."""', False),
        ("exp_a.py", "model = Model()", "model  =  Model( )", False),
        ("exp_a.py", "return drawn(run)", "return 5", False),
        ("helper.py", "def lonely(): return 1", "def lonely(): return 2", False),
        ("helper.py", "class Stranger: pass", "class Stranger: x = 1", False),
        ("other.py", "LONELY = 3", "LONELY = 4", False),
    ],
)  # fmt: skip
def test_the_code_hash_changes_with_what_a_trial_can_reach(tmp_path, file, old, new, matters):
    for name, text in REPOSITORY_FILES.items():
        (tmp_path / name).write_text(text)
    core.read_module.cache_clear()
    before = core.code_hash(tmp_path / "exp_a.py")
    text = REPOSITORY_FILES[file]
    assert text.count(old) == 1
    (tmp_path / file).write_text(text.replace(old, new))
    core.read_module.cache_clear()
    assert (core.code_hash(tmp_path / "exp_a.py") != before) is matters
    core.read_module.cache_clear()


# --- files and records


def test_write_file_keeps_link_mode_and_group(tmp_path):
    real = tmp_path / "real" / "log.md"
    real.parent.mkdir()
    real.write_text("old")
    real.chmod(0o664)
    groups = [g for g in (*os.getgroups(), 12345) if g != os.getgid()]
    try:
        os.chown(real, -1, groups[0])
    except OSError:
        groups = [real.stat().st_gid]
    link = tmp_path / "log.md"
    link.symlink_to(real)
    core.write_file(link, b"new")
    assert link.is_symlink() and real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o664
    assert real.stat().st_gid == groups[0]
    assert os.listdir(real.parent) == ["log.md"]


def test_a_folder_that_cannot_be_synchronised_is_no_failure(tmp_path, monkeypatch):
    real = os.fsync

    def refuse(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(22, "Invalid argument")
        real(number)

    monkeypatch.setattr(os, "fsync", refuse)
    core.write_file(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_full_disk_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as error:
        core.write_file(tmp_path / "a", b"new")
    assert error.value.filename == str(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_ablations_may_have_fewer_seeds(lab, capsys):
    toy = lab.toy()
    toy.parser.ablation_seeds = 2
    lab.run(toy=toy, across=lambda run: {"total": np.array([1000.0, 1000.0])})
    with open(lab.folder / "plots/toy-arms.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    seeds = {arm: [row["seed"] for row in rows if row["arm"] == arm] for arm in ("plain", "double")}
    assert seeds == {"plain": ["0", "1", "2"], "double": ["0", "1", "2"]}
    assert [row["seed"] for row in rows if row["arm"] == HOSTILE_ARM] == ["0", "1"]
    assert "3 paired seeds, 2 in some arms" in lab.log.read_text(encoding="utf-8")
    assert "8 trials" in capsys.readouterr().err


def test_an_ablation_may_have_fewer_seeds_than_others(lab, capsys):
    toy = lab.toy()
    toy.parser.ablation_seeds = 2
    toy.parser.few_seeds = {HOSTILE_ARM: 1}
    lab.run(toy=toy, across=lambda run: {"total": np.array([1000.0])})
    assert "3 paired seeds, 1 in some arms" in lab.log.read_text(encoding="utf-8")
    assert "7 trials" in capsys.readouterr().err


def test_seeds_given_are_those_of_ablations_too(lab, capsys):
    toy = lab.toy()
    toy.parser.ablation_seeds = 1
    lab.run("--arms", "plain", HOSTILE_ARM, "--seeds", "2", toy=toy, across=lambda run: {})
    assert "4 trials" in capsys.readouterr().err
    assert "2 paired seeds ·" in lab.log.read_text(encoding="utf-8")


def test_a_record_comes_back_as_it_was(tmp_path):
    path = tmp_path / "0123.npz"
    result = {"x": 1.5, "n": np.int64(3), "ok": np.bool_(True), "text": "ü|", "curve": np.eye(2)}
    core.write_record(path, result, {"key": "0123", "seed": 0, "seconds": 1.0})
    found, meta = core.read_record(path)
    assert meta["seed"] == 0
    assert (found["x"], found["n"], found["ok"], found["text"]) == (1.5, 3, True, "ü|")
    assert np.array_equal(found["curve"], np.eye(2))
    with pytest.raises(TypeError, match="'thing'"):
        core.write_record(path, {"thing": object()}, {"key": "0123"})


def damage(path, how, bomb):
    """Spoil a record."""
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "bit":
        path.write_bytes(content[:60] + bytes([content[60] ^ 1]) + content[61:])
    elif how == "text":
        path.write_text("not a record")
    elif how == "foreign":
        np.savez(path, x=np.ones(3))
    elif how == "another trial's":
        core.write_record(path, {"sum": 99.0, "spread": 99.0}, {"key": "0" * 16, "seconds": 1.0})
    elif how == "pickle in npz":
        bad = np.empty(1, dtype=object)
        bad[0] = Bomb(bomb)
        np.savez(path, **{"": np.array(json.dumps({"key": path.stem, "seconds": 0}))}, sum=bad)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Bomb(bomb)))
    else:
        path.unlink()
        path.mkdir()


DAMAGES = ["cut", "empty", "bit", "text", "foreign", "another trial's", "pickle in npz", "pickle"]


def test_damaged_records_are_reported_and_computed_again(lab, capsys):
    lab.run("--no-log")
    good = lab.records()
    capsys.readouterr()
    bomb = lab.folder / "exploded"
    paths = sorted((lab.folder / "runs" / "toy").glob("*.npz"))
    for path, how in zip(paths, DAMAGES, strict=False):
        damage(path, how, bomb)
        assert core.read_record(path) is None, how
        assert path.name in capsys.readouterr().err, how
    untouched = paths[len(DAMAGES)].stat().st_mtime_ns
    lab.run("--no-log")
    assert lab.records() == good
    assert paths[len(DAMAGES)].stat().st_mtime_ns == untouched
    assert not bomb.exists()


def test_a_damaged_checkpoint_is_reported_and_not_used(tmp_path, capsys):
    checkpoint = core.Checkpoint(tmp_path / "a.checkpoint")
    assert checkpoint.load() is None
    state = {"w": torch.arange(3.0), "epoch": 2, "names": ["a"], "curve": [np.float64(0.1)]}
    checkpoint.save(state)
    loaded = checkpoint.load()
    assert torch.equal(loaded["w"], state["w"]) and loaded["epoch"] == 2
    assert loaded["curve"] == [0.1]
    content = checkpoint.path.read_bytes()
    bomb = tmp_path / "exploded"
    for bad in (content[:-40], b"", b"text", pickle.dumps(Bomb(bomb))):
        checkpoint.path.write_bytes(bad)
        assert checkpoint.load() is None
        assert "a.checkpoint" in capsys.readouterr().err
    torch.save({"w": Bomb(bomb)}, checkpoint.path)
    assert checkpoint.load() is None
    assert not bomb.exists()
    checkpoint.save(state)
    other = core.Checkpoint(tmp_path / "b.checkpoint")
    shutil.copy(checkpoint.path, other.path)
    assert other.load() is None  # another trial's
    checkpoint.remove()
    checkpoint.remove()
    assert not checkpoint.path.exists()


def test_a_checkpoint_is_due_after_a_while(tmp_path, monkeypatch):
    checkpoint = core.Checkpoint(tmp_path / "a")
    assert not checkpoint.is_due()
    monkeypatch.setattr(core, "CHECKPOINT_SECONDS", -1.0)
    assert checkpoint.is_due()


def test_a_file_enters_by_its_content(lab, monkeypatch):
    first = lab.folder / "one.txt"
    copy = lab.folder / "two.txt"
    other = lab.folder / "three.txt"
    first.write_text("abc")
    copy.write_text("abc")
    other.write_text("abcd")
    trials = lab.folder / "trials.txt"
    monkeypatch.setenv("TOY", f"open({str(trials)!r}, 'a').write('x')")
    counts = []
    for path in (first, copy, other):
        lab.run("--text", str(path), "--no-log", "--seeds", "1")
        counts.append(len(trials.read_text()))
    assert counts == [2, 2, 4]
    first.write_text("xyz!")
    lab.run("--text", str(first), "--no-log", "--seeds", "1")
    assert len(trials.read_text()) == 6


def test_a_stack_of_seeds_is_one_unit(lab, monkeypatch):
    counts = lab.folder / "counts.txt"
    monkeypatch.setenv("TOY", f"open({str(counts)!r}, 'a').write(f'{{len(seeds)}} ')")
    toy = lab.toy()
    changes = {
        "trial": toy.stacked_trial,
        "seeds_per_batch": 2,
        "arms": {"plain": {}},
        "ablations": {},
        "claims": [],
        "plot": lambda run: {},
        "across": None,
    }
    lab.run("--no-log", toy=toy, **changes)
    assert counts.read_text() == "2 1 "
    counts.write_text("")
    records = sorted((lab.folder / "runs" / "toy").glob("*.npz"))
    stacks = {}
    for path in records:
        result, _ = core.read_record(path)
        stacks.setdefault(result["spread"], []).append(path)
    assert sorted(len(paths) for paths in stacks.values()) == [1, 2]
    stacks[2][0].unlink()
    lab.run("--no-log", toy=toy, **changes)
    assert counts.read_text() == "2 "


def test_a_file_that_changes_during_a_run_stops_it(lab, monkeypatch, capsys):
    """Its trials would be kept under the hash of what it held before."""
    text = lab.folder / "one.txt"
    text.write_text("abc")
    monkeypatch.setenv("TOY", "seed and open(config.text.path, 'a').write('d')")
    with pytest.raises(SystemExit) as end:
        lab.run("--text", str(text), "--arms", "plain", "--no-log")
    assert end.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert str(text) in line and "changed since the run began" in line
    assert len(lab.records()) == 1  # that of seed 0


# --- processes


def test_the_first_rank_ends_if_another_dies_after_its_last_record(monkeypatch):
    monkeypatch.setattr(core, "SILENCE_SECONDS", 0.2)
    store = torch.distributed.HashStore()
    core.Group(store, rank=0, world=2).leave_together()
    assert store.check(["complete"]) and store.add("left", 0) == 1


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.distributed.DistNetworkError("Broken pipe"), core.StoppedRunError),
        (RuntimeError("could not restore the state"), RuntimeError),
    ],
)
def test_only_the_error_of_a_store_means_that_a_rank_has_ended(error, raised, monkeypatch):
    def fail(units):
        raise error

    group = core.Group(torch.distributed.HashStore(), rank=0, world=1)
    monkeypatch.setattr(group, "held_by_rank", fail)
    with pytest.raises(raised) as found:
        group.run(None, [], core.report_nothing)
    assert type(found.value) is raised


def launcher(*flags):
    """What starts a script by torchrun, with two ranks."""
    port = str(free_port())
    module = ["-m", "torch.distributed.run"]
    return [*module, "--nproc-per-node", "2", "--master-port", port, *flags]


def test_torchrun_starts_again_after_a_rank_was_killed(lab):
    """Its store outlives the first attempt, whose trials must not count as taken."""
    die_once = (
        "with contextlib.suppress(FileExistsError):\n"
        "    open('died', 'x')\n"
        "    os.kill(os.getpid(), 9)"
    )
    env = {"TOY": f"import contextlib\n{die_once}"}
    code, _, err = lab.finish("--no-log", python=launcher("--max-restarts", "1"), env=env)
    assert code == 0, err
    assert (lab.folder / "died").exists() and len(lab.records()) == 9


def test_no_rank_outlives_a_killed_torchrun(lab):
    process = lab.start("--no-log", python=launcher(), env={"TOY": f"{NOTE_PID}time.sleep(600)"})
    pids = lab.folder / "pids"
    wait_for(lambda: pids.exists() and pids.read_text().count("\n") == 2)
    process.kill()
    process.communicate(timeout=60)
    ranks = [line.split()[0] for line in pids.read_text().splitlines()]
    wait_for(lambda: not any(is_alive(pid) for pid in ranks), 60)


def test_serial_pool_and_torchrun_give_the_same_bits(lab):
    flags = ["--no-log", "--seeds", "2"]
    serial = lab.start(*flags, "--jobs", "1", "--runs", "serial")
    pool = lab.start(*flags, "--jobs", "2", "--runs", "pool")
    ends = [process.communicate(timeout=PATIENCE) for process in (serial, pool)]
    code, out, err = lab.finish(*flags, "--runs", "group", python=launcher())
    assert (serial.returncode, pool.returncode, code) == (0, 0, 0), (ends, err)
    assert len(lab.records("serial")) == 6
    assert lab.records("serial") == lab.records("pool") == lab.records("group")
    assert ends[0][0] == ends[1][0] == out


def wait_for(condition, seconds=PATIENCE):
    """Wait until it is true; fails after a while."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def is_alive(pid):
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


NOTE_PID = "open('pids', 'a').write(f'{os.getpid()} {config.size} {config.rate} {seed}\\n')\n"


def test_a_killed_run_leaves_no_process_and_goes_on(lab):
    hang = f"{NOTE_PID}time.sleep(600 if (config.size, seed) == (2, 1) else 0)"
    process = lab.start("--jobs", "2", env={"TOY": hang})
    pids = lab.folder / "pids"
    wait_for(lambda: pids.exists() and "2 0.5 1" in pids.read_text() and len(lab.records()) > 2)
    process.kill()
    process.communicate(timeout=20)  # ends only when no worker holds the pipes
    workers = {line.split()[0] for line in pids.read_text().splitlines()}
    wait_for(lambda: not any(is_alive(pid) for pid in workers), 20)
    finished = lab.records()
    pids.unlink()
    code, _, err = lab.finish("--jobs", "2", env={"TOY": NOTE_PID})
    assert code == 0 and complaints(err) == []
    again = pids.read_text().splitlines()
    assert len(again) == 9 - len(finished)
    assert f"{len(finished)} finished before" in err
    assert finished.items() <= lab.records().items()


def test_a_run_killed_while_its_workers_start_leaves_no_process(lab):
    env = {"TOY_IMPORT": "open('pids', 'a').write(f'{os.getpid()} '); time.sleep(1)"}
    process = lab.start("--jobs", "2", "--no-log", env=env)
    pids = lab.folder / "pids"
    wait_for(pids.exists)
    process.terminate()
    process.communicate(timeout=60)
    wait_for(lambda: not any(is_alive(pid) for pid in pids.read_text().split()), 60)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"TOY": "if seed == 1: raise ValueError('boom')\ntime.sleep(600 * (seed == 2))"}, "boom"),
        ({"TOY": "if seed == 1: os.kill(os.getpid(), 9)\ntime.sleep(600 * (seed == 2))"}, "killed"),
        ({"TOY_IMPORT": "os._exit(7)"}, "ended"),
    ],
    ids=["error", "SIGKILL", "import"],
)
def test_a_lost_worker_ends_the_run_in_one_line(lab, env, words):
    process = lab.start("--jobs", "2", "--no-log", "--arms", "plain", env=env)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    lines = complaints(err)
    assert len(lines) == 1, err
    assert words in lines[0] or (words == "ended" and "worker" in lines[0])
    assert out == ""


def test_ctrl_c_at_any_time_is_one_line(lab):
    sleeping = lab.start("--jobs", "2", "--no-log", env={"TOY": f"{NOTE_PID}time.sleep(600)"})
    importing = lab.start("--jobs", "2", "--no-log")

    def loads_torch():
        return "libtorch" in Path(f"/proc/{importing.pid}/maps").read_text()

    wait_for(loads_torch)
    os.killpg(importing.pid, signal.SIGINT)
    _, err = importing.communicate(timeout=60)
    assert importing.returncode == 130 and len(complaints(err)) == 1, err

    pids = lab.folder / "pids"
    wait_for(lambda: pids.exists() and len(pids.read_text().splitlines()) == 2)
    for _ in range(2):  # as a terminal does: to workers too, and impatient
        with contextlib.suppress(ProcessLookupError):
            os.killpg(sleeping.pid, signal.SIGINT)
        time.sleep(0.1)
    _, err = sleeping.communicate(timeout=60)
    assert sleeping.returncode == 130 and len(complaints(err)) == 1, err
    workers = {line.split()[0] for line in pids.read_text().splitlines()}
    wait_for(lambda: not any(is_alive(pid) for pid in workers), 20)


def test_a_file_that_can_be_read_once_is_refused(lab, capsys):
    reader, writer = os.pipe()
    os.write(writer, b"abc")
    with pytest.raises(SystemExit) as end:
        lab.run("--text", f"/dev/fd/{reader}")
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--text" in err
    os.close(reader)
    os.close(writer)


def test_nothing_in_the_surroundings_matters(lab, tmp_path):
    """Interpreter, folder, link, matplotlib's settings, PATH, streams: same numbers, figures."""
    settings = tmp_path / "matplotlibrc"
    settings.write_text("text.usetex: True\nbackend: TkAgg\nfont.size: 30\naxes.facecolor: red\n")
    away = tmp_path / "my plöts | $a_b$"
    away.mkdir()
    link = away / "another name.py"
    link.symlink_to(lab.script)
    env = {
        "MATPLOTLIBRC": str(settings),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PATH": "",
        "GIT_DIR": str(HERE / ".git"),
        "GLOO_SOCKET_IFNAME": "nonsense",
        "PYTHONIOENCODING": "ascii",
        "LC_ALL": "C",
        "TOY": "import warnings; warnings.warn('careful')",
    }
    plain = lab.start("--jobs", "1")
    with open("/dev/full", "w") as full:
        process = lab.start(
            "--jobs", "2", "--runs", "runs", "--logbook", "log.md", "--plots", "./plots |",
            python=["-OO", "-W", "error", "-X", "utf8=0"], env=env, cwd=away, script=link.name,
            stdout=full,
        )  # fmt: skip
    _, err = process.communicate(timeout=PATIENCE)
    assert plain.communicate(timeout=PATIENCE) and plain.returncode == 0
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "commit unknown" in (away / "log.md").read_text(encoding="utf-8")
    expected = sorted((lab.folder / "plots").iterdir())
    assert [path.name for path in expected] == sorted(os.listdir(away / "plots |"))
    for path in expected:
        assert path.read_bytes() == (away / "plots |" / path.name).read_bytes(), path.name


def test_a_reader_that_has_gone_is_no_failure(lab):
    reader, writer = os.pipe()
    os.close(reader)
    command = f'exec "{sys.executable}" exp_toy.py --jobs 1 >&{writer} 2>&-'
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    end = subprocess.run(["bash", "-c", command], cwd=lab.folder, pass_fds=[writer], env=env)
    os.close(writer)
    assert end.returncode == 0
    assert "entry toy" in lab.log.read_text(encoding="utf-8")


def test_the_stamp_names_this_repository_or_none(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is absent")
    folder = tmp_path / "repository"
    inside = folder / "inside"
    inside.mkdir(parents=True)
    other = tmp_path / "other"
    for place in (folder, other):
        place.mkdir(exist_ok=True)
        (place / "core.py").write_text("x = 1\n")
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", f"safe.directory={place}"]
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", place.name]):
            subprocess.run(["git", "-C", place, *identity, *words], check=True)
    monkeypatch.setattr(core, "REPOSITORY", folder.resolve())
    clean = core.read_commit()
    assert re.fullmatch(r"[0-9a-f]{8}", clean)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert core.read_commit() == clean
    (folder / "core.py").write_text("x = 2\n")
    assert core.read_commit() == f"{clean} with changes"
    monkeypatch.setattr(core, "REPOSITORY", inside.resolve())
    assert core.read_commit() == "unknown"
    monkeypatch.setattr(core, "REPOSITORY", folder.resolve())
    for path in ("", str(tmp_path / "missing")):
        monkeypatch.setenv("PATH", path)
        assert core.read_commit() == "unknown"


# --- log


def links_of(log):
    """Files that a log's links lead to."""
    folder = Path(os.path.realpath(log)).parent
    targets = re.findall(r"\]\(([^)#][^)]*)\)", log.read_text(encoding="utf-8-sig"))
    return [folder / urllib.parse.unquote(target) for target in targets]


def check_tables(text):
    """Every row of a table has as many cells as its head; returns their number."""
    tables = 0
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}
        assert len(widths) == 1, block
        tables += 1
    return tables


def test_an_entry_is_made_replaced_and_keeps_its_words(lab, capsys, monkeypatch):
    lab.run("--note", "A note with | and <b> and `code` and <!-- entries -->.")
    first = lab.log.read_text()
    assert check_tables(first) == 5  # index, arms, notebook, ours, appendix
    assert "## Does the toy add up?\n" in first and "**Conclusion.** A note with " in first
    assert f"| {core.escape_cell(HOSTILE_ARM)} |" in first
    assert "`python exp_toy.py`" in first
    assert all(path.is_file() for path in links_of(lab.log)) and len(links_of(lab.log)) == 5
    index = first[: first.index("<!-- /index -->")]
    assert "[Does the toy add up?](#toy) | 1 reproduced, 1 refuted | 1 supported |" in index
    appendix = first[first.index("<!-- appendix -->") :]
    rows = re.findall(r"^\| (\S+) \| \[toy\]\(#toy\) (.*) \|$", appendix, re.MULTILINE)
    assert rows == [("opening", "1 refuted"), ("6/3", "1 reproduced")]

    edited = first.replace("## Does the toy add up?", "## The toy | adds up")
    edited = re.sub(r"\*\*Conclusion\.\*\* .*", "**Conclusion.** Mine.\n\nMore.", edited, count=1)
    lab.log.write_text("My own lines.\n" + edited + "My last line.\n")
    lab.run()
    again = lab.log.read_text()
    assert again.startswith("My own lines.\n") and again.endswith("My last line.\n")
    assert "## The toy | adds up\n\n**Conclusion.** Mine.\n\nMore.\n\n" in again
    assert again.count("<!-- entry ") == 1 and check_tables(again) == 5
    assert "adds up](#toy)" in again

    monkeypatch.setattr(core, "REPOSITORY", lab.folder)
    core.status(lab.log)
    assert capsys.readouterr().out.endswith("1 of 1 entries are up to date\n")

    changed = lab.script.read_text().replace("/ 100\n", "/ 50\n")  # other code, other numbers
    lab.script.write_text(changed)
    core.read_module.cache_clear()
    core.status(lab.log)
    assert "has changed since" in capsys.readouterr().out
    lab.run()
    capsys.readouterr()
    core.status(lab.log)
    assert "toy: numbers changed after its words" in capsys.readouterr().out
    lab.run()  # the same numbers again: the words are still older
    capsys.readouterr()
    core.status(lab.log)
    assert "toy: numbers changed" in capsys.readouterr().out
    lab.log.write_text(lab.log.read_text().replace("Mine.", "Read again."))
    core.status(lab.log)
    assert capsys.readouterr().out.endswith("1 of 1 entries are up to date\n")
    lab.run("--note", "Another note.")
    last = lab.log.read_text()
    assert "**Conclusion.** Another note." in last and "Read again." not in last
    assert "## The toy | adds up" in last
    lab.log.write_text(re.sub(r"(\*\*Setup\.\*\* )", r"\1Another. ", lab.log.read_text()))
    core.status(lab.log)
    assert "toy: its docstring's Setup has changed" in capsys.readouterr().out
    (lab.folder / "exp_new.py").write_text('"""Q?"""\ndef trial(config, seed, job): return {}\n')
    core.status(lab.log)
    assert "new: no entry" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["**Conclusion.** Old.\n", "Mine, without the mark.\n\n"])
def test_a_note_is_never_lost(lab, words):
    lab.run()
    text = lab.log.read_text()
    lab.log.write_text(re.sub(r"\*\*Conclusion\.\*\*.*\n\n", words, text, count=1))
    lab.run("--note", "Kept.")
    assert "Kept." in lab.log.read_text()


def test_other_runs_stand_apart(lab):
    lab.run()
    of_record = lab.log.read_text()
    for _ in range(2):  # the same run replaces its entry
        lab.run("--dim", "8", "--first-seed", "7")
    lab.run("--arms", "double", HOSTILE_ARM, "--seeds", "2")
    text = lab.log.read_text()
    names = re.findall(r"<!-- entry (\S+) -->", text)
    assert len(set(names)) == len(names) == 3 and names[0] == "toy"
    others = text[text.index("<!-- other runs -->") : text.index("<!-- appendix -->")]
    assert others.count("<!-- entry ") == 2
    assert "dim 8" in others and "seeds 7 to 9" in others
    assert "3 claims are not judged" in others and "--dim 4" in others
    for start, end in (("<!-- index", "<!-- other"), ("<!-- appendix", "<!-- /appendix")):
        part = slice(of_record.index(start), of_record.index(end))
        assert of_record[part] in text  # neither index nor appendix speak of other runs
    files = {path.name for path in (lab.folder / "plots").iterdir()}
    assert {"toy-curve.png", *(f"{name}-arms.csv" for name in names)} <= files
    check_tables(text)


def test_paragraphs_and_lists_of_a_docstring_stay_apart(tmp_path):
    script = tmp_path / "exp_any.py"
    script.write_text(
        '''"""What is asked?

Notebook    ours
Setup       Two lines that
            are joined. Terms:
            - one: with a line
              that goes on.
            - two.
            What follows a list.

            A second paragraph.
Rule        5 seeds.
"""
'''
    )
    doc = core.read_doc(script)
    assert doc["Question"] == "What is asked?"
    assert doc["Rule"] == "5 seeds."
    assert doc["Setup"].splitlines() == [
        "Two lines that are joined. Terms:",
        "- one: with a line that goes on.",
        "- two.",
        "",
        "What follows a list.",
        "",
        "A second paragraph.",
    ]


def test_definitions_of_columns_are_found_in_the_rule():
    rule = """5 seeds. Score: accuracy in points, at the end; late score: its mean, in the
last quarter. Drop: not a column. Stable below 0.1."""
    defined = core.defined_columns(rule.replace("\n", " "), ["late score", "steps"])
    assert defined == (
        "Score: accuracy in points, at the end. Late score: its mean, in the last quarter."
    )
    assert core.defined_columns(rule, ["steps"]) == ""


def test_figures_that_an_entry_no_longer_shows_are_removed(lab):
    toy = lab.run()
    (lab.folder / "plots" / "toy-mine.png").write_bytes(b"x")
    lab.run(toy=toy, plot=lambda run: {"note.txt": "other"})
    files = {path.name for path in (lab.folder / "plots").iterdir()}
    assert files == {"toy-arms.csv", "toy-claims.csv", "toy-note.txt", "toy-mine.png"}
    assert (lab.folder / "plots" / "toy-note.txt").read_text() == "other"


def test_csv_files_hold_every_trial_and_claim(lab):
    lab.run()
    with open(lab.folder / "plots" / "toy-arms.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in rows] == list(
        itertools.product(["plain", "double", HOSTILE_ARM], "012")
    )
    assert float(rows[3]["sum"]) == pytest.approx(2, abs=0.1)
    with open(lab.folder / "plots" / "toy-claims.csv", newline="", encoding="utf-8") as file:
        claims = list(csv.DictReader(file))
    assert [row["verdict"] for row in claims] == ["reproduced", "supported", "refuted"]
    assert claims[0]["notebook"] == "graph notebook"


BLOCK = (
    '<!-- entry {0} --><a id="{0}"></a>\n## Heading\n\n**Conclusion.** Words.\n\n'
    "<!-- results {0}: code 12345678, numbers 12345678 -->\nresults\n<!-- /results -->\n"
)


def log_with(*names):
    """A whole log with entries of these names."""
    entries = "".join(BLOCK.format(name) + "\n" for name in names)
    return core.EMPTY_LOGBOOK.replace("<!-- other runs -->", entries + "<!-- other runs -->")


WHOLE = log_with("one", "two")


def moved(text, part, place):
    """The text with a part moved after the first occurrence of another."""
    assert part in text and place in text
    return text.replace(part, "", 1).replace(place, f"{place}\n{part}", 1)


@pytest.mark.parametrize(
    "content",
    [
        WHOLE.replace("## Heading", "<<<<<<< HEAD\n## Heading", 1),
        WHOLE.replace("results\n<!--", "results\n>>>>>>> branch\n<!--", 1),
        WHOLE.replace("## Heading", "||||||| base\n## Heading", 1),
        WHOLE.replace("## Heading", "<<<<<<<\n## Heading", 1),
        moved(WHOLE, BLOCK.format("one"), core.INDEX),  # where an index is made anew
        moved(WHOLE, BLOCK.format("two"), core.APPENDIX),
        moved(WHOLE, f"{core.OTHER_RUNS}\n", "**Conclusion.** Words.\n\n"),
        WHOLE.replace("<!-- /results -->", "", 1),
        WHOLE.replace("<!-- results one", "<!-- results won"),
        WHOLE.replace('<!-- entry one --><a id="one"></a>\n', ""),
        WHOLE.replace("<!-- index -->\n", ""),
        WHOLE.replace("<!-- appendix -->", "<!-- appendix --> <!-- appendix -->"),
        WHOLE.replace("<!-- /index -->", "<!-- index -->"),
        log_with("one", "one"),
        "# another file\n",
        "",
        WHOLE.encode("utf-16"),
        WHOLE.encode() + b"\xff",
    ],
)
def test_a_damaged_log_is_refused_and_left_alone(lab, capsys, content):
    content = content if isinstance(content, bytes) else content.encode()
    lab.log.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        lab.run()
    assert end.value.code == 2
    assert lab.log.read_bytes() == content
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--logbook" in err
    assert not (lab.folder / "runs" / "toy").exists()


def test_byte_order_mark_line_ends_link_and_mode_survive(lab):
    real = lab.folder / "elsewhere | $x_y" / "log.md"
    real.parent.mkdir()
    real.write_bytes(b"\xef\xbb\xbf" + WHOLE.replace("\n", "\r\n").encode())
    real.chmod(0o640)
    lab.log.symlink_to(real)
    lab.run()
    content = real.read_bytes()
    assert lab.log.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o640
    assert content.startswith(b"\xef\xbb\xbf# Logbook\r\n")
    assert content.count(b"\n") == content.count(b"\r\n") > 50
    text = content.decode("utf-8-sig").replace("\r\n", "\n")
    assert all(text.count(BLOCK.format(name)) == 1 for name in ("one", "two"))
    assert len(links_of(lab.log)) == 5 and all(path.is_file() for path in links_of(lab.log))
    assert "1 reproduced, 1 refuted" in text[: text.index("<!-- /index -->")]
    lab.run()
    assert real.read_bytes() == content


def test_a_link_leads_through_a_folder_that_is_not_utf8(tmp_path):
    file = tmp_path / os.fsdecode(b"gr\xfcn") / "x.csv"
    file.parent.mkdir()
    file.touch()
    link = core.relative_link(file, tmp_path / "log.md")
    assert link.isascii()
    assert core.file_of_link(link, tmp_path / "log.md") == Path(os.path.realpath(file))


@pytest.mark.parametrize("name", ["my plots", "gräph", "a|b", "a$b$c_d", "(x) [y]", "50%25"])
def test_links_lead_through_any_folder(lab, name):
    log = lab.folder / name / "log.md"
    plots = lab.folder / f"p {name}"
    (lab.folder / "linked").symlink_to(lab.folder)
    argv = ["--logbook", str(lab.folder / "linked" / name / "log.md"), "--plots", str(plots)]
    toy = lab.toy()
    core.main(toy.parser, toy.ARMS, toy.ABLATIONS, toy.trial, toy.CLAIMS, toy.plot, toy.COLUMNS,
              toy.TINY, across=toy.across, argv=lab.placed(argv))  # fmt: skip
    assert len(links_of(log)) == 5 and all(path.is_file() for path in links_of(log))
    assert "1 reproduced" in log.read_text(encoding="utf-8")
    check_tables(log.read_text(encoding="utf-8"))


def test_a_damaged_claims_file_does_not_stop_another_run(lab):
    lab.run()
    text = lab.log.read_text()
    lab.log.write_text(text.replace("<!-- entries -->\n", "<!-- entries -->\n" + BLOCK.format("b")))
    row = "graph notebook,6/3,A.,{},1\n"
    head = ",".join(core.CLAIM_COLUMNS) + "\n"
    hostile = (head + row.format("<!-- /appendix -->")).encode()
    long = (head + row.format("x" * 200_000)).encode()
    for content in (b"<<<<<<< HEAD\nx\n", b"\xff\xfe\x00", b"", hostile, long, None):
        claims = lab.folder / "plots" / "b-claims.csv"
        linked = lab.log.read_text().replace("\nresults\n", "\n[all claims](plots/b-claims.csv)\n")
        lab.log.write_text(linked)
        if content is None:
            claims.unlink()
        else:
            claims.write_bytes(content)
        lab.run()
        assert "| [Heading](#b) | – | – |" in lab.log.read_text()
    lab.log.write_text(lab.log.read_text().replace("b-claims.csv", "b%00.csv"))
    lab.run()
    claims = lab.folder / "plots" / "toy-claims.csv"
    claims.write_text(head + row.replace("graph", "<!-- index -->").format("refuted"))
    core.update_logbook(lab.log, an_entry("new"))
    core.read_logbook(lab.log)


def an_entry(name, numbers="12345678"):
    return core.Entry(name, True, f"Heading {name}", "Words.", "results", "87654321", numbers)


def test_kills_at_any_time_leave_the_log_whole(tmp_path):
    log = tmp_path / "log.md"
    core.update_logbook(log, an_entry("first"))
    rng = random.Random(0)
    finished = {"first"}
    for attempt in range(100):
        name = f"e{attempt}"
        child = os.fork()
        if child == 0:
            os.setsid()
            core.update_logbook(log, an_entry(name))
            os._exit(0)
        time.sleep(rng.uniform(0, 0.004))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if status == 0:
            finished.add(name)
        entries = {entry["id"] for entry in core.find_entries(core.read_logbook(log))}
        assert finished <= entries
    assert len(finished) < 100  # some were killed in the middle
    core.update_logbook(log, an_entry("last"))
    assert "last" in {entry["id"] for entry in core.find_entries(core.read_logbook(log))}


def test_a_log_without_its_last_line_end_gets_it_back(tmp_path):
    log = tmp_path / "log.md"
    core.update_logbook(log, an_entry("first"))
    whole = log.read_bytes()
    log.write_bytes(whole.rstrip(b"\n"))
    core.update_logbook(log, an_entry("first"))
    assert log.read_bytes() == whole


def test_sixteen_writers_lose_nothing(tmp_path):
    log = tmp_path / "log.md"
    children = []
    for writer in range(16):
        child = os.fork()
        if child == 0:
            try:
                for i in range(10):
                    core.update_logbook(log, an_entry(f"w{writer}-{i % 8}", f"{i:08d}"))
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    entries = {entry["id"]: entry for entry in core.find_entries(core.read_logbook(log))}
    assert len(entries) == 16 * 8
    assert entries["w3-1"]["numbers"] == f"{9:08d}"  # the last to replace it
    assert os.listdir(tmp_path) == ["log.md"]


def test_status_of_a_damaged_log_is_one_line(lab, capsys, monkeypatch):
    lab.log.write_text("<<<<<<< HEAD\n")
    monkeypatch.setattr(sys, "argv", ["core.py", "status"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(lab.folder / "core.py"), run_name="__main__")
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "logbook.md" in err
