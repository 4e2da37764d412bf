"""The entries of a datasets file as models: a key that is not a field here is refused.

Folders are relative to the working directory. Importing this module does not import torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from hooktuner.config import Flag, RunConfig

ResolutionType = Literal["pixel", "area", "pixel_area"]
CaptionStrategy = Literal["textfile", "filename", "instanceprompt"]
CropStyle = Literal["center", "random", "corner"]


class _Entry(BaseModel):
    """What every entry has. `location` says where it was written, for messages."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    _location: str = PrivateAttr(default="")

    id: str = Field(min_length=1, description="Name of the entry, unique in the file.")
    type: Literal["local"] = Field("local", description="Where the data is: `local` folders.")
    disabled: Flag = Field(False, description="Leave this entry out.")

    @property
    def location(self) -> str:
        """`datasets.json: [0]`, or the id for entries that were made by hand."""
        return self._location or self.id


class VideoSettings(BaseModel):
    """The nested `video` object: lengths are in frames at the frame rate of training, not of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    num_frames: int | None = Field(
        None, ge=1, description="Frames of a training clip: the first so many of each file. Default: 5 seconds with "
        "`aspect_ratio`, the file's own length with `resolution_frames`.",
    )  # fmt: skip
    min_frames: int | None = Field(None, ge=1, description="Drop files that are shorter.")
    max_frames: int | None = Field(
        None, ge=1, description="Drop files that are longer; where a clip takes the file's own length, cut there."
    )
    frame_rate: float | None = Field(
        None, gt=0, description="Frames per second to which files are resampled; default: the run's `frame_rate`."
    )
    bucket_strategy: Literal["aspect_ratio", "resolution_frames"] = Field(
        "aspect_ratio", description="`aspect_ratio`: all clips are equally long, and grouped by size. "
        "`resolution_frames`: grouped by size and length.",
    )  # fmt: skip
    frame_interval: int | None = Field(
        None, ge=1, description="With `resolution_frames`: lengths are rounded down to a multiple of this."
    )
    is_i2v: Flag | None = Field(
        None, description="Whether clips are trained with their first frame given; default: as the flavour samples. "
        "`false` trains them as text-to-video on an image-to-video flavour.",
    )  # fmt: skip


class MediaDataset(_Entry):
    """What video and image datasets have in common."""

    instance_data_dir: str = Field(min_length=1, description="Folder of the files, searched with its subfolders.")
    caption_strategy: CaptionStrategy | None = Field(
        None, description="`textfile`: the file of the same name ending in .txt, each line an alternative caption. "
        "`filename`: the file's name, underscores as spaces. `instanceprompt`: `instance_prompt` for all. Default: "
        "the run's `caption_strategy`, else `textfile`.",
    )  # fmt: skip
    instance_prompt: str | tuple[str, ...] | None = Field(
        None, description="The caption of `instanceprompt`, or several alternatives; see `prepend_instance_prompt`."
    )
    prepend_instance_prompt: Flag = Field(False, description="Put `instance_prompt` before each caption.")
    disable_multiline_split: Flag = Field(
        False, description="A caption file is one caption, not one alternative per line."
    )
    resolution: float | None = Field(
        None, gt=0, description="Size of clips in the unit of `resolution_type`; default: the run's."
    )
    resolution_type: ResolutionType | None = Field(
        None, description="`pixel`: shorter edge in pixels. `area`: megapixels. `pixel_area`: edge in pixels of a "
        "square of the same area. Default: the run's.",
    )  # fmt: skip
    crop: Flag = Field(
        False, description="Crop to `crop_aspect`. Without it clips keep their aspect ratio, up to the few pixels that "
        "the model's size multiple costs.",
    )  # fmt: skip
    crop_aspect: Literal["preserve", "square"] | None = Field(
        None, description="With `crop`: `square` (default), or `preserve` the aspect ratio."
    )
    crop_style: CropStyle = Field(
        "center", description="Which part remains: the `center`, the upper left `corner`, or `random` for each view."
    )
    repeats: int = Field(0, ge=0, description="How many more times an epoch shows each sample: n means n + 1 views.")
    cache_dir_vae: str | None = Field(
        None, description="Folder of this dataset's encoded clips; default: `latents` in the run's `cache_dir`."
    )

    @property
    def square(self) -> bool:
        """Whether clips are cropped to squares."""
        return self.crop and self.crop_aspect != "preserve"

    def size(self, config: RunConfig) -> tuple[float, ResolutionType]:
        """(resolution, resolution_type), the run's where the dataset has none of its own."""
        return self.resolution or config.resolution, self.resolution_type or config.resolution_type

    def captions_from(self, config: RunConfig) -> CaptionStrategy:
        """The caption strategy, the run's where the dataset has none of its own."""
        return self.caption_strategy or config.caption_strategy or "textfile"

    def is_validation_only(self, config: RunConfig) -> bool:
        """Whether the run takes first frames for validation from this dataset, and so does not train on it."""
        return bool(config.validation_using_datasets) and config.eval_dataset_id == self.id


class VideoDataset(MediaDataset):
    """A folder of video files."""

    dataset_type: Literal["video"] = Field("video", description="Video files.")
    video: VideoSettings = Field(
        default_factory=lambda: VideoSettings.model_validate({}), description="Lengths and frame rate."
    )

    def frame_rate(self, config: RunConfig) -> float | None:
        """Frames per second of training clips; None where every clip keeps its own."""
        return self.video.frame_rate or config.frame_rate


class ImageDataset(MediaDataset):
    """A folder of images: clips of one frame, or first frames for validation (`eval_dataset_id`)."""

    dataset_type: Literal["image"] = Field("image", description="Images.")


class TextEmbedsDataset(_Entry):
    """Where encoded captions are kept."""

    dataset_type: Literal["text_embeds"] = Field("text_embeds", description="Where encoded captions are kept.")
    default: Flag = Field(False, description="Use this entry; not needed where it is the only one.")
    cache_dir: str | None = Field(
        None, description="Folder of encoded captions; default: `text` in the run's `cache_dir`."
    )
    write_batch_size: int = Field(32, ge=1, description="How many captions are encoded, then written, at a time.")


Dataset = VideoDataset | ImageDataset | TextEmbedsDataset

KINDS: dict[str, type[VideoDataset] | type[ImageDataset] | type[TextEmbedsDataset]] = {
    "video": VideoDataset,
    "image": ImageDataset,
    "text_embeds": TextEmbedsDataset,
}
"""Dataset models by `dataset_type`."""
