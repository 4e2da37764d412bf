from __future__ import annotations

import os
import shutil
import sqlite3

import pytest
from hooktuner.data import index as index_module
from hooktuner.data.index import MediaIndex
from hooktuner.data.media import is_video
from hooktuner.data.progress import PreparationStopped


@pytest.fixture
def index(tmp_path):
    return MediaIndex(tmp_path / "cache" / "index.sqlite")


def names(result):
    return [row.path for row in result.files]


def test_a_scan_finds_everything_once(index, clips):
    first = index.scan(clips, is_video)
    assert names(first) == ["a.mp4", "b.mp4", "broken.mp4", "mute.mp4", "short.mp4", "tall/c.mp4"]
    assert first.opened == 6
    assert first.files[0].info.frames == 24
    assert first.files[0].file == clips / "a.mp4"
    broken = first.files[2]
    assert broken.info is None
    assert "nvalid data" in broken.reason
    again = index.scan(clips, is_video)
    assert again.opened == 0
    assert again.files == first.files


def test_only_what_changed_is_opened(index, clips, make_clip):
    before = {row.path: row for row in index.scan(clips, is_video).files}
    make_clip(clips / "a.mp4", frames=12)
    make_clip(clips / "new.mov")
    (clips / "b.mp4").unlink()
    (clips / "mute.mp4").rename(clips / "renamed.mp4")
    result = index.scan(clips, is_video)
    after = {row.path: row for row in result.files}
    assert result.opened == 3
    assert sorted(after) == ["a.mp4", "broken.mp4", "new.mov", "renamed.mp4", "short.mp4", "tall/c.mp4"]
    assert after["a.mp4"].info.frames == 12
    assert after["a.mp4"].digest != before["a.mp4"].digest
    assert after["renamed.mp4"].digest == before["mute.mp4"].digest  # so its cache entries are found
    with sqlite3.connect(index.path) as connection:
        rows = {path for (path,) in connection.execute("SELECT path FROM files")}
    connection.close()
    assert rows == set(after)


def test_a_broken_file_is_read_again_once_it_changes(index, clips, make_clip):
    assert index.scan(clips, is_video).files[2].info is None
    make_clip(clips / "broken.mp4")
    result = index.scan(clips, is_video)
    assert result.opened == 1
    assert result.files[2].info.frames == 24
    assert result.files[2].reason is None


def test_a_new_time_with_the_same_size_counts_as_changed(index, clips):
    index.scan(clips, is_video)
    os.utime(clips / "a.mp4", ns=(1, 1))
    assert index.scan(clips, is_video).opened == 1


def test_folders_do_not_mix(index, clips, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(clips / "tall", other)
    index.scan(clips, is_video)
    assert names(index.scan(other, is_video)) == ["c.mp4"]
    assert len(index.scan(clips, is_video).files) == 6


def test_hidden_files_are_skipped_and_link_loops_end(index, clips):
    shutil.copy(clips / "a.mp4", clips / ".a.mp4")
    (clips / "tall" / "loop").symlink_to(clips)
    (clips / "linked").symlink_to(clips / "tall")
    (clips / "gone.mp4").symlink_to(clips / "nowhere.mp4")
    assert len(names(index.scan(clips, is_video))) == 6


def test_an_index_that_is_no_database_is_made_anew(index, clips):
    index.scan(clips, is_video)
    index.path.write_bytes(b"garbage" * 500)
    assert MediaIndex(index.path).scan(clips, is_video).opened == 6


def test_an_index_of_another_version_is_made_anew(index, clips, monkeypatch):
    index.scan(clips, is_video)
    monkeypatch.setattr(index_module, "VERSION", index_module.VERSION + 1)
    assert MediaIndex(index.path).scan(clips, is_video).opened == 6


def test_an_interrupted_scan_keeps_what_it_has(index, clips):
    answers = iter([False, False, True])
    with pytest.raises(PreparationStopped, match=r"interrupted after 3 of 6\. What is done is kept: run it again"):
        index.scan(clips, is_video, stop=lambda: next(answers), threads=1)
    assert index.scan(clips, is_video).opened == 3
