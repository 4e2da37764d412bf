"""The prediction is what the released pipelines compute; the image-to-video contract; unequal captions."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers.pipelines.kandinsky5.pipeline_kandinsky import Kandinsky5T2VPipeline
from diffusers.pipelines.kandinsky5.pipeline_kandinsky_i2v import Kandinsky5I2VPipeline
from hooktuner import flow
from hooktuner.errors import ModelError
from hooktuner.family import Part
from PIL import Image


class Stop(Exception):
    """The first call of the denoiser is over."""


def first_call(checkpoint, denoiser, text, *, noise_1CFHW, timestep, image=None):
    """Arguments and output of the first denoiser call of the unmodified pipeline."""
    cls = Kandinsky5I2VPipeline if image is not None else Kandinsky5T2VPipeline
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = cls.from_pretrained(checkpoint, transformer=denoiser, **none)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.set_timesteps = lambda *_, **__: None
    pipeline.scheduler.timesteps = timestep
    seen: dict[str, Any] = {}

    def capture(_, args, kwargs, output):
        seen.update(kwargs, output=output.sample)
        raise Stop

    handle = denoiser.register_forward_hook(capture, with_kwargs=True)
    frames, rows, columns = noise_1CFHW.shape[2:]
    module = inspect.getmodule(cls)
    original = module.randn_tensor
    module.randn_tensor = lambda *_, **__: noise_1CFHW.permute(0, 2, 3, 4, 1).contiguous()
    try:
        pipeline(
            **({"image": image} if image is not None else {}),
            prompt_embeds_qwen=text["qwen_LD"][None],
            prompt_embeds_clip=text["clip_D"][None],
            prompt_cu_seqlens=torch.tensor([0, text["qwen_LD"].shape[0]], dtype=torch.int32),
            height=rows * 8,
            width=columns * 8,
            num_frames=4 * frames - 3,
            num_inference_steps=1,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
        )
    except Stop:
        return seen
    finally:
        module.randn_tensor = original
        handle.remove()
    raise AssertionError("the pipeline did not call the denoiser")


def test_t2v_prediction_is_the_pipelines_bit_for_bit(make_run, plugin, make_step, checkpoints):
    run = make_run()
    denoiser, step = plugin.load_model(run, Part.DENOISER), make_step(run)
    with torch.no_grad():
        ours = plugin.predict(run, denoiser, step)
    for row in range(2):
        theirs = first_call(
            checkpoints["tiny"],
            denoiser,
            step.batch.text[row],
            noise_1CFHW=step.noisy_BCFHW[row : row + 1],
            timestep=step.timestep_B[row : row + 1],
        )
        assert theirs["hidden_states"].shape[-1] == 33
        assert torch.equal(ours[row], theirs["output"][0].permute(3, 0, 1, 2))


def test_i2v_prediction_is_the_pipelines_bit_for_bit(make_run, plugin, make_step, checkpoints):
    run = make_run("tiny-i2v")
    denoiser, vae = plugin.load_model(run, Part.DENOISER), plugin.load_model(run, Part.VAE)
    pixels = torch.randint(0, 256, (1, 3, 1, 64, 96), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    image = Image.fromarray(pixels[0, :, 0].permute(1, 2, 0).numpy())
    with torch.no_grad():
        encoded = plugin.encode_latents(run, vae, pixels.float() / 127.5 - 1)["first_latent"]
        step = make_step(run, ["a dog"], extras={"first_latent": encoded})
        theirs = first_call(
            checkpoints["tiny-i2v"],
            denoiser,
            step.batch.text[0],
            noise_1CFHW=step.noisy_BCFHW,
            timestep=step.timestep_B,
            image=image,
        )
        # The pipeline draws its image from the posterior, where training takes the mode: put its draw into the step.
        drawn = theirs["hidden_states"][:, :1, ..., :16].permute(0, 4, 1, 2, 3)
        posterior = vae.encode(pixels.float() / 127.5 - 1).latent_dist
        assert ((drawn - encoded).abs() < 6 * posterior.std * vae.config.scaling_factor).all()
        step.noisy_BCFHW[:, :, :1] = drawn
        assert torch.equal(plugin.predict(run, denoiser, step), theirs["output"].permute(0, 4, 1, 2, 3))


def test_the_captured_call_reacts_to_what_it_should(make_run, plugin, make_step, checkpoints):
    """The bit-for-bit tests could not pass with another rope scale, timestep or text."""
    run = make_run()
    denoiser, step = plugin.load_model(run, Part.DENOISER), make_step(run)
    with torch.no_grad():
        right = plugin.predict(run, denoiser, step)
        assert not torch.equal(right, plugin.predict(make_run(rope_scale="sd"), denoiser, step))
        step.timestep_B = step.timestep_B + 1
        assert not torch.equal(right, plugin.predict(run, denoiser, step))


def test_captions_of_unequal_length_do_not_touch_each_other(make_run, plugin, make_step):
    run = make_run()
    denoiser = plugin.load_model(run, Part.DENOISER)
    captions = ["a dog", "a very long tale of two cats & a dog that   cross the bridge at dusk", ""]
    step = make_step(run, captions)
    assert len({text["qwen_LD"].shape[0] for text in step.batch.text}) == 3
    with torch.no_grad():
        together = plugin.predict(run, denoiser, step)
        for row in range(3):
            alone = make_step(run, captions)
            batch = alone.batch
            batch.text, batch.keys, batch.index = [batch.text[row]], [batch.keys[row]], [batch.index[row]]
            one = slice(row, row + 1)
            alone.noisy_BCFHW, alone.timestep_B = alone.noisy_BCFHW[one], alone.timestep_B[one]
            assert torch.equal(together[one], plugin.predict(run, denoiser, alone))


def test_equal_lengths_share_one_call_and_rows_keep_their_order(make_run, plugin, make_step):
    run = make_run()
    denoiser = plugin.load_model(run, Part.DENOISER)
    captions = ["a dog", "", "a cat", ""]
    step = make_step(run, captions)
    lengths = [text["qwen_LD"].shape[0] for text in step.batch.text]
    assert lengths[1] == lengths[3]
    rows = []
    handle = denoiser.register_forward_pre_hook(lambda *_: rows.append(tuple(step.rows)))
    with torch.no_grad():
        together = plugin.predict(run, denoiser, step)
        handle.remove()
        assert sorted(row for call in rows for row in call) == [0, 1, 2, 3]
        assert (1, 3) in rows
        assert step.rows is None
        for row in range(4):
            alone = make_step(run, captions)
            one = slice(row, row + 1)
            alone.batch.text = [alone.batch.text[row]]
            alone.noisy_BCFHW, alone.timestep_B = alone.noisy_BCFHW[one], alone.timestep_B[one]
            torch.testing.assert_close(together[one], plugin.predict(run, denoiser, alone), atol=1e-5, rtol=0)


def test_gradients_reach_the_weights_through_every_group(make_run, plugin, make_step):
    run = make_run()
    denoiser, step = plugin.load_model(run, Part.DENOISER), make_step(run)
    per_row = []
    for row in range(2):
        denoiser.zero_grad()
        plugin.predict(run, denoiser, step)[row].square().mean().backward()
        per_row.append(denoiser.visual_transformer_blocks[0].feed_forward.in_layer.weight.grad.clone())
    assert all(gradient.abs().max() > 0 for gradient in per_row)
    assert not torch.equal(*per_row)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # diffusers' float32 norms
def test_bfloat16_weights_keep_the_timestep_in_float32(make_run, plugin, make_step):
    run, dtypes = make_run(), {}
    run.weight_dtype = torch.bfloat16
    denoiser, step = plugin.load_model(run, Part.DENOISER), make_step(run)
    denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: dtypes.update({name: getattr(one, "dtype", None) for name, one in kwargs.items()}),
        with_kwargs=True,
    )
    with torch.no_grad():
        velocity = plugin.predict(run, denoiser, step)
    assert dtypes["timestep"] == torch.float32
    assert dtypes["hidden_states"] == dtypes["encoder_hidden_states"] == torch.bfloat16
    assert velocity.dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------- image to video


def call_input(plugin, run, denoiser, step):
    seen = []
    handle = denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        plugin.predict(run, denoiser, step)
    handle.remove()
    return torch.cat(seen)


def test_i2v_contract(make_run, plugin, make_step):
    run = make_run("tiny-i2v")
    denoiser, step = plugin.load_model(run, Part.DENOISER), make_step(run, ["", ""])
    first = step.batch.extras["first_latent"]
    sent = call_input(plugin, run, denoiser, step)
    assert torch.equal(sent[:, 0, ..., :16], first[:, :, 0].permute(0, 2, 3, 1)), "frame 0 is clean"
    noised = flow.interpolate(step.batch.latents_BCFHW, step.batch.noise_BCFHW, step.sigma_B)
    assert torch.equal(sent[:, 1:, ..., :16], noised[:, :, 1:].permute(0, 2, 3, 4, 1)), "the others are noised"
    assert not sent[..., 16:32].any(), "the condition channels are zero"
    assert (sent[:, 0, ..., 32] == 1).all(), "the mask is 1 on frame 0"
    assert not sent[:, 1:, ..., 32].any(), "and 0 on the others"


def test_no_loss_on_the_given_frame(make_run, plugin, make_step):
    step = make_step(make_run("tiny-i2v"))
    weight = step.weight_B1FHW
    prediction = torch.zeros_like(step.target_BCFHW, requires_grad=True)
    loss = flow.mean_squared_error(prediction, step.target_BCFHW, weight)
    loss.sum().backward()
    assert not prediction.grad[:, :, 0].any()
    assert prediction.grad[:, :, 1:].all()
    torch.testing.assert_close(loss, step.target_BCFHW[:, :, 1:].square().flatten(1).mean(1))


def test_text_to_video_has_no_given_latents(make_run, plugin, make_step):
    run = make_run()
    step = make_step(run)
    assert step.conditioning is None
    assert not call_input(plugin, run, plugin.load_model(run, Part.DENOISER), step)[..., 16:].any()


def test_share_of_samples_that_train_as_text_to_video(make_run, make_step):
    run = make_run("tiny-i2v", i2v_dropout_probability=0.25)
    captions, shape = [""] * 400, (2, 2, 2)
    given = make_step(run, captions, shape).conditioning.given_B1FHW[:, 0, 0, 0, 0]
    assert 0.68 < given.float().mean() < 0.82
    # A function of seed and sample number: another order gives each sample the same answer.
    turned = make_step(run, captions, shape, index=list(range(400))[::-1]).conditioning.given_B1FHW[:, 0, 0, 0, 0]
    assert torch.equal(turned.flip(0), given)
    other = make_run("tiny-i2v", {"seed": 1}, i2v_dropout_probability=0.25)
    assert not torch.equal(make_step(other, captions, shape).conditioning.given_B1FHW[:, 0, 0, 0, 0], given)
    assert make_step(make_run("tiny-i2v", i2v_dropout_probability=1.0)).conditioning is None
    assert make_step(make_run("tiny-i2v"), captions, shape).conditioning.given_B1FHW[:, :, 0].all()


def test_mask_channel_is_per_sample(make_run, plugin, make_step):
    run = make_run("tiny-i2v")
    extras = {"first_latent": torch.randn(2, 16, 1, 8, 12), "first_frame": torch.tensor([True, False])}
    step = make_step(run, ["", ""], extras=extras)
    sent = call_input(plugin, run, plugin.load_model(run, Part.DENOISER), step)
    assert (sent[0, 0, ..., 32] == 1).all()
    assert not sent[1, ..., 32].any()
    noised = flow.interpolate(step.batch.latents_BCFHW, step.batch.noise_BCFHW, step.sigma_B)
    assert torch.equal(sent[1, ..., :16], noised[1].permute(1, 2, 3, 0))


def test_single_images_train_as_text_to_video(make_run, make_step):
    assert make_step(make_run("tiny-i2v"), shape=(1, 8, 12)).conditioning is None


def test_cache_without_first_frames_is_refused(make_run, make_step):
    with pytest.raises(ModelError, match="clip0, clip1 — cached without a first frame, which the flavour tiny-i2v"):
        make_step(make_run("tiny-i2v"), extras={})
