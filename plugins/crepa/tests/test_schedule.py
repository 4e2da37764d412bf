"""The weight is a function of the step, and the guard of similarities and steps alone."""

from __future__ import annotations

import json

import pytest
from hooktuner_crepa.options import CrepaOptions
from hooktuner_crepa.schedule import Guard, scheduled_weight


def weights(total=10, steps=range(1, 11), **keys):
    options = CrepaOptions(**{f"crepa_{key}": value for key, value in keys.items()})
    return [round(scheduled_weight(options, step, total), 6) for step in steps]


def test_constant_with_warmup_and_cutoff():
    assert weights() == [0.5] * 10
    assert weights(**{"lambda": 0.8}, warmup_steps=4) == [0.2, 0.4, 0.6] + [0.8] * 7
    assert weights(cutoff_step=3) == [0.5] * 3 + [0.0] * 7


def test_linear_over_the_rest_of_the_run_or_over_decay_steps():
    assert weights(**{"lambda": 1.0}, scheduler="linear") == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    found = weights(**{"lambda": 1.0}, scheduler="linear", lambda_end=0.2, decay_steps=4, warmup_steps=2)
    assert found == [0.5, 1.0, 1.0, 0.8, 0.6, 0.4] + [0.2] * 4


def test_cosine_and_polynomial():
    cosine = weights(**{"lambda": 1.0}, scheduler="cosine", decay_steps=4)
    assert cosine == pytest.approx([1.0, 0.853553, 0.5, 0.146447] + [0.0] * 6)
    squared = weights(**{"lambda": 1.0}, scheduler="polynomial", power=2.0, decay_steps=4, lambda_end=0.5)
    assert squared == pytest.approx([1.0, 0.78125, 0.625, 0.53125] + [0.5] * 6)
    assert weights(**{"lambda": 0.0}, scheduler="linear", lambda_end=1.0)[4] == 0.4


def guard(threshold, mode="permanent", decay=0.5):
    return Guard(
        CrepaOptions(crepa_similarity_threshold=threshold, crepa_threshold_mode=mode, crepa_similarity_ema_decay=decay)
    )


def opened(guard, similarities):
    """In which steps the guard is open, when step n measures `similarities[n]` whether it is open or not."""
    found = []
    for number, similarity in enumerate(similarities, 1):
        found.append(guard.open(number))
        guard.arrived(number, similarity)
    return found


RISE_AND_FALL = [0.1, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1]
# running mean: 0.1, 0.5, 0.7, 0.4, 0.25, …; step n knows the one of step n − 2


def test_permanent_stays_off():
    assert opened(guard(0.6), RISE_AND_FALL) == [True, True, True, True, False, False, False]


def test_recoverable_comes_back():
    assert opened(guard(0.6, "recoverable"), RISE_AND_FALL) == [True, True, True, True, False, True, True]


def test_the_threshold_itself_triggers_and_none_never_does():
    assert opened(guard(0.5), RISE_AND_FALL)[3:5] == [False, False]
    assert all(opened(guard(None), [1.0] * 7))


def test_only_recoverable_measures_while_it_is_off():
    assert guard(0.5, "recoverable").measures_when_closed
    assert not guard(0.5).measures_when_closed


@pytest.mark.parametrize("early", [True, False])
def test_it_does_not_matter_when_numbers_arrive(early):
    """On a GPU those of step n come after step n + 1 has begun, or before it where a checkpoint was saved."""
    late = guard(0.6, "recoverable")
    found = []
    for number in range(1, 8):
        if not early and number > 2:
            late.arrived(number - 2, RISE_AND_FALL[number - 3])
        if early and number > 1:
            late.arrived(number - 1, RISE_AND_FALL[number - 2])
        found.append(late.open(number))
    assert found == [True, True, True, True, False, True, True]


def test_its_state_survives_json_at_any_step():
    whole = opened(guard(0.6, "recoverable", 0.3), RISE_AND_FALL)
    for cut in range(len(RISE_AND_FALL)):
        one, two = guard(0.6, "recoverable", 0.3), guard(0.6, "recoverable", 0.3)
        first = opened(one, RISE_AND_FALL[:cut])
        two.restore(json.loads(json.dumps(one.state())))
        second = []
        for number, similarity in enumerate(RISE_AND_FALL[cut:], cut + 1):
            second.append(two.open(number))
            two.arrived(number, similarity)
        assert first + second == whole, cut
