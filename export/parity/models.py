"""The models that parity compares, loaded as a whole or walked through layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.checkpoints.stock_class import meta_model
from pat_serve.errors import ParityError
from pat_serve.export.files.model_files import dtype_name
from pat_serve.export.parity.answers import Answers, Texts, answer, answer_layerwise, answers_bytes
from pat_serve.export.parity.float64_norms import compute_norms_in_float64
from pat_serve.export.parity.layerwise import LayerwiseModel, StoredWeights, Weights
from pat_serve.export.parity.masked import (
    convert_parameters,
    load_masked_model,
    open_masked_layerwise,
    round_normalizer,
)
from pat_serve.export.parity.prompts import Prompts
from pat_serve.export.rewrite.blocks import Rewriting
from pat_serve.export.rewrite.rounding import FileCheck, round_at_random
from pat_serve.export.rewrite.scratch import Scratch
from pat_serve.export.run.reader import Run
from pat_serve.families.architectures import EMBEDDING, HEAD
from pat_serve.machine.hardware import available_memory_bytes
from pat_serve.terminal.progress import track

# Loading takes so much beside the weights: a tensor in two dtypes, activations, the libraries.
_LOADING_BYTES = 1 << 30


# A dtype and what to ask in it.
Narrower = tuple[torch.dtype, Prompts]


class Models(Protocol):
    """Asks each of the models; only one is in memory at a time.

    `texts` are the trained model's continuations; at each of their places a model chooses its own next token.
    """

    def trained(self, dtype: torch.dtype, prompts: Prompts, narrower: Narrower | None = None) -> Iterator[Answers]:
        """The masked wide model, which shares no code with the rewriting; it generates.

        With `narrower` it is asked a second time, in another dtype and other prompts.
        """
        ...

    def exact(
        self, dtype: torch.dtype, prompts: Prompts, texts: Texts, rounding: torch.dtype | None = None
    ) -> Iterator[Answers]:
        """Answers of the rewriting itself, before it is rounded; it is never written.

        Loaded, and in `exact_dtype`, the files are checked against it in passing. With `rounding` it is asked a second
        time, with every number moved at random by as much as a rounding to that dtype.

        Raises:
            ParityError: as `check_files`.
        """
        ...

    @property
    def exact_dtype(self) -> torch.dtype:
        """The dtype of the rewriting, before its tensors were rounded to those of the files."""
        ...

    def exported(self, dtype: torch.dtype, prompts: Prompts, texts: Texts) -> Answers:
        """Answers of the exported files, which stock classes load."""
        ...

    def check_files(self) -> None:
        """Hold the files against the rewriting without asking a model.

        Raises:
            ParityError: they are not its nearest values.
        """
        ...


def must_walk(run: Run, prompts: Prompts, dtype: torch.dtype) -> bool:
    """The wide model and the logits of both do not fit into the memory that is free now."""
    weights_bytes = sum(prod(entry.shape) for entry in run.base.tensors.values()) * dtype.itemsize
    logits_bytes = 2 * answers_bytes(prompts.whole, run.base.sizes.vocab, dtype)
    return weights_bytes + logits_bytes + _LOADING_BYTES > available_memory_bytes()


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Knowledge that both ways to ask the models share.

    Attributes:
        run: the run.
        check: for the exported files.
        model_dtype: in which the model will run: it rounds the factor of a scaled embedding, whatever dtype is computed
            in.
    """

    run: Run
    check: FileCheck
    model_dtype: torch.dtype

    def check_files(self) -> None:
        """Hold every written tensor against the rewriting, as `Models` asks."""
        rewriting = self.rewriting(self.exact_dtype)
        for _ in track(self.check.watch(rewriting.tensors()), "parity: files", len(rewriting.shapes)):
            pass

    @property
    def exact_dtype(self) -> torch.dtype:
        """The dtype of the rewriting, before its tensors were rounded to those of the files."""
        return torch.promote_types(torch.promote_types(self.check.dtype, self.run.base.dtype), torch.float32)

    def rewriting(self, dtype: torch.dtype) -> Rewriting:
        """Gives the tensors that the files would hold without rounding."""
        return Rewriting(self.run, dtype, self.model_dtype)

    def prepared(self, model: Any, dtype: torch.dtype) -> Any:
        """A model as it is to be asked."""
        round_normalizer(model, self.model_dtype)
        if dtype == torch.float64:
            compute_norms_in_float64(model, self.run.base.family.norm_offset)
        return model


