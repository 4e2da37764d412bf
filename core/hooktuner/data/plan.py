"""What a run trains on, decided before any model is loaded: each file's bucket, captions and views, or why it is
dropped. The plan is printed as tables and kept as `data.json` in the run folder.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooktuner.data.buckets import Bucket, CropPlan, Refusal, choose_frames, crop_plan, frames_at_rate, target_size
from hooktuner.data.captions import NO_CAPTION, read_captions
from hooktuner.data.datasets import default_frames
from hooktuner.data.entries import ImageDataset, MediaDataset, VideoDataset
from hooktuner.data.index import IndexedFile
from hooktuner.errors import DataError
from hooktuner.family import LatentSpec
from hooktuner.files import write_json
from hooktuner.randomness import uniform

if TYPE_CHECKING:
    from rich.console import Console

    from hooktuner.config import RunConfig

UNREADABLE = "unreadable"
_EXAMPLES = 3

_FIXES = (
    (UNREADABLE, "Encode the files anew, or take them out."),
    (NO_CAPTION, "Write the captions, or choose another caption_strategy."),
    ("too short", "Use longer clips, or lower num_frames, min_frames or frame_rate."),
    ("too long", "Cut the clips, or raise max_frames."),
)


@dataclass(frozen=True)
class PlannedClip:
    """A file that is trained: its bucket, its frame rate (None: the file's own), its alternative captions, and one
    crop for each view. `first_frame`: whether its first frame is given to the model."""

    dataset: MediaDataset
    row: IndexedFile
    bucket: Bucket
    frame_rate: float | None
    captions: tuple[str, ...]
    views: tuple[CropPlan, ...]
    first_frame: bool

    def key(self, view: int = 0) -> str:
        """`dataset/relative path [view k]`, for people."""
        return f"{self.dataset.id}/{self.row.path}" + (f" [view {view}]" if view else "")

    def source(self, view: int) -> dict[str, Any]:
        """All that the pixels of a view depend on: the identity of the file and the preprocessing."""
        return {
            "source": self.row.digest,
            "frames": self.bucket.frames,
            "frame_rate": self.frame_rate,
            "start": 0,
            "crop": asdict(self.views[view]),
        }


@dataclass(frozen=True)
class DroppedFile:
    """A file that is not trained, and why."""

    dataset: MediaDataset
    path: str
    refusal: Refusal


@dataclass(frozen=True)
class ValidationImage:
    """An image from which validation videos start, with its caption where it has one."""

    row: IndexedFile
    caption: str | None


@dataclass(frozen=True)
class DataPlan:
    """Everything of one run, in the order of the datasets and their paths."""

    datasets: tuple[MediaDataset, ...]
    clips: tuple[PlannedClip, ...]
    dropped: tuple[DroppedFile, ...]
    validation_images: tuple[ValidationImage, ...] = ()

    @property
    def samples(self) -> int:
        """Samples of one epoch: clips times their views."""
        return sum(len(clip.views) for clip in self.clips)

    def without(self, failures: Mapping[str, str]) -> DataPlan:
        """The plan without the clips whose `key()` is in `failures` (key → reason), which turned out to be
        unreadable."""
        gone = [clip for clip in self.clips if clip.key() in failures]
        dropped = [DroppedFile(c.dataset, c.row.path, Refusal(UNREADABLE, failures[c.key()])) for c in gone]
        kept = tuple(clip for clip in self.clips if clip.key() not in failures)
        return replace(self, clips=kept, dropped=(*self.dropped, *dropped))

    def check(self) -> None:
        """Errors: `DataError` for datasets of which nothing is left, saying what was dropped for which reason."""
        trained = {clip.dataset.id for clip in self.clips}
        empty = [dataset for dataset in self.datasets if dataset.id not in trained]
        if empty:
            raise DataError("\n".join(self._nothing_left(dataset) for dataset in empty))

    def _nothing_left(self, dataset: MediaDataset) -> str:
        at = f"{dataset.location} ({dataset.id}) — nothing is left to train on."
        dropped = [file for file in self.dropped if file.dataset.id == dataset.id]
        if not dropped:
            kind = "image" if isinstance(dataset, ImageDataset) else "video"
            where = f"There is no {kind} file in {dataset.instance_data_dir}."
            return f"{at} {where} Put files there, or disable the dataset."
        reasons = "; ".join(f"{len(files)} {why}: {_name(files)}" for why, files in _by_reason(dropped).items())
        fixes = [fix for start, fix in _FIXES if any(file.refusal.category.startswith(start) for file in dropped)]
        count = f"{len(dropped)} files" if len(dropped) > 1 else "one file"
        return f"{at} Dropped {count} of {dataset.instance_data_dir}: {reasons}. {' '.join(fixes)}"

    def buckets(self) -> list[tuple[str, Bucket, float | None, int, int]]:
        """(dataset, bucket, frame rate, clips, samples), sorted."""
        clips: Counter[tuple[str, Bucket, float | None]] = Counter()
        samples: Counter[tuple[str, Bucket, float | None]] = Counter()
        for clip in self.clips:
            place = (clip.dataset.id, clip.bucket, clip.frame_rate)
            clips[place] += 1
            samples[place] += len(clip.views)
        order = {dataset.id: number for number, dataset in enumerate(self.datasets)}
        places = sorted(clips, key=lambda place: (order[place[0]], place[1], place[2] or 0))
        return [(*place, clips[place], samples[place]) for place in places]

    def print(self, console: Console) -> None:
        """The tables: which clips went to which bucket, and which were dropped and why."""
        from rich.markup import escape
        from rich.table import Table

        table = Table("dataset", "bucket", "fps", "clips", "samples", title="Training data")
        for dataset, bucket, rate, clips, samples in self.buckets():
            table.add_row(escape(dataset), bucket.key, f"{rate:g}" if rate else "–", str(clips), str(samples))
        console.print(table)
        if self.dropped:
            table = Table("dataset", "reason", "files", "which", title="Dropped")
            for dataset in self.datasets:
                mine = [file for file in self.dropped if file.dataset.id == dataset.id]
                for why, files in _by_reason(mine).items():
                    table.add_row(escape(dataset.id), escape(why), str(len(files)), escape(_name(files)))
            console.print(table)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "samples": self.samples,
            "buckets": [
                {"dataset": dataset, "bucket": bucket.key, "frame_rate": rate, "clips": clips, "samples": samples}
                for dataset, bucket, rate, clips, samples in self.buckets()
            ],
            "clips": [
                {
                    "dataset": clip.dataset.id,
                    "path": clip.row.path,
                    "bucket": clip.bucket.key,
                    "views": len(clip.views),
                    "captions": len(clip.captions),
                }
                for clip in self.clips
            ],
            "dropped": [
                {
                    "dataset": file.dataset.id,
                    "path": file.path,
                    "reason": file.refusal.category,
                    "detail": file.refusal.detail,
                }
                for file in self.dropped
            ],
            "validation_images": [image.row.path for image in self.validation_images],
        }

    def write(self, path: Path) -> None:
        """Keep the plan as JSON; the file appears complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_json())


