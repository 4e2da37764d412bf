"""The generator of the docs pages notices a page that is out of date, and only then."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "docs_pages.py"


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_pages", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "plugins").symlink_to(TOOL.parent.parent / "plugins")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_written_pages_are_up_to_date(pages: ModuleType) -> None:
    assert pages.main([]) == 0
    assert pages.main(["--check"]) == 0


def test_a_page_that_is_out_of_date(pages: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages.main([])
    (tmp_path / "docs/config.md").write_text("old")
    (tmp_path / "docs/cli.md").unlink()
    assert pages.main(["--check"]) == 2
    assert capsys.readouterr().out == "out of date: docs/config.md, docs/cli.md. Run `make docs`.\n"


def test_pages_say_what_the_code_says(pages: ModuleType) -> None:
    hooks, config, cli = pages.hooks_page(), pages.config_page(), pages.cli_page()
    assert "predict(run: Run, denoiser: torch.nn.Module, step: Step) -> torch.Tensor" in hooks
    assert "- **Returns:** velocity (B, C, F, H, W)" in hooks
    assert "| `frame_rate` | number, above 0 | the family's | Frames per second" in config
    assert "Also written `framerate`." in config
    assert "`vae_enable_patch_conv`" in config
    assert "Usage: tuner config explain" in cli
