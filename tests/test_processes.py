"""Two real processes, each with its own half of every batch, do what one process does."""

import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import gather
from conftest import (
    METHODS,
    OWN,
    ROOT,
    TINY,
    arguments,
    assert_same_end,
    checkpoint,
    command,
    finish,
    metrics,
    start,
)
from torch import nn

import common
import drlim
import moco
import simclr
import supcon
import swav

# --------------------------------------------------------------------------------------
# What the processes do
# --------------------------------------------------------------------------------------


def without_batch_statistics(*_, **__):
    """An encoder without batch norm, of which each process has its own on CPUs."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.GroupNorm(2, 8), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    net.width = 8
    return net


def save_steps(folder, out):
    """Save the batches, the parameter gradients of SimCLR's loss, and features."""
    accelerator = Accelerator()
    images, _, test = common.load_splits(folder, "nowhere", None, accelerator.device, 1)
    recipe = simclr.augmentation(["crop", "color", "gray"], 12, 0.08, 0.5)
    steps = list(common.batches(images, [(2, recipe)], 8, 0, 0, 3))

    torch.manual_seed(0)
    net = nn.Sequential(*without_batch_statistics(), nn.Linear(8, 6))
    odd = torch.arange(17)
    features = common.extract_features(net, test.take(odd), 12)
    files = common.load_splits(folder, "nowhere", None, accelerator.device, 1, stream=True)[2]
    features_of_files = common.extract_features(net, files.take(odd), 12, batch=4)
    model = accelerator.prepare(net)
    for _, (views,) in steps:
        z = model(views.flatten(0, 1)).unflatten(0, (2, -1)).transpose(0, 1)
        z1, z2 = simclr.gather(z, accelerator).unbind(1)
        loss = simclr.nt_xent(z1, z2, 0.2)
        accelerator.backward(loss)

    saved = {f"grad {name}": p.grad for name, p in net.named_parameters()}
    saved |= {"loss": loss.detach()[None], "features": features}
    saved["features of files"] = features_of_files
    saved["index"] = torch.cat([gather(index) for index, _ in steps])
    views = [gather(views.transpose(0, 1).contiguous()) for _, (views,) in steps]
    saved["views"] = torch.cat(views)
    if accelerator.is_main_process:
        torch.save(saved, out)
    accelerator.end_training()


def keep_gradients(optimizer, kept):
    """An optimizer class that keeps the gradients of each step."""

    class Keeping(optimizer):
        def step(self, closure=None):
            parameters = self.param_groups[0]["params"]
            kept.append([p.grad.clone() for p in parameters if p.grad is not None])
            super().step(closure)

    return Keeping


def keep_arguments(module, name, keys, kept):
    """Let a loss keep its first two arguments, of all processes; for MoCo the queues as well."""
    real = getattr(module, name)

    def keeping(*args):
        rows = [v.detach().transpose(0, 1) if v.ndim == 3 else v.detach() for v in args[:2]]
        kept.append({key: gather(v.contiguous()) for key, v in zip(keys, rows, strict=True)})
        if module is moco:
            kept[-1]["queues"] = gather(args[2].clone()[None])
        return real(*args)

    setattr(module, name, keeping)


def allow_several_runs():
    """Keep the processes connected at the end of a run, so that another one can follow."""
    Accelerator.end_training = lambda self: None


