"""The models that parity compares, loaded as a whole or walked through layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pat_serve.architectures import EMBEDDING, HEAD
from pat_serve.checkpoint import open_checkpoint
from pat_serve.errors import ParityError
from pat_serve.export.answers import Answers, answer, answer_layerwise, answers_bytes
from pat_serve.export.narrow import narrow_shapes, narrow_tensors
from pat_serve.export.prompts import Prompts
from pat_serve.export.reader import Run
from pat_serve.float64_norms import compute_norms_in_float64
from pat_serve.hardware import available_memory_bytes
from pat_serve.layerwise import LayerwiseModel, StoredWeights, Weights
from pat_serve.masked import load_masked_model, open_masked_layerwise, round_normalizer
from pat_serve.stock_class import meta_model

# What loading takes beside the weights: a tensor in two dtypes, activations, the libraries.
_LOADING_BYTES = 1 << 30


class Models(Protocol):
    """Asks each of the models; only one is in memory at a time."""

    def trained(self, dtype: torch.dtype, prompts: Prompts) -> Answers:
        """The masked wide model, which shares no code with the rewriting."""
        ...

    def exact(self, dtype: torch.dtype, prompts: Prompts) -> Answers:
        """What the files would be without rounding: the rewriting itself, never written."""
        ...

    def exported(self, dtype: torch.dtype, prompts: Prompts) -> Answers:
        """The files."""
        ...


def must_walk(run: Run, prompts: Prompts, dtype: torch.dtype) -> bool:
    """The wide model and the logits of both do not fit into the memory that is free now."""
    weights_bytes = sum(prod(entry.shape) for entry in run.base.tensors.values()) * dtype.itemsize
    logits_bytes = 2 * answers_bytes(prompts.whole, int(run.base.config["vocab_size"]), dtype)
    return weights_bytes + logits_bytes + _LOADING_BYTES > available_memory_bytes()


class LoadedModels:
    """Loads each model as stock transformers does.

    Args:
        run: the run.
        folder: the exported files.
        target: their dtype, which rounds the factor of a scaled embedding in whatever dtype is computed.
    """

    def __init__(self, run: Run, folder: Path, target: torch.dtype) -> None:
        self._run, self._folder, self._target = run, folder, target

    def trained(self, dtype: torch.dtype, prompts: Prompts) -> Answers:
        """Base, adapter and operators; see `pat_serve.masked`."""
        wide = load_masked_model(self._run.base.folder, self._run.folder, self._run.plan, dtype)
        return self._ask(wide, dtype, prompts, f"trained model in {dtype}")

    def exact(self, dtype: torch.dtype, prompts: Prompts) -> Answers:
        """The rewritten tensors in a model of the files' config."""
        model = meta_model(_config(self._folder))
        tensors = narrow_tensors(self._run, list(narrow_shapes(self._run)), dtype, self._target)
        model.load_state_dict(dict(tensors), strict=False, assign=True)
        model.tie_weights()
        return self._ask(model, dtype, prompts, "rewriting before it is rounded")

    def exported(self, dtype: torch.dtype, prompts: Prompts) -> Answers:
        """The files, which must hold the tensors of their class and no others."""
        from transformers import AutoModelForCausalLM

        model, report = AutoModelForCausalLM.from_pretrained(
            self._folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report[kind]:
                raise _misfit(self._folder, f"{kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[0]}")
        return self._ask(model.eval(), dtype, prompts, f"exported model in {dtype}")

    def _ask(self, model: Any, dtype: torch.dtype, prompts: Prompts, description: str) -> Answers:
        round_normalizer(model, self._target)
        if dtype == torch.float64:
            compute_norms_in_float64(model, self._run.base.family.norm_offset)
        return answer(model, prompts, description.replace("torch.", ""))


class WalkedModels:
    """Reads one layer at a time; arguments as for `LoadedModels`."""

    def __init__(self, run: Run, folder: Path, target: torch.dtype) -> None:
        self._run, self._folder, self._target = run, folder, target

    def trained(self, dtype: torch.dtype, prompts: Prompts) -> Answers:
        """Base, adapter and operators; see `pat_serve.masked`."""
        wide = open_masked_layerwise(self._run.base, self._run.folder, self._run.plan, dtype)
        return self._ask(wide, dtype, prompts, f"trained model in {dtype}")

    def exact(self, dtype: torch.dtype, prompts: Prompts) -> Answers:
        """Every layer is rewritten when its turn comes."""
        return self._narrow(NarrowWeights(self._run, dtype, self._target), dtype, prompts, "rewriting, not rounded")

    def exported(self, dtype: torch.dtype, prompts: Prompts) -> Answers:
        """The files, which must hold the tensors of their class and no others."""
        checkpoint = open_checkpoint(str(self._folder))
        stored = set(checkpoint.tensors) | ({f"{HEAD}.weight"} if checkpoint.tied else set())
        wanted = {name for name, _ in meta_model(_config(self._folder)).named_parameters()}
        if odd := sorted(stored ^ wanted):
            raise _misfit(self._folder, f"the tensor {odd[0]} in only one of them")
        return self._narrow(StoredWeights(checkpoint), dtype, prompts, f"exported model in {dtype}")

    def _narrow(self, weights: Weights, dtype: torch.dtype, prompts: Prompts, description: str) -> Answers:
        model = LayerwiseModel(meta_model(_config(self._folder)), weights, dtype)
        return self._ask(model, dtype, prompts, description)

    def _ask(self, model: LayerwiseModel, dtype: torch.dtype, prompts: Prompts, description: str) -> Answers:
        round_normalizer(model.model, self._target)
        if dtype == torch.float64:
            compute_norms_in_float64(model.model, self._run.base.family.norm_offset)
        return answer_layerwise(model, prompts, description.replace("torch.", ""))


class NarrowWeights:
    """The narrow model's weights, rewritten when asked for."""

    def __init__(self, run: Run, dtype: torch.dtype, runs_in: torch.dtype) -> None:
        self._run, self._dtype, self._runs_in = run, dtype, runs_in
        self._tied = f"{HEAD}.weight" not in narrow_shapes(run)
        self._last: tuple[str, Tensor] | None = None

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        [(_, tensor)] = narrow_tensors(self._run, [name], self._dtype, self._runs_in)
        return tensor

    def rows(self, name: str, rows: Sequence[int] | slice) -> Tensor:
        """Some rows of a table, which is kept until the other one is asked for."""
        if name == f"{HEAD}.weight" and self._tied:
            name = f"{EMBEDDING}.weight"
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self.tensor(name)
        return self._last[1][rows]


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


def _misfit(folder: Path, found: str) -> ParityError:
    return ParityError(
        folder,
        expected="the tensors that the class of config.json has, as stock transformers loads them",
        found=found,
        fix="Export again.",
    )
