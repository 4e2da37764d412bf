"""Config keys as things to read about: their words, their owners, and pydantic's errors in plain language."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from hooktuner.config import ALIASES, FAMILY_DEFAULTS, RunConfig
from hooktuner.errors import Problem, did_you_mean

CORE = "hooktuner"


@dataclass(frozen=True)
class Key:
    """One config key, for `tuner config explain`, the docs and suggestions."""

    name: str
    owner: str
    """`hooktuner` for core's keys, otherwise `hooktuner-name 0.1.0`."""
    type: str
    default: str
    description: str
    aliases: tuple[str, ...] = ()


def keys_of(model: type[BaseModel], owner: str) -> list[Key]:
    """Every key of an option model, in the order of its fields."""
    properties = model.model_json_schema().get("properties", {})
    return [
        Key(
            name=name,
            owner=owner,
            type=type_words(properties.get(name, {})),
            default=_default_words(name, field, core=model is RunConfig),
            description=field.description or "",
            aliases=tuple(alias for alias, key in ALIASES.items() if key == name) if model is RunConfig else (),
        )
        for name, field in model.model_fields.items()
    ]


def _default_words(name: str, field: FieldInfo, *, core: bool) -> str:
    if field.is_required():
        return "required"
    if core and name in FAMILY_DEFAULTS:
        return "the family's"
    default = field.get_default(call_default_factory=True)  # type: ignore[call-arg]
    if default is None:
        return "none"
    return json.dumps(default.model_dump(mode="json") if isinstance(default, BaseModel) else default, default=list)


def type_words(schema: Mapping[str, Any]) -> str:
    """A JSON Schema of one key in words: `whole number, at least 1`."""
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value) for value in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    if "anyOf" in schema:
        return " or ".join(type_words(choice) for choice in schema["anyOf"] if choice.get("type") != "null")
    if "allOf" in schema or "$ref" in schema:
        return "object"
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items")
        return f"list of {type_words(items)}" if items else "list"
    names = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    words = [names.get(str(kind), "object" if kind == "object" else "any value")]
    words += [f"{word} {schema[limit]:g}" for limit, word in limits.items() if limit in schema]
    return ", ".join(words)


def json_schema(models: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """One JSON Schema (draft 2020-12) for the flat config that these models make together, aliases included."""
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    required: list[str] = []
    for model in models:
        schema = model.model_json_schema()
        properties.update(schema.get("properties", {}))
        definitions.update(schema.get("$defs", {}))
        required += schema.get("required", [])
    for alias, key in ALIASES.items():
        properties[alias] = {**properties[key], "description": f"Another spelling of `{key}`.", "deprecated": True}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "hooktuner config",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
    if required:
        schema["required"] = required
    if definitions:
        schema["$defs"] = definitions
    return schema


# ------------------------------------------------------------------------------------------ errors in plain words


def takes_bool(field: FieldInfo) -> bool:
    """Whether a boolean is a legal value of a field (pydantic would take `true` for the number 1)."""
    kinds = {choice.get("type", "any") for choice in _choices(field)}
    return bool(kinds & {"boolean", "any"})


def takes_text_only(field: FieldInfo) -> bool:
    """Whether a field is text, so that a number typed as a flag keeps its characters."""
    annotation = field.annotation
    kinds = {kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)}
    return kinds == {str}


def _choices(field: FieldInfo) -> list[Mapping[str, Any]]:
    from pydantic import TypeAdapter

    schema = TypeAdapter[Any](field.annotation or Any).json_schema()
    return list(schema.get("anyOf", [schema]))


def problems_of(
    error: ValidationError,
    values: Mapping[str, Any],
    where: Callable[[str], str],
    model: type[BaseModel] | None = None,
) -> list[Problem]:
    """Pydantic's errors as problems in plain words.

    values: what was validated, to tell real path steps from pydantic's own. where: how to name a top-level key; deeper
    places are appended as `.name` and `[3]`. model: for suggestions of names inside nested objects.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for detail in error.errors(include_url=False):
        path = _real_path(detail["loc"], values, keep_last=detail["type"] in ("missing", "extra_forbidden"))
        place = where(str(path[0])) if path else where("")
        place += "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path[1:])
        found.setdefault(place, []).append(_in_words(detail, _known_names(model, path[:-1])))
    problems = []
    for place, reasons in found.items():
        why = " or ".join(dict.fromkeys(why for why, _ in reasons))
        problems.append(Problem(place, why, next((fix for _, fix in reasons if fix), "")))
    return problems


def _real_path(loc: Iterable[int | str], values: Any, *, keep_last: bool) -> list[int | str]:
    steps = list(loc)
    path: list[int | str] = []
    current = values
    for position, step in enumerate(steps):
        if isinstance(current, Mapping) and step in current:
            current = current[step]  # type: ignore[index]
        elif isinstance(current, (list, tuple)) and isinstance(step, int) and step < len(current):
            current = current[step]
        elif not (keep_last and position == len(steps) - 1) and position > 0:
            continue  # a union's tag or a validator's name, not a place in the config
        path.append(step)
    return path


def _known_names(model: type[BaseModel] | None, path: Sequence[int | str]) -> list[str]:
    for step in path:
        if model is None:
            return []
        if isinstance(step, int) or step not in model.model_fields:
            continue
        model = _model_in(model.model_fields[step].annotation)
    return list(model.model_fields) if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _in_words(detail: Any, known: Sequence[str]) -> tuple[str, str]:
    """(why, fix) of one pydantic error."""
    kind: str = detail["type"]
    context: Mapping[str, Any] = detail.get("ctx", {})
    if kind == "missing":
        return "is missing", "Add it."
    if kind == "extra_forbidden":
        return "unknown option", did_you_mean(str(detail["loc"][-1]), known)
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", detail["msg"])), ""
    shown = show(detail.get("input"))
    if kind in ("literal_error", "enum"):
        expected = str(context["expected"]).replace("'", '"')
        choices = [choice.strip('" ') for choice in expected.replace(" or ", ", ").split(",")]
        return f"must be one of {', '.join(choices)}, not {shown}", did_you_mean(str(detail.get("input")), choices)
    for prefix, words in _EXPECTED:
        if kind.startswith(prefix):
            return f"must be {words}, not {shown}", ""
    if kind in ("too_short", "too_long"):
        least = kind == "too_short"
        count = context["min_length" if least else "max_length"]
        return f"must have at {'least' if least else 'most'} {count} entries, not {shown}", ""
    for limit, words in _LIMITS.items():
        if limit in context:
            bound = context[limit]
            return f"must be {words} {f'{bound:g}' if isinstance(bound, float) else bound}, not {shown}", ""
    message = detail["msg"].replace("Input should be", "must be")
    return f"{message[0].lower()}{message[1:]}, not {shown}", ""


_EXPECTED = (
    ("bool", "true or false"),
    ("int_", "a whole number"),
    ("float_", "a number"),
    ("finite_number", "a finite number"),
    ("string_type", "text"),
    ("list_type", "a list"),
    ("tuple_type", "a list"),
    ("set_type", "a list"),
    ("dict_type", "an object {…}"),
    ("mapping_type", "an object {…}"),
    ("model_", "an object {…}"),
    ("path_type", "a path"),
)
_LIMITS = {
    "gt": "above",
    "ge": "at least",
    "lt": "below",
    "le": "at most",
    "multiple_of": "a multiple of",
    "pattern": "text that matches",
}


def show(value: Any) -> str:
    """A value as JSON, shortened for a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
