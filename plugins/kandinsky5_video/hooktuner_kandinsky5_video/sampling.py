"""Validation through the family's own diffusers pipeline, with the live denoiser and cached embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hooktuner.context import Run
from hooktuner.errors import ModelError
from hooktuner.family import SampleRequest

from hooktuner_kandinsky5_video import NAME
from hooktuner_kandinsky5_video.attention import scale_of, sparse_params
from hooktuner_kandinsky5_video.geometry import I2V_MIN_FRAMES, SIZE_MULTIPLE
from hooktuner_kandinsky5_video.load import DTYPES, load_vae, pipeline_class
from hooktuner_kandinsky5_video.options import Kandinsky5VideoOptions


class Kandinsky5Sampler:
    """The `SamplingPipeline`: `Kandinsky5T2VPipeline` or `Kandinsky5I2VPipeline` without text encoders.

    Two of the pipeline's methods are answered by what training uses: the rope scale, and whether attention is
    sparse. Everything else is the pipeline's own.
    """

    def __init__(self, run: Run) -> None:
        """Load VAE and scheduler from `run.model_path`. The image-to-video pipeline encodes the image in the
        denoiser's dtype, so its VAE is loaded in that; otherwise the VAE has `vae_dtype`."""
        self.run = run
        self.needs_image = "first_frame" in run.flavour.conditioning
        options = run.options_of(NAME, Kandinsky5VideoOptions)
        dtype = run.weight_dtype if self.needs_image and run.weight_dtype else DTYPES[options.vae_dtype]
        self.pipeline: Any = pipeline_class(run).from_pretrained(
            str(run.model_path),
            transformer=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            vae=load_vae(run, dtype),
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline._get_scale_factor = lambda height, width: scale_of(run, height, width)
        self.pipeline.get_sparse_params = lambda sample, device: sparse_params(run, self.pipeline.transformer, sample)

    def sample(self, denoiser: torch.nn.Module, request: SampleRequest) -> np.ndarray | torch.Tensor:
        """uint8 frames (F, height, width, 3), or latents_CFHW (scaled, as the denoiser has them), on the CPU.

        Noise comes from a CPU generator with `request.seed`, so it is the same on every device.
        Errors: `ModelError` for a size, a number of frames or a missing image that the pipeline cannot sample.
        """
        self._refuse(request)
        inputs: dict[str, Any] = {
            **self._embeddings("", request.prompt),
            "height": request.height,
            "width": request.width,
            "num_frames": request.frames,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "generator": torch.Generator("cpu").manual_seed(request.seed),
            "output_type": "latent" if request.latents_only else "np",
        }
        if request.guidance > 1.0:
            inputs.update(self._embeddings("negative_", request.negative))
        if self.needs_image:
            inputs["image"] = request.image
        with self._using(denoiser):
            frames = self.pipeline(**inputs).frames[0]
        if request.latents_only:
            return frames.permute(3, 0, 1, 2).float().cpu()
        return (np.asarray(frames) * 255).round().astype(np.uint8)

    def load_adapter(self, denoiser: torch.nn.Module, path: Path) -> None:
        """Load an exported adapter (a file, or a folder with `pytorch_lora_weights.safetensors`) into `denoiser`.

        Errors: `ModelError` where the file cannot be read, or has no key that belongs to the denoiser (diffusers
        only warns about that).
        """
        with self._using(denoiser):
            before = set(getattr(denoiser, "peft_config", None) or ())
            try:
                self.pipeline.load_lora_weights(str(path))
            except (OSError, ValueError, KeyError, IndexError, RuntimeError) as failure:
                reason = " ".join(str(failure).split())[:400]
                raise ModelError(
                    f"{path} — not an adapter that {type(self.pipeline).__name__} can load: {reason} "
                    'Keys look like "transformer.<module>.lora_A.weight".'
                ) from failure
            added = set(getattr(denoiser, "peft_config", None) or ()) - before
            if not added or not added <= set(self.pipeline.get_active_adapters()):
                raise ModelError(
                    f"{path} — no adapter became active: none of its keys belongs to the denoiser. "
                    'Keys must look like "transformer.<module>.lora_A.weight"; convert the file first.'
                )

    @contextmanager
    def _using(self, denoiser: torch.nn.Module) -> Iterator[None]:
        """The pipeline with this denoiser, in evaluation mode; training mode and pipeline are restored after."""
        training = denoiser.training
        self.pipeline.transformer = denoiser
        denoiser.eval()
        try:
            yield
        finally:
            denoiser.train(training)
            self.pipeline.transformer = None

    def _embeddings(self, prefix: str, text: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        device = self.run.device
        qwen_1LD = text["qwen_LD"].to(device)[None]
        return {
            f"{prefix}prompt_embeds_qwen": qwen_1LD,
            f"{prefix}prompt_embeds_clip": text["clip_D"].to(device)[None],
            f"{prefix}prompt_cu_seqlens": torch.tensor([0, qwen_1LD.shape[1]], dtype=torch.int32, device=device),
        }

    def _refuse(self, request: SampleRequest) -> None:
        """What diffusers would round, resize or turn into NaN."""
        assert self.run.card is not None
        why = self.run.card.latents.frames.problem(request.frames)
        if why is not None:
            raise ModelError(f"validation_num_video_frames — {why}.")
        if request.width % SIZE_MULTIPLE or request.height % SIZE_MULTIPLE:
            raise ModelError(
                f"validation_resolution — {request.width}x{request.height} does not fit: width and height must be "
                f"multiples of {SIZE_MULTIPLE}."
            )
        if self.needs_image and request.frames < I2V_MIN_FRAMES:
            raise ModelError(
                f"validation_num_video_frames — image-to-video sampling needs at least {I2V_MIN_FRAMES} frames, not "
                f"{request.frames}."
            )
        if self.needs_image and request.image is None:
            raise ModelError(
                f"{self.run.flavour.name} — image-to-video validation needs a first frame, and none was given. "
                "Set validation_using_datasets and eval_dataset_id, or validate with clips of the training data."
            )
