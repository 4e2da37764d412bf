"""Every technique with every family, for adapters and full weights, and every pair of techniques: each trains on the
tiny checkpoint, or is refused before weights load by a sentence that the docs contain."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import hooktuner
import pytest
from hooktuner.errors import ConfigError
from hooktuner.testing import make_project
from rich.console import Console
from safetensors import safe_open

QUIET = Console(quiet=True)
ROOT = Path(__file__).parents[1]

TECHNIQUES = {
    "tread": {
        "tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]},
        "tread_disable_after": 1.0,
    },
    "crepa": {"crepa_enabled": True, "crepa_encoder": "tiny", "crepa_encoder_image_size": 28, "crepa_block_index": 1},
    "scheduled-sampling": {"scheduled_sampling_max_step_offset": 60, "scheduled_sampling_probability": 0.7},
    "group-offload": {"enable_group_offload": True},
}
FAMILIES = [("kandinsky5-video", "tiny"), ("kandinsky5-video", "tiny-i2v")]
REFUSED = {("group-offload", "full"): "group offload streams frozen weights"}
"""(technique, model_type) → how the refusal begins."""


def train(folder, techniques, family, *, steps=2, **config):
    """A short run with the techniques switched on by their config keys."""
    name, flavour = family
    keys = {key: value for technique in techniques for key, value in TECHNIQUES[technique].items()}
    path = make_project(
        folder, family=name, flavour=flavour, size=(64, 64), frames=17 if flavour == "tiny-i2v" else 9,
        max_train_steps=steps, train_batch_size=2, checkpoint_step_interval=steps, **keys, **config,
    )  # fmt: skip
    return hooktuner.run(path, console=QUIET)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[1])
def test_a_technique_on_a_family(tmp_path, technique, family, kind):
    reason = REFUSED.get((technique, kind))
    if reason is None:
        result = train(tmp_path, [technique], family, model_type=kind)
        assert result.steps == 2
        assert all(map(math.isfinite, result.losses))
        return
    with pytest.raises(ConfigError, match=reason):
        train(tmp_path, [technique], family, model_type=kind)
    assert not (tmp_path / "cache").exists(), "refused only after something was loaded"
    readme = (ROOT / f"plugins/{technique.replace('-', '_')}/README.md").read_text(encoding="utf-8")
    assert reason in " ".join(readme.split())


@pytest.mark.parametrize("pair", list(itertools.combinations(TECHNIQUES, 2)), ids=lambda pair: "+".join(pair))
def test_two_techniques_together(tmp_path, pair):
    result = train(tmp_path, pair, FAMILIES[0], lora_dropout=0.1)
    assert all(map(math.isfinite, result.losses))


def test_all_four_resume_exactly_and_leave_nothing_in_the_adapter(tmp_path):
    more = {"crepa_similarity_threshold": 0.9, "crepa_threshold_mode": "recoverable", "crepa_warmup_steps": 2}
    whole = train(tmp_path / "whole", TECHNIQUES, FAMILIES[0], steps=4, **more)

    class StopAfterTwo:
        name = "stop"

        @hooktuner.hookimpl
        def on_event(self, run, event):
            if type(event).__name__ == "StepFinished" and event.result.number == 2:
                import os

                os.kill(os.getpid(), 2)

    keys = {key: value for technique in TECHNIQUES.values() for key, value in technique.items()}
    path = make_project(
        tmp_path / "parts", family="kandinsky5-video", flavour="tiny", size=(64, 64), frames=9, max_train_steps=4,
        train_batch_size=2, checkpoint_step_interval=4, **keys, **more,
    )  # fmt: skip
    assert hooktuner.run(path, plugins=[StopAfterTwo], console=QUIET).steps == 2
    resumed = hooktuner.run(path, console=QUIET)
    for name in ("pytorch_lora_weights.safetensors", "state/trainables.safetensors", "state/optimizer.safetensors"):
        assert (whole.checkpoint / name).read_bytes() == (resumed.checkpoint / name).read_bytes(), name
    metrics = [(tmp_path / name / "output/metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]
    with safe_open(whole.checkpoint / "pytorch_lora_weights.safetensors", framework="pt") as adapter:
        assert all(re.fullmatch(r"transformer\..*\.lora_[AB]\.weight", key) for key in list(adapter.keys()))


@pytest.mark.parametrize("folder", sorted((ROOT / "plugins").glob("*/hooktuner_*")), ids=lambda folder: folder.name)
def test_no_package_names_another_plugin(folder):
    """No family names a technique, no technique names a family, the core names neither."""
    if folder.name == "hooktuner_catalogue":
        return  # its whole content is names
    others = [name for name in (*TECHNIQUES, "kandinsky", "sana") if name not in folder.name.replace("_", "-")]
    words = [other.replace("-", "[-_ ]") for other in others]
    for path in folder.rglob("*.py"):
        found = re.findall(rf"(?i)(?<![a-z])(?:{'|'.join(words)})", path.read_text(encoding="utf-8"))
        assert not found, f"{path} names {found}"
