"""Run by test_processes.py on one and on two processes: what it saves must not differ."""

import sys

import torch
from accelerate import Accelerator
from torch import nn

import common
import simclr

accelerator = Accelerator()
folder, out = sys.argv[1:]
data, bank, test = common.load_splits(folder, "nowhere", None, accelerator.device, 1)
recipe = simclr.augmentation(["crop", "color", "gray"], 12, 0.08, 0.5)
steps = list(common.batches(data, [(2, recipe)], 8, 0, 0, 3))

torch.manual_seed(0)  # without batch statistics, which each process has of its own on CPUs
net = nn.Sequential(
    nn.Conv2d(3, 8, 3, 2), nn.GroupNorm(2, 8), nn.Tanh(), nn.Flatten(), nn.Linear(200, 6)
)
features = common.extract_features(net, common.ImageSet(test.images[:17], test.labels), 12)
model = accelerator.prepare(net)
for _, _, (views,) in steps:
    z = model(views.flatten(0, 1)).unflatten(0, (2, -1)).transpose(0, 1)
    z1, z2 = simclr.gather(z, accelerator).unbind(1)
    loss = simclr.nt_xent(z1, z2, 0.2)
    accelerator.backward(loss)

saved = {f"grad {name}": p.grad for name, p in net.named_parameters()}
saved |= {"loss": loss.detach()[None], "features": features}
saved |= {"index": torch.cat([accelerator.gather(index) for _, index, _ in steps])}
saved |= {
    "views": torch.cat(
        [accelerator.gather(views[0].transpose(0, 1).contiguous()) for *_, views in steps]
    )
}
if accelerator.is_main_process:
    torch.save(saved, out)
accelerator.end_training()
