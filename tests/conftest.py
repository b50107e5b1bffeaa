import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["ACCELERATE_USE_CPU"] = "true"  # also where there is a GPU: the tests are exact
torch.set_num_threads(1)  # before the first fixture of a module: other numbers round otherwise

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

# Ends in a second or two on images of 12 pixels.
TINY = ["--arch", "small", "--batch-size", "4", "--epochs", "2", "--warmup-epochs", "1",
        "--hidden", "16", "--dim", "8", "--workers", "1", "--eval-every", "1"]


def write_folder(folder: Path, train: int = 16, test: int = 6) -> Path:
    """Class folders of 12-pixel images, three classes told apart by their stripes."""
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
    return write_folder(tmp_path_factory.mktemp("images") / "stripes")


@pytest.fixture(autouse=True)
def signals_and_threads():
    """What main() sets in this process is put back, and one thread keeps small tests fast."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    torch.set_num_threads(1)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def shared():
    if not SHARED.is_dir():
        pytest.skip(f"needs the data sets in {SHARED}")
    return SHARED


def command(script, *argv, processes=1):
    """Popen of a script's real command, on the CPU, with one thread a process."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launcher, str(ROOT / script), *map(str, argv)], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, seconds=300):
    """(exit code, stdout, stderr) of a command."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def refused(capsys, main, argv) -> str:
    """The line with which main(argv) refuses: exit code 2, one line on stderr, none on stdout."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in argv])
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    return printed.err


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
