"""Measure what quantisation costs: the quantised files against the exact float32 ones, on the run's own prompts.

Stock transformers loads both. With compressed-tensors installed it reads the quantised weights and, for 8 bits, rounds
every linear's inputs token by token, as a server's kernels do, so activations count too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pat_serve.errors import MissingExtra, ParityError
from pat_serve.export.formats.schemes import Scheme
from pat_serve.perplexity import Perplexity, summarize_nll
from pat_serve.terminal.progress import track


@dataclass(frozen=True, kw_only=True)
class QuantizationQuality:
    """The float model against the quantised one, over all positions of all prompts.

    Attributes:
        scheme: int8, int4 or fp8.
        prompts: number of the run's prompts.
        tokens: predicted tokens.
        perplexity_before: perplexity of the exact float32 model.
        perplexity_after: perplexity of the quantised model.
        perplexity_ratio: after over before.
        perplexity_limit: limit of the ratio. It does not apply where the float model does worse on the prompts than a
            uniform guess: its judgement of such text says nothing about the text that it writes.
        uniform_perplexity: perplexity of a uniform guess, the size of the vocabulary.
        max_abs_over_std: largest logit difference over the logits' standard deviation.
        mean_kl_nats: mean KL(float || quantised). The mean KL of few tokens is far less noisy than a ratio of
            perplexities, and it cannot cancel out.
        kl_limit_nats: limit of the mean KL; about the log of the perplexity's.
        top1_agreement: share of positions with the same greedy token.
    """

    scheme: str
    prompts: int
    tokens: int
    perplexity_before: float
    perplexity_after: float
    perplexity_ratio: float
    perplexity_limit: float
    uniform_perplexity: int
    max_abs_over_std: float
    mean_kl_nats: float
    kl_limit_nats: float
    top1_agreement: float

    @property
    def passed(self) -> bool:
        """The figures keep the limits (a NaN keeps none)."""
        fluent = self.perplexity_ratio <= self.perplexity_limit or self.perplexity_before > self.uniform_perplexity
        return fluent and self.mean_kl_nats <= self.kl_limit_nats

    def as_dict(self) -> dict[str, Any]:
        """The figures as pat_export.json has them."""
        return asdict(self) | {"passed": self.passed}

    def describe(self) -> str:
        """Describe the figures in one line for the terminal and the model card."""
        return (
            f"perplexity {self.perplexity_before:.4g} -> {self.perplexity_after:.4g} ({self.perplexity_ratio:.4f}x) on "
            f"{self.tokens} tokens, mean KL {self.mean_kl_nats:.2e} nats, largest logit difference "
            f"{self.max_abs_over_std:.2g} of the logits' standard deviation, "
            f"{self.top1_agreement:.2%} equal greedy tokens"
        )

    def require(self, out: Path, fix: str) -> None:
        """Raise unless passed.

        Args:
            out: folder of the measured export.
            fix: the way out, for the message.

        Raises:
            ParityError: with the figures.
        """
        if self.passed:
            return
        raise ParityError(
            f"{out} in {self.scheme}",
            expected=f"perplexity up to {self.perplexity_limit:g}x and a mean KL up to {self.kl_limit_nats:g} nats",
            found=f"{self.perplexity_ratio:.4f}x and {self.mean_kl_nats:.3g} nats",
            fix=fix,
        )


def require_compressed_tensors() -> None:
    """Raise unless the quality of a quantised export can be measured; asked before hours of work.

    Raises:
        MissingExtra: compressed-tensors, which transformers reads quantised weights with, is not installed.
    """
    if find_spec("compressed_tensors") is None:
        raise MissingExtra(
            "--quantize",
            expected="the package compressed-tensors, to measure what quantisation costs",
            found="none",
            fix='Install "pat-serve[quantize]", or leave the measurement out with --no-parity.',
        )


def measure_quality(exact: Path, quantized: Path, scheme: Scheme, prompts: list[list[int]]) -> QuantizationQuality:
    """Measure the quantised files of a folder.

    Args:
        exact: folder of the float32 export.
        quantized: folder of the quantised export.
        scheme: how it was made.
        prompts: token ids; every token except the first of each is predicted.
    """
    prompts = [prompt for prompt in prompts if len(prompt) > 1]
    # One model is in memory at a time. The logits of a few prompts are small beside it.
    before = list(_logits(exact, prompts, "quality: float32"))
    after = list(_logits(quantized, prompts, f"quality: {scheme.name}"))
    old, new = _perplexity(before, prompts), _perplexity(after, prompts)
    both, other = torch.cat(before), torch.cat(after)
    log_p, log_q = F.log_softmax(both.double(), dim=-1), F.log_softmax(other.double(), dim=-1)
    return QuantizationQuality(
        scheme=scheme.name,
        prompts=len(prompts),
        tokens=old.tokens,
        perplexity_before=old.perplexity,
        perplexity_after=new.perplexity,
        perplexity_ratio=math.exp(new.nll_nats - old.nll_nats),
        perplexity_limit=scheme.perplexity_limit,
        uniform_perplexity=both.shape[-1],
        max_abs_over_std=float((both - other).abs().max() / both.std()),
        mean_kl_nats=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        kl_limit_nats=scheme.kl_limit_nats,
        top1_agreement=float((both.argmax(-1) == other.argmax(-1)).float().mean()),
    )


@torch.no_grad()
def _logits(folder: Path, prompts: list[list[int]], description: str) -> Iterator[Tensor]:
    """Compute the logits of every prompt, (tokens, vocab) in float32, whatever the files' dtype."""
    from transformers import AutoModelForCausalLM

    with redirect_stderr(io.StringIO()):  # compressed-tensors draws a bar for each of two passes over the modules
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        model(input_ids=torch.tensor([prompts[0][:1]]))  # the first call dequantises
    for prompt in track(prompts, description, len(prompts)):
        yield model(input_ids=torch.tensor([prompt])).logits[0].float()


def _perplexity(logits: list[Tensor], prompts: list[list[int]]) -> Perplexity:
    sums, counts = [], []
    for prompt, logits_TV in zip(prompts, logits, strict=True):
        targets_T = torch.tensor(prompt[1:])
        sums.append(F.cross_entropy(logits_TV[:-1].double(), targets_T, reduction="sum"))
        counts.append(len(targets_T))
    return summarize_nll(torch.stack(sums), torch.tensor(counts))
