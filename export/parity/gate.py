"""The parity gate: is the exported model the trained one?

The trained model is the masked wide one (base + adapter + operators as hooks, cut channels at zero), computed in
float32. Three things are shown on the run's own prompts and on random token ids: the rewritten tensors are that model
(within the order of additions, judged in float64 where float32 cannot tell); the files are these tensors, rounded; and
rounding does to the model what any rounding to that dtype would. docs/parity.md says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from pat_serve.export.files.model_files import dtype_name
from pat_serve.export.parity.answers import Answers, Texts
from pat_serve.export.parity.comparison import (
    EXACT,
    EXPORTED,
    RANDOM,
    TRAINED,
    TRANSFORMERS,
    VLLM,
    Comparison,
    Parity,
    loses_updates,
)
from pat_serve.export.parity.figures import TOLERANCES, Figures, Tolerance, logit_distances, proportional
from pat_serve.export.parity.greedy import compare_greedy
from pat_serve.export.parity.models import LoadedModels, Models, WalkedModels, must_walk
from pat_serve.export.parity.notes import family_notes
from pat_serve.export.parity.prompts import WALKED_NEW_TOKENS, Prompts, parity_prompts
from pat_serve.export.parity.vllm_scores import compare_listed
from pat_serve.export.rewrite.rounding import FileCheck
from pat_serve.export.run.reader import Run
from pat_serve.scores import Scorer, ScoreRequest

# vLLM's own kernels add in another order, and exponentials are approximated in some; docs/parity.md has measurements.
VLLM_TOLERANCE = Tolerance(max_abs_over_std=1e-3, mean_kl_nats=1e-6, top1_agreement=0.995)

# From here on a right rounding is remarked on: exp(0.02) is two percent of a perplexity.
COSTLY_NATS = 0.02


def measure_parity(
    run: Run,
    folder: Path,
    file_dtype: torch.dtype,
    *,
    out: Path | None = None,
    model_dtype: torch.dtype | None = None,
    walk: bool | None = None,
    scorer: Scorer | None = None,
    same_machine: bool = True,
    stochastic: bool = False,
    write_again: Callable[[], None] | None = None,
) -> Parity:
    """Compare exported files with the run that they come from.

    Args:
        run: the run.
        folder: with the files.
        file_dtype: dtype of the files.
        out: how a message calls the folder; the folder by default.
        model_dtype: in which the model will run: it rounds the factor of a scaled embedding. `file_dtype` by default.
        walk: go layer by layer; None decides by the memory that is there.
        scorer: asks vLLM; None leaves it out.
        same_machine: the files were written here, and are the rewriting, rounded, bit for bit.
        stochastic: they were rounded by chance, and not to the nearest values.
        write_again: writes them again, rounded by chance. It is called where the nearest values lose what the training
            moved, and the outcome is then that of the new files. None judges the files as they are.

    Returns:
        the outcome; it may have failed.

    Raises:
        ParityError: a tensor of the files is not the rewriting, rounded, or transformers does not load them.
        BrokenPlan: the run has lost its examples.
    """
    check = FileCheck(
        folder=folder, dtype=file_dtype, out=out or folder, same_machine=same_machine, stochastic=stochastic
    )
    return _Gate(run, check, model_dtype or file_dtype, walk, write_again).measure(scorer)


class _Gate:
    """One measurement, with the trained model's answers and the comparisons so far."""

    def __init__(
        self,
        run: Run,
        check: FileCheck,
        model_dtype: torch.dtype,
        walk: bool | None,
        write_again: Callable[[], None] | None = None,
    ) -> None:
        self._run, self._check, self._model_dtype, self._walk = run, check, model_dtype, walk
        self._write_again = write_again
        self._file_dtype = check.dtype
        self._compute = torch.promote_types(check.dtype, torch.float32)
        self._prompts = parity_prompts(run)
        self._models, self._walked = self._ways(self._prompts, self._compute)
        if self._walked:
            self._prompts = replace(self._prompts, new_tokens=WALKED_NEW_TOKENS)
        self._rows: list[Comparison] = []
        self._notes = family_notes(run, model_dtype)
        # The trained model in float32 against itself in float64, where that had to be measured.
        self._float32: Comparison | None = None

    def _ways(self, prompts: Prompts, dtype: torch.dtype) -> tuple[Models, bool]:
        walked = must_walk(self._run, prompts, dtype) if self._walk is None else self._walk
        kind = WalkedModels if walked else LoadedModels
        return kind(run=self._run, check=self._check, model_dtype=self._model_dtype), walked

    def measure(self, scorer: Scorer | None) -> Parity:
        """Every comparison that the files' dtype calls for."""
        if self._file_dtype.itemsize > 2 or self._models.exact_dtype != self._compute or self._walked:
            self._models.check_files()
        if self._file_dtype.itemsize == 2:
            headline = self._rounded(scorer)
        else:
            self._trained = next(self._models.trained(self._compute, self._prompts))
            headline = self._as_computed(scorer)
        return Parity(
            dtype=dtype_name(self._file_dtype),
            prompts=len(self._prompts.whole),
            layerwise=self._walked,
            headline=headline,
            comparisons=tuple(self._rows),
            notes=self._notes,
        )

    def _as_computed(self, scorer: Scorer | None) -> Figures:
        """Files in the dtype that the models are computed in."""
        texts = self._trained.continuations
        files = self._exactly(EXPORTED, self._models.exported(self._compute, self._prompts, texts))
        if scorer is not None and self._proved:
            # vLLM has no float64.
            noise = self._float32
            tolerance = proportional(noise.figures) if noise else VLLM_TOLERANCE
            self._ask(scorer, torch.float32, files.logits_std, tolerance, noise)
        return files

    def _rounded(self, scorer: Scorer | None) -> Figures:
        """Files of 16 bits: first what they were rounded from, then what rounding does."""
        compute, file_dtype, prompts = self._compute, self._file_dtype, self._prompts
        part = prompts.few()
        self._trained, narrower = self._models.trained(compute, prompts, (file_dtype, part.prompts))
        exact = self._models.exact(compute, prompts, self._trained.continuations, file_dtype)
        figures = self._exactly(EXACT, next(exact))
        if not self._proved:
            return figures
        random = self._add(RANDOM, compute, self._trained, next(exact))
        del exact
        row = self._files(random)
        if self._write_again is not None and loses_updates(row, random):
            # The trained model and the yardstick stay what they were.
            self._rows.remove(row)
            self._write_again()
            self._check = replace(self._check, stochastic=True)
            self._walk = self._walked
            self._models, _ = self._ways(self._prompts, compute)
            self._models.check_files()
            row = self._files(random)
        files = row.figures
        trained = self._trained.at(part.positions)
        floor = self._add(TRAINED, file_dtype, trained, narrower)
        own = self._models.exported(file_dtype, part.prompts, [])
        self._add(EXPORTED, file_dtype, trained, own, proportional(floor.figures), floor)
        if scorer is not None:
            self._ask(scorer, torch.float32, files.logits_std, proportional(random.figures), random)
            self._ask(scorer, file_dtype, files.logits_std, proportional(floor.figures), floor)
        if files.mean_kl_nats > COSTLY_NATS:
            self._notes += (
                f"Rounding to {dtype_name(file_dtype)} costs this model {files.mean_kl_nats:.3g} nats. It is the right "
                "one: any rounding of it to this dtype costs about as much. --dtype float32 avoids that.",
            )
        return files

    def _files(self, random: Comparison) -> Comparison:
        """The 16-bit files, computed in float32, beside a random rounding."""
        exported = self._models.exported(self._compute, self._prompts, self._trained.continuations)
        return self._add(EXPORTED, self._compute, self._trained, exported, proportional(random.figures), random)

    @property
    def _proved(self) -> bool:
        """Whether every comparison so far has passed; after a failed one no other is worth its minutes."""
        return all(row.passed for row in self._rows)

    def _exactly(self, model: str, answers: Answers) -> Figures:
        """Hold a model to the limits of the dtype that it computes in, and where float32's are passed to float64's.

        In a wide or deep model the order of float32 additions alone can pass the limit. In float64 that is nothing,
        while a rewriting that is wrong stays as wrong as it was. So the rewriting is judged in float64, on the prompts
        on which float32 was furthest off, and float32 by what it does to the trained model.
        """
        distances = logit_distances(self._trained.logits, answers.logits)
        figures, limit = distances.figures(), TOLERANCES[self._compute]
        if figures.within(limit) or self._compute == torch.float64:
            self._add(model, self._compute, self._trained, answers, limit, figures=figures)
            return figures
        part = self._prompts.worst(distances.max_abs_P)
        models, _ = self._ways(part.prompts, torch.float64)
        trained = next(models.trained(torch.float64, part.prompts))
        exact = next(models.exact(torch.float64, part.prompts, []))
        self._add(EXACT, torch.float64, trained, exact, TOLERANCES[torch.float64])
        noise = self._float32 = self._add(TRAINED, torch.float32, trained, self._trained.at(part.positions))
        self._add(model, self._compute, self._trained, answers, proportional(noise.figures), noise, figures=figures)
        self._notes += (
            f"In float32 the logits differed by {figures.max_abs_over_std:.3g} of their standard deviation, above the "
            f"limit: the rewriting was judged in float64, on the {len(part.positions)} positions of the prompts where "
            "they differed most.",
        )
        return figures

    def _add(
        self,
        model: str,
        dtype: torch.dtype,
        trained: Answers,
        other: Answers,
        tolerance: Tolerance | None = None,
        yardstick: Comparison | None = None,
        figures: Figures | None = None,
    ) -> Comparison:
        figures = figures or logit_distances(trained.logits, other.logits).figures()
        return self._note(model, TRANSFORMERS, dtype, figures, trained, other.continuations, tolerance, yardstick)

    def _ask(
        self,
        scorer: Scorer,
        dtype: torch.dtype,
        logits_std: float,
        tolerance: Tolerance,
        yardstick: Comparison | None,
    ) -> None:
        prompts, trained = self._prompts, self._trained
        request = ScoreRequest(
            model=self._check.folder,
            dtype=dtype_name(dtype),
            prompts=prompts.whole,
            continued=prompts.continued,
            new_tokens=prompts.new_tokens,
        )
        scores = scorer(request)
        figures = compare_listed(trained.logits, prompts.whole, scores.prompts, logits_std)
        self._note(EXPORTED, VLLM, dtype, figures, trained, scores.continuations, tolerance, yardstick)

    def _note(
        self,
        model: str,
        runtime: str,
        dtype: torch.dtype,
        figures: Figures,
        trained: Answers,
        texts: Texts,
        tolerance: Tolerance | None,
        yardstick: Comparison | None,
    ) -> Comparison:
        """Compare the greedy texts, where both models have some, and keep the whole comparison."""
        greedy = None
        if trained.continuations and texts:
            greedy = compare_greedy(
                trained.continuations,
                trained.continued_logits,
                texts,
                logits_std=figures.logits_std,
                tolerance=tolerance,
            )
        self._rows.append(
            Comparison(
                model=model,
                runtime=runtime,
                dtype=dtype_name(dtype),
                figures=figures,
                greedy=greedy,
                tolerance=tolerance,
                yardstick=_name(yardstick),
            )
        )
        return self._rows[-1]


def _name(yardstick: Comparison | None) -> str | None:
    return None if yardstick is None else f"{yardstick.model} in {yardstick.dtype}"
