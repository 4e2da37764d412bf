"""Every conformance check fails for a plugin that is broken in the way it looks for."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hooktuner import BlockTokens, Conditioning, Flavour, PluginOptions, discovery, hookimpl
from hooktuner.errors import PluginError
from hooktuner.hookspecs import GROUP
from hooktuner.testing import PluginConformance, ToyAnatomy, ToyFamily
from hooktuner.testing.toy_parts import ToyPipeline
from pydantic import ConfigDict, Field, field_serializer


def check(name: str, plugin: Any, *arguments: Any, **attributes: Any) -> None:
    """Run one check on a plugin. A skipped check is a failure here: it would have found nothing."""
    conformance = type("Mine", (PluginConformance,), {"plugin": plugin, "tiny_flavour": "toy", **attributes})()
    try:
        getattr(conformance, name)(*arguments)
    except pytest.skip.Exception as skipped:
        pytest.fail(f"{name} was skipped: {skipped}")


def refuses(
    name: str, plugin: Any, *arguments: Any, match: str, kind: type[Exception] = AssertionError, **more: Any
) -> None:
    """The check fails with a message that matches."""
    with pytest.raises(kind, match=match):
        check(name, plugin, *arguments, **more)


# -------------------------------------------------------------------------------------------------------- packaging

MODULE = """
from pydantic import Field
from hooktuner import hookimpl
from hooktuner.config import PluginOptions

class Options(PluginOptions):
    sample_strength: float = Field(1.0, description="How strong.")
    sample_enabled: bool = Field(False, description="Whether.")

class Plugin:
    @hookimpl
    def options(self):
        return Options
"""


class Project:
    """A plugin project with its installed metadata, as pip leaves it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.monkeypatch = monkeypatch

    def install(
        self,
        *,
        name: str = "sample-one",
        distribution: str = "hooktuner-sample-one",
        package: str = "hooktuner_sample_one",
        folder: str = "sample-one",
        requires: tuple[str, ...] = ("hooktuner<0.2,>=0.1",),
        readme: str = "Options: `sample_strength`, and `--sample_enabled true`.",
        module: str = MODULE,
        project_file: bool = True,
    ) -> None:
        project, site = self.root / folder, self.root / "site"
        (project / package).mkdir(parents=True)
        (project / package / "__init__.py").write_text(textwrap.dedent(module))
        if project_file:
            (project / "pyproject.toml").write_text("[project]\n")
            (project / "README.md").write_text(readme)
        info = site / f"{distribution.replace('-', '_')}-0.1.0.dist-info"
        info.mkdir(parents=True)
        needed = "".join(f"Requires-Dist: {one}\n" for one in requires)
        head = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.1.0\n{needed}"
        (info / "METADATA").write_text(f"{head}\n{readme}\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {package}:Plugin\n")
        self.monkeypatch.syspath_prepend(str(project))
        self.monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    before = set(sys.modules)
    yield Project(tmp_path, monkeypatch)
    for name in set(sys.modules) - before:
        if name.startswith(("hooktuner_sample", "other_package")):
            del sys.modules[name]


PACKAGING = (
    "test_identity",
    "test_dependency_on_core_is_bounded",
    "test_readme_lists_every_option",
    "test_entry_module_is_light",
    "test_hooks_match_the_specs",
    "test_errors_are_blamed_on_the_plugin",
    "test_options_have_valid_defaults",
    "test_options_are_described",
    "test_unknown_options_are_refused",
)


@pytest.mark.parametrize("name", PACKAGING)
def test_a_good_project_passes(name: str, project: Project) -> None:
    project.install()
    check(name, "sample-one")


