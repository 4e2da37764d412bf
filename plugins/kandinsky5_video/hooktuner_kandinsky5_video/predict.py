"""The micro-batch through the denoiser, as the released pipelines call it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hooktuner.context import Run
from hooktuner.errors import ModelError
from hooktuner.randomness import uniform
from hooktuner.step import Conditioning, Step

from hooktuner_kandinsky5_video import NAME
from hooktuner_kandinsky5_video.attention import scale_of, sparse_params, unwrapped
from hooktuner_kandinsky5_video.geometry import SPATIAL_STRIDE
from hooktuner_kandinsky5_video.options import Kandinsky5VideoOptions


def condition(run: Run, step: Step) -> Conditioning | None:
    """The first latent frame is given: the first frame of the clip, encoded alone, without noise.

    None for text-to-video flavours, for single images (nothing would be left to generate), and where every sample of
    the micro-batch was drawn to train as text-to-video (`i2v_dropout_probability`). A sample also trains as
    text-to-video where the cached extra `first_frame` (bool, (B,)) says that it has none.
    """
    batch = step.batch
    frames = batch.latents_BCFHW.shape[2]
    if "first_frame" not in run.flavour.conditioning or frames == 1:
        return None
    share = run.options_of(NAME, Kandinsky5VideoOptions).i2v_dropout_probability
    keep = [uniform(run.config.seed, "i2v-as-t2v", index) >= share for index in batch.index]
    if not any(keep):
        return None
    if "first_latent" not in batch.extras:
        raise ModelError(
            f"{', '.join(batch.keys)} — cached without a first frame, which the flavour {run.flavour.name} needs. "
            "Encode the dataset again with this flavour."
        )
    device = batch.latents_BCFHW.device
    given_B = torch.tensor(keep, device=device)
    if "first_frame" in batch.extras:
        given_B = given_B & batch.extras["first_frame"].to(device=device, dtype=torch.bool).reshape(-1)
    first_F = torch.arange(frames, device=device) == 0
    return Conditioning(
        given_B1FHW=given_B[:, None, None, None, None] & first_F[None, None, :, None, None],
        latents_BCFHW=batch.extras["first_latent"],
    )


def predict(run: Run, denoiser: torch.nn.Module, step: Step) -> torch.Tensor:
    """The velocity (B, C, F, H, W) for `step.noisy_BCFHW`.

    The denoiser has no text mask: padding a caption would change its sample. So samples are grouped by the length of
    their caption, and the denoiser is called once per group; each call is exactly what its samples get alone.
    `step.rows` names the samples of the call under way.
    """
    input_BFHWC = denoiser_input(run, denoiser, step)
    groups = _rows_by_length([sample["qwen_LD"].shape[0] for sample in step.batch.text])
    outputs = []
    try:
        for rows in groups:
            step.rows = rows
            outputs.append(_call(run, denoiser, step, input_BFHWC, rows))
    finally:
        step.rows = None
    velocity_BFHWC = outputs[0]
    if len(groups) > 1:
        by_row = {
            row: output[place] for rows, output in zip(groups, outputs, strict=True) for place, row in enumerate(rows)
        }
        velocity_BFHWC = torch.stack([by_row[row] for row in range(len(by_row))])
    return velocity_BFHWC.permute(0, 4, 1, 2, 3)


def take(tensor_B: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Some samples of a batch. Indexing with a list would copy the list to the device and wait for it."""
    return torch.stack([tensor_B[row] for row in rows])


def denoiser_input(run: Run, denoiser: torch.nn.Module, step: Step) -> torch.Tensor:
    """The latents, channel last, in `run.weight_dtype`: (B, F, H, W, 33).

    The video checkpoints take noised latents ‖ condition channels ‖ mask. The condition channels are zero, also for
    image-to-video, where the clean frame stands among the noised latents; the mask is 1 where latents are given.
    """
    latents_BFHWC = step.noisy_BCFHW.permute(0, 2, 3, 4, 1).to(run.weight_dtype).contiguous()
    if not unwrapped(denoiser).config.visual_cond:
        return latents_BFHWC
    mask_BFHW1 = torch.zeros_like(latents_BFHWC[..., :1])
    if step.conditioning is not None:
        mask_BFHW1 = mask_BFHW1 + step.conditioning.given_B1FHW.permute(0, 2, 3, 4, 1).to(mask_BFHW1.dtype)
    return torch.cat([latents_BFHWC, torch.zeros_like(latents_BFHWC), mask_BFHW1], dim=-1)


def _call(
    run: Run, denoiser: torch.nn.Module, step: Step, input_BFHWC: torch.Tensor, rows: Sequence[int]
) -> torch.Tensor:
    """One call of the denoiser for the samples `rows`, whose captions are equally long: velocity (b, F, H, W, C)."""
    timestep_B, device = step.timestep_B, input_BFHWC.device
    if len(rows) < len(step.batch.text):
        input_BFHWC, timestep_B = take(input_BFHWC, rows), take(timestep_B, rows)
    qwen_BLD = torch.stack([step.batch.text[row]["qwen_LD"] for row in rows])
    clip_BD = torch.stack([step.batch.text[row]["clip_D"] for row in rows])
    _, frames, latent_rows, latent_columns, _ = input_BFHWC.shape
    _, patch_rows, patch_columns = unwrapped(denoiser).config.patch_size
    return denoiser(
        hidden_states=input_BFHWC,
        encoder_hidden_states=qwen_BLD.to(run.weight_dtype),
        pooled_projections=clip_BD.to(run.weight_dtype),
        # float32 also in bfloat16 runs: bfloat16 has no timesteps between multiples of four above 512.
        timestep=timestep_B,
        visual_rope_pos=[
            torch.arange(frames, device=device),
            torch.arange(latent_rows // patch_rows, device=device),
            torch.arange(latent_columns // patch_columns, device=device),
        ],
        text_rope_pos=torch.arange(qwen_BLD.shape[1], device=device),
        scale_factor=scale_of(run, latent_rows * SPATIAL_STRIDE, latent_columns * SPATIAL_STRIDE),
        sparse_params=sparse_params(run, denoiser, input_BFHWC),
        return_dict=False,
    )


def _rows_by_length(lengths: Sequence[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(length, []).append(row)
    return list(groups.values())
