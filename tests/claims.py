"""The papers' claims, run again on the bundled images: `python tests/claims.py NAME`.

    python tests/claims.py --list                # the claims, and how many of their runs are done
    python tests/claims.py moco-queue            # run what is missing, and print the table
    python tests/claims.py moco-queue --plot     # and draw it, as data/moco-queue.png

A claim is a set of commands, each run with several seeds, on one core. The metrics, results and
settings of each run are kept under tests/results/, as curves to compare your own runs with; the
tables are made from them. A claim can be interrupted and repeated: its runs resume.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "results"
RUNS = ROOT / "runs" / "claims"
KEPT = ("config.json", "metrics.jsonl", "results.json")


@dataclass
class Claim:
    """What a paper says, and the commands that show whether it holds here.

    Attributes:
        text: the claim, in one sentence, with its place in the paper.
        runs: the name of each run and its command, without --seed and --out.
        seeds: how many seeds each command is run with.
    """

    text: str
    runs: dict[str, str]
    seeds: int = 3


def vary(command: str, flag: str, values: list) -> dict[str, str]:
    """Runs of a command that differ in the value of one flag."""
    return {str(value).replace(" ", "-"): f"{command} {flag} {value}" for value in values}


CLAIMS = {
    "methods": Claim(
        "The methods side by side, in about equal time.",
        {
            "simclr": "simclr.py",
            "moco": "moco.py",
            "swav": "swav.py",
            "supcon": "supcon.py",
            "cross-entropy": "supcon.py --loss ce",
        },
    ),
    "simclr-head": Claim(
        "A nonlinear head is better than a linear one, and that than none (SimCLR, Fig. 8).",
        vary("simclr.py", "--head-layers", [0, 1, 2]),
    ),
    "simclr-temperature": Claim(
        "The temperature has an optimum between its extremes (SimCLR, Table 5).",
        vary("simclr.py", "--temperature", [0.02, 0.05, 0.1, 0.5, 1]),
    ),
    "simclr-augmentation": Claim(
        "Crop and color are the best pair of operations (SimCLR, Fig. 5).",
        vary("simclr.py", "--augment", ["crop", "color", "blur", "crop blur", "crop color"]),
    ),
    "simclr-batch": Claim(
        "Larger batches help short training (SimCLR, Fig. 9).",
        vary("simclr.py --epochs 12", "--batch-size", [64, 256, 1024]),
    ),
    "moco-queue": Claim(
        "More negatives help at a fixed batch size (MoCo, Fig. 3).",
        vary("moco.py", "--queue-size", [256, 1024, 4096]),
    ),
    "moco-momentum": Claim(
        "Without momentum, training fails; 0.9 to 0.999 works (MoCo, section 4.1).",
        vary("moco.py", "--key-momentum", [0, 0.9, 0.99, 0.999]),
    ),
    "moco-batch-norm": Claim(
        "With batch norm over the whole batch, the pretext task gets easier and the features "
        "worse (MoCo, section 3.3).",
        vary("moco.py", "--bn-splits", [1, 8]),
    ),
    "swav-crops": Claim(
        "Small crops are better than longer training with two crops (SwAV, section 3.2).",
        {"two": "swav.py --crops 2 --epochs 36", "two-and-two": "swav.py"},
    ),
    "swav-queue": Claim(
        "The queue helps small batches (SwAV, section 3.1).",
        vary("swav.py --batch-size 64 --queue-start 4", "--queue-size", [0, 512]),
    ),
    "supcon-loss": Claim(
        "L_out is better than L_in, and that than cross-entropy (SupCon, section 4).",
        vary("supcon.py", "--loss", ["out", "in", "ce"]),
    ),
    "supcon-noise": Claim(
        "SupCon tolerates wrong labels better than cross-entropy (SupCon, section 4.3).",
        vary("supcon.py --label-noise 0.4", "--loss", ["out", "in", "ce"]),
    ),
    "supcon-temperature": Claim(
        "A low temperature is best (SupCon, Fig. 4).",
        vary("supcon.py", "--temperature", [0.05, 0.1, 0.3, 1]),
    ),
}


def run_missing(name: str) -> None:
    """Run the commands of a claim whose results are not there yet."""
    for run, command in CLAIMS[name].runs.items():
        for seed in range(CLAIMS[name].seeds):
            kept = RESULTS / name / f"{run}-{seed}"
            if kept.exists():
                continue
            out = RUNS / name / f"{run}-{seed}"
            words = [*command.split(), "--seed", str(seed), "--eval-every", "10", "--out", str(out)]
            print(f"python {' '.join(words)}", flush=True)
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True)
            copy = kept.with_name(f".{kept.name}")  # renamed when it is complete
            copy.mkdir(parents=True, exist_ok=True)
            for file in KEPT:
                shutil.copy(out / file, copy / file)
            copy.rename(kept)


def read_runs(name: str, run: str) -> list[dict[str, float]]:
    """What the finished seeds of a run give: accuracies in percent, and minutes of training."""
    seeds = []
    for seed in range(CLAIMS[name].seeds):
        kept = RESULTS / name / f"{run}-{seed}"
        if not kept.exists():
            continue
        first_row = json.loads((kept / "results.json").read_text())[0]
        batch_size = json.loads((kept / "config.json").read_text())["settings"]["batch_size"]
        step, seconds = 0, 0.0
        for line in (kept / "metrics.jsonl").read_text().splitlines():
            metrics = json.loads(line)
            seconds += (metrics["step"] - step) * batch_size / metrics["images_per_s"]
            step = metrics["step"]
        values = {"loss": metrics["loss"], "minutes": seconds / 60}
        for measure in ("kNN", "linear", "kNN (10 a class)", "linear (10 a class)"):
            values[measure] = first_row[measure]["mean"]
        seeds.append(values)
    return seeds


def format_mean(values: list[float]) -> str:
    """Mean and standard deviation as text."""
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def table(name: str) -> str:
    """The results of a claim as a Markdown table, with a row for each command that was run."""
    measures = ["minutes", "loss", "kNN", "linear", "kNN (10 a class)", "linear (10 a class)"]
    lines = [f"| command | {' | '.join(measures)} | seeds |"]
    lines.append("|---" * (len(measures) + 2) + "|")
    for run, command in CLAIMS[name].runs.items():
        seeds = read_runs(name, run)
        cells = ["not run"] * len(measures)
        if seeds:
            cells = [format_mean([values[measure] for values in seeds]) for measure in measures]
        lines.append(f"| `python {command}` | {' | '.join(cells)} | {len(seeds)} |")
    return "\n".join(lines)


def plot(name: str) -> Path:
    """Draw the accuracies of a claim with matplotlib; returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {run: read_runs(name, run) for run in CLAIMS[name].runs}
    runs = {run: seeds for run, seeds in runs.items() if seeds}
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    for measure, marker in (("kNN", "o"), ("linear", "s")):
        means = [statistics.mean(values[measure] for values in seeds) for seeds in runs.values()]
        axes.plot(list(runs), means, marker=marker, label=measure)
        for run, seeds in runs.items():
            axes.scatter([run] * len(seeds), [values[measure] for values in seeds], 8, "gray")
    axes.set_ylabel("test accuracy in percent")
    axes.legend()
    path = ROOT / "data" / f"{name}.png"
    figure.savefig(path, dpi=100)
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run a paper's claim again.", allow_abbrev=False)
    parser.add_argument("name", nargs="?", choices=CLAIMS, help="the claim to run")
    parser.add_argument("--list", action="store_true", help="list the claims")
    parser.add_argument("--plot", action="store_true", help="draw what there is, and run nothing")
    args = parser.parse_args(argv)
    if args.list:
        for name, claim in CLAIMS.items():
            done = sum(len(read_runs(name, run)) for run in claim.runs)
            print(f"{name}: {done} of {len(claim.runs) * claim.seeds} runs. {claim.text}")
    elif args.name is None:
        parser.error("name a claim, or use --list")
    elif args.plot:
        print(plot(args.name))
    else:
        run_missing(args.name)
        print(f"{CLAIMS[args.name].text}\n\n{table(args.name)}")


if __name__ == "__main__":
    main()
