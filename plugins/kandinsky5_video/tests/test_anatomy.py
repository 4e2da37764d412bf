"""The denoiser's blocks as techniques see them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.transformers import transformer_kandinsky
from hooktuner.errors import ModelError
from hooktuner.family import BlockTokens, Grid, Part
from hooktuner_kandinsky5_video.attention import nabla_params, prepare_nabla
from hooktuner_kandinsky5_video.card import CARD


@pytest.fixture
def anatomy(make_run):
    return CARD.anatomy(make_run())


def gather(tokens, kept_BK):
    """What a routing technique does: tokens and sides of the kept indices."""

    def pick(tensor, axis):
        index = kept_BK.reshape(*kept_BK.shape, *(1,) * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:])
        assert axis == 1
        return tensor.expand(kept_BK.shape[0], *tensor.shape[1:]).gather(1, index)

    return BlockTokens(pick(tokens.tokens_BND, 1), tuple((pick(*side), side[1]) for side in tokens.sides), None)


def run_blocks(plugin, run, denoiser, step, around):
    """A forward pass with gradients in which every visual block is called by `around(block, args)`."""
    visual = {id(block) for block in denoiser.visual_transformer_blocks}

    def call(block, *args):
        return around(block, args) if id(block) in visual else block(*args)

    denoiser.enable_gradient_checkpointing(call)
    return plugin.predict(run, denoiser, step)


def test_blocks(make_run, plugin, anatomy):
    denoiser = plugin.load_model(make_run(), Part.DENOISER)
    assert list(anatomy.blocks(denoiser)) == list(denoiser.visual_transformer_blocks)
    assert list(anatomy.extra_blocks(denoiser)) == list(denoiser.text_transformer_blocks)


def test_grid_of_a_dense_call(make_run, plugin, anatomy, make_step):
    run, seen = make_run(), []

    def look(block, args):
        view = anatomy.read(args)
        seen.append((view.grid, view.tokens_BND.shape, [side.shape[axis] for side, axis in view.sides]))
        return block(*args)

    run_blocks(plugin, run, plugin.load_model(run, Part.DENOISER), make_step(run, ["", ""]), look)
    assert seen == [(Grid(3, 4, 6), (2, 72, 32), [72])] * 4


def test_keeping_all_tokens_through_gather_is_bit_identical(make_run, plugin, anatomy, make_step):
    run, step = make_run(), make_step(make_run())
    results = []

    def routed(block, args):
        view = anatomy.read(args)
        kept = torch.arange(view.tokens_BND.shape[1]).expand(view.tokens_BND.shape[0], -1)
        return block(*anatomy.write(args, gather(view, kept), kept))

    for around in (lambda block, args: block(*args), routed):
        denoiser = plugin.load_model(run, Part.DENOISER)
        velocity = run_blocks(plugin, run, denoiser, step, around)
        velocity.square().mean().backward()
        results.append((velocity, *(parameter.grad for parameter in denoiser.parameters())))
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)


def test_positions_travel_with_the_tokens(make_run, plugin, anatomy, make_step):
    """A block is equivariant: permuted tokens with their rotary tables give the permuted output."""
    run, step = make_run(), make_step(make_run(), ["a dog"])
    order = torch.randperm(72, generator=torch.Generator().manual_seed(0))[None]
    errors = []

    def permuted(block, args):
        view = anatomy.read(args)
        plain = block(*args)
        moved = gather(view, order)
        errors.append((block(*anatomy.write(args, moved, order)) - plain[:, order[0]]).abs().max())
        left = replace(moved, sides=view.sides)  # a mistake that must show: tokens without their positions
        assert (block(*anatomy.write(args, left, order)) - plain[:, order[0]]).abs().max() > 1e-4
        return plain

    run_blocks(plugin, run, plugin.load_model(run, Part.DENOISER), step, permuted)
    assert max(errors) < 1e-5


def test_keepable(make_run, plugin, anatomy, make_step):
    run, seen = make_run(), []
    step = make_step(run)

    def look(block, args):
        seen.append(anatomy.keepable(args, step))
        return block(*args)

    run_blocks(plugin, run, plugin.load_model(run, Part.DENOISER), step, look)
    assert all((one.unit, one.must_keep_BN) == ("any", None) for one in seen)


def test_a_given_first_frame_must_be_kept(make_run, plugin, anatomy, make_step):
    run, seen = make_run("tiny-i2v"), []
    extras = {"first_latent": torch.randn(3, 16, 1, 8, 12), "first_frame": torch.tensor([True, False, True])}
    captions = ["", "a dog", "a very long tale of two cats & a dog that   cross the bridge at dusk"]
    step = make_step(run, captions, extras=extras)

    def look(block, args):
        seen.append((tuple(step.rows), anatomy.keepable(args, step).must_keep_BN))
        return block(*args)

    run_blocks(plugin, run, plugin.load_model(run, Part.DENOISER), step, look)
    first = torch.arange(72) < 24
    wanted = {(0,): first, (1,): torch.zeros(72, dtype=torch.bool), (2,): first}
    assert {rows for rows, _ in seen} == set(wanted)
    assert all(torch.equal(must[0], wanted[rows]) for rows, must in seen)


def test_to_grid_is_raster_order(make_run, plugin, anatomy, make_step):
    run = make_run()

    def look(block, args):
        tokens = args[0]
        grid = anatomy.to_grid(tokens, args)
        assert grid.shape == (2, 3, 24, 32)
        assert torch.equal(grid.flatten(1, 2), tokens)
        kept = torch.arange(0, 72, 2).expand(2, -1)
        routed = anatomy.write(args, gather(anatomy.read(args), kept), kept)
        assert anatomy.read(routed).grid is None
        with pytest.raises(ModelError, match="the token grid of a routed block call is not known"):
            anatomy.to_grid(routed[0], routed)
        return block(*args)

    run_blocks(plugin, run, plugin.load_model(run, Part.DENOISER), make_step(run, ["", ""]), look)


# ------------------------------------------------------------------------------------------------------- NABLA


@pytest.fixture
def dense_nabla(monkeypatch):
    """NABLA's block mask as an ordinary mask, so that a CPU can attend with it. Masks are kept for the test."""
    masks = []

    def mask_of(q, k, sta, thr=0.9):
        size = q.shape[1]
        assert sta.shape[-2:] == (size // 64, size // 64)
        mask = sta.expand(q.shape[0], 1, -1, -1).repeat_interleave(64, -1).repeat_interleave(64, -2)
        masks.append(mask)
        return mask.expand(-1, q.shape[2], -1, -1)

    monkeypatch.setattr(transformer_kandinsky, "nablaT_v2", mask_of)
    return masks


@pytest.fixture
def nabla(make_run, plugin, make_step, monkeypatch, dense_nabla):
    """(run, denoiser, step) of a clip with 2 x 2 x 2 tiles, attended sparsely on the CPU."""
    run = make_run("tiny-nabla")
    denoiser = plugin.load_model(run, Part.DENOISER)
    denoiser.register_to_config(attention_wH=1, attention_wW=1, attention_wT=1)  # a mask that is not all ones
    monkeypatch.setattr(
        "hooktuner_kandinsky5_video.predict.sparse_params",
        lambda run, denoiser, latents: nabla_params(denoiser.config, latents),
    )
    return run, denoiser, make_step(run, ["a dog"], shape=(2, 32, 32))


def test_nabla_checkpoint_is_dense_for_small_clips(make_run, plugin, make_step, checkpoints):
    step = make_step(make_run(), ["a dog"], shape=(2, 16, 16))
    results = []
    for choice in ("auto", "dense"):
        run = make_run("tiny-nabla", sparse_attention=choice)
        with torch.no_grad():
            results.append(plugin.predict(run, plugin.load_model(run, Part.DENOISER), step))
    run = make_run()
    with torch.no_grad():  # the same weights in a checkpoint with dense attention
        dense = plugin.predict(run, plugin.load_model(run, Part.DENOISER), step)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], dense)


