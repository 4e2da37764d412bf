"""Rooms 2 and 3: a draft becomes a frozen run, or one report of everything that is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hooktuner import hookimpl
from hooktuner.assemble import Assembled, assemble, build_model_source, resolved
from hooktuner.draft import read_draft
from hooktuner.errors import ConfigError, HooktunerError, ModelError, PluginError
from pydantic import ValidationError

WriteConfig = Callable[..., str]


def assembled(source: Any, flags: Sequence[str] = (), plugins: Sequence[Any] = ()) -> Assembled:
    return assemble(read_draft(source, flags, plugins))


def refusal(source: Any, flags: Sequence[str] = (), plugins: Sequence[Any] = ()) -> list[str]:
    """Every line of the report."""
    with pytest.raises(HooktunerError) as refused:
        assembled(source, flags, plugins)
    return str(refused.value).split("\n")


@pytest.fixture(autouse=True)
def _films(shelf: Any, project: Path) -> None:
    shelf.family()


# ----------------------------------------------------------------------------------------------- what comes out


def test_a_complete_run(write_config: WriteConfig) -> None:
    result = assembled(write_config(films_margin="4"), ["--lora_rank", "8"])
    run = result.run
    assert run.card is not None
    assert run.card.name == "films"
    assert (run.config.model_flavour, run.config.lora_rank, run.config.max_train_steps) == ("small", 8, 10)
    assert run.options["films"].model_dump() == {"films_tiling": False, "films_margin": 4}
    assert [dataset.id for dataset in run.datasets] == ["clips", "text"]
    assert run.model_path == "owner/small"
    assert result.origins["lora_rank"] == "flag"
    assert result.origins["max_train_steps"] == "config.json"
    assert result.origins["frame_rate"] == "default of films"
    assert result.origins["seed"] == "default"
    assert result.origins["films_margin"] == "config.json"
    assert result.origins["films_tiling"] == "default"
    with pytest.raises(ValidationError):
        run.config.seed = 3  # type: ignore[misc]


def test_the_family_fills_in_what_is_left_out(write_config: WriteConfig) -> None:
    config = assembled(write_config()).run.config
    assert config.frame_rate == 24
    assert config.flow_schedule_shift == 3  # the flavour's, over the card's 5
    assert config.validation_resolution == "512x768"
    assert config.validation_negative_prompt == ""
    mine = assembled(write_config(flow_schedule_shift=7, validation_negative_prompt="blurry")).run.config
    assert (mine.flow_schedule_shift, mine.validation_negative_prompt) == (7, "blurry")


def test_the_resolved_config_read_again_is_the_same(write_config: WriteConfig, shelf: Any) -> None:
    shelf.technique("zebra")
    shelf.technique("ant")
    keys = {"zebra_weight": 2, "ant_enabled": "true", "validation_resolution": "480x854", "framerate": "24"}
    first = assembled(write_config(**keys), plugins=["zebra", "films_old"])
    flat = resolved(first.run)
    assert json.loads(json.dumps(flat)) == flat
    assert flat["plugins"] == ["zebra", "ant"]
    again = assembled(flat)
    assert again.run.config == first.run.config
    assert again.run.options == first.run.options
    assert again.plugins.lock() == first.plugins.lock()
    assert resolved(again.run) == flat


def test_aliases_of_families(write_config: WriteConfig) -> None:
    run = assembled(write_config(model_family="Films-Old")).run
    assert run.config.model_family == "films"
    assert resolved(run)["model_family"] == "films"


def test_without_datasets(write_config: WriteConfig) -> None:
    draft = read_draft(write_config(data_backend_config="none.json"))
    assert assemble(draft, with_datasets=False).run.datasets == ()


# --------------------------------------------------------------------------------------------------- unknown keys


def test_a_misspelt_key_of_core(write_config: WriteConfig) -> None:
    assert refusal(write_config(learning_rte=1)) == [
        'config.json: learning_rte — unknown option. Did you mean "learning_rate"?'
    ]


def test_a_misspelt_flag(write_config: WriteConfig) -> None:
    assert refusal(write_config(), ["--lora-rnk", "3"]) == ['--lora-rnk — unknown option. Did you mean "lora_rank"?']


def test_a_misspelt_key_of_an_active_plugin(write_config: WriteConfig) -> None:
    assert refusal(write_config(films_tilling=True)) == [
        'config.json: films_tilling — unknown option. Did you mean "films_tiling"? (hooktuner-films 0.1.0)'
    ]


def test_a_misspelt_key_of_an_installed_plugin(write_config: WriteConfig, shelf: Any) -> None:
    shelf.technique()
    assert refusal(write_config(echo_wieght=1)) == [
        'config.json: echo_wieght — unknown option. Did you mean "echo_weight"? (hooktuner-echo 0.1.0)'
    ]


def test_a_key_like_nothing(write_config: WriteConfig) -> None:
    assert refusal(write_config(zzzzzz=1)) == [
        "config.json: zzzzzz — unknown option. `tuner config schema` lists every option."
    ]


@pytest.fixture
def published(shelf: Any) -> None:
    shelf.catalogue(
        {
            "song": {
                "distribution": "hooktuner-song",
                "kind": "technique",
                "summary": "",
                "keys": ["song_*", "singing"],
            },
            "echo": {"distribution": "hooktuner-echo", "kind": "technique", "summary": "", "keys": ["echo_*"]},
        }
    )


@pytest.mark.usefixtures("published")
def test_a_key_of_a_plugin_that_is_not_installed(write_config: WriteConfig) -> None:
    assert refusal(write_config(song_enabled=True), ["--singing"]) == [
        "config.json: song_enabled — this option belongs to the plugin song, which is not installed. "
        "Install it with: pip install hooktuner-song",
        "--singing — this option belongs to the plugin song, which is not installed. "
        "Install it with: pip install hooktuner-song",
    ]


@pytest.mark.usefixtures("published")
def test_a_misspelt_key_of_a_plugin_that_is_not_installed(write_config: WriteConfig) -> None:
    assert refusal(write_config(singin=True)) == [
        'config.json: singin — unknown option. Did you mean "singing"? (hooktuner-song, not installed)'
    ]


@pytest.mark.usefixtures("published")
def test_a_published_plugin_that_is_installed_has_its_own_keys(write_config: WriteConfig, shelf: Any) -> None:
    shelf.technique()
    assert refusal(write_config(echo_wait=1)) == [
        'config.json: echo_wait — unknown option. Did you mean "echo_weight"? (hooktuner-echo 0.1.0)'
    ]


# ----------------------------------------------------------------------------------------- switching plugins on


def test_a_key_switches_its_plugin_on(write_config: WriteConfig, shelf: Any) -> None:
    shelf.technique()
    result = assembled(write_config(echo_enabled="true", echo_weight=2))
    assert list(result.plugins.lock()) == ["films", "echo"]
    assert result.run.options["echo"].model_dump() == {"echo_enabled": True, "echo_weight": 2.0}


def test_a_key_says_that_its_plugin_is_off(write_config: WriteConfig, shelf: Any) -> None:
    shelf.technique()
    result = assembled(write_config(echo_enabled=False, echo_weight=2))
    assert list(result.plugins.lock()) == ["films"]
    assert "echo" not in result.run.options


def test_keys_of_a_plugin_that_is_off_are_checked(write_config: WriteConfig, shelf: Any) -> None:
    shelf.technique()
    assert refusal(write_config(echo_enabled=False, echo_weight=-2)) == [
        "config.json: echo_weight — must be at least 0, not -2."
    ]


def test_a_key_of_an_inactive_plugin(write_config: WriteConfig, shelf: Any) -> None:
    shelf.technique()
    assert refusal(write_config(echo_weight=2)) == [
        "config.json: echo_weight — belongs to the plugin echo (hooktuner-echo 0.1.0), which is not active. "
        "Activate it with --plugin echo, or remove the option."
    ]


def test_a_refused_switch_is_not_called_inactive_too(write_config: WriteConfig, shelf: Any) -> None:
    shelf.technique()
    assert refusal(write_config(echo_enabled="maybe", echo_weight=2)) == [
        'config.json: echo_enabled — must be true or false, not "maybe".'
    ]


def test_a_key_of_another_family(write_config: WriteConfig, shelf: Any) -> None:
    shelf.family("songs")
    assert refusal(write_config(songs_tiling=True)) == [
        "config.json: songs_tiling — belongs to the model family songs (hooktuner-songs 0.1.0), which is not active. "
        "Choose that family, or remove the option."
    ]


@pytest.mark.parametrize("how", ["flag", "key", "python"])
def test_the_ways_to_name_a_plugin(write_config: WriteConfig, shelf: Any, how: str) -> None:
    shelf.technique()
    extra = {"plugins": "echo"} if how == "key" else {}
    flags = ["--plugins", '["echo"]'] if how == "flag" else []
    result = assembled(write_config(echo_weight=1, **extra), flags, ["echo"] if how == "python" else [])
    assert list(result.plugins.lock()) == ["films", "echo"]


def test_order_as_the_user_wrote(write_config: WriteConfig, shelf: Any) -> None:
    for name in ("ant", "bee", "cat", "dog"):
        shelf.technique(name)
    config = write_config(dog_enabled=True, plugins=["cat", "ant"], ant_enabled=True)
    assert list(assembled(config, plugins=["bee"]).plugins.lock()) == ["films", "bee", "cat", "ant", "dog"]


def test_asked_for_and_switched_off(write_config: WriteConfig, shelf: Any) -> None:
    shelf.technique()
    assert refusal(write_config(echo_enabled=False), plugins=["echo"]) == [
        "config.json: echo_enabled — switches echo (hooktuner-echo 0.1.0) off, and the plugin is also asked for by "
        "name. Remove one of the two."
    ]


def test_needs_are_checked(write_config: WriteConfig, shelf: Any) -> None:
    shelf.technique(needs=("audio", "frames"))
    assert refusal(write_config(echo_enabled=True)) == [
        "echo (hooktuner-echo 0.1.0) — needs audio of a model, and films (hooktuner-films 0.1.0) does not offer that "
        "(it offers blocks, frames). Train without echo."
    ]


def test_a_broken_installed_plugin_harms_nothing(write_config: WriteConfig, shelf: Any) -> None:
    shelf.add("alpha", "import not_there", "Alpha")
    shelf.technique()
    assert assembled(write_config()).run.notes == [
        "There is no validation: neither validation_prompt nor user_prompt_library is set."
    ]
    with_key = assembled(write_config(echo_enabled=True)).run
    assert with_key.notes[0] == (
        "An installed plugin was not asked about its options: alpha (hooktuner-alpha 0.1.0, hooktuner_alpha:Alpha) — "
        "cannot be imported: ModuleNotFoundError: No module named 'not_there'. Reinstall or update hooktuner-alpha, or "
        "run without it."
    )


def test_only_wanted_plugins_are_imported(write_config: WriteConfig, shelf: Any) -> None:
    shelf.technique()
    assembled(write_config(films_margin=3))
    assert "hooktuner_echo" not in sys.modules


def test_a_broken_wanted_plugin(write_config: WriteConfig, shelf: Any) -> None:
    shelf.add("alpha", "import not_there", "Alpha")
    with pytest.raises(PluginError, match=r"alpha .* cannot be imported: ModuleNotFoundError"):
        assembled(write_config(alpha_weight=3), plugins=["alpha"])


def test_two_owners_of_a_key(write_config: WriteConfig, shelf: Any) -> None:
    shelf.technique()
    shelf.technique("ecco", distribution="hooktuner-other")
    Path(shelf.folders[-1], "hooktuner_other.py").write_text(Path(shelf.folders[-2], "hooktuner_echo.py").read_text())
    [message] = refusal(write_config(), plugins=["echo", "ecco"])
    assert message == (
        "echo_enabled — this config key has two owners: echo (hooktuner-echo 0.1.0) and ecco (hooktuner-other 0.1.0). "
        "Run without one of them."
    )


@pytest.mark.parametrize("key", ["seed", "framerate"])
def test_a_plugin_cannot_own_a_key_of_core(write_config: WriteConfig, key: str) -> None:
    from hooktuner import PluginOptions

    options = type("Options", (PluginOptions,), {"__annotations__": {key: int}, key: 1, "__module__": __name__})
    odd = type("Odd", (), {"options": hookimpl(lambda self: options)})
    assert refusal(write_config(), plugins=[odd]) == [
        f"{key} — this config key has two owners: hooktuner and odd ({__name__} (object)). Run without one of them."
    ]


# ------------------------------------------------------------------------------------------------------- families


def test_no_family() -> None:
    messages = refusal({"max_train_steps": 1, "data_backend_config": "datasets.json"})
    assert messages == [
        'model_family — no model family is active. Set "model_family" in the config or name one with --plugin; '
        "`tuner plugins` lists those that are installed."
    ]


def test_no_family_and_more() -> None:
    assert refusal({"learning_rate": "x", "max_train_steps": 1}) == [
        'config: learning_rate — must be a number, not "x".',
        'config: model_family — no model family is active. Set "model_family" in the config or name one with --plugin; '
        "`tuner plugins` lists those that are installed.",
        "config: data_backend_config — is missing. Set it to the path of the datasets file (a JSON list).",
    ]


def test_an_unknown_family(write_config: WriteConfig) -> None:
    assert refusal(write_config(model_family="film")) == [
        'config.json: model_family: film — no plugin of this name is installed. Did you mean "films"? Installed: films.'
    ]


def test_the_family_of_the_command_line(write_config: WriteConfig) -> None:
    assert assembled(write_config(model_family=None), plugins=["films"]).run.config.model_family == "films"
    assert assembled(write_config(), plugins=["films_old"]).run.config.model_family == "films"


def test_families_that_disagree(write_config: WriteConfig, shelf: Any) -> None:
    shelf.family("songs")
    assert refusal(write_config(), plugins=["songs"]) == [
        "config.json: model_family — a run has one model family, and two are wanted: songs (hooktuner-songs 0.1.0) and "
        "films (hooktuner-films 0.1.0). Let model_family and --plugin name the same one."
    ]


def test_a_technique_is_no_family(write_config: WriteConfig, shelf: Any) -> None:
    shelf.technique()
    assert refusal(write_config(model_family="echo"), plugins=["films"]) == [
        "config.json: model_family — echo (hooktuner-echo 0.1.0) is not a model family. "
        "`tuner plugins` lists the families that are installed."
    ]


def test_an_unknown_flavour(write_config: WriteConfig) -> None:
    assert refusal(write_config(model_flavour="smal")) == [
        'config.json: model_flavour — films has no flavour "smal". Did you mean "small"? '
        "It has: small, first-frame, built."
    ]


def test_a_card_with_impossible_defaults(write_config: WriteConfig, shelf: Any) -> None:
    code = Path(shelf.folders[0], "hooktuner_films.py").read_text()
    for place, (old, new, why) in enumerate(
        [
            ('"frame_rate": 24.0', '"frame_rate": -1', "are not possible: frame_rate must be above 0, not -1."),
            ('"frame_rate": 24.0,', "", "have nothing for frame_rate."),
            ('"frame_rate"', '"framerats"', "have no such config key: framerats."),
        ]
    ):
        shelf.add(f"odd{place}", code.replace(old, new), "Family")
        [message] = refusal(write_config(model_family=f"odd{place}"))
        assert message == (
            f"odd{place} (hooktuner-odd{place} 0.1.0) — the defaults of its model card {why} "
            "This is a mistake in the plugin: report it to its author."
        )


def test_the_card_and_the_options_are_asked(write_config: WriteConfig) -> None:
    assert refusal(write_config(lora_rank=1024), ["--films_margin", "65"]) == [
        "config.json: lora_rank — is larger than the model is wide. Lower it.",
        "--films_margin — is wider than a tile (64 pixels). Lower it.",
    ]


def test_an_exception_in_a_plugins_check_is_blamed(write_config: WriteConfig, shelf: Any) -> None:
    code = Path(shelf.folders[0], "hooktuner_films.py").read_text()
    shelf.add("odd", code.replace("run.config.lora_rank > 512", "run.config.nothing"), "Family")
    with pytest.raises(AttributeError) as raised:
        assembled(write_config(model_family="odd"))
    assert raised.value.__notes__ == ["raised by plugin odd (hooktuner-odd 0.1.0) in the check of its model card"]


# -------------------------------------------------------------------------------------------- between the keys


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"max_train_steps": None},
            "max_train_steps and num_train_epochs — neither says how long to train. "
            'Set one of them, for example "max_train_steps": 1000.',
        ),
        (
            {"num_train_epochs": 2},
            "max_train_steps and num_train_epochs — both say how long to train. Remove one of the two.",
        ),
        (
            {"data_backend_config": None},
            "data_backend_config — is missing. Set it to the path of the datasets file (a JSON list).",
        ),
        (
            {"offload_during_startup": False},
            "offload_during_startup — the VAE and the text encoder are never on the device together, because each is "
            "loaded, used and released before the next; there is no other way of caching to switch to. Remove it, or "
            "set it to true.",
        ),
        (
            {"flow_use_uniform_schedule": True, "flow_use_beta_schedule": "true"},
            "flow_use_uniform_schedule and flow_use_beta_schedule — noise levels are drawn from one law, and two are "
            "chosen. Set one of them to false.",
        ),
        (
            {"validation_using_datasets": True, "model_flavour": "first-frame"},
            "validation_using_datasets — does not say which dataset. "
            "Set eval_dataset_id to the id of an image dataset.",
        ),
        (
            {"validation_resolution": "512by768"},
            'validation_resolution — "512by768" is not a size; write WIDTHxHEIGHT in pixels, such as 512x768.',
        ),
        (
            {"validation_resolution": ","},
            "validation_resolution — names no size. Write WIDTHxHEIGHT in pixels, such as 512x768.",
        ),
        (
            {"validation_num_video_frames": 60},
            "validation_num_video_frames — 60 frames do not fit: the number must be 4k+1; the nearest are 57 or 61.",
        ),
        (
            {"validation_num_video_frames": 125},
            "validation_num_video_frames — 125 frames are more than the model's positions allow; at most 121.",
        ),
        (
            {"pretrained_model_name_or_path": "./nowhere"},
            "pretrained_model_name_or_path — ./nowhere is not a folder. Give a folder in the diffusers layout, or a "
            "hub id such as owner/name.",
        ),
        (
            {"output_dir": "datasets.json"},
            "output_dir — datasets.json is a file. Name a folder; it is made if need be.",
        ),
        (
            {"user_prompt_library": "none.json"},
            "user_prompt_library — none.json: the prompt library cannot be read: No such file or directory. "
            "Correct user_prompt_library.",
        ),
        (
            {"resume_from_checkpoint": "step-000010"},
            "resume_from_checkpoint — step-000010 is neither a folder nor a checkpoint of this run folder. "
            'output/checkpoints has no checkpoint. Or write "latest".',
        ),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit(write_config: WriteConfig, keys: dict[str, Any], message: str) -> None:
    assert refusal(write_config(**keys)) == [f"config.json: {message}"]


def test_first_frames_for_a_flavour_that_takes_none(write_config: WriteConfig) -> None:
    messages = refusal(write_config(validation_using_datasets=True))
    assert messages[1] == (
        'config.json: validation_using_datasets — flavour "small" of films is not conditioned on a first frame, so no '
        "images are needed. Remove it, or choose an image-to-video flavour."
    )


def test_an_eval_dataset_that_does_not_exist(write_config: WriteConfig) -> None:
    keys = {"validation_using_datasets": True, "eval_dataset_id": "mine", "model_flavour": "first-frame"}
    [message] = refusal(write_config(**keys))
    assert message.startswith("config.json: eval_dataset_id — ")
    assert '"mine"' in message


def test_a_checkpoint_that_exists(write_config: WriteConfig, project: Path) -> None:
    (project / "output/checkpoints/step-000010").mkdir(parents=True)
    assert assembled(write_config(resume_from_checkpoint="step-000010")).run.config.resume_from_checkpoint
    assert assembled(write_config(resume_from_checkpoint="output/checkpoints/step-000010"))
    assert assembled(write_config(resume_from_checkpoint="none"))
    [message] = refusal(write_config(resume_from_checkpoint="step-000011"))
    assert message.endswith('Did you mean "step-000010"? output/checkpoints has step-000010. Or write "latest".')


def test_a_tracker_that_is_not_installed(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal(write_config(report_to="tensorboard")) == [
        "config.json: report_to — tensorboard is not installed. Install it with: pip install 'hooktuner[tensorboard]'"
    ]


def test_frames_of_datasets_obey_the_model(write_config: WriteConfig, project: Path) -> None:
    datasets = json.loads((project / "datasets.json").read_text())
    datasets[0]["video"]["num_frames"] = 60
    (project / "datasets.json").write_text(json.dumps(datasets))
    [message] = refusal(write_config())
    assert message.startswith("datasets.json: [0].video.num_frames — 60 frames do not fit")


def test_everything_in_one_report(write_config: WriteConfig, project: Path) -> None:
    datasets = json.loads((project / "datasets.json").read_text())
    datasets[0]["repeat"] = 3
    (project / "datasets.json").write_text(json.dumps(datasets))
    keys = {
        "learning_rte": 1,
        "seed": "x",
        "num_train_epochs": 1,
        "films_margin": -1,
        "validation_num_video_frames": 60,
    }
    with pytest.raises(ConfigError) as refused:
        assembled(write_config(**keys), ["stray", "--lora_rank"], ["nobody"])
    where = [problem.where for problem in refused.value.problems]
    assert where == [
        "stray",
        "--lora_rank",
        "config.json: seed",
        "nobody",
        "config.json: films_margin",
        "config.json: learning_rte",
        "config.json: max_train_steps and num_train_epochs",
        "config.json: validation_num_video_frames",
        "datasets.json: [0].repeat",
    ]


def test_a_wrong_value_is_reported_once(write_config: WriteConfig) -> None:
    assert refusal(write_config(max_train_steps="many", validation_num_video_frames="x")) == [
        'config.json: max_train_steps — must be a whole number, not "many".',
        'config.json: validation_num_video_frames — must be a whole number, not "x".',
    ]


# ---------------------------------------------------------------------------------------------------------- notes


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        (
            {"validation_resolution": "480x854"},
            "validation_resolution 480x854 becomes 480x848: sizes must be multiples of 16 pixels.",
        ),
        (
            {"validation_guidance": 6.5},
            "validation_guidance 6.5 is far from the usual 5 of films: validation samples may turn out black or noisy.",
        ),
        (
            {"validation_guidance": 1.5},
            "validation_guidance 1.5 is far from the usual 5 of films: validation samples may turn out black or noisy.",
        ),
        (
            {"frame_rate": 12},
            "frame_rate 12 differs from the 24 frames per second that films was trained with: motion may look too "
            "fast or too slow.",
        ),
        (
            {"lr_warmup_steps": 10},
            "lr_warmup_steps (10) is not shorter than the run (10 steps): the learning rate never reaches its full "
            "value.",
        ),
        ({"model_type": "full", "lora_rank": 8}, "lora_rank has no effect: model_type is not lora."),
        (
            {"flow_beta_schedule_alpha": 3},
            "flow_beta_schedule_alpha has no effect: flow_use_beta_schedule is not set.",
        ),
        (
            {"flow_sigmoid_scale": 2, "flow_use_uniform_schedule": True},
            "flow_sigmoid_scale has no effect: another law of noise levels is chosen.",
        ),
        ({"lr_power": 2}, "lr_power has no effect: lr_scheduler is not polynomial."),
        ({"lr_end": 1e-6}, "lr_end has no effect: lr_scheduler is constant."),
        ({"max_grad_norm": 0, "grad_clip_method": "value"}, "grad_clip_method has no effect: max_grad_norm is 0."),
    ],
)
def test_notes(write_config: WriteConfig, keys: dict[str, Any], note: str) -> None:
    assert assembled(write_config(validation_prompt="a cat", **keys)).run.notes == [note]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"validation_guidance": 2},
        {"validation_guidance": 6},
        {"validation_resolution": "512 X 768"},
        {"frame_rate": 24},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 10},
        {"validation_guidance": 30, "validation_disable": True},
    ],
)
def test_nothing_to_note(write_config: WriteConfig, keys: dict[str, Any]) -> None:
    assert assembled(write_config(validation_prompt="a cat", **keys)).run.notes == []


def test_a_home_folder_is_expanded(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert assembled(write_config(output_dir="~/out")).run.config.output_dir == "/somewhere/out"


# ---------------------------------------------------------------------------------------------- plugins as objects


def test_objects_beside_names(write_config: WriteConfig) -> None:
    class Mine:
        @hookimpl
        def on_event(self, event: Any) -> None: ...

    result = assembled(write_config(), plugins=[Mine(), "films"])
    assert list(result.plugins.lock()) == ["films", "mine"]
    assert resolved(result.run)["plugins"] == []


def test_a_family_as_an_object(write_config: WriteConfig) -> None:
    from hooktuner_films import Family  # type: ignore[import-not-found]

    Family.name = "own"
    assert assembled(write_config(model_family="own"), plugins=[Family]).run.config.model_family == "own"


# ------------------------------------------------------------------------------------------- where weights are from


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOOKTUNER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_repository_or_what_the_user_named(write_config: WriteConfig, house: Path) -> None:
    assert build_model_source(assembled(write_config()).run) == "owner/small"
    named = assembled(write_config(pretrained_model_name_or_path="owner/mine")).run
    assert build_model_source(named) == "owner/mine"
    assert not house.exists()


def test_a_built_checkpoint_is_built_once(write_config: WriteConfig, house: Path) -> None:
    run = assembled(write_config(model_flavour="built")).run
    assert not house.exists()
    folder = Path(build_model_source(run))
    assert folder.parent == house / "models"
    assert folder.name.startswith("films-built-")
    (folder / "model.txt").write_text("kept")
    assert build_model_source(run) == folder
    assert (folder / "model.txt").read_text() == "kept"


def test_a_failed_build_leaves_nothing(write_config: WriteConfig, house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = assembled(write_config(model_flavour="built")).run

    def fail(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise OSError("disk full")

    object.__setattr__(run.flavour, "build", fail)
    with pytest.raises(OSError, match="disk full"):
        build_model_source(run)
    assert list((house / "models").iterdir()) == []


def test_other_code_builds_another_checkpoint(write_config: WriteConfig, house: Path, shelf: Any) -> None:
    first = build_model_source(assembled(write_config(model_flavour="built")).run)
    path = Path(shelf.folders[0], "hooktuner_films.py")
    path.write_text(path.read_text() + "\n# changed\n")
    assert build_model_source(assembled(write_config(model_flavour="built")).run) != first


def test_a_flavour_without_any_checkpoint(write_config: WriteConfig, house: Path) -> None:
    run = assembled(write_config(model_flavour="built")).run
    object.__setattr__(run.flavour, "build", None)
    with pytest.raises(ModelError) as refused:
        build_model_source(run)
    assert str(refused.value) == (
        'model_flavour — flavour "built" of films has no published checkpoint. '
        "Set pretrained_model_name_or_path to a folder in the diffusers layout."
    )


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_nothing_is_said_of_missing_keys_where_the_file_cannot_be_read(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        assemble(read_draft(path))
    assert len(caught.value.problems) == 1
