"""core.py against independent oracles: torch's own layers, NumPy, SciPy, exact arithmetic; and its faults, one by one."""

import ast
import errno
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import signal, sparse, special, stats
from tqdm import tqdm

import core
from core import Check, Claim

SOURCE = Path(core.__file__).read_text()
CONFIG = {
    "model": "position", "layers": 2, "dim": 8, "heads": 2, "hidden": 12, "stack": (0, 1), "distance": "on",
    "activation": "sigmoid", "norm": "layer", "feedforward_norm": "none", "degree": "off",
    "unreachable": "shut", "readout": "plain", "divide": 1.0, "mixed_norm": "none",
    "norm_order": "first",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    core.set_up("cpu", 1)
    core.Runtime.checkpoint = None


@pytest.fixture(scope="module")
def graphs():
    return core.PatternData(7).first(3)


@pytest.fixture
def batch(graphs):
    return core.GraphBatch(graphs)


def random_nodes(batch, dim=8, seed=0):
    return torch.randn(len(batch.label), dim, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def gradients(output, *inputs):
    """Gradients of a fixed random projection of the output."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return torch.autograd.grad((output * weight).sum(), inputs, retain_graph=True)


def dense(graph):
    return torch.from_numpy(graph.adjacency()).double()


def rows_of(batch, b):
    """The packed rows of graph b."""
    start = sum(batch.sizes[:b])
    return slice(start, start + batch.sizes[b])


# the house


def test_map_and_banners_agree():
    described = re.findall(r"^ +(\d+) (\w.*)$", core.__doc__, re.MULTILINE)
    banners = re.findall(r"^# %% (\d+) (.+)$", SOURCE, re.MULTILINE)
    assert described == banners
    assert [int(number) for number, _ in banners] == list(range(len(banners)))


def test_no_name_of_core_is_given_twice():
    """A constant of one section would silently replace another's."""
    names = []
    for node in ast.parse(Path(core.__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [
                part.id
                for target in node.targets
                for part in ast.walk(target)
                if isinstance(getattr(part, "ctx", None), ast.Store) and isinstance(part, ast.Name)
            ]
    assert len(names) > 300 and len(set(names)) == len(names)


def test_core_refers_only_upwards():
    tree = ast.parse(SOURCE)
    banners = [i for i, line in enumerate(SOURCE.splitlines(), 1) if line.startswith("# %%")]
    section = {}
    for node in tree.body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        names += [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        section |= {name: sum(banner <= node.lineno for banner in banners) for name in names}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name) and inner.id in section:
                    assert section[inner.id] <= section[node.name], f"{node.name} refers down to {inner.id}"


def test_every_public_name_has_a_docstring():
    tree = ast.parse(SOURCE)
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert bare == []


# seeds and graphs


def test_streams_are_repeatable_and_independent():
    assert core.stream(3, "train", 5).random() == core.stream(3, "train", 5).random()
    draws = {
        core.stream(*key).random()
        for key in [(3, "train", 5), (3, "train", 6), (4, "train", 5), (3, "val", 5), (3, "train"), (3, "train", 5, 0)]
    }
    assert len(draws) == 6


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = core.build_model(CONFIG, 5).embed.weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(core.build_model(CONFIG, 5).embed.weight, one)
    assert not torch.equal(core.build_model(CONFIG, 6).embed.weight, one)


def test_graph_holds_its_pattern():
    data = core.PatternData(0)
    for index in (0, 99, 100, 9999):
        graph, pattern = data[index], data.pattern(index)
        adjacency, place = graph.adjacency(), np.flatnonzero(graph.label)
        assert adjacency.dtype == bool and not adjacency.diagonal().any() and (adjacency == adjacency.T).all()
        assert len(place) == len(pattern.feature) and (np.sort(graph.source[place]) == np.arange(len(place))).all()
        assert (graph.source[graph.label == 0] == -1).all()
        source = graph.source[place]
        assert (adjacency[np.ix_(place, place)] == pattern.adjacency[np.ix_(source, source)]).all()
        assert (graph.feature[place] == pattern.feature[source]).all()
    assert data[99].pattern == 0 and data[100].pattern == 1


def test_stored_order_shares_patterns_over_splits_and_fresh_does_not():
    train, test, fresh = core.PatternData(1), core.PatternData(1, "test"), core.PatternData(1, fresh=True)
    assert (len(train), len(core.PatternData(1, "val")), len(test)) == (10_000, 2_000, 2_000)
    assert train.pattern(250) is test.pattern(50)  # both pattern 2
    known = {pattern.feature.tobytes() + pattern.adjacency.tobytes() for pattern in map(train.pattern, range(0, 10_000, 100))}
    drawn = [fresh.pattern(i).feature.tobytes() + fresh.pattern(i).adjacency.tobytes() for i in range(50)]
    assert len(set(drawn)) == 50 and not known & set(drawn)
    assert len({graph.pattern for graph in train.first(32)}) == 1
    assert len({graph.pattern for graph in train.first(32, "shuffled")}) > 15


def test_any_part_of_the_set_can_be_drawn_by_itself():
    data = core.PatternData(2)
    again = core.PatternData(2)[205:207][0]
    assert all(np.array_equal(a, b) for a, b in zip(data[205], again, strict=True))
    assert not np.array_equal(core.PatternData(3)[205].edges, again.edges)


def test_generator_draws_the_authors_process():
    """Counts against their exact expectation, five standard errors wide."""
    sample = core.PatternData(11, fresh=True)[:1500]
    patterns = [int(graph.label.sum()) for graph in sample]
    blocks = [len(graph.label) - p for graph, p in zip(sample, patterns, strict=True)]
    assert min(patterns) == 5 and max(patterns) == 34
    for found, mean, variance in ((patterns, 19.5, (30**2 - 1) / 12), (blocks, 97.5, 5 * (30**2 - 1) / 12)):
        assert abs(np.mean(found) - mean) < 5 * math.sqrt(variance / len(sample))
    inside = joined = outside = pairs_inside = pairs_joined = 0
    expected_outside, features = 0.0, np.zeros(3)
    for graph in sample:
        adjacency, label = graph.adjacency(), graph.label.astype(bool)
        p, q = label.sum(), (~label).sum()
        inside += adjacency[np.ix_(label, label)].sum() / 2
        joined += adjacency[np.ix_(label, ~label)].sum()
        outside += adjacency[np.ix_(~label, ~label)].sum() / 2
        pairs_inside, pairs_joined = pairs_inside + p * (p - 1) / 2, pairs_joined + p * q
        features += np.bincount(graph.feature, minlength=3)
    size, square = 19.5, 19.5**2 + (30**2 - 1) / 12
    expected_outside = len(sample) * (5 * 0.5 * (square - size) / 2 + 10 * 0.35 * size**2)
    assert abs(inside / pairs_inside - 0.5) < 5 * 0.5 / math.sqrt(pairs_inside)
    assert abs(joined / pairs_joined - 0.5) < 5 * 0.5 / math.sqrt(pairs_joined)
    assert abs(outside / expected_outside - 1) < 0.03  # the spread of sizes dominates: 0.6% standard error
    assert np.abs(features / features.sum() - 1 / 3).max() < 0.01


def test_asking_for_too_many_graphs_names_the_flag():
    with pytest.raises(core.UsageError, match="--graphs 10001"):
        core.PatternData(0).first(10_001)


def test_batch_packs_and_pads(graphs, batch):
    x = random_nodes(batch)
    padded = batch.pad(x)
    assert torch.equal(batch.pack(padded), x)
    assert padded[~batch.nodes].eq(0).all() and batch.nodes.sum() == len(x) == sum(batch.sizes)
    for b, graph in enumerate(graphs):
        assert torch.equal(batch.label[rows_of(batch, b)], torch.from_numpy(graph.label).long())
        assert torch.equal(batch.feature[rows_of(batch, b)], torch.from_numpy(graph.feature).long())
        assert torch.equal(batch.degree[rows_of(batch, b)].double(), dense(graph).sum(1))
        assert (batch.size[rows_of(batch, b)] == len(graph.label)).all()


def test_batches_sort_graphs_by_size_and_lose_none():
    graphs = core.PatternData(0).first(40, "shuffled")
    batches = core.batches_of(graphs, 16)
    assert [len(b.sizes) for b in batches] == [16, 16, 8]
    assert [size for b in batches for size in b.sizes] == sorted(len(graph.label) for graph in graphs)


def test_graphwise_product_is_the_padded_product(batch):
    x, matrix = random_nodes(batch), torch.randn(3, batch.shape[1], batch.shape[1])
    out, oracle = batch.mix(matrix, x), batch.pack((matrix * batch.nodes[:, None]) @ batch.pad(x))
    torch.testing.assert_close(out, oracle)
    torch.testing.assert_close(gradients(out, x), gradients(oracle, x))


# masks and adjacency stacks


def transition_fractions(n, edges, receptive_field):
    """(P^0 .. P^r) of a graph in Fractions: [r + 1][n][n]."""
    beside = [[j for pair in edges for i_, j in (pair, pair[::-1]) if i_ == i] for i in range(n)]
    powers = [[[Fraction(int(i == j)) for j in range(n)] for i in range(n)]]
    for _ in range(receptive_field):
        last = powers[-1]
        powers.append(
            [[sum((last[m][j] for m in beside[i]), Fraction(0)) / max(len(beside[i]), 1) for j in range(n)] for i in range(n)]
        )
    return powers


@pytest.mark.parametrize("base", range(1, 7))
def test_pyramid_is_the_triangle_and_its_only_colouring(base):
    p = core.pyramid(base)
    place = list(zip(p.row.tolist(), p.column.tolist(), strict=True))
    near = {(0, 1), (1, 0), (1, 1), (0, -1), (-1, 0), (-1, -1)}
    pairs = {(i, j) for i, j in itertools.combinations(range(len(place)), 2) if tuple(np.subtract(place[j], place[i])) in near}
    assert {tuple(sorted(edge)) for edge in p.edges.tolist()} == pairs and len(p.edges) == len(pairs)
    assert place == [(r, c) for r in range(base) for c in range(r + 1)]
    assert all(p.colour[i] != p.colour[j] for i, j in pairs)
    if base <= 4:
        every = itertools.product(range(3), repeat=len(place))
        proper = [colours for colours in every if all(colours[i] != colours[j] for i, j in pairs)]
        assert tuple(p.colour) in proper and len(proper) == (3 if base == 1 else 6)  # but for the colours' names it is the only one


@pytest.mark.parametrize("base", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("receptive_field", [0, 1, 2, 5, 7])
def test_pair_codes_are_equal_exactly_where_fractions_are(base, receptive_field):
    p = core.pyramid(base)
    n = len(p.row)
    powers = transition_fractions(n, p.edges.tolist(), receptive_field)
    vector = {(i, j): tuple(power[i][j] for power in powers) for i, j in itertools.product(range(n), repeat=2)}
    for modulus, multiplier in ((2**57 - 13, 0x9E3779B97F4A7C15), (2**56 - 5, 0xBF58476D1CE4E5B9)):
        codes = core.pair_codes(n, p.edges, receptive_field, modulus, multiplier)
        together = {(vector[i, j], int(codes[i, j])) for i, j in vector}
        assert len(together) == len(set(vector.values())) == len(np.unique(codes))
        assert all((code == 0) == (not any(v)) for v, code in together)


@pytest.mark.parametrize("modulus", [2**57 - 13, 2**56 - 5])
def test_pair_codes_of_powers_beyond_the_modulus(modulus):
    """12^20 is past any modulus that 64 bits allow: the codes still tell exactly what Fractions tell."""
    p = core.pyramid(4)
    powers = transition_fractions(10, p.edges.tolist(), 20)
    vectors = {(i, j): tuple(power[i][j] for power in powers) for i, j in itertools.product(range(10), repeat=2)}
    codes = core.pair_codes(10, p.edges, 20, modulus, 987654321)
    assert len({(vectors[i, j], int(codes[i, j])) for i, j in vectors}) == len(set(vectors.values())) == len(np.unique(codes))
    assert (codes != core.pair_codes(10, p.edges, 20, modulus - 2, 987654321)).any()  # it did reduce


def test_pair_codes_refuse_a_degree_that_does_not_divide():
    star = np.array([[0, i] for i in range(1, 6)])  # degree 5
    with pytest.raises(ValueError, match="multiple of every degree"):
        core.pair_codes(6, star, 1, 101, 3)
    assert len(np.unique(core.pair_codes(6, star, 1, 2**57 - 13, 3, scale=5))) == 4  # itself, out of the hub, into it, not reached


def distance_by_search(n, edges):
    """[n][n] hops, breadth first."""
    far = np.full((n, n), n)
    far[range(n), range(n)] = 0
    for _ in range(n):
        for i, j in [*edges, *(pair[::-1] for pair in edges)]:
            far[:, j] = np.minimum(far[:, j], far[:, i] + 1)
    return far


@pytest.mark.parametrize("base", [1, 2, 5, 7])
def test_pair_kinds_and_the_bound_by_brute_force(base):
    """Kinds with their colours against a dictionary of Fractions; orbits against all automorphisms of the graph, by force."""
    p = core.pyramid(base)
    n, edges = len(p.row), [tuple(edge) for edge in p.edges.tolist()]
    far = distance_by_search(n, edges)
    degree = [sum(i in edge for edge in edges) for i in range(n)]
    # an automorphism of a triangle is fixed by where it takes the corners; all other nodes follow by their distances from these
    corners = [0, n - base, n - 1]
    place = {tuple(far[i, corners]): i for i in range(n)}
    symmetries = {tuple(place[tuple(far[i, list(order)])] for i in range(n)) for order in itertools.permutations(corners)}
    assert all({tuple(sorted((g[i], g[j]))) for i, j in edges} == set(edges) for g in symmetries)
    for field in (0, 1, 3, base):
        powers = transition_fractions(n, edges, field)
        seen = {}
        for i, j in itertools.product(range(n), repeat=2):
            seen.setdefault(tuple(power[i][j] for power in powers), []).append(p.colour[i] == p.colour[j])
        kinds, pairs = core.pair_kinds(core.pair_codes(n, p.edges, field, 2**57 - 13, 12345), p.colour)
        assert len(kinds) == len(seen) and pairs.sum() == n * n
        assert sorted(map(tuple, pairs)) == sorted((len(same) - sum(same), sum(same)) for same in seen.values())
        orbits = set()
        for i, j in itertools.product(range(n), repeat=2):
            alike = {(g[i], g[j]) for g in symmetries}
            alike |= {pair[::-1] for pair in alike} if degree[i] == degree[j] else set()
            orbits.add(min(alike) if far[i, j] <= field else None)
        assert core.pair_orbits(p, field) == len(orbits) >= len(seen)


@pytest.mark.parametrize("heads", [1, 2])
def test_edge_bias_attention_against_a_loop(heads):
    n, d, e = 5, 4, 3
    torch.manual_seed(0)
    layer = core.EdgeBiasAttention(d, heads, e).double()
    x, edge = torch.randn(n, d, dtype=torch.float64), torch.randn(n, n, e, dtype=torch.float64)
    query, key, value = (project(x) for project in (layer.query, layer.key, layer.value))
    mixed = torch.zeros(n, d, dtype=torch.float64)
    for h, i in itertools.product(range(heads), range(n)):
        part = slice(h * d // heads, (h + 1) * d // heads)
        bias = [layer.bias(layer.edge_feedforward(edge[i, j][None]))[0, h] for j in range(n)]
        logit = torch.stack([query[i, part] @ key[j, part] / math.sqrt(d // heads) + bias[j] for j in range(n)])
        mixed[i, part] = logit.softmax(0) @ value[:, part]
    torch.testing.assert_close(layer(x, edge), layer.out(mixed))
    whole = core.TransformerLayer(layer, core.FeedForward(d, 4 * d).double(), d, ("none", "none"))
    torch.testing.assert_close(whole(x, edge), x + layer.out(mixed) + whole.feedforward(x + layer.out(mixed)))
    with pytest.raises(ValueError, match="do not divide"):
        core.EdgeBiasAttention(4, 3, 2)


def test_edge_products_against_sums_over_the_third_node():
    n, e = 5, 3
    torch.manual_seed(0)
    edge = torch.randn(n, n, e, dtype=torch.float64)
    for kind, second_index in (("path", lambda m, j: (m, j)), ("cluster", lambda m, j: (j, m))):
        layer = core.EdgeProduct(e, kind).double()
        first, second = layer.first.weight[0], layer.second.weight[0]
        expected = [
            [sum((edge[i, m] @ first) * (edge[second_index(m, j)] @ second) for m in range(n)) for j in range(n)] for i in range(n)
        ]
        torch.testing.assert_close(layer(edge), torch.stack([torch.stack(row) for row in expected]))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("activation", [*core.EDGE_ACTIVATIONS, "off"])
def test_edge_layer_against_its_definition(activation, shared):
    n, e = 5, 3
    torch.manual_seed(0)
    layer, edge = core.EdgeLayer(e, activation, shared).double(), torch.randn(n, n, e, dtype=torch.float64)
    inner = (edge + layer.feedforward(edge.reshape(-1, e)).reshape(n, n, e)).detach().numpy()
    assert (layer.path is None) == (activation == "off")
    added = np.zeros((n, n))
    if layer.path:
        heads = [inner @ head.weight[0].detach().numpy() for head in (layer.path.first, layer.path.second)]
        assert np.array_equal(*heads) == shared
        score = heads[0] @ heads[1]
        added = {"none": score / n, "relu": np.maximum(score, 0) / n, "softmax": special.softmax(score, 1),
                 "gaussian": (score - score.mean()) / (score.std(ddof=1) + 1e-5)}[activation]  # fmt: skip
    np.testing.assert_allclose(layer(edge).detach(), inner + added[..., None], rtol=1e-9)


@pytest.mark.parametrize("build", [core.EdgeLayer, lambda e: core.EdgeProduct(e, "path"), lambda e: core.EdgeProduct(e, "cluster")])
def test_edge_layers_follow_a_renumbering_of_the_nodes(build):
    torch.manual_seed(0)
    layer, edge, order = build(4), torch.randn(6, 6, 4), torch.randperm(6)
    torch.testing.assert_close(layer(edge[order][:, order]), layer(edge)[order][:, order], rtol=1e-4, atol=1e-5)


def test_memory_is_told_and_refused(monkeypatch):
    block = np.ones(20_000_000)  # 160 MB
    assert core.memory_mb() >= core.memory_mb("VmRSS") > block.nbytes / 1e6
    monkeypatch.setattr(core, "memory_mb", lambda what, file: {("MemAvailable", "/proc/meminfo"): 1000.0}[what, file])
    core.require_memory("--n 3", 999.0)
    with pytest.raises(core.UsageError, match="--n 3: needs about 1,001 MB of memory, 1,000 are free"):
        core.require_memory("--n 3", 1001.0)


def test_a_fresh_process_tells_what_a_call_adds(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(core.__file__).parent))
    script = tmp_path / "toy.py"
    script.write_text("import time\nimport numpy\n\n\ndef work(words, seconds):\n    numpy.ones(words)\n    time.sleep(seconds)\n")
    seconds, added, peak = core.in_fresh_process(str(script), "work", [20_000_000, 0.3], [1, 0.0])
    assert 0.3 <= seconds < 3 and 155 < added < 200 and peak > added
    with pytest.raises(subprocess.CalledProcessError):
        core.in_fresh_process(str(script), "work", ["nonsense", 0], [1, 0.0])


@pytest.mark.parametrize(
    ("x", "text"),
    [(0.02851, "0.0285"), (5255.0, "5,255"), (-1234567.0, "-1,234,567"), (999.4, "999"), (math.nan, "–"), (math.inf, "inf")],
)
def test_numbers_are_brief(x, text):
    assert core.brief(x) == text


def test_masked_softmax_rows():
    logits = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    keep = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]]).bool()
    weight = core.masked_softmax(logits, keep)
    torch.testing.assert_close(weight[0], logits[0].softmax(0))
    torch.testing.assert_close(weight[1, [0, 2]], logits[1, [0, 2]].softmax(0))
    assert weight[~keep].eq(0).all() and weight[2].eq(0).all() and weight[3, 3] == 1
    (grad,) = gradients(weight, logits)
    assert grad.isfinite().all() and grad[~keep].eq(0).all() and grad[0].ne(0).all()
    torch.autograd.gradcheck(lambda x: core.masked_softmax(x, keep), logits)


def test_masked_sigmoid_is_zero_off_the_mask_even_for_wild_logits():
    logits = torch.tensor([1.0, -2.0, math.inf, math.nan, 1e30], dtype=torch.double, requires_grad=True)
    keep = torch.tensor([True, True, False, False, False])
    gate = core.masked_sigmoid(logits, keep)
    torch.testing.assert_close(gate[:2], logits[:2].sigmoid())
    assert gate[2:].eq(0).all()
    (grad,) = gradients(gate, logits)
    assert grad[:2].ne(0).all() and grad[2:].eq(0).all()


def lonely_graph():
    """A path 0-1-2, an edge 3-4 and a node 5 without edges."""
    adjacency = np.zeros((6, 6), dtype=bool)
    for i, j in ((0, 1), (1, 2), (3, 4)):
        adjacency[i, j] = adjacency[j, i] = True
    packed = np.packbits(adjacency[np.triu_indices(6, 1)])
    return core.Graph(packed, np.array([0, 1, 2, 0, 1, 2], np.uint8), np.array([0, 1, 0, 1, 0, 1], np.uint8), 0, np.full(6, -1))


def test_powers_hops_and_reach_against_numpy_and_scipy(graphs):
    graphs = [*graphs, lonely_graph()]
    batch, powers = core.GraphBatch(graphs), (0, 1, 2, 3)
    stack = core.adjacency_stack(batch, powers)
    for b, graph in enumerate(graphs):
        n, adjacency = len(graph.label), graph.adjacency().astype(float)
        step = adjacency / np.maximum(adjacency.sum(1, keepdims=True), 1)
        distance = sparse.csgraph.shortest_path(sparse.csr_matrix(adjacency), unweighted=True)
        for k in powers:
            np.testing.assert_allclose(stack.values[b, k, :n, :n], np.linalg.matrix_power(step, k), rtol=1e-5, atol=1e-7)
            assert (stack.hop[b, k, :n, :n].numpy() == (distance == k)).all()
            assert stack.values[b, k, n:].eq(0).all() and stack.values[b, k, :, n:].eq(0).all()
            assert (stack.hop_count[rows_of(batch, b), k].numpy() == (distance == k).sum(1)).all()
        assert (stack.reachable[b, :n, :n].numpy() == (distance <= 3)).all()
        assert not stack.reachable[b, n:].any() and not stack.reachable[b, :, n:].any()
    assert core.adjacency_stack(batch, [0, 1, 2, 3]) is stack
    assert core.adjacency_stack(batch, (0, 1)) is not stack


# layers


def test_linear_is_torchs_linear():
    for wide in (5, 40):
        ours = core.Linear(12, wide)
        theirs = torch.nn.Linear(12, wide).double()
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(300, 12, requires_grad=True)
        x64 = x.detach().double().requires_grad_()
        out, oracle = ours(x), theirs(x64)
        torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-5)
        for a, b in zip(gradients(out, x, *ours.parameters()), gradients(oracle, x64, *theirs.parameters()), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("powers", [(0, 1), (1,), (0, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("unreachable", [-math.inf, 0.7])
def test_fast_hop_mixing_is_the_general_mixing(graphs, activation, heads, powers, padding, unreachable):
    batch = core.GraphBatch([*graphs, lonely_graph()], padding=padding)
    torch.manual_seed(0)
    mixing = core.PositionMixing(8, heads, powers, True, activation, unreachable)
    x, stack = random_nodes(batch), core.adjacency_stack(batch, powers)
    fast, general = mixing.mix_hops(x, stack), mixing.mix_pairs(x, stack, stack.hop)
    torch.testing.assert_close(fast, general, rtol=1e-4, atol=1e-4)
    inputs = (x, *mixing.pair.parameters(), *([] if mixing.unreachable is None else [mixing.unreachable]))
    for a, b in zip(gradients(fast, *inputs), gradients(general, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("powers", [(0, 1), (1,), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("unreachable", [-math.inf, 0.7])
def test_mixing_graph_by_graph_is_mixing_of_the_padded_batch(graphs, activation, powers, unreachable):
    graphs = [*graphs, lonely_graph()]
    packed, padded = core.GraphBatch(graphs), core.GraphBatch(graphs, padding=True)
    torch.manual_seed(0)
    mixing, x = core.PositionMixing(8, 2, powers, False, activation, unreachable), random_nodes(packed)
    mixing.pair.weight.data.mul_(5.0)
    inputs = (x, *mixing.pair.parameters(), *([] if mixing.unreachable is None else [mixing.unreachable]))
    one = mixing.mix_pairs(x, stack := core.adjacency_stack(packed, powers), stack.values)
    other = mixing.mix_pairs(packed.pad(x).flatten(0, 1), stack := core.adjacency_stack(padded, powers), stack.values)
    other = packed.pack(other.view(*packed.shape, -1))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients(one, *inputs), gradients(other, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("distance", [True, False])
@pytest.mark.parametrize("unreachable, divide", [(-math.inf, 1.0), (0.7, 3.0), (-math.inf, "degree"), (-2.0, "root-degree")])
def test_position_mixing_pair_by_pair(graphs, activation, distance, unreachable, divide):
    """Against loops in NumPy, node by node."""
    graphs = [graphs[0], lonely_graph()]
    batch, powers = core.GraphBatch(graphs), (0, 1, 2)
    torch.manual_seed(0)
    mixing = core.PositionMixing(4, 2, powers, distance, activation, unreachable, divide)
    x = random_nodes(batch, 4)
    out = mixing(x, batch).detach().numpy()
    w, bias = mixing.pair.weight.detach().numpy(), mixing.pair.bias.detach().numpy()
    value = mixing.value(x).detach().numpy()
    for b, graph in enumerate(graphs):
        adjacency, v = graph.adjacency().astype(float), value[rows_of(batch, b)]
        step = adjacency / np.maximum(adjacency.sum(1, keepdims=True), 1)
        vectors = np.stack([np.linalg.matrix_power(step, k) for k in powers], -1)  # [n, n, K]
        mixed = np.zeros_like(v)
        for i in range(len(v)):
            for h in range(2):
                logit = np.full(len(v), unreachable)
                for j in np.flatnonzero(vectors[i].any(-1)):
                    pair = np.eye(3)[np.flatnonzero(vectors[i, j])[0]] if distance else vectors[i, j]
                    logit[j] = w[h] @ pair + bias[h]
                weight = 1 / (1 + np.exp(-logit)) if activation == "sigmoid" else np.exp(logit) / np.exp(logit).sum()
                mixed[i, 2 * h : 2 * h + 2] = weight @ v[:, 2 * h : 2 * h + 2]
            mixed[i] /= {"degree": adjacency[i].sum() + 1, "root-degree": np.sqrt(adjacency[i].sum() + 1)}.get(divide, divide)
        expected = mixed @ mixing.out.weight.detach().numpy().T + mixing.out.bias.detach().numpy()
        np.testing.assert_allclose(out[rows_of(batch, b)], expected, rtol=2e-4, atol=2e-4)


def test_a_row_that_reaches_nothing_mixes_to_zero():
    batch = core.GraphBatch([lonely_graph()])
    for distance in (True, False):
        for activation in ("softmax", "sigmoid"):
            mixing = core.PositionMixing(4, 1, (1,), distance, activation)
            x = random_nodes(batch, 4)
            out = mixing(x, batch)
            assert torch.equal(out[5], mixing.out.bias) and not torch.equal(out[3], mixing.out.bias)
            assert all(grad.isfinite().all() for grad in gradients(out, x, *mixing.parameters()))


def test_open_gates_are_gin_aggregation(graphs, batch):
    mixing = core.PositionMixing(8, 1, (0, 1), True, "sigmoid")
    with torch.no_grad():
        mixing.pair.weight.fill_(0.0)
        mixing.pair.bias.fill_(100.0)  # sigmoid is 1 in float32
    x = random_nodes(batch)
    stack = core.adjacency_stack(batch, (0, 1))
    torch.testing.assert_close(mixing.mix_hops(x, stack), x + batch.mix(batch.adjacency, x))


@pytest.mark.parametrize("heads", [1, 4])
def test_content_attention_is_torchs_multihead_attention(graphs, batch, heads):
    torch.manual_seed(0)
    ours, theirs = core.ContentAttention(8, heads), torch.nn.MultiheadAttention(8, heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([m.weight for m in (ours.query, ours.key, ours.value)]))
        theirs.in_proj_bias.copy_(torch.cat([m.bias for m in (ours.query, ours.key, ours.value)]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = random_nodes(batch)
    out = ours(x, batch)
    for b in range(len(graphs)):
        part = x[rows_of(batch, b)][None]
        expected = theirs(part, part, part, need_weights=False)[0][0]
        torch.testing.assert_close(out[rows_of(batch, b)], expected, rtol=1e-4, atol=1e-5)
    assert all(grad.isfinite().all() for grad in gradients(out, x, *ours.parameters()))


def test_distance_bias_joins_content_attention(graphs):
    graph = graphs[0]
    batch = core.GraphBatch([graph])
    torch.manual_seed(0)
    attention, x = core.ContentAttention(8, 2, (0, 1)), random_nodes(batch)
    q, k, v = (m(x).view(-1, 2, 4).transpose(0, 1) for m in (attention.query, attention.key, attention.value))
    hop = torch.stack([torch.eye(len(x)), dense(graph).float()], -1)
    logits = q @ k.transpose(1, 2) / 2 + (hop @ attention.pair.weight.T + attention.pair.bias).permute(2, 0, 1)
    expected = attention.out((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
    torch.testing.assert_close(attention(x, batch), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        attention.pair.weight[:, 1] += 1
    assert not torch.allclose(attention(x, batch), expected, atol=1e-3)


@pytest.mark.parametrize("kind", core.GIN_KINDS)
@pytest.mark.parametrize("divide", [1.0, 7.0, "degree"])
def test_gin_kinds_against_the_notebooks_formulas(graphs, kind, divide):
    graph, sigmoid = graphs[0], lambda e: 1 / (1 + math.exp(-e))
    batch = core.GraphBatch([graph])
    net = core.build_model(CONFIG | {"model": kind, "layers": 1, "mlp_norm": "none", "between_norm": "none", "divide": divide}, 0)
    (layer,) = net.layers
    for name, parameter in layer.named_parameters():
        if name.startswith("eps"):
            parameter.data.fill_({"eps": 0.3, "eps2": -0.7}[name])
    x = random_nodes(batch)
    own = {"gin": 1.3, "sigmoid_gin": 1 + sigmoid(0.3), "modified_gin": 1 + sigmoid(0.3)}.get(kind, sigmoid(0.3))
    own = 1 + sigmoid(0.3) if kind == "modified_gin_without_relu" else own
    gate = 1.0 if kind in ("gin", "sigmoid_gin") else sigmoid(-0.7)
    relu = kind not in ("modified_gin_without_relu", "modified_gin_without_both")
    inner = own * x + gate * (dense(graph).float() @ (x.relu() if relu else x))
    inner = inner / (torch.from_numpy(dense(graph).numpy().sum(1) + 1)[:, None].float() if divide == "degree" else divide)
    first, last = layer.mlp[0], layer.mlp[3]
    expected = x + (F.linear(F.linear(inner, first.weight, first.bias).relu(), last.weight, last.bias)).relu()
    torch.testing.assert_close(layer(x, batch), expected, rtol=1e-4, atol=1e-4)


def test_gin_norms_switch_on_batch_norm_over_real_nodes(batch):
    x = random_nodes(batch)
    for slot in ("mlp_norm", "out_norm"):
        torch.manual_seed(0)
        plain = core.GINLayer(8, **{"mlp_norm": "none", "out_norm": "none"})
        torch.manual_seed(0)
        normed = core.GINLayer(8, **({"mlp_norm": "none", "out_norm": "none"} | {slot: "batch"}))
        assert not torch.allclose(plain(x, batch), normed(x, batch), atol=1e-2)
    norm = core.make_norm("batch", 8)
    np.testing.assert_allclose(norm(x).detach(), stats.zscore(x.detach().numpy(), axis=0), rtol=1e-3, atol=1e-4)


def test_transformer_layer_places_its_norms(batch):
    torch.manual_seed(0)
    mixing, feedforward = core.PositionMixing(8, 1, (0, 1), True, "sigmoid"), core.FeedForward(8, 12)
    x, norm = random_nodes(batch), lambda y: F.layer_norm(y, (8,))
    first = core.TransformerLayer(mixing, feedforward, 8, ("layer", "layer"))(x, batch)
    half = x + mixing(norm(x), batch)
    torch.testing.assert_close(first, half + feedforward(norm(half)))
    last = core.TransformerLayer(mixing, feedforward, 8, ("layer", "layer"), norm_first=False)(x, batch)
    half = norm(x + mixing(x, batch))
    torch.testing.assert_close(last, norm(half + feedforward(half)))
    slots = core.TransformerLayer(mixing, feedforward, 8, ("batch", "none"))
    assert isinstance(slots.norm1, torch.nn.BatchNorm1d) and isinstance(slots.norm2, torch.nn.Identity)
    behind = core.TransformerLayer(mixing, feedforward, 8, ("layer", "layer"), mixed_norm="batch")(x, batch)
    mixed = mixing(norm(x), batch)
    half = x + (mixed - mixed.mean(0)) / (mixed.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(behind, half + feedforward(norm(half)), rtol=1e-3, atol=1e-3)
    inside = core.FeedForward(8, 12, "batch")
    assert inside[1](torch.randn(500, 12) * 3 + 2).detach().std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("model", ["position", "content", "gin", "modified_gin"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("distance", ["on", "off"])
def test_models_ignore_node_order_and_other_graphs(graphs, model, activation, distance):
    """Leak test: with no batch statistics, nothing outside a graph moves its outputs, its loss or its gradients."""
    net = core.build_model(CONFIG | {"model": model, "activation": activation, "distance": distance}, 0).eval()
    alone = net(core.GraphBatch(graphs[:1]))
    together = core.GraphBatch(graphs)
    torch.testing.assert_close(net(together)[rows_of(together, 0)], alone, rtol=1e-3, atol=1e-4)
    x = random_nodes(together, CONFIG["dim"])
    (grad,) = torch.autograd.grad(net.layers[0](x, together)[rows_of(together, 1)].sum(), x)
    for b in (0, 2):
        assert grad[rows_of(together, b)].eq(0).all()
    assert grad[rows_of(together, 1)].ne(0).any()
    order = np.random.default_rng(0).permutation(len(graphs[0].label))
    adjacency = graphs[0].adjacency()[np.ix_(order, order)]
    permuted = graphs[0]._replace(
        edges=np.packbits(adjacency[np.triu_indices(len(order), 1)]), feature=graphs[0].feature[order], label=graphs[0].label[order]
    )
    torch.testing.assert_close(net(core.GraphBatch([permuted])), alone[order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["layer", "none", "batch"])
def test_padding_reaches_real_nodes_only_through_batch_norm(graphs, norm):
    config = CONFIG | {"norm": norm, "layers": 3}
    packed, padded = core.GraphBatch(graphs), core.GraphBatch(graphs, padding=True)
    real = padded.label != core.IGNORED
    a, b = (core.build_model(config, 0)(one) for one in (packed, padded))
    difference = (a - b[real]).abs().max()
    if norm == "batch":
        assert difference > 1e-2
        return
    assert difference < 1e-4
    net = core.build_model(config, 0)
    x = random_nodes(padded, config["dim"])
    out = net.layers[1](net.layers[0](x, padded), padded)
    (grad,) = torch.autograd.grad(out[real].sum(), x)
    assert grad[~real].eq(0).all() and grad[real].ne(0).any()
    moved = torch.where(real[:, None], x, x + 100)
    assert torch.equal(net.layers[1](net.layers[0](moved, padded), padded)[real], out[real])


def test_norms_before_the_readout(batch):
    plain = core.build_model(CONFIG | {"model": "gin"}, 0).eval()
    inputs = []
    plain.readout.register_forward_pre_hook(lambda module, x: inputs.append(x[0]))
    plain(batch)
    centred = core.build_model(CONFIG | {"model": "gin", "readout": "centred"}, 0).eval()(batch)
    torch.testing.assert_close(centred, plain.readout(inputs[0] - inputs[0].mean(0)))
    layer = core.build_model(CONFIG | {"model": "gin", "readout": "layer"}, 0).eval()(batch)
    torch.testing.assert_close(layer, plain.readout(F.layer_norm(inputs[0], (8,))))


def test_norms_by_slot():
    (layer,) = core.build_model(CONFIG | {"norm": "batch/layer", "layers": 1}, 0).layers
    assert isinstance(layer.norm1, torch.nn.BatchNorm1d) and isinstance(layer.norm2, torch.nn.LayerNorm)


def test_a_set_up_gives_its_flags_with_other_defaults_and_knows_their_names():
    flags = {flag.key: flag for flag in core.overfit_flags(without=("heads", "norm_mask"), dim=(7, 8))}
    assert flags["dim"].default == (7, 8) and flags["layers"].default == (4,)
    assert flags.keys() == {flag.key for flag in core.OVERFIT_FLAGS} - {"heads", "norm_mask"}
    for wrong in ({"without": ("head",)}, {"dims": (7,)}):
        with pytest.raises(KeyError, match=r"no such flags: (head|dims)"):
            core.overfit_flags(**wrong)


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (core.norm_slots, {"layer": "layer", "batch/none": "batch/none"}, ["layer/layer", "a", "layer/batch/none", ""]),
        (core.logit_or_shut, {"shut": "shut", "-3": -3.0}, ["inf", "nan", "open"]),
        (core.divisor, {"2.5": 2.5, "degree": "degree"}, ["0", "-1", "nan", "inf", "degrees"]),
    ],
)
def test_readers_take_and_refuse(read, good, bad):
    assert {text: read(text) for text in good} == good
    for text in bad:
        with pytest.raises(ValueError):
            read(text)


def test_degree_is_an_input(batch):
    net = core.build_model(CONFIG | {"degree": "on", "layers": 1}, 0)
    before = net(batch)
    assert net.embed.in_features == core.PATTERN_SYMBOLS + 1
    with torch.no_grad():
        net.embed.weight[:, -1] = 0
    assert not torch.allclose(net(batch), before, atol=1e-3)


# logic gates


def all_cells(seeds=1):
    """All 512 neighbourhoods as input of a stack: [S, 9, 512]."""
    return torch.from_numpy(core.NEIGHBOURHOODS.T.copy()).expand(seeds, 9, 512)


def test_life_is_the_rule_of_the_game():
    rng = np.random.default_rng(0)
    board = rng.random((40, 50)) < 0.4
    around = signal.convolve2d(board, np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]]), mode="valid")
    expected = (around == 3) | (board[1:-1, 1:-1] & (around == 2))
    windows = np.lib.stride_tricks.sliding_window_view(board, (3, 3)).reshape(*expected.shape, 9)
    found = core.LIFE[windows @ 2 ** np.arange(9)[::-1]]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(core.CELLS_ALIVE, [bin(i).count("1") for i in range(512)])


@pytest.mark.parametrize("alive", [0.254, 0.5])
def test_losses_of_simple_predictors(alive):
    chance = core.neighbourhood_chances(alive)
    assert chance.sum() == pytest.approx(1) and chance[-1] == pytest.approx(alive**9)
    found = core.best_losses(alive)
    on = float(chance @ core.LIFE)
    assert found["always 0"] == pytest.approx(on) and found["the mean"] == pytest.approx(on * (1 - on))
    bits = core.NEIGHBOURHOODS.astype(np.float64)
    for name, degree in (
        ("linear", 1),
        ("quadratic", 2),
        ("cubic", 3),
        ("quartic", 4),
    ):  # an orthonormal basis of the products, bit by bit
        scaled = (bits - alive) / math.sqrt(alive * (1 - alive))
        basis = [scaled[:, list(c)].prod(1) for k in range(degree + 1) for c in itertools.combinations(range(9), k)]
        explained = sum(float(chance @ (column * core.LIFE)) ** 2 for column in basis)
        assert found[name] == pytest.approx(on - explained), name


def test_batches_of_neighbourhoods_are_drawn_with_their_chances():
    batches = core.neighbourhood_batches([3, 4], 0.254, 512)
    counts = torch.stack([next(batches) for _ in range(300)]).double()  # (300, 2, 512)
    assert (counts.sum(-1) == 512).all() and not torch.equal(counts[:, 0], counts[:, 1])
    expected = 300 * 512 * core.neighbourhood_chances(0.254)
    often = expected > 5
    for seed in range(2):
        seen = counts[:, seed].sum(0).numpy()
        rest = [seen[~often].sum()], [expected[~often].sum()]
        assert stats.chisquare(np.append(seen[often], rest[0]), np.append(expected[often], rest[1])).pvalue > 1e-4
    alone = core.neighbourhood_batches([4], 0.254, 512)
    assert torch.equal(torch.stack([next(alone)[0] for _ in range(70)]).double(), counts[:70, 1])


RELAXED = {  # each gate as it is usually written
    "FALSE": lambda a, b: 0 * a, "AND": lambda a, b: a * b, "A AND NOT B": lambda a, b: a - a * b, "A": lambda a, b: a,
    "B AND NOT A": lambda a, b: b - a * b, "B": lambda a, b: b, "XOR": lambda a, b: a + b - 2 * a * b,
    "OR": lambda a, b: a + b - a * b, "NOR": lambda a, b: 1 - (a + b - a * b), "XNOR": lambda a, b: 1 - (a + b - 2 * a * b),
    "NOT B": lambda a, b: 1 - b, "A OR NOT B": lambda a, b: 1 - b + a * b, "NOT A": lambda a, b: 1 - a,
    "B OR NOT A": lambda a, b: 1 - a + a * b, "NAND": lambda a, b: 1 - a * b, "TRUE": lambda a, b: 1 + 0 * a,
    "RELU": lambda a, b: a.clamp(min=0),
}  # fmt: skip


@pytest.mark.parametrize("form", ["free", "sum-1", "softmax"])
@pytest.mark.parametrize("gates", [core.GATES[:16], ("AND", "XOR", "OR", "NAND"), ("RELU", *core.GATES[1:16])])
def test_four_coefficients_are_the_sum_of_the_gates(gates, form):
    generator = torch.Generator().manual_seed(0)
    a, b, weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(2, 3, 7)] * 2 + [(2, 3, len(gates))]
    )
    weight = weight.abs() if form == "sum-1" else weight
    mixture = core.GateMixture(weight, gates, form).double()
    inputs = [a.requires_grad_(), b.requires_grad_(), mixture.weight]
    found = core.GateLayer.mix(torch.stack([a, b], 1), mixture.coefficients())
    share = {"free": weight, "sum-1": weight / weight.sum(-1, keepdim=True), "softmax": weight.softmax(-1)}[form]
    torch.testing.assert_close(found, sum(share[..., g, None] * RELAXED[name](a, b) for g, name in enumerate(gates)))
    literal = torch.nn.Parameter(weight.clone())
    share = {"free": literal, "sum-1": literal / literal.sum(-1, keepdim=True), "softmax": literal.softmax(-1)}[form]
    slow = sum(share[..., g, None] * RELAXED[name](a, b) for g, name in enumerate(gates))
    for one, two in zip(gradients(found, *inputs), gradients(slow, a, b, literal), strict=True):
        torch.testing.assert_close(one, two)


def test_a_mixture_hardens_to_its_heaviest_gate_and_a_table_to_its_corners():
    corners = torch.tensor([[0.0, 0, 1, 1], [0, 1, 0, 1]])
    for number, name in enumerate(core.GATES[:16]):
        expected = RELAXED[name](*corners)
        torch.testing.assert_close(core.truth_table(torch.tensor(number)), expected)
        mixture = core.GateMixture(torch.eye(16)[number].view(1, 1, 16) + 0.1)
        table = core.TruthTables((2 * expected - 1).view(1, 1, 4))
        for gates in (mixture, table):
            assert gates.hardened().item() == number
            layer = core.GateLayer(core.WiredOperands(np.array([[[0], [1]]]), 2), gates)
            torch.testing.assert_close(layer.hardened(corners[None])[0, 0], expected)
    sharp = core.GateLayer.mix(corners[None, :, None], core.TruthTables(60 * (2 * expected - 1).view(1, 1, 4)).coefficients())
    torch.testing.assert_close(sharp[0, 0], expected)
    few = core.GateMixture(torch.tensor([[[0.1, 0.2]]]), ("AND", "OR"))
    assert core.GATES[few.hardened().item()] == "OR"


@pytest.mark.parametrize(("inputs", "units"), [(9, 128), (9, 5), (128, 64), (2, 1), (3, 2)])
def test_wires_use_every_input_and_never_one_twice(inputs, units):
    for seed in range(20):
        wires = core.draw_wires(inputs, units, np.random.default_rng(seed))
        assert wires.shape == (2, units) and (wires[0] != wires[1]).all() and set(wires.ravel()) <= set(range(inputs))
        used = np.bincount(wires.ravel(), minlength=inputs)
        assert used.sum() == 2 * units
    counts = [np.bincount(core.draw_wires(9, 128, np.random.default_rng(s)).ravel(), minlength=9) for s in range(20)]
    assert np.min(counts) >= 20 and np.max(counts) <= 40  # 28 each, but for those rewired away from a twin


@pytest.mark.parametrize(("inputs", "units"), [(1, 3), (9, 4)])
def test_what_cannot_be_wired_is_refused(inputs, units):
    with pytest.raises(ValueError):
        core.draw_wires(inputs, units, np.random.default_rng(0))


def test_wired_operands_read_their_wires():
    rng = np.random.default_rng(0)
    wires, x = np.stack([core.draw_wires(5, 4, rng) for _ in range(3)]), torch.randn(3, 5, 7)
    a, b = core.WiredOperands(wires, 5)(x).unbind(1)
    for s, unit in itertools.product(range(3), range(4)):
        assert torch.equal(a[s, unit], x[s, wires[s, 0, unit]]) and torch.equal(b[s, unit], x[s, wires[s, 1, unit]])


@pytest.mark.parametrize("form", ["softmax", "table"])
def test_a_wired_network_starts_by_passing_an_input_on(form):
    network = core.wired_gate_network((9, 16, 16, 8, 4, 2, 1), [3, 4], form, 0.9)
    output = network.hardened(all_cells(2))
    for seed in range(2):
        assert any(torch.equal(output[seed], cell) for cell in all_cells()[0])
    c = network[0].gates.coefficients()[0, 0].double()
    if form == "softmax":  # 0.9 of A, the rest in equal parts
        literal = sum((0.9 if name == "A" else 0.1 / 15) * RELAXED[name](c * 0 + 0.3, c * 0 + 0.8)[0] for name in core.GATES[:16])
    else:  # 0.1 where A is 0, 0.9 where it is 1
        literal = torch.tensor(0.7 * 0.1 + 0.3 * 0.9)
    assert (c @ torch.tensor([1, 0.3, 0.8, 0.24]).double()).item() == pytest.approx(literal.item(), rel=1e-5)


@pytest.mark.parametrize("sizes", [(9, 6, 5, 1), (9, 130, 600, 1)])  # the second goes through oneDNN
@pytest.mark.parametrize("gates", [("AND", "XOR", "OR", "NAND"), ("RELU",), ("RELU", "AND")])
def test_dense_network_against_plain_products(sizes, gates):
    network = core.dense_gate_network(sizes, [3, 4], gates, "free", "uniform", spread=0.1)
    found = network(all_cells(2))
    for seed in range(2):
        x = all_cells()[0]
        for layer in network:
            both = layer.operands.weight[seed] @ x + layer.operands.bias[seed]
            a, b = (both, both) if gates == ("RELU",) else both.chunk(2)
            x = sum(layer.gates.weight[seed, :, g, None] * RELAXED[name](a, b) for g, name in enumerate(gates))
        torch.testing.assert_close(found[seed], x[0], rtol=1e-4, atol=1e-5)


def test_uniform_gates_sum_to_one_and_constant_ones_are_equal():
    for start in ("uniform", "constant"):
        network = core.dense_gate_network((9, 6, 1), [3], ("AND", "OR"), start=start)
        weight = network[0].gates.weight
        torch.testing.assert_close(weight.sum(-1), torch.ones(1, 6))
        assert (weight[..., 0] == weight[..., 1]).all() == (start == "constant")


LIFE_CONFIG = {"steps": 12, "batch": 32, "alive": 0.3, "lr": 0.1}


@pytest.mark.parametrize(
    ("sizes", "gates"), [((9, 6, 5, 1), ("AND", "XOR")), ((9, 260, 260, 1), ("RELU",)), ((9, 48, 1), ("RELU", "OR"))]
)
def test_a_seed_is_the_same_in_any_company(sizes, gates):
    runs = {}
    for seeds in ([3, 4, 5], [4], [4, 9]):
        network = core.dense_gate_network(sizes, seeds, gates, start="uniform", spread=0.2)
        runs[len(seeds)] = (seeds.index(4), core.train_on_life(network, seeds, LIFE_CONFIG))
    for key in ("loss", "output", "diverged"):
        one, two, three = (run[key][row] for row, run in runs.values())
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


def test_training_on_counts_is_sgd_on_the_drawn_batch():
    config, seeds, bound = LIFE_CONFIG, [5], torch.tanh
    network = core.dense_gate_network((9, 6, 5, 1), seeds, ("AND", "XOR", "RELU"), spread=0.3, bound=bound)
    reference = core.dense_gate_network((9, 6, 5, 1), seeds, ("AND", "XOR", "RELU"), spread=0.3, bound=bound)
    seen = []
    run = core.train_on_life(network, seeds, config, watch=lambda step, output, counts, grads: seen.append((step, len(grads))))
    optimizer, batches = torch.optim.SGD(reference.parameters(), lr=config["lr"]), core.neighbourhood_batches(seeds, 0.3, 32)
    chance, target = torch.from_numpy(core.neighbourhood_chances(0.3)), torch.from_numpy(core.LIFE)
    for step in range(config["steps"]):
        drawn = torch.repeat_interleave(torch.arange(512), next(batches)[0].long())
        assert len(drawn) == 32
        exact = (chance * (reference(all_cells())[0].double() - target) ** 2).sum().item()
        assert run["loss"][0, step] == pytest.approx(exact, rel=1e-5)
        loss = F.mse_loss(reference(all_cells()[..., drawn])[0], target[drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for one, two in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(run["output"][0], reference(all_cells())[0].detach(), rtol=1e-4, atol=1e-6)
    assert seen == [(step, len([*network.parameters()])) for step in range(config["steps"])] and np.isnan(run["diverged"][0])


def test_a_diverged_network_is_told_and_harms_no_other():
    def update(parameters, gradients, lr):
        core.descend(parameters, gradients, lr)
        parameters[0][1] *= 1e12  # the second network runs away

    calm = core.train_on_life(core.dense_gate_network((9, 6, 5, 1), [3], ("AND", "XOR"), spread=0.3), [3], LIFE_CONFIG)
    both = core.train_on_life(
        core.dense_gate_network((9, 6, 5, 1), [3, 4], ("AND", "XOR"), spread=0.3), [3, 4], LIFE_CONFIG, update
    )
    assert np.isnan(both["diverged"][0]) and 1 <= both["diverged"][1] < 12 and not np.isfinite(both["loss"][1, -1])
    assert np.isfinite(both["loss"][1, 0])
    np.testing.assert_array_equal(both["loss"][0], calm["loss"][0])


# circuits


def random_circuit(gates, rng):
    """Any gates of any earlier signals: constants, copies, equal and dead gates among them."""
    first, second = ([int(rng.integers(core.CELLS + i)) for i in range(gates)] for _ in "ab")
    numbers = rng.integers(16, size=gates).tolist()
    return core.Circuit(list(zip(numbers, first, second, strict=True)), core.CELLS + gates - 1)


def output_table(circuit):
    return core.truth_tables(circuit)[circuit.output]


def full_adder_life():
    """Life by hand, from adders: a circuit that no code here made."""
    gates = []

    def gate(name, a, b):
        gates.append((core.GATES.index(name), a, b))
        return core.CELLS + len(gates) - 1

    def add(a, b, c):
        half = gate("XOR", a, b)
        return gate("XOR", half, c), gate("OR", gate("AND", a, b), gate("AND", half, c))

    ones, twos = zip(*(add(*cells) for cells in ((0, 1, 2), (3, 5, 6))), strict=True)
    sum_of_rest, carry = gate("XOR", 7, 8), gate("AND", 7, 8)
    one, two = add(*ones, sum_of_rest)
    low, high = add(*twos, carry)  # twos: low counts them modulo 2
    two_is_odd = gate("XOR", low, two)
    fours = gate("OR", high, gate("AND", low, two))
    exactly_2_or_3 = gate("A AND NOT B", two_is_odd, fours)
    return core.Circuit(gates, gate("AND", exactly_2_or_3, gate("OR", one, 4))) if gates else None


def test_gates_of_values_are_their_truth_tables():
    a, b = np.array([False, False, True, True]), np.array([False, True, False, True])
    for number in range(16):
        expected = [bool(number >> bit & 1) for bit in (3, 2, 1, 0)]
        assert core.OPERATIONS[number](a, b).tolist() == expected
        words = core.OPERATIONS[number](core.pack(a), core.pack(b))
        assert core.unpack(words, 4).tolist() == expected
        torch.testing.assert_close(core.truth_table(torch.tensor(number)), torch.tensor(expected).float())


def test_life_from_adders_is_life():
    np.testing.assert_array_equal(output_table(full_adder_life()), core.LIFE == 1)


PASSES = {
    "dead": lambda circuit: core.assemble(circuit.numbered(), circuit.output),
    "constants": lambda circuit: core.fold(circuit, copies=False),
    "copies": core.fold,
    "equal": core.merge_equal,
    "substituted": lambda circuit: core.substitute(core.fold(circuit), np.random.default_rng(0)),
    "walked": lambda circuit: core.random_walk(core.fold(circuit), 30, np.random.default_rng(0)),
}


@pytest.mark.parametrize("name", PASSES)
def test_each_pass_keeps_the_output_and_adds_no_gate(name):
    shrunk = 0
    for seed in range(40):
        circuit = random_circuit(int(np.random.default_rng(seed).integers(1, 40)), np.random.default_rng(seed))
        smaller = PASSES[name](circuit)
        np.testing.assert_array_equal(output_table(smaller), output_table(circuit))
        assert all(max(gate[1:]) < signal for signal, gate in smaller.numbered().items())
        assert len(smaller.gates) <= len(circuit.gates)
        shrunk += len(smaller.gates) < len(circuit.gates)
    assert shrunk > 20


def test_folding_leaves_no_constant_copy_or_inverter():
    for seed in range(40):
        circuit = core.fold(random_circuit(60, np.random.default_rng(seed)))
        needless = [gate for gate, _, _ in circuit.gates if gate in (0, 3, 5, 10, 12, 15)]
        assert not needless or len(circuit.gates) == 1  # an output that is constant or an inverted cell
        assert all(first != second for gate, first, second in circuit.gates) or len(circuit.gates) == 1


def test_equal_and_complementary_gates_become_one():
    gates = [(6, 0, 1), (9, 1, 0), (6, 0, 1), (1, 9, 2), (7, 10, 3), (1, 11, 4), (6, 12, 13), (7, 14, 15)]  # XOR, XNOR, XOR; users
    circuit = core.merge_equal(core.Circuit(gates, 16))
    assert len(circuit.gates) == 6 and sum(gate in (6, 9) and max(a, b) < 9 for gate, a, b in circuit.gates) == 1


def test_simplifying_life_from_adders_finds_no_more_than_it_had_and_tells_each_pass():
    circuit = full_adder_life()
    padded = core.Circuit([*circuit.gates, (1, circuit.output, 0), (7, circuit.output, len(circuit.gates) + core.CELLS)],
                          circuit.output + 2)  # y OR (y AND x0) is y  # fmt: skip
    small, left = core.simplify(padded, 50, np.random.default_rng(0))
    assert [*left] == ["hardened", *PASSES] and left["hardened"] == len(padded.gates) and left["walked"] == len(small.gates)
    assert sorted(left.values(), reverse=True) == [*left.values()] and len(small.gates) <= len(circuit.gates)
    np.testing.assert_array_equal(output_table(small), core.LIFE == 1)


def test_a_pass_that_breaks_the_circuit_is_caught(monkeypatch):
    monkeypatch.setattr(core, "merge_equal", lambda circuit: core.Circuit([(1, 0, 1)], 9))
    with pytest.raises(ArithmeticError, match="equal"):
        core.simplify(full_adder_life(), 5, np.random.default_rng(0))


def test_replacements_are_what_the_search_promises():
    """Every gain that a search tells is the number of gates that disappear, at the least, and the output stays."""
    tried = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        circuit = core.fold(random_circuit(60, rng))
        found = core.Resubstitution(circuit)
        for number in circuit.numbered():
            others = rng.integers(len(found.value), size=4).tolist()
            for outer in (None, *((int(rng.choice(core.AND_OR_XOR)), other) for other in others)):
                gain, table = found.search(number, outer)
                if gain.max() > -99:
                    tried += outer is not None
                    changed = found.replace(number, gain, table, outer, rng)
                    np.testing.assert_array_equal(output_table(changed), output_table(circuit))
                    # one gate is left of an output that is constant or an inverted cell
                    assert len(changed.gates) <= max(len(circuit.gates) - gain.max(), 1)
    assert tried > 10


def test_a_hardened_network_is_its_circuit():
    for form in ("softmax", "table"):
        network = core.wired_gate_network((9, 12, 7, 4, 2, 1), [3, 4], form, 0.6)
        for layer in network:
            weight = next(layer.gates.parameters())
            weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(weight)))
        hard = network.hardened(all_cells(2))
        for row in range(2):
            np.testing.assert_array_equal(output_table(core.hardened_circuit(network, row)), hard[row].numpy() == 1)


def test_text_and_code_say_what_the_circuit_does(tmp_path):
    for seed in range(10):
        circuit = core.fold(random_circuit(30, np.random.default_rng(seed)))
        path = tmp_path / "net.v"
        path.write_text(core.netlist(circuit, "a comment"))
        np.testing.assert_array_equal(output_table(core.read_netlist(path)), output_table(circuit))
        lines = path.read_text().splitlines()
        shuffled = [*lines[:3], *reversed(lines[3:-1]), lines[-1]]
        np.testing.assert_array_equal(output_table(core.parse_netlist("\n".join(shuffled))), output_table(circuit))
        names = {}
        exec(core.numpy_code(circuit), names)
        np.testing.assert_array_equal(names["next_cell"](*core.NEIGHBOURHOODS.T.astype(bool)), output_table(circuit))


@pytest.mark.parametrize(
    ("lines", "line", "wrong"),
    [
        (["assign y = x0 & x1"], 1, "cannot be understood"),
        (["hello"], 1, "cannot be understood"),
        (["assign y = x0 & x1;", "assign y = x2;"], 2, "y is driven twice"),
        (["assign x3 = x0;", "assign y = x3;"], 1, "x3 is a cell"),
        (["assign y = g0 | x1;"], 1, "nothing drives g0"),
        (["assign y = x9;"], 1, "nothing drives x9"),
        (["assign g0 = x0;"], 1, "nothing drives y"),
        ([], 0, "nothing drives y"),
        (["assign y = (x0 & x1) | x2;"], 1, "no gate of two signals"),
        (["assign y = x0 & x1 & x2;"], 1, "no gate of two signals"),
        (["assign y = 1'b1;"], 1, "nothing drives 1"),
        (["assign y = ~;"], 1, "no gate of two signals"),
        (["// a loop", "assign g0 = g1 & x0;", "assign g1 = g0 | x1;", "assign y = g1;"], 2, "cycle"),
        (["assign g0 = g0 ^ x1;", "assign y = g0 & x2;"], 1, "cycle"),
        (["assign y = y;"], 1, "cycle"),
    ],
)
def test_a_malformed_netlist_is_one_line(lines, line, wrong, tmp_path):
    path = tmp_path / "net.v"
    path.write_text("\n".join(lines))
    with pytest.raises(core.UsageError) as caught:
        core.read_netlist(path)
    message = str(caught.value)
    assert f"--netlist {path}, line {line}: " in message and wrong in message and "\n" not in message


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_netlist_that_cannot_be_read_is_one_line(content, tmp_path):
    path = tmp_path / "net.v"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(core.UsageError, match="cannot be read"):
        core.read_netlist(path)


@pytest.mark.parametrize(("height", "width"), [(3, 3), (20, 63), (33, 64), (20, 65), (70, 200), (5, 128)])
def test_packed_boards_run_as_convolution_says(height, width):
    board = np.random.default_rng(width).random((height, width)) < 0.4
    packed = core.PackedLife(full_adder_life(), board)
    packed.strip_words = 16  # several strips
    np.testing.assert_array_equal(packed.board(), board)
    for _ in range(100):
        packed.step()
        board = core.convolution_step(board)
        np.testing.assert_array_equal(packed.board(), board)
    with pytest.raises(ValueError):
        core.PackedLife(full_adder_life(), np.zeros((2, 64), bool))


def test_known_patterns_do_what_they_are_known_for():
    def run(name, height, width, generations):
        life, boards = core.PackedLife(full_adder_life(), core.pattern_board(name, height, width)), []
        for _ in range(generations + 1):
            boards.append(life.board())
            life.step()
        return boards

    blinker = run("blinker", 8, 8, 2)
    assert (blinker[2] == blinker[0]).all() and (blinker[1] != blinker[0]).any()
    glider = run("glider", 10, 70, 40)
    for generation in range(0, 37, 4):  # a cell down and right every four, around the edges
        np.testing.assert_array_equal(glider[generation + 4], np.roll(glider[generation], (1, 1), (0, 1)))
    gun = run("gosper-gun", 60, 80, 120)
    assert [int(gun[generation + 30].sum() - gun[generation].sum()) for generation in (0, 30, 60)] == [5, 5, 5]
    np.testing.assert_array_equal(gun[30][:11, :38], gun[60][:11, :38])  # the gun itself has period 30
    with pytest.raises(ValueError):
        core.pattern_board("gosper-gun", 9, 70)


def test_a_board_is_shown_two_rows_a_line():
    assert core.show(np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0]], bool)) == "▀ █\n▀▀ "


def test_boards_are_saved_as_a_strip_or_an_animation(tmp_path):
    boards = [core.pattern_board("glider", 10, 12)] * 9
    core.save_boards(boards, tmp_path / "life.gif")
    core.save_boards(boards, tmp_path / "life.png")
    assert (tmp_path / "life.gif").read_bytes()[:3] == b"GIF" and (tmp_path / "life.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(core.UsageError, match="--save"):
        core.save_boards(boards, tmp_path / "life.txt")


def test_wired_networks_learn_an_easy_life_exactly(monkeypatch):
    """The next state made to be x0 XOR x1: a shallow network finds it, and says when."""
    monkeypatch.setattr(core, "LIFE", (core.NEIGHBOURHOODS[:, 0] != core.NEIGHBOURHOODS[:, 1]).astype(np.float32))
    seeds, rows = [3, 4, 5], []
    network = core.wired_gate_network((9, 40, 20, 10, 5, 3, 2, 1), seeds, "table", 0.9)
    config = {"lr": 0.1, "decay": 0.01, "batch": 64, "steps": 1500}
    results = core.train_until_exact(network, seeds, config, rows.append)
    exact = [row for row in range(3) if results[row]["exact"]]
    assert exact and sorted(rows) == exact
    for result in results:
        assert result["exact"] == float(result["least_wrong"] == 0) == float(result["steps_to_exact"] % 20 == 0)
    alone = core.train_until_exact(
        core.wired_gate_network((9, 40, 20, 10, 5, 3, 2, 1), [4], "table", 0.9), [4], config, rows.append
    )
    assert alone[0] == results[1] and results[1]["exact"]


def test_the_fewest_wrong_neighbourhoods_are_kept(monkeypatch):
    network, seen, hardened = core.wired_gate_network((9, 8, 4, 2, 1), [6], "table", 0.9), [], core.GateNetwork.hardened

    def watched(self, x):
        output = hardened(self, x)
        seen.append(int((output != torch.from_numpy(core.LIFE)).sum()))
        return output

    monkeypatch.setattr(core.GateNetwork, "hardened", watched)
    config = {"lr": 2.0, "decay": 0.0, "batch": 64, "steps": 200}  # so wild that later checks are not better
    (result,) = core.train_until_exact(network, [6], config, lambda row: None)
    assert len(seen) == 11 and result["least_wrong"] == min(seen) < seen[-1]


# losses and metrics


def test_class_weighted_loss_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [3.0, -1.0], [9.0, -9.0]])
    label = torch.tensor([0, 1, 1, 1, core.IGNORED])
    each = [-F.log_softmax(row, 0)[c] for row, c in zip(logits[:4], (0, 1, 1, 1), strict=True)]
    weight = {0: 3 / 4, 1: 1 / 4}
    expected = sum(weight[c] * loss for c, loss in zip((0, 1, 1, 1), each, strict=True)) / (3 / 4 + 3 * 1 / 4)
    torch.testing.assert_close(core.class_weighted_cross_entropy(logits, label), expected)


def test_balanced_accuracy_is_pooled():
    first = core.confusion(torch.tensor([[1.0, 0], [0, 1.0], [0, 1.0], [1.0, 0]]), torch.tensor([0, 0, 1, core.IGNORED]))
    second = core.confusion(torch.tensor([[1.0, 0], [1.0, 0], [1.0, 0]]), torch.tensor([0, 1, 1]))
    assert first.tolist() == [[1, 1], [0, 1]] and second.tolist() == [[1, 0], [2, 0]]
    both = torch.stack([first, second])
    assert core.class_recalls(both.sum(0)).mean() == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert core.class_recalls(torch.tensor([[3, 1], [0, 0]])).tolist() == [0.75, 0.0]  # an absent class counts 0


def test_a_curve_diverges_at_its_first_step_that_is_not_finite():
    curve = np.array([[1.0, 2.0, 3.0], [1.0, np.nan, 3.0], [np.inf, 1.0, np.nan]])
    np.testing.assert_array_equal(core.diverged_at(curve), [np.nan, 1, 0])
    assert core.diverged_at(curve[0], np.array([0, 0, np.inf])) == 2 and np.isnan(core.diverged_at(torch.ones(2)))


def test_ranking_accuracy_is_the_rank_sum():
    rng = np.random.default_rng(0)
    label = torch.from_numpy(rng.integers(2, size=200))
    logits = torch.from_numpy(np.round(rng.normal(size=(200, 2)), 1)).float()  # rounded: many ties
    margin = (logits[:, 1] - logits[:, 0]).numpy()
    u = stats.mannwhitneyu(margin[label == 1], margin[label == 0]).statistic
    found = core.ranking_accuracy(torch.cat([logits, torch.ones(3, 2)]), torch.cat([label, torch.full((3,), core.IGNORED)]))
    assert found == pytest.approx(u / ((label == 1).sum() * (label == 0).sum()).item(), rel=1e-6)
    assert core.ranking_accuracy(torch.tensor([[0.0, 1], [0, 5]]), torch.tensor([0, 1])) == 1
    assert core.ranking_accuracy(torch.tensor([[0.0, 1], [0, 5]]), torch.tensor([1, 1])).isnan()


def test_ratio_summary_on_known_curves():
    names, steps = ["a.weight", "norm1.weight", "norm1.bias"], 8
    gradient = np.stack([np.full(steps, 0.02), np.full(steps, 0.01), np.geomspace(1, 1e-7, steps)], 1)
    curves = {"names": names, "gradient": gradient, "weight": np.ones((steps, 3))}
    found = core.ratio_summary(curves)
    assert found["norm_level_by_parameter"] == pytest.approx(max(0.01, np.median(gradient[:, 2])) / 0.02)
    joined = np.hypot(gradient[:, 1], gradient[:, 2]) / math.sqrt(2)
    assert found["norm_level_by_module"] == pytest.approx(np.median(joined) / 0.02)
    assert found["norm_wobble_by_parameter"] == math.inf  # a decade a step against none
    middle = np.median(np.stack([gradient[:, 0], joined], 1), 1)
    assert found["in_band"] == np.mean((middle > 1e-3) & (middle < 0.1))
    assert found["ratio_trend"] == pytest.approx(np.median(middle[-2:]) / np.median(middle[:2]))


def test_every_norm_is_found_by_its_name():
    """ratio_summary tells norms from the rest by name."""
    for config in (CONFIG | {"feedforward_norm": "batch"}, CONFIG | {"norm": "batch"}, CONFIG | {"model": "gin"}):
        net = core.build_model(config, 0)
        kinds = (torch.nn.LayerNorm, torch.nn.BatchNorm1d)
        norms = {f"{name}.{part}" for name, m in net.named_modules() if isinstance(m, kinds) for part, _ in m.named_parameters()}
        assert norms and norms == {name for name, _ in net.named_parameters() if "norm" in name}


# gradient log


def fit(graphs, steps=6, **changes):
    return core.train(
        core.build_model(CONFIG | changes, 0), core.batches_of(graphs, 3), seed=0, lr=1e-2, epochs=steps, clip=1.0
    )  # fmt: skip


def by_hand(graphs, steps, log=None, batch_size=3, **changes):
    """torch's own pieces in a plain loop: weights and losses."""
    net = core.build_model(CONFIG | changes, 0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, fused=True)
    batch, losses = core.GraphBatch(graphs), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = core.class_weighted_cross_entropy(net(batch), batch.label)
        loss.backward()
        if log is not None:
            log(net).before_step()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return net, torch.stack(losses)


@pytest.mark.parametrize("model", ["position", "gin"])
def test_logging_reads_only(graphs, model):
    """Losses and weights are bit-identical to a loop without any log."""
    net, losses = by_hand(graphs, 6, model=model)
    logged = core.build_model(CONFIG | {"model": model}, 0)
    curves = core.train(logged, core.batches_of(graphs, 3), seed=0, lr=1e-2, epochs=6, clip=1.0)
    assert torch.equal(curves["loss"], losses)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), logged.parameters(), strict=True))


def test_logged_norms_are_the_norms(graphs):
    net = core.build_model(CONFIG, 0)
    batch, log = core.GraphBatch(graphs), core.GradientLog(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    core.class_weighted_cross_entropy(net(batch), batch.label).backward()
    total = log.before_step()
    weight = [p.detach().norm() for p in net.parameters()]
    gradient = [p.grad.norm() for p in net.parameters()]
    optimizer.step()
    log.after_step()
    curves = log.curves()
    torch.testing.assert_close(curves["weight"][0], torch.stack(weight))
    torch.testing.assert_close(curves["gradient"][0], torch.stack(gradient))
    torch.testing.assert_close(curves["update"][0], 0.5 * torch.stack(gradient))
    torch.testing.assert_close(total, torch.cat([p.grad.flatten() for p in net.parameters()]).norm())
    assert log.names == [name for name, _ in net.named_parameters()]


def test_ratios_join_a_modules_parameters():
    curves = {
        "names": ["a.weight", "a.bias", "b.eps"],
        "gradient": [[3.0, 4.0, 1.0], [0.0, 1.0, 2.0]],
        "weight": [[6.0, 8.0, 2.0], [1.0, 0.0, 0.0]],
        "update": [[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]],
    }
    names, ratio = core.ratio_to_weight(curves)
    assert names == ["a", "b.eps"]
    np.testing.assert_allclose(ratio, [[0.5, 0.5], [1.0, np.nan]])
    names, ratio = core.ratio_to_weight(curves, by="parameter")
    np.testing.assert_allclose(ratio, [[0.5, 0.5, 0.5], [0.0, np.nan, np.nan]])
    np.testing.assert_allclose(core.ratio_to_weight(curves, "update")[1][0], [0.1, 0.5])


def test_spikes_and_onset_on_known_series():
    flat = np.ones(100)
    assert core.count_spikes(flat) == 0 and math.isnan(core.growth_onset(flat))
    spiked = flat.copy()
    spiked[[30, 60]] = 6.0
    spiked[5] = 100.0  # no full window before it
    assert core.count_spikes(spiked) == 2 and math.isnan(core.growth_onset(spiked))
    assert core.count_spikes(np.where(np.arange(100) == 50, np.nan, flat)) == 1
    grown = np.where(np.arange(100) < 70, 1.0, 4.0)
    assert core.growth_onset(grown) == 70
    grown[72] = 1.0  # not held until 73
    assert core.growth_onset(grown) == 73
    assert core.count_spikes(np.ones(5)) == 0 and math.isnan(core.growth_onset(np.ones(3)))
    assert core.running_median([1, 9, 2, 3], 3).tolist() == [2, 3]


# training


def test_training_follows_torchs_plain_adam(graphs):
    net = core.build_model(CONFIG, 0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, foreach=False, fused=False)
    batch, losses, scores = core.GraphBatch(graphs), [], []
    for _ in range(5):
        scores.append(core.class_recalls(core.confusion(net(batch), batch.label)))
        loss = core.class_weighted_cross_entropy(net(batch), batch.label)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    scores.append(core.class_recalls(core.confusion(net(batch), batch.label)))
    curves = fit(graphs, 5)
    np.testing.assert_allclose(curves["loss"], losses, rtol=1e-4)
    torch.testing.assert_close(curves["recall"], torch.stack(scores))
    assert math.isnan(curves["diverged"])


def test_warm_up_is_a_slower_start(graphs):
    """Against torch's own schedule."""
    net = core.build_model(CONFIG, 0)
    optimizer, batch, losses = torch.optim.Adam(net.parameters(), lr=1e-2), core.GraphBatch(graphs), []
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, 1.0, 3)
    for _ in range(6):
        loss = core.class_weighted_cross_entropy(net(batch), batch.label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    curves = core.train(core.build_model(CONFIG, 0), [batch], seed=0, lr=1e-2, epochs=6, clip=0.0, warmup=4)
    np.testing.assert_allclose(curves["loss"], losses, rtol=1e-4)


@pytest.mark.parametrize("model", ["position", "gin"])
def test_held_out_graphs_are_scored_and_not_trained_on(graphs, model):
    batch, held_out = core.GraphBatch(graphs), core.GraphBatch(core.PatternData(7)[3:5])
    net = core.build_model(CONFIG | {"model": model}, 0)
    curves = core.train(net, [batch], seed=0, lr=1e-2, epochs=3, clip=0.0, held_out=[held_out])
    alone = core.train(core.build_model(CONFIG | {"model": model}, 0), [batch], seed=0, lr=1e-2, epochs=3, clip=0.0)
    torch.testing.assert_close(curves["loss"], alone["loss"])
    assert not torch.equal(curves["margin"], alone["margin"])
    logits, label = core.evaluate(net, [held_out])
    margin = logits[:, 1] - logits[:, 0]
    torch.testing.assert_close(curves["recall"][-1], core.class_recalls(core.confusion(logits, label)))
    torch.testing.assert_close(curves["margin"][-1], torch.stack([margin.mean(), margin.std()]))


def test_only_real_nodes_can_diverge():
    label = torch.tensor([0, 1, 0, core.IGNORED])
    for wrong, diverged in ((3, False), (1, True)):
        logits, curves = torch.randn(4, 2), {"recall": [], "auc": [], "margin": []}
        logits[wrong] = math.nan
        core.score(logits, label, curves)
        assert bool(curves["recall"][0].isnan().any()) == diverged and bool(curves["auc"][0].isnan()) == diverged


def test_score_summary_on_known_curves():
    balanced = np.array([0.5, 0.6, 0.8, 0.7, 0.75])
    gap = np.array([0.0, 0.2, -0.2, 0.1, 0.1])
    curves = {
        "recall": torch.from_numpy(np.stack([balanced - gap / 2, balanced + gap / 2], 1)),
        "margin": torch.tensor([[0.0, 1.0], [1.0, 2.0], [3.0, 2.0], [2.0, 4.0], [6.0, 1.0]]),
        "auc": torch.tensor([0.5, 0.6, 0.7, 0.9, 0.8]),
        "gradient_norm": torch.ones(4),
    }
    found = core.score_summary(curves)
    expected = {"best": 0.8, "final": 0.75, "jump": 0.075, "class_jump": 0.15, "auc_jump": 0.15, "drift": 0.75, "rise": 0.25}
    expected |= {"epochs_to_0.7": 2, "spikes": 0, "onset": 4, "growth": 1.0}
    assert found == pytest.approx(expected)
    never = core.score_summary(curves | {"recall": torch.full((5, 2), 0.6)})
    assert never["epochs_to_0.7"] == 5


def test_the_clip_bites(graphs):
    net = core.build_model(CONFIG, 0)
    free = core.train(net, core.batches_of(graphs, 3), seed=0, lr=1e-2, epochs=6, clip=0.0)
    clipped = fit(graphs)
    assert clipped["gradient_norm"][0] == free["gradient_norm"][0] > 1.0
    assert not torch.equal(free["loss"], clipped["loss"])


def test_same_seed_same_numbers(graphs):
    for changes in ({}, {"model": "gin"}, {"norm": "batch", "activation": "softmax"}):
        one, two = fit(graphs, **changes), fit(graphs, **changes)
        assert all(torch.equal(one[key], two[key]) for key in ("loss", "recall", "gradient", "update"))


def test_batch_norm_models_are_scored_in_evaluation_mode(graphs):
    net = core.build_model(CONFIG | {"norm": "batch"}, 0)
    batches = core.batches_of(graphs, 3)
    curves = core.train(net, batches, seed=0, lr=1e-2, epochs=4, clip=1.0)
    untouched = core.build_model(CONFIG | {"norm": "batch"}, 0)
    for epoch, model in ((0, untouched), (-1, net)):
        logits = model.eval()(batches[0])
        assert torch.equal(curves["recall"][epoch], core.class_recalls(core.confusion(logits, batches[0].label)))
        assert torch.equal(curves["auc"][epoch], core.ranking_accuracy(logits, batches[0].label))
        margin = (logits[:, 1] - logits[:, 0]).detach().numpy()
        np.testing.assert_allclose(curves["margin"][epoch], [margin.mean(), margin.std(ddof=1)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["random", "zero"])
def test_models_with_dropout_are_scored_in_evaluation_mode(graphs, start):
    """Also where the readout starts at zero, so that the first training pass gives what an evaluation gives. Each score is that of
    a shorter run's end, where the model is evaluated whatever it is made of."""
    runs = []
    for epochs in (1, 2, 3, 4):
        net = core.build_model(CONFIG, 0)
        if start == "zero":
            torch.nn.init.zeros_(net.readout.weight)
            torch.nn.init.zeros_(net.readout.bias)
        net.readout = torch.nn.Sequential(torch.nn.Dropout(0.5), net.readout)
        torch.manual_seed(0)
        runs.append(core.train(net, core.batches_of(graphs, 3), seed=0, lr=1e-2, epochs=epochs, clip=1.0))
        logits, _ = core.evaluate(net, core.batches_of(graphs, 3))
        margin = logits[:, 1] - logits[:, 0]
        torch.testing.assert_close(runs[-1]["margin"][-1], torch.stack([margin.mean(), margin.std()]))
    for epochs, run in enumerate(runs, 1):
        torch.testing.assert_close(runs[-1]["loss"][:epochs], run["loss"])
        torch.testing.assert_close(runs[-1]["margin"][: epochs + 1], run["margin"])


def test_scores_are_taken_in_passing_where_that_is_the_same(graphs, monkeypatch):
    calls, evaluate = [], core.evaluate
    monkeypatch.setattr(core, "evaluate", lambda *given: calls.append(1) or evaluate(*given))
    core.train(core.build_model(CONFIG, 0), core.batches_of(graphs, 3), seed=0, lr=1e-2, epochs=6, clip=1.0)
    assert len(calls) in (2, 7)  # the first and the last; or all, on a processor whose training pass rounds otherwise
    calls.clear()
    core.train(core.build_model(CONFIG | {"norm": "batch"}, 0), core.batches_of(graphs, 3), seed=0, lr=1e-2, epochs=6, clip=1.0)
    assert len(calls) == 7


def test_several_batches_pool_their_score(graphs):
    net, batches = core.build_model(CONFIG, 0), core.batches_of(graphs, 1)
    curves = core.train(net, batches, seed=0, lr=1e-2, epochs=2, clip=1.0)
    assert len(curves["loss"]) == 6 and len(curves["recall"]) == 3
    counts = torch.stack([core.confusion(net(batch), batch.label) for batch in batches])
    assert curves["recall"][-1].mean() == core.class_recalls(counts.sum(0)).mean()
    assert len({float(x) for x in curves["loss"]}) == 6


def test_a_diverged_run_is_a_result(graphs):
    net = core.build_model(CONFIG, 0)
    with torch.no_grad():
        net.readout.weight.fill_(1e38)
    curves = core.train(net, core.batches_of(graphs, 3), seed=0, lr=1e-2, epochs=3, clip=1.0)
    assert curves["diverged"] == 0.0 and curves["recall"].isnan().all() and curves["auc"].isnan().all()


@pytest.mark.parametrize("model", ["position", "gin"])
def test_a_killed_trial_goes_on_bit_for_bit(graphs, model, tmp_path, monkeypatch):
    whole = fit(graphs, 7, model=model)
    monkeypatch.setattr(core, "CHECKPOINT_SECONDS", -1.0)
    core.Runtime.checkpoint = tmp_path / "state"
    fit(graphs, 4, model=model)  # as if killed behind epoch 4
    assert core.Runtime.checkpoint.exists()
    resumed = fit(graphs, 7, model=model)
    for key in ("loss", "recall", "gradient_norm", "weight", "gradient", "update"):
        assert torch.equal(whole[key], resumed[key]), key


class Hostile:
    def __reduce__(self):
        return (Path("hostile-was-here").write_text, ("x",))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps(Hostile())])
def test_a_damaged_checkpoint_is_refused(graphs, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    core.Runtime.checkpoint = tmp_path / "state"
    core.Runtime.checkpoint.write_bytes(content)
    with pytest.raises(core.UsageError, match="not a checkpoint"):
        fit(graphs)
    assert not Path("hostile-was-here").exists()


# statistics


def test_intervals_against_scipy():
    a, b = np.array([0.9, 0.7, 0.8, 0.95]), np.array([0.5, 0.65, 0.7, 0.6])
    oracle = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = core.mean_interval(a - b)
    assert (found.low, found.high, found.n) == (pytest.approx(oracle.low), pytest.approx(oracle.high), 4)
    ratio = core.ratio_interval(a, b)
    oracle = stats.ttest_rel(np.log(a), np.log(b)).confidence_interval(0.95)
    assert (ratio.low, ratio.high) == (pytest.approx(math.exp(oracle.low)), pytest.approx(math.exp(oracle.high)))
    assert ratio.estimate == pytest.approx(stats.gmean(a / b))
    assert core.mean_interval([0.3])[1:3] == (-math.inf, math.inf)
    assert math.isnan(core.mean_interval([0.3, math.nan]).estimate) and math.isnan(core.ratio_interval([1, 0], [1, 1]).estimate)
    rate = core.rate_interval([1, 1, 1, 1, 1])
    assert (rate.estimate, rate.low, rate.high) == (1.0, pytest.approx(0.025 ** (1 / 5)), 1.0)
    assert core.rate_difference_p([1] * 5, [0] * 5) == pytest.approx(2 / math.comb(10, 5))


@pytest.mark.parametrize(
    ("check", "values", "base", "verdict"),
    [
        (Check("m", (0.5, math.inf)), [0.8, 0.81, 0.79], None, "reproduced"),
        (Check("m", (0.5, math.inf)), [0.2, 0.21, 0.19], None, "refuted"),
        (Check("m", (0.5, math.inf)), [0.2, 0.9, 0.5], None, "inconclusive"),
        (Check("m", (0.5, math.inf)), [0.9], None, "inconclusive"),
        (Check("m", (0.5, math.inf)), [0.9, math.nan], None, "inconclusive"),
        (Check("m", (0.4, 0.6)), [0.5, 0.51, 0.49], None, "reproduced"),
        (Check("m", (0.4, 0.6)), [0.7, 0.71, 0.69], None, "refuted"),
        (Check("m", (0.4, 0.6)), [0.6, 0.61, 0.59], None, "inconclusive"),
        (Check("m", (0.0, math.inf), versus={}), [0.5, 0.7, 0.9], [0.4, 0.6, 0.8], "reproduced"),  # paired: the spread cancels
        (Check("m", (-0.01, 0.01), versus={}), [0.5, 0.7], [0.5, 0.7], "reproduced"),
        (Check("m", (-math.inf, 1.0), versus={}, scale="ratio"), [1.0, 2.0, 3.0], [4.0, 9.0, 11.0], "reproduced"),
        (Check("m", (-math.inf, 0.5), scale="rate"), [0] * 10, None, "reproduced"),
        (Check("m", (-math.inf, 0.5), scale="rate"), [0] * 3, None, "inconclusive"),
        (Check("m", (0.0, math.inf), versus={}, scale="rate"), [1] * 8, [0] * 8, "reproduced"),
        (Check("m", (-math.inf, 0.0), versus={}, scale="rate"), [1] * 8, [0] * 8, "refuted"),
        (Check("m", (0.0, math.inf), versus={}, scale="rate"), [1, 0, 0], [0, 0, 0], "inconclusive"),
    ],
)
def test_verdicts_follow_the_rule(check, values, base, verdict):
    assert check.judge(values, base)[0] == verdict


def test_a_claim_is_as_good_as_its_checks():
    assert core.combine(["reproduced", "reproduced"]) == "reproduced"
    assert core.combine(["reproduced", "inconclusive"]) == "inconclusive"
    assert core.combine(["inconclusive", "refuted"]) == "refuted"
    assert core.combine(["refuted", "not tested"]) == "not tested"


# flags, grids, trials, logbook: with a small experiment of its own

SCRIPT = '''
"""Does it add up?

Entry       no notebook, "sums" (1/1)
"""
def trial(config, seed):
    """Docstrings do not count."""
    return config["a"] + seed  # nor do comments
'''


def add(config, seed):
    if config.get("b") == "crash":
        raise KeyboardInterrupt
    return {
        "sum": config["a"] + 0.1 * seed,
        "count": np.int64(seed),
        "curve": np.arange(3.0) * config["a"],
        "names": ["x", "y"],
        "diverged": math.nan,
    }


def draw(run):
    return [core.curves_figure(run, "curve", "it rises", lambda cell, result: {"sigmoid": result["curve"]}, ["a"], "x", "y")]


def without_b(cell):
    if cell["a"] == 13:
        raise core.UsageError("--a 13: unlucky; choose another")
    return {key: value for key, value in cell.items() if key != "b" or cell["a"] < 10}


@pytest.fixture
def toy(tmp_path):
    script = tmp_path / "exp_toy.py"
    script.write_text(SCRIPT)
    claims = [
        Claim("two is more than one", "1/1", [Check("sum", (0.5, math.inf), {"a": 2}, versus={"a": 1})]),
        Claim("three is less than one", "1/1", [Check("sum", (-math.inf, 0.0), {"a": 3}, versus={"a": 1})]),
    ]
    flags = [
        core.Flag("a", core.at_least(1), (1, 2, 3), "a summand"),
        core.Flag("b", core.one_of("x", "y", "crash"), ("x",), "a word"),
        core.Flag("stack", core.powers_list, ((0, 1),), "powers"),
        core.Flag("rate", core.at_least(0.0, float, above=True), (0.5,), "a rate"),
    ]
    experiment = core.Experiment(
        str(script), SCRIPT.split('"""')[1], flags, add, claims, draw, lambda run: "it adds | up", ["sum"], {"a": (1,)}, without_b
    )

    def run(*argv, **changes):
        places = ["--logbook", str(tmp_path / "logbook.md"), "--plots", str(tmp_path / "plots"), "--runs", str(tmp_path / "runs")]
        return core.main(replace(experiment, **changes), [*places, "--jobs", "1", "--device", "cpu", *argv])

    return SimpleNamespace(run=run, path=tmp_path, logbook=tmp_path / "logbook.md", experiment=experiment, script=script)


def records(toy):
    return sorted((toy.path / "runs" / "toy").glob("*.npz"))


def test_a_run_judges_draws_and_appends(toy, capsys):
    assert toy.run("--note", "It | all\n## adds up.") == 0
    text = toy.logbook.read_text()
    assert text.startswith("# Logbook\n")
    assert "| two is more than one · 1/1 | **reproduced** | sum difference 1 [1, 1], claimed > 0.5: reproduced; n = 5 |" in text
    assert "| three is less than one · 1/1 | **refuted** |" in text
    assert "Reading. It / all ## adds up." in text and text.partition(core.INDEX_END)[2].count("\n## 20") == 1
    assert "| a 2 | 2.2 ± 0.2 | 2 2.1 2.2 2.3 2.4 |" in text
    (row,) = [line for line in index_of(text).splitlines() if "](#toy-" in line]
    assert row.endswith("| 1 | 1 | 0 | 0 |") and 'no notebook, "sums" (1/1)' in row and "it adds / up" in row
    image = re.search(r"!\[it rises\]\((plots/toy-curve-[0-9a-f]{8})\.png\)", text)[1]
    assert (toy.path / f"{image}.png").stat().st_size > 1000
    numbers = (toy.path / f"{image}.csv").read_text().splitlines()
    assert numbers[0].startswith("a 1 | sigmoid | seed 0,") and len(numbers) == 4
    assert "toy: 15 trials, 0 of them finished before" in capsys.readouterr().out


def test_memory_is_told_before_the_start_and_refused(toy, capsys):
    free = core.memory_mb("MemAvailable", "/proc/meminfo")
    for share, jobs, status in ((0.7, "2", 2), (0.01, "1", 0), (1.1, "1", 0)):  # what is finished needs no more memory
        memory = lambda cell, share=share: (f"--a {cell['a']}", share * free * cell["a"] / 3)  # noqa: E731
        assert toy.run("--seeds", "2", "--jobs", jobs, memory=memory) == status
        out, error = capsys.readouterr()
        assert (error.startswith("exp_toy.py: --a 3: needs about ") and error.count("\n") == 1) if status else not error
        assert (
            (", up to " in out) == (share == 0.01) and toy.logbook.exists() == (not status) and bool(records(toy)) == (not status)
        )


def test_every_arm_and_seed_stands_in_a_csv(toy):
    assert toy.run("--seeds", "2") == 0
    (path,) = (toy.path / "plots").glob("toy-arms-*.csv")
    rows = [line.split(",") for line in path.read_text().splitlines()]
    assert rows[0] == ["arm", "seed", "sum"]
    assert rows[1:] == [[f"a {a}", f"{seed}", f"{a + 0.1 * seed:g}"] for a in (1, 2, 3) for seed in (0, 1)]


def test_a_long_table_shows_its_ends(toy, monkeypatch):
    monkeypatch.setattr(core, "LONG_TABLE", 14)
    assert toy.run("--a", *map(str, [5, *range(21, 40)]), "--seeds", "1") == 0
    text = toy.logbook.read_text()
    shown = re.findall(r"^\| a (\d+) \|", text, re.MULTILINE)
    assert shown == ["5", "39", "38", "37", "36", "35", "34", "25", "24", "23", "22", "21"]
    assert f"{20 - len(shown)} arms between these stand in the CSV named -arms- only" in text


def test_metrics_over_several_arms_are_shown_and_judged(toy):
    def derived(run):
        return (
            {"range": [run.values(2, "sum")[s] - run.values(0, "sum")[s] for s in range(len(run.seeds))]}
            if len(run.cells) == 3
            else {}
        )

    claims = [Claim("the range is two", "1/1", [Check("range", (1.9, 2.1), None)])]
    assert toy.run(derived=derived, claims=claims) == 0
    assert toy.run("--a", "1", "2", derived=derived, claims=claims) == 0
    text = toy.logbook.read_text()
    assert "| range | 2 ± " in text and "| the range is two · 1/1 | **reproduced** | range 2 [2, 2]" in text
    assert "| the range is two · 1/1 | **not tested** |" in text


def test_part_of_the_grid_judges_only_what_it_covers(toy):
    assert toy.run("--a", "2", "1") == 0 and toy.run("--a", "3", "--seeds", "2") == 0
    text = toy.logbook.read_text()
    first, second = text.partition(core.INDEX_END)[2].split("\n## ")[1:]
    assert "**reproduced**" in first and "**not tested** | not tested by this run" in first
    assert second.count("**not tested**") == 2 and "seeds 0 to 1" in second
    assert "it adds / up, with a 3\n" in second and ", with" not in first
    assert [line[-17:] for line in index_of(text).splitlines() if "](#toy-" in line] == ["| 1 | 0 | 0 | 1 |", "| 0 | 0 | 0 | 2 |"]
    anchors = re.findall(r'<a id="([^"]+)">', text)
    assert len(set(anchors)) == 2 and all(f"(#{anchor})" in text for anchor in anchors)


def test_the_same_run_twice_gets_two_entries_and_two_anchors(toy):
    assert toy.run() == toy.run() == 0
    text = toy.logbook.read_text()
    assert len(set(re.findall(r'<a id="([^"]+)">', text))) == 2 and text.count("| it") == 0
    assert index_of(text).count("](#toy-") == 2


def test_once_appends_no_second_entry_of_the_same_run(toy, capsys):
    assert toy.run("--once") == 0 and toy.run("--a", "1", "--once") == 0
    before = toy.logbook.read_bytes()
    assert toy.run("--once") == 0 and toy.logbook.read_bytes() == before
    assert f"its entry stands in {toy.logbook}" in capsys.readouterr().out
    assert toy.run("--seeds", "2", "--once") == 0 and index_of(toy.logbook.read_text()).count("](#toy-") == 3


def test_a_quick_run_says_whose_verdicts_stand_and_writes_nothing(toy, capsys):
    def claim(text, low):
        return Claim(text, "1/1", [Check("sum", (low, math.inf), {})])

    claims = [claim("same", 0), claim("contrary", 1.5), claim("open here", 2.0), claim("open there", 1.1)]
    assert toy.run("--seeds", "5", claims=claims) == 0  # the first arm 1 to 1.4, and quick 2 to 2.2
    text, drawn = toy.logbook.read_bytes(), sorted((toy.path / "plots").iterdir())
    capsys.readouterr()
    assert toy.run("--quick", claims=[*claims, claim("new", 0)], doc=f"{toy.experiment.doc}\nQuick  `--a 2 --seeds 3`, 1 s") == 0
    assert toy.logbook.read_bytes() == text and sorted((toy.path / "plots").iterdir()) == drawn
    out = capsys.readouterr().out
    assert "toy: 3 trials" in out and out.endswith(
        "quick toy: of 5 verdicts in logbook.md: 1 as there, 1 contrary, 1 undecided here, 1 undecided there, 1 not tested\n"
        "  contrary: contrary\n  undecided here: open here\n"
    )


def test_a_hundred_kills_lose_nothing_and_double_nothing(toy, tmp_path):
    """Of a run that grows by a seed whenever it was let to its end, killed at random moments."""
    rng, fork, kills, seeds = np.random.default_rng(0), multiprocessing.get_context("fork"), 0, 1
    grow = functools.partial(toy.run, figures=lambda run: [])
    assert grow("--runs", str(tmp_path / "first"), "--no-log") == 0  # imports, which the forks then need not
    started = time.perf_counter()
    assert grow("--runs", str(tmp_path / "second"), "--no-log") == 0
    patience = 1.2 * (time.perf_counter() - started)

    def run():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        tqdm.set_lock(threading.RLock())  # its own is shared with this process, which would wait for what a killed one held
        raise SystemExit(grow("--once", "--seeds", str(seeds)))

    while kills < 100:
        process = fork.Process(target=run)
        process.start()
        process.join(rng.uniform(0.0, patience))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -9)
        found = [core.read_record(path)[1] for path in records(toy)]
        assert {(meta["config"]["a"], meta["seed"]) for meta in found} <= {(a, s) for a in (1, 2, 3) for s in range(seeds)}
        entries = index_of(core.read_logbook(toy.logbook)).count("](#toy-")
        assert seeds - 1 <= entries <= seeds
        if process.exitcode == 0:
            assert entries == seeds and len(found) == 3 * seeds
            seeds += 1
    assert seeds > 3
    whole = {path.name: core.read_record(path)[0] for path in records(toy)}
    for path in records(toy):
        path.unlink()
    assert toy.run("--seeds", str(seeds - 1), "--no-log") == 0
    for path in records(toy):
        result = core.read_record(path)[0]
        assert result["sum"] == whole[path.name]["sum"] and np.array_equal(result["curve"], whole[path.name]["curve"])


def test_finished_trials_are_not_run_again(toy, capsys):
    assert toy.run("--a", "1") == 0
    assert core.Runtime.checkpoint is None  # or a later call of a trial would keep things in this run's folder
    before = {path: path.stat().st_mtime_ns for path in records(toy)}
    assert toy.run("--a", "1", "2") == 0
    assert "10 trials, 5 of them finished before" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()) and len(records(toy)) == 10
    (kept := toy.path / "runs" / "model-0123456789abcdef.npz").touch()  # a trained model, which several scripts may use
    assert toy.run("--a", "1", "--seeds", "2") == 0 and kept.exists()
    assert toy.run("--a", "1", "--fresh") == 0 and not kept.exists()
    assert all(path.stat().st_mtime_ns != time for path, time in before.items())


def test_stacked_seeds_share_a_call_and_resume_one_by_one(toy, capsys):
    calls = []

    def stacked(config, seeds):
        calls.append(list(seeds))
        return [add(config, seed) for seed in seeds]

    assert toy.run("--a", "1", "2") == 0
    alone = {path.name: core.read_record(path)[0] for path in records(toy)}
    for path in records(toy)[1:4]:
        path.unlink()
    missing = {(config["a"], seed) for config in ({"a": 1}, {"a": 2}) for seed in range(5)}
    for path in records(toy):
        meta = core.read_record(path)[1]
        missing.remove((meta["config"]["a"], meta["seed"]))
    assert toy.run("--a", "1", "2", trial=stacked, stack=3) == 0
    assert f"10 trials, {10 - len(missing)} of them finished before" in capsys.readouterr().out
    assert sorted(seed for seeds in calls for seed in seeds) == sorted(seed for _, seed in missing)
    assert {path.name for path in records(toy)} == alone.keys()
    assert toy.run("--a", "1", "2", "--fresh", trial=stacked, stack=3) == 0
    assert calls[-4:] == [[0, 1, 2], [3, 4]] * 2
    for path in records(toy):
        again = core.read_record(path)[0]
        assert all(np.array_equal(again[key], value, equal_nan=np.ndim(value) == 0) for key, value in alone[path.name].items())


def test_the_number_of_seeds_is_the_experiments_own_unless_told(toy, capsys):
    assert toy.run("--a", "1", seeds=7) == 0
    assert "7 trials" in capsys.readouterr().out
    assert toy.run("--a", "1", "--seeds", "8", seeds=7) == 0
    assert "8 trials, 7 of them" in capsys.readouterr().out


def test_a_check_may_leave_seeds_out(toy):
    def some_dead(config, seed):
        return add(config, seed) | {"dead": float(seed in ((1, 3) if config["a"] == 1 else (4,)))}

    claim = Claim("larger", "1/1", [Check("sum", (0.5, math.inf), {"a": 2}, {"a": 1}, unless="dead"),
                                    Check("sum", (0.5, math.inf), {"a": 2}, unless="dead")])  # fmt: skip
    assert toy.run("--a", "1", "2", trial=some_dead, claims=[claim]) == 0
    text = toy.logbook.read_text()
    assert "n = 2, 4" in text and f"sum {core.mean_interval([2.0, 2.1, 2.2, 2.3])}" in text


def test_an_interrupt_keeps_what_is_finished(toy, capsys):
    assert toy.run("--a", "1", "--b", "x", "crash", "--seeds", "2") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(records(toy)) == 2 and not toy.logbook.exists()


def test_other_code_is_not_reused_unless_asked(toy, capsys):
    assert toy.run("--a", "1", "--seeds", "2") == 0
    toy.script.write_text(SCRIPT.replace("do not count", "still do not count").replace("nor do", "neither do"))
    assert toy.run("--a", "1", "--seeds", "2") == 0
    assert "2 of them finished before" in capsys.readouterr().out
    toy.script.write_text(SCRIPT.replace("+ seed", "- seed"))
    assert toy.run("--a", "1", "--seeds", "2", "--reuse") == 0
    assert "2 of them finished before" in capsys.readouterr().out
    assert "2 trials reused from other code" in toy.logbook.read_text()
    assert toy.run("--a", "1", "--seeds", "2") == 0
    assert "0 of them finished before" in capsys.readouterr().out


def test_rank_correlation_against_ranks_by_hand():
    assert core.rank_correlation([1, 5, 3], [10, 30, 20]) == pytest.approx(1.0)
    assert core.rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert core.rank_correlation([1, 1, 1], [1, 2, 3]) == 0.0


def test_interleaved_medians_take_turns():
    calls = []
    medians = core.interleaved_medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b") or time.sleep(0.01)}, 3)
    assert "".join(calls) == "ab" * 5 and medians["a"] < medians["b"] and medians["b"] >= 0.01


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("legend.frameon", "legend.fancybox", True),  # section 14
        ('LOGBOOK_TITLE = "# Logbook\\n"', 'LOGBOOK_TITLE = "# Book\\n"', True),  # section 15
        ("CHECKPOINT_SECONDS = 60.0", "CHECKPOINT_SECONDS = 61.0", False),  # section 10
        ("strip_words = 8192", "strip_words = 4096", False),  # section 17
        ('"""Replace a file wholly or not at all', '"""Exchange a file wholly or not at all', True),
    ],
)
def test_drawing_and_words_do_not_decide_a_trial(tmp_path, old, new, same):
    changed = SOURCE.replace(old, new)
    assert changed != SOURCE
    (tmp_path / "core.py").write_text(changed)
    assert (core.code_fingerprint(tmp_path / "core.py") == core.code_fingerprint(core.__file__)) == same


@pytest.mark.parametrize(
    ("line", "same"),
    [(f"def {name}(x): return #", same) for name, same in
     (("figures", True), ("headline", True), ("memory", True), ("trial", False), ("cell", False))]
    + [(f"{name} = [#]", same) for name, same in (("CLAIMS", True), ("SMOKE", True), ("METRICS", False), ("FLAGS", False))],
)  # fmt: skip
def test_what_a_script_draws_tells_or_claims_leaves_its_trials_valid(line, same, tmp_path):
    found = set()
    for number in "12":
        path = tmp_path / f"{number}.py"
        path.write_text(f"{line.replace('#', number)}\nOTHER, THIRD = 1, 2\n\n\ndef other(x):\n    return x\n")
        found.add(core.code_fingerprint(path))
    assert (len(found) == 1) == same


def test_a_record_is_exact_and_without_pickle(toy):
    assert toy.run("--a", "3", "--seeds", "1") == 0
    (path,) = records(toy)
    result, meta = core.read_record(path)
    assert (
        result["sum"] == 3.0
        and isinstance(result["count"], float)
        and result["curve"].tolist() == [0, 3, 6]
        and result["names"].tolist() == ["x", "y"]
    )
    assert meta["config"]["a"] == 3 and meta["seed"] == 0 and meta["environment"]["torch"] == torch.__version__
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "swapped", "pickle"])
def test_a_damaged_record_is_refused(toy, damage, capsys):
    assert toy.run("--a", "1", "--seeds", "2") == 0
    one, other = records(toy)
    whole, entries = one.read_bytes(), toy.logbook.read_bytes()
    hostile = np.array([Hostile()], dtype=object)
    {
        "cut": lambda: one.write_bytes(whole[: len(whole) // 2]),
        "empty": lambda: one.write_bytes(b""),
        "garbage": lambda: one.write_bytes(b"x" * 1000),
        "swapped": lambda: one.write_bytes(other.read_bytes()),
        "pickle": lambda: np.savez(one, meta=hostile),
    }[damage]()
    capsys.readouterr()
    assert toy.run("--a", "1", "--seeds", "2") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and one.name in error and "--fresh" in error
    assert toy.logbook.read_bytes() == entries and not Path("hostile-was-here").exists()
    assert toy.run("--a", "1", "--seeds", "2", "--fresh") == 0


BAD = [
    (["--a", "0"], "--a"), (["--a", "x"], "--a"), (["--a", "1.5"], "--a"), (["--a"], "--a"), (["--a", "1", "1"], "--a"),
    (["--a", "13"], "--a 13"), (["--b", "z"], "--b"), (["--a", "10", "--b", "y"], "--b"), (["--stack", "0,0"], "--stack"),
    (["--stack", "1,0"], "--stack"), (["--stack", "-1"], "--stack"), (["--stack", "a"], "--stack"), (["--stack", ""], "--stack"),
    (["--rate", "0"], "--rate"), (["--rate", "nan"], "--rate"), (["--rate", "inf"], "--rate"), (["--rate", "-1"], "--rate"),
    (["--seeds", "0"], "--seeds"), (["--seeds", "two"], "--seeds"), (["--first-seed", "-1"], "--first-seed"),
    (["--threads", "0"], "--threads"), (["--jobs", "0"], "--jobs"), (["--device", "tpu"], "--device"), (["--unknown"], "--unknown"),
    (["--see", "2"], "--see"), (["stray"], "stray"), (["--no-log", "--note", "x"], "--no-log"), (["--fresh", "--reuse"], "--fresh"),
    (["--runs", "/dev/null/runs"], "--runs"), (["--plots", "/dev/null/plots"], "--plots"), (["--plots", "/proc"], "--plots"),
    (["--logbook", "/proc/logbook.md"], "--logbook"), (["--logbook", "/dev/null/x/logbook.md"], "--logbook"),
    (["--logbook", "/"], "--logbook"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "named"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(toy, argv, named, capsys):
    assert toy.run(*argv) == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and named in error and not out
    assert not toy.logbook.exists() and not records(toy)


def test_a_missing_gpu_is_one_line(toy, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert toy.run("--device", "cuda") == 2
    assert "--device cuda: torch sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "# Logbook\n", "# My diary\n" + core.INDEX_START + core.INDEX_END, core.INDEX_START * 2])
def test_a_foreign_logbook_is_left_alone(toy, content, capsys):
    toy.logbook.write_text(content)
    assert toy.run() == 2
    assert "--logbook" in capsys.readouterr().err and toy.logbook.read_text() == content and not records(toy)


def test_a_read_only_logbook_is_refused(toy, monkeypatch, capsys):
    assert toy.run("--a", "1") == 0
    before = toy.logbook.read_bytes()
    monkeypatch.setattr(core.os, "access", lambda path, mode: mode != os.W_OK)
    assert toy.run("--a", "2") == 2
    assert "read-only" in capsys.readouterr().err and toy.logbook.read_bytes() == before and len(records(toy)) == 5


def test_diverged_trials_are_counted_and_judged_inconclusive(toy):
    def diverge(config, seed):
        return add(config, seed) | ({"diverged": 1.0, "sum": math.nan} if config["a"] == 2 and seed < 2 else {})

    assert toy.run(trial=diverge) == 0
    text = toy.logbook.read_text()
    assert "| a 2 (2 of 5 diverged) |" in text and "2 of 15 trials diverged" in text
    assert "| two is more than one · 1/1 | **inconclusive** |" in text and "| three is less than one · 1/1 | **refuted** |" in text


def test_smoke_touches_neither_logbook_nor_plots(toy, capsys):
    assert toy.run("--smoke") == 0
    assert not toy.logbook.exists() and not (toy.path / "plots").exists()
    assert "--smoke" in capsys.readouterr().out


def test_no_log_prints_the_entry(toy, capsys):
    assert toy.run("--no-log") == 0
    assert "two is more than one" in capsys.readouterr().out and not toy.logbook.exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_ends_in_one_line_and_loses_nothing(toy, call, monkeypatch, capsys):
    assert toy.run("--a", "1", "--seeds", "2") == 0
    kept, text = records(toy), toy.logbook.read_bytes()
    capsys.readouterr()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(core.os, call, full)
    assert toy.run("--a", "1", "2", "--seeds", "2") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device" in error and str(toy.path) in error
    assert records(toy) == kept and toy.logbook.read_bytes() == text
    assert not list(toy.path.rglob("*.tmp"))
    monkeypatch.undo()
    assert toy.run("--a", "1", "2", "--seeds", "2") == 0


def index_of(text):
    return text.partition("## Entries\n")[2].partition(core.INDEX_END)[0]


def append_under_limit(logbook, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        core.append_entry(logbook, entry("large " * 10_000), "x-1")
    except OSError:
        raise SystemExit(7) from None


def entry(title="t"):
    return f"## 2026-01-01 · toy · {title}\n\nEntry: none. Question: none?\n\n| c · s | **reproduced** | 1 |\n"


def test_a_write_that_the_system_cuts_leaves_the_logbook_whole(tmp_path):
    logbook = tmp_path / "logbook.md"
    core.append_entry(logbook, entry(), "toy-1")
    before = logbook.read_bytes()
    child = multiprocessing.get_context("fork").Process(target=append_under_limit, args=(logbook, len(before) + 100))
    child.start()
    child.join()
    assert child.exitcode == 7 and logbook.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["logbook.md"]


def append_many(logbook, writer, count):
    for i in range(count):
        core.append_entry(logbook, entry(f"writer {writer} entry {i}"), f"toy-{i}")


def test_sixteen_processes_append_at_once_and_lose_nothing(tmp_path):
    logbook = tmp_path / "logbook.md"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=append_many, args=(logbook, writer, 50)) for writer in range(16)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    text = logbook.read_text()
    found = re.findall(r"^## .*writer (\d+) entry (\d+)$", text, re.MULTILINE)
    assert sorted(found) == sorted((str(w), str(i)) for w in range(16) for i in range(50))
    for w in range(16):  # each writer's entries stand in its own order
        assert [i for writer, i in found if writer == str(w)] == [str(i) for i in range(50)]
    anchors = re.findall(r'^<a id="([^"]+)">', text, re.MULTILINE)
    assert len(set(anchors)) == 800 and re.findall(r"^\|.*\]\(#(toy-.*?)\)", index_of(text), re.MULTILINE) == anchors
    assert core.read_logbook(logbook) == text


def test_old_entries_are_never_edited(tmp_path):
    logbook = tmp_path / "logbook.md"
    core.append_entry(logbook, entry("first"), "toy-1")
    by_hand = logbook.read_text().replace("# Logbook\n", "# Logbook\n\nWhat stands here is kept.\n")
    logbook.write_text(by_hand)
    tail = by_hand.partition(core.INDEX_END)[2]
    core.append_entry(logbook, entry("second"), "toy-2")
    text = logbook.read_text()
    assert text.startswith("# Logbook\n\nWhat stands here is kept.\n")
    assert text.partition(core.INDEX_END)[2].startswith(tail) and index_of(text).count("](#toy-") == 2


def test_claims_stand_in_the_notebooks_order_with_every_verdict_that_another_followed(tmp_path):
    logbook = tmp_path / "logbook.md"

    def append(notebook, *rows, name="toy", anchor="a"):
        table = "".join(f"| {text} · {source} | **{verdict}** | 1 · 2 |\n" for text, source, verdict in rows)
        core.append_entry(logbook, f"## 2026-01-01 · {name} · t\n\nEntry: {notebook}, x: y. Question: none?\n\n{table}", anchor)

    late, early, own = ("b · c (our question)", "13/3, 6/3"), ("a", "6/3"), ("mine", "1/1")
    append("graph notebook", (*late, "reproduced"), (*early, "not tested"), anchor="one")
    append("graph notebook", (*late, "inconclusive"), (*early, "refuted"), anchor="two")
    append("graph notebook", (*late, "inconclusive"), (*early, "not tested"), anchor="three")
    append("graph notebook", (*early, "reproduced"), name="other", anchor="four")
    append("logic journal", ("d", "plain", "not tested"), anchor="five")
    append("my notebook", (*own, "reproduced"), anchor="six")
    claims = logbook.read_text().partition("## Claims\n")[2].partition("## Entries\n")[0]
    assert re.findall(r"<summary>(.+)</summary>", claims) == [
        "Graph notebook. 2 statements: 1 reproduced, 1 refuted; 1 questions of ours: 1 inconclusive",
        "Logic journal. 1 statements: 1 not tested", "My notebook. 1 statements: 1 reproduced"]  # fmt: skip
    assert [line for line in claims.splitlines() if line.startswith("| ") and "section" not in line] == [
        "| 6/3 | a | [refuted](#two) | toy |", "| 6/3 | a | [reproduced](#four) | other |",
        "| 13/3, 6/3 | b · c (our question) | [reproduced](#one), then [inconclusive](#three) | toy |",
        "| plain | d | not tested | toy |",
        "| 1/1 | mine | [reproduced](#six) | toy |"]  # fmt: skip


def test_ranks_share_trials_without_overlap():
    one, two = core.Ranks(), core.Ranks()
    one.store = two.store = torch.distributed.HashStore()
    taken, other = [], two.claim(5)
    for number in one.claim(5):
        taken.append(number)
        taken.extend(itertools.islice(other, 1))
    assert sorted([*taken, *other]) == [0, 1, 2, 3, 4]
    assert list(core.Ranks().claim(3)) == [0, 1, 2]


def test_a_grid_holds_each_cell_once(toy, capsys):
    assert toy.run("--a", "1", "10", "--b", "x", "y", "--seeds", "1") == 0  # b plays no part from a = 10 on
    assert "toy: 3 trials" in capsys.readouterr().out and toy.logbook.read_text().count("| a 10 |") == 1


def test_device_and_threads_are_part_of_a_trial():
    keys = {core.trial_key({"a": 1}, 0), core.trial_key({"a": 1}, 1), core.trial_key({"a": 2}, 0)}
    core.Runtime.threads = 2
    assert len(keys | {core.trial_key({"a": 1}, 0)}) == 4


def test_help_tells_what_would_refute(toy, capsys):
    with pytest.raises(SystemExit):
        toy.run("--help")
    out = capsys.readouterr().out
    assert "Does it add up?" in out and "default 1 2 3" in out and "--note" in out


def test_cells_are_named_by_what_varies():
    cells = [{"model": "p", "lr": 1e-4, "s": (0, 1)}, {"model": "p", "lr": 1e-5, "s": (0, 1)}, {"model": "gin", "lr": 1e-4}]
    keys = core.varying(cells)
    assert keys == ["model", "lr"]
    assert [core.cell_name(cell, keys) for cell in cells] == ["p, lr 0.0001", "p, lr 1e-05", "gin, lr 0.0001"]
    assert core.cell_name({"model": "p", "activation": "sigmoid"}, ["model", "activation"]) == "sigmoid"
    assert core.cell_name({"s": (0, 1), "norm_mask": "on"}, ["s", "norm_mask"]) == "s 0,1, norm mask on"


def test_every_column_of_panels_has_its_axis():
    cells = [{"a": a} for a in range(5)]  # three columns: the last row leaves one out
    run = core.Run(cells, [0], [[{"curve": np.arange(3.0)}] for _ in cells], 0.0, 0)
    drawn = core.curves_figure(run, "k", "f", lambda cell, result: {"gin": result["curve"] + cell["a"]}, ["a"], "epoch", "y")
    shown = [axes for axes in drawn.figure.axes if axes.get_visible()]
    assert [axes.get_xlabel() for axes in shown] == ["", "", "epoch", "epoch", "epoch"]
    assert [axes.xaxis.get_tick_params()["labelbottom"] for axes in shown] == [False, False, True, True, True]
    assert drawn.columns["a 4 | gin | seed 0"].tolist() == [4, 5, 6] and len(drawn.columns) == 5


def test_curves_may_end_at_steps_of_their_own_and_their_mean_ends_with_the_first(tmp_path):
    results = [{"curve": np.arange(3.0 + seed)} for seed in range(3)]
    run = core.Run([{"a": 1}], [0, 1, 2], [results], 0.0, 0)
    drawn = core.curves_figure(run, "k", "f", lambda cell, result: {"gin": result["curve"] * 2}, ["a"], "x", "y")
    *seeds, mean = drawn.figure.axes[0].lines
    assert [np.isfinite(line.get_ydata()).sum() for line in (*seeds, mean)] == [3, 4, 5, 3]
    np.testing.assert_array_equal(mean.get_ydata()[:3], [0, 2, 4])
    core.save_columns(drawn.columns, tmp_path / "drawn")
    assert (tmp_path / "drawn.csv").read_text().splitlines()[-1] == ",,8"
    core.pyplot().close(drawn.figure)


def test_loss_figure_cuts_what_blew_up_and_draws_the_best_losses():
    cells = [{"gates": gates, "alive": 0.5, "lr": lr} for gates in ("four", "full") for lr in (0.1, 0.01)]
    results = [[{"curve": np.array([0.25, 0.2 - cell["lr"], 9.0])}] for cell in cells]
    drawn = core.loss_figure(core.Run(cells, [3], results, 0.0, 0), "f", "gates", 10)
    assert drawn.columns["gates full, lr 0.1 | full | seed 3"].tolist() == [0.25, 0.1, 0.35]
    assert len(drawn.columns) == 4
    assert [axes.get_title() for axes in drawn.figure.axes] == ["lr 0.1", "lr 0.01"]
    lines = {line.get_label(): np.unique(line.get_ydata()) for line in drawn.figure.axes[0].get_lines()}
    assert {name: pytest.approx(lines[name]) for name in core.best_losses(0.5)} == core.best_losses(0.5)
    two = [cell | {"alive": alive} for cell, alive in zip(cells, (0.5, 0.5, 0.254, 0.254), strict=True)]
    drawn = core.loss_figure(core.Run(two, [3], results, 0.0, 0), "f", "gates", 10)
    assert "the mean" not in drawn.figure.axes[0].get_legend_handles_labels()[1]  # each panel would need its own
    assert drawn.figure.axes[0].get_lines()[0].get_xdata().tolist() == [0, 10, 20]


def test_sweep_figure_draws_every_seed_of_every_arm():
    cells = [{"x": x, "a": a, "p": p} for x, a, p in itertools.product((4, 2), "uv", (0, 1))]
    run = core.Run(cells, [0, 7], [[{"m": cell["x"] + seed, "k": seed} for seed in (0, 7)] for cell in cells], 0.0, 0)
    drawn = core.sweep_figure(run, "k", "f", "x", ["m", "k"], "y", ["p"], log="x", lines={"limit": 1.0})
    assert drawn.columns["p 0 | a u, m | seed 7"] == (9, 11) and drawn.columns["p 1 | a v, k | x"] == (2, 4)
    assert len(drawn.columns) == 2 * 2 * 2 * 3
    axes = drawn.figure.axes
    assert [one.get_title() for one in axes] == ["p 0", "p 1"] and {one.get_xscale() for one in axes} == {"log"}
    lines = {line.get_label(): line for line in axes[0].get_lines() if not line.get_label().startswith("_")}
    assert lines.keys() == {"a u, m", "a u, k", "a v, m", "a v, k", "limit"}
    assert lines["a u, m"].get_ydata().tolist() == [5.5, 7.5] and lines["a u, m"].get_color() == lines["a u, k"].get_color()
    assert lines["a u, m"].get_color() != lines["a v, m"].get_color()
    core.pyplot().close(drawn.figure)


def test_texts_of_a_figure_lie_beside_it_and_are_linked(toy):
    def with_texts(run):
        return [figure._replace(texts=[(".v", "one\n"), (".py", "two\n")]) for figure in draw(run)]

    assert toy.run("--a", "1", figures=with_texts) == 0
    (link, other) = re.findall(r"\[toy-curve-\w+\.\w+\]\((\S+)\)", toy.logbook.read_text())
    assert (toy.path / link).read_text() == "one\n" and (toy.path / other).read_text() == "two\n"
    assert link.endswith(".v") and (toy.path / link).with_suffix(".png").exists()


def test_curves_may_bear_another_name_in_each_seed_and_have_levels_and_steps():
    results = [{"curve": np.arange(4.0) + seed, "dead": seed == 1} for seed in range(3)]
    run = core.Run([{"a": 1}], [0, 1, 2], [results], 0.0, 0)
    lines = lambda cell, result: {"dead" if result["dead"] else "alive": result["curve"]}  # noqa: E731
    figure = core.curves_figure(run, "k", "finding", lines, ["a"], "x", "y", every=10, levels={"the mean": 2.5})
    (axes,) = figure.figure.axes
    drawn = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(drawn["alive"].get_ydata(), np.arange(4.0) + 1)  # mean of seeds 0 and 2
    np.testing.assert_array_equal(drawn["dead"].get_ydata(), np.arange(4.0) + 1)
    np.testing.assert_array_equal(drawn["alive"].get_xdata(), [0, 10, 20, 30])
    assert drawn["the mean"].get_ydata()[0] == 2.5 and len(axes.lines) == 3 + 2 + 1
    assert sorted(figure.columns) == [
        f"as in the command | {name} | seed {seed}" for name, seed in (("alive", 0), ("alive", 2), ("dead", 1))
    ]


def test_a_circuit_is_drawn_with_every_gate_and_cell():
    figure = core.circuit_figure(full_adder_life(), "circuit", "finding", [(".v", "text")])
    shown = [text.get_text() for text in figure.figure.axes[0].texts]
    assert sorted(name for name in shown if name.startswith("x")) == [f"x{cell}" for cell in range(9)]
    assert len(shown) == 9 + 1 + len(full_adder_life().gates) and figure.texts == [(".v", "text")]
    assert {name for name in shown if name.isupper()} == {"AND", "OR", "XOR"}


# text


def documents(rng, count=60):
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(300)]
    return ["\n\n".join(" ".join(rng.choice(words, 30)) for _ in range(rng.integers(1, 6))) for _ in range(count)]


def test_a_split_text_shares_no_passage():
    rng = np.random.default_rng(0)
    texts = documents(rng)
    texts[3] += "\n\n" + texts[2]  # a paragraph again in another training text
    texts[-1] += "\n\n" + texts[0] + "\n\n" + "new words here " + texts[1].split("\n\n")[0][:90]  # held out, but copied
    train, held_out = core.split_text(texts)
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", train + "\n\n" + held_out)]
    assert len(set(paragraphs)) == len(paragraphs)

    def passages(text):
        listed = text.split()
        return {tuple(listed[i : i + core.PASSAGE_WORDS]) for i in range(len(listed) - core.PASSAGE_WORDS + 1)}

    for document in texts[:50]:  # by document: what is trained on is trained on wholly
        assert all(p in train for p in document.split("\n\n"))
    kept = {paragraph for document in texts[-8:] for paragraph in document.split("\n\n")}
    assert all(p in kept for p in re.split(r"\n\n+", held_out))
    shared = [
        set.intersection(*(passages(p) for p in pair)) for pair in itertools.product(train.split("\n\n"), held_out.split("\n\n"))
    ]
    assert not any(shared) and len(held_out) > 0.04 * len(train)
    assert "new words here" not in held_out and texts[-1].split("\n\n")[0] in held_out


def test_the_librarys_text_is_kept_and_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "REPOSITORY", tmp_path)
    calls = []
    monkeypatch.setattr(core, "library_documents", lambda: calls.append(1) or documents(np.random.default_rng(1), 200))
    load = core.load_text.__wrapped__
    first = load("library")
    again = load("library")
    assert len(calls) == 1 and first.sha256 == again.sha256 and (first.held_out == again.held_out).all()
    (kept,) = (tmp_path / "runs").iterdir()
    content = kept.read_bytes()
    turned = content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 64]) + content[len(content) // 2 + 1 :]
    for damage in (content[:-40], turned, b"[]", b"\xff"):
        kept.write_bytes(damage)
        assert load("library").sha256 == first.sha256
    assert len(calls) == 5
    monkeypatch.setattr(core, "code_fingerprint", lambda *_: "other")
    assert load("library").sha256 == first.sha256 and len(calls) == 6 and len(list((tmp_path / "runs").iterdir())) == 2


def test_the_standard_library_speaks_english():
    text = core.load_text("library")
    train = text.train.tobytes().decode()
    assert len(text.train) > 5e5 and 0.03 < len(text.held_out) / len(text.train) < 0.2 and train.count(" the ") > 3000
    assert re.search("lambda", train) and text.sha256 == core.load_text.__wrapped__("library").sha256


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), (b"\xff\xfe\x00", "not a UTF-8"), (b"a\0b" * 9000, "not a UTF-8"), (b"short", "too short"),
     (b"the same paragraph\n\n" * 9000, "too short")],
)  # fmt: skip
def test_a_text_that_cannot_be_used_is_named(content, said, tmp_path):
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(core.UsageError, match=rf"--text .*own\.txt: .*{said}"):
        core.load_text.__wrapped__(str(path))
    with pytest.raises(core.UsageError, match="--text"):
        core.load_text.__wrapped__(str(tmp_path))


def test_an_own_text_is_split_by_paragraphs_or_lines(tmp_path):
    paragraphs = [p for document in documents(np.random.default_rng(2), 300) for p in document.split("\n\n")]
    for joint in ("\n\n", "\n"):
        path = tmp_path / "own.txt"
        path.write_text(joint.join(paragraphs) + "é")
        text = core.load_text.__wrapped__(str(path))
        assert text.train.tobytes().decode().startswith(paragraphs[0]) and text.held_out.tobytes().decode().endswith("é")


# language models

LANGUAGE = {flag.key: flag.default[0] for flag in core.LANGUAGE_FLAGS} | {"dim": 12, "heads": 2, "length": 7, "layers": 1}
CASES = [
    {"attn_activ": activ} | options
    for activ in ("softmax", "sigmoid", "tanh", "none")
    for options in (
        {}, {"qk_norm": "fro_norm"}, {"qk_norm": "rms_norm", "qk_activ": "gelu"}, {"qk_activ": "gelu"},
        {"post_attn_norm": "rms_norm"}, {"position": "rotary"}, {"position": "none", "qk_norm": "fro_norm"},
        {"logit_scale": "high-learned", "qk_norm": "fro_norm"}, {"logit_scale": "root-learned"}, {"logit_scale": "high"},
        {"bug": "norm-dim", "qk_norm": "fro_norm"}, {"bug": "norm-dim", "qk_norm": "rms_norm", "post_attn_norm": "rms_norm"},
        {"bug": "no-position"}, {"logit_bias": "length"}, {"logit_bias": "row", "position": "rotary"},
    )
]  # fmt: skip


def language_options(**changes):
    return {"logit_bias": "none"} | core.language_cell(LANGUAGE | changes)


def attention_reference(layer, x, b, t):
    """The definition, a query and a key at a time, in float64."""
    o, heads = layer.options, layer.heads
    width = x.shape[1] // heads
    weight = {name: parameter.detach().double().numpy() for name, parameter in layer.named_parameters()}
    every = x.detach().double().numpy() @ weight["inputs.weight"].T + weight["inputs.bias"]
    query, key, gate, value = np.split(every, 4, 1)
    gelu = lambda x: x * stats.norm.cdf(x)  # noqa: E731
    value = gelu(gate) * value
    query, key, value = (part.reshape(b, t, heads, width) for part in (query, key, value))

    def norm(part, kind):
        if kind == "none":
            return part
        axis = None if o["bug"] == "norm-dim" else -1
        size = np.sqrt((part**2).sum(axis, keepdims=True))
        return part / size if kind == "fro_norm" else part / size * np.sqrt(part.size if axis is None else width)

    def turned(vector, at):
        out = vector.copy()
        for i in range(width // 2):
            angle = at / 10000 ** (2 * i / width)
            pair = complex(vector[i], vector[i + width // 2]) * np.exp(1j * angle)
            out[i], out[i + width // 2] = pair.real, pair.imag
        return out

    query, key = (norm(gelu(part) if o["qk_activ"] == "gelu" else part, o["qk_norm"]) for part in (query, key))
    mixed = np.zeros((b, t, heads, width))
    for s, h, i in np.ndindex(b, heads, t):
        scale = math.log2(o["length"] ** 2 - o["length"]) if "high" in o["logit_scale"] else width**-0.5
        past = range(t if o["bug"] == "no-position" and o["attn_activ"] in ("tanh", "none") else i + 1)
        logits = []
        for j in past:
            one, other = query[s, i, h], key[s, j, h]
            if o["position"] == "rotary":
                one, other = turned(one, i), turned(other, j)
            logit = one @ other * scale
            if o["position"] == "linear" and o["bug"] != "no-position":
                logit += np.log1p(np.exp(weight["slope"][h])) * (j - i)
            logits.append(logit)
        logits = np.array(logits)
        logits = logits - {"none": 0, "length": np.log(o["length"]), "row": np.log(i + 1)}[o["logit_bias"]]
        kind = o["attn_activ"]
        if kind == "softmax":
            weights = np.exp(logits) / np.exp(logits).sum()
        else:
            weights = {"sigmoid": lambda x: 1 / (1 + np.exp(-x)), "tanh": np.tanh, "none": lambda x: x}[kind](logits)
        mixed[s, i, h] = weights @ value[s, past, h]
    return norm(mixed, o["post_attn_norm"]).reshape(b * t, -1) @ weight["out.weight"].T + weight["out.bias"]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_causal_attention_is_its_definition(changes):
    options = language_options(**changes)
    torch.manual_seed(0)
    layer, x = core.CausalAttention(options), torch.randn(3 * 7, 12) * 2
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)) if parameter.dim() > 1 else None
    if layer.slope is not None:
        torch.nn.init.normal_(layer.slope)
    expected = attention_reference(layer, x, 3, 7)
    np.testing.assert_allclose(layer(x, (3, 7)).detach(), expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("position", ["linear", "rotary", "none"])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": "fro_norm", "logit_scale": "high-learned"}, {"qk_norm": "rms_norm"}], ids=str)
def test_fused_attention_is_the_plain_one(position, changes):
    options = language_options(position=position, length=200, **changes)
    torch.manual_seed(0)
    layer, x = core.CausalAttention(options), torch.randn(2 * 200, 12, requires_grad=True)
    assert layer.fused
    found = []
    for layer.fused in (True, False):
        out = layer(x, (2, 200))
        found.append([out, *gradients(out, x, *layer.parameters())])
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4 * plain.detach().abs().max().item())
    assert not core.CausalAttention(language_options(attn_activ="sigmoid")).fused


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_no_prediction_sees_what_follows(changes):
    options = language_options(**changes)
    with core.initialised_from(3):
        model = core.LanguageModel(options)
    tokens = torch.arange(14).view(2, 7) * 17 % 256
    changed = tokens.clone()
    changed[0, 4:] = (changed[0, 4:] + 31) % 256
    one, two = (model(each).view(2, 7, 256) for each in (tokens, changed))
    leaks = options["bug"] != "none"
    assert (not torch.equal(one[0, :4], two[0, :4])) == leaks and not torch.equal(one[0, 4:], two[0, 4:])
    seen = torch.autograd.grad(one[0, 2].square().sum(), model.embed.weight)[0].abs().sum(1) > 0
    later, earlier = tokens[0, 3:], tokens[0, :3]
    assert seen[earlier].all() and bool(seen[later].any()) == leaks
    other_row = not torch.equal(one[1], two[1])  # only a norm over the whole tensor couples the sequences of a batch
    assert other_row == (options["bug"] == "norm-dim")


def test_a_bug_without_effect_is_none():
    assert language_options(bug="norm-dim")["bug"] == language_options(bug="no-position")["bug"] == "none"
    assert language_options(bug="norm-dim", post_attn_norm="rms_norm")["bug"] == "norm-dim"
    assert language_options(bug="no-position", attn_activ="tanh")["bug"] == "no-position"
    assert "logit_bias" not in core.language_cell(LANGUAGE) and "logit_bias" in core.language_cell(
        LANGUAGE | {"attn_activ": "sigmoid"}
    )


def test_rotary_logits_depend_on_the_distance_alone():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2))
    turned = [core.rotated(x.expand(1, 1, 9, 8)) for x in (query, key)]
    logits = (turned[0] @ turned[1].mT)[0, 0]
    for distance in range(-8, 9):
        torch.testing.assert_close(logits.diagonal(distance), logits.diagonal(distance)[:1].expand(9 - abs(distance)))
    torch.testing.assert_close(turned[0].norm(dim=-1), query.norm().expand(1, 1, 9))
    assert logits.diagonal(1)[0] != logits.diagonal(-1)[0]


def test_the_notebooks_initial_weights():
    options = language_options(dim=64, heads=4, layers=3, init="notebook")
    with core.initialised_from(0):
        model = core.LanguageModel(options)
    for layer in model.layers:
        parts = {layer.mixing.inputs: 0.25 / 8, layer.feedforward.first: 0.25 / 8,
                 layer.mixing.out: 0.5 / 3 / 8, layer.feedforward.last: 0.5 / 3 / 16}  # fmt: skip
        for part, spread in parts.items():
            assert abs(part.weight.std().item() / spread - 1) < 0.05 and not part.bias.any()


def test_training_on_text_is_plain_adamw(monkeypatch):
    """The loop against torch.optim's AdamW written out, and what it reports against its own curves."""
    config = language_options(length=16, batch=4, steps=20, dim=8, lr=1e-2)
    result = core.train_on_text(config, 5)
    text, rng = core.load_text("library"), core.stream(5, "order")
    with core.initialised_from(5):
        model = core.LanguageModel(config)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.01},
         {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}], betas=(0.9, 0.95))  # fmt: skip
    losses, norms = [], []
    for step in range(20):
        starts = rng.integers(len(text.train) - 16, size=4)
        rows = torch.tensor(np.stack([text.train[s : s + 17] for s in starts]).astype(np.int64))
        loss = F.cross_entropy(model(rows[:, :-1]).view(4, 16, 256).mT, rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
        for group in optimizer.param_groups:
            group["lr"] = (0.5e-2, 1e-2)[step > 0]  # a tenth of the steps is two
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(result["train_loss"], losses, rtol=1e-4)
    np.testing.assert_allclose(result["gradient_curve"], norms, rtol=1e-3)
    starts = np.linspace(0, len(text.held_out) - 17, core.HELD_OUT_WINDOWS).astype(int)
    rows = torch.tensor(np.stack([text.held_out[s : s + 17] for s in starts]).astype(np.int64))
    with torch.no_grad():
        expected = F.cross_entropy(model(rows[:, :-1]).view(-1, 16, 256).mT, rows[:, 1:]).item()
    assert abs(result["loss"] - expected) < 1e-3 and math.isclose(result["bits"], result["loss"] / math.log(2))
    assert result["steps"] == 20 and result["tokens"] == 20 * 4 * 16 and result["at"].tolist() == [*range(0, 21, 2)]
    assert math.isnan(result["diverged"]) and result["loss"] == pytest.approx(result["curve"][-1])


def test_micro_batches_are_one_large_batch():
    class Two:
        def __init__(self, config, model):
            self.left = 3

        def next(self):
            self.left -= 1
            return (8, 2) if self.left >= 0 else (0, 0)

        def seen(self, norm):
            pass

    class One(Two):
        def next(self):
            return super().next()[0], 1 if self.left >= 0 else 0

    config = language_options(length=8, batch=2, steps=10, dim=8)
    halves, whole = core.train_on_text(config, 1, Two), core.train_on_text(config | {"batch": 4}, 1, One)
    np.testing.assert_allclose(halves["gradient_curve"], whole["gradient_curve"], rtol=1e-4)
    np.testing.assert_allclose(halves["train_loss"], whole["train_loss"], rtol=1e-4)
    assert halves["tokens"] == whole["tokens"] == 3 * 32 and halves["steps"] == 3


def test_a_language_model_that_diverges_is_a_result():
    result = core.train_on_text(language_options(length=8, batch=2, steps=10, dim=8, lr=1e30), 0)
    assert result["diverged"] >= 1 and not math.isfinite(result["loss"])


# graph questions

QUESTION = {flag.key: flag.default[0] for flag in core.QUESTION_FLAGS}
TINY = QUESTION | {"dim": 8, "heads": 2, "depth": 2, "hops": (1, 2), "steps": 12, "batch": 6}
WORLDS = [
    *((hops, {}) for hops in (1, 2, 3)), (2, {"restated": 7, "passages": 5}),
    (1, {"entities": 2, "candidates": 2, "facts": 4, "passages": 3}),
    (3, {"entities": 5, "facts": 15, "candidates": 5, "names": 5, "passages": 4, "restated": 15}),
]  # fmt: skip
HAND_WRITTEN = {
    "start": "New York", "relations": ["twin of", "mayor"], "answer": "Ann Lee", "candidates": ["Ann Lee", "Bob"],
    "entities": ["New York City"],
    "passages": ["New York City is the twin of new york. Is it?", "The mayor of New-York City, Bob, met ANN LEE! Leeds slept."],
}  # fmt: skip


def drawn(count=3, hops=2, seed=0, **world):
    return core.draw_questions(np.random.default_rng(seed), count, hops, QUESTION | world)


def words_by_node(questions):
    """{node: {slot: its words, sorted}}."""
    found = [{} for _ in questions.kind]
    for word, node, slot in sorted(zip(questions.word, questions.node, questions.slot, strict=True)):
        found[node].setdefault(slot, []).append(int(word))
    return found


def read_back(questions):
    """What each question says, from words alone: its nodes, the query's words, a name for each entity, and the sentences, each
    (subject, relation, object, passage, step)."""
    words, said = words_by_node(questions), []
    for q in range(len(questions.hops)):
        nodes = np.nonzero(questions.question == q)[0]
        mentions = nodes[np.isin(questions.kind[nodes], (core.SUBJECT, core.OBJECT))]
        sentences = []
        for number in np.unique(questions.sentence[mentions]):
            subject, heard = sorted(mentions[questions.sentence[mentions] == number], key=lambda n: questions.kind[n])
            assert words[subject][1] == words[heard][1] and questions.passage[subject] == questions.passage[heard]
            assert (questions.kind[[subject, heard]] == (core.SUBJECT, core.OBJECT)).all()
            assert questions.step[subject] == questions.step[heard]
            (one,), (relation,), (other,) = words[subject][0], words[subject][1], words[heard][0]
            sentences.append((one, relation, other, int(questions.passage[subject]), int(questions.step[subject])))
        query = [words[nodes[0]][slot][0] for slot in range(1 + questions.hops[q])]
        named = {int(n): words[n][0][0] for n in nodes if questions.kind[n] in (core.ENTITY, core.CANDIDATE)}
        said.append((nodes, query, named, sentences))
    return said


def every_chain(facts, hops):
    """All (relations, entities on the way) of different relations that meet no entity twice, step by step."""
    found = [((), (start,)) for start in {fact[0] for fact in facts}]
    for _ in range(hops):
        found = [
            ((*relations, relation), (*path, other))
            for relations, path in found
            for one, relation, other in facts
            if one == path[-1] and relation not in relations and other not in path
        ]
    return found


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_chains_are_all_there_are(hops):
    rng = np.random.default_rng(hops)
    objects = rng.integers(-1, 4, (20, 4, 3))  # facts about oneself, too
    path, found, lists = core.chains(objects, hops)
    assert sorted(map(tuple, lists)) == sorted(itertools.permutations(range(3), hops))
    for q in range(20):
        facts = {(e, r, int(objects[q, e, r])) for e, r in np.ndindex(4, 3) if objects[q, e, r] >= 0}
        seen = [(tuple(lists[c]), tuple(path[:, q, e, c])) for e, c in zip(*np.nonzero(found[q]), strict=True)]
        assert sorted(seen) == sorted(every_chain(facts, hops)) and all(path[0, q, e, 0] == e for e in range(4))
    assert found.any() and not found.all()


@pytest.mark.parametrize(("hops", "changes"), WORLDS, ids=str)
def test_a_drawn_question_has_one_answer_and_honest_chances(hops, changes):
    world, questions = QUESTION | changes, drawn(40, hops, **changes)
    words, told = words_by_node(questions), read_back(questions)
    repeats = [len({sentence[:3] for sentence in sentences[: world["facts"]]}) < world["facts"] for *_, sentences in told]
    assert any(repeats) == (world["restated"] > 0)  # what is told twice does not stand at the end
    for q, (nodes, query, named, sentences) in enumerate(told):
        assert questions.kind[nodes[0]] == core.QUERY and np.array_equal(nodes, np.arange(nodes[0], nodes[0] + len(nodes)))
        facts = {sentence[:3] for sentence in sentences}
        times = sorted(sum(sentence[:3] == fact for sentence in sentences) for fact in facts)
        assert times == [1] * (world["facts"] - world["restated"]) + [2] * world["restated"]
        assert len({fact[:2] for fact in facts}) == world["facts"] and all(one != other for one, _, other in facts)
        chains = every_chain(facts, hops)
        start, answer = named[questions.start[q]], named[questions.answer[q]]
        (path,) = (path for relations, path in chains if relations == tuple(query[1:]) and path[0] == query[0])
        assert path[0] == start and path[-1] == answer
        candidates = [named[n] for n in nodes if questions.kind[n] == core.CANDIDATE]
        assert len(candidates) == world["candidates"] and answer in candidates
        for chance, known in ((questions.floor, chains), (questions.no_start, [c for c in chains if c[0] == tuple(query[1:])])):
            ends = [path[-1] for _, path in known if path[-1] in candidates]
            assert math.isclose(chance[q], max(map(ends.count, ends)) / len(ends))
        for one, relation, other, _, step in sentences:
            gold = [i + 1 for i in range(hops) if (one, relation, other) == (path[i], query[1 + i], path[i + 1])]
            assert [step] == (gold or [0])
        passages = [n for n in nodes if questions.kind[n] == core.PASSAGE]
        inside = {n: [sentence for sentence in sentences if sentence[3] == n] for n in passages}
        assert len(passages) == world["passages"] and max(map(len, inside.values())) <= min(map(len, inside.values())) + 1
        assert changes or any(all(sentence[4] == 0 for sentence in some) for some in inside.values())
        assert all(words[n] == {core.SLOTS - 1: sorted(w for s in inside[n] for w in s[:3])} for n in passages)
        assert set(words[nodes[0]]) == set(range(1 + hops)) and len(set(named.values())) == len(named) == world["entities"]
        assert all(1 < name < 2 + world["names"] for name in named.values())
        assert all(2 + world["names"] <= relation < 2 + world["names"] + world["relations"] for _, relation, _ in facts)
        for n in nodes[1:]:  # a mention belongs to the entity of its name
            mention = questions.kind[n] in (core.SUBJECT, core.OBJECT)
            assert words[n][0] == [named[questions.entity[n]]] if mention else n in (questions.passage[n], questions.entity[n])
    again, other = drawn(40, hops, **changes), drawn(40, hops, 1, **changes)
    assert all(map(np.array_equal, questions, again)) and not np.array_equal(questions.word, other.word)


def test_no_guess_beats_the_floors():
    questions, right, place, distracts = drawn(1000, 2), {}, [], np.zeros(8)
    for q, (nodes, query, named, sentences) in enumerate(read_back(questions)):
        candidates = [named[n] for n in nodes if questions.kind[n] == core.CANDIDATE]
        chains, answer = every_chain({sentence[:3] for sentence in sentences}, 2), named[questions.answer[q]]
        distracts += [name in candidates and name != answer for name in named.values()]
        heard = [sentence[2] for sentence in sentences]
        inside = [word for word in heard if word in candidates]
        ends = [path[-1] for _, path in chains if path[-1] in candidates]
        asked = [path[-1] for relations, path in chains if relations == tuple(query[1:]) and path[-1] in candidates]
        for name, guess in {
            "floor": max(sorted(set(ends)), key=ends.count), "no_start": max(sorted(set(asked)), key=asked.count),
            "first": candidates[0], "last": candidates[-1], "lowest": min(candidates), "most told": max(inside, key=heard.count),
            "told first": inside[0], "told last": inside[-1],
            "most said": max(candidates, key=[sentence[0] for sentence in sentences].count),
        }.items():  # fmt: skip
            right.setdefault(name, []).append(guess == answer)
        order = {name: node for node, name in named.items()}
        chains = sorted((tuple(order[name] for name in path), relations) for relations, path in chains)
        (own,) = (i for i, (path, asked) in enumerate(chains) if asked == tuple(query[1:]) and path[0] == questions.start[q])
        place.append((own + 0.5) / len(chains))
    for name in ("floor", "no_start"):
        chance = getattr(questions, name)
        assert abs(np.mean(right[name]) - chance.mean()) < 4 * np.sqrt((chance * (1 - chance)).sum()) / 1000, name
    assert all(np.mean(guessed) < questions.floor.mean() + 0.05 for name, guessed in right.items() if name != "no_start")
    assert (abs(distracts / 1000 - 5 / 8) < 0.065).all()  # whichever entity it is: 4.2 deviations
    assert abs(np.mean(place) - 0.5) < 4 * np.sqrt(1 / 12 / 1000)  # uniform among the chains


def as_row(questions, q):
    """A question as a user's row: names "name7", relations "rel207", one sentence a fact."""
    nodes, query, named, sentences = read_back(questions)[q]
    candidates = [f"name{named[n]}" for n in nodes if questions.kind[n] == core.CANDIDATE]
    passages = [
        " ".join(f"Name{one} rel{relation} name{other}." for one, relation, other, home, _ in sentences if home == n)
        for n in nodes
        if questions.kind[n] == core.PASSAGE
    ]
    return {"start": f"name{query[0]}", "relations": [f"rel{w}" for w in query[1:]], "passages": passages,
            "answer": f"name{named[questions.answer[q]]}", "candidates": candidates,
            "entities": [f"name{name}" for name in named.values()]}  # fmt: skip


def canonical(questions, links=core.LINKS):
    """A question's graph up to the order of its nodes: each is known by its kind, its words and what it belongs to."""
    words = words_by_node(questions)
    passages, sentences = (list(np.unique(column[column >= 0])) for column in (questions.passage, questions.sentence))
    key = [
        (int(kind), str(words[n]), str(words[questions.entity[n]]) if questions.entity[n] >= 0 else "",
         passages.index(questions.passage[n]) if questions.passage[n] >= 0 else -1,
         sentences.index(questions.sentence[n]) if questions.sentence[n] >= 0 else -1)
        for n, kind in enumerate(questions.kind)
    ]  # fmt: skip
    edges = sorted((key[a], key[b]) for a, b in core.link_questions(questions, links).T)
    return sorted(key), edges, key[questions.start[0]], key[questions.answer[0]], questions.hops.tolist()


@pytest.mark.parametrize(("hops", "changes"), WORLDS[1:4], ids=str)
def test_a_question_written_as_text_is_the_same_graph(hops, changes):
    questions = drawn(4, hops, **changes)
    for q in range(4):
        read = core.read_question(as_row(questions, q), lambda word: int(re.sub(r"\D", "", word)))
        one, _ = core.take_questions(questions, np.zeros((2, 0), int), np.array([q]))
        assert canonical(read) == canonical(one)
        assert np.isnan([read.floor, read.no_start]).all() and not read.step.any()


def test_names_of_several_words_are_found_longest_first():
    number = {}
    read = core.read_question(HAND_WRITTEN, lambda word: number.setdefault(word, len(number)))
    names = [*number]
    said = [{slot: {names[w] for w in bag} for slot, bag in node.items()} for node in words_by_node(read)]
    york, city = {"new", "york"}, {"new", "york", "city"}
    is_twin, met = {"is", "the", "twin", "of"}, {"the", "mayor", "of", "met"}
    q, p, s, o, e, c = core.QUERY, core.PASSAGE, core.SUBJECT, core.OBJECT, core.ENTITY, core.CANDIDATE
    assert read.kind.tolist() == [q, c, c, e, e, p, s, o, p, s, o, o]
    assert said[:5] == [{0: york, 1: {"twin", "of"}, 2: {"mayor"}}, {0: {"ann", "lee"}}, {0: {"bob"}}, {0: york}, {0: city}]
    assert said[5] == {4: city | is_twin | {"it"}} and said[8] == {4: city | met | {"bob", "ann", "lee", "leeds", "slept"}}
    assert said[6:8] == [{0: city, 1: is_twin}, {0: york, 1: is_twin}]
    assert said[9:] == [{0: city, 1: met}, {0: {"bob"}, 1: met}, {0: {"ann", "lee"}, 1: met}]
    assert read.entity.tolist() == [-1, 1, 2, 3, 4, -1, 4, 3, -1, 4, 2, 1] and (read.start[0], read.answer[0]) == (3, 1)
    assert read.passage.tolist() == [-1] * 5 + [5] * 3 + [8] * 4
    assert len(set(read.sentence[6:8])) == len(set(read.sentence[9:])) == 1 and read.sentence[6] != read.sentence[9]


def mixed_questions():
    """Five questions of every size, a read one among them, and their edges."""
    read = core.read_question(HAND_WRITTEN, lambda word: 2 + len(word))
    parts = [drawn(1, 1), drawn(1, 3, restated=3), read, drawn(1, 2, 5, entities=5, facts=9, candidates=3, passages=2), drawn(1, 2)]
    joined = core.join_questions(parts)
    return parts, joined, core.link_questions(joined, core.LINKS)


@pytest.mark.parametrize("links", [*((name,) for name in core.LINKS), core.LINKS], ids=str)
def test_links_are_their_definition(links):
    q = mixed_questions()[1]
    expected, nodes = [], range(len(q.kind))
    for name, a, b in itertools.product(links, nodes, nodes):
        mentions = [n for n in (a, b) if q.kind[n] in (core.SUBJECT, core.OBJECT)]
        if len(mentions) == 1 and name in ("passage", "entity"):
            (one,), (other,) = mentions, {a, b} - {*mentions}
            expected += [(a, b)] * int(getattr(q, name)[one] == other)
        elif len(mentions) == 2 and a != b and name in ("sentence", "coreference"):
            column = q.sentence if name == "sentence" else q.entity
            expected += [(a, b)] * int(column[a] == column[b])
    found = [tuple(pair) for pair in core.link_questions(q, links).T.tolist()]
    assert sorted(found) == sorted(expected) and expected and all(q.question[a] == q.question[b] for a, b in found)


def test_no_link_stands_twice():
    """Someone named twice in one sentence: the mentions share a sentence and an entity, and the two attentions still agree."""
    row = HAND_WRITTEN | {"passages": ["Bob met Ann Lee, and Bob slept."]}
    edges = core.link_questions(core.read_question(row, len), core.LINKS).T.tolist()
    assert len({tuple(pair) for pair in edges}) == len(edges)


def test_pairs_within_a_group_are_all_there_are():
    for seed in range(20):
        group = np.random.default_rng(seed).integers(-1, 5, seed)
        expected = [(a, b) for a, b in np.ndindex(seed, seed) if a != b and group[a] == group[b] >= 0]
        assert sorted(map(tuple, core.pairs_within(group).T.tolist())) == sorted(expected)


@pytest.mark.parametrize("which", [[0], [1], [2], [3], [4], [0, 2, 4]], ids=str)
def test_taking_undoes_joining(which):
    parts, joined, edges = mixed_questions()
    taken, kept = core.take_questions(joined, edges, np.array(which))
    expected = core.join_questions([parts[i] for i in which])
    for name, one, other in zip(core.Questions._fields, taken, expected, strict=True):
        if name == "sentence":  # numbers of their own
            one, other = one[:, None] == one, other[:, None] == other
        np.testing.assert_array_equal(one, other, name)
    assert sorted(kept.T.tolist()) == sorted(core.link_questions(expected, core.LINKS).T.tolist())


# graph attention


def small_graph(nodes=9, edges=24, width=3, seed=0):
    """Two heads on random edges, none twice and none into node 0: query, key, value, types in float64, and Edges."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randperm(nodes * (nodes - 1), generator=generator)[:edges]
    parts = [torch.randn(nodes, 2, width, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)]
    parts.append(torch.randn(len(core.KINDS) ** 2, 2, dtype=torch.float64, generator=generator, requires_grad=True))
    kind = torch.randint(len(core.KINDS), (nodes,), generator=generator)
    return parts, core.Edges(pairs % nodes, pairs // nodes + 1, kind)


def attention_by_node(query, key, value, types, edges):
    """A softmax for each node, from the definition."""
    out = []
    for v in range(len(query)):
        source = edges.source[edges.target == v]
        logits = (query[v] * key[source]).sum(-1) + types[edges.kind[v] * len(core.KINDS) + edges.kind[source]]
        out.append((logits.softmax(0)[:, :, None] * value[source]).sum(0))
    return torch.stack(out)


@pytest.mark.parametrize(("nodes", "edges"), [(9, 24), (5, 0), (80, 6000)])  # the last takes two blocks
@pytest.mark.parametrize("csr", [False, True])
def test_edge_attention_is_a_softmax_a_node(nodes, edges, csr):
    parts, graph = small_graph(nodes, edges)
    out, weight = core.edge_attention(*parts, graph, csr)
    expected = attention_by_node(*parts, graph)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, *parts), gradients(expected, *parts))
    assert not out[0].any() and (edges == 0 or out[1:].any()) and not weight.requires_grad
    mixed = torch.zeros_like(out).index_add(0, graph.target, weight[:, :, None] * parts[2][graph.source])
    torch.testing.assert_close(mixed, expected)  # the weights stand in the order of the edges
    keep = torch.zeros(nodes, nodes, dtype=torch.bool).index_put((graph.target, graph.source), torch.tensor(True))
    fused = core.dense_attention(*(x.transpose(0, 1)[None] for x in parts[:3]), parts[3], graph.kind[None], keep[None])
    has = keep.any(1)
    torch.testing.assert_close(fused[0].transpose(0, 1)[has], expected[has])


@pytest.mark.parametrize("csr", [False, True])
def test_edge_attentions_gradient_is_its_own(csr):
    parts, graph = small_graph(6, 14, 2)
    assert torch.autograd.gradcheck(lambda *parts: core.edge_attention(*parts, graph, csr)[0], parts)


@pytest.mark.parametrize("block", [1, 7, 24, 25])
def test_blocks_of_edges_change_nothing(block):
    (query, key, *_), graph = small_graph()
    expected = torch.einsum("ehd,ehd->eh", query[graph.target], key[graph.source]).detach()
    torch.testing.assert_close(core.edge_products(query.detach(), graph.target, key.detach(), graph.source, block), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_added_memory_counts_anew_what_was_freed_before():
    torch.ones(20_000_000)
    found = core.added_mb(lambda: torch.ones(10_000_000), lambda: torch.ones(10))
    assert 39 < found < 45


def test_four_forms_of_attention_agree():
    (query, key, value, types), graph = small_graph(30, 90)
    alone = (torch.bincount(graph.target, minlength=30) == 0).nonzero()[:, 0]  # forms differ where a node has no edge into it
    graph = core.Edges(torch.cat([graph.source, alone]), torch.cat([graph.target, alone]), graph.kind)
    forms = core.attention_forms(query, key, value, types, graph)
    out = {name: form() for name, form in forms.items()}
    slopes = {name: gradients(x, query, key, value, types) for name, x in out.items()}
    assert len(out) == 4
    for name in out:
        torch.testing.assert_close(out[name], out["plain"])
        torch.testing.assert_close(slopes[name], slopes["plain"])


def test_large_logits_do_not_overflow():
    parts, graph = small_graph()
    parts = [(x * (1e4 if i == 0 else 1)).float().detach().requires_grad_() for i, x in enumerate(parts)]
    out, _ = core.edge_attention(*parts, graph)
    torch.testing.assert_close(out, attention_by_node(*parts, graph))
    assert all(g.isfinite().all() for g in gradients(out, *parts)) and not gradients(out, *parts)[0][0].any()


def test_nothing_but_its_sources_moves_a_node():
    parts, graph = small_graph()
    query, key, value, types = parts
    out, _ = core.edge_attention(*parts, graph)
    for target in range(9):
        sources = graph.source[graph.target == target]
        other = torch.ones(9, dtype=torch.bool).index_fill(0, sources, False)
        moved = [x + other[:, None, None] * torch.randn_like(x) for x in (key, value)]
        again, _ = core.edge_attention(query, *moved, types, graph)
        assert torch.equal(again[target], out[target])
        seen = gradients(out[target], query, key, value)
        assert not any(g[other].any() for g in seen[1:]) and seen[2][sources].any((1, 2)).all()
        assert seen[1][sources].any((1, 2)).all() or len(sources) < 2  # one source alone has weight 1, whatever its key
        assert not torch.cat([seen[0][:target], seen[0][target + 1 :]]).any()


# answering


def question_model(**changes):
    """In float64, every weight random, types too."""
    model = core.build_question_model(TINY | changes, 0).double()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.dim() == 1 or name.endswith("types")):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    return model


def question_batch(questions, edges, form):
    batch = core.QuestionBatch(questions, edges, form)
    batch.word_weight = batch.word_weight.double()
    return batch


def scores_by_node(model, questions, edges, form, types):
    """The model from its definition, a node and a head at a time: scores of all nodes."""
    kind, question = questions.kind.tolist(), questions.question.tolist()
    words, queries = words_by_node(questions), np.nonzero(questions.kind == core.QUERY)[0]
    pairs = set()
    if form == "nodes":
        for passage in np.nonzero(questions.kind == core.PASSAGE)[0]:
            new, query = len(kind), queries[question[passage]]
            kind, question, words = (
                [*kind, core.PASSAGE_QUERY],
                [*question, question[passage]],
                [*words, words[passage] | words[query]],
            )
            pairs |= {(new, n) for n in np.nonzero(questions.passage == passage)[0]}
    if form.startswith("node"):
        pairs |= {(n, queries[question[n]]) for n in range(len(kind)) if kind[n] != core.QUERY}
    pairs |= {(b, a) for a, b in pairs} | {(n, n) for n in range(len(kind))} | set(map(tuple, edges.T.tolist()))
    bag = lambda n: sum(model.embed.weight[w].mean(0) @ model.slots[slot] for slot, w in words[n].items())  # noqa: E731
    rows = []
    for n in range(len(kind)):
        starts = n < len(questions.kind) and questions.entity[n] == questions.start[question[n]]
        told = form.startswith("everywhere") or (form == "start" and starts)
        row = bag(n) + model.kinds.weight[kind[n]] + told * model.inject(bag(queries[question[n]]))
        rows.append(row + (form.endswith("marked") and starts) * model.mark)
    x = torch.stack(rows)

    def apply(part, x):
        parts = [part.parts[k] if types == "switch" else part for k in kind]
        return torch.stack([F.linear(row, p.weight, p.bias) for row, p in zip(x, parts, strict=True)])

    for layer in model.layers:
        parts = apply(layer.inputs, layer.norm1(x)).view(len(x), 3, layer.heads, -1).unbind(1)
        mixed = []
        for n in range(len(x)):
            sources = sorted(a for a, b in pairs if b == n)
            bias = torch.stack([layer.types[kind[n] * len(core.KINDS) + kind[a]] for a in sources])
            logits = (parts[0][n] * parts[1][sources]).sum(-1) / math.sqrt(parts[0].shape[-1]) + bias
            mixed.append((logits.softmax(0)[..., None] * parts[2][sources]).sum(0).flatten())
        x = x + apply(layer.out, torch.stack(mixed))
        x = x + apply(layer.last, apply(layer.first, layer.norm2(x)).relu())
    return model.readout(model.norm(x))[:, 0]


@pytest.mark.parametrize(
    ("query", "types"),
    [*((form, "embedding") for form in core.QUERY_FORMS), ("everywhere", "none"), ("nodes", "none"), ("start", "switch")],
)
def test_question_model_is_its_definition(query, types):
    _, questions, edges = mixed_questions()
    edges = edges[:, np.arange(edges.shape[1]) % 3 > 0]  # not all have their opposite
    model, batch = question_model(types=types), question_batch(questions, edges, query)
    learned = [p for p in model.parameters() if p.requires_grad]
    score, found, total = scores_by_node(model, questions, edges, query, types), [], 0
    for form in ("edges", "dense"):
        for layer in model.layers:
            layer.form = form
        found.append(model(batch))
    for q, logits in enumerate(found[0]):
        nodes = [n for n in range(len(questions.kind)) if questions.question[n] == q and questions.kind[n] == core.CANDIDATE]
        torch.testing.assert_close(logits[: len(nodes)], score[nodes])
        assert (logits[len(nodes) :] == -math.inf).all() and nodes[batch.answer[q]] == questions.answer[q]
        logits = score[nodes].log_softmax(0)[nodes.index(questions.answer[q])]
        total = total + logits
    expected = torch.autograd.grad(-total, learned, materialize_grads=True)
    for logits in found:
        torch.testing.assert_close(logits, found[0])
        loss = F.cross_entropy(logits, batch.answer, reduction="sum")
        torch.testing.assert_close(torch.autograd.grad(loss, learned, materialize_grads=True), expected)


@pytest.mark.parametrize("query", core.QUERY_FORMS)
def test_each_query_form_reads_what_it_says(query):
    _, questions, edges = mixed_questions()
    model = question_model()
    logits = model(question_batch(questions, edges, query))
    mine = (questions.kind[questions.node] == core.QUERY) & (questions.question[questions.node] == 1)
    asked = np.where(mine, np.roll(questions.word, 1), questions.word)
    asked[mine] = questions.word[mine][::-1]  # the same words, in other slots
    for elsewhere, reads in (
        (questions._replace(word=asked), query != "none"),
        (questions._replace(start=np.where(np.arange(5) == 1, questions.answer, questions.start)),
         query == "start" or query.endswith("marked")),
    ):  # fmt: skip
        moved = (model(question_batch(elsewhere, edges, query)) != logits).any(1)
        assert moved.tolist() == [False, reads, False, False, False]


@pytest.mark.parametrize("form", ["edges", "dense"])
@pytest.mark.parametrize("query", core.QUERY_FORMS)
def test_a_question_is_answered_as_if_alone_in_any_order(query, form):
    parts, questions, edges = mixed_questions()
    model = question_model(form=form)
    logits = model(question_batch(questions, edges, query))
    for order in ([0], [1], [2], [3], [4], [3, 0, 4, 2, 1]):
        some = core.join_questions([parts[i] for i in order])
        alone = model(question_batch(some, core.link_questions(some, core.LINKS), query))
        torch.testing.assert_close(alone, logits[order, : alone.shape[1]])
    mine = (questions.question[questions.node] == 1) & (questions.kind[questions.node] != core.QUERY)
    word = questions.word.copy()
    word[mine] = np.roll(word[mine], 1)
    moved = (model(question_batch(questions._replace(word=word), edges, query)) != logits).any(1)
    assert moved.tolist() == [False, True, False, False, False]  # to the bit


def test_the_order_of_nodes_and_edges_is_irrelevant():
    _, questions, edges = mixed_questions()
    rng, new = np.random.default_rng(0), np.arange(len(questions.kind))
    inner = questions.kind == core.PASSAGE  # which candidates come first would turn the columns
    inner |= np.isin(questions.kind, (core.SUBJECT, core.OBJECT))
    for q in range(5):
        mine = np.nonzero(inner & (questions.question == q))[0]
        new[mine] = rng.permutation(mine)
    columns = {}
    for name, column in questions._asdict().items():
        column = np.where(column >= 0, new[column], -1) if core.COUNTED_BY.get(name) == "kind" else column
        columns[name] = column[new.argsort()] if name in core.OF_NODE else column
    order = columns["node"].argsort(kind="stable")
    columns |= {name: columns[name][order] for name in core.OF_WORD}
    for query in core.QUERY_FORMS:
        model = question_model()
        one = model(question_batch(questions, edges, query))
        other = model(question_batch(core.Questions(**columns), new[edges[:, rng.permutation(edges.shape[1])]], query))
        torch.testing.assert_close(other, one)
    assert (new != np.arange(len(new))).sum() > 50


@pytest.mark.parametrize("types", ["embedding", "none", "switch"])
def test_what_is_shared_is_counted_once(types):
    count = {}
    for share, depth in itertools.product(("on", "off"), (1, 3)):
        model = core.build_question_model(TINY | {"types": types, "share": share, "depth": depth}, 0)
        assert len(model.layers) == depth
        count[share, depth] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kinds, linear = len(core.KINDS), (8 + 1) * 24 + (8 + 1) * 8 + (8 + 1) * 16 + (16 + 1) * 8
    layer = 4 * 8 + linear * (kinds if types == "switch" else 1) + (kinds**2 * 2) * (types != "none")
    rest = (2 + 200 + 3) * 8 + core.SLOTS * 64 + 8 + 72 + 16 + 9 + kinds * 8 * (types != "none")
    assert count == {("on", 1): rest + layer, ("on", 3): rest + layer, ("off", 1): rest + layer, ("off", 3): rest + 3 * layer}


def test_kinds_are_unread_without_types():
    _, questions, edges = mixed_questions()
    other = np.where(questions.kind == core.SUBJECT, core.OBJECT, questions.kind)
    for types in ("none", "embedding", "switch"):
        model = question_model(types=types)
        one, two = (model(question_batch(questions._replace(kind=kind), edges, "start")) for kind in (questions.kind, other))
        assert torch.equal(one, two) == (types == "none")


@pytest.fixture
def few(monkeypatch):
    """At most 30 questions to measure with."""
    held_out = core.QuestionData.held_out
    monkeypatch.setattr(core.QuestionData, "held_out", lambda data, count, *name: held_out(data, min(count, 30), *name))


def answers_learned(config, seed=0, **options):
    return core.train_on_questions(config, seed, core.build_question_model(config, seed), **options)


def test_a_run_trains_a_model_of_questions_once(few, tmp_path, monkeypatch):
    """What another script of the same runs/ trained is taken from there, to the bit; other settings, seeds or code are not."""
    monkeypatch.setattr(core.Runtime, "checkpoint", None)
    expected, alone = core.build_question_model(TINY, 1), core.trained_on_questions(TINY, 1)
    result = core.train_on_questions(TINY, 1, expected)
    assert not list(tmp_path.rglob("model-*"))
    monkeypatch.setattr(core.Runtime, "checkpoint", tmp_path / "one" / "trial.checkpoint")
    trainings, train = [], core.train_on_questions
    monkeypatch.setattr(core, "train_on_questions", lambda *given: trainings.append(1) or train(*given))
    first = core.trained_on_questions(TINY, 1)
    monkeypatch.setattr(core.Runtime, "checkpoint", tmp_path / "other" / "trial.checkpoint")
    again = core.trained_on_questions(TINY | {"draw": 3}, 1)  # a flag that is the other script's alone
    assert len(trainings) == 1
    for model, told in (alone, first, again):
        assert all(torch.equal(*pair) for pair in zip(model.state_dict().values(), expected.state_dict().values(), strict=True))
        assert told.keys() == result.keys() and all(np.array_equal(told[key], result[key], True) for key in result)
        assert all(isinstance(told[key], float) for key in result if not np.ndim(result[key]))
    core.trained_on_questions(TINY, 2)
    core.trained_on_questions(TINY | {"lr": 0.02}, 1)
    core.trained_on_questions(TINY | {"query": "none"}, 1)
    monkeypatch.setattr(core.Runtime, "threads", 2)
    core.trained_on_questions(TINY, 1)
    monkeypatch.setattr(core, "code_fingerprint", lambda *_: "other")
    core.trained_on_questions(TINY, 1)
    assert len(trainings) == 6


def test_training_on_questions_is_plain_adamw(few):
    config = TINY | {"curriculum": 0.5, "lr": 0.02, "steps": 20}
    result, data, rng = answers_learned(config, 3, points=4), core.QuestionData(config), core.stream(3, "train")
    model, losses = core.build_question_model(config, 3), []
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    right = lambda name, count, hops: np.mean([  # noqa: E731
        bool(logits.argmax() == answer)
        for batch in data.held_out(count, name)[hops] for logits, answer in zip(model(batch), batch.answer, strict=True)
    ])  # fmt: skip
    curves = {1: [], 2: []}
    for step in range(21):
        if step % 5 == 0:
            curves = {hops: [*curve, right("val", 100, hops)] for hops, curve in curves.items()}
        if step < 20:
            batch = data.draw(rng, 6, (1, 2) if step >= 10 else (1,))
            loss = -model(batch).log_softmax(1)[torch.arange(6), batch.answer].mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = 0.02 * min((step + 1) / 100, (20 - step) / 6)
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(result["train_loss"], losses, rtol=1e-4)
    for hops in (1, 2):
        np.testing.assert_allclose(result[f"curve_{hops}"], curves[hops], atol=0.011)
        assert abs(result[f"accuracy_{hops}"] - right("test", 30, hops)) < 0.035
        chance = np.concatenate([batch.questions.floor for batch in data.held_out(30)[hops]])
        assert len(chance) == 30 and math.isclose(result[f"floor_{hops}"], chance.mean())
        assert result[f"no_start_{hops}"] > result[f"floor_{hops}"]
    assert result["accuracy"] == pytest.approx((result["accuracy_1"] + result["accuracy_2"]) / 2)
    assert result["parameters"] == sum(p.numel() for p in model.parameters() if p.grad is not None) and math.isnan(
        result["diverged"]
    )


def test_the_rate_climbs_rests_and_falls(few, monkeypatch):
    config, rates, steps = TINY | {"steps": 200, "hops": (1,), "depth": 1, "lr": 0.5}, [], []
    batch = core.QuestionData(config).draw(np.random.default_rng(0), 1, (1,))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]))
    answers_learned(config, points=1, draw=lambda rng, step: steps.append(step) or batch)
    expected = [0.005 * (i + 1) if i < 100 else 0.5 if i < 140 else 0.5 * (200 - i) / 60 for i in range(200)]
    np.testing.assert_allclose(rates, expected)
    assert steps == [*range(200)]


def test_training_on_questions_repeats_and_reports_divergence(few):
    one, again, other = (answers_learned(TINY, seed, points=2) for seed in (0, 0, 1))
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
    assert not np.array_equal(one["train_loss"], other["train_loss"])
    assert answers_learned(TINY | {"lr": 1e30}, points=2)["diverged"] >= 1


def test_graph_questions_are_learned():
    config = QUESTION | {"hops": (1,), "depth": 2, "dim": 32, "heads": 2, "names": 20, "steps": 200, "batch": 24, "lr": 1e-2}
    result = answers_learned(config, points=1)
    assert result["accuracy"] > result["floor_1"] + 0.3 and result["curve_1"][0] < 0.4


@pytest.mark.parametrize(("curriculum", "first"), [(0.0, [3] * 12), (0.25, [1] * 3 + [2] * 3 + [3] * 6), (2.0, [1] * 12)])
def test_further_hops_join_in_time(curriculum, first, few, monkeypatch):
    seen, draw = [], core.QuestionData.draw
    monkeypatch.setattr(core.QuestionData, "draw", lambda *args: seen.append((args[2], tuple(args[3]))) or draw(*args))
    answers_learned(TINY | {"hops": (2, 1, 3), "curriculum": curriculum}, points=1)
    assert seen == [(6, (2, 1, 3)[:n]) for n in first]


def test_each_number_of_hops_is_drawn_with_the_same_chance(monkeypatch):
    seen, draw = {}, core.draw_questions
    monkeypatch.setattr(core, "draw_questions", lambda rng, n, h, world: seen.update({h: n}) or draw(rng, n, h, world))
    assert core.QuestionData(TINY).draw(np.random.default_rng(0), 1000, (1, 3)).count == 1000
    assert sum(seen.values()) == 1000 and set(seen) == {1, 3} and 0 < abs(seen[1] - 500) < 65


def test_evaluation_does_not_depend_on_training(few, monkeypatch):
    seen, answered = [], core.answered
    key = lambda batch: (batch.used[batch.word % len(batch.used)].tolist(), batch.edges.source.tolist(), batch.answer.tolist())  # noqa: E731
    monkeypatch.setattr(core, "answered", lambda model, batches: seen[-1].append([*map(key, batches)]) or answered(model, batches))
    for seed, changes in ((0, {}), (1, {"steps": 20, "batch": 3, "lr": 1e-3, "depth": 1})):
        seen.append([])
        answers_learned(TINY | changes, seed, points=1)
    assert seen[0] == seen[1] and len(seen[0]) == 6 and seen[0][:2] == seen[0][2:4]  # two numbers of hops: before, after, test
    assert not any(batch in seen[0][4 + i] for i in (0, 1) for batch in seen[0][i])


@functools.cache
def learned_losses(config):
    return answers_learned(dict(config), points=1)["train_loss"]


@pytest.mark.parametrize("flag", [flag.key for flag in core.QUESTION_FLAGS if "questions" not in flag.key])
def test_every_flag_of_questions_changes_the_training(flag, few):
    changes = {"query": "node", "hops": (1, 3), "entities": 7, "relations": 4, "facts": 12, "restated": 3, "passages": 5,
               "names": 150, "candidates": 4, "links": "passage,entity", "types": "none", "share": "off", "depth": 3, "dim": 12,
               "heads": 1, "form": "dense", "steps": 15, "batch": 7, "lr": 1e-3, "curriculum": 0.5}  # fmt: skip
    config = TINY | {flag: changes[flag]}
    losses = [learned_losses(tuple(core.question_cell(each).items())) for each in (TINY, config)]
    same = len(losses[0]) == len(losses[1]) and np.allclose(*losses, rtol=1e-5)
    assert same == (flag == "form")  # that one changes how it is computed, and nothing else


# questions of one's own


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes rows (or any bytes) to a file, and reads it without the cache of the process; runs/ lies elsewhere."""
    monkeypatch.setattr(core, "REPOSITORY", tmp_path)
    core.load_questions.cache_clear()

    def write(rows):
        path = tmp_path / "own.jsonl"
        path.write_bytes(rows if isinstance(rows, bytes) else b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        return str(path)

    yield write
    core.load_questions.cache_clear()


def own_rows(count=12):
    questions = core.join_questions([drawn(count - 6, 1), drawn(6, 2, 1)])
    return [as_row(questions, q) for q in np.arange(count) * 5 % count]  # both numbers of hops on either side


def test_own_questions_are_read_linked_and_kept(own, monkeypatch):
    rows, load, number = own_rows(), core.load_questions.__wrapped__, {}
    path = own(rows)
    expected = core.join_questions([core.read_question(row, lambda word: number.setdefault(word, 2 + len(number))) for row in rows])
    questions, edges, words, sha = load(path, core.LINKS)
    assert words[2:] == tuple(number) and sha == hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    for one, other in zip(questions, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(edges, core.link_questions(expected, core.LINKS))
    with monkeypatch.context() as patch:
        patch.setattr(core, "join_questions", lambda *_: pytest.fail("the text is read again"))
        for links in (("sentence",), ("passage", "entity")):
            again, edges, *rest = load(path, links)
            np.testing.assert_array_equal(edges, core.link_questions(expected, links))
            assert np.array_equal(again.word, expected.word) and rest == [words, sha]
        patch.setattr(core, "link_questions", lambda *_: pytest.fail("edges are linked again"))
        assert load(path, ("sentence",))[1].size
    own(rows[::-1])  # other content under the same name
    assert not np.array_equal(load(path, core.LINKS)[0].word, expected.word)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "data", "directory"])
def test_a_damaged_kept_file_is_made_anew(damage, own):
    path, load = own(own_rows()), core.load_questions.__wrapped__
    first = load(path, core.LINKS)
    for kept in (Path(path).parent / "runs").iterdir():
        content = bytearray(kept.read_bytes())
        if damage == "data":
            content[len(content) // 2] ^= 64
        elif damage == "directory":
            content[content.rindex(b"PK\1\2") + 10] ^= 64  # names a compression that there is not
        kept.write_bytes({"empty": b"", "text": b"no arrays", "cut": content[:-50]}.get(damage, content))
    again = load(path, core.LINKS)
    assert np.array_equal(again[1], first[1]) and all(np.array_equal(*pair, True) for pair in zip(again[0], first[0], strict=True))


def test_no_place_to_keep_what_was_read_is_no_error(own):
    path = own(own_rows())
    (Path(path).parent / "runs").write_text("a file in the way")
    assert len(core.load_questions.__wrapped__(path, core.LINKS)[0].hops) == 12


@pytest.mark.parametrize(
    ("change", "said"),
    [({key: None}, key) for key in ("start", "answer", "relations", "passages", "candidates")]
    + [({"start": ["a"]}, "start"), ({"passages": "a text"}, "passages"), ({"candidates": []}, "candidates"),
       ({"answer": "nobody"}, '"answer" has to stand among "candidates"'), ({"relations": ["a"] * 4}, "at most 3"),
       ({"relations": ["a", 3]}, "texts"), ({"passages": ["a", "?!"]}, "texts"), ({"entities": [" "]}, "texts"),
       ({"entities": "Rome"}, "entities"), ({"entities": 7}, ""),
       (b'{"start": "a"', "not JSON"), (b"\xff", "not JSON"), (b"[1]", "not an object"), (b"\n\n{", "not JSON")],
    ids=str,
)  # fmt: skip
def test_a_bad_question_is_named_with_its_line(change, said, own):
    lines = [json.dumps(row).encode() for row in own_rows()]
    lines[6] = change if isinstance(change, bytes) else json.dumps(json.loads(lines[6]) | change).encode()
    line = 7 + lines[6].count(b"\n")
    with pytest.raises(core.UsageError, match=rf"^--questions .*own\.jsonl: line {line}: .*{said}") as error:
        core.load_questions(own(b"\n".join(lines)), core.LINKS)
    assert "\n" not in str(error.value) and not (core.REPOSITORY / "runs").exists()


def test_a_missing_key_few_questions_and_no_file_are_named(own, tmp_path):
    rows = own_rows()
    del rows[0]["start"]
    with pytest.raises(core.UsageError, match=r"--questions .*line 1: \"start\""):
        core.load_questions(own(rows), core.LINKS)
    with pytest.raises(core.UsageError, match=r"--questions .*own\.jsonl: 9 questions; give at least 10"):
        core.load_questions(own(rows[1:10]), core.LINKS)
    for missing in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(core.UsageError, match=f"--questions {missing}: cannot be read"):
            core.load_questions(str(missing), core.LINKS)


def test_every_fifth_own_question_is_held_out(own, few, monkeypatch):
    path, taken, take = own(own_rows(20)), [], core.take_questions
    config = core.question_cell(TINY | {"questions": path, "batch": 7})
    assert config["sha256"] == core.load_questions(path, core.LINKS)[3]
    assert not {*core.WORLD, "hops", "curriculum"} & set(config) and set(config) < set(TINY) | {"sha256"}
    monkeypatch.setattr(core, "take_questions", lambda q, edges, which: taken.append(which.tolist()) or take(q, edges, which))
    result = answers_learned(config, points=2)
    hops = core.load_questions(path, core.LINKS)[0].hops
    held_out = [[q for q in (4, 9, 14, 19) if hops[q] == h] for h in (1, 2)]
    assert taken[:4] == held_out * 2 and all(held_out)
    assert {q for some in taken[4:] for q in some} == set(range(20)) - {4, 9, 14, 19}
    assert len(taken) == 4 + 12 and all(len(set(some)) == 7 for some in taken[4:])
    assert math.isnan(result["floor_1"]) and 0 <= result["accuracy_2"] <= 1
    assert len(core.QuestionData(config | {"batch": 99}).draw(np.random.default_rng(0), 99, ()).answer) == 16


def test_a_number_of_hops_that_is_not_held_out_is_no_end(own, few):
    rows = own_rows()
    rows = [as_row(drawn(1, 3), 0), *(row for row in rows if len(row["relations"]) == 1), *rows][:12]
    result = answers_learned(core.question_cell(TINY | {"questions": own(rows)}), points=1)
    assert np.isfinite([result["accuracy"], result["accuracy_1"], result["accuracy_2"]]).all()


@pytest.mark.parametrize(
    ("changes", "flag"),
    [({"heads": 3}, "heads"), ({"links": "passage,friend"}, "links"), ({"links": ""}, "links"),
     ({"links": "entity,entity"}, "links"), ({"hops": (1, 4)}, "hops"),
     ({"hops": (4,), "relations": 5}, "hops"), ({"hops": (1, 1)}, "hops"),
     ({"candidates": 9}, "candidates"),
     ({"names": 7}, "entities"), ({"facts": 25}, "facts"), ({"restated": 17}, "restated"), ({"passages": 17}, "passages"),
     ({"entities": 3, "candidates": 3, "facts": 8, "hops": (3,)}, "hops"), ({"facts": 2, "passages": 2, "hops": (3,)}, "hops"),
     ({"questions": "nowhere.jsonl"}, "questions")],
    ids=str,
)  # fmt: skip
def test_questions_that_cannot_be_are_refused(changes, flag):
    with pytest.raises(core.UsageError, match=rf"^--{flag} .*: ") as error:
        core.question_cell(QUESTION | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [{}, {"hops": (3,)}, {"candidates": 8}, {"names": 8}, {"facts": 24}, {"restated": 16, "passages": 32}, {"passages": 16},
     {"entities": 4, "candidates": 4, "facts": 8, "hops": (3,)}, {"facts": 3, "passages": 2, "hops": (2,)}, {"links": "entity"}],
    ids=str,
)  # fmt: skip
def test_questions_at_the_edge_of_what_can_be_are_drawn(changes):
    config = QUESTION | changes
    assert core.question_cell(config) == config
    assert core.QuestionData(config).draw(np.random.default_rng(0), 3, config["hops"]).count == 3


def test_the_order_of_nodes_is_the_stable_one_however_it_is_found():
    rng = np.random.default_rng(0)
    for count in (3, 1000, 1 << 16, (1 << 16) + 1):
        nodes = torch.from_numpy(rng.integers(count, size=5000))
        nodes[0] = count - 1
        assert torch.equal(core.node_order(nodes, count), nodes.argsort(stable=True))


# %% 23 PATTERN, solved


def test_totals_of_blocks_and_sizes_of_the_pattern_are_counted_exactly():
    sizes, blocks = (2, 5), [sum(s) for s in itertools.product(range(2, 5), repeat=3)]
    np.testing.assert_allclose(core.total_chances(3, sizes)[: max(blocks) + 1], np.bincount(blocks) / len(blocks), atol=1e-15)
    draws = Counter((sum(s), s[-1]) for s in itertools.product(range(2, 4), repeat=core.COMMUNITIES + 1))
    weights = np.exp(core.size_weights(14, (2, 4)))
    assert weights == pytest.approx([draws[14, s] / 2 ** (core.COMMUNITIES + 1) for s in range(15)])


def test_the_density_outside_the_pattern_is_that_of_drawn_graphs():
    inside = pairs = 0
    for graph in core.PatternData(3, fresh=True)[:400]:
        out = graph.label == 0
        inside += graph.adjacency()[np.ix_(out, out)].sum()
        pairs += out.sum() * (out.sum() - 1)
    assert abs(inside / pairs - core.background_density()) < 0.002


def log_likelihood(adjacency, on, density):
    """Of edges, if pairs outside the pattern have this density and all others one half."""
    first, second = np.triu_indices(len(adjacency), 1)
    chance = np.where(on[first] | on[second], 0.5, density)
    return np.log(np.where(adjacency[first, second], chance, 1 - chance)).sum()


@pytest.mark.parametrize("communities", [True, False])
def test_a_label_chain_samples_the_exact_posterior(communities):
    """Two graphs of unlike size, so small that all labellings can be listed."""
    rng, sizes, exact = np.random.default_rng(0), (1, 4), []  # 8 nodes: sizes 3 1 1 1 1 1 and 2 2 1 1 1 1, of unlike prior
    blocks = core.COMMUNITIES + 1
    adjacencies = [np.triu(rng.random((n, n)) < 0.5, 1) for n in (8, 7)]
    adjacencies = [a | a.T for a in adjacencies]
    for a in adjacencies:
        n, (first, second) = len(a), np.triu_indices(len(a), 1)
        z = np.indices((blocks,) * n, dtype=np.int8).reshape(n, -1).T  # all labellings, a row each
        size = np.stack([(z == k).sum(1) for k in range(blocks)], 1)
        z, size = (x[(size.min(1) >= sizes[0]) & (size.max(1) < sizes[1])] for x in (z, size))
        pattern = (z[:, first] == blocks - 1) | (z[:, second] == blocks - 1)
        alike, outside = pattern | (z[:, first] == z[:, second]), core.background_density(sizes)
        density = np.where(alike, 0.5, core.EDGE_BETWEEN) if communities else np.where(pattern, 0.5, outside)
        weight = np.where(a[first, second], density, 1 - density).prod(1)
        weight *= np.array([math.factorial(s) for s in range(n)])[size].prod(1)
        exact.append(weight @ (z == blocks - 1) / weight.sum())
    repeated = [a for a in adjacencies for _ in range(200)]
    found = core.unknown_pattern(repeated, rng, 60, communities=communities, sizes=sizes)
    for i, chance in enumerate(exact):
        mean = np.mean(found[200 * i : 200 * i + 200], 0)
        error = np.std(found[200 * i : 200 * i + 200], 0) / np.sqrt(200)
        assert chance.max() > 1.3 * chance.min()
        assert (abs(mean - chance) < 4.5 * error + 1e-4).all(), (mean, chance, error)


def test_joining_a_class_is_as_likely_as_its_sizes():
    """Labellings with sizes s, all orders alike: chance as the product of the factorials of s."""
    chain = core.LabelChain([np.zeros((8, 8), bool)], np.random.default_rng(0), sizes=(1, 4))
    rest, own = torch.tensor([[2.0, 1, 1, 1, 1, 1]]), F.one_hot(torch.tensor([0]), 6).float()
    weight = [math.prod(math.factorial(int(s) + (k == j)) for j, s in enumerate(rest[0])) for k in range(6)]
    found = chain.size_prior(rest, own)[0]
    torch.testing.assert_close(found - found[0], torch.tensor(weight).log() - math.log(weight[0]))


def test_a_swap_keeps_sizes_and_a_sweep_their_limits():
    rng = np.random.default_rng(1)
    graphs = [core.PatternData(5, fresh=True)[i] for i in range(6)]
    chain = core.LabelChain([graph.adjacency() for graph in graphs], rng)
    before, sizes = chain.label.clone(), chain.label.sum(1)
    for _ in range(50):
        chain.swap()
    assert torch.equal(chain.label.sum(1), sizes) and not torch.equal(chain.label, before)
    for _ in range(3):
        chain.sweep()
        assert chain.label.sum(1).min() >= core.SIZE_RANGE[0] and chain.label.sum(1).max() < core.SIZE_RANGE[1]
    assert not torch.equal(chain.label.sum(1), sizes)
    for i, graph in enumerate(graphs):
        n = len(graph.label)
        assert (chain.label[i, :n].sum(1) == 1).all() and not chain.label[i, n:].any()


def test_one_round_of_mean_field_follows_the_degree_and_rounds_add_what_neighbours_tell():
    graph = core.PatternData(1)[3]
    a, n = graph.adjacency(), len(graph.label)
    chance = core.mean_field(a, 1)
    order = a.sum(1).argsort(kind="stable")
    assert (np.diff(chance[order]) > -1e-12).all() and chance.std() > 0.1
    share = (np.exp(core.size_weights(n)) * np.arange(n + 1)).sum() / np.exp(core.size_weights(n)).sum() / n
    none, edge = core.log_odds(core.background_density())
    for i in range(n):  # one node's second round, pair by pair
        logit = math.log(share / (1 - share))
        for j in range(n):
            logit -= (1 - chance[j]) * (edge if a[i, j] else none) * (i != j)
        assert core.mean_field(a, 2)[i] == pytest.approx(1 / (1 + math.exp(-logit)))
    assert core.mean_field(np.zeros((3, 3), bool), 1) == pytest.approx(core.mean_field(np.zeros((3, 3), bool), 1)[0])


def places_by_hand(pattern, adjacency, feature):
    """All induced places of a pattern, node by node."""
    found = [()]
    for u, symbol in enumerate(pattern.feature):
        more = [(place, x) for place in found for x in np.flatnonzero(feature == symbol) if x not in place]
        found = [(*place, x) for place, x in more if all(adjacency[x, y] == pattern.adjacency[u, v] for v, y in enumerate(place))]
    return found


@pytest.mark.parametrize(("n", "size"), [(12, 5), (40, 6), (70, 4), (130, 3), (30, 1)])
def test_embeddings_are_all_induced_places(n, size):
    rng = np.random.default_rng(n)
    a = np.triu(rng.random((n, n)) < 0.5, 1)
    a, feature = a | a.T, rng.integers(core.PATTERN_SYMBOLS, size=n, dtype=np.uint8)
    where = rng.permutation(n)[:size]
    pattern = core.Pattern(a[np.ix_(where, where)], feature[where])
    order, bits = core.search_order(pattern), core.bit_rows(a, feature)
    assert sorted(order) == [*range(size)]
    expected = set(places_by_hand(pattern, a, feature))
    assert tuple(where) in expected
    for look_ahead in (1, 4, 99):
        for some in (order, range(size)):
            found = core.embeddings(pattern, some, bits, look_ahead)
            assert len(found) == len(expected) and set(map(tuple, found.tolist())) == expected
    other = core.Pattern(pattern.adjacency, (pattern.feature + 1) % core.PATTERN_SYMBOLS)
    assert set(map(tuple, core.embeddings(other, order, bits).tolist())) == set(places_by_hand(other, a, feature))


def test_known_patterns_are_weighed_by_how_likely_they_make_the_graph():
    graph = min((g for g in core.PatternData(0, fresh=True)[:200] if g.label.sum() < 8), key=lambda g: len(g.label))
    on, rng = graph.label == 1, np.random.default_rng(0)
    a, n = graph.adjacency(), len(graph.label)
    own = core.Pattern(a[np.ix_(on, on)], graph.feature[on])
    patterns = [own]
    while len(patterns) < 4:
        pattern = core.draw_pattern(rng)
        patterns += [pattern] * (6 <= len(pattern.feature) <= 7)
    orders, guess = [core.search_order(p) for p in patterns], core.mean_field(a, 3)
    chance, met = core.known_patterns(graph, patterns, orders, guess)
    logs, rows = [], []
    for k, pattern in enumerate(patterns):
        size, places = len(pattern.feature), places_by_hand(pattern, a, graph.feature)
        assert met.get(k, 0) == len(places)
        for place in places:
            on = np.isin(np.arange(n), place)
            inside = -math.comb(size, 2) * math.log(0.5) + size * math.log(3)  # edges and symbols on the pattern are given
            ways = math.lgamma(n + 1) - math.lgamma(n - size + 1)
            prior = core.total_chances(core.COMMUNITIES)[n - size]
            logs.append(log_likelihood(a, on, core.background_density()) + inside - ways + math.log(prior))
            rows.append(on)
    weight = np.exp(np.array(logs) - max(logs))
    assert len(logs) > 5
    np.testing.assert_allclose(chance, weight @ np.array(rows) / weight.sum(), rtol=1e-6, atol=1e-9)
    nothing = core.Pattern(~np.eye(30, dtype=bool), np.zeros(30, np.uint8))
    assert core.known_patterns(graph, [nothing], [core.search_order(nothing)], guess)[0] is guess


def test_a_large_known_pattern_ends_the_search():
    data = core.PatternData(0, "test")
    graph = next(graph for graph in data[:: data.per_pattern] if graph.label.sum() >= core.SURE)
    patterns = [core.known_pattern(0, k) for k in range(core.KNOWN_PATTERNS)]
    guess = core.mean_field(graph.adjacency(), 3)
    chance, met = core.known_patterns(graph, patterns, [core.search_order(p) for p in patterns], guess)
    np.testing.assert_allclose(chance, graph.label)
    assert met == {graph.pattern: met[graph.pattern]}


def test_chance_recalls_pool_nodes_and_expect_themselves():
    chance, label = np.array([0.9, 0.1, 0.3, 0.05]), np.array([1, 0, 0, 1])
    assert core.chance_recalls(chance, label).tolist() == [50.0, 50.0]
    assert core.chance_recalls(chance, chance) == pytest.approx([100 * 1.85 / 2.65, 100 * 1.2 / 1.35])


def test_a_long_trial_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    calls, path = [], tmp_path / "trial.checkpoint"
    monkeypatch.setattr(core.Runtime, "checkpoint", path)
    monkeypatch.setattr(core, "CHECKPOINT_SECONDS", 0.0)

    def part(i):
        calls.append(i)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return np.arange(i + 1) / 3

    with pytest.raises(KeyboardInterrupt):
        core.resumed(part, 6)
    rows = core.resumed(part, 6)
    assert calls == [0, 1, 2, 3, 3, 4, 5]
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row, np.arange(i + 1) / 3)
    for content in (path.read_bytes()[:-40], b"", b"hostile"):
        path.write_bytes(content)
        with pytest.raises(core.UsageError, match="not a checkpoint"):
            core.resumed(part, 6)


def test_a_kept_posterior_is_sampled_once(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "REPOSITORY", tmp_path)
    graphs = core.PatternData(1, fresh=True)[:3]
    first = core.kept_posterior(graphs, 0, 10)
    assert [len(chance) for chance in first] == [len(graph.label) for graph in graphs]
    chains = [core.unknown_pattern([g.adjacency() for g in graphs], core.stream(0, "init", i), 10) for i in range(2)]
    for chance, *two in zip(first, *chains, strict=True):
        np.testing.assert_allclose(chance, np.mean(two, 0))
    others = core.kept_posterior(graphs[:2], 0, 10), core.kept_posterior(graphs, 1, 10), core.kept_posterior(graphs, 0, 11)
    assert all(not np.array_equal(first[0], other[0]) for other in others)
    monkeypatch.setattr(core, "stream", None)
    np.testing.assert_array_equal(np.concatenate(core.kept_posterior(graphs, 0, 10)), np.concatenate(first))


# %% The whole of PATTERN


def as_stored(graphs):
    """Graphs as torch_geometric's GNNBenchmarkDataset keeps them raw."""
    rows = []
    for graph in graphs:
        edges = torch.from_numpy(np.stack(graph.adjacency().nonzero()))
        x = F.one_hot(torch.from_numpy(graph.feature).long(), core.PATTERN_SYMBOLS).float()
        rows.append({"x": x, "edge_index": edges, "y": torch.from_numpy(graph.label).long()})
    return rows


def test_the_authors_file_is_read_graph_by_graph(tmp_path):
    splits = {split: core.PatternData(3, split)[: i + 2] for i, split in enumerate(core.GRAPHS_PER_PATTERN)}
    torch.save([as_stored(graphs) for graphs in splits.values()], path := tmp_path / "PATTERN_v2.pt")
    read, sha = core.load_graphs(str(path))
    assert sha == hashlib.sha256(path.read_bytes()).hexdigest()[:16] and list(read) == list(splits)
    for split, graphs in splits.items():
        for one, other in zip(read[split], graphs, strict=True):
            for name in ("edges", "feature", "label"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    drawn = [core.benchmark_graphs(str(path), seed, "test", 3) for seed in range(6)]
    assert len({tuple(len(graph.label) for graph in graphs) for graphs in drawn}) > 1
    with pytest.raises(core.UsageError, match="--val-graphs 4: the val split has 3"):
        core.benchmark_graphs(str(path), 0, "val", 4)
    one, two = core.benchmark_graphs("generated", 5, "val", 7), core.PatternData(5, "val").first(7, "shuffled")
    assert all(np.array_equal(a.edges, b.edges) for a, b in zip(one, two, strict=True))


def bad_rows():
    def change(**new):
        return lambda row: row | new

    good = as_stored(core.PatternData(0)[:1])[0]
    n = len(good["y"])
    one_way = torch.tensor([[0], [1]])
    return {
        "no 'y'": lambda row: {key: row[key] for key in ("x", "edge_index")},
        "0 nodes, where PATTERN's graphs have 30 to 204": change(x=torch.zeros(0, 3)),
        "x is not one-hot": change(x=torch.ones(n, 3)),
        "x is not one-hot [": change(x=torch.zeros(n, 4)),
        "y is not a class": change(y=torch.full((n,), 2)),
        "y is not a class 0 or 1": change(y=good["y"][1:]),
        "edge_index is not": change(edge_index=torch.tensor([[0, n], [n, 0]])),
        "edge_index is not [2, E]": change(edge_index=good["edge_index"].T),
        "edge_index is not [2, E] of": change(edge_index=torch.ones(2, 4)),
        "one way": change(edge_index=one_way),
        "or from a node to itself": change(edge_index=torch.zeros(2, 1, dtype=torch.int64)),
    }


@pytest.mark.parametrize("reason", bad_rows())
def test_a_graph_of_another_form_is_named(tmp_path, reason):
    rows = as_stored(core.PatternData(0)[:2])
    torch.save([rows, rows, [rows[1], bad_rows()[reason](rows[0])]], path := tmp_path / "graphs.pt")
    with pytest.raises(core.UsageError) as error:
        core.load_graphs(str(path))
    assert f"{path}: graph 1 of test: " in str(error.value) and reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps(Hostile()), "two", "rows", "cut"])
