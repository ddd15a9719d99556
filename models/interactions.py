"""Feature interactions, and the module that runs them in parallel.

    X_n = Concat(Interaction_1(X_{n-1}, X_dense), ..., Residual(X_{n-1}))      SUM, arXiv 2311.09544

Each interaction takes a set of embeddings and gives a smaller set: stacked, the modules form a
pyramid N_0 >> ... >> N_n. A new interaction is a class here and a name in INTERACTIONS.

Shapes: B rows, N embeddings in, n embeddings out, D their dimension, C compressed embeddings.
Every interaction is `(B, N, D) -> (B, n, D)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class InteractionConfig:
    """Sizes inside the interactions.

    Args:
        hidden: width of the MLPs.
        compressed: C, embeddings that the attention weights of dot compression are made from, and
            columns k of its output.
        cross_layers, cross_rank: depth and rank of the cross network.
    """

    hidden: int = 128
    compressed: int = 8
    cross_layers: int = 2
    cross_rank: int = 32


class Compress(nn.Module):
    """Linear compression: n mixtures of N embeddings, (B, N, D) -> (B, n, D)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) * n_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x  # (n, N) x (B, N, D) -> (B, n, D)


class PairwiseDots(nn.Module):
    """The dot products of all pairs of N embeddings, (B, N, D) -> (B, N (N - 1) / 2)."""

    def __init__(self, n_in: int) -> None:
        super().__init__()
        self.register_buffer("_pairs", torch.triu_indices(n_in, n_in, 1), persistent=False)
        self.width = self._pairs.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, x.transpose(1, 2))[:, self._pairs[0], self._pairs[1]]


class MlpInteraction(nn.Module):
    """An MLP over the flattened embeddings."""

    def __init__(self, n_in: int, n_out: int, dim: int, config: InteractionConfig) -> None:
        super().__init__()
        self.n_out, self.dim = n_out, dim
        self.net = nn.Sequential(
            nn.Linear(n_in * dim, config.hidden), nn.ReLU(), nn.Linear(config.hidden, n_out * dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1)).unflatten(1, (self.n_out, self.dim))


class DcnInteraction(nn.Module):
    """The cross network of DCN-V2 (arXiv 2008.13535, eq. 1 with W = U V^T of section 4.3).

    x_{l+1} = x_0 * (U_l (V_l^T x_l) + b_l) + x_l over the flattened embeddings, then a projection
    to n embeddings.
    """

    def __init__(self, n_in: int, n_out: int, dim: int, config: InteractionConfig) -> None:
        super().__init__()
        self.n_out, self.dim = n_out, dim
        width = n_in * dim
        rank = min(config.cross_rank, width)
        self.down = nn.ModuleList(
            nn.Linear(width, rank, bias=False) for _ in range(config.cross_layers)
        )
        self.up = nn.ModuleList(nn.Linear(rank, width) for _ in range(config.cross_layers))
        self.project = nn.Linear(width, n_out * dim)

    def forward(self, x: Tensor) -> Tensor:
        x0 = x.flatten(1)
        xl = x0
        for down, up in zip(self.down, self.up, strict=True):
            xl = torch.addcmul(xl, x0, up(down(xl)))
        return self.project(xl).unflatten(1, (self.n_out, self.dim))


class DotInteraction(nn.Module):
    """Dot compression with attention: X (X^T Y + Z) (arXiv 2311.09544, section 3.1).

    Y (N, k) and Z (D, k) are the outputs of MLPs of the linearly compressed embeddings. X X^T Y is
    k mixtures of the N x N dot products without ever making them; then a projection to n
    embeddings.
    """

    def __init__(self, n_in: int, n_out: int, dim: int, config: InteractionConfig) -> None:
        super().__init__()
        self.n_in, self.n_out, self.dim = n_in, n_out, dim
        self.k = min(config.compressed, n_in)
        self.compress = Compress(n_in, self.k)
        self.y = self._mlp(self.k * dim, config.hidden, n_in * self.k)
        self.z = self._mlp(self.k * dim, config.hidden, dim * self.k)
        self.project = nn.Linear(n_in * self.k, n_out * dim)

    @staticmethod
    def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out))

    def attention(self, x: Tensor) -> Tensor:
        """X (X^T Y + Z), (B, N, k)."""
        compressed = self.compress(x).flatten(1)
        y = self.y(compressed).unflatten(1, (self.n_in, self.k))
        z = self.z(compressed).unflatten(1, (self.dim, self.k))
        return torch.bmm(x, torch.baddbmm(z, x.transpose(1, 2), y))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.attention(x).flatten(1)).unflatten(1, (self.n_out, self.dim))


