"""Rooms 4 to 6 of a run behind one door: `index_datasets`, then `build_caches`, then batches.

plan = index_datasets(run, console=console)                      # no model: scan, decide, print, data.json
data = build_caches(run, plugins, plan, prompts, console=console)   # encoders, one at a time
for batch in data.loader().stream(range(first, last)): ...
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooktuner.data.buckets import crop_plan
from hooktuner.data.cache import CacheKey, EncodingPlugins, Recipe, Store
from hooktuner.data.captions import read_captions
from hooktuner.data.entries import ImageDataset, MediaDataset, TextEmbedsDataset
from hooktuner.data.index import MediaIndex
from hooktuner.data.media import is_image, is_video, open_image, read_clip, resize_image
from hooktuner.data.plan import DataPlan, DroppedFile, PlannedClip, ValidationImage, plan_file
from hooktuner.errors import DataError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from rich.console import Console

    from hooktuner.config import RunConfig
    from hooktuner.context import Run
    from hooktuner.data.encode import EncodingJob, Stop
    from hooktuner.data.loader import Loader

PLAN_FILE = "data.json"
"""Where the plan is kept in the run folder."""


def cache_folder(config: RunConfig) -> Path:
    """Where the index and the caches are: `cache_dir`, or `cache` beside the run folder."""
    return Path(config.cache_dir) if config.cache_dir else Path(config.output_dir).parent / "cache"


# ------------------------------------------------------------------------------------------------------ indexing


def index_datasets(run: Run, *, console: Console | None = None, stop: Stop | None = None) -> DataPlan:
    """Scan the folders of `run.datasets` and decide what happens to every file; loads no model.

    Prints the tables where a console is given, and writes `data.json` into the run folder.
    Errors: `DataError` where nothing of a dataset is left; `PreparationStopped`.
    """
    assert run.card is not None
    config = run.config
    latents = run.card.latents_of(run.flavour.name)
    index = MediaIndex(cache_folder(config) / "index.sqlite")
    clips: list[PlannedClip] = []
    dropped: list[DroppedFile] = []
    images: list[ValidationImage] = []
    trained: list[MediaDataset] = []
    for dataset in run.datasets:
        if dataset.disabled or not isinstance(dataset, MediaDataset):
            continue
        wanted = is_image if isinstance(dataset, ImageDataset) else is_video
        rows = index.scan(Path(dataset.instance_data_dir), wanted, console=console, stop=stop).files
        if dataset.is_validation_only(config):
            for row in rows:
                captions = read_captions(row.file, dataset, config)
                caption = captions[0] if isinstance(captions, tuple) else None
                if row.info is not None:
                    images.append(ValidationImage(row, caption))
            if not images:
                raise DataError(
                    f"{dataset.location} ({dataset.id}) — there is no readable image in {dataset.instance_data_dir}, "
                    "and validation_using_datasets needs one. Put images there, or choose another eval_dataset_id."
                )
            continue
        trained.append(dataset)
        for row in rows:
            placed = plan_file(
                row, dataset, config, latents, given_first_frame="first_frame" in run.flavour.conditioning
            )
            if isinstance(placed, PlannedClip):
                clips.append(placed)
            else:
                dropped.append(placed)
    plan = DataPlan(tuple(trained), tuple(clips), tuple(dropped), tuple(images))
    _publish(plan, run, console)
    return plan


def _publish(plan: DataPlan, run: Run, console: Console | None) -> None:
    if console is not None:
        plan.print(console)
    plan.write(run.output_dir / PLAN_FILE)
    plan.check()


# ------------------------------------------------------------------------------------------------------- caching


@dataclass(frozen=True)
class TrainingData:
    """Everything encoded. `plan` is what is really trained, without clips that turned out to be unreadable."""

    run: Run
    plan: DataPlan
    texts: Store
    text_keys: dict[str, CacheKey]
    latents: dict[str, Path]
    """Cache entries of latents by `clip.key(view)`."""
    features: dict[str, Path]
    """Cache entries of features by `clip.key(view)`; empty where no plugin wants any."""

    def loader(self) -> Loader:
        """A loader of all samples; pinned memory where the run is on a CUDA device."""
        from hooktuner.data.loader import Loader, Sample

        conditioned = "first_frame" in self.run.flavour.conditioning
        samples = [
            Sample(
                key=clip.key(view),
                bucket=clip.bucket,
                latents=self.latents[clip.key(view)],
                captions=tuple(self.texts.path(self.text_keys[caption]) for caption in clip.captions),
                features=self.features.get(clip.key(view)),
                first_frame=clip.first_frame if conditioned else None,
            )
            for clip in self.plan.clips
            for view in range(len(clip.views))
        ]
        pin = self.run.device is not None and self.run.device.type == "cuda"
        return Loader(samples, self.run.config, empty_caption=self.texts.path(self.text_keys[""]), pin_memory=pin)

    def text(self, prompt: str) -> dict[str, torch.Tensor]:
        """The encoded caption or prompt, on the CPU: one of the prompts given to `build_caches`, a training or
        validation caption, or ""."""
        if prompt not in self.text_keys:
            raise DataError(f"{prompt!r} — this prompt was not encoded before training. Name it when caches are built.")
        return self.texts.load(self.text_keys[prompt])

    def first_frames(
        self, dataset_id: str | None, count: int, size: tuple[int, int] | None = None
    ) -> list[tuple[Image.Image, str | None]]:
        """Up to `count` (image, caption) from which image-to-video validation starts.

        They come from the dataset `dataset_id`: from its images, or from the first frames of its clips; without it
        from the validation images where there are any, else from the training clips. size: (width, height) in pixels;
        images are resized to cover it and cropped at the center; None leaves images as they are, and clips at their
        bucket's size. A caption is None where an image has none.
        """
        found: list[tuple[Image.Image, str | None]] = []
        if self.plan.validation_images and dataset_id in (None, self.run.config.eval_dataset_id):
            found = [(open_image(image.row.file), image.caption) for image in self.plan.validation_images[:count]]
        else:
            clips = [clip for clip in self.plan.clips if dataset_id in (None, clip.dataset.id)]
            if not clips:
                known = ", ".join(f'"{dataset.id}"' for dataset in self.plan.datasets)
                raise DataError(f"{dataset_id} — there is no dataset with this id to take frames from. Known: {known}.")
            found = [(_first_frame(clip), clip.captions[0]) for clip in clips[:count]]
        if size is None:
            return found
        return [(resize_image(image, crop_plan(*image.size, size)), caption) for image, caption in found]


def _first_frame(clip: PlannedClip) -> Image.Image:
    from PIL import Image

    if is_image(clip.row.file):
        return resize_image(open_image(clip.row.file), clip.views[0])
    return Image.fromarray(read_clip(clip.row.file, frames=1, frame_rate=None, plan=clip.views[0])[0])


def build_caches(
    run: Run,
    plugins: EncodingPlugins,
    plan: DataPlan,
    prompts: Iterable[str] = (),
    *,
    console: Console | None = None,
    stop: Stop | None = None,
) -> TrainingData:
    """Encode what is not yet on disk: captions and `prompts` (validation prompts, negative prompt) with the text
    encoder, then clips with the VAE, then what plugins want. `run.device` and the dtypes must be set.

    Clips that cannot be decoded after all are named, dropped from the plan, and `data.json` is written again. The
    caller tells plugins `CachingFinished`.
    Errors: `DataError` where nothing of a dataset is left, or for encodings that are not finite;
    `PreparationStopped` once `stop` answers True.
    """
    from hooktuner.data.encode import clip_jobs, encode_captions, encode_clips, encode_features

    folder = cache_folder(run.config)
    entry = _text_entry(run.datasets)
    texts = Store(Path(entry.cache_dir) if entry.cache_dir else folder / "text")
    captions = dict.fromkeys(caption for clip in plan.clips for caption in clip.captions)
    captions.update(dict.fromkeys(image.caption for image in plan.validation_images if image.caption is not None))
    captions.update(dict.fromkeys(["", *prompts]))

    def latent_store(clip: PlannedClip) -> Store:
        own = clip.dataset.cache_dir_vae
        return Store(Path(own) if own else folder / "latents")

    latent_jobs = clip_jobs(plan.clips, Recipe.of("latents", run, plugins), latent_store)
    feature_jobs: list[EncodingJob] = []
    if plugins.has("encode_features"):
        feature_jobs = clip_jobs(plan.clips, Recipe.of("features", run, plugins), lambda _: Store(folder / "features"))
    stores = {texts.folder: texts} | {job.store.folder: job.store for job in (*latent_jobs, *feature_jobs)}
    for store in stores.values():
        store.sweep()

    text_keys = encode_captions(
        run, plugins, captions, texts, batch_size=entry.write_batch_size, console=console, stop=stop
    )
    failures = encode_clips(run, plugins, latent_jobs, console=console, stop=stop)
    if feature_jobs:
        alive = [job for job in feature_jobs if job.clip.key() not in failures]
        failures |= encode_features(run, plugins, alive, console=console, stop=stop)
    if failures:
        if console is not None:
            names = "\n".join(f"  {clip}: {reason}" for clip, reason in failures.items())
            count = "One clip turns" if len(failures) == 1 else f"{len(failures)} clips turn"
            console.print(f"{count} out to be unreadable and will be skipped:\n{names}", markup=False)
        plan = plan.without(failures)
        _publish(plan, run, console)
    return TrainingData(
        run,
        plan,
        texts,
        text_keys,
        latents=_entries(latent_jobs),
        features=_entries(feature_jobs),
    )


def _entries(jobs: Sequence[EncodingJob]) -> dict[str, Path]:
    return {job.name: job.store.path(job.key) for job in jobs}


def _text_entry(datasets: Sequence[Any]) -> TextEmbedsDataset:
    """The text_embeds entry that counts, or one with every default."""
    entries = [entry for entry in datasets if isinstance(entry, TextEmbedsDataset) and not entry.disabled]
    chosen = [entry for entry in entries if entry.default] or entries
    return chosen[0] if chosen else TextEmbedsDataset.model_validate({"id": "text"})
