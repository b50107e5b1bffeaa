"""The papers' claims: their commands, and the results that are kept in tests/results/."""

import json
import shlex

import claims
import pytest
from conftest import ROOT, TINY

import moco
import simclr
import supcon
import swav

MODULES = {"simclr.py": simclr, "moco.py": moco, "swav.py": swav, "supcon.py": supcon}
COMMANDS = [(name, run) for name, claim in claims.CLAIMS.items() for run in claim.runs]
KEPT = sorted(claims.RESULTS.glob("*/*"))
MEASURES = ("kNN", "linear", "kNN (10 a class)", "linear (10 a class)")


def parsed(command, seed):
    """The settings that a command has on the bundled images."""
    script, *words = shlex.split(command)
    module = MODULES[script]
    preset = module.PRESETS["fashion-mini"]
    return vars(module.parse_arguments([*words, "--seed", str(seed)], preset))


@pytest.mark.parametrize(("name", "run"), COMMANDS)
def test_the_command_of_a_claim_is_one_that_its_script_takes(name, run):
    assert parsed(claims.CLAIMS[name].runs[run], 0)["data"] == "fashion-mini"


@pytest.mark.parametrize("kept", KEPT, ids=[f"{path.parent.name}-{path.name}" for path in KEPT])
def test_kept_results_are_from_the_command_of_their_claim(kept):
    run, seed = kept.name.rsplit("-", 1)
    expected = parsed(claims.CLAIMS[kept.parent.name].runs[run], int(seed))
    used = json.loads((kept / "config.json").read_text())["settings"]
    for flag, value in expected.items():
        # Some are chosen by the images if they are None, and some do not change the results.
        if value is not None and flag in used and flag != "root":
            assert used[flag] == value, flag
    last = json.loads((kept / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == expected["epochs"]


@pytest.mark.parametrize("method", ["moco", "swav"])
def test_the_first_table_of_the_readme_is_what_the_results_say(method):
    seeds = claims.read_runs("methods", method)
    assert len(seeds) == 3
    cells = [claims.format_mean([values[measure] for values in seeds]) for measure in MEASURES]
    lines = (ROOT / "README.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith(f"| `{method}.py` |"))
    assert row.endswith(f"| {' | '.join(cells)} |")


def test_a_claim_is_run_once_and_its_table_has_the_means(folder, tmp_path, monkeypatch, capfd):
    command = f"simclr.py --data {folder} {' '.join(TINY)}"
    claim = claims.Claim("It runs.", claims.vary(command, "--head-layers", [0, 1]), seeds=1)
    monkeypatch.setitem(claims.CLAIMS, "tiny", claim)
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(claims, "RUNS", tmp_path / "runs")
    claims.main(["tiny"])
    first = capfd.readouterr().out
    results = json.loads((tmp_path / "results/tiny/1-0/results.json").read_text())
    assert f"| {results[0]['linear']['mean']:.1f} |" in first and "time left" in first

    claims.main(["tiny"])
    again = capfd.readouterr().out
    assert "time left" not in again and again.splitlines()[-3:] == first.splitlines()[-3:]
    claims.main(["--list"])
    assert "tiny: 2 of 2 runs. It runs." in capfd.readouterr().out
