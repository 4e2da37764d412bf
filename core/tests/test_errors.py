"""How errors are written, and which exit codes they have."""

from __future__ import annotations

import pytest
from hooktuner import errors
from hooktuner.errors import ConfigError, HooktunerError, Problem, did_you_mean


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem("a.json: key", "is wrong"), "a.json: key — is wrong."),
        (Problem("a.json: key", "is wrong.", "Do this."), "a.json: key — is wrong. Do this."),
        (Problem("key", "unknown option", 'Did you mean "kay"?'), 'key — unknown option. Did you mean "kay"?'),
        (Problem("key", "why?", "Because"), "key — why? Because"),
    ],
)
def test_a_problem_says_what_why_and_what_to_do(problem: Problem, text: str) -> None:
    assert str(problem) == text


def test_a_config_error_has_all_problems_a_line_each() -> None:
    error = ConfigError([Problem("a", "b"), Problem("c", "d")])
    assert str(error) == "a — b.\nc — d."
    assert [problem.where for problem in error.problems] == ["a", "c"]
    assert ConfigError(Problem("a", "b")).problems == (Problem("a", "b"),)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ConfigError", 2),
        ("PluginError", 2),
        ("DataError", 2),
        ("ModelError", 2),
        ("CheckpointError", 2),
        ("TrainingError", 1),
        ("NonFiniteLossError", 1),
    ],
)
def test_exit_codes(name: str, code: int) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, HooktunerError)
    assert kind.exit_code == code


@pytest.mark.parametrize(
    ("word", "answer"),
    [("learning_rte", 'Did you mean "learning_rate"?'), ("seeds", 'Did you mean "seed"?'), ("zzz", "")],
)
def test_nearest_names(word: str, answer: str) -> None:
    assert did_you_mean(word, ["seed", "learning_rate", "lora_rank"]) == answer
