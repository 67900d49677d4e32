"""The methods that the study compares, and the sweeps beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.ablation.variants import SHARED, VARIANTS

DENSE = "dense LoRA"
DENSE_METHOD: dict[str, Any] = {"method": "lora"}
BASE = "the base, untuned"
# In the order of interest: whatever is finished early tells the most.
RATIOS = (0.25, 0.5, 0.125, 0.375)

METHODS: dict[str, dict[str, Any]] = {
    "PAT as published": VARIANTS["PAT as published"],
    "the default": VARIANTS["loss axes, cut, compensated, head (the default)"],
    "activation magnitude, then LoRA": VARIANTS["baseline: activation magnitude, cut, LoRA"],
    "LLM-Pruner score, then LoRA": VARIANTS["baseline: LLM-Pruner score, cut, LoRA"],
    "PCA slice, then LoRA": VARIANTS["baseline: PCA slice, cut, LoRA"],
}
_PUBLISHED, _DEFAULT, _SLICE = "PAT as published", "the default", "PCA slice, then LoRA"
# The slice of the curve that a domain has.
DOMAIN_METHODS = {name: METHODS[name] for name in (_PUBLISHED, _DEFAULT, _SLICE)}
DOMAIN_RATIOS = (0.25,)

# None: the curve's own, 1e-3 with an alpha of the rank.
_RATES: dict[str, dict[str, Any] | None] = {
    "1e-3": None,
    "the paper's rates": {"learning_rate": 5e-5, "lora_alpha": 4, "lora_dropout": 0.05, "max_grad_norm": 0.3},
    "2e-4": {"learning_rate": 2e-4},
    "5e-4": {"learning_rate": 5e-4},
}

# So many rows measure the cut; 128 is the product's default.
CALIBRATION_ROWS = (512, 2048)

# The paper leaves the operator's rank open.
HIO_RANKS = (0, 8, 16, 32, 64, 128)
DENSE_OPERATOR = "pat-dense-operator"
# A method name that ends so is a run's second export, not a run.
ALIGNED = ", then aligned"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Methods beside the curve's.

    Attributes:
        methods: what is trained; those of the curve that they are compared with have the curve's own names and are not
            trained twice.
        ratios: at which.
        question: what the report's table answers.
    """

    methods: Mapping[str, dict[str, Any]]
    ratios: tuple[float, ...]
    question: str


def _ranks(name: str) -> dict[str, dict[str, Any]]:
    """One recipe at all ranks and with the dense operator; its own rank is the curve's method itself."""
    ranks = {
        name if rank == METHODS[name]["hio_rank"] else f"{name}, HIO {rank}": {**METHODS[name], "hio_rank": rank}
        for rank in HIO_RANKS
    }
    return {**ranks, f"{name}, dense operator": {**METHODS[name], "method": DENSE_OPERATOR}}