def test_nabla_is_refused_off_cuda_before_anything_is_computed(make_run, plugin, make_step):
    run = make_run("tiny-nabla")
    denoiser, step = plugin.load_model(run, Part.DENOISER), make_step(run, [""], shape=(32, 16, 16))
    with pytest.raises(ModelError, match="clips of 128x128 pixels and 32 latent frames — NABLA attention needs a CUDA"):
        plugin.predict(run, denoiser, step)


def test_nabla_parameters_are_the_pipelines(make_run, plugin):
    from diffusers.pipelines.kandinsky5.pipeline_kandinsky import Kandinsky5T2VPipeline

    denoiser = plugin.load_model(make_run("tiny-nabla"), Part.DENOISER)
    pipeline = Kandinsky5T2VPipeline(denoiser, None, None, None, None, None, None)
    latents = torch.zeros(1, 3, 32, 48, 33)
    theirs = pipeline.get_sparse_params(latents, torch.device("cpu"))
    ours = nabla_params(denoiser.config, latents)
    assert theirs.keys() == ours.keys()
    assert torch.equal(ours.pop("sta_mask"), theirs.pop("sta_mask"))
    assert ours == theirs
    assert ours["visual_shape"] == (3, 16, 24)


def test_prepare_nabla_compiles_the_visual_self_attentions_only(make_run, plugin, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call: lambda *args, **kwargs: call(*args, **kwargs))
    denoiser = plugin.load_model(make_run("tiny-nabla"), Part.DENOISER)
    prepare_nabla(denoiser)
    for name, module in denoiser.named_modules():
        chosen = name.startswith("visual_transformer_blocks.") and name.endswith(".self_attention")
        assert (getattr(module, "_compiled_call_impl", None) is not None) == chosen
        if name.endswith("_attention"):
            assert (module.processor._attention_backend is not None) == chosen
    compiled = denoiser.visual_transformer_blocks[0].self_attention._compiled_call_impl
    prepare_nabla(denoiser)
    assert denoiser.visual_transformer_blocks[0].self_attention._compiled_call_impl is compiled