class LoadedModels(_Asked):
    """Loads each model as stock transformers does."""

    def trained(self, dtype: torch.dtype, prompts: Prompts, narrower: Narrower | None = None) -> Iterator[Answers]:
        """Base, adapter and operators; see `pat_serve.export.parity.masked`."""
        wide = load_masked_model(self.run, dtype)
        yield answer(self.prepared(wide, dtype), prompts, f"trained model in {dtype_name(dtype)}")
        if narrower is not None:
            dtype, prompts = narrower
            # Rounded from what is there: to load, turn and wrap it again would take longer than to ask it.
            convert_parameters(wide, dtype)
            yield answer(wide, prompts, f"trained model in {dtype_name(dtype)}")

    def exact(
        self, dtype: torch.dtype, prompts: Prompts, texts: Texts, rounding: torch.dtype | None = None
    ) -> Iterator[Answers]:
        """The rewritten tensors in a model of the files' config."""
        model = meta_model(_config(self.check.folder))
        rewriting = self.rewriting(dtype)
        tensors = rewriting.tensors()
        if dtype == self.exact_dtype:
            tensors = self.check.watch(tensors)
        tensors = track(tensors, "parity: rewriting", len(rewriting.shapes))
        model.load_state_dict(dict(tensors), strict=False, assign=True)
        model.tie_weights()
        self.prepared(model, dtype)
        yield answer(model, prompts, "rewriting before it is rounded", texts)
        if rounding is not None:
            for name, parameter in model.named_parameters():
                round_at_random(parameter.data, name, rounding)
            yield answer(model, prompts, "rewriting, rounded at random", texts)

    def exported(self, dtype: torch.dtype, prompts: Prompts, texts: Texts) -> Answers:
        """The files, which must hold the tensors of their class and no others; they generate, with a cache."""
        from transformers import AutoModelForCausalLM

        model, report = AutoModelForCausalLM.from_pretrained(
            self.check.folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report[kind]:
                raise _misfit(self.check.folder, f"{kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[0]}")
        return answer(self.prepared(model.eval(), dtype), prompts, f"exported model in {dtype_name(dtype)}")


class WalkedModels(_Asked):
    """Reads one layer at a time."""

    def trained(self, dtype: torch.dtype, prompts: Prompts, narrower: Narrower | None = None) -> Iterator[Answers]:
        """Base, adapter and operators; see `pat_serve.export.parity.masked`."""
        for compute, asked in [(dtype, prompts), *([narrower] if narrower else [])]:
            wide = open_masked_layerwise(self.run, compute)
            self.prepared(wide.model, compute)
            yield answer_layerwise(wide, asked, f"trained model in {dtype_name(compute)}")

    def exact(
        self, dtype: torch.dtype, prompts: Prompts, texts: Texts, rounding: torch.dtype | None = None
    ) -> Iterator[Answers]:
        """Every layer is rewritten when its turn comes."""
        weights = RewrittenWeights(self.rewriting(dtype))
        yield self._walk(weights, dtype, prompts, "rewriting, not rounded", texts)
        if rounding is not None:
            weights = RewrittenWeights(self.rewriting(dtype), rounding)
            yield self._walk(weights, dtype, prompts, "rewriting, rounded at random", texts)

    def exported(self, dtype: torch.dtype, prompts: Prompts, texts: Texts) -> Answers:
        """The files, which must hold the tensors of their class and no others."""
        checkpoint = open_checkpoint(str(self.check.folder))
        stored = set(checkpoint.tensors) | ({f"{HEAD}.weight"} if checkpoint.tied else set())
        wanted = {name for name, _ in meta_model(_config(self.check.folder)).named_parameters()}
        if odd := sorted(stored ^ wanted):
            raise _misfit(self.check.folder, f"the tensor {odd[0]} in only one of them")
        return self._walk(StoredWeights(checkpoint), dtype, prompts, f"exported model in {dtype_name(dtype)}", texts)

    def _walk(self, weights: Weights, dtype: torch.dtype, prompts: Prompts, description: str, texts: Texts) -> Answers:
        model = LayerwiseModel(meta_model(_config(self.check.folder)), weights, dtype)
        self.prepared(model.model, dtype)
        return answer_layerwise(model, prompts, description, texts)


class RewrittenWeights:
    """The exported model's weights, rewritten when asked for, and then moved at random where a dtype is given."""

    def __init__(self, rewriting: Rewriting, rounding: torch.dtype | None = None) -> None:
        self._rewriting, self._rounding, self._scratch = rewriting, rounding, Scratch()
        self._tied = f"{HEAD}.weight" not in rewriting.shapes
        self._last: tuple[str, Tensor] | None = None

    def tensor(self, name: str) -> Tensor:
        """Give a whole tensor of the export, before or after its rounding."""
        tensor = self._rewriting.whole(name, self._scratch)
        if self._rounding is not None:
            round_at_random(tensor, name, self._rounding)
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
