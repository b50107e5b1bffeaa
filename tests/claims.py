"""Repeat the runs behind a table of the README, and print its rows.

    python tests/claims.py NAME [SEED ...]      # methods, few-labels, supcon, drlim, moco or swav
    python tests/claims.py                      # all rows, from what is in tests/results

A run that was stopped continues; one whose results are there is not repeated. Runs lie in
runs/claims, their metrics and results in tests/results.
"""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs", "claims")
SUPCON = "supcon.py --epochs 10"
NOISE = "--label-noise 0.4"
DIGITS = "drlim.py --data mnist --classes 4 9"
ENCODER = "runs/claims/simclr/seed-SEED/encoder.safetensors"  # of the claim "methods"
UNTRAINED = "random --arch small --data fashion-mini"
PROBE = "linear_eval.py {} --seeds 3 --labels {}"
# SwAV whose codes are only a softmax of the scores.
UNEQUAL = "import swav; swav.sinkhorn = lambda s, epsilon: (s / epsilon).softmax(1); swav.main()"

# The commands of each claim and the seeds with which they run. {0} stands for a new encoder.
CLAIMS = {
    "methods": (["simclr.py", "moco.py", "swav.py", "supcon.py"], (0, 1, 2)),
    "few-labels": (
        [
            f"linear_eval.py {encoder} --labels {labels}{protocol}"
            for encoder in (ENCODER, UNTRAINED)
            for labels in (10, 100)
            for protocol in ("", " --protocol finetune")
        ],
        (0,),
    ),
    "supcon": (
        [
            f"{SUPCON} {flags}".strip()
            for loss in ("", "--loss in ", "--loss ce ")
            for flags in (loss, loss + NOISE)
        ],
        (0, 1, 2),
    ),
    "drlim": (
        [DIGITS, f"{DIGITS} --epochs 150", f"{DIGITS} --graph shifts"],
        (0,),
    ),
    "moco": (["moco.py --epochs 18", "moco.py --epochs 18 --key-groups 1"], (0, 1, 2)),
    "swav": (["swav.py --epochs 9", f"-c {UNEQUAL} --epochs 9"], (0,)),
}
