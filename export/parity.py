"""The parity gate: is the exported model the trained one?

Logits of the masked wide model (base + adapter + operators as hooks, cut channels at zero) against those of the
exported files, loaded by stock transformers, on the run's own prompts and on random token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pat_serve.architectures import HIDDEN
from pat_serve.checkpoint import read_tensor, tensor_names
from pat_serve.errors import BrokenPlan, ParityError, first_line
from pat_serve.export.reader import Run
from pat_serve.masked import load_masked_model, round_normalizer
from pat_serve.progress import track
from pat_serve.run_folder import PARITY_PROMPTS_FILE

RANDOM_PROMPTS = 4
RANDOM_TOKENS = 32
LONGEST_PROMPT_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What an export of a dtype may differ by.

    Attributes:
        max_abs_over_std: largest logit difference over the logits' standard deviation.
        mean_kl_nats: mean over positions of KL(trained || exported).
        top1_agreement: share of positions with the same greedy token.
    """

    max_abs_over_std: float
    mean_kl_nats: float
    top1_agreement: float


# float32: the rewriting is exact up to the order of additions. The 16-bit rows are no proof of it: there a lost scale
# moves logits by less than some models' rounding does (LOG.md, 2026-11-22), so the exporter proves the rewriting in
# float32 first, and these only tell a rounding that ruins the model.
TOLERANCES = {
    torch.float64: Tolerance(max_abs_over_std=1e-4, mean_kl_nats=1e-6, top1_agreement=0.999),
    torch.float32: Tolerance(max_abs_over_std=1e-4, mean_kl_nats=1e-6, top1_agreement=0.999),
    torch.float16: Tolerance(max_abs_over_std=0.1, mean_kl_nats=1e-3, top1_agreement=0.97),
    torch.bfloat16: Tolerance(max_abs_over_std=0.5, mean_kl_nats=1e-2, top1_agreement=0.9),
}


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Outcome of the comparison, over all positions of all prompts; logits are compared in float32.

    `notes` say what a reader of the figures has to know about the family.
    """

    dtype: str
    prompts: int
    positions: int
    max_abs: float
    logits_std: float
    max_abs_over_std: float
    mean_kl_nats: float
    top1_agreement: float
    tolerance: Tolerance
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """All three figures are within tolerance (a NaN is not)."""
        return (
            self.max_abs_over_std <= self.tolerance.max_abs_over_std
            and self.mean_kl_nats <= self.tolerance.mean_kl_nats
            and self.top1_agreement >= self.tolerance.top1_agreement
        )

    def as_dict(self) -> dict[str, Any]:
        """For pat_export.json."""
        return asdict(self) | {"passed": self.passed}

    def require(self, out: Path) -> None:
        """Raise unless passed.

        Raises:
            ParityError: with the figures that are out of tolerance.
        """
        if self.passed:
            return
        limit = self.tolerance
        raise ParityError(
            out,
            expected=(
                f"logits within {limit.max_abs_over_std:g} of their standard deviation, KL {limit.mean_kl_nats:g} nats "
                f"and {limit.top1_agreement:.1%} equal greedy tokens"
            ),
            found=f"{self.max_abs_over_std:.3g}, {self.mean_kl_nats:.3g} nats and {self.top1_agreement:.1%}",
            fix="Nothing was exported: the files would not be the model that was trained.",
        )


def compare_logits(trained: Tensor, exported: Tensor, dtype: torch.dtype, prompts: int) -> Parity:
    """Compare two sets of logits of shape (positions, vocab)."""
    assert trained.shape == exported.shape
    # A base may pad its vocabulary with rows that no token uses; they count like all others.
    max_abs = float((trained - exported).abs().max())
    std = float(trained.std())
    # In float64: the sum of a vocabulary's float32 terms would drown a KL of 1e-8, or make it negative.
    log_p, log_q = F.log_softmax(trained.double(), dim=-1), F.log_softmax(exported.double(), dim=-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return Parity(
        dtype=str(dtype).removeprefix("torch."),
        prompts=prompts,
        positions=len(trained),
        max_abs=max_abs,
        logits_std=std,
        max_abs_over_std=max_abs / std,
        mean_kl_nats=kl,
        top1_agreement=float((trained.argmax(-1) == exported.argmax(-1)).float().mean()),
        tolerance=TOLERANCES[dtype],
    )


def trained_logits(run: Run, dtype: torch.dtype, runs_in: torch.dtype) -> Tensor:
    """Logits of the masked wide model on the run's prompts, (positions, vocab).

    Args:
        run: the run.
        dtype: to compute in.
        runs_in: dtype of the files that are to be judged, which rounds the factor of a scaled embedding.
    """
    wide = load_masked_model(run.base.folder, run.folder, run.plan, dtype)
    round_normalizer(wide, runs_in)
    return _logits(wide, parity_prompts(run), "parity: trained model")


def check_parity(run: Run, exported: Path, dtype: torch.dtype, trained: Tensor, runs_in: torch.dtype) -> Parity:
    """Measure parity of the files in a folder.

    Args:
        run: the run that they come from.
        exported: the folder with config.json and weights.
        dtype: in which they were written. Both models compute in float32 (float64 for float64 files), so that what is
            measured is the rewriting and the rounding of the weights, and not two dtypes' arithmetic.
        trained: from `trained_logits`; the wide model is out of memory again by now.
        runs_in: as `trained_logits` had it.
    """
    from transformers import AutoModelForCausalLM

    prompts = parity_prompts(run)
    narrow = AutoModelForCausalLM.from_pretrained(exported, dtype=trained.dtype, local_files_only=True).eval()
    round_normalizer(narrow, runs_in)
    parity = compare_logits(trained, _logits(narrow, prompts, "parity: exported model"), dtype, len(prompts))
    return replace(parity, notes=family_notes(run, runs_in))


def family_notes(run: Run, runs_in: torch.dtype) -> tuple[str, ...]:
    """What is particular about the base's family, in sentences for the parity report."""
    cut = run.plan.axes[HIDDEN]
    notes = []
    if cut.is_identity:
        return ()
    if any(spec.head_norm for spec in run.base.family.tensors):
        notes.append(
            "The norms over q and k heads see the changed rms_norm_eps; q_proj and k_proj carry "
            f"sqrt({cut.width}/{len(cut.kept)}), which undoes it exactly."
        )
    if run.base.family.scaled_embedding:
        notes.append(
            f"The embedding is rescaled for sqrt(hidden_size) as {str(runs_in).removeprefix('torch.')} rounds it; "
            "both models were compared with that."
        )
    return tuple(notes)


