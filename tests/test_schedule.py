"""The gate schedule against values worked out by hand from the paper's formulas."""

from __future__ import annotations

import math

import pytest

from pat_serve.training.methods.pat.schedule import GateSchedule


def test_milestone_is_a_third_of_the_run():
    assert GateSchedule.for_run(300).milestone == 100
    assert GateSchedule.for_run(30_000).milestone == 10_000
    assert GateSchedule.for_run(3).milestone == 4


def test_start_is_the_open_gate():
    schedule = GateSchedule(milestone=100)
    assert schedule.temperature(0) == pytest.approx(1.0, abs=1e-5)
    assert schedule.temperature(1) == pytest.approx(1.0, abs=1e-5)
    assert schedule.offset(0) == 0.5


@pytest.mark.parametrize(
    ("step", "temperature", "offset"),
    [
        (10, 2.0, 0.4),  # ln 10 / ln 100 = 1/2
        (25, 1 / (1 - 0.69897), 0.25),  # log10(25) / 2
        (50, 1 / (1 - 0.849485), 0.0),
        (80, 1 / (1 - 0.951545), 0.0),
    ],
)
def test_hand_computed_values(step: int, temperature: float, offset: float):
    schedule = GateSchedule(milestone=100)
    assert schedule.temperature(step) == pytest.approx(temperature, rel=1e-4)
    assert schedule.offset(step) == pytest.approx(offset)


def test_temperature_stands_still_from_the_freeze_on():
    schedule = GateSchedule(milestone=100)
    assert schedule.freeze_step == 80
    assert schedule.temperature(80) == schedule.temperature(99) == schedule.temperature(10_000)
    assert math.isfinite(schedule.temperature(100))


def test_mask_learning_rate_is_the_papers_at_its_length():
    assert GateSchedule(milestone=10_000).mask_learning_rate() == pytest.approx(5e-5)
