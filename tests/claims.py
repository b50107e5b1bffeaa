"""The papers' claims, run again on the bundled images: `python tests/claims.py NAME`.

    python tests/claims.py --list                # the claims, and how many of their runs are done
    python tests/claims.py moco-queue            # run what is missing, and print the table
    python tests/claims.py moco-queue --seeds 3  # with seeds 0, 1 and 2
    python tests/claims.py moco-queue --plot     # draw it, as tests/results/moco-queue.png
    python tests/claims.py --write               # all tables, to tests/results/README.md

A claim is a set of commands, each run on one core. The settings, metrics and results of each run
are kept under tests/results/, in a folder named after the command, as curves to compare your own
runs with. The tables are made from them. A claim can be interrupted and repeated: its runs resume.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "results"
RUNS = ROOT / "runs" / "claims"
KEPT = ("config.json", "metrics.jsonl", "results.json", "eval.json")  # those that a run leaves


@dataclass
class Claim:
    """What a paper says, and the commands that show whether it holds here.

    Attributes:
        text: the claim, in one sentence, with its place in the paper.
        base: what the commands have in common.
        variants: what follows in each of them.
        measures: the columns of the table.
        finding: whether it holds here, once it has been run.
    """

    text: str
    base: str
    variants: list[str]
    measures: tuple[str, ...] = ("minutes", "loss", "kNN", "linear")
    finding: str = ""

    @property
    def commands(self) -> list[str]:
        """The commands, without --seed and --out."""
        return [f"{self.base} {variant}".strip() for variant in self.variants]


def each(flag: str, *values: object) -> list[str]:
    """A flag with several values. The default value is given as "", so that runs are shared."""
    return [f"{flag} {value}" if value != "" else "" for value in values]


FEW = ("kNN (10 a class)", "linear (10 a class)")
CLAIMS = {
    "methods": Claim(
        "The methods side by side, in about equal time.",
        "",
        ["simclr.py", "moco.py", "swav.py", "supcon.py", "supcon.py --loss ce"],
        ("minutes", "loss", "kNN", "linear", *FEW),
    ),
    "few-labels": Claim(
        "With few labels, a pretrained encoder is better than an untrained one (SimCLR, Table 7).",
        "linear_eval.py --seeds 3",
        [
            f"{encoder} --labels {labels} --protocol {protocol}"
            for encoder in ("{simclr.py}", "random --arch small --data fashion-mini")
            for labels in (10, 100)
            for protocol in ("linear", "finetune")
        ],
        ("top-1",),
        "Yes. With 100 labels a class, fine-tuning gains only 0.8 points from pretraining.",
    ),
    "simclr-head": Claim(
        "A nonlinear head (the default) is better than a linear one, and that than none "
        "(SimCLR, Fig. 8).",
        "simclr.py --epochs 12",
        each("--head-layers", 0, 1, ""),
        finding="In part: without a head, linear is 2 points lower. kNN shows no difference, and "
        "neither does a second layer.",
    ),
    "simclr-layer": Claim(
        "The features before the head are better than those after it (SimCLR, section 4.2).",
        "",
        ["simclr.py --epochs 12", "tests/features_after_head.py {simclr.py --epochs 12}"],
        ("kNN", "linear"),
        "Linear: yes. kNN: no difference.",
    ),
    "simclr-temperature": Claim(
        "The temperature (by default 0.1) has an optimum between its extremes (SimCLR, Table 5).",
        "simclr.py --epochs 12",
        each("--temperature", 0.02, "", 0.5, 1),
        finding="Not seen: all are within 0.9 points.",
    ),
    "simclr-augmentation": Claim(
        "Crop and color are the best pair of operations (SimCLR, Fig. 5).",
        "simclr.py --epochs 12",
        each("--augment", "crop", "color", "crop blur", "color blur", "crop color"),
        finding="Yes, of the three pairs tried. On gray images, color is brightness and contrast.",
    ),
    "simclr-batch": Claim(
        "Larger batches (256 by default) help short training (SimCLR, Fig. 9).",
        "simclr.py --epochs 12",
        each("--batch-size", 64, "", 1024),
        finding="No: 1,024 is worst. 64 and 256 are within a point.",
    ),
    "moco-queue": Claim(
        "More negatives (1,024 by default) help at a fixed batch size (MoCo, Fig. 3).",
        "moco.py --epochs 18",
        each("--queue-size", 256, "", 4096),
        finding="Not seen: all are within a point.",
    ),
    "moco-momentum": Claim(
        "Without momentum, training fails; 0.9 to 0.999 works, 0.99 is the default "
        "(MoCo, section 4.1).",
        "moco.py --epochs 18",
        each("--key-momentum", 0, 0.9, "", 0.999),
        finding="Mostly: 0 fails (untrained: 76.4 / 80.8), and 0.99 and 0.999 work. With 0.9, only "
        "linear is above the untrained network.",
    ),
    "moco-batch-norm": Claim(
        "With batch norm over the whole batch instead of 8 groups, the pretext task gets easier "
        "and the features worse (MoCo, section 3.3).",
        "moco.py --epochs 18",
        each("--bn-splits", 1, ""),
        finding="In part: the loss falls further (4.12 instead of 4.39), but the accuracies differ "
        "by 0.1 at most.",
    ),
    "swav-crops": Claim(
        "Small crops are better than longer training with two crops (SwAV, section 3.2).",
        "swav.py",
        ["--epochs 9", "--crops 2 --epochs 12"],
        ("minutes", "loss", "prototypes", "kNN", "linear"),
        "Not seen: two crops lead by 1.1 points.",
    ),
    "swav-partition": Claim(
        "Without the equal partition, the codes collapse (SwAV, section 3.1).",
        "",
        ["swav.py --epochs 9", "tests/swav_without_partition.py --epochs 9"],
        ("minutes", "loss", "prototypes", "kNN", "linear"),
        "Yes: one prototype is left, and the features are worse than an untrained network's.",
    ),
    "swav-queue": Claim(
        "The queue (by default none) helps small batches (SwAV, section 3.1).",
        "swav.py --batch-size 64 --epochs 9 --queue-start 2",
        each("--queue-size", "", 512),
        ("minutes", "loss", "prototypes", "kNN", "linear"),
        "Not seen: with it, 1.7 and 0.9 points less.",
    ),
    "supcon-loss": Claim(
        "L_out (the default) is better than cross-entropy, and that than L_in (SupCon, section 4).",
        "supcon.py --epochs 10",
        each("--loss", "", "ce", "in"),
        finding="No: in kNN, cross-entropy leads L_out by 2.4 points. All other differences are "
        "below two points.",
    ),
    "supcon-noise": Claim(
        "SupCon tolerates wrong labels better than cross-entropy (SupCon, section 4.3).",
        "supcon.py --epochs 10 --label-noise 0.4",
        each("--loss", "", "ce", "in"),
        finding="In part: cross-entropy's own classifier loses 5.4 points, and is left with 80.0. "
        "But its features lose less than L_out's: 2.8 and 4.2 points of kNN, 0.9 and 3.1 of "
        "linear.",
    ),
    "supcon-temperature": Claim(
        "A low temperature (0.1 by default) is best (SupCon, Fig. 4).",
        "supcon.py --epochs 10",
        each("--temperature", 0.05, "", 0.3, 1),
        finding="In part: in kNN, 1 is 2.4 points below 0.1. From 0.05 to 0.3, all are within a "
        "point.",
    ),
    "drlim-maps": Claim(
        "The map keeps neighbors together and, if the graph says so, ignores a shift "
        "(DrLIM, sections 3.2 to 3.4).",
        "drlim.py",
        ["", "--epochs 150", "--graph shifts", "--shifts -6 -3 3 6 --epochs 4"],
        ("minutes", "loss", "5-NN", "flatness", "rank"),
        finding="Yes: the map's 5-NN is 84.0, and PCA's 79.1. Among 15,000 points, an image's own "
        "copies have rank 14 if the graph joins them, and 4,070 if it sees pixels alone.",
    ),
}


# --------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------


def place(command: str, seed: int) -> Path:
    """The folder of a run, below RUNS and RESULTS, named after its command."""
    words = re.sub(r"[^\w.]+", "-", command.replace(".py", "").replace("tests/", ""))
    return Path(words.strip("-"), f"seed-{seed}")


def run(command: str, seed: int) -> None:
    """Run a command, unless its results are there, and keep them."""
    kept = RESULTS / place(command, seed)
    if kept.exists():
        return

    words = command.split()
    if encoder_of := re.search(r"{(.*)}", command):  # This run evaluates the encoder of another.
        encoder = RUNS / place(encoder_of[1], seed) / "encoder.safetensors"
        if not encoder.exists():
            start(encoder_of[1].split(), encoder.parent, seed)
        words = command.replace(encoder_of[0], os.path.relpath(encoder, ROOT)).split()
    out = RUNS / place(command, seed)
    start(words, out, seed)

    copy = kept.with_name(f".{kept.name}")  # renamed when it is complete
    copy.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (out / name).exists():
            shutil.copy(out / name, copy / name)
    copy.rename(kept)


def start(words: list[str], out: Path, seed: int) -> None:
    """Run a script with its flags on one core, in a folder of its own."""
    out.mkdir(parents=True, exist_ok=True)
    words = [*words, "--out", os.path.relpath(out, ROOT)]
    if words[0] != "linear_eval.py":
        words += ["--seed", str(seed)]
    print(f"python {' '.join(words)}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True)


def read_run(kept: Path) -> dict[str, float]:
    """What a run has measured: accuracies in percent, minutes of training, and the last metrics."""
    values = {}
    if (kept / "metrics.jsonl").exists():
        batch_size = json.loads((kept / "config.json").read_text())["settings"]["batch_size"]
        step, seconds = 0, 0.0
        for line in (kept / "metrics.jsonl").read_text().splitlines():
            values = json.loads(line)
            seconds += (values["step"] - step) * batch_size / values["images_per_s"]
            step = values["step"]
        values["minutes"] = seconds / 60
    for measure, value in json.loads((kept / "results.json").read_text())[0].items():
        values[measure] = value["mean"] if isinstance(value, dict) else value
    return values


def read_runs(command: str) -> list[dict[str, float]]:
    """What a command has measured, for each of its seeds."""
    runs = []
    for kept in sorted((RESULTS / place(command, 0)).parent.glob("seed-*")):
        if (kept / "eval.json").exists():  # linear_eval.py takes several seeds at once.
            runs += json.loads((kept / "eval.json").read_text())[-1]["runs"]
        else:
            runs.append(read_run(kept))
    return runs


# --------------------------------------------------------------------------------------
# Tables and figures
# --------------------------------------------------------------------------------------


def format_mean(values: list[float]) -> str:
    """Mean and standard deviation as text."""
    mean = statistics.mean(values)
    decimals = 1 if mean > 9.95 else 2
    if len(values) == 1:
        return f"{mean:.{decimals}f}"
    return f"{mean:.{decimals}f} ± {statistics.stdev(values):.{decimals}f}"


def table(name: str) -> str:
    """The results of a claim as a Markdown table, with a row for each command that was run."""
    measures = CLAIMS[name].measures
    lines = [f"| command | {' | '.join(measures)} | seeds |"]
    lines.append("|---" * (len(measures) + 2) + "|")
    for command in CLAIMS[name].commands:
        runs = read_runs(command)
        cells = ["not run"] * len(measures)
        if runs:
            cells = []
            for measure in measures:
                values = [run[measure] for run in runs if measure in run]
                cells.append(format_mean(values) if values else "-")
        lines.append(f"| `python {shown(command)}` | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def shown(command: str) -> str:
    """A command as the tables show it."""
    return re.sub("{.*}", "ENCODER", command)


def summary(name: str) -> str:
    """The row of a claim in the README's table: its commands, their accuracies, and the finding."""
    claim = CLAIMS[name]
    measures = [m for m in ("kNN", "linear", "top-1", "5-NN") if m in claim.measures]
    cells = []
    for command, variant in zip(claim.commands, claim.variants, strict=True):
        if runs := read_runs(command):
            means = [format_mean([values[measure] for values in runs]) for measure in measures]
            cells.append(f"{f'`{shown(variant)}`' if variant else 'default'} {' / '.join(means)}")
    base = f"`{claim.base}`" if claim.base else ""
    return f"| {claim.text} | {base} | {'<br>'.join(cells)} | {claim.finding} |"


