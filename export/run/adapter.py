"""Read a run's LoRA adapter in PEFT's format: it is checked once, then read one module at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.checkpoints.shards import TensorEntry, read_header
from pat_serve.errors import BrokenCheckpoint, BrokenPlan, UnsupportedModel, first_line
from pat_serve.families.architectures import EMBEDDING, HEAD
from pat_serve.files.strict_json import parse
from pat_serve.run.plan import PLAN_JSON

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_ADAPTER_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class LoraUpdate:
    """One module's low-rank update: W + scaling * B A.

    Attributes:
        a_RI: (rank, in).
        b_OR: (out, rank).
        scaling: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
    """

    a_RI: Tensor
    b_OR: Tensor
    scaling: float


class _StoredAdapter(Mapping[str, LoraUpdate]):
    """The updates in an adapter's file, by module name, each read when it is asked for."""

    def __init__(self, entries: Mapping[str, TensorEntry], modules: list[str], scaling: float) -> None:
        self._entries = entries
        self._modules = dict.fromkeys(modules)
        self._scaling = scaling

    def __getitem__(self, module: str) -> LoraUpdate:
        if module not in self._modules:
            raise KeyError(module)
        a, b = (self._entries[name].read() for name in self.names(module))
        return LoraUpdate(a_RI=a, b_OR=b, scaling=self._scaling)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    @staticmethod
    def names(module: str) -> tuple[str, str]:
        """Names of the two tensors of a module's update."""
        return f"{_ADAPTER_PREFIX}{module}.lora_A.weight", f"{_ADAPTER_PREFIX}{module}.lora_B.weight"


def read_adapter(folder: Path, base: Checkpoint, named: Mapping[str, str]) -> Mapping[str, LoraUpdate]:
    """Open a PEFT LoRA adapter and check it, one tensor in memory at a time.

    Args:
        folder: folder of the adapter.
        base: base that the adapter updates.
        named: the files that the plan names, whose content was checked.

    Raises:
        UnsupportedModel: the merge of this kind of adapter is more than W + scaling * B A.
        BrokenPlan: the tensors do not pair up, do not fit the base or are not finite.
    """
    if set(named) != set(_ADAPTER_FILES):
        raise BrokenPlan(
            PLAN_JSON,
            expected=f"the SHA-256 of {' and '.join(_ADAPTER_FILES)}",
            found=", ".join(sorted(named)),
            fix="Copy the run again.",
        )
    rank, scaling = _rank_and_scaling(folder / _ADAPTER_FILES[0])
    weights = folder / _ADAPTER_FILES[1]
    try:
        entries = read_header(weights)
    except BrokenCheckpoint as error:
        raise BrokenPlan(weights, expected=error.expected, found=error.found, fix="Copy the run again.") from error
    modules = _paired_modules(entries, weights)
    for module in modules:
        # A tied head that the export unties begins as the embedding.
        target = base.tensors.get(f"{EMBEDDING if base.tied and module == HEAD else module}.weight")
        a, b = (entries[name].shape for name in _StoredAdapter.names(module))
        if target is None or len(a) != 2 or len(b) != 2 or b[1] != a[0] or (b[0], a[1]) != target.shape:
            raise BrokenPlan(
                weights,
                expected=f"an update of the base's {module}" + (f" of shape {target.shape}" if target else ""),
                found="no such module" if target is None else f"{b} times {a}",
                fix="The adapter belongs to another base.",
            )
        if a[0] != rank:
            # The scaling follows from the configuration's rank.
            raise BrokenPlan(
                weights,
                expected=f"an update of rank {rank}",
                found=f"rank {a[0]} of {module}",
                fix="Copy the run again.",
            )
        for name in _StoredAdapter.names(module):
            if not bool(torch.isfinite(entries[name].read()).all()):
                raise BrokenPlan(
                    weights, expected=f"finite numbers in {name}", found="NaN or infinity", fix="Repeat the training."
                )
    return _StoredAdapter(entries, modules, scaling)


# peft writes these values for an adapter whose merge is W + scaling * B A. Any other value could make it another merge.
# Read without peft, which takes half of an export's memory to import.
_PLAIN_ADAPTER: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    # All others (pissa, olora, corda, loftq, lora_ga) change the base before the training begins, so that the adapter
    # alone is an update of another model.
    "init_lora_weights": (None, False, "gaussian", "eva", "orthogonal", True),
}


def _rank_and_scaling(path: Path) -> tuple[int, float]:
    """Read r and the factor of B A: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    try:
        config = parse(path.read_bytes())
        rank, alpha, rank_stabilized = config["r"], config["lora_alpha"], config.get("use_rslora", False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenPlan(
            path, expected="a LoRA adapter's configuration", found=first_line(error), fix="Copy the run again."
        ) from error
    for option, plain in _PLAIN_ADAPTER.items():
        value = config.get(option)
        if value not in plain:
            raise UnsupportedModel(
                path.parent,
                expected=f"a LoRA adapter with {option}={plain[-1]!r}",
                found=f"{option}={value!r:.80}",
                fix="Only W + scaling * B A can be merged exactly here.",
            )
    numbers = type(rank) is int and rank > 0 and type(alpha) in (int, float) and math.isfinite(alpha)
    if not numbers or not isinstance(rank_stabilized, bool):
        raise BrokenPlan(
            path,
            expected="r as a positive integer and lora_alpha as a number",
            found=f"r={rank!r:.40}, lora_alpha={alpha!r:.40}",
            fix="Copy the run again.",
        )
    return rank, float(alpha / (rank**0.5 if rank_stabilized else rank))


def _paired_modules(names: Iterable[str], weights: Path) -> list[str]:
    halves: dict[str, set[str]] = {}
    for name in names:
        module, _, half = name.removeprefix(_ADAPTER_PREFIX).removesuffix(".weight").rpartition(".")
        if half not in ("lora_A", "lora_B"):
            raise BrokenPlan(
                weights, expected="LoRA tensors alone", found=f"the tensor {name}", fix="Train with plain LoRA."
            )
        halves.setdefault(module, set()).add(half)
    for module, found in halves.items():
        if len(found) != 2:
            raise BrokenPlan(
                weights, expected=f"lora_A and lora_B of {module}", found=found.pop(), fix="Copy the run again."
            )
    return sorted(halves)
