"""From a folder to encoded samples: what is planned, said, encoded, and what is not done twice."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from hooktuner.data import PreparationStopped, build_caches, index_datasets
from hooktuner.data import encode as encode_module
from hooktuner.data.cache import Store
from hooktuner.errors import DataError, PluginError
from PIL import Image
from rich.console import Console


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


def said(console):
    return console.file.getvalue()


def entries_of(folder):
    return sorted(path for path in folder.rglob("*.safetensors"))


# ---------------------------------------------------------------------------------------------------------- plan


def test_the_plan_says_where_everything_went(make_run, entry, console):
    run = make_run([{**entry, "repeats": 2}])
    plan = index_datasets(run, console=console)
    assert [(clip.key(), clip.bucket.key, clip.captions) for clip in plan.clips] == [
        ("pets/a.mp4", "80x48@17", ("a red fox", "an animal")),
        ("pets/b.mp4", "80x48@17", ("a blue whale",)),
        ("pets/tall/c.mp4", "48x80@17", ("a tall tree",)),
    ]
    assert plan.samples == 9
    assert plan.clips[0].key(2) == "pets/a.mp4 [view 2]"
    kept = json.loads((run.output_dir / "data.json").read_text())
    assert kept["buckets"] == [
        {"dataset": "pets", "bucket": "48x80@17", "frame_rate": 24, "clips": 1, "samples": 3},
        {"dataset": "pets", "bucket": "80x48@17", "frame_rate": 24, "clips": 2, "samples": 6},
    ]
    dropped = {file["path"]: (file["reason"], file["detail"]) for file in kept["dropped"]}
    assert dropped["mute.mp4"] == ("no caption", "mute.txt is missing")
    assert dropped["short.mp4"] == ("too short (fewer than 17 frames)", "7 frames at 24 fps")
    assert dropped["broken.mp4"][0] == "unreadable"
    assert len(dropped) == 3
    printed = said(console)
    for words in ("48x80@17", "too short (fewer than 17 frames)", "short.mp4 (7 frames at 24 fps)", "no caption"):
        assert words in printed


def test_lengths_are_at_the_frame_rate_of_training(make_run, entry):
    entry["video"] = {"num_frames": 9, "frame_rate": 12}
    plan = index_datasets(make_run([entry]))
    assert {clip.frame_rate for clip in plan.clips} == {12}
    reasons = {file.path: file.refusal.detail for file in plan.dropped}
    assert reasons["short.mp4"] == "4 frames at 12 fps"  # 7 frames at 24


def test_resolution_frames_keeps_each_clips_length(make_run, entry, clips, make_clip):
    make_clip(clips / "long.mp4", frames=40, caption="long")
    entry["video"] = {"bucket_strategy": "resolution_frames", "frame_interval": 10, "min_frames": 8}
    plan = index_datasets(make_run([entry]))
    assert {clip.row.path: clip.bucket.frames for clip in plan.clips} == {
        "a.mp4": 17, "b.mp4": 17, "tall/c.mp4": 17, "long.mp4": 37,
    }  # fmt: skip
    entry["video"]["max_frames"] = 30
    assert {clip.bucket.frames for clip in index_datasets(make_run([entry])).clips} == {17, 29}


def test_nothing_left_says_what_was_dropped_and_why(make_run, entry):
    entry["video"] = {"num_frames": 61, "frame_rate": 24}
    run = make_run([entry])
    with pytest.raises(DataError) as caught:
        index_datasets(run)
    message = str(caught.value)
    assert message.startswith(
        f"data_backend_config: [0] (pets) — nothing is left to train on. Dropped 6 files of "
        f"{entry['instance_data_dir']}: 4 too short (fewer than 61 frames): a.mp4 (24 frames at 24 fps), b.mp4 "
        "(24 frames at 24 fps), short.mp4 (7 frames at 24 fps) and 1 more; 1 unreadable: broken.mp4 ("
    )
    assert "; 1 no caption: mute.mp4 (mute.txt is missing). Encode the files anew, or take them out. " in message
    assert message.endswith("Use longer clips, or lower num_frames, min_frames or frame_rate.")
    assert (run.output_dir / "data.json").exists()  # kept all the same


def test_an_empty_folder_says_so(make_run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no video")
    nothing = {"id": "none", "dataset_type": "video", "instance_data_dir": str(tmp_path / "empty")}
    with pytest.raises(DataError, match=r"\(none\) — nothing is left to train on\. There is no video file in .*empty"):
        index_datasets(make_run([nothing]))


def test_first_frames_are_given_as_flavour_and_dataset_say(make_run, entry, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "still.png")
    (tmp_path / "still.txt").write_text("a still")
    still = {"id": "stills", "dataset_type": "image", "instance_data_dir": str(tmp_path)}
    free = {**entry, "id": "free", "video": {**entry["video"], "is_i2v": False}}

    def given(flavour):
        plan = index_datasets(make_run([entry, free, still], flavour=flavour))
        return {clip.dataset.id: clip.first_frame for clip in plan.clips}

    assert given("i2v") == {"pets": True, "free": False, "stills": False}
    assert given("t2v") == {"pets": False, "free": False, "stills": False}
    entry["video"] = {"num_frames": 1}
    assert given("i2v")["pets"] is False  # nothing would be left to generate


def test_clips_that_differ_in_one_thing_have_other_sources(make_run, entry):
    def source(**video):
        (clip, *_) = index_datasets(make_run([{**entry, "video": {"num_frames": 9, "frame_rate": 24, **video}}])).clips
        return clip.source(0)

    assert source() == source()
    for changed in ({"frame_rate": 12}, {"num_frames": 5}):
        assert source(**changed) != source()


def test_random_crops_differ_by_view_and_are_repeatable(make_run, entry):
    entry |= {"crop": True, "crop_style": "random", "repeats": 7}
    views = [clip.views for clip in index_datasets(make_run([entry])).clips]
    assert len({view.left for view in views[0]}) > 2
    assert all((view.width, view.height) == (64, 64) for view in views[0])
    assert [clip.views for clip in index_datasets(make_run([entry])).clips] == views
    assert [clip.views for clip in index_datasets(make_run([entry], seed=7)).clips] != views


# ------------------------------------------------------------------------------------------------------- caching


def prepare(run, plugins, prompts=(), **how):
    return build_caches(run, plugins, index_datasets(run), prompts, **how)


def test_text_comes_first_then_vae_one_at_a_time_and_once(make_run, entry, toy_plugins):
    plugins = toy_plugins()
    data = prepare(make_run([{**entry, "repeats": 3}]), plugins, ["a prompt", "a red fox"])
    assert plugins.loaded == ["text_encoder", "vae"]
    assert plugins.most_alive == 1
    assert plugins.alive() == 0
    assert sorted(plugins.captions) == ["", "a blue whale", "a prompt", "a red fox", "a tall tree", "an animal"]
    # four views of a clip with a center crop are one entry
    assert sorted(plugins.clip_calls) == [(1, 3, 17, 48, 80), (1, 3, 17, 48, 80), (1, 3, 17, 80, 48)]
    assert len(data.loader().samples) == 12
    assert data.text("a prompt")["text_LD"].shape == (9, 2)
    with pytest.raises(DataError, match="'unknown' — this prompt was not encoded before training"):
        data.text("unknown")


def test_nothing_is_loaded_where_nothing_is_missing(make_run, entry, toy_plugins):
    prepare(make_run([entry]), toy_plugins())
    again = toy_plugins()
    prepare(make_run([entry]), again)
    assert again.loaded == []


@pytest.mark.parametrize(
    ("change", "loads"),
    [
        ({"resolution": 96}, ["vae"]),
        ({"video": {"num_frames": 13, "frame_rate": 24}}, ["vae"]),
        ({"video": {"num_frames": 9, "frame_rate": 12}}, ["vae"]),
        ({"crop": True}, ["vae"]),
        ({"crop": True, "crop_style": "corner"}, ["vae"]),
        ({"disable_multiline_split": True}, ["text_encoder"]),
        ({"repeats": 4}, []),
        ({"id": "other"}, []),
    ],
    ids=str,
)
def test_a_changed_setting_makes_new_entries_of_what_it_changes(make_run, entry, toy_plugins, change, loads):
    prepare(make_run([entry]), toy_plugins())
    old = entries_of(make_run([entry]).output_dir.parent / "cache")
    plugins = toy_plugins()
    run = make_run([{**entry, **change}])
    prepare(run, plugins)
    assert plugins.loaded == loads
    new = entries_of(run.output_dir.parent / "cache")
    assert set(old) <= set(new)
    assert (len(new) > len(old)) == bool(loads)


def test_a_replaced_clip_is_encoded_anew_and_a_renamed_one_is_not(make_run, entry, toy_plugins, clips, make_clip):
    prepare(make_run([entry]), toy_plugins())
    (clips / "a.mp4").rename(clips / "z.mp4")
    (clips / "a.txt").rename(clips / "z.txt")
    make_clip(clips / "b.mp4", offset=9)
    plugins = toy_plugins()
    prepare(make_run([entry]), plugins)
    assert len(plugins.clip_calls) == 1


def test_batches_are_of_one_bucket(make_run, entry, toy_plugins):
    plugins = toy_plugins()
    data = prepare(make_run([entry], vae_batch_size=2), plugins)
    assert sorted(plugins.clip_calls) == [(1, 3, 17, 80, 48), (2, 3, 17, 48, 80)]
    alone = prepare(make_run([entry], cache_dir=str(data.run.output_dir / "c2")), toy_plugins())
    for key, path in data.latents.items():
        assert path.read_bytes() == alone.latents[key].read_bytes()


def test_captions_are_written_batch_by_batch(make_run, entry, toy_plugins):
    plugins = toy_plugins()
    prepare(make_run([entry, {"id": "t", "dataset_type": "text_embeds", "write_batch_size": 2}]), plugins)
    assert plugins.text_calls == [2, 2, 1]


def test_folders_of_entries(make_run, entry, toy_plugins, tmp_path):
    text = {"id": "t", "dataset_type": "text_embeds", "cache_dir": str(tmp_path / "own-text")}
    run = make_run([{**entry, "cache_dir_vae": str(tmp_path / "own-vae")}, text])
    prepare(run, toy_plugins(with_features=True))
    assert len(entries_of(tmp_path / "own-text")) == 5
    assert len(entries_of(tmp_path / "own-vae")) == 3
    assert {path.relative_to(tmp_path / "cache").parts[0] for path in entries_of(tmp_path / "cache")} == {"features"}
    prepare(make_run([entry], cache_dir=str(tmp_path / "all")), toy_plugins())
    assert (len(entries_of(tmp_path / "all" / "text")), len(entries_of(tmp_path / "all" / "latents"))) == (5, 3)


def test_pixels_are_those_of_the_clip(make_run, entry, toy_plugins):
    data = prepare(make_run([entry]), toy_plugins())
    latents = Store.load(Store(data.latents["pets/a.mp4"].parents[1]), data.latents["pets/a.mp4"].stem)["latents"]
    levels = (latents.float().mean(dim=(0, 2, 3)) + 1) * 127.5  # frames 0, 4, 8, 12, 16
    assert levels.tolist() == pytest.approx([16 + 8 * k for k in (0, 4, 8, 12, 16)], abs=2)


def test_features_come_last_and_know_the_clip(make_run, entry, toy_plugins):
    plugins = toy_plugins(with_features=True)
    data = prepare(make_run([entry]), plugins)
    assert plugins.clips == ["pets/tall/c.mp4", "pets/a.mp4", "pets/b.mp4"]
    batch = data.loader().batch(0)
    assert batch.features["teacher/mean"].shape == (1, 17)
    again = toy_plugins(with_features=True)
    prepare(make_run([entry]), again)
    assert again.clips == []


def test_a_clip_that_breaks_late_is_named_counted_and_skipped(make_run, entry, toy_plugins, monkeypatch, console):
    genuine = encode_module.read_clip

    def read_clip(path, **how):
        if path.name == "b.mp4":
            raise encode_module.UnreadableError("the frame at 0.50 s is damaged")
        return genuine(path, **how)

    monkeypatch.setattr(encode_module, "read_clip", read_clip)
    run = make_run([entry], vae_batch_size=2)
    data = prepare(run, toy_plugins(with_features=True), console=console)
    assert [sample.key for sample in data.loader().samples] == ["pets/a.mp4", "pets/tall/c.mp4"]
    assert "One clip turns out to be unreadable and will be skipped:" in said(console)
    assert "pets/b.mp4: the frame at 0.50 s is damaged" in said(console)
    kept = json.loads((run.output_dir / "data.json").read_text())
    assert kept["dropped"][-1] == {
        "dataset": "pets", "path": "b.mp4", "reason": "unreadable", "detail": "the frame at 0.50 s is damaged",
    }  # fmt: skip


def test_a_clip_that_breaks_after_its_latents_is_skipped_too(make_run, entry, toy_plugins, monkeypatch):
    prepare(make_run([entry]), toy_plugins())
    genuine = encode_module.read_clip

    def read_clip(path, **how):
        if path.name == "b.mp4":
            raise encode_module.UnreadableError("damaged")
        return genuine(path, **how)

    monkeypatch.setattr(encode_module, "read_clip", read_clip)
    data = prepare(make_run([entry]), toy_plugins(with_features=True))
    assert [sample.key for sample in data.loader().samples] == ["pets/a.mp4", "pets/tall/c.mp4"]
    assert data.loader().batch(0).features


def test_every_copy_of_a_clip_that_breaks_late_is_skipped(make_run, entry, toy_plugins, monkeypatch, clips):
    (clips / "copy.mp4").write_bytes((clips / "b.mp4").read_bytes())
    (clips / "copy.txt").write_text("a copy")

    def read_clip(path, **how):
        raise encode_module.UnreadableError("damaged")

    monkeypatch.setattr(encode_module, "read_clip", read_clip)
    with pytest.raises(DataError, match=r"nothing is left to train on\. Dropped 7 files .* 5 unreadable"):
        prepare(make_run([entry]), toy_plugins())


def test_values_that_are_not_finite_are_refused_by_name(make_run, entry, toy_plugins, tmp_path):
    with pytest.raises(DataError, match=r"^the caption 'a tall tree' — its encoded 'text_LD' has values that are not"):
        prepare(make_run([entry]), toy_plugins(bad="a tall tree"))
    bad_level = (16 + 8 * 3) / 127.5 - 1  # the first frame of b.mp4 and the fourth of the others, which is not kept
    with pytest.raises(DataError, match=r"^pets/b.mp4 — its encoded 'latents' has values that are not finite\."):
        prepare(make_run([entry]), toy_plugins(bad=bad_level))


def test_latents_of_another_shape_than_the_cards_are_the_plugins_fault(make_run, entry, toy_plugins):
    class Short(toy_plugins):
        def encode_latents(self, run, vae, pixels_BCFHW):
            return {"latents": super().encode_latents(run, vae, pixels_BCFHW)["latents"][:, :, :-1]}

    with pytest.raises(PluginError, match=r"toy — encode_latents answered 'latents' of shape \(1, 3, 4, 10, 6\)"):
        prepare(make_run([entry]), Short())


@pytest.mark.parametrize("allowed", range(7))  # before each batch of captions and each clip
def test_an_interrupted_run_goes_on_where_it_was(make_run, entry, toy_plugins, allowed):
    asked = []

    def stop():
        asked.append(None)
        return len(asked) > allowed

    first, second, whole = toy_plugins(), toy_plugins(), toy_plugins()
    text = {"id": "t", "dataset_type": "text_embeds", "write_batch_size": 2}
    plan = index_datasets(make_run([entry, text]))
    with pytest.raises(PreparationStopped, match=r"What is done is kept: run it again to go on\.$") as stopped:
        build_caches(make_run([entry, text]), first, plan, stop=stop)
    assert stopped.value.exit_code == 130
    assert first.alive() == 0
    build_caches(make_run([entry, text]), second, plan)
    build_caches(make_run([entry, text], cache_dir=str(plan.clips[0].row.root / "other")), whole, plan)
    assert sorted(first.captions + second.captions) == sorted(whole.captions)
    # a clip that was encoded when the stop came is not lost
    assert sorted(first.clip_calls + second.clip_calls) == sorted(whole.clip_calls)


# ------------------------------------------------------------------------------------------- validation's images


def test_first_frames_of_training_clips(make_run, entry, toy_plugins, numbers):
    data = prepare(make_run([entry], flavour="i2v"), toy_plugins())
    (image, caption), (other, _) = data.first_frames(None, 2)
    assert (image.size, caption) == ((80, 48), "a red fox")
    assert numbers(np.stack([np.asarray(image), np.asarray(other)])) == [0, 3]
    assert data.first_frames("pets", 1, (32, 96))[0][0].size == (32, 96)
    with pytest.raises(DataError, match=r"nobody — there is no dataset with this id to take frames from\. Known:"):
        data.first_frames("nobody", 1)


def test_first_frames_of_an_image_dataset(make_run, entry, toy_plugins, tmp_path):
    folder = tmp_path / "stills"
    folder.mkdir()
    Image.new("RGB", (100, 50), (10, 200, 30)).save(folder / "green.png")
    Image.new("RGB", (40, 40), (10, 20, 30)).save(folder / "mute.png")
    (folder / "green.txt").write_text("a green field")
    stills = {"id": "stills", "dataset_type": "image", "instance_data_dir": str(folder)}
    run = make_run([entry, stills], validation_using_datasets=True, eval_dataset_id="stills")
    data = prepare(run, toy_plugins())
    assert {sample.key.partition("/")[0] for sample in data.loader().samples} == {"pets"}
    (green, caption), (_, none) = data.first_frames("stills", 5)
    assert (green.size, green.getpixel((0, 0)), caption, none) == ((100, 50), (10, 200, 30), "a green field", None)
    assert data.text("a green field")["text_LD"].shape[0] == 14
    assert data.first_frames(None, 1, (48, 48))[0][0].size == (48, 48)
    (folder / "green.png").unlink()
    (folder / "mute.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"there is no readable image in .*stills, and validation_using_datasets needs"):
        index_datasets(run)


def test_images_train_as_clips_of_one_frame(make_run, toy_plugins, tmp_path):
    Image.new("RGB", (100, 50), (10, 200, 30)).save(tmp_path / "green.png")
    (tmp_path / "green.txt").write_text("a green field")
    stills = {"id": "stills", "dataset_type": "image", "instance_data_dir": str(tmp_path), "crop": True}
    plugins = toy_plugins()
    data = prepare(make_run([stills]), plugins)
    assert plugins.clip_calls == [(1, 3, 1, 64, 64)]
    batch = data.loader().batch(0)
    assert batch.pixels == (1, 64, 64)
    colour = (batch.latents_BCFHW.mean(dim=(0, 2, 3, 4)) + 1) * 127.5
    assert torch.allclose(colour, torch.tensor([10.0, 200.0, 30.0]), atol=1)