@pytest.mark.parametrize("name", PACKAGING)
def test_a_good_wheel_passes(name: str, project: Project) -> None:
    """Installed from a wheel there is no project folder; the README is the description."""
    project.install(folder="anything", project_file=False)
    check(name, "sample-one")


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ({"name": "sample_one"}, "entry point in .* is called 'sample_one'"),
        ({"distribution": "sample-one"}, "the distribution is called 'sample-one'; call it 'hooktuner-sample-one'"),
        ({"package": "other_package"}, "is in the package 'other_package'; call it 'hooktuner_sample_one'"),
        ({"folder": "else"}, "folder is called 'else'; call it 'sample_one'"),
    ],
)
def test_identity(fault: dict[str, Any], match: str, project: Project) -> None:
    project.install(**fault)
    refuses("test_identity", "sample-one", match=match)


def test_identity_of_a_plugin_that_is_not_installed() -> None:
    refuses("test_identity", "no-such-plugin", match="no installed distribution has an entry point 'no-such-plugin'")


@pytest.mark.parametrize(
    ("requires", "match"),
    [((), "does not require hooktuner"), (("hooktuner>=0.1", "torch<9"), "without an upper bound")],
)
def test_dependency(requires: tuple[str, ...], match: str, project: Project) -> None:
    project.install(requires=requires)
    refuses("test_dependency_on_core_is_bounded", "sample-one", match=match)


@pytest.mark.parametrize("project_file", [True, False])
def test_readme(project_file: bool, project: Project, tmp_path: Path) -> None:
    project.install(
        readme="Only `sample_enabled`, and sample_strength not as code.",
        folder="sample-one" if project_file else "site-packages",
        project_file=project_file,
    )
    refuses("test_readme_lists_every_option", "sample-one", match="does not name `sample_strength`$")
    (tmp_path / "other.md").write_text("`sample_enabled`, `sample_strength`")
    check("test_readme_lists_every_option", "sample-one", readme=tmp_path / "other.md")


HEAVY_HOOK = """
class Plugin(Plugin):
    @hookimpl
    def options(self):
        import torch
        return Options
"""


@pytest.mark.parametrize("where", ["import torch", HEAVY_HOOK])
def test_light(where: str, project: Project) -> None:
    project.install(module=MODULE + where + "\n")
    (project.root / "sample-one" / "torch.py").touch()  # quicker to import than torch itself
    refuses("test_entry_module_is_light", "sample-one", match="hooktuner_sample_one imports torch: import them inside")


def test_light_reports_a_broken_import(project: Project) -> None:
    project.install(module="import no_such_module_anywhere\n")
    refuses("test_entry_module_is_light", "sample-one", match="No module named 'no_such_module_anywhere'")


# ------------------------------------------------------------------------------------------------ hooks and options


class Silent:
    def listen(self, run: Any, event: Any) -> None: ...


class Unmarked:
    def on_event(self, run: Any, event: Any) -> None: ...


class Defaulted:
    @hookimpl
    def on_event(self, run: Any, event: Any = None) -> None: ...


class Misspelt:
    @hookimpl
    def on_evnt(self, run: Any) -> None: ...


def test_hooks() -> None:
    refuses("test_hooks_match_the_specs", Silent, match="answers no hook")
    refuses("test_hooks_match_the_specs", Unmarked, match="would never be called", kind=PluginError)
    refuses("test_hooks_match_the_specs", Defaulted, match="'event' has a default", kind=PluginError)
    refuses("test_hooks_match_the_specs", Misspelt, match='Did you mean "on_event"', kind=PluginError)


