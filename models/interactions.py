"""Feature interactions, and the module that runs them in parallel.

    X_n = Concat(Interaction_1(X_{n-1}, X_dense), ..., Residual(X_{n-1}))      SUM, arXiv 2311.09544

Each interaction takes a set of embeddings and gives a smaller set: stacked, the modules form a
pyramid N_0 >> ... >> N_n. A new interaction is a class here and a name in INTERACTIONS.

What goes in has names, one for each of the N embeddings (`models.axes`); what comes out has none.

Shapes: B rows, N embeddings in, n embeddings out, D their dimension, C compressed embeddings.
Every interaction is `(B, N, D) -> (B, n, D)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.axes import Blocks, blocks, linear, named, numbered, product

DENSE = "dense"  # the dense embedding as one of the embeddings


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

    def __init__(self, tokens: Sequence[str], n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, len(tokens)) * len(tokens) ** -0.5)
        named(self, weight={1: blocks(tokens)})

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x  # (n, N) x (B, N, D) -> (B, n, D)


class PairwiseDots(nn.Module):
    """The dot products of all pairs of N embeddings, (B, N, D) -> (B, N (N - 1) / 2)."""

    def __init__(self, tokens: Sequence[str]) -> None:
        super().__init__()
        n = len(tokens)
        first, second = torch.triu_indices(n, n, 1)
        self.register_buffer("_pairs", first * n + second, persistent=False)
        pairs = (
            sorted((tokens[i], tokens[j]))
            for i, j in zip(first.tolist(), second.tolist(), strict=True)
        )
        self.outputs: Blocks = blocks(f"{a} {b}" for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        # twice as fast, with its gradient, as an index of two dimensions
        return torch.bmm(x, x.transpose(1, 2)).flatten(1).index_select(1, self._pairs)


class MlpInteraction(nn.Module):
    """An MLP over the flattened embeddings."""

    def __init__(
        self, tokens: Sequence[str], n_out: int, dim: int, config: InteractionConfig
    ) -> None:
        super().__init__()
        self.n_out, self.dim = n_out, dim
        self.net = nn.Sequential(
            linear(blocks(tokens, dim), config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, n_out * dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1)).unflatten(1, (self.n_out, self.dim))


class DcnInteraction(nn.Module):
    """The cross network of DCN-V2 (arXiv 2008.13535, eq. 1 with W = U V^T of section 4.3).

    x_{l+1} = x_0 * (U_l (V_l^T x_l) + b_l) + x_l over the flattened embeddings, then a projection
    to n embeddings.
    """

    def __init__(
        self, tokens: Sequence[str], n_out: int, dim: int, config: InteractionConfig
    ) -> None:
        super().__init__()
        self.n_out, self.dim = n_out, dim
        inputs = blocks(tokens, dim)
        rank = min(config.cross_rank, len(tokens) * dim)
        self.down = nn.ModuleList(
            linear(inputs, rank, bias=False) for _ in range(config.cross_layers)
        )
        self.up = nn.ModuleList(linear(rank, inputs) for _ in range(config.cross_layers))
        self.project = linear(inputs, n_out * dim)

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

    def __init__(
        self, tokens: Sequence[str], n_out: int, dim: int, config: InteractionConfig
    ) -> None:
        super().__init__()
        self.n_in, self.n_out, self.dim = len(tokens), n_out, dim
        self.k = min(config.compressed, self.n_in)
        # k follows from the number of tokens, so its axes have names too
        mixtures, dims = numbered("mixture", self.k), numbered("dim", dim)
        self.compress = named(
            Compress(tokens, self.k), weight={0: blocks(mixtures), 1: blocks(tokens)}
        )
        inputs = blocks(mixtures, dim)
        self.y = self._mlp(inputs, config.hidden, product(tokens, mixtures))
        self.z = self._mlp(inputs, config.hidden, product(dims, mixtures))
        self.project = linear(product(tokens, mixtures), n_out * dim)

    @staticmethod
    def _mlp(inputs: Blocks, hidden: int, outputs: Blocks) -> nn.Sequential:
        return nn.Sequential(linear(inputs, hidden), nn.ReLU(), linear(hidden, outputs))

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

    def __init__(
        self, tokens: Sequence[str], n_out: int, dim: int, config: InteractionConfig
    ) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(dim)
        inputs = blocks(tokens)
        self.token = nn.Sequential(
            linear(inputs, config.hidden), nn.GELU(), linear(config.hidden, inputs)
        )
        self.channel_norm = nn.LayerNorm(dim)
        self.channel = nn.Sequential(
            nn.Linear(dim, config.hidden), nn.GELU(), nn.Linear(config.hidden, dim)
        )
        self.compress = Compress(tokens, n_out)

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

    def __init__(self, tokens: Sequence[str], n_out: int) -> None:
        super().__init__()
        self.compress = Compress(tokens, n_out)
        hidden = 2 * n_out
        # no bias at the end: one number for all of an embedding, the norm behind it takes away again
        last = nn.Linear(hidden, n_out, bias=False)
        self.mlp = nn.Sequential(linear(blocks(tokens), hidden), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return self.compress(x) + self.mlp(x.transpose(1, 2)).transpose(1, 2)


class InteractionModule(nn.Module):
    """X_n = Norm(Concat(Interaction_i(X_{n-1}, X_dense), Residual(X_{n-1}))).

    The dense embedding joins the input of the interactions as one more embedding. The n outputs
    are shared equally among the interactions and the residual, which takes what is left over.

    Args:
        tokens: names of the N embeddings, without the dense one.
        n_out: n, at least one for every interaction and one for the residual.
        dim: D.
        interactions: names in INTERACTIONS, run in parallel.
        config: sizes inside them.
    """

    def __init__(
        self,
        tokens: Sequence[str],
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
            {
                name: INTERACTIONS[name]((*tokens, DENSE), share, dim, config)
                for name in interactions
            }
        )
        self.residual = Residual(tokens, n_out - share * len(interactions))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, dense: Tensor) -> Tensor:
        """(B, N, D) and (B, D) -> (B, n, D)."""
        with_dense = torch.cat([x, dense[:, None]], dim=1)
        outputs = [module(with_dense) for module in self.interactions.values()]
        return self.norm(torch.cat([*outputs, self.residual(x)], dim=1))


class Pyramid(nn.Module):
    """Interaction modules on top of each other, each with fewer embeddings than the one below.

    Args:
        tokens: names of the N_0 embeddings.
        sizes: embeddings after each module.
        dim, interactions, config: as of `InteractionModule`.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        sizes: tuple[int, ...],
        dim: int,
        *,
        interactions: tuple[str, ...],
        config: InteractionConfig,
    ) -> None:
        super().__init__()
        if not sizes:
            raise ValueError("sizes is empty: a pyramid has one interaction module or more")
        inputs = [tuple(tokens), *(numbered("mixed", size) for size in sizes[:-1])]
        self.layers = nn.ModuleList(
            InteractionModule(below, above, dim, interactions=interactions, config=config)
            for below, above in zip(inputs, sizes, strict=True)
        )
        self.outputs = numbered("mixed", sizes[-1])

    def forward(self, x: Tensor, dense: Tensor) -> Tensor:
        """(B, N_0, D) and (B, D) -> (B, N_n, D)."""
        for layer in self.layers:
            x = layer(x, dense)
        return x
