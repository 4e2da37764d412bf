"""The toy family is a real model: it learns, checkpoints, routes, saves, and its parts compute what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hooktuner import flow
from hooktuner.errors import ConfigError, ModelError
from hooktuner.family import BlockTokens, Grid, Part, SampleRequest
from hooktuner.testing import (
    ToyAnatomy,
    ToyCodec,
    ToyDenoiser,
    ToyFamily,
    ToyTextEncoder,
    build_checkpoint,
    draw_clip,
    load_denoiser,
    make_batch,
    make_plugins,
    make_run,
    make_step,
)
from hooktuner.testing.toy_model import PATCH, from_patches, to_patches
from PIL import Image


@pytest.mark.parametrize("flavour", ["toy", "toy-i2v"])
def test_it_learns(flavour: str, tmp_path: Path) -> None:
    """The loss on one batch falls to less than a half in 30 steps of AdamW."""
    plugins = make_plugins(ToyFamily)
    run = make_run(plugins, flavour, tmp_path)
    denoiser = load_denoiser(run, plugins)
    step = make_step(run, plugins, make_batch(run, plugins))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        velocity = plugins.predict(run, denoiser, step)
        loss = flow.mean_squared_error(velocity, step.target_BCFHW, step.weight_B1FHW).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_every_parameter_has_a_gradient(tmp_path: Path) -> None:
    """No layer is initialised to zero, so tests of adapters and of techniques are not vacuous."""
    plugins = make_plugins(ToyFamily)
    run = make_run(plugins, "toy", tmp_path)
    denoiser = load_denoiser(run, plugins)
    plugins.predict(run, denoiser, make_step(run, plugins, make_batch(run, plugins))).square().mean().backward()
    dead = [name for name, one in denoiser.named_parameters() if one.grad is None or one.grad.abs().max() == 0]
    assert not dead


def test_checkpointing_calls_every_block_once_and_only_with_gradients(tmp_path: Path) -> None:
    plugins = make_plugins(ToyFamily)
    run = make_run(plugins, "toy", tmp_path)
    denoiser = load_denoiser(run, plugins)
    step = make_step(run, plugins, make_batch(run, plugins))
    called: list[torch.nn.Module] = []

    def record(block: torch.nn.Module, *args: object) -> torch.Tensor:
        called.append(block)
        return block(*args)

    denoiser.enable_gradient_checkpointing(record)  # type: ignore[operator]
    with torch.no_grad():
        plugins.predict(run, denoiser, step)
    assert not called
    plugins.predict(run, denoiser, step)
    anatomy = ToyAnatomy()
    assert called == [*anatomy.extra_blocks(denoiser), *anatomy.blocks(denoiser)]


def test_routed_tokens_keep_their_positions() -> None:
    """A block without cross-attention effects treats a kept token by its own position, not by its rank."""
    torch.manual_seed(0)
    model = ToyDenoiser().eval()
    anatomy, captured = ToyAnatomy(), []
    model.enable_gradient_checkpointing(lambda block, *args: captured.append((block, args)) or block(*args))
    model(torch.randn(2, 8, 2, 4, 6), torch.tensor([100.0, 900.0]), torch.randn(2, 5, 32))
    block, args = captured[1]
    tokens = anatomy.read(args)
    assert tokens.grid == Grid(2, 2, 3)
    order_BK = torch.tensor([[11, 3, 7, 0], [1, 2, 9, 10]])
    rows = torch.arange(2)[:, None]
    sides = ((tokens.sides[0][0].expand(2, -1, -1, -1)[rows, order_BK], 1),)
    kept = BlockTokens(tokens.tokens_BND[rows, order_BK], sides, None)
    routed = block(*anatomy.write(args, kept, order_BK))
    shuffled = order_BK.flip(1)
    sides = ((tokens.sides[0][0].expand(2, -1, -1, -1)[rows, shuffled], 1),)
    again = block(*anatomy.write(args, BlockTokens(tokens.tokens_BND[rows, shuffled], sides, None), shuffled))
    torch.testing.assert_close(again.flip(1), routed)
    assert anatomy.read(anatomy.write(args, kept, order_BK)).grid is None
    wrong = BlockTokens(kept.tokens_BND, ((tokens.sides[0][0][:, :4].expand(2, -1, -1, -1), 1),), None)
    assert not torch.allclose(block(*anatomy.write(args, wrong, order_BK)), routed), "positions have no effect"


def test_given_frames_must_be_kept(tmp_path: Path) -> None:
    plugins = make_plugins(ToyFamily)
    run = make_run(plugins, "toy-i2v", tmp_path, toy_first_frame_probability=0.5, seed=0)
    batch = make_batch(run, plugins, captions=["a"] * 6)
    step = make_step(run, plugins, batch)
    assert step.conditioning is not None
    chosen = step.conditioning.given_B1FHW[:, 0, 0, 0, 0]
    assert 0 < chosen.sum() < 6, "the seed should give some samples a first frame and not others"
    rope = torch.zeros(1, 3, 2, 2, 2, 8)
    must = ToyAnatomy().keepable((torch.zeros(6, 12, 64), None, None, rope, None), step).must_keep_BN
    assert must is not None
    assert torch.equal(must, (torch.arange(12) < 4) & chosen[:, None])
    first = step.noisy_BCFHW[:, :, 0]
    assert torch.equal(first[chosen], batch.extras["first_latent"][:, :, 0][chosen])
    assert not torch.equal(first[~chosen], batch.extras["first_latent"][:, :, 0][~chosen])


def test_patches_there_and_back() -> None:
    latents = torch.randn(2, 8, 3, 4, 6)
    patches = to_patches(latents)
    assert patches.shape == (2, 3 * 2 * 3, 8 * PATCH * PATCH)
    assert torch.equal(patches[0, 1].unflatten(0, (8, 2, 2)), latents[0, :, 0, 0:2, 2:4]), "not in raster order"
    assert torch.equal(from_patches(patches, Grid(3, 2, 3)), latents)


def test_codec_is_a_projection() -> None:
    """Channel means come out scaled, the first frame is encoded alone, and decoded latents encode to themselves."""
    codec = ToyCodec(scaling_factor=3.0)
    flat = torch.tensor([0.5, -0.25, 1.0])[None, :, None, None, None].expand(1, 3, 9, 16, 24)
    latents = codec.encode(flat)
    assert latents.shape == (1, 8, 3, 2, 3)
    wanted = torch.tensor([1.5, -0.75, 3.0, 0, 0, 0, 0, 0])[None, :, None, None, None].expand_as(latents)
    torch.testing.assert_close(latents, wanted, atol=1e-5, rtol=0)
    clip = torch.from_numpy(draw_clip(1, frames=9, size=(48, 32))).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    latents = codec.encode(clip)
    torch.testing.assert_close(codec.encode(clip[:, :, :1]), latents[:, :, :1])
    torch.testing.assert_close(codec.encode(codec.decode(latents)), latents, atol=1e-4, rtol=0)
    assert latents[:, 5:, 0].abs().max() < 1e-5 < latents[:, 5:, 1:].abs().max()
    assert (codec.decode(latents) - clip).abs().mean() < 0.15, "the clip is not recognisable"


def test_text_features_are_hashes_of_words_and_places() -> None:
    encoder = ToyTextEncoder()
    one, two = encoder.encode("a red disc", 32), encoder.encode("a blue disc", 32)
    assert one.shape == (4, 32)
    assert torch.equal(one[[0, 1, 3]], two[[0, 1, 3]])
    assert not torch.equal(one[2], two[2])
    assert encoder.encode("", 32).shape == (1, 32)
    assert torch.equal(encoder.encode("a red disc", 2), one[:2])
    assert not torch.equal(encoder.encode("a a", 32)[1], encoder.encode("a a", 32)[2])


def test_the_checkpoint_is_the_same_each_time_and_leaves_the_random_state(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    build_checkpoint(tmp_path / "one")
    build_checkpoint(tmp_path / "two")
    build_checkpoint(tmp_path / "three", seed=1, num_layers=2)
    assert torch.equal(torch.get_rng_state(), before)
    one, two, three = (ToyDenoiser.from_pretrained(tmp_path / name / "transformer") for name in ("one", "two", "three"))
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert len(three.blocks) == 2
    assert not torch.equal(one.patch_in.weight, three.patch_in.weight)
    one.save_pretrained(tmp_path / "again")
    again = ToyDenoiser.from_pretrained(tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in one.state_dict().items())


def test_sampling_solves_the_flow_equation(tmp_path: Path) -> None:
    """With the exact velocity field of a single clip, any number of steps ends at that clip's latents."""
    plugins = make_plugins(ToyFamily)
    run = make_run(plugins, "toy", tmp_path)
    batch = make_batch(run, plugins)
    goal = batch.latents_BCFHW[:1]

    class Exact(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, **others: object) -> tuple[torch.Tensor]:
            sigma = flow.append_dims(timestep / 1000, hidden_states)
            return ((hidden_states - goal) / sigma,)

    pipeline = plugins.load_model(run, Part.PIPELINE)
    frames, height, width = batch.pixels
    request = SampleRequest(
        prompt=batch.text[0], negative=batch.text[1], width=width, height=height, frames=frames, steps=5,
        guidance=3.0, seed=0, latents_only=True,
    )  # fmt: skip
    torch.testing.assert_close(pipeline.sample(Exact(), request), goal[0], atol=1e-4, rtol=0)


