"""The teacher's features: what is encoded, how, and when the encoder is there."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from hooktuner.errors import DataError, ModelError
from hooktuner.events import CachingFinished
from hooktuner.technique import Clip
from hooktuner.testing import ToyFamily, draw_clip, make_plugins, make_run
from hooktuner_crepa import encoder as encoders
from hooktuner_crepa.encoder import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_tiny,
    encode_clip,
    encoder_size,
    feature_width,
    load_encoder,
)
from hooktuner_crepa.plugin import Crepa
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel


@pytest.fixture
def setting(tmp_path):
    plugins = make_plugins(ToyFamily, Crepa)

    def make(**options):
        keys = {"crepa_enabled": True, "crepa_encoder": "tiny", "crepa_encoder_image_size": 42, **options}
        run = make_run(plugins, None, tmp_path, **keys)
        return run, run.options["crepa"]

    return make


def clip_of(frames=9, size=(64, 32), number=0):
    pixels = draw_clip(number, frames=frames, size=size)
    return Clip("test/clip", pixels, 8.0, (8, (frames - 1) // 4 + 1, size[1] // 8, size[0] // 8))


def by_hand(run, frames_THWC, size):
    """The forward pass of DINOv2 of one frame at a time, with transformers' hidden states."""
    encoder = load_encoder(run, "tiny")
    features = []
    for frame in frames_THWC:
        pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        with torch.no_grad():
            tokens = encoder((pixels - mean[:, None, None]) / std[:, None, None]).last_hidden_state[0]
        assert len(tokens) == 1 + size[0] * size[1] // 196
        features.append(tokens[1:].reshape(size[0] // 14, size[1] // 14, -1))
    return torch.stack(features)


@pytest.mark.parametrize(("frame_map", "frames"), [("center", [0, 3, 7]), ("last", [0, 4, 8])])
@pytest.mark.parametrize("batch", [-1, 1, 2])
def test_patch_features_of_the_mapped_frames(setting, frame_map, frames, batch):
    run, options = setting(crepa_frame_map=frame_map, crepa_encoder_frames_batch_size=batch)
    clip = clip_of()
    found = encode_clip(run, options, load_encoder(run, "tiny"), clip)
    assert found.dtype == torch.float16
    assert found.shape == (3, 2, 4, 32)
    assert torch.allclose(found.float(), by_hand(run, clip.frames_FHWC[frames], (28, 56)), rtol=2e-3, atol=2e-3)


def test_mean_is_of_unit_features_of_every_frame_of_the_group(setting):
    run, options = setting(crepa_frame_map="mean", crepa_encoder_frames_batch_size=4)
    clip = clip_of()
    found = encode_clip(run, options, load_encoder(run, "tiny"), clip).float()
    unit = F.normalize(by_hand(run, clip.frames_FHWC, (28, 56)), dim=-1)
    wanted = torch.stack([unit[:1].mean(0), unit[1:5].mean(0), unit[5:9].mean(0)])
    assert torch.allclose(found, wanted, atol=2e-3)


def test_frames_that_do_not_fit_the_latents_are_refused(setting):
    run, options = setting()
    clip = Clip("clips/a.mp4", np.zeros((8, 32, 32, 3), np.uint8), 8.0, (8, 3, 4, 4))
    with pytest.raises(DataError, match=r"clips/a.mp4 — 8 frames do not give 3 latent frames"):
        encode_clip(run, options, load_encoder(run, "tiny"), clip)


def test_input_size_keeps_the_aspect_ratio_and_the_area():
    assert encoder_size((512, 512), 518, 14) == (518, 518)
    assert encoder_size((480, 832), 518, 14) == (392, 686)
    assert encoder_size((832, 480), 518, 14) == (686, 392)
    assert encoder_size((100, 100), 224, 14) == (224, 224)
    assert encoder_size((16, 4000), 28, 14) == (14, 448)
    for height, width in ((480, 848), (720, 1280), (512, 768)):
        rows, columns = (side / 14 for side in encoder_size((height, width), 518, 14))
        assert rows * columns == pytest.approx(37 * 37, rel=0.03)
        assert columns / rows == pytest.approx(width / height, rel=0.03)


def test_registers_are_left_out(setting, tmp_path):
    keys = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=3, **keys)).save_pretrained(tmp_path / "reg")
    run, options = setting(crepa_encoder=str(tmp_path / "reg"))
    model = load_encoder(run, options.crepa_encoder)
    assert feature_width(options.crepa_encoder) == 16
    found = encode_clip(run, options, model, clip_of(frames=1))
    assert found.shape == (1, 2, 4, 16)
    pixels = torch.from_numpy(clip_of(frames=1).frames_FHWC).permute(0, 3, 1, 2).float() / 255
    pixels = F.interpolate(pixels, (28, 56), mode="bicubic", antialias=True).clamp(0, 1)
    pixels = (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state[0]
    assert len(tokens) == 1 + 3 + 8
    assert torch.allclose(found.float().reshape(8, 16), tokens[4:], atol=2e-3, rtol=2e-3)


def test_known_names_have_the_widths_of_their_checkpoints():
    assert [feature_width(f"dinov2_vit{size}14") for size in "sblg"] == [384, 768, 1024, 1536]
    assert encoders.ENCODERS["dinov2_vitg14"] == "facebook/dinov2-giant"


def test_the_tiny_encoder_is_the_same_every_time_and_its_layers_do_something(tmp_path):
    state = torch.get_rng_state()
    build_tiny(tmp_path / "one")
    assert torch.equal(state, torch.get_rng_state())
    build_tiny(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    model = Dinov2Model.from_pretrained(tmp_path / "one").eval()
    with torch.no_grad():
        hidden = model(torch.randn(1, 3, 28, 42), output_hidden_states=True).hidden_states
    assert all((one - two).abs().mean() > 0.05 for one, two in pairwise(hidden))


def test_an_encoder_that_cannot_be_loaded_or_is_no_dinov2_is_named(setting, tmp_path):
    run, _ = setting()
    with pytest.raises(ModelError, match=r"crepa_encoder — .*nowhere.* cannot be loaded: .* give its folder"):
        load_encoder(run, str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="is a vit, not a DINOv2"):
        load_encoder(run, str(tmp_path))
    Dinov2Config(hidden_size=12, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_encoder(run, str(tmp_path))
    assert feature_width(str(tmp_path)) == 12


@pytest.mark.parametrize("end", ["caching", "closing"])
def test_the_encoder_is_loaded_at_the_first_clip_and_freed_at_the_end(tmp_path, monkeypatch, end):
    loaded = []

    def load(run, name):
        loaded.append(load_encoder(run, name))
        return loaded[-1]

    monkeypatch.setattr(encoders, "load_encoder", load)
    plugins = make_plugins(ToyFamily, Crepa)
    run = make_run(plugins, None, tmp_path, crepa_enabled=True, crepa_encoder="tiny", crepa_encoder_image_size=42)
    assert not loaded
    plugins.encode_features(run, clip_of())
    plugins.encode_features(run, clip_of(number=1))
    assert len(loaded) == 1
    gone = weakref.ref(loaded.pop())
    gc.collect()
    assert gone() is not None
    plugins.on_event(run, CachingFinished()) if end == "caching" else run.close()
    assert gone() is None
