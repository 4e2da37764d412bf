"""From raw values to option models: which values fit, and everything that is wrong with the others, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from hooktuner.draft import Draft, Value
from hooktuner.errors import Problem
from hooktuner.keys import Key, keys_of, problems_of, show, takes_bool, takes_text_only

Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], draft: Draft, owner: str) -> tuple[Model | None, set[str], list[Problem]]:
    """(options, keys that are wrong, problems) for those values of a draft that the model owns.

    Wrong keys keep their defaults, so that the rest can be checked in the same run; the options are None only where
    that is impossible too (a rule over several keys). owner: for messages about such rules.
    """
    raw: dict[str, object] = {}
    bad: set[str] = set()
    problems: list[Problem] = []
    for name, value in draft.values.items():
        if name not in model.model_fields:
            continue
        refused = _refused(model, name, value)
        if refused is None:
            text = value.text if takes_text_only(model.model_fields[name]) else None
            raw[name] = value.value if text is None else text
        else:
            bad.add(name)
            problems.append(refused)
    while True:
        try:
            return model.model_validate(raw), bad, problems
        except ValidationError as error:
            problems += problems_of(error, raw, lambda key: draft.where(key) if key else owner, model)
            wrong = {str(detail["loc"][0]) for detail in error.errors(include_url=False) if detail["loc"]} & set(raw)
            bad |= wrong
            if not wrong:
                return None, bad | set(raw), problems
            raw = {name: value for name, value in raw.items() if name not in wrong}


def _refused(model: type[BaseModel], name: str, value: Value) -> Problem | None:
    """`true` would count as the number 1, and a flag without a value as `true`."""
    if not isinstance(value.value, bool) or takes_bool(model.model_fields[name]):
        return None
    if value.bare:
        return Problem(value.where, f"needs a value ({key_of(model, name).type})", f"Write {value.where} VALUE.")
    return Problem(value.where, f"{show(value.value)} is not possible here ({key_of(model, name).type})")


def key_of(model: type[BaseModel], name: str, owner: str = "") -> Key:
    """The description of one key of a model."""
    return next(key for key in keys_of(model, owner) if key.name == name)


def plain_dict(model: BaseModel) -> Mapping[str, object]:
    """The values of a model as JSON values."""
    return model.model_dump(mode="json")
