"""Every experiment, found by glob: its smoke run, flags, claims, and what its trial reaches."""

import argparse
import importlib
import itertools
import re
import runpy
import sys
from math import comb
from pathlib import Path

import core
import exp_pyramid_edges
from test_core import NUMBERS, exact_powers, exact_vectors

import numpy as np
import pytest
import torch

SCRIPTS = [
    path
    for path in sorted(core.REPOSITORY.glob("exp_*.py"))
    if not re.search(r"^import core_old", path.read_text(encoding="utf-8"), re.MULTILINE)
]
by_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)

# For every flag of every script: settings under which it matters, and the value to change to
EFFECTS = {
    "exp_gating_stability": {
        "mixing": ({}, "softmax"),
        "layers": ({}, 2),
        "lr": ({}, 1e-2),
        "pair_encoding": ({}, "powers"),
        "unreachable": ({}, 1.0),
        "gate_bias": ({}, "degree"),
        "divide_by": ({}, 59.0),
        "norm": ({}, "none"),
        "norm_sees": ({"feedforward_norm": "batch", "graphs": 4}, "padding"),
        "feedforward_norm": ({}, "batch"),
        "before_readout": ({}, "subtract-mean"),
        "dim": ({}, 4),
        "hidden": ({}, 4),
        "graphs": ({}, 3),
        "epochs": ({}, 30),
    },
    "exp_logic_circuit": {
        "gates": ({}, "tables"),
        "width": ({}, 5),
        "depth": ({}, 2),
        "lr": ({}, 0.01),
        "pass_through": ({}, 0.6),
        "batch": ({}, 8),
        "steps": ({}, 100),
        "patience": ({}, 0),
    },
    "exp_pyramid_edges": {"base": ({}, 4), "receptive_field": ({}, 1), "float32": ({}, "off")},
}


def base_settings(module):
    """The values of a script's flags that are not given, in smoke size."""
    _, base, _ = core.parse(module.parser, [])
    return base | module.TINY


def run_trial(module, settings, seed=0):
    """What the trial returns for one seed."""
    job = core.Job(torch.device("cpu"), 1, None)
    config = argparse.Namespace(**settings)
    source = Path(module.__file__).read_text(encoding="utf-8")
    if "seeds_per_batch=" in source:
        return module.trial(config, [seed], job)[0]
    return module.trial(config, seed, job)


def numbers(result):
    """All numbers of a result as one vector per name, NaN as 0."""
    found = {}
    for name, value in result.items():
        array = np.asarray(value)
        if array.dtype.kind in "fiub":
            found[name] = np.nan_to_num(array.astype(float)).ravel()
    return found


def largest_change(one, other):
    """Largest change of a number, relative to the largest number of the same name."""
    change = 0.0
    for name, values in one.items():
        others = other[name]
        if values.shape != others.shape:
            return np.inf
        size = max(np.abs(values).max(initial=0), np.abs(others).max(initial=0), 1e-12)
        change = max(change, np.abs(values - others).max(initial=0) / size)
    return change


