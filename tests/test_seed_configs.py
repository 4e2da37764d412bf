"""Every config, flag and value that users of Kandinsky 5 Video are told today is understood as it stands.

`seed_configs/kandinsky5_video/` holds the JSON blocks; what a block leaves open (how long, which data) is added here.
Keys of a technique are refused with the name of its plugin until that plugin is installed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hooktuner.assemble import Assembled, assemble
from hooktuner.discovery import installed_plugins
from hooktuner.draft import read_draft
from hooktuner.errors import ConfigError

BLOCKS = Path(__file__).parent / "seed_configs" / "kandinsky5_video"
TECHNIQUES = {"group_offload": "group-offload", "tread": "tread", "crepa": "crepa"}
FLAVOURS = (
    "t2v-lite-sft-5s",
    "t2v-lite-sft-10s",
    "t2v-lite-pretrain-5s",
    "t2v-lite-pretrain-10s",
    "t2v-pro-sft-5s-hd",
    "t2v-pro-sft-10s-hd",
    "t2v-pro-pretrain-5s-hd",
    "t2v-pro-pretrain-10s-hd",
    "i2v-lite-5s",
    "i2v-pro-sft-5s",
)


def block(name: str) -> Any:
    return json.loads((BLOCKS / f"{name}.json").read_text(encoding="utf-8"))


class Desk:
    """A working directory with the folders that the documents speak of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "datasets/videos").mkdir(parents=True)
        (folder / "datasets/images").mkdir()
        (folder / "config").mkdir()
        self.write_datasets(block("multidatabackend"))

    def write_datasets(self, entries: list[Any]) -> None:
        (self.folder / "config/multidatabackend.json").write_text(json.dumps(entries))

    def check(self, *parts: dict[str, Any], flags: Sequence[str] = (), plugins: Sequence[str] = ()) -> Assembled:
        whole: dict[str, Any] = {"data_backend_config": "config/multidatabackend.json", "max_train_steps": 100}
        for part in (block("settings"), *parts):
            whole |= part
        (self.folder / "config/config.json").write_text(json.dumps(whole))
        return assemble(read_draft("config/config.json", flags, plugins))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path)


def test_every_block_is_used() -> None:
    used = {"settings", "multidatabackend", "i2v_validation", *TECHNIQUES}
    assert {path.stem for path in BLOCKS.glob("*.json")} == used


@pytest.mark.parametrize("flavour", [*FLAVOURS, "tiny"])
def test_the_key_settings(desk: Desk, flavour: str) -> None:
    config = desk.check({"model_flavour": flavour}).run.config
    assert config.validation_sizes() == ((512, 768),)
    assert (config.validation_num_video_frames, config.validation_guidance, config.frame_rate) == (61, 5.0, 24.0)
    assert (config.model_type, config.train_batch_size, config.offload_during_startup) == ("lora", 1, True)


def test_defaults_are_what_the_documents_say(desk: Desk) -> None:
    run = desk.check({"model_flavour": None, "frame_rate": None, "validation_guidance": None}).run
    assert (run.flavour.name, run.config.frame_rate, run.config.validation_guidance) == ("t2v-lite-sft-5s", 24.0, 5.0)


@pytest.mark.parametrize("spelling", ["kandinsky5-video", "kandinsky5_video"])
@pytest.mark.parametrize("how", ["key", "plugin"])
def test_spellings_of_the_family(desk: Desk, spelling: str, how: str) -> None:
    family = {"model_family": spelling if how == "key" else None}
    found = desk.check(family, plugins=[spelling] if how == "plugin" else []).run
    assert found.config.model_family == "kandinsky5-video"


@pytest.mark.parametrize(
    ("resolution", "sizes"),
    [("512x768", (512, 768)), ("720x1280", (720, 1280)), ("480x854", (480, 848))],
)
def test_validation_resolutions(desk: Desk, resolution: str, sizes: tuple[int, int]) -> None:
    assert desk.check({"validation_resolution": resolution}).run.config.validation_sizes() == (sizes,)


