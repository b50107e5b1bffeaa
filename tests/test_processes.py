"""Two real processes, each with its own half of every batch."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, command, finish, metrics

import common


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("processes")
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        for processes in (1, 2):
            process = command(
                "tests/two_processes.py", folder, out / str(processes), processes=processes
            )
            code, _, err = finish(process)
            assert code == 0, err
    finally:
        del os.environ["PYTHONPATH"]
    return [torch.load(out / n, weights_only=True) for n in ("1", "2")]


def test_parameter_gradients_are_those_of_the_one_big_batch(saved):
    one, two = saved
    gradients = [name for name in one if name.startswith("grad")]
    assert len(gradients) == 6
    for name in ("loss", *gradients):
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-5)
        assert one[name].abs().max() > 1e-4


def test_batches_and_views_are_the_halves_of_the_one_batch(saved):
    one, two = saved
    assert torch.equal(one["index"], two["index"]) and len(one["index"].unique()) == 24
    assert torch.equal(one["views"], two["views"])


def test_features_of_an_odd_number_of_images_count_each_once(saved):
    one, two = saved
    assert one["features"].shape == (17, 6)
    torch.testing.assert_close(two["features"], one["features"])


def test_simclr_on_two_processes_leaves_one_run_that_goes_on(folder, tmp_path):
    out = tmp_path / "run"
    argv = ["--data", folder, "--out", out, *TINY, "--seed", "1", "--batch-size", "8"]
    code, _, err = finish(command("simclr.py", *argv, processes=2))
    assert code == 0, err
    assert [row["step"] for row in metrics(out)] == [6, 12]
    assert (out / "results.json").exists()
    assert not list(out.glob(".partial*"))
    (out / "results.json").unlink()
    code, text, err = finish(command("simclr.py", *argv, processes=2))
    assert code == 0 and "going on after step 12 of 12" in text, err
    encoder = out / "encoder.safetensors"
    argv = [encoder, "--data", folder, "--seeds", "1", "--protocol", "knn"]
    code, text, err = finish(command("linear_eval.py", *argv, processes=2))
    assert code == 0 and text.count("top-1") == 2, err
    alone = common.load_encoder(encoder)[0]
    _, bank, test = common.load_splits(str(folder), "nowhere", None, torch.device("cpu"), 1)
    knn = common.knn_accuracy(alone, bank, test, 12)
    assert f"top-1 {knn:.2f}" in text
    assert metrics(out)[-1]["knn"] == pytest.approx(knn)  # though each process has its own BN


def test_bad_data_is_one_line_on_two_processes(folder, tmp_path):
    argv = ["--data", tmp_path / "missing", "--out", tmp_path / "run", *TINY]
    code, _, err = finish(command("simclr.py", *argv, processes=2))
    assert code != 0 and err.count("error: --data") == 1 and 'simclr.py", line' not in err


def test_a_batch_that_processes_cannot_share_is_refused_once(folder, tmp_path):
    argv = ["--data", folder, "--out", tmp_path / "run", *TINY, "--batch-size", "9"]
    code, _, err = finish(command("simclr.py", *argv, processes=2))
    assert code != 0 and err.count("error: --batch-size") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["simclr.py", "linear_eval.py"])
def test_fewer_processes_than_asked_for_is_said(script, folder, tmp_path):
    argv = ["random"] if script == "linear_eval.py" else TINY
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        str(ROOT / script),
        *argv,
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "error: Accelerate runs one process" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def methods(folder, tmp_path_factory):
    """Steps of the methods on one process and on two."""
    out, saved = tmp_path_factory.mktemp("methods"), {}
    shared = [
        "--data",
        folder,
        *TINY,
        "--batch-size",
        "8",
        "--max-steps",
        "5",
        "--optimizer",
        "sgd",
        "--warmup-epochs",
        "0",
        "--lr",
        "0.1",
    ]
    more = {
        "moco": ["--bn-splits", "4", "--queue-size", "20", "--key-momentum", "0.5"],
        "swav": [
            "--prototypes",
            "4",
            "--head-layers",
            "1",
            "--queue-size",
            "10",
            "--queue-start",
            "0.2",
            "--freeze-prototypes",
            "0.4",
        ],
        "supcon": ["--head-layers", "1", "--label-noise", "0.3"],
    }
    methods = {method: [*shared, *own] for method, own in more.items()}
    methods["supcon, ce"] = [*methods["supcon"], "--loss", "ce"]
    methods["drlim"] = [
        "--data",
        folder,
        "--epochs",
        "1",
        "--batch-size",
        "48",
        "--ratio",
        "2",
        "--lr",
        "0.1",
    ]
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        for method in methods:
            for n in (1, 2):
                path = out / f"{method}{n}"
                argv = [method.split(",")[0], path, *methods[method], "--out", f"{path}-run"]
                code, _, err = finish(command("tests/two_methods.py", *argv, processes=n))
                assert code == 0, err
                saved[method, n] = torch.load(path, weights_only=True)
                saved[method, n]["rows"] = metrics(path.with_name(f"{path.name}-run"))
    finally:
        del os.environ["PYTHONPATH"]
    return saved


@pytest.mark.parametrize("method", ["moco", "swav", "supcon", "supcon, ce", "drlim"])
def test_a_methods_gradients_and_rows_on_two_processes_are_those_on_one(methods, method):
    one, two = methods[method, 1], methods[method, 2]
    assert len(one["gradients"]) == len(two["gradients"]) == 5
    for mine, theirs in zip(two["gradients"], one["gradients"], strict=True):
        assert len(mine) == len(theirs) > 3
        assert max(v.abs().max() for v in theirs) > 1e-3
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert [row["loss"] for row in two["rows"]] == pytest.approx(
        [row["loss"] for row in one["rows"]], rel=1e-4
    )


def test_mocos_keys_queue_and_permutation_on_two_processes_are_those_on_one(methods):
    # Batch norm in 4 groups of 2: another permutation would give other keys.
    for one, two in zip(methods["moco", 1]["steps"], methods["moco", 2]["steps"], strict=True):
        for name in ("q", "k"):
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)
        first, second = two["queues"]
        assert torch.equal(first, second)  # both processes hold all keys
        torch.testing.assert_close(first, one["queues"][0], rtol=1e-3, atol=1e-5)


def test_swavs_codes_on_two_processes_are_those_on_one(methods):
    for one, two in zip(methods["swav", 1]["steps"], methods["swav", 2]["steps"], strict=True):
        for name in ("scores", "codes"):
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["moco", "swav", "supcon", "drlim"])
def test_a_method_on_two_processes_leaves_one_run_that_goes_on(method, folder, tmp_path):
    own = {"moco": ["--symmetric"], "swav": ["--prototypes", "4"]}.get(method, [])
    argv = ["--data", folder, *TINY, "--batch-size", "8", *own, "--out", tmp_path / "run"]
    if method == "drlim":
        argv = ["--data", folder, "--batch-size", "8", "--epochs", "9", *argv[-2:]]
    whole = [*argv[:-1], tmp_path / "whole"]
    code, _, err = finish(command(f"{method}.py", *whole, processes=2))
    assert code == 0, err
    process = command(f"{method}.py", *argv, processes=2)
    while not (tmp_path / "run" / "checkpoint.pt").exists() and process.poll() is None:
        pass
    process.terminate()
    finish(process)
    code, _, err = finish(command(f"{method}.py", *argv, processes=2))
    assert code == 0, err
    ends = [
        torch.load(out / "checkpoint.pt", weights_only=True)
        for out in (tmp_path / "whole", tmp_path / "run")
    ]
    for name, value in ends[0]["model"].items():
        assert torch.equal(value, ends[1]["model"][name])
