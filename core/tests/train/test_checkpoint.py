"""Checkpoints: what is in them, that they come back exactly, and how they refuse."""

from __future__ import annotations

import io
import json
import os

import hooktuner
import pytest
import torch
from hooktuner.errors import CheckpointError, ConfigError
from hooktuner.files import atomic_folder
from hooktuner.testing import ToyFamily, make_project
from hooktuner.train import checkpoint
from rich.console import Console
from safetensors.torch import load_file, save_file

QUIET = Console(quiet=True)


def train(path, *flags, plugins=(ToyFamily,)):
    return hooktuner.run(path, plugins=list(plugins), flags=list(flags), console=QUIET)


def state_of(folder):
    """Every byte of a checkpoint that decides how training goes on."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "config.resolved.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_run_ends_with_the_same_bytes_as_one_that_was_never_stopped(tmp_path, kind):
    keys = {"model_type": kind, "clips": 3, "max_train_steps": 6, "train_batch_size": 2, "lora_dropout": 0.1}
    keys |= {"gradient_accumulation_steps": 2, "caption_dropout_probability": 0.3, "lr_scheduler": "cosine"}
    if kind == "full":
        del keys["lora_dropout"]
    whole = train(make_project(tmp_path / "whole", **keys))
    path = make_project(tmp_path / "parts", **keys)
    hooktuner.run(path, plugins=[ToyFamily, Stop(after=3)], console=QUIET)
    assert not (tmp_path / "parts/output/checkpoints/step-000006").exists()
    resumed = hooktuner.run(path, plugins=[ToyFamily, Stop(after=None)], console=QUIET)
    one, other = state_of(whole.checkpoint), state_of(resumed.checkpoint)
    one.pop("plugins.lock.json"), other.pop("plugins.lock.json")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    metrics = [(tmp_path / name / "output/metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]


class Stop:
    """Asks the run to stop, as Ctrl-C does."""

    name = "stop"

    def __init__(self, after):
        self.after = after

    @hooktuner.hookimpl
    def on_event(self, run, event):
        if type(event).__name__ == "StepFinished" and event.result.number == self.after:
            os.kill(os.getpid(), 2)


def test_a_checkpoint_holds_what_its_page_says_and_no_pickle(tmp_path):
    result = train(make_project(tmp_path, max_train_steps=1))
    names = {str(path.relative_to(result.checkpoint)) for path in result.checkpoint.rglob("*") if path.is_file()}
    assert names == {
        "pytorch_lora_weights.safetensors", "config.resolved.json", "plugins.lock.json", "state/run.json",
        "state/trainables.safetensors", "state/optimizer.safetensors",
    }  # fmt: skip
    assert result.checkpoint.name == "step-000001"
    lock = json.loads((result.checkpoint / "plugins.lock.json").read_text())
    assert list(lock) == ["toy"]


def test_alpha_is_folded_into_the_exported_adapter_and_not_into_the_state(tmp_path):
    path = make_project(tmp_path, max_train_steps=1, lora_rank=4, lora_alpha=10)
    folder = train(path).checkpoint
    exported = load_file(folder / "pytorch_lora_weights.safetensors")
    state = load_file(folder / "state/trainables.safetensors")
    assert all(name.startswith("transformer.") for name in exported)
    for name, value in exported.items():
        raw = state[name.removeprefix("transformer.").replace(".weight", ".default.weight")]
        assert torch.equal(value, raw * 2.5 if "lora_B" in name else raw)


def test_only_the_newest_checkpoints_are_kept_and_zero_keeps_all(tmp_path):
    path = make_project(tmp_path, max_train_steps=4, checkpoint_step_interval=1, checkpoints_total_limit=2)
    train(path)
    assert [one.name for one in checkpoint.list_checkpoints(tmp_path / "output")] == ["step-000003", "step-000004"]
    train(path, "--max_train_steps", "7", "--checkpoints_total_limit", "0")
    assert len(checkpoint.list_checkpoints(tmp_path / "output")) == 5
    train(path, "--max_train_steps", "8", "--checkpoints_total_limit", "1")
    assert [one.name for one in checkpoint.list_checkpoints(tmp_path / "output")] == ["step-000008"]


def test_the_old_checkpoint_goes_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    path = make_project(tmp_path, max_train_steps=2, checkpoint_step_interval=1, checkpoints_total_limit=1)
    real = checkpoint.save_file

    def fails(tensors, file, **more):
        if "step-000002" in str(file) and file.name == "optimizer.safetensors":
            raise OSError("no space left on device")
        real(tensors, file, **more)

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        train(path)
    assert sorted(os.listdir(tmp_path / "output/checkpoints")) == ["step-000001"]
    monkeypatch.undo()
    assert train(path).steps == 2


def test_a_folder_appears_complete_or_not_at_all(tmp_path):

    def write_half():
        with atomic_folder(tmp_path / "whole") as folder:
            (folder / "a").write_text("a")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        write_half()
    assert os.listdir(tmp_path) == []
    with atomic_folder(tmp_path / "whole") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "whole").exists()
    assert os.listdir(tmp_path / "whole") == ["a"]


def test_resuming_with_what_makes_the_result_wrong_is_refused_and_the_rest_is_said(tmp_path):
    path = make_project(tmp_path, max_train_steps=2)
    train(path)
    with pytest.raises(CheckpointError, match=r"lora_rank was 4 and is 8.*another output_dir"):
        train(path, "--lora_rank", "8", "--max_train_steps", "3")
    console = Console(record=True, width=200, file=io.StringIO())
    hooktuner.run(
        path, plugins=[ToyFamily], flags=["--learning_rate", "0.5", "--max_train_steps", "3"], console=console
    )
    text = console.export_text()
    assert "since step-000002: learning_rate was 0.001 and is 0.5" in text
    assert "Resumed from" in text


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    path = make_project(tmp_path, max_train_steps=1)
    train(path)
    with pytest.raises(ConfigError, match=r"step-000009 is neither a folder nor a checkpoint.*step-000001"):
        train(path, "--resume_from_checkpoint", "step-000009")
    assert train(path, "--resume_from_checkpoint", "step-000001", "--max_train_steps", "2").steps == 2
    assert train(path, "--resume_from_checkpoint", str(tmp_path / "output/checkpoints/step-000001")).steps == 1


def test_a_finished_run_says_that_there_is_nothing_to_do_and_changes_nothing(tmp_path):
    path = make_project(tmp_path, max_train_steps=1)
    before = train(path)
    metrics = (tmp_path / "output/metrics.jsonl").read_bytes()
    again = train(path)
    assert (again.steps, again.losses, again.checkpoint) == (1, [], before.checkpoint)
    assert (tmp_path / "output/metrics.jsonl").read_bytes() == metrics


def test_damaged_and_foreign_checkpoints_are_refused_in_words(tmp_path):
    path = make_project(tmp_path, max_train_steps=1)
    folder = train(path).checkpoint
    trainables = folder / "state/trainables.safetensors"
    good = trainables.read_bytes()
    trainables.write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match=r"cannot be read.*Resume from another checkpoint"):
        train(path, "--max_train_steps", "2")
    tensors = dict(list(load_tensors(good).items())[1:])
    save_file({**tensors, "stranger": torch.zeros(1)}, trainables)
    with pytest.raises(CheckpointError, match=r"1 missing \(such as .*\) and 1 unknown \(such as stranger\)"):
        train(path, "--max_train_steps", "2")


def load_tensors(data):
    from safetensors.torch import load

    return load(data)


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_half_of_it(tmp_path, monkeypatch):
    """What stands under a checkpoint's name is complete, also in the middle of its removal."""
    path = make_project(tmp_path, max_train_steps=2, checkpoint_step_interval=1, checkpoints_total_limit=1)

    def killed(folder, *more, **keys):
        raise KeyboardInterrupt

    monkeypatch.setattr("hooktuner.files.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        train(path)
    for folder in (tmp_path / "output/checkpoints").glob("step-*"):
        assert (folder / "state/run.json").is_file()


def test_a_fresh_start_in_a_used_folder_moves_the_other_runs_checkpoints_aside(tmp_path):
    path = make_project(tmp_path, max_train_steps=3, checkpoint_step_interval=1)
    train(path)
    train(path, "--resume_from_checkpoint", "none", "--max_train_steps", "2", "--seed", "5")
    assert [one.name for one in checkpoint.list_checkpoints(tmp_path / "output")] == ["step-000001", "step-000002"]
    aside = tmp_path / "output/checkpoints/replaced-1"
    assert sorted(os.listdir(aside)) == ["step-000001", "step-000002", "step-000003"]
    resumed = train(path, "--max_train_steps", "3", "--seed", "5")
    assert len(resumed.losses) == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "output/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_neither_a_dry_run_nor_a_refused_resume_rewrites_what_ran(tmp_path):
    path = make_project(tmp_path, max_train_steps=1)
    train(path)
    before = (tmp_path / "output/config.resolved.json").read_bytes()
    hooktuner.run(path, plugins=[ToyFamily], flags=["--lora_rank", "8"], console=QUIET, dry_run=True)
    with pytest.raises(CheckpointError, match="lora_rank was 4 and is 8"):
        train(path, "--lora_rank", "8", "--max_train_steps", "2")
    assert (tmp_path / "output/config.resolved.json").read_bytes() == before


def test_a_folder_that_several_processes_make_is_kept_by_the_first(tmp_path):
    with atomic_folder(tmp_path / "model", keep_existing=True) as mine:
        (mine / "weights").write_text("mine")
        (tmp_path / "model").mkdir()
        (tmp_path / "model/weights").write_text("theirs")
    assert (tmp_path / "model/weights").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["model"]
