"""Room 1: files and flags become raw values with their places."""

from __future__ import annotations

from pathlib import Path

import pytest
from hooktuner.draft import Draft, canonical, read_draft


def values(draft: Draft) -> dict[str, object]:
    return {key: value.value for key, value in draft.values.items()}


def messages(draft: Draft) -> list[str]:
    return [str(problem) for problem in draft.problems]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("config.json")


@pytest.mark.parametrize(
    ("spelling", "key"),
    [
        ("learning_rate", "learning_rate"),
        ("--learning_rate", "learning_rate"),
        ("max-grad-norm", "max_grad_norm"),
        ("--max-grad-norm", "max_grad_norm"),
        ("framerate", "frame_rate"),
        ("checkpointing_steps", "checkpoint_step_interval"),
        ("--validation-steps", "validation_step_interval"),
    ],
)
def test_spellings(spelling: str, key: str) -> None:
    assert canonical(spelling) == key
    assert values(read_draft({spelling: 7})) == {key: 7}


def test_a_file_and_its_places(file: Path) -> None:
    file.write_text('{"--seed": 3, "framerate": 24, "tracker_run_name": null}')
    draft = read_draft(file)
    assert values(draft) == {"seed": 3, "frame_rate": 24}
    assert draft.values["seed"].where == "config.json: seed"
    assert draft.values["frame_rate"].where == "config.json: framerate"
    assert draft.values["seed"].origin == "config.json"
    assert draft.problems == []


def test_a_byte_order_mark_is_no_problem(file: Path) -> None:
    file.write_text('\ufeff{"seed": 3}', encoding="utf-8")
    assert values(read_draft(file)) == {"seed": 3}


def test_a_missing_file(file: Path) -> None:
    assert messages(read_draft(file)) == [
        f"config.json — there is no such file. Looked in {Path.cwd()}; give the path of a JSON file."
    ]


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    assert messages(read_draft(tmp_path)) == [
        f"{tmp_path} — cannot be read: Is a directory. Give the path of a JSON file."
    ]


def test_bytes_that_are_not_text(file: Path) -> None:
    file.write_bytes(b'{"a": "\xff"}')
    assert messages(read_draft(file)) == [
        "config.json — cannot be read: it is not UTF-8 text. Give the path of a JSON file."
    ]


def test_a_comma_too_many_has_a_line_and_a_column(file: Path) -> None:
    file.write_text('{\n  "seed": 3,\n}')
    [message] = messages(read_draft(file))
    assert message.startswith("config.json: line 3, column 1 — this is not JSON: ")
    assert message.endswith("JSON has no comments and no comma after the last entry.")


def test_a_list_is_no_config(file: Path) -> None:
    file.write_text("[]")
    assert messages(read_draft(file)) == ['config.json — a config is one JSON object. Write {"key": value, …}.']


def test_a_key_twice_with_different_values(file: Path) -> None:
    file.write_text('{"seed": 3, "seed": 4, "lora_rank": 8, "lora_rank": 8}')
    draft = read_draft(file)
    assert messages(draft) == ["config.json: seed — is written twice, with different values. Remove one."]
    assert values(draft) == {"seed": 3, "lora_rank": 8}


def test_two_spellings_with_different_values(file: Path) -> None:
    file.write_text('{"frame_rate": 24, "framerate": 16, "--seed": 1, "seed": 1}')
    assert messages(read_draft(file)) == [
        "config.json: framerate — is another spelling of frame_rate, and both are given with different values. "
        "Remove one."
    ]


def test_a_nested_key_twice(file: Path) -> None:
    file.write_text('{"routing": {"routes": [{"start": 1, "start": 2}]}}')
    assert messages(read_draft(file)) == ["config.json: routing.routes[0].start — is written twice. Remove one."]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--key", "text"], "text"),
        (["--key=text"], "text"),
        (["--key=a=b"], "a=b"),
        (["--key="], ""),
        (["--key"], True),
        (["--key", "true"], True),
        (["--key=False"], False),
        (["--key", "3"], 3),
        (["--key", "-2.5"], -2.5),
        (["--key", "1e-4"], 1e-4),
        (["--key", '{"a": [1, true]}'], {"a": [1, True]}),
        (["--key", "[1, 2]"], [1, 2]),
        (["--key", "{not json"], "{not json"),
        (["--key", "two words"], "two words"),
        (["--key", "1", "--key", "2"], 2),
    ],
)
def test_flags(words: list[str], value: object) -> None:
    draft = read_draft({}, words)
    assert values(draft) == {"key": value}
    assert type(draft.values["key"].value) is type(value)
    assert draft.problems == []


def test_flags_override_the_file_in_any_spelling(file: Path) -> None:
    file.write_text('{"framerate": 24, "seed": 1}')
    draft = read_draft(file, ["--frame-rate", "16"])
    assert values(draft) == {"frame_rate": 16, "seed": 1}
    assert draft.values["frame_rate"].where == "--frame-rate"
    assert draft.values["frame_rate"].origin == "flag"


def test_null_as_a_flag_takes_the_key_of_the_file_away() -> None:
    assert values(read_draft({"tracker_run_name": "a"}, ["--tracker_run_name", "null"])) == {}


def test_a_bare_flag_before_another_flag() -> None:
    draft = read_draft({}, ["--one", "--two", "2"])
    assert values(draft) == {"one": True, "two": 2}
    assert draft.values["one"].bare
    assert not draft.values["two"].bare


def test_characters_of_a_flag_are_kept() -> None:
    assert read_draft({}, ["--tracker_run_name", "1.10"]).values["tracker_run_name"].text == "1.10"


def test_words_that_are_no_flags() -> None:
    draft = read_draft({}, ["stray", "-x", "--seed", "1", "2"])
    assert [problem.where for problem in draft.problems] == ["stray", "-x", "2"]
    assert messages(draft)[0] == (
        "stray — a flag was expected here. Write flags as --key value; quote values that have spaces."
    )
    assert values(draft) == {"seed": 1}


def test_places_of_several_keys() -> None:
    draft = read_draft({"seed": 1}, ["--lora_rank", "2"])
    assert draft.where("seed") == "config: seed"
    assert draft.where("seed", "optimizer") == "config: seed and optimizer"
    assert draft.where("seed", "lora_rank") == "config: seed and --lora_rank"