def save_methods(folder, out):
    """Run some steps of all methods, and save what must not depend on the number of processes."""
    allow_several_runs()
    shared = "--max-steps 5 --optimizer sgd --warmup-epochs 0 --lr 0.1 --batch-size 8"
    own = {
        "moco": "--bn-splits 4 --queue-size 20 --key-momentum 0.5",
        "swav": "--prototypes 4 --head-layers 1 --queue-size 10 --queue-start 0.2 "
        "--freeze-prototypes 0.4",
        "supcon": "--head-layers 1 --label-noise 0.3",
        "ce": "--head-layers 1 --label-noise 0.3 --loss ce",
    }
    graph = "--epochs 3 --batch-size 48 --ratio 2 --lr 0.1"
    build_encoder, sgd = common.build_encoder, torch.optim.SGD
    steps, gradients, saved = [], [], {}
    keep_arguments(moco, "info_nce", ("q", "k"), steps)
    keep_arguments(swav, "swapped_prediction_loss", ("scores", "codes"), steps)
    # Adam would magnify rounding.
    torch.optim.SGD = torch.optim.Adam = keep_gradients(sgd, gradients)
    for name in ("moco", "swav", "supcon", "ce", "drlim"):
        # MoCo's batch norm is in groups, and the paper's network of DrLIM has none.
        uses_own = name in ("moco", "drlim")
        common.build_encoder = build_encoder if uses_own else without_batch_statistics
        module = {"moco": moco, "swav": swav, "drlim": drlim}.get(name, supcon)
        flags = graph.split() if name == "drlim" else [*TINY, *shared.split(), *own[name].split()]
        module.main(["--data", folder, "--out", f"{out}-{name}", *flags])
        saved[name] = {"steps": [*steps], "gradients": gradients[:5]}
        steps.clear()
        gradients.clear()
    if common.PartialState().is_main_process:
        torch.save(saved, out)


def stop_and_continue(folder, out):
    """For each method: a whole run, and one that is interrupted within an epoch and resumed."""
    allow_several_runs()
    own = {**OWN, "moco": ["--symmetric"], "swav": ["--prototypes", "4"]}
    modules = {"simclr": simclr, "moco": moco, "swav": swav, "supcon": supcon, "drlim": drlim}
    for name, module in modules.items():
        argv = ["--data", folder, *TINY, "--batch-size", "8", *own[name]]
        if name == "drlim":
            argv = ["--data", folder, "--batch-size", "8", "--epochs", "2"]
        module.main([*argv, "--out", f"{out}/{name}-whole"])
        module.SAVE_MINUTES = 0  # It saves after each step.
        real = module.save_run

        def save_and_stop(out, state, real=real):
            real(out, state)
            if state["step"] == 4:
                raise KeyboardInterrupt

        # Only the main process saves. The other one is stopped at the same step.
        module.save_run = save_and_stop
        learning_rate = module.learning_rate

        def stop(step, *args, learning_rate=learning_rate):
            if step == 4 and not common.PartialState().is_main_process:
                raise KeyboardInterrupt
            return learning_rate(step, *args)

        module.learning_rate = stop
        try:
            module.main([*argv, "--out", f"{out}/{name}"])
        except KeyboardInterrupt:
            print(f"{name} was stopped")
        module.save_run, module.learning_rate = real, learning_rate
        module.main([*argv, "--out", f"{out}/{name}"])


# --------------------------------------------------------------------------------------
# What is the same
# --------------------------------------------------------------------------------------


def on_one_and_two(function, folder, out):
    """Run a function on one process and, meanwhile, on two; gives what it saved in each case."""
    name = f"test_processes.{function}"
    cases = [
        start(name, folder, out / str(n), output=out / f"{n}.txt", processes=n) for n in (1, 2)
    ]
    for case in cases:
        code, text = case.wait()
        assert code == 0, text
    return [torch.load(out / str(n), weights_only=True) for n in (1, 2)]


@pytest.fixture(scope="module")
def steps(folder, tmp_path_factory):
    return on_one_and_two("save_steps", folder, tmp_path_factory.mktemp("steps"))


def test_parameter_gradients_are_those_of_the_one_big_batch(steps):
    one, two = steps
    gradients = [name for name in one if name.startswith("grad")]
    assert len(gradients) == 6
    for name in ("loss", *gradients):
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-5)
        assert one[name].abs().max() > 1e-4


def test_batches_and_views_are_the_halves_of_the_one_batch(steps):
    one, two = steps
    assert torch.equal(one["index"], two["index"]) and len(one["index"].unique()) == 24
    assert torch.equal(one["views"], two["views"])


def test_features_of_an_odd_number_of_images_count_each_once(steps):
    one, two = steps
    assert one["features"].shape == (17, 6)
    torch.testing.assert_close(two["features"], one["features"])
    for case in steps:
        torch.testing.assert_close(case["features of files"], one["features"])