def test_guidance_extrapolates_from_the_negative_prompt(tmp_path: Path) -> None:
    """v = v_negative + g·(v_prompt − v_negative), from noise of the request's seed; 1.0 asks for the prompt alone."""
    plugins = make_plugins(ToyFamily)
    pipeline = plugins.load_model(make_run(plugins, "toy", tmp_path), Part.PIPELINE)
    batches = []

    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(
            self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **others: object
        ) -> tuple[torch.Tensor]:
            batches.append(len(hidden_states))
            value = encoder_hidden_states[:, 0, 0]
            return (flow.append_dims(value, hidden_states).expand_as(hidden_states),)

    prompt, negative = {"words_LD": torch.full((2, 32), 5.0)}, {"words_LD": torch.full((1, 32), 2.0)}
    noise = torch.randn(1, 8, 2, 2, 2, generator=torch.Generator().manual_seed(7))[0]
    for guidance, velocity, size in ((3.0, 2 + 3 * (5 - 2), 2), (1.0, 5, 1)):
        request = SampleRequest(prompt, negative, 16, 16, 5, 4, guidance, seed=7, latents_only=True)
        torch.testing.assert_close(pipeline.sample(Constant(), request), noise - velocity, atol=1e-4, rtol=1e-5)
        assert batches[-1] == size


