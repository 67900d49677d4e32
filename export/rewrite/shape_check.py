"""Check an export's sizes before a byte is written: will a config class, the kernels and the servers take them?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pat_serve.cut.axes import HIDDEN
from pat_serve.cut.config import describe
from pat_serve.errors import IllegalShape, IllegalWidth, UsageError
from pat_serve.export.formats.schemes import Scheme
from pat_serve.export.rewrite.contents import unties_head
from pat_serve.export.run.reader import Run
from pat_serve.shapes.fitness import (
    GROUP_SIZES,
    cautions,
    group_sizes,
    linear_inputs,
    slow_width,
    tensor_parallel_degrees,
    tensor_parallel_obstacles,
)
from pat_serve.shapes.geometry import legal_step, name_widths, nearest_widths
from pat_serve.shapes.parameters import parameters_at
from pat_serve.terminal.progress import say
from pat_serve.tokens.vocabulary import vocabulary_of

# A tile of tensor cores has so many, and two tiles of AMX.
_TILE = 64


def parse_degrees(text: str) -> tuple[int, ...]:
    """Tensor-parallel degrees of "2,4".

    Raises:
        UsageError: not a list of positive integers.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError("--tp", expected="degrees such as 2,4", found=text, fix="Try --tp 2.")
    return tuple(int(part) for part in parts)


def group_size_of(run: Run, degrees: tuple[int, ...]) -> int:
    """The largest group of inputs for 4-bit weights that fits every linear on every device.

    Raises:
        UsageError: no group size does.
    """
    exported = run.plan.cuts.sizes(run.base.sizes)
    if sizes := group_sizes(exported, degrees):
        return max(sizes)
    inputs = linear_inputs(exported, max(degrees, default=1))
    raise UsageError(
        "--quantize int4",
        expected=f"linears whose inputs are all multiples of {min(GROUP_SIZES)}",
        found=", ".join(map(str, inputs)),
        fix="Train again with a --hidden-size and FFN that are multiples of 128, or export with --quantize int8.",
    )


def check_fitness(run: Run, degrees: tuple[int, ...], scheme: Scheme | None) -> dict[str, Any]:
    """Check the shape, warn of what is slow.

    Args:
        run: the run.
        degrees: tensor-parallel degrees that the model has to serve at.
        scheme: of quantisation.

    Returns:
        for pat_export.json: the degrees and group sizes that fit, and the warnings.

    Raises:
        IllegalWidth: a width that the config class or the kernels refuse.
        IllegalShape: sizes that no stock class takes together.
        UsageError: a degree that the model cannot be split by.
    """
    base, cuts = run.base, run.plan.cuts
    cut, exported = cuts.line(HIDDEN, None, base.sizes), cuts.sizes(base.sizes)
    rule = base.family.wants_multiple_of_heads(base.sizes, exported, base.config)

    def parameters(width: int) -> int:
        return parameters_at(base, replace(exported, hidden=width), own_head=unties_head(run))

    width, step = exported.hidden, legal_step(exported.heads, hidden_multiple_of_heads=rule)
    if not cut.is_identity and width % step:
        near = name_widths(nearest_widths(width, step, base.hidden_size), parameters)
        raise IllegalWidth(
            run.folder,
            expected=f"a kept width that is a multiple of {step}",
            found=name_widths([width], parameters),
            fix=f"Train again with a legal --hidden-size: {near}.",
        )
    if obstacles := base.family.obstacles(base.sizes, exported, base.config):
        raise IllegalShape(
            run.folder,
            expected="sizes that a stock class takes",
            found=f"{describe(exported)}: {'; '.join(obstacles)}",
            fix="Train again with another width, or another number of key-value groups.",
        )
    possible = tensor_parallel_degrees(exported)
    for degree in degrees:
        if obstacles := tensor_parallel_obstacles(exported, degree):
            raise UsageError(
                f"--tp {degree}",
                expected=f"a degree that the model can be split by: {', '.join(map(str, possible))}",
                found="; ".join(obstacles),
                fix="The width is not the obstacle: no --hidden-size changes heads, key-value heads or vocabulary.",
            )
    warnings = []
    if scheme or not cuts.is_identity:
        slow = slow_width(base.hidden_size, exported, hidden_multiple_of_heads=rule, parameters=parameters)
        warnings = ([slow] if slow else []) + cautions(exported, degrees, bits=scheme.bits if scheme else None)
    if exported.ffn != base.sizes.ffn and exported.ffn % _TILE:
        warnings.append(f"intermediate_size {exported.ffn} is no multiple of {_TILE}: matrix tiles are partly empty")
    vocabulary = vocabulary_of(run.base.folder, exported.vocab)
    if vocabulary is not None and vocabulary.warning:
        warnings.append(vocabulary.warning)
    for warning in warnings:
        say(f"warning: {warning}")
    return {"tensor_parallel": possible, "group_sizes": group_sizes(exported), "warnings": warnings}
