"""Sections 2 to 9 of core.py against independent oracles: torch's own, NumPy, exact counts."""

import itertools
import math
import pickle
from fractions import Fraction
from pathlib import Path

import core

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
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


@pytest.mark.parametrize("change", [{"hidden": 13}, {"norm": "layer"}, {"norm": "batch"}])
def test_every_argument_of_the_feedforward_changes_its_result(change):
    def build(hidden=12, norm="none"):
        with core.initialised_from(0):
            return core.FeedForward(DIM, hidden, norm)

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


class Hostile:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return (Path("hostile-was-here").write_text, ("x",))


def cut_checkpoint(path):
    """The first half of a real one."""
    core.Checkpoint(path).save({"model": torch.ones(1000)})
    content = path.read_bytes()
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", ["empty", "text", "hostile", "cut"])
def test_damaged_checkpoint_is_reported_and_not_used(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "state.checkpoint"
    content = {
        "empty": b"",
        "text": b"not a checkpoint",
        "hostile": pickle.dumps(Hostile(), protocol=2),
        "cut": cut_checkpoint(path),
    }
    path.write_bytes(content[damage])
    _, expected = fit("plain", pattern_batches(), epochs=2)
    _, history = fit("plain", pattern_batches(), epochs=2, checkpoint=core.Checkpoint(path))
    assert same_bits(history, expected)
    assert "damaged checkpoint" in capsys.readouterr().err
    assert not Path("hostile-was-here").exists()


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