def test_a_file_that_is_no_list_of_graphs_is_refused(tmp_path, content):
    path, rows = tmp_path / "graphs.pt", as_stored(core.PatternData(0)[:2])
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"two": [rows, rows], "rows": [rows, rows, 3], "cut": [rows, rows, rows]}[content], path)
        path.write_bytes(path.read_bytes()[: -100 if content == "cut" else None])
    for where in (path, tmp_path, tmp_path / "none.pt"):
        with pytest.raises(core.UsageError, match="--data ") as error:
            core.load_graphs(str(where))
        assert "\n" not in str(error.value)


def rate_behind(lr, scores, patience):
    """The rate behind epochs with these scores: halved whenever more than `patience` in a row were no better."""
    best, waited = -math.inf, 0
    for score in scores:
        best, waited = (score, 0) if score > best else (best, waited + 1)
        if waited > patience:
            lr, waited = lr / 2, 0
    return lr


def whole_task(tmp_path, name, **changes):
    """A tiny training until no better: by epoch, the model, and how it is validated."""
    config = {"model": "gin", "layers": 2, "dim": 8, "degree": "on", "readout": "plain", "divide": 1.0, "lr": 0.01, "clip": 5.0,
              "batch": 3, "epochs": 5, "patience": 0, "least_lr": 1e-6} | changes  # fmt: skip
    graphs, core.Runtime.checkpoint = core.PatternData(0).first(8, "shuffled"), tmp_path / name
    model, held_out = core.build_model(config, 1), core.batches_of(core.PatternData(0, "val").first(4, "shuffled"), 2)

    def validate(model):
        return float(core.class_recalls(core.confusion(*core.evaluate(model, held_out))).mean())

    curves = core.train_until_no_better(config, 1, model, graphs, validate)
    core.Runtime.checkpoint = None
    return curves, model, validate


