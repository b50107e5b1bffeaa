"""Processes of their own, forked from one that has imported torch and the scripts."""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("simclr", "moco", "swav", "supcon", "drlim", "linear_eval")
# Python source that has a run save a checkpoint after each epoch.
SAVE_OFTEN = "import common\ncommon.SAVE_SECONDS = 0\n"

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["child", *SCRIPTS])


def command(script: str, argv: list[str]) -> str:
    """Python source that does what `python SCRIPT.py ARGV` does."""
    path = str(ROOT / f"{script}.py")
    argv = [f"{script}.py", *argv]
    return f"import runpy, sys\nsys.argv = {argv}\nrunpy.run_path({path!r}, run_name='__main__')\n"


def execute(source: str, output: str, environment: dict[str, str]) -> None:
    """Execute Python source, with what it prints in the file `output`."""
    os.environ.update(environment)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # that of a script, not of this process
    torch.set_num_threads(1)
    torch.set_num_threads = lambda number: None  # Several tests share the cores.
    exec(source, {})


class Child:
    """One process that executes Python source, or several that find each other as torchrun's do."""

    def __init__(self, source: str, output: Path, processes: int = 1, **environment: str) -> None:
        self.output = output
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                environment |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(processes)}
                environment |= {"MASTER_PORT": str(free.getsockname()[1])}
        self.processes = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            argv = (source, str(output), environment | own)
            self.processes.append(server.Process(target=execute, args=argv))
            self.processes[-1].start()

    def wait_for(self, path: Path) -> None:
        """Wait until a file is there."""
        while not path.exists():
            assert self.processes[0].is_alive(), self.output.read_text()
            time.sleep(0.002)

    def end(self, *exit_codes: int) -> str:
        """Wait for the end, which must be with these exit codes; what was printed."""
        for process in self.processes:
            process.join(200)
        text = self.output.read_text()
        assert [process.exitcode for process in self.processes] == list(exit_codes), text
        return text
