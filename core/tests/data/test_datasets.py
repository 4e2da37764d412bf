from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from hooktuner.config import RunConfig
from hooktuner.data.datasets import conditioning_problems, default_frames, frame_problems, read_datasets
from hooktuner.data.entries import ImageDataset, TextEmbedsDataset, VideoDataset
from hooktuner.family import Flavour, FrameRule, LatentSpec

CONFIG = RunConfig.model_validate({})
SPEC = LatentSpec(16, 8, FrameRule(4, 121))


@pytest.fixture
def video(tmp_path):
    """A minimal video entry with changes; `video` changes the nested object."""

    def make(video=None, **changes):
        nested = {} if video is None else {"video": video}
        return {"id": "v", "dataset_type": "video", "instance_data_dir": str(tmp_path), **nested, **changes}

    return make


def told(entries, config=CONFIG):
    return [str(problem) for problem in read_datasets(entries, config)[1]]


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """The datasets file of the quickstarts, written as it stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets" / "videos").mkdir(parents=True)
    path = tmp_path / "multidatabackend.json"
    path.write_text(
        """[
  {"id": "my-video-dataset", "type": "local", "dataset_type": "video", "instance_data_dir": "datasets/videos",
   "caption_strategy": "textfile", "resolution": 512,
   "video": {"num_frames": 61, "min_frames": 61, "frame_rate": 24, "bucket_strategy": "aspect_ratio"},
   "repeats": 10},
  {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": true,
   "cache_dir": "cache/text/model", "disabled": false}
]"""
    )
    return path


def test_the_documented_file_is_read(documented):
    datasets, problems = read_datasets(documented, CONFIG)
    assert problems == []
    video, text = datasets
    assert isinstance(video, VideoDataset)
    assert isinstance(text, TextEmbedsDataset)
    assert (video.repeats, video.resolution, video.video.num_frames, video.video.frame_rate) == (10, 512, 61, 24)
    assert video.location == "multidatabackend.json: [0]"
    assert (text.default, text.cache_dir) == (True, "cache/text/model")
    assert frame_problems(datasets, SPEC, CONFIG) == []


def test_every_problem_is_told_at_once(tmp_path):
    path = tmp_path / "datasets.json"
    path.write_text(
        json.dumps(
            [
                {"id": "a", "dataset_type": "video", "instance_data_dir": str(tmp_path), "video": {"num_frame": 61}},
                {"id": "b", "dataset_type": "vido"},
                {"id": "c", "dataset_type": "image", "instance_data_dir": str(tmp_path / "no"), "crop": "maybe"},
                {"id": "d", "dataset_type": "image", "instance_data_dir": str(tmp_path / "no")},
                "e",
            ]
        )
    )
    datasets, problems = read_datasets(path, CONFIG)
    text = "\n".join(map(str, problems))
    assert 'datasets.json: [0].video.num_frame — unknown option. Did you mean "num_frames"?' in text
    assert 'datasets.json: [1].dataset_type — unknown dataset type "vido". Did you mean "video"?' in text
    assert 'datasets.json: [2].crop — must be true or false, not "maybe".' in text
    assert re.search(r"datasets.json: \[3\].instance_data_dir — .*/no: there is no such folder\. Paths are", text)
    assert "datasets.json: [4] — an entry is a JSON object, not a string." in text
    assert "[2].instance_data_dir" in text  # a wrong value hides no other mistake of its entry
    assert len(problems) == 6
    assert [dataset.id for dataset in datasets] == ["a", "c", "d"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", r"datasets.json: line 1, column 3 — this is not JSON: .* Correct it there or just before\."),
        ('{"id": 1}', r"datasets.json — a datasets file is a JSON list of entries, not an object\. Write \[ … \]"),
        (b"\xff\xfe[", r"datasets.json — the datasets file is not UTF-8 text\. Save it as UTF-8\."),
        (None, r".*datasets.json — the datasets file cannot be read: No such file or directory\. Check `data_backend"),
        ("[]", r"datasets.json — there is nothing to train on: no enabled entry of dataset_type"),
    ],
)
def test_a_file_that_is_no_list(tmp_path, content, message):
    path = tmp_path / "datasets.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    datasets, problems = read_datasets(path, CONFIG)
    assert datasets == ()
    assert re.match(message, str(problems[0]))
    assert len(problems) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 61}, '[0].num_frames — unknown option. It belongs into "video": {"num_frames": …}.'),
        ({"video": {"repeats": 1}}, '[0].video.repeats — unknown option. It belongs one level up, beside "video".'),
        ({"strength": 1}, "[0].strength — unknown option. Known: id, type, disabled, instance_data_dir,"),
        ({"type": "aws"}, '[0].type — must be one of local, not "aws".'),
        ({"resolution": True}, "[0].resolution — true is not possible here."),
        ({"video": {"num_frames": True}}, "[0].video.num_frames — true is not possible here."),
        ({"repeats": -1}, "[0].repeats — must be at least 0, not -1."),
        ({"crop_aspect": "square"}, '[0].crop_aspect — it has no effect without crop. Set "crop": true, or remove it.'),
        ({"instance_prompt": "x"}, '[0].instance_prompt — it has no effect with caption_strategy "textfile".'),
        ({"caption_strategy": "instanceprompt"}, "[0].instance_prompt — missing, and caption_strategy"),
        ({"prepend_instance_prompt": "true"}, "[0].instance_prompt — missing, and prepend_instance_prompt needs it."),
        (
            {"caption_strategy": "instanceprompt", "instance_prompt": "x", "prepend_instance_prompt": True},
            "[0].prepend_instance_prompt — the caption is the instance prompt already. Remove it.",
        ),
        (
            {"caption_strategy": "filename", "disable_multiline_split": True},
            '[0].disable_multiline_split — it has no effect with caption_strategy "filename". Remove it.',
        ),
        (
            {"video": {"num_frames": 61, "max_frames": 49}},
            "[0].video.num_frames — 61 is more than max_frames (49), so no clip is left. Lower num_frames or",
        ),
        ({"video": {"min_frames": 50, "max_frames": 49}}, "[0].video.min_frames — 50 is more than max_frames (49)"),
        (
            {"video": {"frame_interval": 8}},
            '[0].video.frame_interval — it has no effect with bucket_strategy "aspect_ratio".',
        ),
        (
            {"video": {"frame_interval": 8, "num_frames": 9, "bucket_strategy": "resolution_frames"}},
            "[0].video.frame_interval — it has no effect where num_frames fixes the length. Remove one of the two.",
        ),
    ],
)
def test_what_cannot_work_is_refused(video, changes, message):
    problems = told([video(**changes)])
    assert len(problems) == 1
    assert problems[0].startswith(f"data_backend_config: {message}")


def test_flags_may_be_strings(video):
    datasets, problems = read_datasets([video(disabled="false", crop="true"), video(id="w", disabled="true")], CONFIG)
    assert problems == []
    assert [dataset.disabled for dataset in datasets] == [False, True]
    assert datasets[0].square


def test_disabled_entries_are_not_checked_further(video, tmp_path):
    gone = video(id="gone", instance_data_dir=str(tmp_path / "no"), disabled=True, video={"num_frames": 60})
    datasets, problems = read_datasets([video(video={"num_frames": 61}), gone], CONFIG)
    assert problems == []
    assert frame_problems(datasets, SPEC, CONFIG) == []


def test_ids_and_text_entries(video):
    texts = [{"id": name, "dataset_type": "text_embeds", "default": True} for name in ("s", "t")]
    assert told([video(), *texts]) == [
        'data_backend_config: [2].default — a run uses one text_embeds entry, and "s", "t" compete. '
        'Leave "default": true to one of them.'
    ]
    undecided = [{**text, "default": False} for text in texts]
    assert 'Set "default": true on one of them.' in told([video(), *undecided])[0]
    assert told([video(), {**texts[0], "default": False}]) == []
    assert told([video(), video()]) == [
        'data_backend_config: [1].id — "v" is also the id of [0]. Give one of them another id.'
    ]
    assert "there is nothing to train on" in told([texts[0], video(disabled=True)])[0]


def test_eval_dataset_id(video, tmp_path):
    images = {"id": "faces", "dataset_type": "image", "instance_data_dir": str(tmp_path)}
    wanted = RunConfig.model_validate({"eval_dataset_id": "face", "validation_using_datasets": True})
    assert told([video(), images], wanted) == [
        'eval_dataset_id — data_backend_config has no enabled image dataset with the id "face". Did you mean "faces"?'
    ]
    right = RunConfig.model_validate({"eval_dataset_id": "faces", "validation_using_datasets": True})
    assert told([video(), images], right) == []
    # what validates is not trained on
    assert "there is nothing to train on" in told([images], right)[0]
    idle = RunConfig.model_validate({"eval_dataset_id": "faces"})
    assert told([video(), images], idle) == [
        "eval_dataset_id — it has no effect without validation_using_datasets. Set validation_using_datasets to true, "
        "or remove it."
    ]


def test_illegal_lengths_name_the_nearest_legal_ones(video):
    datasets, _ = read_datasets([video(video={"num_frames": 60}), video(id="w", video={"num_frames": 61})], CONFIG)
    assert [str(problem) for problem in frame_problems(datasets, SPEC, CONFIG)] == [
        "data_backend_config: [0].video.num_frames — 60 frames do not fit: the number must be 4k+1; the nearest are "
        "57 or 61."
    ]


def test_a_length_must_follow_from_something(video):
    datasets, _ = read_datasets([video()], CONFIG)
    assert "[0].video.num_frames — missing, and neither" in str(frame_problems(datasets, SPEC, CONFIG)[0])
    assert frame_problems(datasets, SPEC, CONFIG.model_copy(update={"frame_rate": 24})) == []
    datasets, _ = read_datasets([video(video={"bucket_strategy": "resolution_frames", "min_frames": 130})], CONFIG)
    assert "[0].video.min_frames — 130 is more than the model can train at once (121)" in str(
        frame_problems(datasets, SPEC, CONFIG)[0]
    )


def test_default_length_is_five_seconds():
    assert default_frames(24, SPEC) == 121
    assert default_frames(16, LatentSpec(16, 8, FrameRule(8))) == 81
    assert default_frames(24, SPEC, max_frames=100) == 97


def test_is_i2v_needs_a_flavour_with_a_first_frame(video):
    datasets, _ = read_datasets([video(video={"is_i2v": "true"}), video(id="w", video={"is_i2v": False})], CONFIG)
    assert [str(problem) for problem in conditioning_problems(datasets, Flavour("t2v", "text to video"))] == [
        'data_backend_config: [0].video.is_i2v — flavour "t2v" is not conditioned on a first frame. Choose an '
        "image-to-video flavour, or remove it."
    ]
    assert conditioning_problems(datasets, Flavour("i2v", "", conditioning=frozenset({"first_frame"}))) == []


def test_run_defaults_apply_where_the_dataset_is_silent(video):
    config = RunConfig.model_validate(
        {"resolution": 0.25, "resolution_type": "area", "caption_strategy": "filename", "frame_rate": 16}
    )
    (silent, loud), _ = read_datasets(
        [video(), video(id="w", resolution=480, resolution_type="pixel", video={"frame_rate": 24})], config
    )
    assert isinstance(silent, VideoDataset)
    assert isinstance(loud, VideoDataset)
    assert (silent.size(config), silent.captions_from(config), silent.frame_rate(config)) == (
        (0.25, "area"), "filename", 16,
    )  # fmt: skip
    assert (loud.size(config), loud.frame_rate(config)) == ((480, "pixel"), 24)
    assert silent.captions_from(CONFIG) == "textfile"


def test_every_key_is_described():
    for model in (VideoDataset, ImageDataset, TextEmbedsDataset):
        assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_reading_does_not_import_torch():
    code = "import sys, hooktuner.data.datasets; sys.exit(any(m in sys.modules for m in ('torch', 'av', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_key_does_not_hide_the_other_mistakes_of_its_entry(video):
    found = told([video(oops=1, instance_data_dir="nowhere"), video()])
    text = "\n".join(found)
    assert "[0].oops" in text
    assert "nowhere" in text
    assert "id" in text and '"v"' in text  # noqa: PT018  # the second entry has the same id
    settings, _ = read_datasets([video(oops=1, video={"num_frames": 10})], CONFIG)
    assert frame_problems(settings, SPEC, CONFIG)  # the frame rule is checked in the same report
