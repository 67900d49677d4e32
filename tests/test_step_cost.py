"""Costs of a byte, an operation, a layer and a step, from times of which they are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pat_serve.machine.layer_probe import STEPS, probe_layers
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.shapes.step_cost import StepCosts, Work, decode_work, fit_costs, prefill_work, worst_error

BASE = ModelSizes(hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152, tied=True)
COSTS = StepCosts(byte_s=2e-11, flop_s=3e-12, layer_s=8e-5, step_s=1e-3)


def some_work(*bases: ModelSizes) -> list[Work]:
    return [
        work
        for base in bases
        for work in (
            decode_work(base, batch_size=1, context_tokens=128, dtype_bytes=2),
            decode_work(base, batch_size=8, context_tokens=512, dtype_bytes=2),
            prefill_work(base, batch_size=1, prompt_tokens=128, dtype_bytes=2),
        )
    ]


WORK = some_work(BASE, replace(BASE, layers=15), replace(BASE, hidden=288, ffn=768))


@pytest.mark.parametrize(
    "costs", [COSTS, replace(COSTS, layer_s=0.0), replace(COSTS, step_s=0.0), replace(COSTS, flop_s=0.0)]
)
def test_costs_are_found_again(costs: StepCosts) -> None:
    seconds = [costs.seconds(one) for one in WORK]
    found = fit_costs(WORK, seconds)
    assert found is not None
    for name, cost in vars(costs).items():
        assert getattr(found, name) == pytest.approx(cost, rel=1e-6, abs=1e-9 * getattr(COSTS, name))
    assert worst_error(found, WORK, seconds) < 1e-9


def test_noise_makes_no_cost_negative() -> None:
    costs = replace(COSTS, step_s=0.0)
    seconds = [costs.seconds(one) * (0.8 if one.layers == 15 else 1.0) for one in WORK]
    found = fit_costs(WORK, seconds)
    assert found is not None
    assert min(vars(found).values()) == 0
    assert 0.01 < worst_error(found, WORK, seconds) < 0.3


def test_times_that_do_not_tell_them_apart_give_none() -> None:
    one_depth = some_work(BASE)
    assert fit_costs(one_depth, [COSTS.seconds(one) for one in one_depth]) is None
    decode = [work for work in WORK if work.flops < 1e9]
    assert len(decode) == 3
    assert fit_costs(decode, [COSTS.seconds(one) for one in decode]) is None
    assert fit_costs([], []) is None


def test_layers_are_timed_at_two_depths_and_widths() -> None:
    small = ModelSizes(hidden=64, layers=4, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=128, tied=True)
    timed = probe_layers(small, "float32")
    assert len(timed) == 3 * len(STEPS)
    assert {(one.sizes.layers, one.sizes.hidden, one.sizes.ffn) for one in timed} == {
        (4, 64, 96),
        (2, 64, 96),
        (4, 16, 24),
    }
    assert all(one.seconds > 0 for one in timed)
