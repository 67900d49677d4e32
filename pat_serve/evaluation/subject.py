"""A model that is being measured: its place, its identity and its backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import isfinite, prod
from pathlib import Path
from typing import Any

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.checkpoints.locate import check_plain_folder, locate, read_config
from pat_serve.checkpoints.stock_class import check_stock_folder
from pat_serve.errors import BrokenCheckpoint, UsageError
from pat_serve.evaluation.backends import BackendSettings, is_url, open_backend, token_nll
from pat_serve.evaluation.cache import checkpoint_sha256
from pat_serve.evaluation.report import Model
from pat_serve.evaluation.rowless import refuse_rowless
from pat_serve.tokens.vocabulary import Vocabulary

Examples = list[dict[str, list[int]]]


class Subject:
    """A model that is being measured. Slow work is done when it is first needed.

    Args:
        name: in the report.
        source: folder, hub id or URL.
        backend: how it is asked.
        load_tokenizer: from a folder.
    """

    def __init__(
        self, name: str, source: str | Path, backend: BackendSettings, load_tokenizer: Callable[[Path], Any]
    ) -> None:
        self.name = name
        self._source = str(source)
        self.backend = backend
        self._load_tokenizer = load_tokenizer
        self.folder: Path | None = None
        self._parameters: int | None = None
        if not is_url(self._source):
            self.folder, self._parameters = _open(self._source)

    @cached_property
    def sha256(self) -> str | None:
        """SHA-256 of the files that decide the model's answers; None for a server."""
        return None if self.folder is None else checkpoint_sha256(self.folder)

    @cached_property
    def lm(self) -> Any:
        """The model as lm-eval sees it."""
        lm = open_backend(self._source, self.folder, self.backend)
        if self.folder is not None and (rows := self._rows):
            refuse_rowless(lm, Vocabulary.of(self.tokenizer, rows), self.name)
        return lm

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        return self.lm.tokenizer if self.folder is None else self._load_tokenizer(self.folder)

    @property
    def positions(self) -> int | None:
        """Tokens that the model was made for and its backend can score; None where nobody says."""
        if self.folder is None:
            return int(self.lm.max_length)
        told = read_config(self.folder).get("max_position_embeddings")
        if not told:
            return None
        # vLLM scores a prompt only together with one generated token; lm-eval would cut a longer one without a word.
        return int(told) - (self.backend.backend == "vllm")

    def nll(self, examples: Examples, batch_size: int) -> tuple[list[float], list[int]]:
        """Summed negative log-likelihoods in nats, and numbers of scored tokens.

        Raises:
            UsageError: an example is longer than a backend that would cut it can score.
            DataError: an example has a token without a row in the model's embedding.
            BrokenCheckpoint: a figure is no finite number.
        """
        self.require_rows(examples)
        if self.folder is None or self.backend.backend != "hf":
            longest = max(len(example["input_ids"]) for example in examples)
            if self.positions is not None and longest > self.positions:
                raise UsageError(
                    "--max-length-tokens",
                    expected=f"at most {self.positions}, which {self.name} can score here",
                    found=f"an example of {longest} tokens",
                    fix="Lower it.",
                )
            return self._finite(*token_nll(self.lm, examples))
        import torch

        from pat_serve.perplexity import measure_nll

        dtype: torch.dtype = getattr(torch, self.backend.dtype)
        sums_N, counts_N = measure_nll(self.folder, examples, dtype=dtype, batch_size=batch_size)
        return self._finite(sums_N.tolist(), counts_N.tolist())

    @property
    def _rows(self) -> int:
        """Rows of the model's embedding; 0 where nobody says."""
        return 0 if self.folder is None else int(read_config(self.folder).get("vocab_size") or 0)

    def require_rows(self, examples: Examples) -> None:
        """Check that the model's embedding has a row for every token.

        Raises:
            DataError: it has not.
        """
        rows = self._rows
        if rows and max(max(example["input_ids"]) for example in examples) >= rows:
            ids = (token_id for example in examples for token_id in example["input_ids"])
            Vocabulary.of(self.tokenizer, rows).require(ids, f"the data, with the tokenizer of {self.name}")

    def _finite(self, sums: list[float], counts: list[int]) -> tuple[list[float], list[int]]:
        broken = sum(not isfinite(value) for value in sums)
        if broken:
            raise BrokenCheckpoint(
                self.name,
                expected="log-likelihoods that are finite numbers",
                found=f"others in {broken} of {len(sums)} rows or windows, in {self.backend.dtype}",
                fix="Try --dtype float32; if that does not help, its weights are damaged: export it again.",
            )
        return sums, counts

    def close(self) -> None:
        """Let go of the model, so that the next one has the memory."""
        self.__dict__.pop("lm", None)

    def describe(self) -> Model:
        """Describe the model for the report."""
        if self.folder is None:
            return Model(name=self.name, sha256=None, parameters=None, hidden_size=None)
        width = int(read_config(self.folder)["hidden_size"])
        return Model(name=self.name, sha256=self.sha256, parameters=self._parameters, hidden_size=width)


def _open(source: str) -> tuple[Path, int | None]:
    """Check everything in a checkpoint; return its folder and the number of its weights' numbers.

    The architecture table does not have quantized weights: transformers must know them, and the number is None.
    """
    folder = locate(source)
    if "quantization_config" in read_config(folder):
        check_plain_folder(folder)
        check_stock_folder(folder, [])
        return folder, None
    checkpoint = open_checkpoint(source)
    return checkpoint.folder, sum(prod(entry.shape) for entry in checkpoint.tensors.values())
