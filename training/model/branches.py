"""The sums that a residual stream consists of, as pieces that can be walked: h + block(norm(h)), and the head's norm.

Shape suffixes: B rows, T positions, D hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pat_serve.cut.axes import FFN, KV_GROUPS
from pat_serve.families.family import Family


@dataclass(frozen=True, kw_only=True)
class Branch:
    """An attention or an MLP with its norm; or the last norm with the head, which adds nothing to the stream.

    Attributes:
        norm: name of the hidden norm.
        readers: names of the linears that read it.
        layer: that it belongs to; None for the head's.
        writer: name of the linear whose output is added to the stream; None for the head's.
        inner_axis: the axis that the writer's input runs along; None for the head's.
    """

    norm: str
    readers: tuple[str, ...]
    layer: int | None = None
    writer: str | None = None
    inner_axis: str | None = None

    def block(self, base: nn.Module) -> nn.Module:
        """The attention or the MLP."""
        [name] = {reader.rpartition(".")[0] for reader in self.readers}
        return base.get_submodule(name)

    def added(self, base: nn.Module, hidden_BTD: Tensor, settings: dict[str, Any]) -> Tensor:
        """The branch's addition to the stream. No family of the table computes anything else, in evaluation mode."""
        block, normed_BTD = self.block(base), base.get_submodule(self.norm)(hidden_BTD)
        attends = self.inner_axis == KV_GROUPS
        added_BTD: Tensor = block(hidden_states=normed_BTD, **settings)[0] if attends else block(normed_BTD)
        return added_BTD


def branches(family: Family, num_layers: int) -> tuple[list[Branch], Branch]:
    """All branches in the order in which the stream passes them, and the head's."""
    readers: dict[str, list[str]] = {}
    writers: dict[tuple[int | None, str], str] = {}
    for name, spec, i in family.modules(num_layers):
        if spec.norm is not None:
            readers.setdefault(spec.norm.format(i=i), []).append(name)
        elif spec.writes_residual and i is not None:
            writers[i, spec.dims[1][0].axis] = name
    norms = [spec.module for spec in family.tensors if spec.hidden_norm]
    inner = [norm for norm in norms if "{i}" in norm]
    [last] = set(norms) - set(inner)
    walked = [
        Branch(
            norm=norm.format(i=i),
            readers=tuple(readers[norm.format(i=i)]),
            layer=i,
            writer=writers[i, axis],
            inner_axis=axis,
        )
        for i in range(num_layers)
        # Attention comes first in every family of the table.
        for norm, axis in zip(inner, (KV_GROUPS, FFN), strict=True)
    ]
    return walked, Branch(norm=last, readers=tuple(readers[last]))
