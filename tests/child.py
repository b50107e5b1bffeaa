"""What the test suite runs in processes of their own; see `start` in conftest.py."""

import gc
import importlib
import multiprocessing
import os
import resource
import runpy
import signal
import sys
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent


def run_script(script: str, argv: list[str], output: str, environment: dict, options: dict) -> None:
    """Run `python SCRIPT argv`, with stdout and stderr in the file `output`.

    Options change the world in which the script runs, not the script:
        save_always: save a checkpoint after each step, not only every ten minutes.
        die_in_save: SIGKILL in the middle of this save, counted from 1.
        file_size: files cannot grow beyond this many bytes, as if the disk were full.
        start_method: how Python starts the processes that read files, such as "spawn".
    """
    os.environ.update(environment)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [f"{script}.py", *argv]
    if "file_size" in options:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing raises OSError
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["file_size"], options["file_size"]))
    if "start_method" in options:
        multiprocessing.set_start_method(options["start_method"], force=True)
    if "die_in_save" in options:
        torch.save = dying(torch.save, options["die_in_save"])
    if not options.get("save_always"):
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        return
    module = importlib.import_module(script)
    module.SAVE_MINUTES = 0
    module.main(argv)


def dying(save, which: int):
    """torch.save, but for the call `which`, which leaves half a file and kills the process."""
    calls = 0

    def save_or_die(value, path):
        nonlocal calls
        calls += 1
        save(value, path)
        if calls == which:
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    return save_or_die


def watch_memory(method: str, path: str, steps: str, *argv: str) -> None:
    """Run a method, and write the resident memory at some of its steps, in bytes.

    Args:
        method: the name of its script.
        path: the file that is written.
        steps: their numbers, with commas.
        argv: the flags of the script.
    """
    module = importlib.import_module(method)
    real, wanted = module.learning_rate, {int(step) for step in steps.split(",")}
    resident = []

    def watching(step: int, *args: object) -> float:
        if step in wanted:
            gc.collect()
            resident.append(psutil.Process().memory_info().rss)
        return real(step, *args)

    module.learning_rate = watching
    module.main(list(argv))
    Path(path).write_text(" ".join(map(str, resident)))


def run_function(name: str, argv: list[str], output: str, environment: dict, options: dict) -> None:
    """Run "module.function" of the tests with argv, like `run_script`."""
    os.environ.update(environment)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    module, function = name.split(".")
    getattr(importlib.import_module(module), function)(*argv, **options)
