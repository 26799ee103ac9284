"""Every experiment, found by glob: its smoke run, flags, claims, and what its trial reaches."""

import argparse
import importlib
import re
import runpy
import sys
from pathlib import Path

import core

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