def test_a_training_that_was_killed_in_an_epoch_goes_on_with_the_same_numbers(tmp_path, monkeypatch):
    how = {"lr": 0.05, "epochs": 8}
    whole, model, _ = whole_task(tmp_path, "whole", **how)
    assert rate_behind(0.05, whole["val_curve"][:5], 0) < 0.05  # which the second run has to know
    step, taken = core.training_step, []

    def dying(*arguments):
        taken.append(1)
        if len(taken) == 17:  # the second step of the sixth epoch
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(core, "training_step", dying)
    with pytest.raises(KeyboardInterrupt):
        whole_task(tmp_path, "cut", **how)
    resumed, again, _ = whole_task(tmp_path, "cut", **how)
    assert len(taken) == 17 + 9 and (tmp_path / "cut").exists()
    for name, curve in whole.items():
        assert len(curve) == 8
        np.testing.assert_array_equal(curve, resumed[name])
    for one, two in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_training_ends_with_its_best_weights_and_with_its_rate(tmp_path):
    curves, model, validate = whole_task(tmp_path, "best", epochs=12, lr=0.05)
    assert validate(model) == curves["val_curve"].max() > curves["val_curve"].min()
    for patience in (0, 1):
        short = whole_task(tmp_path, f"short {patience}", epochs=40, least_lr=0.005, patience=patience)[0]["val_curve"]
        rates = [rate_behind(0.01, short[:i], patience) for i in range(len(short) + 1)]
        assert rates[-1] < 0.005 <= rates[-2] and patience + 2 < len(short) < 40
