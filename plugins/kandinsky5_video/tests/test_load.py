"""Parts load from a real folder layout; what cannot be loaded is said plainly."""

from __future__ import annotations

import shutil

import pytest
import torch
from hooktuner.errors import ModelError
from hooktuner.family import Part
from hooktuner_kandinsky5_video.tiny import build


def files_of(path):
    return {one.relative_to(path): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def test_building_is_deterministic_and_leaves_the_random_state_alone(checkpoints, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build(tmp_path / "again")
    assert torch.equal(before, torch.get_rng_state())
    assert files_of(tmp_path / "again") == files_of(checkpoints["tiny"])


def test_blocks_of_the_tiny_denoiser_do_something(make_run, plugin, make_step):
    run = make_run()
    denoiser, step = plugin.load_model(run, Part.DENOISER), make_step(make_run())
    with torch.no_grad():
        whole = plugin.predict(run, denoiser, step)
        denoiser.visual_transformer_blocks = denoiser.visual_transformer_blocks[:3]
        assert (whole - plugin.predict(run, denoiser, step)).abs().max() > 1e-3


def test_denoiser_dtypes(make_run, plugin):
    run = make_run()
    run.weight_dtype = torch.bfloat16
    kept = {
        name.split(".")[-3]
        for name, one in plugin.load_model(run, Part.DENOISER).named_parameters()
        if one.dtype == torch.float32
    }
    assert kept == {"time_embeddings", "text_modulation", "visual_modulation", "modulation"}


def test_vae_options(make_run, plugin):
    plain = plugin.load_model(make_run(), Part.VAE)
    assert plain.dtype == torch.float32
    assert (plain.use_tiling, plain.use_slicing, plain.use_framewise_encoding) == (False, False, True)
    run = make_run(vae_enable_tiling=True, vae_enable_slicing="true", vae_framewise=False, vae_dtype="bf16")
    other = plugin.load_model(run, Part.VAE)
    assert other.dtype == torch.bfloat16
    assert (other.use_tiling, other.use_slicing) == (True, True)
    assert (other.use_framewise_encoding, other.use_framewise_decoding) == (False, False)


@pytest.mark.parametrize("part", list(Part))
def test_missing_folder(make_run, plugin, tmp_path, part):
    run = make_run()
    run.model_path = tmp_path / "nowhere"
    with pytest.raises(ModelError, match=r"nowhere — there is no such folder. Give pretrained_model_name_or_path"):
        plugin.load_model(run, part)


@pytest.mark.parametrize(
    ("part", "folder"),
    [
        (Part.DENOISER, "transformer"),
        (Part.VAE, "vae"),
        (Part.TEXT_ENCODER, "text_encoder"),
        (Part.TEXT_ENCODER, "tokenizer"),
        (Part.PIPELINE, "scheduler"),
    ],
)
def test_incomplete_folder(make_run, plugin, checkpoints, tmp_path, part, folder):
    run = make_run()
    run.model_path = shutil.copytree(checkpoints["tiny"], tmp_path / "broken")
    shutil.rmtree(run.model_path / folder)
    with pytest.raises(ModelError, match=rf"broken — the part '{part}' cannot be loaded: .+ Check that it is a"):
        plugin.load_model(run, part)


def test_damaged_weights(make_run, plugin, checkpoints, tmp_path):
    run = make_run()
    run.model_path = shutil.copytree(checkpoints["tiny"], tmp_path / "broken")
    (run.model_path / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x09" * 64)
    with pytest.raises(ModelError, match="the part 'denoiser' cannot be loaded"):
        plugin.load_model(run, Part.DENOISER)


def test_nabla_denoiser_is_refused_off_cuda(make_run, plugin):
    with pytest.raises(ModelError, match="NABLA attention needs a CUDA device"):
        plugin.load_model(make_run("tiny-nabla", sparse_attention="nabla"), Part.DENOISER)


def test_nabla_is_refused_for_a_dense_checkpoint(make_run, plugin, checkpoints):
    run = make_run("tiny-nabla", sparse_attention="nabla")
    run.model_path = checkpoints["tiny"]
    with pytest.raises(ModelError, match="was trained with dense attention, and sparse_attention asks for NABLA"):
        plugin.load_model(run, Part.DENOISER)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_under_autocast_the_prediction_is_the_released_pipelines_bfloat16_prediction(make_run, plugin, make_step):
    """Time embeddings and modulations would otherwise be rounded to bfloat16 in training, and in training only."""
    run = make_run()
    run.weight_dtype = run.compute_dtype = torch.bfloat16
    denoiser = plugin.load_model(run, Part.DENOISER)
    step = make_step(run)
    with torch.no_grad():
        outside = plugin.predict(run, denoiser, step)
        with torch.autocast("cpu", torch.bfloat16):
            inside = plugin.predict(run, denoiser, step)
    assert torch.equal(inside, outside)
