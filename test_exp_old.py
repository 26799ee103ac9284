"""A smoke run of every experiment that imports core_old, found by that import, in a temporary folder."""

import importlib
import re
from pathlib import Path

import pytest

import core_old

HERE = Path(__file__).resolve().parent
SCRIPTS = sorted(path.stem for path in HERE.glob("exp_*.py") if re.search("^import core_old", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", SCRIPTS)
def test_smoke_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    experiment = importlib.import_module(name).EXPERIMENT
    places = ["--logbook", str(tmp_path / "logbook.md"), "--plots", str(tmp_path / "plots"), "--runs", str(tmp_path / "runs")]
    assert core_old.main(experiment, ["--smoke", *places]) == 0
    told = capsys.readouterr().out
    assert all(core_old.plain(claim.text) in told for claim in experiment.claims)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
