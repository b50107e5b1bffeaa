"""Evaluate SimCLR's features after the head, z; results.json of a run has those before it, h.

    python tests/features_after_head.py runs/simclr-fashion-mini/encoder.safetensors --out FOLDER

The claim "simclr-head" of claims.py runs it.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn

import common
import simclr


def load_network(run: Path, settings: dict) -> nn.Module:
    """The trained encoder with its head: x [B, 3, H, W] to z [B, D]."""
    encoder = common.build_encoder(settings["arch"], settings["stem"])
    sizes = (settings["head_layers"], settings["hidden"], settings["dim"])
    network = nn.Sequential(encoder, simclr.projection_head(encoder.width, *sizes))
    network.load_state_dict(common.read_checkpoint(run / "checkpoint.pt")["model"])
    return network


def main() -> None:
    """Write results.json to --out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("encoder", type=Path, help="the file encoder.safetensors of a run")
    parser.add_argument("--out", type=Path, required=True, help="where results.json is written")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the linear probe")
    args = parser.parse_args()

    settings = json.loads((args.encoder.parent / "config.json").read_text())["settings"]
    network = load_network(args.encoder.parent, settings)
    _, bank, test, _ = common.load_splits(
        settings["data"], "data", settings["limit"], torch.device("cpu")
    )
    z, z_test = (
        common.extract_features(network, images, settings["image_size"]) for images in (bank, test)
    )
    draws = [torch.arange(len(bank))]
    knn, linear = common.score_features(z, bank.labels, z_test, test.labels, draws, args.seed)
    common.write_results(args.out, [{"features": "z", "kNN": knn, "linear": linear}], "accuracy")


if __name__ == "__main__":
    main()
