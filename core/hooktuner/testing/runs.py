"""Runs, batches and steps made by the real hooks, so that a test of one hook is a few lines.

    plugins = make_plugins(ToyFamily(), MyTechnique())
    run = make_run(plugins, None, tmp_path, my_option=3)
    denoiser = load_denoiser(run, plugins)
    step = make_step(run, plugins, make_batch(run, plugins))
    velocity = plugins.predict(run, denoiser, step)

Everything is on the CPU in float32. `with closing(plugins), closing(run):` undoes what hooks did, where that matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hooktuner.assemble import assemble
from hooktuner.context import Run
from hooktuner.discovery import Plugin, find_plugin, installed_plugins, plugin_from_object
from hooktuner.draft import read_draft
from hooktuner.events import CachingFinished
from hooktuner.family import ModelCard, Part
from hooktuner.plugins import PluginSet
from hooktuner.randomness import generator
from hooktuner.step import Batch, Step
from hooktuner.technique import Clip
from hooktuner.testing.media import describe_clip, draw_clip
from hooktuner.train.kernel import draw
from hooktuner.train.precision import compute_dtype, weight_dtype


def make_plugins(*wanted: Any) -> PluginSet:
    """A plugin set from names of installed plugins, plugin objects and classes; one of them is a model family."""
    installed = installed_plugins() if any(isinstance(one, str) for one in wanted) else []
    return PluginSet.assemble([as_plugin(one, installed) for one in wanted])


def as_plugin(wanted: Any, installed: Sequence[Plugin] | None = None) -> Plugin:
    """The plugin of a name, an object or a class."""
    if isinstance(wanted, Plugin):
        return wanted
    if isinstance(wanted, str):
        return find_plugin(wanted, installed_plugins() if installed is None else installed)
    return plugin_from_object(wanted)


def make_run(plugins: PluginSet | Any, flavour: str | None, folder: Path, **config: Any) -> Run:
    """A run with everything that core would have set before the denoiser is loaded: config with the family's defaults,
    options of every plugin, card, built checkpoint, device (CPU), dtypes, anatomy.

    plugins: a `PluginSet`, or a family alone. flavour: None is the family's default. folder: where the run folder,
    the cache and the checkpoint go. `config`: keys of core and of the plugins, checked as those of a config file;
    `mixed_precision` is "no" where it is not given. Errors: as `hooktuner.run`'s, before anything is loaded.
    """
    owned = not isinstance(plugins, PluginSet)
    if owned:
        plugins = make_plugins(plugins)
    run = plan_run(plugins, flavour, folder, **config)
    assert run.card is not None
    if run.model_path is None and run.flavour.build is not None:
        run.model_path = folder / f"model-{run.flavour.name}"
        if not run.model_path.exists():
            run.model_path.mkdir(parents=True)
            run.flavour.build(run.model_path)
    run.anatomy = run.card.anatomy(run) if run.card.anatomy else None
    if owned:
        plugins.close()
    return run


def plan_run(plugins: PluginSet, flavour: str | None, folder: Path, **config: Any) -> Run:
    """The run of `make_run` before a checkpoint is built, for what the card and the config alone can answer."""
    values = {
        "model_family": plugins.family.name,
        "model_flavour": flavour,
        "mixed_precision": "no",
        "max_train_steps": 1,
        "output_dir": str(folder / "output"),
        "cache_dir": str(folder / "cache"),
        "data_backend_config": str(folder / "datasets.json"),  # not read
        **config,
    }
    wanted = [plugin.name if plugin.entry_point is not None else plugin.target for plugin in plugins.plugins]
    assembled = assemble(read_draft(values, plugins=wanted), with_datasets=False)
    assembled.plugins.close()
    run = assembled.run
    run.device = torch.device("cpu")
    run.weight_dtype, run.compute_dtype = weight_dtype(run.config), compute_dtype(run.config)
    return run


def load_denoiser(run: Run, plugins: PluginSet) -> nn.Module:
    """The denoiser on the run's device, in training mode, as the kernel gets it before an adapter is added."""
    return plugins.load_model(run, Part.DENOISER).to(run.device).train()