@pytest.mark.parametrize("frames", [61, 49, 33])
def test_numbers_of_frames(desk: Desk, frames: int) -> None:
    entries = block("multidatabackend")
    entries[0]["video"] |= {"num_frames": frames, "min_frames": frames}
    desk.write_datasets(entries)
    desk.check(flags=["--validation_num_video_frames", str(frames)])


@pytest.mark.parametrize("frames", [60, 48, 62])
def test_numbers_of_frames_that_the_vae_cannot_encode(desk: Desk, frames: int) -> None:
    with pytest.raises(ConfigError, match=f"validation_num_video_frames — {frames} frames do not fit"):
        desk.check({"validation_num_video_frames": frames})


def test_the_dataset(desk: Desk) -> None:
    run = desk.check({"model_flavour": "tiny"}).run
    clips, text = run.datasets
    assert (clips.id, clips.caption_strategy, clips.resolution, clips.repeats) == (
        "my-video-dataset",
        "textfile",
        512,
        10,
    )
    assert (clips.video.num_frames, clips.video.min_frames, clips.video.bucket_strategy) == (61, 61, "aspect_ratio")
    assert (text.id, text.cache_dir) == ("text-embeds", "cache/text/kandinsky5")


def test_the_other_dataset_settings(desk: Desk) -> None:
    entries = block("multidatabackend")
    entries[0]["video"] = {
        "min_frames": 33,
        "max_frames": 121,
        "bucket_strategy": "resolution_frames",
        "frame_interval": 4,
    }
    desk.write_datasets(entries)
    assert desk.check().run.datasets[0].video.frame_interval == 4


@pytest.mark.parametrize("flavour", ["i2v-lite-5s", "i2v-pro-sft-5s", "tiny-i2v"])
@pytest.mark.parametrize("how", ["file", "flags"])
def test_images_for_validation(desk: Desk, flavour: str, how: str) -> None:
    image = {"id": "my-image-dataset", "type": "local", "dataset_type": "image", "instance_data_dir": "datasets/images"}
    desk.write_datasets([*block("multidatabackend"), image])
    keys = block("i2v_validation")
    flags = ["--validation_using_datasets=true", "--eval_dataset_id", "my-image-dataset"]
    run = desk.check(
        {"model_flavour": flavour, **(keys if how == "file" else {})}, flags=flags if how == "flags" else []
    ).run
    assert (run.config.validation_using_datasets, run.config.eval_dataset_id) == (True, "my-image-dataset")


@pytest.mark.parametrize("words", [["--vae_enable_patch_conv=true"], ["--vae_enable_patch_conv", "true"]])
def test_the_flag_for_a_large_vae(desk: Desk, words: list[str]) -> None:
    options = desk.check(flags=words).run.options["kandinsky5-video"]
    assert options.model_dump()["vae_enable_patch_conv"] is True


@pytest.mark.parametrize("name", TECHNIQUES)
def test_keys_of_techniques(desk: Desk, name: str) -> None:
    _check_technique(desk, TECHNIQUES[name], block(name), [])


@pytest.mark.parametrize("words", [["--enable_group_offload"], ["--enable_group_offload", "true"]])
def test_the_flag_for_offloading(desk: Desk, words: list[str]) -> None:
    _check_technique(desk, "group-offload", {"enable_group_offload": True}, words)


def _check_technique(desk: Desk, plugin: str, keys: dict[str, Any], words: list[str]) -> None:
    parts = [] if words else [keys]
    if plugin in {installed.name for installed in installed_plugins()}:
        assert plugin in desk.check(*parts, flags=words).plugins.lock()
        return
    with pytest.raises(ConfigError) as refused:
        desk.check(*parts, flags=words)
    assert str(refused.value).split("\n") == [
        f"{words[0] if words else f'config/config.json: {key}'} — this option belongs to the plugin {plugin}, which is "
        f"not installed. Install it with: pip install hooktuner-{plugin}"
        for key in keys
    ]
