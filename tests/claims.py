"""Repeat the runs behind the tables of the README, and print their figures.

    python tests/claims.py methods      # or few-labels (after it), supcon, drlim, moco, swav
    python tests/claims.py              # only the figures of what is in tests/results

A run that was stopped continues; one whose results are there is not repeated. The runs lie in
runs/claims. Their metrics and results are copied to tests/results.
"""

import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
RUNS = Path("runs", "claims")
ENCODER = RUNS / "simclr" / "seed-0" / "encoder.safetensors"  # of the claim "methods"
PROBES = [
    f"linear_eval.py {encoder} --seeds 3 --labels {labels}{protocol}"
    for encoder in (ENCODER, "random --arch small --data fashion-mini")
    for labels in (10, 100)
    for protocol in ("", " --protocol finetune")
]
SUPCON = [
    f"supcon.py --epochs 6{loss}{noise}"
    for loss in ("", " --loss in", " --loss ce")
    for noise in ("", " --label-noise 0.4")
]
DIGITS = "drlim.py --data mnist --classes 4 9"
SHIFTS = [f"{DIGITS} --epochs 4 --graph {graph}" for graph in ("shifts", "shifts-by-pixels")]
# SwAV whose codes are a softmax of the scores, without equal shares.
UNEQUAL = "import swav; swav.sinkhorn = lambda s, epsilon: (s / epsilon).softmax(1); swav.main()"

# The commands of each claim, and their seeds. linear_eval.py has its own.
CLAIMS = {
    "methods": (["simclr.py", "moco.py", "swav.py", "supcon.py"], (0, 1, 2)),
    "few-labels": (PROBES, (0,)),
    "supcon": (SUPCON, (0, 1, 2)),
    "drlim": ([DIGITS, f"{DIGITS} --epochs 150", *SHIFTS], (0,)),
    "moco": (["moco.py --epochs 18", "moco.py --epochs 18 --key-groups 1"], (0, 1, 2)),
    "swav": (["swav.py --epochs 9", "unequal.py --epochs 9"], (0, 1, 2)),
}
# The last epoch's metric that a claim is about.
METRIC = {"supcon": "classifier", "moco": "loss", "swav": "prototypes"}


def slug(command: str) -> str:
    """The folder of a command's results."""
    command = command.replace(str(ENCODER), "simclr").replace(".py", "")
    return re.sub(r"[ -]+", "-", command)


def repeat(command: str, seed: int) -> None:
    """Run a command, and keep its metrics and results."""
    out, kept = (folder / slug(command) / f"seed-{seed}" for folder in (RUNS, RESULTS))
    script, *flags = command.split()
    if script == "linear_eval.py":
        names = ["eval.json"]
    else:
        names = ["metrics.jsonl", "results.json"]
        flags += ["--seed", str(seed)]
    if all((kept / name).exists() for name in names):
        return
    start = ["-c", UNEQUAL] if script == "unequal.py" else [script]
    print(command, "seed", seed, flush=True)
    subprocess.run([sys.executable, *start, *flags, "--out", str(out)], check=True)
    kept.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(out / name, kept)


def average(values: list[float], digits: int = 1) -> str:
    """Mean and, of several values, standard deviation."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def figures(command: str, features: str = "trained", metric: str | None = None) -> str:
    """What the README says of a command, or "not run": kNN / linear, or the measures of a map."""
    folders = sorted((RESULTS / slug(command)).glob("seed-*"))
    if not folders:
        return "not run"
    if command.startswith("linear_eval"):
        result = json.loads((folders[0] / "eval.json").read_text())[-1]
        return average([run["top-1"] for run in result["runs"]])
    tables = [json.loads((folder / "results.json").read_text()) for folder in folders]
    if command.startswith("drlim"):
        ours, pca, _ = tables[0]
        rank = f", rank {ours['rank']} (PCA {pca['rank']})" if "rank" in ours else ""
        five = f"5-NN {ours['5-NN']:.1f} (PCA {pca['5-NN']:.1f})"
        return f"{five}, flatness {ours['flatness']:.2f}{rank}"
    rows = [next(row for row in table if row["features"] == features) for table in tables]
    text = " / ".join(average([row[name] for row in rows]) for name in ("kNN", "linear"))
    metrics = [(folder / "metrics.jsonl").read_text().splitlines()[-1] for folder in folders]
    last = [json.loads(line) for line in metrics]
    if metric in last[0]:
        digits = 2 if metric == "loss" else 1
        text += f", {metric} {average([float(row[metric]) for row in last], digits)}"
    return text


def main() -> None:
    for name in sys.argv[1:]:
        commands, seeds = CLAIMS[name]
        for seed in seeds:
            for command in commands:
                repeat(command, seed)
    for name, (commands, _) in CLAIMS.items():
        for command in commands:
            print(f"{command}: {figures(command, metric=METRIC.get(name))}")
    for features in ("untrained", "raw pixels"):
        print(f"{features}: {figures('simclr.py', features)}")


if __name__ == "__main__":
    main()