# Each at all the ratios would be hours: the rank and the masks at a quarter of the width, the identity loss at two.
SWEEPS: dict[str, Sweep] = {
    "hio": Sweep(
        methods=_ranks(_PUBLISHED) | _ranks(_DEFAULT),
        ratios=(0.25,),
        question="The operator's rank",
    ),
    "identity": Sweep(
        methods={
            _PUBLISHED: METHODS[_PUBLISHED],
            f"{_PUBLISHED}, no identity loss": {**METHODS[_PUBLISHED], "identity_weight": 0.0},
        },
        ratios=(0.25, 0.5),
        question="With and without the identity loss, and whether the mask polarises",
    ),
    "masks": Sweep(
        methods={
            _DEFAULT: METHODS[_DEFAULT],
            f"{_DEFAULT}, one mask by the writers' scores": {**METHODS[_DEFAULT], "method": "pat-one-mask"},
            f"{_DEFAULT}, a mask a writer": {**METHODS[_DEFAULT], "method": "pat-mask-per-writer"},
            f"{_DEFAULT}, masks of uneven widths": {**METHODS[_DEFAULT], "method": "pat-uneven-masks"},
            f"{_DEFAULT}, a mask a writer, aligned half-way": {**METHODS[_DEFAULT], "method": "pat-aligned-masks"},
            _PUBLISHED: METHODS[_PUBLISHED],
            f"{_PUBLISHED}, a mask a writer": {**METHODS[_PUBLISHED], "method": "pat-mask-per-writer"},
        },
        ratios=(0.25,),
        question="One mask against a mask a writer",
    ),
    # The default adapts the head, and dense LoRA, as is the custom, does not: what of their distance is that?
    "head": Sweep(
        methods={
            f"{DENSE}, head": {**DENSE_METHOD, "lora_head": True},
            _DEFAULT: METHODS[_DEFAULT],
            f"{_DEFAULT}, no head": {**METHODS[_DEFAULT], "lora_head": False},
            _SLICE: METHODS[_SLICE],
            f"{_SLICE}, head": {**METHODS[_SLICE], "lora_head": True},
        },
        ratios=(0.25,),
        question="With and without an adapter on the head",
    ),
    # The curve's learning rate is one for short runs of small models; the paper's is one for thirty thousand steps.
    "rates": Sweep(
        methods={
            name if rates is None else f"{name}, {label}": method | (rates or {})
            for label, rates in _RATES.items()
            for name, method in ((DENSE, DENSE_METHOD), (_DEFAULT, METHODS[_DEFAULT]), (_SLICE, METHODS[_SLICE]))
        },
        ratios=(0.25,),
        question="Learning rate and LoRA's alpha",
    ),
    # A base a hundred times the size has more channels to tell apart by as many tokens.
    "calibration": Sweep(
        methods={
            name if rows is None else f"{name}, measured on {rows} rows": METHODS[name]
            | ({} if rows is None else {"calibration_rows": rows})
            for rows in (None, *CALIBRATION_ROWS)
            for name in (_DEFAULT, _SLICE)
        },
        ratios=(0.25,),
        question="Rows that the stream is measured on",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run: a method at a ratio with a seed."""

    name: str
    ratio: float
    seed: int
    method: Mapping[str, Any]

    @property
    def dense(self) -> bool:
        """Tell whether the job cuts nothing, as dense LoRA does."""
        return self.method.get("method") == DENSE_METHOD["method"]

    def key(self, steps: int) -> tuple[str, float, int, int]:
        """Key of the job's result after so many steps."""
        return self.name, self.ratio, self.seed, steps


def jobs(
    seeds: int,
    sweeps: list[str],
    *,
    ratios: list[float] | None = None,
    domain: bool = False,
    curve: bool = True,
) -> list[Job]:
    """Seed after seed, so that whatever is finished early is a whole curve; nothing twice.

    Args:
        seeds: runs of each method at each ratio.
        sweeps: of SWEEPS, in the order wanted.
        ratios: those wanted; None for all that the curve and the sweeps have.
        domain: a domain's slice in the place of the whole curve.
        curve: with the curve's methods, and not the sweeps' alone.
    """
    methods, all_ratios = (DOMAIN_METHODS, DOMAIN_RATIOS) if domain else (METHODS, RATIOS)
    wanted: dict[tuple[str, float, int], Job] = {}

    def add(name: str, ratio: float, seed: int, method: Mapping[str, Any]) -> None:
        job = Job(name=name, ratio=ratio, seed=seed, method=method)
        if job.dense:
            job = replace(job, ratio=0.0)
        if job.dense or ratios is None or ratio in ratios:
            wanted.setdefault((name, job.ratio, seed), job)

    for seed in range(seeds):
        add(DENSE, 0.0, seed, DENSE_METHOD)
        for ratio in all_ratios if curve else ():
            for name, method in methods.items():
                add(name, ratio, seed, method)
        for sweep in (SWEEPS[name] for name in sweeps):
            for ratio in sweep.ratios:
                for name, method in sweep.methods.items():
                    add(name, ratio, seed, method)
    return list(wanted.values())


def settings(job: Job, width: int | None) -> dict[str, Any]:
    """A run's settings.

    Args:
        job: the run.
        width: of the pruned model; None for a dense one.
    """
    own = {} if job.dense else {"hidden_size": width}
    # When the mask polarises is read from the run's metrics.
    return SHARED | {"logging_steps": 2} | dict(job.method) | own
