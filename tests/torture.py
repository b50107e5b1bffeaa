"""Attacks that take too long for the test suite; it has a short version of each.

    python tests/torture.py kills    # SIGKILL at random moments, then the same command
    python tests/torture.py memory   # resident memory after 200 and after 2,000 steps

`kills` starts 20 runs of each script in memory and 5 of each while streaming, kills each once, and
resumes it. It counts the runs that end bit-identical to a run that was not killed.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import METHODS, arguments, assert_same_end, start, write_folder

# Runs of some seconds, of which each has several epochs of several steps.
LONGER = dict.fromkeys(METHODS, "--epochs 12 --batch-size 3 --eval-every 4")
LONGER["swav"] += " --queue-start 0 --queue-size 16 --freeze-prototypes 0"
LONGER["drlim"] = "--epochs 30 --eval-every 10"
# Steps on the bundled images, without an evaluation, whose memory is kept for the next one.
MANY_STEPS = "--max-steps 2001 --batch-size 64 --epochs 1000 --eval-every 999 --workers 1"


def kill_and_resume(method: str, argv: list, folder: Path, whole: Path, seconds: float) -> bool:
    """Kill one run at a random moment and resume it; False if it had ended before.

    Raises:
        AssertionError: if it did not end as the run that was not killed.
    """
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    log = folder / "log"
    save_always = random.random() < 0.5  # after each step, or only after each epoch
    killed = start(method, *argv, "--out", out, output=log, save_always=save_always)
    killed.processes[0].join(random.uniform(0, seconds))
    killed.processes[0].kill()
    code, _ = killed.wait()
    if code != -signal.SIGKILL:
        return False
    code, text = start(method, *argv, "--out", out, output=log).wait()
    assert code == 0, text
    assert_same_end(out, whole)
    return True


def torture_by_kills(folder: Path) -> None:
    """Print for each script how many killed runs ended bit-identical."""
    images = write_folder(folder / "images", 9)
    total = wanted = 0
    for more, rounds in (("", 20), ("--stream --workers 2", 5)):
        for method in METHODS:
            argv = arguments(method, images, folder / "whole", f"{LONGER[method]} {more}")
            shutil.rmtree(folder / "whole", ignore_errors=True)
            began = time.monotonic()
            code, text = start(method, *argv, output=folder / "log").wait()
            assert code == 0, text
            seconds = time.monotonic() - began

            identical = tried = 0
            while tried < rounds:
                try:
                    was_killed = kill_and_resume(method, argv, folder, folder / "whole", seconds)
                    identical += was_killed
                    tried += was_killed
                except AssertionError as error:
                    tried += 1
                    print(f"{method}: {error}")
            total, wanted = total + identical, wanted + rounds
            kind = "streaming" if more else "in memory"
            print(
                f"{method:8}{kind:12}{identical} of {rounds} (run of {seconds:.1f} s)", flush=True
            )
    print(f"{total} of {wanted} killed runs ended bit-identical")


def torture_by_steps(folder: Path) -> None:
    """Print the resident memory of each script after 200 and after 2,000 steps."""
    for method in METHODS:
        watched = start(
            "child.watch_memory",
            method,
            folder / "memory",
            "200,2000",
            *f"--out {folder / method} {MANY_STEPS}".split(),
            output=folder / "log",
        )
        code, text = watched.wait(3600)
        assert code == 0, text
        early, late = map(int, (folder / "memory").read_text().split())
        print(
            f"{method:8}{early / 2**20:.0f} MiB after 200 steps, {late / 2**20:.0f} after 2,000: "
            f"{100 * (late / early - 1):+.2f} %",
            flush=True,
        )


def main() -> None:
    """Run one of the attacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("attack", choices=("kills", "memory"))
    attack = {"kills": torture_by_kills, "memory": torture_by_steps}[parser.parse_args().attack]
    with tempfile.TemporaryDirectory() as folder:
        attack(Path(folder))


if __name__ == "__main__":
    main()