def all_tables() -> str:
    """The text of tests/results/README.md."""
    parts = [
        "# The papers' claims, run again\n\nThis page is written by `python tests/claims.py "
        "--write` from the runs in the folders beside it. Accuracies are percentages of the test "
        "images at the end of training. Each run had one core, with `OMP_NUM_THREADS=1`. The "
        "minutes depend on the machine and on what else it did, so do not compare them; those in "
        "the first table of the project's README were measured on an idle machine. Each folder "
        "holds the settings and versions, the metrics of each epoch, and the results. ENCODER is "
        "that of `simclr.py`, or of `simclr.py --epochs 12` after the head."
    ]
    for name, claim in CLAIMS.items():
        finding = f" {claim.finding}" if claim.finding else ""
        parts.append(f"## {name}\n\n{claim.text}{finding}\n\n{table(name)}")
    return "\n\n".join(parts) + "\n"


def plot(name: str) -> Path:
    """Draw the accuracies of a claim with matplotlib; returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    claim = CLAIMS[name]
    measures = [m for m in ("kNN", "linear", "top-1", "5-NN") if m in claim.measures]
    runs = {}
    for command, variant in zip(claim.commands, claim.variants, strict=True):
        if read_runs(command):
            runs[shown(variant) or "default"] = read_runs(command)

    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.4 * len(runs)), layout="constrained")
    height = 0.8 / len(measures)
    lowest = 100.0
    for i, measure in enumerate(measures):
        for row, seeds in enumerate(runs.values()):
            values = [values[measure] for values in seeds]
            place_of_bar = row + i * height
            bar = axes.barh(place_of_bar, statistics.mean(values), 0.9 * height, color=f"C{i}")
            axes.scatter(values, [place_of_bar] * len(values), 9, "black", zorder=2)
            lowest = min(lowest, *values)
        bar.set_label(measure)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(runs))], list(runs))
    axes.invert_yaxis()
    axes.set_xlim(left=max(0, lowest - 3))
    axes.set_xlabel("test accuracy in percent; the axis does not begin at 0")
    axes.set_title(claim.base)
    if len(measures) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=100)
    return path


def main(argv: list[str] | None = None) -> None:
    """Run, print or draw one claim, or list all."""
    parser = argparse.ArgumentParser(description="Run a paper's claim again.", allow_abbrev=False)
    parser.add_argument("name", nargs="?", choices=CLAIMS, help="the claim to run")
    parser.add_argument("--seeds", type=int, default=1, help="run each command with so many seeds")
    parser.add_argument("--list", action="store_true", help="list the claims")
    parser.add_argument("--plot", action="store_true", help="draw what there is, and run nothing")
    parser.add_argument("--write", action="store_true", help="write tests/results/README.md")
    args = parser.parse_args(argv)
    if args.list:
        for name, claim in CLAIMS.items():
            done = sum(bool(read_runs(command)) for command in claim.commands)
            print(f"{name}: {done} of {len(claim.commands)} commands are run. {claim.text}")
    elif args.write:
        (RESULTS / "README.md").write_text(all_tables())
    elif args.name is None:
        parser.error("name a claim, or use --list or --write")
    elif args.plot:
        print(plot(args.name))
    else:
        for seed in range(args.seeds):
            for command in CLAIMS[args.name].commands:
                run(command, seed)
        print(f"{CLAIMS[args.name].text}\n\n{table(args.name)}")


if __name__ == "__main__":
    main()
