"""Several processes that train one model: one writes, all agree, and sharded tensors are read whole."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from pat_serve.errors import PatServeError, UsageError

if TYPE_CHECKING:
    from transformers import TrainingArguments

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        index: rank of the process; rank 0 writes.
        count: number of processes; 1 without a launcher.
    """

    index: int
    count: int

    @staticmethod
    def join() -> Ranks:
        """Join the group that a launcher (accelerate launch, torchrun) announces in the environment."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1 and not dist.is_initialized():
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available())
        return Ranks(index=int(os.environ.get("RANK", "0")), count=count)

    def agree(self, decide: Callable[[], T]) -> T:
        """Do something on rank 0 alone, and tell every rank what came of it; nobody goes on before it is done.

        Raises:
            PatServeError: on rank 0, whatever `decide` raises. The other ranks then end with the same exit code and
                without a word, or the same message would be printed by all of them.
        """
        if self.count == 1:
            return decide()
        answer: list[Any] = [None, 0]
        failure: BaseException | None = None
        if self.index == 0:
            try:
                answer[0] = decide()
            except BaseException as error:
                failure = error
                answer[1] = error.exit_code if isinstance(error, PatServeError) else 1
        dist.broadcast_object_list(answer, src=0)
        if failure is not None:
            raise failure
        if answer[1]:
            sys.exit(int(answer[1]))
        decided: T = answer[0]
        return decided


def sharded_by_fsdp() -> bool:
    """Tell whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP may have sharded, in full; every rank must ask. Gradients flow back to the shards."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        # Factors of rank 0: torch cannot gather a tensor without an element.
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        full: Tensor = tensor.full_tensor()
        return full
    return tensor


def snapshot(parameter: Tensor) -> Tensor:
    """A detached copy of a parameter in main memory, wherever FSDP or ZeRO-3 keep it; every rank must ask."""
    if hasattr(parameter, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()
    return whole(parameter.detach()).cpu().contiguous()


def overwrite(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter that FSDP may have sharded the values of a whole tensor."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not parameter.numel():
        return
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    with torch.no_grad():
        parameter.copy_(value)


def same_on_all(tensor: Tensor, what: str) -> Tensor:
    """Rank 0's tensor, which all others must hold too: replicas that drifted apart train two models."""
    if dist.is_available() and dist.is_initialized():
        first = tensor.clone()
        dist.broadcast(first, src=0)
        assert torch.equal(first, tensor), f"{what} differs between rank 0 and rank {dist.get_rank()}"
    return tensor


def use_one_device(arguments: TrainingArguments) -> int:
    """Keep the Trainer from nn.DataParallel, which it chooses for a process that sees several GPUs.

    DataParallel copies the model at every step, and the method's losses live on the original alone.

    Returns:
        number of unused GPUs.
    """
    visible = int(arguments.n_gpu)  # asking makes it look, once
    if visible > 1:
        arguments._n_gpu = 1
    return max(0, visible - 1)


def refuse_zero3() -> None:
    """Refuse ZeRO-3: it leaves a parameter empty outside of its module's forward pass, where regularisers read it.

    FSDP2 shards the same tensors as DTensors, which `whole` gathers.

    Raises:
        UsageError: `accelerate launch` asks for it.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("true", "1"):
        return
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if path := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        stage = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0)
    if int(stage) == 3:
        raise UsageError(
            "accelerate's configuration",
            expected="DDP, FSDP2 or DeepSpeed up to ZeRO-2",
            found="ZeRO-3, which empties what the mask's losses read",
            fix="configs/fsdp2.yaml shards the weights too.",
        )
