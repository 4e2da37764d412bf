"""Fixtures of the harness's own tests."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def _quick_collections() -> None:
    """A run collects garbage when it releases a model. What the libraries made at import is never garbage: leaving it
    out of these collections halves the time of a small run."""
    import hooktuner.testing.conformance
    import hooktuner.train.kernel  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints that flavours build go to a temporary folder."""
    monkeypatch.setenv("HOOKTUNER_HOME", str(tmp_path_factory.mktemp("home")))
