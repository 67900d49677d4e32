"""Every tensor that an export holds, with the tensor of the base that it is made of. No weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pat_serve.checkpoints.shards import TensorEntry
from pat_serve.cut.slicing import Target, targets
from pat_serve.export.run.reader import Run
from pat_serve.families.architectures import EMBEDDING, HEAD
from pat_serve.families.family import ExportAs

_EMBEDDING_WEIGHT, _HEAD_WEIGHT = f"{EMBEDDING}.weight", f"{HEAD}.weight"


@dataclass(frozen=True, kw_only=True)
class Zeros:
    """A bias of zeros that the export's class has and the base's has not."""

    shape: tuple[int, ...]


def contents(run: Run) -> dict[str, Target | Zeros]:
    """The tensors of an export by name, in the order in which they are written: the base's, and then what is added."""
    base, cuts = run.base, run.plan.cuts
    found: dict[str, Target | Zeros] = {}
    for target in targets(base.family, cuts, base.sizes, base.tensors).values():
        if target is not None:
            found[target.name] = target
    exported = cuts.sizes(base.sizes)
    other = class_of_export(run)
    for module in other.zero_biases if other else ():
        found |= {f"{module.format(i=i)}.bias": Zeros(shape=(exported.hidden,)) for i in range(exported.layers)}
    if unties_head(run):
        embedding = found[_EMBEDDING_WEIGHT]
        assert isinstance(embedding, Target)
        head, _, _ = base.family.match(_HEAD_WEIGHT)
        found[_HEAD_WEIGHT] = replace(embedding, name=_HEAD_WEIGHT, spec=head)
    elif base.tied:
        # Some tied checkpoints carry the head as well; loaders ignore it, so it is not written.
        found.pop(_HEAD_WEIGHT, None)
    return found


def entry_of(run: Run, target: Target) -> tuple[TensorEntry, bool]:
    """Where the numbers of a target lie, and whether the run replaced the tensor.

    Replaced tensors belong to the turned model. A head that the turning unties begins as the stored embedding.
    """
    kind = target.name.rpartition(".")[2]
    replaced = run.replaced.get(f"{target.spec.module.format(i=target.layer)}.{kind}")
    if replaced is None and run.plan.rotation is None:
        replaced = run.replaced.get(target.source)
    return (run.base.tensors[target.source], False) if replaced is None else (replaced, True)


def shapes_of(run: Run) -> dict[str, tuple[int, ...]]:
    """Every tensor of an export with its shape, in order."""
    return {name: content.shape for name, content in contents(run).items()}


def class_of_export(run: Run) -> ExportAs | None:
    """The stock class of the export, where it is another one than the base's."""
    base = run.base
    return base.family.class_of_export(base.sizes, run.plan.cuts.sizes(base.sizes), base.config)


def architecture(run: Run) -> str:
    """The stock class that loads the export."""
    other = class_of_export(run)
    return other.architecture if other else run.base.family.architecture


def unties_head(run: Run) -> bool:
    """A tied base's head gets a tensor of its own in the export.

    Its embedding carries a full operator, or the head takes the last norm's gain, or has replaced weights: they part
    ways. Mask and scale alone leave it tied: the final norm divides the scale out again. So does a rotation of a plan
    that says so: the head is the turned embedding then, and the last norm keeps its gain.
    """
    fold = run.plan.folds.get(EMBEDDING)
    moved = (fold is not None and fold.rank > 0) or (run.plan.rotation is not None and not run.plan.tied)
    return run.base.tied and (moved or _HEAD_WEIGHT in run.replaced)