class MixerInteraction(nn.Module):
    """One MLP-Mixer layer (arXiv 2105.01601, eq. 1), then a linear compression to n embeddings.

    Token mixing is an MLP across the embeddings, channel mixing one across their dimension, both
    pre-normalised and residual.
    """

    def __init__(self, n_in: int, n_out: int, dim: int, config: InteractionConfig) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(dim)
        self.token = nn.Sequential(
            nn.Linear(n_in, config.hidden), nn.GELU(), nn.Linear(config.hidden, n_in)
        )
        self.channel_norm = nn.LayerNorm(dim)
        self.channel = nn.Sequential(
            nn.Linear(dim, config.hidden), nn.GELU(), nn.Linear(config.hidden, dim)
        )
        self.compress = Compress(n_in, n_out)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channel(self.channel_norm(x))
        return self.compress(x)


INTERACTIONS: dict[str, type[nn.Module]] = {
    "mlp": MlpInteraction,
    "dcn": DcnInteraction,
    "dot": DotInteraction,
    "mixer": MixerInteraction,
}


class Residual(nn.Module):
    """The way around the interactions: a linear compression plus an MLP across the embeddings."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.compress = Compress(n_in, n_out)
        hidden = 2 * n_out
        # no bias at the end: one number for all of an embedding, the norm behind it takes away again
        last = nn.Linear(hidden, n_out, bias=False)
        self.mlp = nn.Sequential(nn.Linear(n_in, hidden), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return self.compress(x) + self.mlp(x.transpose(1, 2)).transpose(1, 2)


class InteractionModule(nn.Module):
    """X_n = Norm(Concat(Interaction_i(X_{n-1}, X_dense), Residual(X_{n-1}))).

    The dense embedding joins the input of the interactions as one more embedding. The n outputs
    are shared equally among the interactions and the residual, which takes what is left over.

    Args:
        n_in: N, without the dense embedding.
        n_out: n, at least one for every interaction and one for the residual.
        dim: D.
        interactions: names in INTERACTIONS, run in parallel.
        config: sizes inside them.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        dim: int,
        *,
        interactions: tuple[str, ...],
        config: InteractionConfig,
    ) -> None:
        super().__init__()
        unknown = [name for name in interactions if name not in INTERACTIONS]
        if unknown or not interactions:
            raise ValueError(f"interactions is {interactions}: choose from {list(INTERACTIONS)}")
        branches = len(interactions) + 1
        if n_out < branches:
            raise ValueError(
                f"n_out is {n_out}: {branches} branches need {branches} embeddings or more"
            )
        share = n_out // branches
        self.interactions = nn.ModuleDict(
            {name: INTERACTIONS[name](n_in + 1, share, dim, config) for name in interactions}
        )
        self.residual = Residual(n_in, n_out - share * len(interactions))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, dense: Tensor) -> Tensor:
        """(B, N, D) and (B, D) -> (B, n, D)."""
        with_dense = torch.cat([x, dense[:, None]], dim=1)
        outputs = [module(with_dense) for module in self.interactions.values()]
        return self.norm(torch.cat([*outputs, self.residual(x)], dim=1))


class Pyramid(nn.Module):
    """Interaction modules on top of each other, each with fewer embeddings than the one below.

    Args:
        n_in: N_0.
        sizes: embeddings after each module.
        dim, interactions, config: as of `InteractionModule`.
    """

    def __init__(
        self,
        n_in: int,
        sizes: tuple[int, ...],
        dim: int,
        *,
        interactions: tuple[str, ...],
        config: InteractionConfig,
    ) -> None:
        super().__init__()
        if not sizes:
            raise ValueError("sizes is empty: a pyramid has one interaction module or more")
        self.layers = nn.ModuleList(
            InteractionModule(below, above, dim, interactions=interactions, config=config)
            for below, above in zip((n_in, *sizes[:-1]), sizes, strict=True)
        )
        self.n_out = sizes[-1]

    def forward(self, x: Tensor, dense: Tensor) -> Tensor:
        """(B, N_0, D) and (B, D) -> (B, N_n, D)."""
        for layer in self.layers:
            x = layer(x, dense)
        return x
