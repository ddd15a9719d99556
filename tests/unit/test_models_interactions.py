"""Interactions compute what their papers define, in the shapes that a pyramid needs."""

from __future__ import annotations

import pytest
import torch

from models.axes import numbered
from models.interactions import (
    INTERACTIONS,
    DcnInteraction,
    DotInteraction,
    InteractionConfig,
    InteractionModule,
    Pyramid,
)

CONFIG = InteractionConfig(hidden=16, compressed=3, cross_layers=2, cross_rank=5)


@pytest.mark.parametrize("name", list(INTERACTIONS))
def test_each_interaction_compresses_and_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    module = INTERACTIONS[name](numbered("token", 7), 2, 8, CONFIG)
    out = module(torch.randn(5, 7, 8))
    assert out.shape == (5, 2, 8)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_dot_compression_is_x_times_xt_y_plus_z() -> None:
    module = DotInteraction(numbered("token", 4), 2, 6, CONFIG).double()
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    compressed = (module.compress.weight @ x[0]).flatten()
    y = module.y(compressed).view(4, 3)
    z = module.z(compressed).view(6, 3)
    torch.testing.assert_close(module.attention(x)[0], x[0] @ (x[0].T @ y + z))


def test_the_cross_network_is_eq_1_of_dcn_v2() -> None:
    module = DcnInteraction(numbered("token", 2), 1, 3, CONFIG).double()
    x0 = torch.randn(1, 2, 3, dtype=torch.float64)
    flat = x = x0.flatten()
    for down, up in zip(module.down, module.up, strict=True):
        x = flat * (up.weight @ down.weight @ x + up.bias) + x
    expected = module.project.weight @ x + module.project.bias
    torch.testing.assert_close(module(x0).flatten(), expected)


def test_the_cross_network_multiplies_features() -> None:
    """Degree 3 after two layers: no sum of functions of single features is that."""
    torch.manual_seed(0)
    module = DcnInteraction(numbered("token", 2), 1, 1, CONFIG).double()
    a, b, zero = torch.eye(2, dtype=torch.float64)[:1], torch.eye(2, dtype=torch.float64)[1:], 0.0

    def f(x):
        return module(x.view(1, 2, 1)).item()

    both = f(a + b) + f(a * zero)
    assert abs(both - f(a) - f(b)) > 1e-4


@pytest.mark.parametrize("interactions", [("mlp",), ("dot", "mixer"), tuple(INTERACTIONS)])
def test_a_pyramid_of_any_subset_narrows(interactions: tuple[str, ...]) -> None:
    pyramid = Pyramid(numbered("token", 9), (7, 5), 8, interactions=interactions, config=CONFIG)
    assert pyramid(torch.randn(3, 9, 8), torch.randn(3, 8)).shape == (3, 5, 8)


def test_the_dense_embedding_enters_every_module_again() -> None:
    pyramid = Pyramid(numbered("token", 9), (6, 4), 8, interactions=("mlp",), config=CONFIG)
    x, dense = torch.randn(3, 9, 8), torch.randn(3, 8)
    first = pyramid.layers[0](x, dense)
    assert not torch.equal(pyramid.layers[1](first, dense), pyramid.layers[1](first, dense + 1))


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(ValueError, match="3 branches need 3 embeddings"):
        InteractionModule(numbered("token", 8), 2, 4, interactions=("mlp", "dcn"), config=CONFIG)
    with pytest.raises(ValueError, match="choose from"):
        InteractionModule(numbered("token", 8), 4, 4, interactions=("fm",), config=CONFIG)
