"""The config keys, and what can be said about routes before the model is there. Does not import torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any

from hooktuner.config import PluginOptions
from hooktuner.errors import Problem
from hooktuner.keys import problems_of, show
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

if TYPE_CHECKING:
    from hooktuner.context import Run

EXAMPLE = '{"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]}'
DISABLE_AFTER = {"lora": 0.85, "full": 1.0}
"""Default of `tread_disable_after` by `model_type`. Why an adapter needs the tail without routing: README."""


def _not_bool(value: object) -> object:
    if isinstance(value, bool):  # pydantic would take `true` for 1
        raise ValueError(f"must be a number, not {show(value)}")
    return value


Ratio = Annotated[float, BeforeValidator(_not_bool)]
Index = Annotated[int, BeforeValidator(_not_bool)]


class Route(BaseModel):
    """One stretch of blocks that works on a share of the tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    selection_ratio: Ratio = Field(ge=0, lt=1, description="Share of the tokens that bypass the route.")
    start_layer_idx: Index = Field(description="The first routed block, from 0; negative numbers count from the end.")
    end_layer_idx: Index = Field(description="The last routed block, inclusive; negative numbers count from the end.")

    @model_validator(mode="after")
    def _possible(self) -> Route:
        start, end = self.start_layer_idx, self.end_layer_idx
        if end == -1:
            raise ValueError(
                "end_layer_idx -1 is the last block: dropped tokens would leave the model straight from the start of "
                "the route. End it earlier; -4 is what the paper found best"
            )
        if (start < 0) == (end < 0) and start > end:
            raise ValueError(
                f"the route starts at block {start}, behind its end {end} (inclusive). Swap start_layer_idx and "
                "end_layer_idx"
            )
        return self


def _some(routes: tuple[Route, ...]) -> tuple[Route, ...]:
    if not routes:  # `min_length` would also complain where routes were refused one by one
        raise ValueError("there is no route. Write at least one, or remove tread_config")
    return routes


class TreadConfig(BaseModel):
    """The value of `tread_config`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    routes: Annotated[tuple[Route, ...], AfterValidator(_some)] = Field(
        description="Stretches of blocks that do not overlap.", json_schema_extra={"minItems": 1}
    )

    @model_validator(mode="after")
    def _apart(self) -> TreadConfig:
        for (one, first), (two, second) in combinations(enumerate(self.routes), 2):
            ends = (first.start_layer_idx, first.end_layer_idx, second.start_layer_idx, second.end_layer_idx)
            if len({end < 0 for end in ends}) == 1 and ends[0] <= ends[3] and ends[2] <= ends[1]:
                raise ValueError(overlap(one, ends[:2], two, ends[2:]))
        return self


def overlap(one: int, first: Iterable[int], two: int, second: Iterable[int]) -> str:
    """Why two routes do not fit, by their positions in the list and their (start, end)."""
    spans = ["{} to {}".format(*span) for span in (first, second)]
    return (
        f"routes[{one}] (blocks {spans[0]}) and routes[{two}] (blocks {spans[1]}) overlap; ends are inclusive. "
        "Let each block be in one route"
    )


def _from_text(value: object) -> object:
    """A string is read as JSON, so that the value can be handed through shells and other programs."""
    if not isinstance(value, str):
        return value
    try:
        parsed: Any = json.loads(value)
    except json.JSONDecodeError as failure:
        raise ValueError(
            f"this text is not JSON (column {failure.colno}: {failure.msg[0].lower()}{failure.msg[1:]}). "
            f"Write {EXAMPLE}"
        ) from None
    if not isinstance(parsed, dict):
        return parsed
    try:
        return TreadConfig.model_validate(parsed)
    except ValidationError as error:  # core knows no places inside of text
        found = problems_of(error, parsed, lambda key: key or "the object", TreadConfig)
        raise ValueError(" ".join(map(str, found))) from None


class TreadOptions(PluginOptions):
    """The config keys of the plugin."""

    tread_config: Annotated[TreadConfig | None, BeforeValidator(_from_text)] = Field(
        default=None,
        description=f"Token routing (TREAD), as an object or as its JSON in a string: `{EXAMPLE}`. selection_ratio: "
        "share of the tokens that bypass the blocks, from 0 to below 1; start_layer_idx and end_layer_idx (inclusive): "
        "blocks from 0, negative numbers from the end.",
    )
    tread_disable_after: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of the run, in optimizer steps, after which routing is off, above 0 to 1 (never off); "
        "default: 0.85 for LoRA, 1 for full fine-tuning.",
    )

    def active(self) -> bool | None:
        """The presence of `tread_config` switches the plugin on."""
        return None if self.tread_config is None else True

    def problems(self, run: Run) -> Iterable[Problem]:
        """Routing that is asked for by name needs its routes."""
        if self.tread_config is None:
            yield Problem("tread_config", "is missing, and the plugin tread is active", f"Set it to {EXAMPLE}.")

    def share(self, run: Run) -> float:
        """The share of the run in which routing is on."""
        if self.tread_disable_after is not None:
            return self.tread_disable_after
        return DISABLE_AFTER[run.config.model_type]
