"""Room 1: a config file and flags become a `Draft`: raw values, each with the place it came from.

A config is one flat JSON object. Keys may be written `learning_rate`, `learning-rate` or `--learning_rate`, and under
the other spellings of `config.ALIASES`; `null` means absent. Flags after the file override it: `--key value`,
`--key=value`, or a bare `--key` for true. Nothing is judged here beyond the form; `assemble.py` knows the keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hooktuner.config import ALIASES
from hooktuner.errors import Problem

_NUMBER = re.compile(r"-?\d*\.?\d+([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Value:
    """A raw value. `where` is how messages name it: `config.json: frame_rate` or `--frame_rate`."""

    value: Any
    where: str
    text: str | None = None
    """The characters of a flag's value as typed, for keys that are text (`--tracker_run_name 1.10`)."""
    bare: bool = False
    """A flag without a value."""

    @property
    def origin(self) -> str:
        """Where the value was written, without the key: `config.json` or `flag`."""
        return "flag" if self.where.startswith("--") else self.where.rpartition(": ")[0]


@dataclass
class Draft:
    """What the user wrote. `values` is keyed by canonical key; `plugins` are the names and objects of `--plugin`."""

    source: str
    """How messages name the file: its path as the user gave it, or `config` for a mapping."""
    values: dict[str, Value] = field(default_factory=dict)
    plugins: tuple[Any, ...] = ()
    problems: list[Problem] = field(default_factory=list)
    unreadable: bool = False
    """Nothing is known of what the file says, so nothing that seems to be missing is worth a word."""

    def where(self, *keys: str) -> str:
        """How messages name one or several keys, also those that the user did not write."""
        places = [self.values[key].where if key in self.values else f"{self.source}: {key}" for key in keys]
        if len(keys) > 1 and all(place.startswith(f"{self.source}: ") for place in places):
            names = [place.removeprefix(f"{self.source}: ") for place in places]
            return f"{self.source}: {' and '.join(names)}"
        return " and ".join(places)


def canonical(key: str) -> str:
    """The canonical spelling of a key: no leading dashes, underscores inside, aliases resolved."""
    plain = key.strip().lstrip("-").replace("-", "_")
    return ALIASES.get(plain, plain)


def read_draft(source: Path | str | Mapping[str, Any], flags: Sequence[str] = (), plugins: Sequence[Any] = ()) -> Draft:
    """Read a config (a path, or a mapping with the same keys) and the flags that override it.

    Relative paths are relative to the working directory. Problems of form are gathered in `Draft.problems`.
    """
    if isinstance(source, Mapping):
        draft = Draft("config", plugins=tuple(plugins))
        _add_pairs(draft, list(source.items()))
    else:
        draft = Draft(str(source), plugins=tuple(plugins))
        draft.unreadable = not _read_file(draft, Path(source).expanduser())
    _add_flags(draft, [str(word) for word in flags])
    return draft


def _read_file(draft: Draft, path: Path) -> bool:
    """Whether the file could be read as a JSON object."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        draft.problems.append(
            Problem(draft.source, "there is no such file", f"Looked in {Path.cwd()}; give the path of a JSON file.")
        )
        return False
    except (OSError, UnicodeDecodeError) as failure:
        why = "it is not UTF-8 text" if isinstance(failure, UnicodeDecodeError) else failure.strerror or str(failure)
        draft.problems.append(Problem(draft.source, f"cannot be read: {why}", "Give the path of a JSON file."))
        return False
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as failure:
        draft.problems.append(
            Problem(
                f"{draft.source}: line {failure.lineno}, column {failure.colno}",
                f"this is not JSON: {failure.msg[0].lower()}{failure.msg[1:]}",
                "JSON has no comments and no comma after the last entry.",
            )
        )
        return False
    if not isinstance(pairs, _Pairs):
        draft.problems.append(Problem(draft.source, "a config is one JSON object", 'Write {"key": value, …}.'))
        return False
    _add_pairs(draft, [(key, _plain(draft, value, key)) for key, value in pairs])
    return True


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as read, so that a key that occurs twice is noticed."""


def _plain(draft: Draft, value: Any, path: str) -> Any:
    if isinstance(value, _Pairs):
        plain: dict[str, Any] = {}
        for key, item in value:
            if key in plain:
                draft.problems.append(Problem(f"{draft.source}: {path}.{key}", "is written twice", "Remove one."))
            plain[key] = _plain(draft, item, f"{path}.{key}")
        return plain
    if isinstance(value, list):
        return [_plain(draft, item, f"{path}[{position}]") for position, item in enumerate(value)]
    return value


def _add_pairs(draft: Draft, pairs: Sequence[tuple[str, Any]]) -> None:
    spelled: dict[str, str] = {}
    for spelling, value in pairs:
        key = canonical(str(spelling))
        if value is None:
            continue
        if key in draft.values and draft.values[key].value != value:
            other = spelled[key]
            twice = (
                "is written twice, with different values"
                if other == spelling
                else f"is another spelling of {other}, and both are given with different values"
            )
            draft.problems.append(Problem(f"{draft.source}: {spelling}", twice, "Remove one."))
            continue
        spelled.setdefault(key, spelling)
        draft.values.setdefault(key, Value(value, f"{draft.source}: {spelling.lstrip('-')}"))


def _add_flags(draft: Draft, words: Sequence[str]) -> None:
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("--") or word == "--":
            draft.problems.append(
                Problem(word, "a flag was expected here", "Write flags as --key value; quote values that have spaces.")
            )
            continue
        name, equals, text = word.partition("=")
        if not equals and position < len(words) and _is_value(words[position]):
            text, equals = words[position], " "
            position += 1
        where = "--" + name.lstrip("-")
        value = Value(_parsed(text), where, text=text) if equals else Value(True, where, bare=True)
        if value.value is None:
            draft.values.pop(canonical(name), None)
        else:
            draft.values[canonical(name)] = value


def _is_value(word: str) -> bool:
    return not word.startswith("-") or word == "-" or _NUMBER.fullmatch(word) is not None


def _parsed(text: str) -> Any:
    """A flag's value: JSON where it is JSON, otherwise the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False}.get(text, text)
