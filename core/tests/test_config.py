"""Core's keys: how values are read, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hooktuner.config import ALIASES, FAMILY_DEFAULTS, PluginOptions, RunConfig, prompt_library
from hooktuner.draft import read_draft
from hooktuner.errors import ConfigError
from hooktuner.keys import json_schema, keys_of, type_words
from hooktuner.values import validated
from pydantic import BaseModel, ConfigDict, Field, ValidationError


def read(model: type[Any], values: dict[str, Any], flags: tuple[str, ...] = ()) -> tuple[Any, set[str], list[str]]:
    options, bad, problems = validated(model, read_draft(values, flags), "options of it")
    return options, bad, [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("gradient_checkpointing", "false", False),
        ("gradient_checkpointing", "TRUE", True),
        ("validation_disable", True, True),
        ("train_batch_size", "16", 16),
        ("learning_rate", "1e-4", 1e-4),
        ("lora_alpha", 8, 8.0),
        ("validation_resolution", 512, "512"),
        ("plugins", "one, two", ("one", "two")),
        ("plugins", ["one"], ("one",)),
    ],
)
def test_values_are_read_kindly(key: str, written: object, value: object) -> None:
    config, bad, problems = read(RunConfig, {key: written})
    assert getattr(config, key) == value
    assert not bad
    assert not problems


@pytest.mark.parametrize(
    ("key", "written", "message"),
    [
        ("seed", 3.5, "config: seed — must be a whole number, not 3.5."),
        ("seed", "x", 'config: seed — must be a whole number, not "x".'),
        ("seed", -1, "config: seed — must be at least 0, not -1."),
        ("learning_rate", "fast", 'config: learning_rate — must be a number, not "fast".'),
        ("learning_rate", 0, "config: learning_rate — must be above 0, not 0."),
        ("learning_rate", "inf", 'config: learning_rate — must be a finite number, not "inf".'),
        ("learning_rate", True, "config: learning_rate — true is not possible here (number, above 0)."),
        ("adam_beta1", 1, "config: adam_beta1 — must be below 1, not 1."),
        ("caption_dropout_probability", 2, "config: caption_dropout_probability — must be at most 1, not 2."),
        ("validation_disable", "maybe", 'config: validation_disable — must be true or false, not "maybe".'),
        ("validation_prompt", {"a": 1}, 'config: validation_prompt — must be text, not {"a": 1}.'),
        ("validation_prompt", True, "config: validation_prompt — true is not possible here (text)."),
        ("plugins", 3, "config: plugins — must be a list, not 3."),
        ("plugins", ["a", {}], "config: plugins[1] — must be text, not {}."),
        ("model_type", "lorra", 'config: model_type — must be one of lora, full, not "lorra". Did you mean "lora"?'),
    ],
)
def test_wrong_values_in_plain_words(key: str, written: object, message: str) -> None:
    config, bad, problems = read(RunConfig, {key: written, "lora_rank": 4})
    assert problems == [message]
    assert bad == {key}
    assert config.lora_rank == 4
    assert getattr(config, key) == RunConfig.model_fields[key].default


def test_messages_have_no_jargon() -> None:
    wrong = {name: {"an": ["object"]} for name in RunConfig.model_fields}
    _, bad, problems = read(RunConfig, wrong)
    assert bad == set(RunConfig.model_fields)
    assert len(problems) == len(bad)
    for message in problems:
        for jargon in ("pydantic", "http", "Input", "input", "validation error", "type=", "instance of"):
            assert jargon not in message.replace("validation_", "")


def test_a_flag_without_its_value() -> None:
    _, bad, problems = read(RunConfig, {}, ("--seed", "--validation_disable"))
    assert bad == {"seed"}
    assert problems == ["--seed — needs a value (whole number, at least 0). Write --seed VALUE."]


def test_text_flags_keep_their_characters() -> None:
    config, _, _ = read(RunConfig, {}, ("--tracker_run_name", "1.10", "--validation_prompt", "1e3", "--seed", "7"))
    assert (config.tracker_run_name, config.validation_prompt, config.seed) == ("1.10", "1e3", 7)


class Route(BaseModel):
    model_config = ConfigDict(extra="forbid")
    start_layer: int
    ratio: float = 0.5


class Routing(PluginOptions):
    routes: tuple[Route, ...] = Field(default=(), description="Routes.", max_length=2)
    mode: int | Literal["auto"] = Field(default="auto", description="Mode.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"routes": [{"start_layer": 1, "ratoi": 1}]}, 'routes[0].ratoi — unknown option. Did you mean "ratio"?'),
        ({"routes": [{"start_layer": 1}, {}]}, "routes[1].start_layer — is missing. Add it."),
        ({"routes": [3]}, "routes[0] — must be an object {…}, not 3."),
        ({"routes": [{"start_layer": "a"}]}, 'routes[0].start_layer — must be a whole number, not "a".'),
        ({"mode": "x"}, 'mode — must be a whole number, not "x" or must be one of auto, not "x".'),
    ],
)
def test_places_inside_nested_options(values: dict[str, Any], message: str) -> None:
    _, _, problems = read(Routing, values)
    assert problems == [f"config: {message}"]


def test_lists_that_are_too_long() -> None:
    _, _, [message] = read(Routing, {"routes": [{"start_layer": 1}] * 3})
    assert message.startswith("config: routes — must have at most 2 entries, not [")


def test_option_models_are_strict_and_frozen() -> None:
    with pytest.raises(ValidationError):
        Routing.model_validate({"other": 1})
    with pytest.raises(ValidationError):
        Routing().routes = ()  # type: ignore[misc]


@pytest.mark.parametrize("key", RunConfig.model_fields)
def test_every_key_is_described(key: str) -> None:
    description = RunConfig.model_fields[key].description
    assert description
    assert description.endswith(".")


def test_aliases_lead_to_keys() -> None:
    assert set(ALIASES.values()) <= set(RunConfig.model_fields)
    assert not set(ALIASES) & set(RunConfig.model_fields)


def test_what_the_family_fills_in() -> None:
    assert set(FAMILY_DEFAULTS) == {
        "model_flavour",
        "frame_rate",
        "flow_schedule_shift",
        "validation_negative_prompt",
        "validation_resolution",
        "validation_num_video_frames",
        "validation_guidance",
    }
    assert all(RunConfig.model_fields[key].default is None for key in FAMILY_DEFAULTS)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("512x768", ((512, 768),)),
        ("512", ((512, 512),)),
        (" 480 X 854 , 1024×576", ((480, 854), (1024, 576))),
        ("", ()),
    ],
)
def test_validation_sizes(text: str, sizes: tuple[tuple[int, int], ...]) -> None:
    assert RunConfig.model_validate({"validation_resolution": text}).validation_sizes() == sizes


@pytest.mark.parametrize("text", ["512by768", "0x512", "512x", "-1", "0"])
def test_validation_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write WIDTHxHEIGHT in pixels, such as 512x768"):
        RunConfig.model_validate({"validation_resolution": text}).validation_sizes()


def test_prompts_by_nickname(tmp_path: Path) -> None:
    library = tmp_path / "prompts.json"
    library.write_text(json.dumps({"cat": "a cat", "dog <token>": "a dog"}))
    config = RunConfig.model_validate({"validation_prompt": "a bird", "user_prompt_library": str(library)})
    assert config.prompts() == {"validation": "a bird", "cat": "a cat", "dog <token>": "a dog"}
    assert RunConfig().prompts() == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{path} — the prompt library cannot be read: No such file or directory. Correct user_prompt_library."),
        ("[1]", '{path} — a prompt library is one JSON object. Write {{"nickname": "prompt", …}}.'),
        ('{"a": 1, "b": ["x"]}', '{path}: a — a prompt is text. Write {{"nickname": "prompt", …}}.\n{path}: b — '
         'a prompt is text. Write {{"nickname": "prompt", …}}.'),
        ('{"a": "b",}', "{path}: line 1, column 11 — the prompt library is not JSON. JSON has no comments and no comma "
         "after the last entry."),
    ],
)  # fmt: skip
def test_prompt_libraries_that_cannot_be_used(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "prompts.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        prompt_library(path)
    words = "".join(character for character in str(refused.value) if not character.isdigit())
    assert words == "".join(character for character in message.format(path=path) if not character.isdigit())


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1}, "whole number, at least 1"),
        ({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}, "number, above 0"),
        ({"enum": ["a", "b"]}, 'one of "a", "b"'),
        ({"type": "array", "items": {"type": "string"}}, "list of text"),
        ({"$ref": "#/$defs/Route"}, "object"),
        ({}, "any value"),
    ],
)
def test_types_in_words(schema: dict[str, Any], words: str) -> None:
    assert type_words(schema) == words


def test_keys_say_what_they_are() -> None:
    keys = {key.name: key for key in keys_of(RunConfig, "hooktuner")}
    assert set(keys) == set(RunConfig.model_fields)
    rate = keys["frame_rate"]
    assert (rate.type, rate.default, rate.aliases) == ("number, above 0", "the family's", ("framerate",))
    assert keys["model_type"].default == '"lora"'
    assert keys["lora_alpha"].default == "none"


def test_the_schema_covers_core_aliases_and_plugins() -> None:
    schema = json_schema([RunConfig, Routing])
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {*RunConfig.model_fields, *ALIASES, "routes", "mode"}
    assert "Route" in schema["$defs"]
    assert schema["properties"]["framerate"]["deprecated"] is True
