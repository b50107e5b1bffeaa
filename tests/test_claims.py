"""The papers' claims: their commands, and the results that are kept in tests/results/."""

import json
import re
import shlex
import sys

import claims
import features_after_head
import pytest
import torch
from conftest import ROOT, TINY, run, settings
from PIL import Image

import common
import drlim
import linear_eval
import moco
import simclr
import supcon
import swav

MODULES = {"simclr.py": simclr, "moco.py": moco, "swav.py": swav, "supcon.py": supcon}
MODULES |= {"drlim.py": drlim, "tests/swav_without_partition.py": swav}
COMMANDS = sorted({command for claim in claims.CLAIMS.values() for command in claim.commands})
KEPT = sorted(claims.RESULTS.glob("*/seed-*"))
MEASURES = ("kNN", "linear", "kNN (10 a class)", "linear (10 a class)")


def parsed(command, seed):
    """The settings that a command has on the bundled images."""
    script, *words = shlex.split(re.sub("{.*}", "ENCODER", command))
    if script == "tests/features_after_head.py":
        return {"data": None}
    if script == "linear_eval.py":
        return vars(linear_eval.parse_arguments(words))
    module = MODULES[script]
    words += ["--seed", str(seed)]
    if module is drlim:
        return vars(drlim.parse_arguments(words))
    return vars(module.parse_arguments(words, module.PRESETS["fashion-mini"]))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_of_a_claim_is_one_that_its_script_takes(command):
    assert parsed(command, 0)["data"] in ("fashion-mini", None)


def test_commands_have_folders_of_their_own():
    assert len({claims.place(command, 0) for command in COMMANDS}) == len(COMMANDS)