@by_script
def test_smoke_run_ends_well_and_writes_nothing(script, monkeypatch, tmp_path, capsys):
    arguments = ["--logbook", tmp_path / "log.md", "--plots", tmp_path, "--runs", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(script), "--smoke", *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")
    assert list(tmp_path.iterdir()) == []
    assert "claim" in capsys.readouterr().out


@by_script
def test_same_seed_gives_the_same_bits(script):
    module = importlib.import_module(script.stem)
    one = numbers(run_trial(module, base_settings(module)))
    other = numbers(run_trial(module, base_settings(module)))
    for name in one:
        assert np.array_equal(one[name], other[name]), name


@by_script
def test_every_flag_has_an_effect_beyond_rounding(script):
    module = importlib.import_module(script.stem)
    base = base_settings(module)
    effects = EFFECTS[script.stem]
    assert set(effects) == set(base)
    for name, (settings, value) in effects.items():
        one = run_trial(module, base | settings)
        other = run_trial(module, base | settings | {name: value})
        assert largest_change(numbers(one), numbers(other)) > 1e-4, name


@by_script
def test_tables_and_claims_name_what_exists(script):
    module = importlib.import_module(script.stem)
    table = module.ARMS | module.ABLATIONS
    base = base_settings(module)
    for name, row in table.items():
        assert set(row) <= set(base), name
    names = [name for claim in module.CLAIMS for name in claim.arms()]
    assert set(names) <= set(table)
    assert set(module.TINY) <= set(base)
    texts = [claim.text for claim in module.CLAIMS]
    assert len(set(texts)) == len(texts)


@by_script
def test_every_bound_of_a_claim_stands_in_the_rule(script):
    module = importlib.import_module(script.stem)
    rule = core.read_doc(script)["Rule"]
    stated = {float(word) for word in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", rule)}
    for claim in module.CLAIMS:
        for check in claim.checks:
            bounds = [abs(x) for x in check.bounds() if np.isfinite(x)]
            missing = [x for x in bounds if x not in {0, 0.5, 1} | stated]
            assert not missing, (claim.text, missing)


@by_script
def test_reach_holds_every_function_that_a_trial_calls(script):
    module = importlib.import_module(script.stem)
    reach = core.reachable_code(script)
    settings = base_settings(module)
    called = set()

    def watch(frame, event, argument):
        code = frame.f_code
        path = Path(code.co_filename)
        if event == "call" and path.parent == core.REPOSITORY and path.suffix == ".py":
            called.add((path.name, code.co_qualname.split(".")[0]))

    core.known_pattern.cache_clear()
    core.upper_triangle.cache_clear()
    sys.setprofile(watch)
    try:
        run_trial(module, settings)
    finally:
        sys.setprofile(None)
    definitions = {(file, name) for file, name in called if not name.startswith("<")}
    unseen = {f"{file}:{name}" for file, name in definitions} - set(reach)
    assert unseen - {f"{Path(__file__).name}:run_trial"} == set()
    assert len(definitions) > 3


# exp_pyramid_edges


@pytest.mark.parametrize(("base", "field"), [(1, 0), (2, 1), (3, 2), (5, 2), (5, 3), (7, 4)])
def test_counts_against_fractions(base, field):
    p = core.pyramid(base)
    codes = exp_pyramid_edges.exact_codes(base, field, NUMBERS)
    counts = exp_pyramid_edges.count_vectors(codes, p.colour)

    one_colour = {}
    for (i, j), vector in exact_vectors(base, field).items():
        one_colour.setdefault(vector, []).append(p.colour[i] == p.colour[j])
    ambiguous = {vector for vector, same in one_colour.items() if len(set(same)) == 2}
    zero = tuple([0] * (field + 1))
    assert counts["unique"] == len(one_colour)
    assert counts["ambiguous"] == len(ambiguous - {zero})
    assert counts["zero is ambiguous"] == (zero in ambiguous)
    assert counts["share"] == 1 - len(one_colour.get(zero, [])) / codes.size


def test_count_of_several_pyramids_together():
    vectors = set()
    for base in range(1, 6):
        vectors |= set(exact_vectors(base, 2).values())
    assert exp_pyramid_edges.count_together(range(1, 6), 2, NUMBERS) == len(vectors) == 27


def hops(n, edges):
    """Distances in hops, by Floyd and Warshall's algorithm: [n, n]."""
    far = np.full((n, n), n)
    np.fill_diagonal(far, 0)
    for i, j in edges:
        far[i, j] = far[j, i] = 1
    for middle in range(n):
        far = np.minimum(far, far[:, middle, None] + far[middle])
    return far


@pytest.mark.parametrize("base", [1, 2, 3, 5])
@pytest.mark.parametrize("field", [0, 1, 3, 6])
def test_bound_by_brute_force(base, field):
    """Orbits under all automorphisms, which are fixed by where they take the corners."""
    p = core.pyramid(base)
    n = len(p.row)
    edges = {tuple(sorted(edge)) for edge in p.edges.tolist()}
    far = hops(n, edges)
    degree = [sum(i in edge for edge in edges) for i in range(n)]
    corners = [0, n - base, n - 1]
    place = {tuple(far[i, corners]): i for i in range(n)}
    symmetries = set()
    for order in itertools.permutations(corners):
        symmetries.add(tuple(place[tuple(far[i, list(order)])] for i in range(n)))
    for g in symmetries:
        assert {tuple(sorted((g[i], g[j]))) for i, j in edges} == edges

    orbits = set()
    for i, j in itertools.product(range(n), repeat=2):
        images = {(g[i], g[j]) for g in symmetries}
        if degree[i] == degree[j]:
            images |= {(g[j], g[i]) for g in symmetries}
        orbits.add(min(images) if far[i, j] <= field else None)
    assert exp_pyramid_edges.count_orbits(p, field) == len(orbits)
    assert len(set(exact_vectors(base, field).values())) <= len(orbits)


def test_float32_splits_equal_vectors_and_keeps_the_zero_vector():
    order = np.random.default_rng(0).permutation(55)
    colour = core.pyramid(10).colour
    for numbering in (np.arange(55), order):
        codes = exp_pyramid_edges.float32_codes(10, 4, numbering)
        exact = exp_pyramid_edges.exact_codes(10, 4, NUMBERS)[numbering][:, numbering]
        assert ((codes == 0) == (exact == 0)).all()
        counts = exp_pyramid_edges.count_vectors(codes, colour[numbering])
        assert counts["unique"] > len(np.unique(exact)) == 118


def test_power_vectors_against_fractions_and_renumbered():
    vectors = exp_pyramid_edges.power_vectors(5, 3, torch.float64, np.arange(15))
    for pair, exact in exact_vectors(5, 3).items():
        np.testing.assert_allclose(vectors[pair], [float(x) for x in exact], atol=1e-15)
    order = np.random.default_rng(1).permutation(15)
    renumbered = exp_pyramid_edges.power_vectors(5, 3, torch.float64, order)
    np.testing.assert_allclose(renumbered, vectors[order][:, order], atol=1e-15)


def test_prediction():
    predict = exp_pyramid_edges.predict_ambiguous
    found = [field for field in range(100) if predict(200, field) > 0]
    consecutive = [5 * m + 4 for m in range(20) if m % 3 < 2]  # C(r, k) = 3/2 C(r, k - 1)
    assert found == sorted([*consecutive, 98])  # and C(98, 45) = 3/2 C(98, 43)
    assert 2 * comb(98, 45) == 3 * comb(98, 43)
    assert predict(7, 4) == 1
    assert predict(6, 4) == 0  # no inner node is 4 steps from another


def test_why_base_3_is_an_exception():
    """P^k from a corner to another is P^k from the middle of a side to the corner opposite."""
    p = core.pyramid(3)
    corner, other, middle = 0, 3, 4  # (0, 0), (2, 0) and, opposite the first, (2, 1)
    powers = exact_powers(6, p.edges.tolist(), 30)
    for power in powers:
        assert power[other][corner] == power[middle][corner]
    assert p.colour[other] != p.colour[corner]
    assert p.colour[middle] == p.colour[corner]