def check_rounding(exact: Path, rounded: Path, dtype: torch.dtype, out: Path) -> None:
    """Every tensor of the rounded files is the exact one's nearest value, bit for bit.

    Raises:
        ParityError: one is not.
    """
    for name, (expected, found) in _pairs(exact, rounded):
        if not torch.equal(expected.to(dtype), found):
            raise ParityError(
                out,
                expected=f"{name} to be the float32 tensor, rounded",
                found="another one",
                fix="Nothing was exported: the files would not be the model that was trained.",
            )


def parity_prompts(run: Run) -> list[list[int]]:
    """The run's own first examples, and seeded random token ids, which reach embeddings that the data does not.

    Raises:
        BrokenPlan: the run has lost its examples.
    """
    path = run.folder / PARITY_PROMPTS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts: list[list[int]] = [json.loads(line)["token_ids"][:LONGEST_PROMPT_TOKENS] for line in lines]
    except (OSError, ValueError, KeyError) as error:
        raise BrokenPlan(
            path, expected="the run's prompts", found=first_line(error), fix="Copy the run again."
        ) from error
    if not prompts:
        raise BrokenPlan(path, expected="the run's prompts", found="none", fix="Copy the run again.")
    generator = torch.Generator().manual_seed(0)
    shape = (RANDOM_PROMPTS, RANDOM_TOKENS)
    return prompts + torch.randint(int(run.base.config["vocab_size"]), shape, generator=generator).tolist()


def _pairs(first: Path, second: Path) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """The tensors of two checkpoints of the same model, one name at a time."""
    where = {name: path for path in sorted(second.glob("*.safetensors")) for name in tensor_names(path)}
    for path in sorted(first.glob("*.safetensors")):
        for name in tensor_names(path):
            yield name, (read_tensor(path, name), read_tensor(where[name], name))


@torch.no_grad()
def _logits(model: nn.Module, prompts: list[list[int]], description: str) -> Tensor:
    """Logits of every position of every prompt, (positions, vocab)."""
    rows = [model(input_ids=torch.tensor([prompt])).logits[0] for prompt in track(prompts, description, len(prompts))]
    return torch.cat(rows)
