"""Fixtures and helpers that the tests share."""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import child
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import common

os.environ["ACCELERATE_USE_CPU"] = "true"  # The tests are exact, so they do not use a GPU.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)  # Small tests are fastest so, and the order of sums does not depend on it.

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
METHODS = ("simclr", "moco", "swav", "supcon", "drlim")
TIMES = ("images_per_s", "minutes_left", "wait")  # metrics that differ from run to run

# With these flags a run ends in about a second on images of 12 pixels.
BRIEF = ["--epochs", "2", "--workers", "1", "--eval-every", "1"]
TINY = [*BRIEF, "--preset", "paper", "--arch", "small", "--batch-size", "4", "--warmup-epochs", "1"]
TINY += ["--hidden", "16", "--dim", "8"]
TINY_DRLIM = [*BRIEF, "--batch-size", "9", "--neighbours", "2"]
OWN = {
    "simclr": ["--temperature", "0.2", "--color-strength", "0.5"],
    "moco": ["--queue-size", "18"],
    "swav": ["--prototypes", "4", "--queue-size", "10", "--queue-start", "0.5"],
    "supcon": [],
    "drlim": [],
}


# --------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------


def write_folder(folder: Path, train: int = 16, test: int = 6) -> Path:
    """Write class folders of colored 12-pixel images: three classes with stripes of their own."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name, stripes in (("across", (1, 3)), ("along", (3, 1)), ("both", (2, 2))):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                tile = rng.integers(0, 256, (12 // stripes[0], 12 // stripes[1], 3), dtype=np.uint8)
                pixels = np.kron(tile, np.ones((*stripes, 1), np.uint8))
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """48 training images and 18 test images of three classes."""
    return write_folder(tmp_path_factory.mktemp("images") / "stripes")


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """27 training images of three classes: 6 steps an epoch with the flags of TINY."""
    return write_folder(tmp_path_factory.mktemp("few") / "stripes", 9)


@pytest.fixture(scope="session")
def flat_encoder(tmp_path_factory):
    """The file of an encoder that gives nearly the same features for all images."""
    encoder = common.build_encoder("small")
    nn.init.zeros_(encoder[4][1].weight)
    nn.init.ones_(encoder[4][1].bias)
    path = tmp_path_factory.mktemp("flat") / "encoder.safetensors"
    common.save_encoder(path, encoder, architecture="small", stem="3x3")
    return path


@pytest.fixture(scope="session")
def shared():
    """The data sets that developers have beside their checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data sets in {SHARED}")
    return SHARED


# --------------------------------------------------------------------------------------
# Runs in this process
# --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_thread():
    """Undo what a run in this process has set."""
    torch.set_num_threads(1)


def arguments(method: str, data: Path, out: Path, *more: object) -> list[str]:
    """The command line of a tiny run. `more` are flags and values, or text of several."""
    tiny = TINY_DRLIM if method == "drlim" else [*TINY, *OWN[method]]
    words = [word for part in more for word in str(part).split()]
    return ["--data", str(data), "--out", str(out), *tiny, *words]


def run(method: str, data: Path, out: Path, *more: object) -> Path:
    """A tiny run in this process; returns its folder."""
    importlib.import_module(method).main(arguments(method, data, out, *more))
    return out


def refused(capsys, main, argv) -> str:
    """The line with which main(argv) refuses: exit code 2 and one line on stderr."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in argv])
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    return printed.err


# --------------------------------------------------------------------------------------
# Runs in other processes
# --------------------------------------------------------------------------------------


def with_interrupts() -> None:
    """Let Ctrl-C reach a process, also where the tests run in the background, without it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def command(script: str, *argv: object, processes: int = 1) -> subprocess.Popen:
    """Start a script's real command, as a user types it."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*launcher, str(ROOT / script), *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=with_interrupts,
    )


def finish(process: subprocess.Popen, seconds: int = 300) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a command."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


# A server that has imported torch and the scripts once, and forks a process for each run.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["child", *METHODS, "linear_eval"])


class Started(SimpleNamespace):
    """Processes that `start` has started, and the file of their output."""

    def wait(self, seconds: int = 120) -> tuple[int, str]:
        """The exit code of the first process, and what all have printed."""
        for process in self.processes:
            process.join(seconds)
            assert process.exitcode is not None, "it hangs"
        return self.processes[0].exitcode, self.output.read_text()


def start(
    what: str,
    *argv: object,
    output: Path,
    processes: int = 1,
    machines: int = 1,
    environment: dict | None = None,
    **options: object,
) -> Started:
    """Run a script ("simclr"), or a function of the tests ("module.function"), in real processes.

    It is as `command`, but for the seconds that Python needs to import torch. Several processes
    find each other as torchrun's would, who share equally so many machines. For the options see
    child.py.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = child.run_function if "." in what else child.run_script
    started = []
    for rank in range(processes):
        variables = dict(environment or {})
        if processes > 1:
            per_machine = processes // machines
            variables |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
            variables |= {"GROUP_RANK": str(rank // per_machine)}
            variables |= {"LOCAL_RANK": str(rank % per_machine)}
            variables |= {"LOCAL_WORLD_SIZE": str(per_machine)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = server.Process(
            target=target, args=(what, [*map(str, argv)], str(output), variables, options)
        )
        process.start()
        started.append(process)
    return Started(processes=started, output=output)


# --------------------------------------------------------------------------------------
# What is computed
# --------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Notes the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


# --------------------------------------------------------------------------------------
# What a run has left
# --------------------------------------------------------------------------------------


def metrics(out: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def settings(out: Path) -> dict:
    """The settings in config.json."""
    return json.loads((out / "config.json").read_text())["settings"]


def checkpoint(out: Path) -> dict:
    """The checkpoint of a run."""
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same_model(a: Path, b: Path) -> bool:
    """Whether the networks of two runs are the same, bit by bit."""
    one, two = checkpoint(a)["model"], checkpoint(b)["model"]
    return all(torch.equal(value, two[name]) for name, value in one.items())


def flatten(value: object, path: str = "") -> dict:
    """Nested dictionaries and lists as one dictionary of paths."""
    if not isinstance(value, dict | list | tuple):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for name, part in items for k, v in flatten(part, f"{path}/{name}").items()}


def assert_same_end(a: Path, b: Path) -> None:
    """Two runs ended the same, bit by bit: all that they saved, all numbers but times."""
    one, two = flatten(checkpoint(a)), flatten(checkpoint(b))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if not name.endswith(TIMES):
            same = torch.equal(value, two[name]) if torch.is_tensor(value) else value == two[name]
            assert same, name
    assert (a / "results.json").read_text() == (b / "results.json").read_text()
    if (a / "encoder.safetensors").exists():
        one, two = load_file(a / "encoder.safetensors"), load_file(b / "encoder.safetensors")
        assert all(torch.equal(value, two[name]) for name, value in one.items())
