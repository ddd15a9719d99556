"""A step of our Muon beside torch's, of the matrices of Globo's hybrid, in turns on one CPU thread.

    python -m benchmarks.muon
    ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks.muon       # as on a CPU without AVX-512

Gradients are random, the same at every step. Prints milliseconds of a step and their ratio, and how far
apart the two are after the steps, as a share of the way (torch iterates in bfloat16).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from benchmarks.flags import parser
from benchmarks.timing import in_turns
from feature_store import datasets
from jobs.training.loop import Learner
from jobs.training.muon import Muon
from jobs.training.presets import preset

STEPS = 5


def compare(shapes: Sequence[Sequence[int]], *, steps: int = STEPS) -> tuple[float, float, float]:
    """Milliseconds of a step of ours and of torch's, the median of `steps` after one to warm up; and
    the distance between what they end at, over the way of torch's."""
    start = [torch.randn(*shape) for shape in shapes]
    mine, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    for p, q in zip(mine, theirs, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    taken = in_turns(
        {
            "ours": Muon(mine, lr=0.01).step,
            "torch's": torch.optim.Muon(
                theirs, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            ).step,
        },
        rounds=steps,
    )
    ours, torchs = (1e3 * float(np.median(seconds)) for seconds in taken.values())
    apart = sum(float((p - q).detach().square().sum()) for p, q in zip(mine, theirs, strict=True))
    way = sum(float((q - x).detach().square().sum()) for q, x in zip(theirs, start, strict=True))
    return ours, torchs, (apart / way) ** 0.5


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser("muon", __doc__).parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dataset = datasets.get("globo")
    learner = Learner(dataset, preset(dataset, "hybrid"), torch.device("cpu"))
    shapes = [p.shape for p in learner.optimizers["muon"].param_groups[0]["params"]]
    ours, torchs, apart = compare(shapes)
    print(f"{len(shapes)} matrices, {STEPS} steps")
    print(f"ours {ours:.1f} ms a step, torch.optim.Muon {torchs:.1f} ms: ratio {torchs / ours:.2f}")
    print(f"apart by {apart:.1%} of the way")


if __name__ == "__main__":
    main()
