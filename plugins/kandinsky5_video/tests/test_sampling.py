"""Validation through the real pipelines, and adapters through their loader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.kandinsky5.pipeline_kandinsky import Kandinsky5T2VPipeline
from diffusers.pipelines.kandinsky5.pipeline_kandinsky_i2v import Kandinsky5I2VPipeline
from hooktuner.errors import ModelError
from hooktuner.family import Part, SampleRequest
from hooktuner_kandinsky5_video.card import CARD
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

CLASSES = {"tiny": Kandinsky5T2VPipeline, "tiny-i2v": Kandinsky5I2VPipeline}


@pytest.fixture
def request_of(captions_encoded):
    def make(flavour="tiny", **changes):
        settings = {
            "prompt": captions_encoded["a dog"],
            "negative": captions_encoded[CARD.defaults["validation_negative_prompt"]],
            "width": 96,
            "height": 64,
            "frames": 17 if flavour == "tiny-i2v" else 5,
            "steps": 2,
            "guidance": 5.0,
            "seed": 11,
            "image": Image.new("RGB", (96, 64), (200, 30, 90)) if flavour == "tiny-i2v" else None,
            "latents_only": True,
        }
        return SampleRequest(**{**settings, **changes})

    return make


def plain_pipeline(checkpoint, flavour, request, denoiser, output_type="latent"):
    """What a user's own script does with the same settings."""
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = CLASSES[flavour].from_pretrained(checkpoint, transformer=denoiser, **none)
    pipeline.set_progress_bar_config(disable=True)
    text = {}
    for prefix, one in (("", request.prompt), ("negative_", request.negative)):
        text[f"{prefix}prompt_embeds_qwen"] = one["qwen_LD"][None]
        text[f"{prefix}prompt_embeds_clip"] = one["clip_D"][None]
        text[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, len(one["qwen_LD"])], dtype=torch.int32)
    return pipeline(
        **text,
        **({"image": request.image} if request.image is not None else {}),
        height=request.height,
        width=request.width,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=torch.Generator().manual_seed(request.seed),
        output_type=output_type,
    ).frames[0]


@pytest.mark.parametrize("flavour", ["tiny", "tiny-i2v"])
def test_samples_are_the_plain_pipelines(make_run, plugin, checkpoints, request_of, flavour):
    run, request = make_run(flavour), request_of(flavour)
    denoiser = plugin.load_model(run, Part.DENOISER)
    latents = plugin.load_model(run, Part.PIPELINE).sample(denoiser, request)
    assert latents.shape == CARD.latents.shape(request.frames, 64, 96)
    assert torch.isfinite(latents).all()
    theirs = plain_pipeline(checkpoints[flavour], flavour, request, denoiser)
    assert torch.equal(latents, theirs.permute(3, 0, 1, 2))


def test_decoded_frames(make_run, plugin, checkpoints, request_of):
    run, request = make_run(), request_of(latents_only=False)
    denoiser = plugin.load_model(run, Part.DENOISER).train()
    frames = plugin.load_model(run, Part.PIPELINE).sample(denoiser, request)
    assert (frames.dtype, frames.shape) == (np.uint8, (5, 64, 96, 3))
    theirs = plain_pipeline(checkpoints["tiny"], "tiny", request, denoiser, output_type="np")
    assert np.abs(frames - theirs * 255).max() <= 0.51
    assert denoiser.training, "the mode of the denoiser is restored"


def test_seed_and_guidance_count(make_run, plugin, request_of):
    run = make_run()
    denoiser, sampler = plugin.load_model(run, Part.DENOISER), plugin.load_model(run, Part.PIPELINE)
    first = sampler.sample(denoiser, request_of())
    assert torch.equal(first, sampler.sample(denoiser, request_of()))
    assert not torch.equal(first, sampler.sample(denoiser, request_of(seed=12)))
    assert not torch.equal(first, sampler.sample(denoiser, request_of(guidance=1.0)))


def test_sampling_uses_the_rope_scale_of_training(make_run, plugin, request_of):
    denoiser = plugin.load_model(make_run(), Part.DENOISER)
    results = [
        plugin.load_model(make_run(rope_scale=rule), Part.PIPELINE).sample(denoiser, request_of())
        for rule in ("pipeline", "hd", "sd")
    ]
    assert torch.equal(results[0], results[1]), "64x96 is below 480 pixels: the pipeline takes 3.16"
    assert not torch.equal(results[0], results[2])


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # diffusers' float32 norms
def test_i2v_keeps_working_in_bfloat16(make_run, plugin, request_of):
    run = make_run("tiny-i2v")
    run.weight_dtype = run.compute_dtype = torch.bfloat16
    denoiser = plugin.load_model(run, Part.DENOISER)
    request = request_of("tiny-i2v", width=16, height=16, steps=1, guidance=1.0, latents_only=False)
    frames = plugin.load_model(run, Part.PIPELINE).sample(denoiser, request)
    assert frames.shape == (17, 16, 16, 3)