def test_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core that forgets to blame is noticed."""
    check("test_errors_are_blamed_on_the_plugin", ToyFamily)
    monkeypatch.setattr(discovery, "blamed", lambda plugin, place: nullcontext())
    refuses("test_errors_are_blamed_on_the_plugin", ToyFamily, match="the note of an exception in hook")


def _owning(model: type[PluginOptions]) -> Any:
    class Owner:
        name = "owner"

        @hookimpl
        def options(self) -> type[PluginOptions]:
            return model

    return Owner


class BadDefault(PluginOptions):
    owner_size: int = Field(0, ge=1, description="Size.")


class Forgetful(PluginOptions):
    owner_size: int = Field(2, description="Size.")

    @field_serializer("owner_size")
    def _round(self, value: int) -> int:
        return value // 10


class Bare(PluginOptions):
    owner_size: int = 3


class CoreKey(PluginOptions):
    seed: int = Field(3, description="Another seed.")


class WrongCacheField(PluginOptions):
    owner_size: int = Field(3, description="Size.")
    cache_fields: ClassVar[Mapping[str, tuple[str, ...]]] = {"text": ("owner_length",)}


class Lax(PluginOptions):
    model_config = ConfigDict(extra="allow")
    owner_size: int = Field(3, description="Size.")


class Mutable(PluginOptions):
    model_config = ConfigDict(frozen=False)
    owner_size: int = Field(3, description="Size.")


@pytest.mark.parametrize(
    ("name", "model", "match", "kind"),
    [
        ("test_options_have_valid_defaults", BadDefault, "greater than or equal to 1", ValueError),
        ("test_options_have_valid_defaults", Forgetful, "comes back from JSON as", AssertionError),
        ("test_options_are_described", Bare, "owner_size: without description", AssertionError),
        ("test_options_are_described", CoreKey, "seed: core owns this config key", AssertionError),
        ("test_options_are_described", WrongCacheField, "cache_fields names owner_length", AssertionError),
        ("test_unknown_options_are_refused", Lax, 'do not override extra="forbid"', AssertionError),
        ("test_unknown_options_are_refused", Mutable, "do not override frozen=True", AssertionError),
    ],
)
def test_options(name: str, model: type[PluginOptions], match: str, kind: type[Exception]) -> None:
    refuses(name, _owning(model), match=match, kind=kind)


# --------------------------------------------------------------------------------------------------------- families


def _card(change: Callable[[Any], Any]) -> type[ToyFamily]:
    """The toy family with another card."""

    class Mutant(ToyFamily):
        @hookimpl
        def describe_model(self, run: Any) -> Any:
            return change(super().describe_model(run))

    return Mutant


def _flavours(**changes: Flavour) -> type[ToyFamily]:
    return _card(lambda card: replace(card, flavours={**card.flavours, **changes}))


@pytest.mark.parametrize(
    ("mutant", "match"),
    [
        (_card(lambda card: replace(card, name="other")), "the card is called 'other'"),
        (_flavours(extra=Flavour("extra", "no source")), "'extra' must have a repository or a build"),
        (_flavours(extra=Flavour("extra", "both", repository="a/b", build=print)), "'extra' must have a repository or"),
        (_flavours(extra=Flavour("another", "misnamed", repository="a/b")), "'another' is listed as 'extra'"),
        (_flavours(extra=Flavour("extra", " ", repository="a/b")), "'extra' has no summary"),
        (
            _flavours(extra=Flavour("extra", "typo", repository="a/b", defaults={"frame_rat": 8})),
            "the defaults of 'extra' name frame_rat",
        ),
        (_card(lambda card: replace(card, anatomy=None)), "offers blocks, frames, token_routing without an anatomy"),
        (_card(lambda card: replace(card, default_flavour="tini")), "the default flavour 'tini' does not exist"),
    ],
)
def test_card(mutant: type[ToyFamily], match: str, tmp_path: Path) -> None:
    refuses("test_card_is_complete", mutant, tmp_path, match=match)


def test_card_with_impossible_defaults(tmp_path: Path) -> None:
    mutant = _flavours(extra=Flavour("extra", "typo", repository="a/b", defaults={"frame_rate": -1}))
    refuses("test_card_is_complete", mutant, tmp_path, match="greater than 0", kind=ValueError)


@pytest.mark.parametrize(
    ("targets", "match"),
    [("transformer_blocks.*", "matches no module"), (r"blocks\.0\.attention", r"blocks.0.attention \(ToyAttention\)")],
)
def test_lora_targets(targets: str, match: str, tmp_path: Path) -> None:
    refuses("test_lora_targets_match", _card(lambda card: replace(card, lora_targets=targets)), tmp_path, match=match)


class PadsCaptions(ToyFamily):
    @hookimpl
    def encode_text(self, run: Any, encoder: Any, captions: Any) -> Any:
        encoded = super().encode_text(run, encoder, captions)
        longest = max(len(entry["words_LD"]) for entry in encoded)
        pad = torch.nn.functional.pad
        return [{"words_LD": pad(entry["words_LD"], (0, 0, 0, longest - len(entry["words_LD"])))} for entry in encoded]


class MixesCaptions(ToyFamily):
    @hookimpl
    def encode_text(self, run: Any, encoder: Any, captions: Any) -> Any:
        encoded = super().encode_text(run, encoder, captions)
        mean = torch.cat([entry["words_LD"] for entry in encoded]).mean()
        return [{"words_LD": entry["words_LD"] - mean} for entry in encoded]


class DeafEncoder(ToyFamily):
    @hookimpl
    def encode_text(self, run: Any, encoder: Any, captions: Any) -> Any:
        return super().encode_text(run, encoder, ["same"] * len(captions))


class InfiniteText(ToyFamily):
    @hookimpl
    def encode_text(self, run: Any, encoder: Any, captions: Any) -> Any:
        return [{"words_LD": one["words_LD"] / 0} for one in super().encode_text(run, encoder, captions)]


@pytest.mark.parametrize(
    ("mutant", "match"),
    [
        (PadsCaptions, "return valid tokens only"),
        (MixesCaptions, "depends on the other captions"),
        (DeafEncoder, "two different captions have equal tensors"),
        (InfiniteText, "is not finite"),
    ],
)
def test_encoded_text(mutant: type[ToyFamily], match: str, tmp_path: Path) -> None:
    refuses("test_encoded_text", mutant, tmp_path, match=match)


def _latents(change: Callable[[dict[str, Any]], dict[str, Any]]) -> type[ToyFamily]:
    class Mutant(ToyFamily):
        @hookimpl
        def encode_latents(self, run: Any, vae: Any, pixels_BCFHW: Any) -> Any:
            return change(super().encode_latents(run, vae, pixels_BCFHW))

    return Mutant


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda one: {"latents": one["latents"].transpose(3, 4)}, r"encode_latents gives \(2, 8, 3, 8, 4\)"),
        (lambda one: {"latents": one["latents"] * float("nan")}, "latents are not finite"),
        (lambda one: {"latents": one["latents"] * 0}, "two different clips have equal latents"),
        (lambda one: {**one, "mean": torch.zeros(3)}, "mean has shape .*: its first axis must be the batch"),
    ],
)
def test_encoded_latents(change: Any, match: str, tmp_path: Path) -> None:
    refuses("test_encoded_latents", _latents(change), tmp_path, match=match)


LONELY = torch.zeros((), requires_grad=True)


def _predicts(change: Callable[[Any, Any, Any], Any]) -> type[ToyFamily]:
    """The toy family whose prediction is changed by (prediction, denoiser, step)."""

    class Mutant(ToyFamily):
        @hookimpl
        def predict(self, run: Any, denoiser: Any, step: Any) -> Any:
            return change(super().predict(run, denoiser, step), denoiser, step)

    return Mutant


@pytest.mark.parametrize(
    ("change", "match", "kind"),
    [
        (lambda velocity, _, step: velocity[:, :4], "hook predict answered Tensor of shape", PluginError),
        (lambda velocity, _, step: velocity.long(), "the prediction has dtype torch.int64", AssertionError),
        (lambda velocity, _, step: velocity / 0, "the prediction is not finite", AssertionError),
        (lambda velocity, _, step: velocity.detach() + LONELY, "no gradient in the denoiser", AssertionError),
    ],
)
def test_prediction(change: Any, match: str, kind: type[Exception], tmp_path: Path) -> None:
    refuses("test_prediction", _predicts(change), tmp_path, match=match, kind=kind)


class LossEverywhere(ToyFamily):
    """Counts the given frames, too."""

    @hookimpl
    def compute_loss(self, run: Any, step: Any) -> Any:
        return (step.prediction_BCFHW - step.target_BCFHW).square().flatten(1).mean(1)


class LossNowhere(ToyFamily):
    @hookimpl
    def compute_loss(self, run: Any, step: Any) -> Any:
        return 0 * (step.prediction_BCFHW - step.target_BCFHW).flatten(1).mean(1)


def test_loss(tmp_path: Path) -> None:
    name = "test_true_velocity_has_no_loss"
    check(name, LossEverywhere, tmp_path)  # nothing is given in text to video
    refuses(name, LossEverywhere, tmp_path, match="is not 0 at the true", tiny_flavour="toy-i2v")
    refuses(name, LossNowhere, tmp_path, match="is 0 at a wrong velocity")


class AttendsToPadding(ToyFamily):
    @hookimpl
    def predict(self, run: Any, denoiser: Any, step: Any) -> Any:
        from hooktuner.testing.toy_parts import pad_text

        text, _ = pad_text([sample["words_LD"] for sample in step.batch.text])
        return denoiser(step.noisy_BCFHW, step.timestep_B, text, return_dict=False)[0]


class IgnoresText(ToyFamily):
    @hookimpl
    def predict(self, run: Any, denoiser: Any, step: Any) -> Any:
        text = torch.zeros(len(step.batch.index), 1, 32)
        return denoiser(step.noisy_BCFHW, step.timestep_B, text, return_dict=False)[0]


def test_captions(tmp_path: Path) -> None:
    refuses("test_captions_are_independent", AttendsToPadding, tmp_path, match="depends on the other caption .*: mask")
    refuses("test_captions_are_independent", IgnoresText, tmp_path, match="captions have no effect")


class DrawsGlobally(ToyFamily):
    @hookimpl
    def condition(self, run: Any, step: Any) -> Conditioning | None:
        torch.rand(1)
        return super().condition(run, step)


def test_function(tmp_path: Path) -> None:
    own = torch.Generator().manual_seed(0)
    noisy = _predicts(lambda velocity, _, step: velocity + torch.rand(1, generator=own))
    refuses("test_prediction_is_a_function", noisy, tmp_path, match="two equal steps differ")
    refuses("test_prediction_is_a_function", DrawsGlobally, tmp_path, match="draws from the global stream")


def test_checkpointing(tmp_path: Path) -> None:
    mutant = _predicts(lambda velocity, denoiser, step: velocity * (1.5 if denoiser.gradient_checkpointing else 1.0))
    refuses("test_checkpointing_changes_nothing", mutant, tmp_path, match="checkpointing changes the gradients of")


class WrongOrder(ToyAnatomy):
    def blocks(self, denoiser: Any) -> Any:
        return super().blocks(denoiser)[::-1]


class NoExtras(ToyAnatomy):
    def extra_blocks(self, denoiser: Any) -> Any:
        return []


class UncalledExtra(ToyAnatomy):
    def extra_blocks(self, denoiser: Any) -> Any:
        return [*super().extra_blocks(denoiser), denoiser.patch_in]


class LosesTime(ToyAnatomy):
    def write(self, args: Any, tokens: Any, kept_BK: Any) -> Any:
        written = super().write(args, tokens, kept_BK)
        return (*written[:2], 0 * written[2], *written[3:])


class ForgetsPositionsOfKept(ToyAnatomy):
    def write(self, args: Any, tokens: Any, kept_BK: Any) -> Any:
        rope = tokens.sides[0][0]
        sides = tokens.sides if kept_BK is None else ((rope.flip(1), 1),)
        return super().write(args, BlockTokens(tokens.tokens_BND, sides, tokens.grid), kept_BK)


class WrongSides(ToyAnatomy):
    def read(self, args: Any) -> Any:
        tokens = super().read(args)
        return BlockTokens(tokens.tokens_BND, ((tokens.sides[0][0], 2),), tokens.grid)


class WrongGrid(ToyAnatomy):
    def read(self, args: Any) -> Any:
        tokens = super().read(args)
        assert tokens.grid is not None
        return BlockTokens(tokens.tokens_BND, tokens.sides, replace(tokens.grid, rows=tokens.grid.rows + 1))


class WrongToGrid(ToyAnatomy):
    def to_grid(self, tokens_BND: Any, args: Any) -> Any:
        return super().to_grid(tokens_BND, args).transpose(1, 2)


@pytest.mark.parametrize(
    ("anatomy", "match"),
    [
        (WrongOrder, "not the order of the forward"),
        (NoExtras, "that the anatomy does not list"),
        (UncalledExtra, "lists a block that the model does not call"),
        (LosesTime, "changes a block"),
        (ForgetsPositionsOfKept, "gathered by index, changes a block"),
        (WrongSides, "a side tensor has 2 entries for 12 tokens"),
        (WrongGrid, "does not have 12 tokens"),
        (WrongToGrid, r"to_grid\(\) has another shape"),
    ],
)
def test_anatomy(anatomy: type[ToyAnatomy], match: str, tmp_path: Path) -> None:
    refuses("test_anatomy", _card(lambda card: replace(card, anatomy=lambda run: anatomy())), tmp_path, match=match)


def _pipeline(pipeline: type[ToyPipeline]) -> type[ToyFamily]:
    class Mutant(ToyFamily):
        @hookimpl
        def load_model(self, run: Any, part: Any) -> Any:
            loaded = super().load_model(run, part)
            if part == "pipeline":
                return pipeline(loaded.codec, loaded.scheduler, wants_image=loaded.wants_image)
            return loaded

    return Mutant


class LoadsNothing(ToyPipeline):
    def load_adapter(self, denoiser: Any, path: Path) -> None: ...


class LoadsHalf(ToyPipeline):
    def load_adapter(self, denoiser: Any, path: Path) -> None:
        super().load_adapter(denoiser, path)
        with torch.no_grad():
            for name, value in denoiser.named_parameters():
                if "lora_B" in name:
                    value.mul_(0.5)


class FloatFrames(ToyPipeline):
    def sample(self, denoiser: Any, request: Any) -> Any:
        media = super().sample(denoiser, request)
        return media if request.latents_only else media / 255.0


class TooManyFrames(ToyPipeline):
    def sample(self, denoiser: Any, request: Any) -> Any:
        media = super().sample(denoiser, request)
        return media if request.latents_only else media.repeat(2, axis=0)


class BatchedLatents(ToyPipeline):
    def sample(self, denoiser: Any, request: Any) -> Any:
        media = super().sample(denoiser, request)
        return media[None] if request.latents_only else media


class NoSeed(ToyPipeline):
    def sample(self, denoiser: Any, request: Any) -> Any:
        return super().sample(denoiser, replace(request, seed=0))


class OwnSeed(ToyPipeline):
    draws = 0

    def sample(self, denoiser: Any, request: Any) -> Any:
        OwnSeed.draws += 1
        return super().sample(denoiser, replace(request, seed=OwnSeed.draws))


@pytest.mark.parametrize(
    ("name", "pipeline", "match"),
    [
        ("test_adapter_out_and_in", LoadsNothing, "the loaded adapter gives another prediction"),
        ("test_adapter_out_and_in", LoadsHalf, "the loaded adapter gives another prediction"),
        ("test_sampling", FloatFrames, r"sample\(\) gives float64"),
        ("test_sampling", TooManyFrames, r"sample\(\) gives shape \(18, 32, 32, 3\)"),
        ("test_sampling", BatchedLatents, r"latents have shape \(1, 8, 3, 4, 4\)"),
        ("test_sampling", NoSeed, "the seed has no effect"),
        ("test_sampling", OwnSeed, "two samples of one seed differ"),
    ],
)
def test_pipeline(name: str, pipeline: type[ToyPipeline], match: str, tmp_path: Path) -> None:
    refuses(name, _pipeline(pipeline), tmp_path, match=match)


def test_adapter_without_effect(tmp_path: Path) -> None:
    """Targets that the prediction does not depend on are noticed."""
    mutant = _predicts(lambda velocity, denoiser, step: step.noisy_BCFHW + 0 * velocity)
    refuses("test_adapter_out_and_in", mutant, tmp_path, match="the adapter has no effect on the prediction")
