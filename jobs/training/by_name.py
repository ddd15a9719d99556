"""A stored state in the order of a model's own inputs and tasks, and what of it does not fit.

A spec may have changed since the state was stored: features in another order, new ones, features that are
gone. Tensors are matched by their name, and within a tensor by the names of its blocks (`models.axes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.axes import TASK, Aligned, Axes, aligned, axes_of

_NAMED = 5  # inputs, in a message
Misfit = dict[str, tuple[str, ...]]  # tensor -> names of blocks; none: all of it


@dataclass(frozen=True)
class Taken:
    """What did not fit when a state was taken over.

    Args:
        lacking: what the state did not have: it starts from first weights.
        dropped: what only the state had.
    """

    lacking: Misfit = field(default_factory=dict)
    dropped: Misfit = field(default_factory=dict)

    def fresh(self) -> list[str]:
        """What starts from first weights: tensors, or `tensor[blocks]`."""
        return [f"{t}[{', '.join(parts)}]" if parts else t for t, parts in self.lacking.items()]

    def unknown_tasks(self) -> set[str]:
        """Tasks that the state knows nothing of; a model without them is whole for all others."""
        tasks = (b for parts in self.lacking.values() for b in parts if b.startswith(f"{TASK}:"))
        return {block.partition(":")[2] for block in tasks}

    def misfit(self) -> str:
        """Why the model is not the one that was trained; empty where it is."""
        found = ((_inputs(self.lacking), "lacks"), (_inputs(self.dropped), "was trained with"))
        return " and ".join(f"{verb} {_listed(names)}" for names, verb in found if names)


class Loading:
    """Takes over a stored state, a piece after the other.

    Args:
        model: whose tensors are wanted.
        state: what `Trainer.state` gave.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        self.model, self.state = model, state
        self.axes: tuple[Mapping[str, Axes], Mapping[str, Axes]] = axes_of(model), state["axes"]

    @torch.no_grad()
    def weights(self) -> Taken:
        """Copy parameters and buffers; those that the state lacks stay as they are."""
        ours, theirs = self.model.state_dict(), self.state["weights"]
        lacking: Misfit = {}
        dropped: Misfit = {name: () for name in theirs if name not in ours}
        for name, tensor in ours.items():
            found = self._aligned(name, tensor, theirs.get(name))
            if found is None:
                lacking[name] = ()
                continue
            tensor.copy_(found.tensor)
            if found.lacking:
                lacking[name] = found.lacking
            if found.dropped:
                dropped[name] = found.dropped
        return Taken(lacking, dropped)

    def optimizers(
        self, optimizers: Mapping[str, torch.optim.Optimizer], parameters: Mapping[str, Tensor]
    ) -> None:
        """Replace the state of the optimizers, by kind, for `parameters`, by name."""
        names = {parameter: name for name, parameter in parameters.items()}
        for kind, optimizer in optimizers.items():
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                slots = self._slots(kind, names[parameter], parameter)
                if slots is None:
                    optimizer.state.pop(parameter, None)
                else:
                    optimizer.state[parameter] = slots

    def _slots(self, kind: str, name: str, parameter: Tensor) -> dict[str, Tensor] | None:
        """The state of one parameter, zero for new blocks; None: it starts anew."""
        stored = self.state.get(kind, {}).get(name)
        if (
            stored is None
            or self._aligned(name, parameter, self.state["weights"].get(name)) is None
        ):
            return None
        return {k: self._slot(name, parameter, v) for k, v in stored.items()}

    def trained(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The version of the parameters that is trained on, where it is not the one in the weights."""
        stored = self.state.get("trained", {})
        found = ((n, self._aligned(n, p, stored.get(n))) for n, p in parameters.items())
        return {name: one.tensor for name, one in found if one is not None}

    def tables(self) -> Mapping[str, Tensor]:
        """The state of the tables' optimizer; none for rows of another dimension."""
        ours, theirs = self.model.state_dict(), self.state["weights"]
        both = [n for n in ours if n.startswith("tables.") and n in theirs]
        same = all(ours[n].shape[1:] == theirs[n].shape[1:] for n in both)
        return self.state.get("tables", {}) if same else {}

    def _aligned(self, name: str, ours: Tensor, theirs: Tensor | None) -> Aligned | None:
        if theirs is None:
            return None
        mine, other = (axes.get(name, {}) for axes in self.axes)
        return aligned(ours, mine, theirs, other)

    def _slot(self, name: str, parameter: Tensor, stored: Tensor) -> Tensor:
        if stored.ndim == 0:  # a count of steps, which stays where it is
            return stored.clone()
        found = self._aligned(name, torch.zeros_like(parameter), stored)
        assert found is not None, name
        return found.tensor.to(parameter.device, copy=True)


def _inputs(found: Misfit) -> list[str]:
    """Names for people: of inputs, not of what is made of them, and of tensors that belong to one."""
    names = dict.fromkeys(_but_tasks(found))
    return [n for n in names if " " not in n] or list(names)


def _but_tasks(found: Misfit) -> Iterator[str]:
    for tensor, parts in found.items():
        yield from (name for name in parts or (tensor,) if not name.startswith(f"{TASK}:"))


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