@pytest.mark.parametrize("kept", KEPT, ids=[str(path.relative_to(claims.RESULTS)) for path in KEPT])
def test_kept_results_are_from_the_command_of_a_claim(kept):
    seed = int(kept.name.removeprefix("seed-"))
    (command,) = (c for c in COMMANDS if claims.RESULTS / claims.place(c, seed) == kept)
    expected = parsed(command, seed)
    if (kept / "eval.json").exists():
        used = json.loads((kept / "eval.json").read_text())[0]["settings"]
        assert all(used[flag] == expected[flag] for flag in ("labels", "protocol", "seeds"))
        return
    if "features_after_head" in command:
        assert (kept / "results.json").exists()
        return
    used = json.loads((kept / "config.json").read_text())["settings"]
    for flag, value in expected.items():
        # Some are chosen by the images if they are None, and some do not change the results.
        if value is not None and flag in used and flag != "root":
            assert used[flag] == value, flag
    last = json.loads((kept / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == expected["epochs"]


@pytest.mark.parametrize("method", ["simclr", "moco", "swav", "supcon"])
def test_the_first_table_of_the_readme_is_what_the_results_say(method):
    runs = claims.read_runs(f"{method}.py")
    assert len(runs) == 3
    cells = [claims.format_mean([values[measure] for values in runs]) for measure in MEASURES]
    lines = (ROOT / "README.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith(f"| `{method}.py` |"))
    assert row.endswith(f"| {' | '.join(cells)} |")


@pytest.mark.parametrize(
    ("label", "method", "number"),
    [
        ("the encoder of `simclr.py`, untrained", "simclr", 1),
        ("the encoder of `moco.py`, untrained", "moco", 1),
        ("raw pixels", "simclr", 2),
    ],
)
def test_the_untrained_rows_of_that_table_are_what_the_results_say(label, method, number):
    rows = []
    for path in sorted((claims.RESULTS / method).glob("seed-*/results.json")):
        rows.append(json.loads(path.read_text())[number])
    means = [[row[measure]["mean"] for row in rows] for measure in MEASURES]
    cells = [claims.format_mean(values) for values in means]
    assert f"| {label} | | | {' | '.join(cells)} |" in (ROOT / "README.md").read_text().splitlines()


@pytest.mark.parametrize(
    ("images", "start"),
    [
        ("mnist-epochs-3", "| MNIST, seed 0 |"),
        ("photographs-epochs-30", "| 1,000 photographs, seed 0 |"),
        ("photographs-128-epochs-10", "| the photographs at 128 pixels, seed 0 |"),
        ("cifar10-epochs-40", "| CIFAR-10, seed 0 |"),
    ],
)
def test_the_table_of_other_images_is_what_the_results_say(images, start):
    lines = (ROOT / "README.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith(start))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    folder = claims.RESULTS / "other-images"

    for method, cell in zip(("simclr", "moco", "swav", "supcon"), (2, 4, 5, 6), strict=True):
        kept = folder / f"{method}-{images}"
        last = json.loads((kept / "metrics.jsonl").read_text().splitlines()[-1])
        used = json.loads((kept / "config.json").read_text())["settings"]
        assert cells[cell] == f"{last['knn']:.1f}"
        assert (used["method"].split("-")[0], used["stem"], used["seed"]) == (method, "7x7", 0)
        assert f"--epochs {last['epoch']}" in cells[1] and last["epoch"] == used["epochs"]
        assert used["limit"] == 10_000  # more than there are photographs
        assert "--limit 10000" in cells[1] or "photographs" in images

    for normalize, cell in (("none", 3), ("imagenet", 7)):
        kept = folder / f"untrained-{images.split('-epochs')[0]}-{normalize}"
        runs = json.loads((kept / "eval.json").read_text())[-1]["runs"]
        assert len(runs) == 3
        assert cells[cell] == claims.format_mean([values["top-1"] for values in runs])


def test_the_tables_are_what_the_results_say():
    assert (claims.RESULTS / "README.md").read_text() == claims.all_tables()
    readme = (ROOT / "README.md").read_text().splitlines()
    for name, claim in claims.CLAIMS.items():
        if claim.finding:
            assert claims.summary(name) in readme, name


def test_a_claim_is_run_once_and_its_table_has_the_means(folder, tmp_path, monkeypatch, capfd):
    base = f"simclr.py --data {folder} {' '.join(TINY)}"
    claim = claims.Claim("It runs.", base, [""])
    of_encoder = f"linear_eval.py --seeds 2 {{{base}}} --protocol knn --labels 2 --knn-k 3"
    monkeypatch.setitem(claims.CLAIMS, "tiny", claim)
    monkeypatch.setitem(claims.CLAIMS, "eval", claims.Claim("", "", [of_encoder], ("top-1",)))
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(claims, "RUNS", tmp_path / "runs")
    claims.main(["tiny", "--seeds", "2"])
    first = capfd.readouterr().out
    linear = []
    for seed in (0, 1):
        kept = tmp_path / "results" / claims.place(base, seed)
        linear.append(json.loads((kept / "results.json").read_text())[0]["linear"]["mean"])
    assert f"| {claims.format_mean(linear)} |" in first and "time left" in first

    claims.main(["tiny", "--seeds", "2"])
    again = capfd.readouterr().out
    assert "time left" not in again and again.splitlines()[-3:] == first.splitlines()[-3:]
    claims.main(["--list"])
    assert "tiny: 1 of 1 commands are run. It runs." in capfd.readouterr().out

    claims.main(["tiny", "--plot"])
    with Image.open(tmp_path / "results" / "tiny.png") as picture:
        colors = picture.convert("RGB").getcolors(10**6)
        assert picture.size[0] > picture.size[1] and len(colors) > 9

    capfd.readouterr()
    claims.main(["eval"])  # with the encoder that is there
    printed = capfd.readouterr().out
    (record,) = json.loads(
        (tmp_path / "runs" / claims.place(of_encoder, 0) / "eval.json").read_text()
    )
    accuracy = [one["top-1"] for one in record["runs"]]
    assert f"| {claims.format_mean(accuracy)} | 2 |" in printed and "time left" not in printed


def test_features_after_the_head_are_not_those_before_it(folder, tmp_path, monkeypatch):
    out = run("simclr", folder, tmp_path / "run")
    argv = [out / "encoder.safetensors", "--out", tmp_path / "z"]
    monkeypatch.setattr(sys, "argv", ["features_after_head.py", *map(str, argv)])
    features_after_head.main()
    (row,) = json.loads((tmp_path / "z" / "results.json").read_text())

    _, bank, test, _ = common.load_splits(str(folder), "data", None, torch.device("cpu"))
    network = features_after_head.load_network(out, settings(out))
    assert common.extract_features(network, test, 12).shape == (18, 8)
    assert row["kNN"]["mean"] == common.knn_accuracy(network, bank, test, 12)
    encoder, _ = common.load_encoder(out / "encoder.safetensors")
    torch.testing.assert_close(
        common.extract_features(network[0], test, 12), common.extract_features(encoder, test, 12)
    )