def _by_reason(dropped: Sequence[DroppedFile]) -> dict[str, list[DroppedFile]]:
    groups: dict[str, list[DroppedFile]] = defaultdict(list)
    for file in dropped:
        groups[file.refusal.category].append(file)
    return groups


def _name(files: Sequence[DroppedFile]) -> str:
    named = ", ".join(f"{file.path} ({file.refusal.detail})" for file in files[:_EXAMPLES])
    return named + (f" and {len(files) - _EXAMPLES} more" if len(files) > _EXAMPLES else "")


# ------------------------------------------------------------------------------------------------------ planning


def plan_file(
    row: IndexedFile, dataset: MediaDataset, config: RunConfig, latents: LatentSpec, *, given_first_frame: bool
) -> PlannedClip | DroppedFile:
    """Where one indexed file goes. `given_first_frame`: what the flavour does where the dataset does not say."""

    def drop(refusal: Refusal) -> DroppedFile:
        return DroppedFile(dataset, row.path, refusal)

    if row.info is None:
        return drop(Refusal(UNREADABLE, row.reason or "it cannot be decoded"))
    captions = read_captions(row.file, dataset, config)
    if isinstance(captions, Refusal):
        return drop(captions)
    rate = dataset.frame_rate(config) if isinstance(dataset, VideoDataset) else None
    frames = _frames(row, dataset, rate, latents)
    if isinstance(frames, Refusal):
        return drop(frames)
    resolution, kind = dataset.size(config)
    target = target_size(
        row.info.width,
        row.info.height,
        resolution=resolution,
        resolution_type=kind,
        multiple=latents.size_multiple,
        square=dataset.square,
    )
    source = int(row.digest[:15], 16)
    views = tuple(
        crop_plan(
            row.info.width,
            row.info.height,
            target,
            style=dataset.crop_style,
            draw=(uniform(config.seed, "crop-x", source, view), uniform(config.seed, "crop-y", source, view)),
        )
        for view in range(dataset.repeats + 1)
    )
    wants = isinstance(dataset, VideoDataset) and dataset.video.is_i2v is not False and given_first_frame
    # with one frame there would be nothing left to generate
    return PlannedClip(dataset, row, Bucket(*target, frames), rate, captions, views, first_frame=wants and frames > 1)


def _frames(row: IndexedFile, dataset: MediaDataset, rate: float | None, latents: LatentSpec) -> int | Refusal:
    if not isinstance(dataset, VideoDataset):
        return 1
    assert row.info is not None
    video = dataset.video
    available = frames_at_rate(row.info.duration, row.info.frame_rate, rate) if rate else row.info.frames
    wanted = video.num_frames
    if wanted is None and video.bucket_strategy == "aspect_ratio":
        wanted = default_frames(rate or row.info.frame_rate, latents, video.max_frames)
    frames = choose_frames(
        available,
        rule=latents.frames,
        num_frames=wanted,
        min_frames=video.min_frames,
        max_frames=video.max_frames,
        frame_interval=video.frame_interval,
    )
    if isinstance(frames, Refusal):
        return Refusal(frames.category, f"{frames.detail} at {rate or row.info.frame_rate:g} fps")
    return frames