def smallest_clip(card: ModelCard, flavour: str) -> tuple[int, int, int]:
    """(frames, height, width) in pixels: three latent frames (one for images), twice the size multiple each way."""
    latents = card.latents_of(flavour)
    frames = 1 if card.media == "image" else latents.frames.floor(2 * latents.frames.stride + 1)
    return frames, 2 * latents.size_multiple, 2 * latents.size_multiple


def make_batch(
    run: Run,
    plugins: PluginSet,
    *,
    captions: Sequence[str] = (describe_clip(0), describe_clip(1)),
    pixels: tuple[int, int, int] | None = None,
    sigma: float | Sequence[float] | None = None,
    first_index: int = 0,
) -> Batch:
    """A batch as the loader would give it, through the real `encode_text`, `encode_latents` and `encode_features`.

    One sample per caption, each a different moving pattern. pixels: (frames, height, width); default `smallest_clip`.
    sigma: one value or one per sample; default: spread evenly inside (0, 1). Noise is a function of the run's seed and
    the sample's number, which counts from `first_index`.
    """
    assert run.card is not None, "make the run with make_run"
    assert run.device is not None, "make the run with make_run"
    count = len(captions)
    frames, height, width = pixels or smallest_clip(run.card, run.flavour.name)
    clips = [draw_clip(first_index + number, frames=frames, size=(width, height)) for number in range(count)]
    pixels_BCFHW = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        text = plugins.encode_text(run, plugins.load_model(run, Part.TEXT_ENCODER), captions)
        encoded = dict(plugins.encode_latents(run, plugins.load_model(run, Part.VAE), pixels_BCFHW.to(run.device)))
        latents = encoded.pop("latents").float()
        features = _features(run, plugins, clips, tuple(latents.shape[1:]))
    numbers = range(first_index, first_index + count)
    noise = [torch.randn(latents.shape[1:], generator=generator(run.config.seed, "noise", index)) for index in numbers]
    return Batch(
        keys=[f"test/clip-{index}" for index in numbers],
        index=list(numbers),
        latents_BCFHW=latents,
        noise_BCFHW=torch.stack(noise).to(latents.device),
        sigma_B=_sigma(sigma, count).to(latents.device),
        text=text,
        extras=encoded,
        features=features,
        pixels=(frames, height, width),
    )


def _features(run: Run, plugins: PluginSet, clips: Sequence[np.ndarray], shape: tuple[int, ...]) -> dict[str, Any]:
    if not plugins.has("encode_features"):
        return {}
    rate = run.config.frame_rate or 1.0
    found = [
        plugins.encode_features(run, Clip(f"test/clip-{number}", clip, rate, shape))  # type: ignore[arg-type]
        for number, clip in enumerate(clips)
    ]
    plugins.on_event(run, CachingFinished())
    return {name: torch.stack([features[name] for features in found]) for name in found[0]}


def _sigma(sigma: float | Sequence[float] | None, count: int) -> torch.Tensor:
    if sigma is None:
        sigma = [(position + 1) / (count + 1) for position in range(count)]
    values = [float(sigma)] * count if isinstance(sigma, int | float) else list(sigma)
    if len(values) != count:
        raise ValueError(f"{len(values)} values of sigma for {count} samples")
    return torch.tensor(values, dtype=torch.float32)


def make_step(
    run: Run,
    plugins: PluginSet,
    batch: Batch,
    *,
    sigma: float | Sequence[float] | None = None,
    number: int = 1,
    micro: int = 0,
) -> Step:
    """The step of a batch as `predict` receives it: noised input, target, and what the family's `condition` gives.

    sigma: overrides the batch's noise levels.
    """
    if sigma is not None:
        batch = replace(batch, sigma_B=_sigma(sigma, len(batch.index)).to(batch.sigma_B.device))
    return draw(run, plugins, batch, number=number, micro=micro)
