"""Muon: matrices move by their momentum, orthogonalised.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024: five Newton-Schulz
iterations bring every singular value of the momentum near 1, so that a direction which few labels
speak for is learned as fast as one that all do. Scaled by 0.2 sqrt(max(m, n)) (Liu et al., "Muon is
scalable for LLM training", arXiv 2502.16982, eq. 4), an update is as large as one of Adam's, and so is
the learning rate.

`torch.optim.Muon` takes the same step, one matrix after the other in bfloat16; tests compare with it.
Here matrices of one shape are orthogonalised together, in float32, and a wide one through its Gram
matrix, which the iteration X <- (a + b X X^T + c (X X^T)^2) X lets one do: its factors are polynomials of
the first X X^T, so they are collected, and X is multiplied once. On two shared cores, of the matrices of
Globo's hybrid with three readers, half the time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c
_ITERATIONS = 5
_WIDE = 1.5  # columns per row, from which the Gram matrix is the shorter way
_RMS = 0.2  # of an update of Adam's, about
_EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for matrices.

    Args:
        matrices: parameters (m, n) float32.
        lr: learning rate, of the size of Adam's.
        momentum: decay of the average of gradients.

    Raises:
        ValueError: a parameter is no matrix.
    """

    def __init__(self, matrices: Iterable[Tensor], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"a parameter has shape {tuple(parameter.shape)}: no matrix")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    m, n = parameter.shape
                    by_shape[min(m, n), max(m, n)].append(parameter)
            for (_, columns), parameters in by_shape.items():
                moved = orthogonalised(
                    torch.stack([_wide(self._nesterov(p, group["momentum"])) for p in parameters])
                )
                for parameter, update in zip(parameters, moved, strict=True):
                    turned = update if parameter.shape == update.shape else update.T
                    parameter.add_(turned, alpha=-group["lr"] * _RMS * columns**0.5)

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def orthogonalised(matrices: Tensor) -> Tensor:
    """U V^T, about, of each U S V^T: singular values that are not tiny come out at 0.7 to 1.2.

    Args:
        matrices: (B, m, n) float32, m <= n.

    Returns:
        (B, m, n) float32.
    """
    a, b, c = _COEFFICIENTS
    rows, columns = matrices.shape[1:]
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + _EPSILON)
    if columns < _WIDE * rows:
        for _ in range(_ITERATIONS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x
    gram = x @ x.mT
    identity = torch.eye(rows, device=x.device, dtype=x.dtype)
    product = identity
    for i in range(_ITERATIONS):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product if i else factor
        if i < _ITERATIONS - 1:
            gram = factor @ gram @ factor
    return product @ x
