"""The part of `PluginConformance` that holds a model family to its contract, on its tiny flavour.

Every check goes through the plugin's real hooks on a small checkpoint that the flavour builds offline.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from hooktuner import flow
from hooktuner.config import RunConfig
from hooktuner.context import Run
from hooktuner.discovery import Plugin
from hooktuner.family import Anatomy, BlockTokens, ModelCard, Part, SampleRequest
from hooktuner.plugins import PluginSet
from hooktuner.step import Batch, Step
from hooktuner.testing.media import draw_clip
from hooktuner.testing.runs import load_denoiser, make_batch, make_plugins, make_run, make_step, smallest_clip
from hooktuner.train.adapters import ADAPTER, export, prepare_trainables

CAPTIONS = ("a dog", "two small dogs run over wet grass towards the sea while the sun goes down")
"""Two captions of clearly unequal length."""


@dataclass
class Bench:
    """A family on its tiny flavour, ready for its hooks."""

    plugins: PluginSet
    run: Run
    card: ModelCard

    def batch(self, *captions: str, **settings: Any) -> Batch:
        """A batch of these captions (default: `CAPTIONS`)."""
        return make_batch(self.run, self.plugins, captions=captions or CAPTIONS, **settings)

    def step(self, batch: Batch) -> Step:
        """The step of a batch."""
        return make_step(self.run, self.plugins, batch)

    def denoiser(self) -> nn.Module:
        """A fresh denoiser without dropout."""
        return load_denoiser(self.run, self.plugins).eval()

    def predict(self, denoiser: nn.Module, step: Step) -> Tensor:
        """The prediction without gradients."""
        with torch.no_grad():
            return self.plugins.predict(self.run, denoiser, step)


class FamilyChecks:
    """Checks of a model family; skipped for techniques."""

    tiny_flavour: ClassVar[str | None] = "tiny"
    """The family's flavour that is built offline; None: its default flavour."""
    tolerance: ClassVar[float] = 1e-4
    """How far results may differ that are mathematically equal but computed in another order, as a share of the
    largest value."""

    def _plugin(self) -> Plugin:
        raise NotImplementedError

    def test_card_is_complete(self, tmp_path: Path) -> None:
        """Every flavour has a source, the default one exists, and defaults are valid values of config keys of core."""
        with self._bench(tmp_path) as bench:
            card = bench.card
            assert card.name == bench.plugins.family.name, f"the card is called {card.name!r}, not as the plugin is"
            assert card.default_flavour in card.flavours, f"the default flavour {card.default_flavour!r} does not exist"
            for name, flavour in card.flavours.items():
                assert flavour.name == name, f"the flavour {flavour.name!r} is listed as {name!r}"
                sources = (flavour.repository is not None) + (flavour.build is not None)
                assert sources == 1, f"the flavour {name!r} must have a repository or a build function, and not both"
                assert flavour.summary.strip(), f"the flavour {name!r} has no summary"
                unknown = sorted(set(card.defaults_of(name)) - set(RunConfig.model_fields))
                assert not unknown, f"the defaults of {name!r} name {', '.join(unknown)}, which core does not know"
                RunConfig.model_validate(card.defaults_of(name))
            offered = sorted(card.offers & {"blocks", "token_routing", "frames"})
            assert card.anatomy or not offered, f"the card offers {', '.join(offered)} without an anatomy"

    def test_lora_targets_match(self, tmp_path: Path) -> None:
        """`lora_targets` matches modules of the denoiser, and only layers that can have an adapter."""
        with self._bench(tmp_path) as bench:
            modules = dict(bench.denoiser().named_modules())
            matched = {name: one for name, one in modules.items() if re.fullmatch(bench.card.lora_targets, name)}
            assert matched, f"lora_targets {bench.card.lora_targets!r} matches no module of the denoiser"
            kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
            wrong = [f"{name} ({type(one).__name__})" for name, one in matched.items() if not isinstance(one, kinds)]
            assert not wrong, f"lora_targets matches {', '.join(wrong)}, which cannot have an adapter"

    def test_encoded_text(self, tmp_path: Path) -> None:
        """Captions become finite tensors without batch axis, each what it is when encoded alone, "" included."""
        with self._bench(tmp_path) as bench, torch.no_grad():
            encoder = bench.plugins.load_model(bench.run, Part.TEXT_ENCODER)
            captions = [*CAPTIONS, ""]
            together = bench.plugins.encode_text(bench.run, encoder, captions)
            for caption, entry in zip(captions, together, strict=True):
                alone = bench.plugins.encode_text(bench.run, encoder, [caption])[0]
                assert entry.keys() == alone.keys(), f"{caption!r}: the tensors have other names when encoded alone"
                for name, tensor in entry.items():
                    assert isinstance(tensor, Tensor), f"{name} of {caption!r} is a {type(tensor).__name__}"
                    assert tensor.shape == alone[name].shape, (
                        f"{name} of {caption!r} has shape {tuple(tensor.shape)} in a batch and "
                        f"{tuple(alone[name].shape)} alone: return valid tokens only, without a batch axis"
                    )
                    assert torch.isfinite(tensor.float()).all(), f"{name} of {caption!r} is not finite"
                    assert self._close(tensor, alone[name]), f"{name} of {caption!r} depends on the other captions"
            same = [_equal(tensor, together[1][name]) for name, tensor in together[0].items()]
            assert not all(same), "two different captions have equal tensors"

    def test_encoded_latents(self, tmp_path: Path) -> None:
        """Latents have the shape that the card promises, and whatever else is encoded has a batch axis."""
        with self._bench(tmp_path) as bench:
            frames, height, width = smallest_clip(bench.card, bench.run.flavour.name)
            batch = bench.batch(pixels=(frames, height, 2 * width))
            wanted = (2, *bench.card.latents_of(bench.run.flavour.name).shape(frames, height, 2 * width))
            assert tuple(batch.latents_BCFHW.shape) == wanted, (
                f"encode_latents gives {tuple(batch.latents_BCFHW.shape)}; the card's latents say {wanted}"
            )
            assert torch.isfinite(batch.latents_BCFHW).all(), "latents are not finite"
            assert not torch.equal(*batch.latents_BCFHW), "two different clips have equal latents"
            for name, tensor in batch.extras.items():
                assert tensor.shape[0] == 2, f"{name} has shape {tuple(tensor.shape)}: its first axis must be the batch"

    def test_prediction(self, tmp_path: Path) -> None:
        """The prediction is a finite float tensor of the target's shape with gradients in the denoiser."""
        with self._bench(tmp_path) as bench:
            step, denoiser = bench.step(bench.batch()), bench.denoiser()
            prediction = bench.plugins.predict(bench.run, denoiser, step)
            assert prediction.shape == step.target_BCFHW.shape, f"the prediction has shape {tuple(prediction.shape)}"
            assert prediction.is_floating_point(), f"the prediction has dtype {prediction.dtype}"
            assert torch.isfinite(prediction).all(), "the prediction is not finite"
            prediction.float().square().mean().backward()
            norms = [one.grad.float().norm() for one in denoiser.parameters() if one.grad is not None]
            assert any(norm > 0 for norm in norms), "the prediction has no gradient in the denoiser"

    def test_true_velocity_has_no_loss(self, tmp_path: Path) -> None:
        """The loss is 0 at the true velocity, whatever stands where latents are given, and positive elsewhere."""
        with self._bench(tmp_path) as bench:
            step = bench.step(bench.batch())
            step.prediction_BCFHW = step.target_BCFHW.clone()
            if step.conditioning is not None:
                given = step.conditioning.given_B1FHW
                step.prediction_BCFHW = torch.where(given, torch.full_like(step.target_BCFHW, 7.0), step.target_BCFHW)
            assert self._loss(bench, step).abs().max() == 0, "the loss is not 0 at the true velocity"
            step.prediction_BCFHW = -step.target_BCFHW
            assert self._loss(bench, step).min() > 0, "the loss is 0 at a wrong velocity"

    def test_captions_are_independent(self, tmp_path: Path) -> None:
        """A batch of captions of unequal length gives each sample what it gets alone."""
        with self._bench(tmp_path) as bench:
            batch, denoiser = bench.batch(), bench.denoiser()
            together = bench.predict(denoiser, bench.step(batch))
            for position in range(len(CAPTIONS)):
                alone = bench.predict(denoiser, bench.step(_only(batch, position)))
                assert self._close(together[position], alone[0]), (
                    f"the prediction for {CAPTIONS[position]!r} depends on the other caption of the batch: mask padding"
                )
            other = replace(batch, text=list(reversed(batch.text)))
            assert not torch.equal(bench.predict(denoiser, bench.step(other)), together), "captions have no effect"

    def test_prediction_is_a_function(self, tmp_path: Path) -> None:
        """The same step gives the same prediction bit for bit, and torch's global random stream is left alone."""
        with self._bench(tmp_path) as bench:
            batch, denoiser = bench.batch(), bench.denoiser()
            before = torch.get_rng_state()
            first = bench.predict(denoiser, bench.step(batch))
            assert torch.equal(torch.get_rng_state(), before), "predict or condition draws from the global stream"
            assert torch.equal(first, bench.predict(denoiser, bench.step(batch))), "two equal steps differ"

    def test_checkpointing_changes_nothing(self, tmp_path: Path) -> None:
        """Gradients are equal bit for bit with and without gradient checkpointing."""
        with self._bench(tmp_path) as bench:
            denoiser = bench.denoiser()
            if not getattr(denoiser, "_supports_gradient_checkpointing", False):
                pytest.skip("the denoiser has no gradient checkpointing")
            step = bench.step(bench.batch())
            plain = _gradients(bench, denoiser, step)
            denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
            recomputed = _gradients(bench, denoiser, step)
            differing = [name for name, value in plain.items() if not torch.equal(value, recomputed[name])]
            assert not differing, f"checkpointing changes the gradients of {', '.join(differing[:3])}"

    def test_anatomy(self, tmp_path: Path) -> None:
        """The anatomy lists the blocks that the model calls, in order, and keeping every token changes nothing."""
        with self._bench(tmp_path) as bench:
            if bench.card.anatomy is None:
                pytest.skip("the family has no anatomy")
            anatomy: Anatomy = bench.card.anatomy(bench.run)
            denoiser = bench.denoiser()
            step = bench.step(bench.batch())
            probe = _AnatomyProbe(anatomy, denoiser, step)
            denoiser.enable_gradient_checkpointing(probe)  # type: ignore[operator]
            through = bench.plugins.predict(bench.run, denoiser, step)
            denoiser.disable_gradient_checkpointing()  # type: ignore[operator]
            main = [id(block) for block in anatomy.blocks(denoiser)]
            extra = {id(block) for block in anatomy.extra_blocks(denoiser)}
            assert main, "the anatomy lists no blocks"
            called = [one for one in probe.called if one in set(main)]
            # A family may call the denoiser several times in a step, e.g. once per caption length.
            assert called, "the model calls none of the blocks that the anatomy lists"
            assert called == main * (len(called) // len(main)), "blocks() is not the order of the forward"
            strangers = [one for one in probe.called if one not in extra and one not in set(main)]
            assert not strangers, "the model calls blocks through checkpointing that the anatomy does not list"
            assert extra <= set(probe.called), "extra_blocks() lists a block that the model does not call"
            assert torch.equal(through, bench.plugins.predict(bench.run, denoiser, step)), (
                "reading the tokens and writing all of them back changes the prediction"
            )

    def test_adapter_out_and_in(self, tmp_path: Path) -> None:
        """An exported adapter loads through the sampling pipeline and gives the prediction it had in training."""
        with self._bench(tmp_path) as bench:
            step, trained = bench.step(bench.batch()), bench.denoiser()
            base = bench.predict(trained, step)
            prepare_trainables(bench.run, trained)
            stream = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, value in trained.named_parameters():
                    if f".lora_B.{ADAPTER}" in name:
                        value.copy_(0.1 * torch.randn(value.shape, generator=stream))
            wanted = bench.predict(trained, step)
            assert not self._close(wanted, base), "the adapter has no effect on the prediction"
            (tmp_path / "adapter").mkdir()
            path = export(bench.run, trained, tmp_path / "adapter")[0]
            fresh = bench.denoiser()
            bench.plugins.load_model(bench.run, Part.PIPELINE).load_adapter(fresh, path)
            assert self._close(bench.predict(fresh, step), wanted), "the loaded adapter gives another prediction"

    def test_sampling(self, tmp_path: Path) -> None:
        """The pipeline samples uint8 frames of the wanted size, or latents, and the same for the same seed."""
        with self._bench(tmp_path) as bench:
            frames, height, width = smallest_clip(bench.card, bench.run.flavour.name)
            batch = bench.batch(CAPTIONS[0], "")
            pipeline, denoiser = bench.plugins.load_model(bench.run, Part.PIPELINE), bench.denoiser()
            image = None
            if "first_frame" in bench.run.flavour.conditioning:
                from PIL import Image

                image = Image.fromarray(draw_clip(0, frames=1, size=(width, height))[0])
            request = SampleRequest(
                prompt=batch.text[0], negative=batch.text[1], width=width, height=height, frames=frames,
                steps=2, guidance=2.0, seed=3, image=image,
            )  # fmt: skip
            with torch.no_grad():
                media = pipeline.sample(denoiser, request)
                latents = pipeline.sample(denoiser, replace(request, latents_only=True))
                again = pipeline.sample(denoiser, replace(request, latents_only=True))
                other = pipeline.sample(denoiser, replace(request, latents_only=True, seed=4))
            assert str(media.dtype) == "uint8", f"sample() gives {media.dtype}; it must be uint8"
            assert media.shape == (frames, height, width, 3), f"sample() gives shape {media.shape}"
            shape = bench.card.latents_of(bench.run.flavour.name).shape(frames, height, width)
            assert tuple(latents.shape) == shape, f"latents have shape {tuple(latents.shape)}; the card says {shape}"
            assert torch.equal(latents, again), "two samples of one seed differ"
            assert not torch.equal(latents, other), "the seed has no effect"

    # --------------------------------------------------------------------------------------------------- helpers

    @contextmanager
    def _bench(self, folder: Path) -> Iterator[Bench]:
        plugin = self._plugin()
        if not plugin.is_family:
            pytest.skip("the plugin is not a model family")
        plugins = make_plugins(plugin)
        try:
            run = make_run(plugins, self.tiny_flavour, folder, **getattr(self, "options", {}))
            assert run.card is not None
            yield Bench(plugins, run, run.card)
            run.close()
        finally:
            plugins.close()

    def _loss(self, bench: Bench, step: Step) -> Tensor:
        loss_B = bench.plugins.compute_loss(bench.run, step)
        if loss_B is None:
            assert step.prediction_BCFHW is not None
            loss_B = flow.mean_squared_error(step.prediction_BCFHW, step.target_BCFHW, step.weight_B1FHW)
        return loss_B

    def _close(self, one: Tensor, other: Tensor) -> bool:
        one, other = one.detach().float(), other.detach().float()
        largest = max(float(other.abs().max()), 1e-6)
        return float((one - other).abs().max()) <= self.tolerance * largest


class _AnatomyProbe:
    """A checkpointing function that reads and writes the tokens of every main block."""

    def __init__(self, anatomy: Anatomy, denoiser: nn.Module, step: Step) -> None:
        self.anatomy = anatomy
        self.step = step
        self.main = {id(block) for block in anatomy.blocks(denoiser)}
        self.called: list[int] = []

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        self.called.append(id(block))
        if id(block) not in self.main:
            return block(*args)
        tokens = self.anatomy.read(args)
        batch, count, _ = tokens.tokens_BND.shape
        for side, axis in tokens.sides:
            assert side.shape[axis] == count, f"a side tensor has {side.shape[axis]} entries for {count} tokens"
            assert side.shape[0] in (1, batch), f"a side tensor has {side.shape[0]} entries for {batch} samples"
        if tokens.grid is not None:
            grid = tokens.grid
            assert grid.frames * grid.rows * grid.columns == count, f"{grid} does not have {count} tokens"
            by_frame = self.anatomy.to_grid(tokens.tokens_BND, args)
            assert by_frame.shape[:3] == (batch, grid.frames, grid.rows * grid.columns), "to_grid() has another shape"
        keepable = self.anatomy.keepable(args, self.step)
        if keepable.must_keep_BN is not None:
            must = keepable.must_keep_BN
            assert must.dtype == torch.bool, "must_keep_BN is not boolean"
            assert must.shape[1] == count, f"must_keep_BN has {must.shape[1]} entries for {count} tokens"
        written = self.anatomy.write(args, _copied(tokens), None)
        assert len(written) == len(args), "write() gives another number of arguments"
        if keepable.unit == "any":
            kept_BK = torch.arange(count).expand(batch, count)
            kept = self.anatomy.write(args, _gathered(tokens, kept_BK), kept_BK)
            assert torch.equal(block(*kept), block(*args)), "writing all tokens, gathered by index, changes a block"
        return block(*written)


def _copied(tokens: BlockTokens) -> BlockTokens:
    return replace(tokens, tokens_BND=tokens.tokens_BND.clone(), sides=tuple((s.clone(), a) for s, a in tokens.sides))


def _gathered(tokens: BlockTokens, kept_BK: Tensor) -> BlockTokens:
    """The tokens and sides at `kept_BK`, as a technique that routes tokens takes them."""
    batch = kept_BK.shape[0]

    def take(tensor: Tensor, axis: int) -> Tensor:
        tensor = tensor.expand(batch, *tensor.shape[1:])
        shape = [1] * tensor.ndim
        shape[0], shape[axis] = batch, kept_BK.shape[1]
        index = kept_BK.reshape(shape).expand(*tensor.shape[:axis], kept_BK.shape[1], *tensor.shape[axis + 1 :])
        return tensor.gather(axis, index)

    sides = tuple((take(side, axis), axis) for side, axis in tokens.sides)
    return BlockTokens(take(tokens.tokens_BND, 1), sides, None)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _gradients(bench: Bench, denoiser: nn.Module, step: Step) -> dict[str, Tensor]:
    denoiser.zero_grad()
    prediction = bench.plugins.predict(bench.run, denoiser, step)
    flow.mean_squared_error(prediction, step.target_BCFHW, step.weight_B1FHW).mean().backward()
    return {name: one.grad.clone() for name, one in denoiser.named_parameters() if one.grad is not None}


def _only(batch: Batch, position: int) -> Batch:
    """One sample of a batch."""
    keep = slice(position, position + 1)
    return replace(
        batch,
        keys=batch.keys[keep],
        index=batch.index[keep],
        latents_BCFHW=batch.latents_BCFHW[keep],
        noise_BCFHW=batch.noise_BCFHW[keep],
        sigma_B=batch.sigma_B[keep],
        text=batch.text[keep],
        extras={name: tensor[keep] for name, tensor in batch.extras.items()},
        features={name: tensor[keep] for name, tensor in batch.features.items()},
    )
