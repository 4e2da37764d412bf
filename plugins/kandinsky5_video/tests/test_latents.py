"""Clips to latents, and the memory switches of the VAE."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d
from hooktuner.errors import ModelError
from hooktuner.family import Part
from hooktuner_kandinsky5_video.options import Kandinsky5VideoOptions
from hooktuner_kandinsky5_video.patch_conv import enable_patch_conv


def clips(frames=9, height=64, width=96, count=2):
    return torch.rand(count, 3, frames, height, width, generator=torch.Generator().manual_seed(5)) * 2 - 1


def test_latents_are_the_scaled_mode(make_run, plugin):
    run, pixels = make_run(), clips()
    vae = plugin.load_model(run, Part.VAE)
    encoded = plugin.encode_latents(run, vae, pixels)
    assert set(encoded) == {"latents"}
    assert encoded["latents"].shape == (2, *run.card.latents.shape(9, 64, 96))
    with torch.no_grad():
        assert torch.equal(encoded["latents"], vae.encode(pixels).latent_dist.mode() * 0.476986)


def test_first_latent_is_the_first_frame_encoded_alone(make_run, plugin):
    run, pixels = make_run("tiny-i2v"), clips()
    vae = plugin.load_model(run, Part.VAE)
    encoded = plugin.encode_latents(run, vae, pixels)
    alone = plugin.encode_latents(make_run(), vae, pixels[:, :, :1])["latents"]
    assert torch.equal(encoded["first_latent"], alone)
    # It is not the clip's own first latent frame, which has seen the other frames.
    assert (encoded["first_latent"] - encoded["latents"][:, :, :1]).abs().max() > 1e-4


def test_posterior_sample_is_a_function_of_the_clip(make_run, plugin):
    run, pixels = make_run(vae_sample_posterior=True), clips()
    vae = plugin.load_model(run, Part.VAE)
    both = plugin.encode_latents(run, vae, pixels)["latents"]
    assert torch.equal(both, plugin.encode_latents(run, vae, pixels)["latents"])
    torch.testing.assert_close(both[1:], plugin.encode_latents(run, vae, pixels[1:])["latents"], atol=1e-5, rtol=0)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    normal = (both / 0.476986 - posterior.mode()) / posterior.std
    assert abs(normal.mean()) < 0.05
    assert abs(normal.std() - 1) < 0.05
    assert (normal[0] - normal[1]).abs().max() > 0.5


def test_frames_and_sizes_that_the_vae_would_cut_are_refused(make_run, plugin):
    run = make_run()
    vae = plugin.load_model(run, Part.VAE)
    with pytest.raises(ModelError, match=r"num_frames — 10 frames do not fit: .* 4k\+1; the nearest are 9 or 13"):
        plugin.encode_latents(run, vae, clips(frames=10))
    with pytest.raises(ModelError, match=r"clips of 88x64 pixels do not fit: .* multiples of 16"):
        plugin.encode_latents(run, vae, clips(width=88))
    with pytest.raises(ModelError, match="multiples of 128"):
        plugin.encode_latents(make_run("tiny-nabla"), vae, clips(width=96))


def test_framewise_encoding_changes_latents_and_is_in_the_cache_key(make_run, plugin):
    pixels = clips(frames=25, height=32, width=32, count=1)
    runs = [make_run(vae_framewise=value) for value in (True, False)]
    first, second = (plugin.encode_latents(run, plugin.load_model(run, Part.VAE), pixels)["latents"] for run in runs)
    assert (first - second).abs().max() > 1e-4
    assert "vae_framewise" in Kandinsky5VideoOptions.cache_fields["latents"]
    assert {"vae_enable_tiling", "vae_dtype", "vae_sample_posterior"} <= set(
        Kandinsky5VideoOptions.cache_fields["latents"]
    )
    assert Kandinsky5VideoOptions.cache_fields["text"] == ("tokenizer_max_length",)


# ------------------------------------------------------------------------------------------------- patch conv


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2, (1, 2, 2)])
@pytest.mark.parametrize("frames", [1, 2, 9, 10])
@pytest.mark.parametrize("run", [1, 3])
def test_patch_conv_is_exact(kernel, stride, frames, run):
    torch.manual_seed(0)
    conv = HunyuanVideoCausalConv3d(4, 6, kernel, stride).double()
    hidden = torch.randn(2, 4, frames, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        plain = conv(hidden)
        assert enable_patch_conv(conv, frames=run) == 1
        torch.testing.assert_close(conv(hidden), plain, atol=1e-12, rtol=0)


@pytest.fixture
def conv_frames(monkeypatch):
    """The numbers of frames of the inputs of all 3-D convolutions."""
    seen = []
    original = torch.nn.Conv3d.forward
    monkeypatch.setattr(torch.nn.Conv3d, "forward", lambda self, x: (seen.append(x.shape[2]), original(self, x))[1])
    return seen


def test_patch_conv_of_the_whole_vae(make_run, plugin, conv_frames):
    run, pixels = make_run(), clips(frames=13, count=1)
    vae = plugin.load_model(run, Part.VAE)
    with torch.no_grad():
        plain = plugin.encode_latents(run, vae, pixels)["latents"]
        video = vae.decode(plain / 0.476986).sample
        longest = max(conv_frames)
        conv_frames.clear()
        assert enable_patch_conv(vae) > 20
        torch.testing.assert_close(plugin.encode_latents(run, vae, pixels)["latents"], plain, atol=1e-5, rtol=0)
        torch.testing.assert_close(vae.decode(plain / 0.476986).sample, video, atol=1e-4, rtol=0)
    assert (longest, max(size for size in conv_frames if size != 13 and size != 4)) == (15, 3)


def test_the_option_switches_patch_conv_on_for_this_vae_only(make_run, plugin):
    patched = plugin.load_model(make_run(vae_enable_patch_conv="true"), Part.VAE)
    plain = plugin.load_model(make_run(), Part.VAE)

    def wrapped(vae):
        return sum("forward" in vars(one) for one in vae.modules() if isinstance(one, HunyuanVideoCausalConv3d))

    assert wrapped(patched) > 20
    assert wrapped(plain) == 0


def peak_bytes(call):
    """The most memory that torch's CPU allocator had handed out at once, workspaces of kernels included."""
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_patch_conv_lowers_the_peak(make_run, plugin):
    pixels, latents = clips(frames=13, count=1), torch.randn(1, 16, 4, 8, 12)
    plain, patched = (plugin.load_model(make_run(vae_enable_patch_conv=value), Part.VAE) for value in (False, True))
    assert peak_bytes(lambda: patched.encode(pixels)) < 0.5 * peak_bytes(lambda: plain.encode(pixels))
    assert peak_bytes(lambda: patched.decode(latents)) < 0.5 * peak_bytes(lambda: plain.decode(latents))
