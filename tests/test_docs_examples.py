"""What the docs tell people to do is done here."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
from hooktuner.assemble import assemble
from hooktuner.draft import read_draft
from hooktuner.testing import make_project

ROOT = Path(__file__).parents[1]


def blocks(path: Path, language: str) -> list[str]:
    """Fenced code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.S | re.M)


def test_the_example_with_a_hook_of_ones_own_runs(tmp_path, capsys):
    config = make_project(
        tmp_path, family="kandinsky5-video", flavour="tiny", frames=5, size=(64, 64), max_train_steps=2
    )
    runpy.run_path(str(ROOT / "docs/examples/own_hook.py"))["main"](str(config))
    assert "finished after 2 steps" in capsys.readouterr().out


def test_the_readmes_config_and_datasets_pass_as_they_stand(tmp_path, monkeypatch):
    datasets, config = blocks(ROOT / "README.md", "json")
    (tmp_path / "datasets/videos").mkdir(parents=True)
    (tmp_path / "datasets.json").write_text(datasets)
    (tmp_path / "config.json").write_text(config)
    monkeypatch.chdir(tmp_path)
    assembled = assemble(read_draft("config.json"))
    try:
        assert assembled.run.config.learning_rate == 1e-4
        assert assembled.run.flavour.name == "t2v-lite-sft-5s"
    finally:
        assembled.close()


def test_the_quickstarts_python_runs(tmp_path, monkeypatch):
    (source,) = blocks(ROOT / "docs/quickstart.md", "python")
    make_project(tmp_path, family="kandinsky5-video", flavour="tiny", frames=5, size=(64, 64), max_train_steps=1)
    monkeypatch.chdir(tmp_path)
    exec(compile(source.replace('"500"', '"2"'), "quickstart", "exec"), {})
    assert len((tmp_path / "output/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_the_demos_config_is_what_the_demo_runs():
    config = json.loads((ROOT / "demo/config.json").read_text())
    assert config["data_backend_config"] == "demo/datasets.json"
    assert (ROOT / config["data_backend_config"]).is_file()
