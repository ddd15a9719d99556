"""Muon for CPUs: torch's, with the momentum orthogonalised in float32.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024: Newton-Schulz iterations
bring every singular value of the momentum near 1, so that a direction which few labels speak for is learned
as fast as one that all do. `torch.optim.Muon` iterates in bfloat16 and has no other way. On a CPU that
multiplies no bfloat16 this takes 33 times as long as float32, many times the rest of a training, and on one
that does (AVX-512) still three times (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_RMS = 0.2  # of an update of Adam's, about


class Muon(torch.optim.Muon):
    """Muon with Nesterov momentum, whose learning rate is as large as Adam's (arXiv 2502.16982, eq. 4).

    Args:
        matrices: parameters (m, n).
        lr: learning rate.

    Raises:
        ValueError: a parameter is no matrix.
    """

    def __init__(self, matrices: Iterable[Tensor], *, lr: float) -> None:
        super().__init__(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every matrix that has a gradient; on GPUs as torch does."""
        if any(p.is_cuda for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for matrix in (p for p in group["params"] if p.grad is not None):
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(average, group["momentum"])
                update = orthogonalised(
                    update, group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                matrix.add_(update, alpha=-group["lr"] * _RMS * max(matrix.shape) ** 0.5)
        return loss


def orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """U V^T, about, of U S V^T: singular values that are not tiny come out at 0.7 to 1.2.

    Each iteration X <- (a + b X X^T + c (X X^T)^2) X multiplies X by a polynomial of the first X X^T, so
    these are collected and a wide X is multiplied twice in all.

    Args:
        matrix: (m, n) float32.
        coefficients: a, b, c.
        steps: iterations, 1 or more.
        eps: the least norm that is divided by.

    Returns:
        (m, n) float32.
    """
    a, b, c = coefficients
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp(min=eps)
    gram = x @ x.T
    factors = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for step in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        factors = factor @ factors if step else factor
        if step + 1 < steps:
            gram = factor @ gram @ factor
    x = factors @ x
    return x if x.shape == matrix.shape else x.T
