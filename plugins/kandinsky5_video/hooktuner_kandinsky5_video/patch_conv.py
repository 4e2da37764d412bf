"""Causal convolutions of the HunyuanVideo VAE in short runs of frames: the same result with a lower peak of memory.

diffusers pads the whole clip (a second copy of the input) and convolves it in one call, whose workspace grows with
the clip: where no implicit kernel fits (always on a CPU), it is the unfolded input, 27 times its size. An output
frame t of a kernel with k frames depends on the padded frames t·s … t·s + k − 1 only, so the frames can be computed
run by run from overlapping slices of the input. Nothing is approximated.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d


def enable_patch_conv(vae: torch.nn.Module, frames: int = 1) -> int:
    """Make every causal convolution of this `vae` compute `frames` output frames at a time; the class stays as it is.

    Returns: the number of convolutions. Convolutions that already pad along time themselves are left alone.
    """
    count = 0
    for module in vae.modules():
        if isinstance(module, HunyuanVideoCausalConv3d) and module.conv.padding[0] == 0:
            module.forward = MethodType(_Runs(frames), module)
            count += 1
    return count


class _Runs:
    """`HunyuanVideoCausalConv3d.forward`, a run of output frames at a time."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def __call__(self, module: Any, hidden_BCFHW: torch.Tensor) -> torch.Tensor:
        left, right, top, bottom, front, _ = module.time_causal_padding
        stride = module.conv.stride[0]
        reach = module.conv.dilation[0] * (module.conv.kernel_size[0] - 1)
        count = (hidden_BCFHW.shape[2] + front - reach - 1) // stride + 1

        output_BCFHW = hidden_BCFHW  # replaced by the first run, which knows shape and dtype
        for first in range(0, count, self.frames):
            last = min(first + self.frames, count)
            begin, end = first * stride - front, (last - 1) * stride + reach + 1 - front
            slice_BCFHW = hidden_BCFHW[:, :, max(begin, 0) : end]
            # Only the first runs reach before the clip; replicate padding repeats frame 0 there, as for the whole clip.
            padding = (left, right, top, bottom, max(-begin, 0), 0)
            part_BCFHW = module.conv(F.pad(slice_BCFHW, padding, mode=module.pad_mode))
            if last - first == count:
                return part_BCFHW
            if first == 0:
                output_BCFHW = part_BCFHW.new_empty(*part_BCFHW.shape[:2], count, *part_BCFHW.shape[3:])
            output_BCFHW[:, :, first:last] = part_BCFHW
        return output_BCFHW