@pytest.mark.parametrize(
    ("flavour", "changes", "sentence"),
    [
        ("tiny", {"frames": 6}, "6 frames do not fit"),
        ("tiny", {"width": 100}, "100x64 does not fit: width and height must be multiples of 16"),
        ("tiny-i2v", {"frames": 13}, "image-to-video sampling needs at least 17 frames, not 13"),
        ("tiny-i2v", {"image": None}, "image-to-video validation needs a first frame, and none was given"),
    ],
)
def test_refusals(make_run, plugin, request_of, flavour, changes, sentence):
    run = make_run(flavour)
    sampler = plugin.load_model(run, Part.PIPELINE)
    with pytest.raises(ModelError, match=sentence):
        sampler.sample(plugin.load_model(run, Part.DENOISER), request_of(flavour, **changes))


# ---------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def trained(make_run, plugin, tmp_path):
    """A denoiser with an adapter that does something, and the adapter's folder."""
    denoiser = plugin.load_model(make_run(), Part.DENOISER).requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=CARD.lora_targets))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    Kandinsky5T2VPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(denoiser))
    return denoiser, tmp_path


def test_adapter_keys(trained):
    keys = load_file(trained[1] / "pytorch_lora_weights.safetensors")
    assert len(keys) == 104
    assert "transformer.visual_transformer_blocks.3.cross_attention.out_layer.lora_B.weight" in keys
    assert all(key.startswith("transformer.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)


@pytest.mark.parametrize("flavour", ["tiny", "tiny-i2v"])
def test_adapter_through_the_official_loader(make_run, plugin, trained, request_of, checkpoints, make_step, flavour):
    live, folder = trained
    run = make_run(flavour)
    fresh = plugin.load_model(make_run(), Part.DENOISER)
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = CLASSES[flavour].from_pretrained(checkpoints[flavour], transformer=fresh, **none)
    step = make_step(run)
    with torch.no_grad():
        before = plugin.predict(run, fresh, step)
        pipeline.load_lora_weights(folder)
        assert pipeline.get_active_adapters()
        after = plugin.predict(run, fresh, step)
        assert torch.equal(after, plugin.predict(run, live, step))
        assert (after - before).abs().max() > 1e-3
    sampler = plugin.load_model(run, Part.PIPELINE)
    request = request_of(flavour)
    assert torch.equal(sampler.sample(live, request), sampler.sample(fresh, request))


@pytest.mark.parametrize("by_file", [True, False])
def test_load_adapter(make_run, plugin, trained, make_step, by_file):
    live, folder = trained
    run = make_run()
    fresh = plugin.load_model(run, Part.DENOISER)
    path = folder / "pytorch_lora_weights.safetensors" if by_file else folder
    plugin.load_model(run, Part.PIPELINE).load_adapter(fresh, path)
    step = make_step(run)
    with torch.no_grad():
        assert torch.equal(plugin.predict(run, fresh, step), plugin.predict(run, live, step))


def renamed(folder, change):
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    target = folder / "other"
    target.mkdir()
    save_file({change(key): one for key, one in weights.items()}, target / "pytorch_lora_weights.safetensors")
    return target


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda key: key.replace("transformer.", "diffusion_model.", 1), "no adapter became active"),
        (lambda key: key.removeprefix("transformer."), "no adapter became active"),
        (lambda key: key.replace("lora_A", "down").replace("lora_B", "up"), "not an adapter that Kandinsky5T2V"),
    ],
)
def test_adapters_that_diffusers_would_ignore_are_refused(make_run, plugin, trained, change, sentence):
    run = make_run()
    path = renamed(trained[1], change)
    sampler = plugin.load_model(run, Part.PIPELINE)
    with pytest.raises(ModelError, match=sentence):
        sampler.load_adapter(plugin.load_model(run, Part.DENOISER), path)
    with pytest.raises(ModelError, match=sentence):  # also where another adapter is active already
        sampler.load_adapter(trained[0], path)


def test_missing_adapter(make_run, plugin, tmp_path):
    run = make_run()
    sampler, denoiser = plugin.load_model(run, Part.PIPELINE), plugin.load_model(run, Part.DENOISER)
    with pytest.raises(ModelError, match="not an adapter that Kandinsky5T2VPipeline can load"):
        sampler.load_adapter(denoiser, tmp_path / "no.safetensors")