def test_nabla_tokens_are_tiles_and_to_grid_undoes_them(plugin, anatomy, nabla):
    run, denoiser, step = nabla
    places = torch.arange(2 * 16 * 16).reshape(1, 2, 16, 16, 1)
    tiled, _ = transformer_kandinsky.fractal_flatten(places, places, (1, 2, 16, 16), block_mask=True)
    assert tiled[0, :64, 0].reshape(8, 8).tolist() == places[0, 0, :8, :8, 0].tolist()

    def look(block, args):
        view, keepable = anatomy.read(args), anatomy.keepable(args, step)
        assert (view.grid, keepable.unit, keepable.tile) == (Grid(2, 16, 16), "tiles", 64)
        assert torch.equal(anatomy.to_grid(tiled, args), places.flatten(2, 3))
        return block(*args)

    run_blocks(plugin, run, denoiser, step, look)


def test_nabla_keeping_all_tiles_is_bit_identical(plugin, anatomy, nabla):
    run, denoiser, step = nabla

    def routed(block, args):
        kept = torch.arange(512)[None]
        return block(*anatomy.write(args, gather(anatomy.read(args), kept), kept))

    plain = run_blocks(plugin, run, denoiser, step, lambda block, args: block(*args))
    assert torch.equal(plain, run_blocks(plugin, run, denoiser, step, routed))


def test_nabla_mask_shrinks_with_the_tiles_of_each_sample(plugin, anatomy, nabla, make_step, dense_nabla):
    run, denoiser, _ = nabla
    denoiser.register_to_config(attention_wH=3)
    step = make_step(run, ["", ""], shape=(2, 32, 32))
    tiles = torch.tensor([[0, 2, 5], [1, 4, 7]])
    kept = (tiles[:, :, None] * 64 + torch.arange(64)).flatten(1)

    def routed(block, args):
        full = args[4]["sta_mask"]
        dense_nabla.clear()
        new = anatomy.write(args, gather(anatomy.read(args), kept), kept)
        block(*new)
        (mask,) = dense_nabla
        for row in range(2):
            wanted = full[0, 0][tiles[row]][:, tiles[row]]
            assert torch.equal(mask[row, 0, ::64, ::64], wanted)
        assert not mask[0].equal(mask[1])
        assert full.shape == (1, 1, 8, 8), "the mask of the whole clip is left alone"
        return block(*args)

    run_blocks(plugin, run, denoiser, step, routed)