def test_sampling_from_a_first_frame(tmp_path: Path) -> None:
    """The sampled first latent is that of the image; without an image the refusal says what to do."""
    plugins = make_plugins(ToyFamily)
    run = make_run(plugins, "toy-i2v", tmp_path)
    batch = make_batch(run, plugins)
    pipeline, denoiser = plugins.load_model(run, Part.PIPELINE), load_denoiser(run, plugins).eval()
    frames, height, width = batch.pixels
    image = Image.fromarray(draw_clip(0, frames=frames, size=(width, height))[0])
    settings = {"prompt": batch.text[0], "negative": batch.text[1], "width": width, "height": height, "frames": frames}
    settings |= {"steps": 2, "guidance": 2.0, "seed": 0, "latents_only": True}
    latents = pipeline.sample(denoiser, SampleRequest(**settings, image=image))
    torch.testing.assert_close(latents[:, :1], batch.extras["first_latent"][0])
    with pytest.raises(ModelError, match=r"no first frame to sample from\. .*validation_using_datasets"):
        pipeline.sample(denoiser, SampleRequest(**settings))


def test_wrong_folders_and_adapters_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    plugins = make_plugins(ToyFamily)
    run = make_run(plugins, "toy", tmp_path)
    pipeline, denoiser = plugins.load_model(run, Part.PIPELINE), load_denoiser(run, plugins)
    with pytest.raises(ModelError, match=r"there is no adapter\. Name an adapter file"):
        pipeline.load_adapter(denoiser, tmp_path)
    save_file({"other.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "stranger.safetensors")
    with pytest.raises(ModelError, match="no key of it fits"):
        pipeline.load_adapter(denoiser, tmp_path / "stranger.safetensors")
    run.model_path = tmp_path / "nowhere"
    with pytest.raises(ModelError, match="denoiser of the toy model cannot be loaded: there is no folder transformer/"):
        plugins.load_model(run, Part.DENOISER)


def test_options_do_something(tmp_path: Path) -> None:
    plugins = make_plugins(ToyFamily)
    run = make_run(plugins, "toy", tmp_path, toy_caption_tokens=3)
    assert make_batch(run, plugins, captions=["one two three four"]).text[0]["words_LD"].shape == (3, 32)
    with pytest.raises(ConfigError, match='toy_first_frame_probability — the flavour "toy" is not conditioned'):
        make_run(plugins, "toy", tmp_path, toy_first_frame_probability=0.5)


def test_importing_the_harness_is_light() -> None:
    """The package and the plugin import neither torch nor diffusers nor pytest, also to describe the model."""
    code = (
        "import sys, hooktuner.testing, hooktuner.testing.toy as toy, hooktuner.testing.project;"
        "toy.ToyFamily().describe_model(None), toy.ToyFamily().options();"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'pytest') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
