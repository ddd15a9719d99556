"""Which input each row or column of a weight belongs to: weights are loaded by name, not by place.

An axis of a tensor that runs over features, tokens or tasks has *blocks*: the name and the length of each
piece, in order. A spec that declares the same features in another order moves the blocks and nothing else:

    numbers age, spent and a token `place` of dimension 4, flattened, into a linear layer:
    weight (hidden, 6), axis 1     (("dense:age", 1), ("dense:spent", 1), ("candidate:place", 4))

Names are unique within an axis. What a spec names has the form `role:name`; what is made of it has a
blank in its name (`dense:age hinges`), which no name of a spec has. An axis without blocks is a matter of the
model's configuration alone.

A module keeps the blocks of its own parameters and buffers in `axes`; `linear`, `embedding` and `named` put
them there, and `axes_of` collects them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Blocks = tuple[tuple[str, int], ...]
Axes = Mapping[int, Blocks]  # of one tensor, by axis

TASK = "task"  # the role of an output

_Module = TypeVar("_Module", bound=nn.Module)


def roles(role: str, names: Iterable[str]) -> tuple[str, ...]:
    """`role:name` of each."""
    return tuple(f"{role}:{name}" for name in names)


def numbered(role: str, count: int) -> tuple[str, ...]:
    """`role:0` and on, of what only the model's configuration counts."""
    return roles(role, map(str, range(count)))


def blocks(names: Iterable[str], length: int = 1) -> Blocks:
    """One block of that length for each name."""
    return tuple((name, length) for name in names)


def product(outer: Iterable[str], inner: Iterable[str]) -> Blocks:
    """Blocks of an axis that is flattened from two, the inner one running faster."""
    inner = tuple(inner)
    return tuple((f"{a} {b}", 1) for a in outer for b in inner)


def length(of: Blocks | int) -> int:
    """Of the axis."""
    return of if isinstance(of, int) else sum(n for _, n in of)


def named(module: _Module, **axes: Axes) -> _Module:
    """The module, with the blocks of its parameters and buffers recorded.

    Args:
        axes: by the tensor's own name in the module; tensors that the module does not have are left out.
    """
    present = {n: of for n, of in axes.items() if isinstance(getattr(module, n, None), Tensor)}
    for name, of in present.items():
        shape = getattr(module, name).shape
        for axis, parts in of.items():
            assert length(parts) == shape[axis], (name, axis, parts, shape)
            assert len(dict(parts)) == len(parts), (name, axis, parts)
    module.axes = present
    return module


def linear(inputs: Blocks | int, outputs: Blocks | int, *, bias: bool = True) -> nn.Linear:
    """A linear layer from and to axes with blocks, or without where it is a number."""
    layer = nn.Linear(length(inputs), length(outputs), bias=bias)
    rows = {} if isinstance(outputs, int) else {0: outputs}
    columns = {} if isinstance(inputs, int) else {1: inputs}
    return named(layer, weight={**rows, **columns}, bias=rows)


def embedding(rows: Iterable[str], dim: int) -> nn.Embedding:
    """An embedding of `dim` for each name."""
    rows = tuple(rows)
    return named(nn.Embedding(len(rows), dim), weight={0: blocks(rows)})


def axes_of(model: nn.Module) -> dict[str, Axes]:
    """The blocks of every parameter and buffer of the model that has any, by its name in the state."""
    return {
        f"{prefix}.{name}" if prefix else name: axes
        for prefix, module in model.named_modules()
        for name, axes in getattr(module, "axes", {}).items()
        if axes
    }


class Aligned(NamedTuple):
    """A stored tensor in the order of another: names of blocks that it lacks, and of those left out."""

    tensor: Tensor
    lacking: tuple[str, ...]
    dropped: tuple[str, ...]


def aligned(ours: Tensor, axes: Axes, theirs: Tensor, their_axes: Axes) -> Aligned | None:
    """`theirs` in the order and the shape of `ours`.

    Args:
        ours: gives the blocks that `theirs` lacks.
        axes, their_axes: the blocks of the two.

    Returns:
        None where an axis without blocks has another length, or only one of the two has blocks. The
        tensor is `theirs` itself where nothing moves.
    """
    if ours.ndim != theirs.ndim or set(axes) != set(their_axes):
        return None
    if any(ours.shape[a] != theirs.shape[a] for a in range(ours.ndim) if a not in axes):
        return None
    if axes == their_axes:
        return Aligned(theirs, (), ())
    lacking: list[str] = []
    dropped: list[str] = []
    out, moved = ours.detach().clone(), theirs
    places = [torch.arange(n) for n in ours.shape]
    for axis, mine in axes.items():
        to, of = _places(mine), _places(their_axes[axis])
        common = [block for block in mine if block in of]
        lacking += [block[0] for block in mine if block not in of]
        dropped += [block[0] for block in their_axes[axis] if block not in to]
        places[axis] = torch.cat([torch.arange(0), *(to[b] for b in common)])
        taken = torch.cat([torch.arange(0), *(of[b] for b in common)])
        moved = moved.index_select(axis, taken.to(moved.device))
    index = torch.meshgrid(*places, indexing="ij")
    out[index] = moved.to(out)
    return Aligned(out, tuple(lacking), tuple(dropped))


def _places(parts: Blocks) -> dict[tuple[str, int], Tensor]:
    """Where each block lies."""
    found, start = {}, 0
    for name, n in parts:
        found[name, n] = torch.arange(start, start + n)
        start += n
    return found
