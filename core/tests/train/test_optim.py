"""Learning-rate schedules: their closed forms, the warm-up, and the horizon reading of existing configs."""

from __future__ import annotations

import math

import pytest
from hooktuner.config import RunConfig
from hooktuner.train.optim import horizon_note, learning_rate


def rates(total: int, **keys) -> list[float]:
    config = RunConfig(learning_rate=1.0, **keys)
    return [learning_rate(config, step, total) for step in range(1, total + 1)]


def test_constant():
    assert rates(5, lr_scheduler="constant") == [1.0] * 5


def test_warmup_rises_linearly_and_the_first_step_moves():
    assert rates(6, lr_scheduler="constant_with_warmup", lr_warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_and_polynomial_fall_to_the_end_value():
    assert rates(4, lr_scheduler="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(4, lr_scheduler="linear", lr_end=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert rates(4, lr_scheduler="polynomial", lr_power=2.0) == pytest.approx([1.0, 0.5625, 0.25, 0.0625])


def test_cosine_after_a_warmup():
    found = rates(10, lr_scheduler="cosine", lr_warmup_steps=2)
    assert found[:2] == [0.5, 1.0]
    assert found[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])


def test_restarts_return_to_the_peak_and_sine_comes_back_up():
    restarts = rates(8, lr_scheduler="cosine_with_restarts", lr_num_cycles=2)
    assert restarts[0] == restarts[4] == 1.0
    sine = rates(8, lr_scheduler="sine")
    assert sine[0] == 1.0
    assert sine[4] == pytest.approx(0.0)
    assert sine[7] == pytest.approx(sine[1])


def test_a_cosine_whose_warmup_fills_the_run_is_read_as_its_horizon():
    config = RunConfig(learning_rate=1.0, lr_scheduler="cosine", lr_warmup_steps=10)
    found = [learning_rate(config, step, 10) for step in range(1, 11)]
    assert found == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 10)) for k in range(10)])
    assert horizon_note(config, 10) == (
        "lr_warmup_steps (10) reaches the end of the run (10 steps): read as the horizon of the cosine schedule, "
        "without a warm-up."
    )
    assert horizon_note(config, 11) is None


def test_schedules_never_rise_again_after_their_end():
    for kind in ("linear", "cosine", "cosine_with_restarts", "polynomial"):
        config = RunConfig(learning_rate=1.0, lr_scheduler=kind)
        assert learning_rate(config, 1000, 10) == pytest.approx(0.0, abs=1e-12)
