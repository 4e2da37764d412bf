from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hooktuner.data import cache
from hooktuner.data.cache import CacheKey, Recipe, Store, encoder_identity

KEY = CacheKey("ab" + "0" * 38, '{"what":"test"}')
TENSORS = {"latents": torch.arange(12.0).reshape(3, 4).bfloat16(), "flag": torch.tensor([True])}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "latents")


def test_what_is_saved_is_loaded(store):
    assert not store.has(KEY)
    store.save(KEY, {**TENSORS, "view": TENSORS["latents"].T})
    assert store.has(KEY)
    assert store.path(KEY) == store.folder / "ab" / f"{KEY.hex}.safetensors"
    loaded = store.load(KEY)
    assert torch.equal(loaded["latents"], TENSORS["latents"])
    assert loaded["latents"].dtype == torch.bfloat16
    assert torch.equal(loaded["view"], TENSORS["latents"].T)
    assert [path.name for path in store.path(KEY).parent.iterdir()] == [f"{KEY.hex}.safetensors"]


def test_an_entry_explains_itself(store):
    from safetensors import safe_open

    store.save(KEY, TENSORS)
    with safe_open(store.path(KEY), framework="pt") as opened:
        assert opened.metadata() == {"key": KEY.text}


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_cut_off_entry_is_not_there(store, keep):
    store.save(KEY, TENSORS)
    path = store.path(KEY)
    path.write_bytes(path.read_bytes()[:keep])
    assert not store.has(KEY)
    assert not path.exists()  # so that it is made again
    store.save(KEY, TENSORS)
    assert store.has(KEY)