@pytest.fixture(scope="module")
def methods(few, tmp_path_factory):
    out = tmp_path_factory.mktemp("methods")
    saved = on_one_and_two("save_methods", few, out)
    for n, case in enumerate(saved, 1):
        for name, value in case.items():
            value["rows"] = metrics(out / f"{n}-{name}")
    return saved


@pytest.mark.parametrize("name", ["moco", "swav", "supcon", "ce", "drlim"])
def test_a_methods_gradients_and_rows_are_those_of_one_process(methods, name):
    one, two = (case[name] for case in methods)
    assert len(one["gradients"]) == len(two["gradients"]) == 5
    for mine, theirs in zip(two["gradients"], one["gradients"], strict=True):
        assert len(mine) == len(theirs) > 3
        assert max(v.abs().max() for v in theirs) > 1e-4
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    for key in ("loss", "spread"):
        values = [[row[key] for row in case["rows"]] for case in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_mocos_keys_queue_and_permutation_are_those_of_one_process(methods):
    # Batch norm is in 4 groups of 2: another permutation would give other keys.
    for one, two in zip(methods[0]["moco"]["steps"], methods[1]["moco"]["steps"], strict=True):
        for name in ("q", "k"):
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)
        first, second = two["queues"]
        assert torch.equal(first, second)  # Both processes hold all keys.
        torch.testing.assert_close(first, one["queues"][0], rtol=1e-3, atol=1e-5)


def test_swavs_codes_are_those_of_one_process(methods):
    for one, two in zip(methods[0]["swav"]["steps"], methods[1]["swav"]["steps"], strict=True):
        for name in ("scores", "codes"):
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def stopped(few, tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    name = "test_processes.stop_and_continue"
    code, text = start(name, few, out, output=out / "text", processes=2).wait()
    assert code == 0, text
    return out, text


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_two_processes_that_was_stopped_ends_as_one_that_was_not(stopped, method):
    out, text = stopped
    assert text.count(f"{method} was stopped") == 2  # on both processes
    assert_same_end(out / method, out / f"{method}-whole")
    assert not list((out / method).glob(".partial*"))


# --------------------------------------------------------------------------------------
# Real launchers
# --------------------------------------------------------------------------------------


def test_a_run_under_torchrun_leaves_the_files_of_one_run(few, tmp_path):
    out = tmp_path / "run"
    argv = arguments("simclr", few, out, "--batch-size 8")
    code, text, err = finish(command("simclr.py", *argv, processes=2))
    assert code == 0, err
    assert [row["step"] for row in metrics(out)] == [3, 6] and checkpoint(out)["step"] == 6
    assert text.count("test accuracy in percent") == 1
    assert not list(out.glob(".partial*"))
    encoder = common.load_encoder(out / "encoder.safetensors")[0]
    _, bank, test = common.load_splits(str(few), "nowhere", None, torch.device("cpu"), 1)
    knn = common.knn_accuracy(encoder, bank, test, 12)
    assert metrics(out)[-1]["knn"] == pytest.approx(knn)  # though each process has its own BN


def test_bad_data_is_one_line_of_ours_under_torchrun(tmp_path):
    argv = arguments("simclr", tmp_path / "missing", tmp_path / "run")
    code, _, err = finish(command("simclr.py", *argv, processes=2))
    assert code != 0 and err.count("error: --data") == 1 and 'simclr.py", line' not in err


def test_a_batch_that_processes_cannot_share_is_refused_once(few, tmp_path):
    argv = arguments("simclr", few, tmp_path / "run", "--batch-size 9")
    code, text = start("simclr", *argv, output=tmp_path / "text", processes=2).wait()
    assert code == 2 and text.count("error: --batch-size") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["simclr.py", "linear_eval.py"])
def test_fewer_processes_than_asked_for_is_said(script, few, tmp_path):
    argv = arguments("simclr", few, tmp_path / "run")
    if script == "linear_eval.py":
        argv = ["random", "--arch", "small", *argv[:4]]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += [str(ROOT / script), *argv]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "error: several processes were asked for" in done.stderr
    assert not (tmp_path / "run").exists()
