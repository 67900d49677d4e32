"""Savings of a shape and the speed that it can have, counted from its sizes. Pure mathematics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pat_serve.families.family import Family
from pat_serve.shapes.candidates import exported_sizes, share_cut
from pat_serve.shapes.fitness import cautions, slow_width, tensor_parallel_obstacles
from pat_serve.shapes.roofline import decode_ceiling, prefill_ceiling
from pat_serve.shapes.sizes import ModelSizes, decode_bytes
from pat_serve.shapes.step_cost import StepCosts, decode_work, prefill_work

# The fixed work of a layer, some ten microseconds, is a percent and more of the time that reading so little takes.
_SMALL_LAYER_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests at once, and the tokens of each: of its prompt for a prefill, in its cache for a decode step."""

    batch_size: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.tokens}"


@dataclass(frozen=True, kw_only=True)
class LoadFigures:
    """A shape under one load.

    Attributes:
        load: requests and tokens.
        bytes_per_token: that a decode step reads, for each token that it makes.
        decode_ceiling: the base's bytes over the shape's: no memory-bound machine gains more.
        prefill_ceiling: the same of FLOPs, on a machine that is bound by arithmetic.
        decode_speedup: expected with fixed work for each layer and step; None without costs.
        prefill_speedup: the same.
    """

    load: Load
    bytes_per_token: float
    decode_ceiling: float
    prefill_ceiling: float
    decode_speedup: float | None
    prefill_speedup: float | None


@dataclass(frozen=True, kw_only=True)
class ShapeFigures:
    """One shape of an export.

    Attributes:
        counts: by axis.
        unties: it gives a tied base a head of its own.
        parameters: all of them.
        share: of all of the base's parameters that it lacks.
        kv_bytes_per_token: that a token leaves in the KV cache.
        architecture: the stock class that it is written as; None where none takes it.
        obstacles: why it cannot be written, or not be served at one of the tensor-parallel degrees.
        cautions: what loads but runs slowly, or not everywhere.
        loads: its figures under each load.
    """

    counts: Mapping[str, int]
    unties: bool
    parameters: int
    share: float
    kv_bytes_per_token: int
    architecture: str | None
    obstacles: Sequence[str]
    cautions: Sequence[str]
    loads: Sequence[LoadFigures]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that the shapes of a table have in common.

    Attributes:
        base: sizes of the base.
        family: of the base.
        config: of the base.
        loads: to give figures for.
        dtype_bytes: bytes of a weight and of a KV value.
        degrees: of tensor parallelism that a shape is to be served with.
        costs: of the machine; None where ceilings alone are asked for.
    """

    base: ModelSizes
    family: Family
    config: Mapping[str, object]
    loads: Sequence[Load]
    dtype_bytes: int
    degrees: Sequence[int] = ()
    costs: StepCosts | None = None

    @property
    def small_layers(self) -> bool:
        """A layer reads so little that its fixed work shows, and ceilings mislead."""
        return self.base.layer_bytes(self.dtype_bytes) < _SMALL_LAYER_BYTES

    def figures(self, counts: Mapping[str, int], *, unties: bool = False) -> ShapeFigures:
        """All figures of a shape."""
        sizes = exported_sizes(self.base, counts, unties=unties)
        refused = self.family.obstacles(self.base, sizes, self.config)
        other = self.family.class_of_export(self.base, sizes, self.config)
        rule = self.family.wants_multiple_of_heads(self.base, sizes, self.config)
        slow = slow_width(self.base.hidden, sizes, hidden_multiple_of_heads=rule)
        return ShapeFigures(
            counts=dict(counts),
            unties=sizes.tied != self.base.tied,
            parameters=sizes.parameters,
            share=share_cut(self.base, sizes),
            kv_bytes_per_token=sizes.kv_values_per_token * self.dtype_bytes,
            architecture=None if refused else (other or self.family).architecture,
            obstacles=[*refused, *self.parallel_obstacles(sizes)],
            cautions=[*([slow] if slow else []), *cautions(sizes, self.degrees)],
            loads=[self._under(load, sizes) for load in self.loads],
        )

    def parallel_obstacles(self, sizes: ModelSizes) -> list[str]:
        """Why vLLM cannot split an export over one of the degrees."""
        return [
            f"--tp {degree}: {obstacle}"
            for degree in self.degrees
            for obstacle in tensor_parallel_obstacles(sizes, degree)
        ]

    def splits(self, sizes: ModelSizes) -> bool:
        """VLLM can split an export over every one of the degrees."""
        return not self.parallel_obstacles(sizes)

    def decode_speedup(self, sizes: ModelSizes, load: Load) -> float:
        """Expected with costs, and the ceiling without them."""
        found = self._under(load, sizes)
        return found.decode_ceiling if found.decode_speedup is None else found.decode_speedup

    def _under(self, load: Load, sizes: ModelSizes) -> LoadFigures:
        base, batch, tokens, size = self.base, load.batch_size, load.tokens, self.dtype_bytes
        read = decode_bytes(sizes, batch_size=batch, context_tokens=tokens, dtype_bytes=size)
        decode = prefill = None
        if self.costs:
            steps = [
                decode_work(one, batch_size=batch, context_tokens=tokens, dtype_bytes=size) for one in (base, sizes)
            ]
            prompts = [
                prefill_work(one, batch_size=batch, prompt_tokens=tokens, dtype_bytes=size) for one in (base, sizes)
            ]
            decode = self.costs.seconds(steps[0]) / self.costs.seconds(steps[1])
            prefill = self.costs.seconds(prompts[0]) / self.costs.seconds(prompts[1])
        return LoadFigures(
            load=load,
            bytes_per_token=read / batch,
            decode_ceiling=decode_ceiling(base, sizes, batch_size=batch, context_tokens=tokens, dtype_bytes=size),
            prefill_ceiling=prefill_ceiling(base, sizes, batch_size=batch, prompt_tokens=tokens),
            decode_speedup=decode,
            prefill_speedup=prefill,
        )