def test_a_failed_write_leaves_nothing(store, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(cache.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        store.save(KEY, TENSORS)
    assert list(store.path(KEY).parent.iterdir()) == []


_KILLED = """
import os, signal, sys, torch
from pathlib import Path
from hooktuner.data import cache
cache.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
cache.Store(Path(sys.argv[1])).save(cache.CacheKey("ab" + "0" * 38, "{}"), {"latents": torch.zeros(9)})
"""


def test_a_write_that_is_killed_leaves_no_entry_and_is_cleaned_up(store):
    ended = subprocess.run([sys.executable, "-c", _KILLED, str(store.folder)], check=False)
    assert ended.returncode == -signal.SIGKILL
    leftovers = list(store.folder.rglob("*"))
    assert [path.suffix for path in leftovers if path.is_file()] == [".tmp"]
    assert not store.has(KEY)
    assert store.sweep() == 1
    assert [path for path in store.folder.rglob("*") if path.is_file()] == []


def test_sweeping_spares_what_others_are_writing(store):
    folder = store.folder / "ab"
    folder.mkdir(parents=True)
    living = folder / f".x.{cache._host()}.{os.getppid()}.tmp"
    elsewhere = folder / ".x.01234567.999999999.tmp"
    forgotten = folder / ".y.01234567.999999999.tmp"
    for path in (living, elsewhere, forgotten):
        path.write_bytes(b"")
    long_ago = time.time() - 7200
    os.utime(forgotten, (long_ago, long_ago))
    assert store.sweep() == 1
    assert sorted(folder.iterdir()) == sorted([living, elsewhere])


# ---------------------------------------------------------------------------------------------------------- keys


@pytest.fixture
def model(tmp_path):
    """A folder in the diffusers layout."""
    folder = tmp_path / "model"
    for name in ("vae", "text_encoder_2", "tokenizer", "transformer"):
        (folder / name).mkdir(parents=True)
        (folder / name / "weights").write_bytes(name.encode())
    return folder


@pytest.fixture
def recipe_key(make_run, toy_plugins, options, model, entry):
    """recipe_key(kind, …) → the key of one entry in a run with these changes."""

    def key(kind, *, toy=None, teacher=None, version="1.0", flavour="t2v", dtype=torch.float32, path=model, **what):
        run = make_run(
            [entry],
            flavour=flavour,
            options={"toy": options.toy(**(toy or {})), "teacher": options.teacher(**(teacher or {}))},
            model_path=path,
            dtype=dtype,
        )
        plugins = toy_plugins(with_features=True, version=version)
        return Recipe.of(kind, run, plugins).key(**{"source": "x", "frames": 17, **what}).hex

    return key


def test_equal_recipes_have_equal_keys(recipe_key):
    for kind in ("text", "latents", "features"):
        assert recipe_key(kind) == recipe_key(kind)
    assert len({recipe_key(kind) for kind in ("text", "latents", "features")}) == 3


@pytest.mark.parametrize("kind", ["text", "latents", "features"])
@pytest.mark.parametrize(
    "change",
    [{"version": "1.1"}, {"flavour": "i2v"}, {"dtype": torch.bfloat16}, {"source": "y"}, {"frames": 21}],
    ids=str,
)
def test_a_changed_setting_changes_the_key(recipe_key, kind, change):
    assert recipe_key(kind, **change) != recipe_key(kind)


def test_options_count_for_the_kinds_that_they_name(recipe_key):
    assert recipe_key("latents", toy={"toy_tiling": 2}) != recipe_key("latents")
    assert recipe_key("text", toy={"toy_tiling": 2}) == recipe_key("text")
    assert recipe_key("latents", toy={"toy_other": 2}) == recipe_key("latents")
    assert recipe_key("features", teacher={"teacher_size": 2}) != recipe_key("features")
    assert recipe_key("latents", teacher={"teacher_size": 2}) == recipe_key("latents")


def test_an_encoder_counts_for_what_it_encodes(recipe_key, model):
    before = {kind: recipe_key(kind) for kind in ("text", "latents", "features")}
    (model / "transformer" / "weights").write_bytes(b"trained")
    assert {kind: recipe_key(kind) for kind in before} == before
    (model / "vae" / "weights").write_bytes(b"eav")  # as long as before
    assert {kind for kind in before if recipe_key(kind) != before[kind]} == {"latents"}
    (model / "tokenizer" / "extra").write_bytes(b"")
    assert {kind for kind in before if recipe_key(kind) != before[kind]} == {"latents", "text"}


def test_preprocessing_code_counts_where_there_are_pixels(recipe_key, monkeypatch):
    before = {kind: recipe_key(kind) for kind in ("text", "latents", "features")}
    monkeypatch.setattr(cache, "PREPROCESSING", 999)
    assert {kind for kind in before if recipe_key(kind) != before[kind]} == {"latents", "features"}


def test_large_encoder_files_are_known_by_size_and_time(model, monkeypatch):
    monkeypatch.setattr(cache, "SMALL_FILE", 2)
    before = encoder_identity(model, "latents")
    weights = model / "vae" / "weights"
    status = weights.stat()
    weights.write_bytes(b"eav")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert encoder_identity(model, "latents") == before
    os.utime(weights, ns=(1, 1))
    assert encoder_identity(model, "latents") != before


def test_a_copied_model_is_the_same_model(model, tmp_path):
    import shutil

    shutil.copytree(model, tmp_path / "copy")
    assert encoder_identity(tmp_path / "copy", "text") == encoder_identity(model, "text")


def test_a_hub_id_has_its_commit_where_known(monkeypatch, tmp_path):
    import huggingface_hub

    index = tmp_path / "models--owner--name" / "snapshots" / "0123abc" / "model_index.json"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name: str(index))
    assert encoder_identity("owner/name", "text") == "owner/name@0123abc"

    def offline(repository, name):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert encoder_identity("owner/name", "text") == "owner/name@"


def test_keys_are_canonical_json():
    one = Recipe({"b": 1, "a": "é"}).key(y=1, x=(1, 2))
    two = Recipe({"a": "é", "b": 1}).key(x=[1, 2], y=1)
    assert one == two
    assert json.loads(one.text) == {"a": "é", "b": 1, "what": {"x": [1, 2], "y": 1}}
