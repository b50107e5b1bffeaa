"""Run by test_processes.py on one and on two processes: a method's steps, which must not differ."""

import os
import sys

import torch
from accelerate.utils import gather
from torch import nn

import common
import drlim
import moco
import supcon
import swav

method, out, *argv = sys.argv[1:]
steps, gradients = [], []


def noting(module, name, keys):
    real = getattr(module, name)

    def noted(*args):
        rows = [v.detach().transpose(0, 1) if v.ndim == 3 else v.detach() for v in args[:2]]
        steps.append(dict(zip(keys, map(gather, (v.contiguous() for v in rows)), strict=True)))
        if module is moco:
            steps[-1]["queues"] = gather(args[2].clone()[None])
        return real(*args)

    setattr(module, name, noted)


def keeping(optimizer):
    class Keeping(optimizer):
        def step(self, closure=None):
            gradients.append(
                [p.grad.clone() for p in self.param_groups[0]["params"] if p.grad is not None]
            )
            super().step(closure)

    return Keeping


torch.optim.SGD = torch.optim.Adam = keeping(torch.optim.SGD)  # Adam would magnify rounding
if method == "drlim":  # its own network has no batch norm
    drlim.main(argv)
elif method == "moco":
    noting(moco, "info_nce", ("q", "k"))
    moco.main(argv)
else:  # an encoder without batch statistics, which each process has of its own on CPUs

    def build_encoder(*_, **__):
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2),
            nn.GroupNorm(2, 8),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        net.width = 8
        return net

    common.build_encoder = build_encoder
    if method == "supcon":
        supcon.main(argv)
    else:
        noting(swav, "swapped_prediction_loss", ("scores", "codes"))
        swav.main(argv)

if int(os.environ.get("RANK", 0)) == 0:
    torch.save({"steps": steps, "gradients": gradients[:5]}, out)
