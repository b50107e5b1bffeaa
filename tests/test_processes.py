"""Several real processes, each with its own part of every batch, do what one process does."""

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate.utils import gather
from conftest import (
    METHODS,
    OWN,
    ROOT,
    TIMES,
    TINY,
    TINY_DRLIM,
    arguments,
    assert_same_end,
    checkpoint,
    command,
    finish,
    flatten,
    metrics,
    start,
    write_folder,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common
import drlim
import linear_eval
import moco
import simclr
import supcon
import swav

MODULES = {"simclr": simclr, "moco": moco, "swav": swav, "supcon": supcon, "drlim": drlim}
# "groups" is moco.py with batch norm in groups, and "ce" is supcon.py --loss ce.
NAMES = ("simclr", "moco", "groups", "swav", "supcon", "ce", "drlim")

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


def save_features(folder, out):
    """Save the features of an odd number of images, in memory and in files."""
    accelerator = common.start_accelerator()
    _, _, test, _ = common.load_splits(folder, "nowhere", None, accelerator.device, 1)
    files = common.load_splits(folder, "nowhere", None, accelerator.device, 1, stream=True)[2]
    torch.manual_seed(0)
    net = without_batch_statistics()
    odd = torch.arange(17)
    saved = {
        "memory": common.extract_features(net, test.take(odd), 12),
        "files": common.extract_features(net, files.take(odd), 12, batch_size=4),
    }
    if accelerator.is_main_process:
        torch.save(saved, out)


def keep_gradients(optimizer, kept):
    """An optimizer class that keeps the gradients of each step."""

    class Keeping(optimizer):
        def step(self, closure=None):
            parameters = self.param_groups[0]["params"]
            kept.append([p.grad.clone() for p in parameters if p.grad is not None])
            super().step(closure)

    return Keeping


def keep_batches(kept):
    """Let common.batches keep the index and the views of each step, of all processes."""
    real = common.batches

    def keeping(*args, **kwargs):
        for index, views in real(*args, **kwargs):
            rows = [gather(v.transpose(0, 1).contiguous()) for v in views]  # images come first
            kept.append({"index": gather(index), "views": rows})
            yield index, views

    common.batches = keeping


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


def save_methods(folder, out):
    """Run some steps of all methods, and save what must not depend on the number of processes."""
    out = f"{out}-machine{os.environ.get('GROUP_RANK', '0')}"  # The machines share no folder.
    shared = "--epochs 2 --optimizer sgd --warmup-epochs 0 --lr 0.1 --batch-size 12 --eval-every 1"
    own = {
        "simclr": "",
        "moco": "--queue-size 30 --key-momentum 0.5",
        "groups": "--bn-splits 6 --queue-size 30 --key-momentum 0.5",
        "swav": "--prototypes 4 --queue-size 15 --queue-start 0.2 --freeze-prototypes 0.4",
        "supcon": "--label-noise 0.3",
        "ce": "--label-noise 0.3 --loss ce",
    }
    graph = "--epochs 4 --batch-size 48 --ratio 2 --lr 0.1"
    build_encoder, sgd = common.build_encoder, torch.optim.SGD
    steps, gradients, batches, saved = [], [], [], {}
    keep_batches(batches)
    keep_arguments(moco, "info_nce", ("q", "k"), steps)
    keep_arguments(swav, "swapped_prediction_loss", ("scores", "codes"), steps)
    # Adam would magnify rounding.
    torch.optim.SGD = torch.optim.Adam = keep_gradients(sgd, gradients)
    nn.BatchNorm1d = nn.LayerNorm  # in the heads
    for name in (*own, "drlim"):
        # Batch norm in groups does not depend on the processes. DrLIM's own network has none.
        uses_own = name in ("groups", "drlim")
        common.build_encoder = build_encoder if uses_own else without_batch_statistics
        module = {"groups": moco, "ce": supcon, **MODULES}[name]
        flags = graph if name == "drlim" else f"{shared} {own[name]}"
        tiny = TINY_DRLIM if name == "drlim" else TINY
        module.main(["--data", folder, "--out", f"{out}/{name}", *tiny, *flags.split()])
        saved[name] = {"steps": [*steps], "gradients": gradients[:4], "batches": [*batches]}
        for kept in (steps, gradients, batches):
            kept.clear()
    if torch.distributed.is_initialized():
        backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        saved["timeout"] = backend.options._timeout.total_seconds()
    if common.PartialState().is_main_process:
        torch.save(saved, f"{out}/saved")


def part_cleanly(folder, out):
    """Run each method as from the command line, and see what is alive when the processes part."""
    wrapped, parted = weakref.WeakSet(), []
    wrap, part = DistributedDataParallel.__init__, torch.distributed.destroy_process_group

    def note_wrapped(self, *args, **kwargs):
        wrap(self, *args, **kwargs)
        wrapped.add(self)

    DistributedDataParallel.__init__ = note_wrapped
    torch.distributed.destroy_process_group = lambda: parted.append(len(wrapped))
    for name, module in MODULES.items():
        argv = arguments(name, folder, f"{out}/{name}", "--batch-size 8")
        # A run, a second time when it only shows its results, and one that is refused.
        for more, expected in (([], 0), ([], 0), (["--lr", "0.123"], 2)):
            code = 0
            try:
                with common.entry_point(""):
                    module.main([*argv, *more])
            except SystemExit as exit_:
                code = exit_.code
            assert code == expected
    assert parted == [0] * 3 * len(MODULES), parted
    part()
    assert not torch.distributed.is_initialized()


def disagree(script, folder, out, flag, *values):
    """Start a run (or evaluate `out`), for which each machine is given another value of a flag."""
    value = values[int(os.environ["GROUP_RANK"])]
    if script == "simclr":
        simclr.main(arguments("simclr", folder, out, "--batch-size 8", flag, value))
    else:
        linear_eval.main([out, "--data", folder, flag, value])


def on_own_disk(script, folder, *argv):
    """Run a script where each machine has a folder of its own."""
    os.chdir(Path(folder, os.environ["GROUP_RANK"]))
    importlib.import_module(script).main([*argv])


def arguments_of_two(name, folder):
    """The flags of a run on two processes."""
    if name == "drlim":
        return ["--data", str(folder), "--batch-size", "8", "--epochs", "2"]
    own = {**OWN, "moco": ["--symmetric", "--bn-splits", "2"], "swav": ["--prototypes", "4"]}
    return ["--data", str(folder), *TINY, "--batch-size", "8", *own[name]]


def stop_and_continue(folder, out):
    """For each method: a whole run, and one that is interrupted within an epoch and resumed."""
    out = f"{out}-machine{os.environ['GROUP_RANK']}"  # The machines share no folder.
    for name, module in MODULES.items():
        argv = arguments_of_two(name, folder)
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
        if common.PartialState().is_main_process:
            shutil.copytree(f"{out}/{name}", f"{out}/{name}-stopped")
        module.save_run, module.learning_rate = real, learning_rate
        module.main([*argv, "--out", f"{out}/{name}"])


# --------------------------------------------------------------------------------------
# What is the same
# --------------------------------------------------------------------------------------


CASES = {
    "one": {},
    "two": {"processes": 2},
    "three": {"processes": 3},
    "two machines": {"processes": 2, "machines": 2},
}


def on_all(function, folder, out):
    """Run a function on each of CASES, meanwhile; gives their folders."""
    started = {
        name: start(
            f"test_processes.{function}", folder, out / name, output=out / f"{name}.txt", **case
        )
        for name, case in CASES.items()
    }
    for case in started.values():
        code, text = case.wait()
        assert code == 0, text


@pytest.fixture(scope="module")
def features(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("features")
    on_all("save_features", folder, out)
    return {name: torch.load(out / name, weights_only=True) for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_features_of_an_odd_number_of_images_count_each_once(features, case):
    expected = features["one"]["memory"]
    assert expected.shape == (17, 8)
    for kind in ("memory", "files"):
        torch.testing.assert_close(features[case][kind], expected)


@pytest.fixture(scope="module")
def methods(few, tmp_path_factory):
    out = tmp_path_factory.mktemp("methods")
    on_all("save_methods", few, out)
    saved = {}
    for case in CASES:
        folder = out / f"{case}-machine0"
        saved[case] = torch.load(folder / "saved", weights_only=True)
        for name in NAMES:
            saved[case][name]["rows"] = metrics(folder / name)
            saved[case][name]["results"] = json.loads((folder / name / "results.json").read_text())
    saved["folder"] = out
    return saved


@pytest.fixture(scope="module", params=[case for case in CASES if case != "one"])
def several(request, methods):
    """What one process saved, and what several did."""
    return methods["one"], methods[request.param]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_steps_gradients_are_those_of_one_process(several, name):
    one, more = (case[name]["gradients"][0] for case in several)
    assert len(one) == len(more) > 3
    assert max(v.abs().max() for v in one) > 1e-3
    for a, b in zip(more, one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_later_steps_and_the_evaluation_are_those_of_one_process(several, name):
    one, more = (case[name] for case in several)
    assert len(one["gradients"]) == len(more["gradients"]) == 4
    for mine, theirs in zip(more["gradients"], one["gradients"], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    rows = zip(more["rows"] + more["results"], one["rows"] + one["results"], strict=True)
    for row, expected in rows:
        row, expected = flatten(row), flatten(expected)
        numbers = {k: v for k, v in expected.items() if not k.endswith(TIMES)}
        numbers = {k: v for k, v in numbers.items() if not isinstance(v, str)}
        if name == "groups":  # Running averages are those of the first process's groups.
            numbers.pop("/knn", None)
            if "/features" in expected:
                continue
        assert {key: row[key] for key in numbers} == pytest.approx(numbers, rel=1e-4)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_images_and_views_are_the_parts_of_the_one_batch(several, name):
    one, more = (case[name]["batches"] for case in several)
    assert len(one) == len(more) == 4
    for mine, theirs in zip(more, one, strict=True):
        assert torch.equal(mine["index"], theirs["index"]) and len(mine["index"].unique()) == 12
        for a, b in zip(mine["views"], theirs["views"], strict=True):
            assert torch.equal(a, b)


def test_mocos_keys_queue_and_permutation_are_those_of_one_process(several):
    # Batch norm is in 6 groups of 2: another permutation would give other keys.
    for one, more in zip(*(case["groups"]["steps"] for case in several), strict=True):
        for name in ("q", "k"):
            torch.testing.assert_close(more[name], one[name], rtol=1e-3, atol=1e-5)
        for queue in more["queues"]:  # All processes hold all keys.
            assert torch.equal(queue, more["queues"][0])
        torch.testing.assert_close(more["queues"][0], one["queues"][0], rtol=1e-3, atol=1e-5)


def test_swavs_codes_are_those_of_one_process(several):
    for one, more in zip(*(case["swav"]["steps"] for case in several), strict=True):
        for name in ("scores", "codes"):
            torch.testing.assert_close(more[name], one[name], rtol=1e-3, atol=1e-5)


def test_only_the_first_machine_writes(methods):
    assert (methods["folder"] / "two machines-machine0").is_dir()
    assert not (methods["folder"] / "two machines-machine1").exists()


def test_processes_wait_for_a_download_of_an_hour(methods):
    assert methods["two"]["timeout"] > 3600


def test_ddp_does_not_outlive_the_process_group(few, tmp_path):
    # If it does, one run in ten aborts at its end.
    name = "test_processes.part_cleanly"
    both = start(name, few, tmp_path, output=tmp_path / "text", processes=2)
    _, text = both.wait()
    assert [process.exitcode for process in both.processes] == [0, 0], text


@pytest.mark.parametrize(
    ("script", "flag", "values", "named"),
    [
        ("simclr", "--lr", ("0.1", "0.2"), "lr"),
        ("simclr", "--limit", ("25", "24"), "limit"),
        ("linear_eval", "--labels", ("1", "2"), "labels"),
    ],
)
def test_machines_that_were_given_different_flags_are_refused(
    few, tmp_path, script, flag, values, named
):
    out = tmp_path / "run"
    argv = ("test_processes.disagree", script, few, out, flag, *values)
    both = start(*argv, output=tmp_path / "text", processes=2, machines=2)
    _, text = both.wait()
    assert [process.exitcode for process in both.processes] == [2, 2]
    assert text.count(f"error: the machines do not agree on {named}: ") == 2
    assert not out.exists()


@pytest.mark.parametrize(
    ("script", "data", "counts", "named"),
    [
        ("linear_eval", "stripes", (8, 6), "training images"),
        ("simclr", "stripes", (9, 5), "test images"),
        ("drlim", "stripes/train", (8, 6), "training images"),
    ],
)
def test_machines_with_different_images_are_refused(
    script, data, counts, named, flat_encoder, tmp_path
):
    write_folder(tmp_path / "0" / "stripes", 9, 6)
    write_folder(tmp_path / "1" / "stripes", *counts)
    argv = [flat_encoder, "--data", data]
    if script != "linear_eval":
        argv = arguments(script, data, tmp_path / "run", "--batch-size 8")
    both = start(
        "test_processes.on_own_disk",
        *(script, tmp_path, *argv),
        output=tmp_path / "text",
        processes=2,
        machines=2,
    )
    _, text = both.wait()
    assert [process.exitcode for process in both.processes] == [2, 2], text
    assert text.count(f"error: the machines do not agree on {named}: ") == 2


def test_only_the_first_machine_needs_the_encoder_to_evaluate(flat_encoder, tmp_path):
    for machine in ("0", "1"):
        write_folder(tmp_path / machine / "stripes", 9)
    shutil.copy(flat_encoder, tmp_path / "0" / "encoder.safetensors")
    argv = ["encoder.safetensors", "--data", "stripes", "--protocol", "linear-augmented"]
    argv += ["--epochs", "1", "--batch-size", "8"]
    both = start(
        "test_processes.on_own_disk",
        *("linear_eval", tmp_path, *argv),
        output=tmp_path / "text",
        processes=2,
        machines=2,
    )
    _, text = both.wait()
    assert [process.exitcode for process in both.processes] == [0, 0], text
    assert (tmp_path / "0" / "eval.json").exists() and not (tmp_path / "1" / "eval.json").exists()


def test_a_folder_that_the_first_process_refuses_ends_all_with_one_line(few, tmp_path):
    (tmp_path / "mine").write_text("mine")
    argv = arguments("simclr", few, tmp_path, "--batch-size 8")
    both = start("simclr", *argv, output=tmp_path / "text", processes=2)
    _, text = both.wait()
    assert [process.exitcode for process in both.processes] == [2, 2]
    assert text.count("error: ") == 1 and "Traceback" not in text


@pytest.fixture(scope="module", params=[1, 2], ids=["one machine", "two machines"])
def stopped(few, tmp_path_factory, request):
    out = tmp_path_factory.mktemp("stopped")
    name = "test_processes.stop_and_continue"
    both = start(name, few, out / "run", output=out / "text", processes=2, machines=request.param)
    code, text = both.wait()
    assert code == 0, text
    return out / "run-machine0", text


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_two_processes_that_was_stopped_ends_as_one_that_was_not(stopped, method):
    out, text = stopped
    assert text.count(f"{method} was stopped") == 2  # on both processes
    assert_same_end(out / method, out / f"{method}-whole")
    assert not list((out / method).glob(".partial*"))
    assert not out.with_name("run-machine1").exists()  # where there is no checkpoint


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_two_processes_continues_on_one(stopped, few, tmp_path, capsys, method):
    out, _ = stopped
    shutil.copytree(out / f"{method}-stopped", tmp_path / "run")
    MODULES[method].main([*arguments_of_two(method, few), "--out", str(tmp_path / "run")])
    assert "resuming after step 4 of" in capsys.readouterr().out
    whole, continued = metrics(out / f"{method}-whole"), metrics(tmp_path / "run")
    assert continued[-1]["step"] == whole[-1]["step"] > 4
    assert continued[-1]["loss"] == pytest.approx(whole[-1]["loss"], rel=0.2)
    if method in ("moco", "drlim"):  # The others' batch norm now sees other images together.
        runs = (out / f"{method}-stopped", out / f"{method}-whole", tmp_path / "run")
        weights = []
        for path in runs:
            model = checkpoint(path)["model"].items()
            weights.append(torch.cat([v.flatten() for name, v in model if "weight" in name]))
        before, after, own = weights
        assert (own - after).norm() < 0.05 * (after - before).norm()


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
    _, bank, test, _ = common.load_splits(str(few), "nowhere", None, torch.device("cpu"), 1)
    knn = common.knn_accuracy(encoder, bank, test, 12)
    assert metrics(out)[-1]["knn"] == pytest.approx(knn)  # though each process has its own BN


def test_two_launchers_make_one_run_in_the_folder_of_the_first(few, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = arguments("simclr", few, "run", "--batch-size 8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launch += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    machines = []
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        machines.append(
            subprocess.Popen(
                [*launch, f"--node-rank={rank}", str(ROOT / "simclr.py"), *argv],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folder,
            )
        )
    ends = [finish(machine) for machine in machines]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert [text.count("test accuracy in percent") for _, text, _ in ends] == [1, 1]
    assert (tmp_path / "0" / "run" / "results.json").exists()
    assert not list((tmp_path / "1").iterdir())


def test_bad_data_is_one_line_of_ours_under_torchrun(tmp_path):
    argv = arguments("simclr", tmp_path / "missing", tmp_path / "run")
    code, _, err = finish(command("simclr.py", *argv, processes=2))
    assert code != 0 and err.count("error: --data") == 1 and 'simclr.py", line' not in err


def start_from_other_weights(*argv):
    """Run by `start`: moco.py, but the second process makes another encoder than the first."""
    build = common.build_encoder

    def build_other(*arguments):
        encoder = build(*arguments)
        with torch.no_grad():
            for weight in encoder.parameters():
                weight.mul_(1.5)
        return encoder

    if os.environ["RANK"] == "1":
        common.build_encoder = build_other
    moco.main(list(argv))


def test_moco_has_the_same_key_encoder_on_processes_that_start_from_other_weights(few, tmp_path):
    queues = []
    for what in ("moco", "test_processes.start_from_other_weights"):
        out = tmp_path / what
        argv = arguments("moco", few, out, "--max-steps 1 --key-momentum 1")
        code, text = start(what, *argv, output=tmp_path / f"{what}.txt", processes=2).wait()
        assert code == 0, text
        queues.append(checkpoint(out)["queue"])
    torch.testing.assert_close(queues[0], queues[1])


def test_a_batch_that_processes_cannot_share_is_refused_once(few, tmp_path):
    argv = arguments("simclr", few, tmp_path / "run", "--batch-size 9")
    code, text = start("simclr", *argv, output=tmp_path / "text", processes=2).wait()
    assert code == 2 and text.count("error: --batch-size") == 1
    assert not (tmp_path / "run").exists()


def read_more_than_fits():
    """Run by `start`: the first process reads a file for all of them, and has too little memory."""

    def read():
        raise MemoryError

    common.start_accelerator()
    with common.entry_point("try again"):
        common.on_main_process(read)


def test_a_lack_of_memory_on_the_first_process_ends_all(tmp_path):
    run = start("test_processes.read_more_than_fits", output=tmp_path / "text", processes=2)
    code, text = run.wait()
    assert code == 2 and text.count("error: there is not enough memory") == 1
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("script", "flags"),
    [("simclr.py", []), ("simclr.py", ["--cpu"]), ("linear_eval.py", ["--cpu"])],
)
def test_fewer_processes_than_asked_for_is_said(script, flags, few, tmp_path):
    argv = arguments("simclr", few, tmp_path / "run")
    if script == "linear_eval.py":
        argv = ["random", "--arch", "small", *argv[:4]]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launch += [*flags, str(ROOT / script), *argv]
    without_gpus = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch, env=without_gpus, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "error: several processes were asked for" in done.stderr
    assert not (tmp_path / "run").exists()
