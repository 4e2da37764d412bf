"""`make demo`: from video files to a LoRA that another program loads, on a CPU, in about a minute.

1. Writes a few short .mp4 clips with captions (made here with PyAV; H.264 in MP4, like anybody's clips).
2. Runs `tuner run demo/config.json`, the command a user would type. The model is the family's `tiny` flavour: the
   real classes and the real loading code, with random weights of a few hundred kilobytes. It shows that the whole way
   works; it cannot make a beautiful video.
3. Loads the LoRA into the diffusers pipeline of the family and opens the validation video.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def main() -> int:
    os.chdir(ROOT)
    from hooktuner.testing import make_clips

    for name in ("output", "cache", "clips"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    clips = make_clips(HERE / "clips", count=6, frames=60, size=(192, 128), rate=24)
    print(f"1. wrote {len(clips)} clips with captions to demo/clips", flush=True)

    command = [str(Path(sys.executable).with_name("tuner")), "run", "--plugin", "kandinsky5-video", "demo/config.json"]
    print("2. $", " ".join(["tuner", *command[1:]]), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        return code

    output = HERE / "output"
    checkpoint = sorted((output / "checkpoints").iterdir())[-1]
    video = next((output / "validation").rglob("*.mp4"))
    print("3. checking the results")
    print(f"   LoRA        {shown(checkpoint / 'pytorch_lora_weights.safetensors')}: {adapters_in(checkpoint)}")
    print(f"   validation  {shown(video)}: {frames_of(video)} frames")
    losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    print(f"   metrics     {shown(output / 'metrics.jsonl')}: {len(losses)} steps, loss {first:.3f} → {last:.3f}")
    return 0


def shown(path: Path) -> str:
    """A path as a user would type it."""
    return str(path.relative_to(ROOT))


def adapters_in(checkpoint: Path) -> str:
    """Load the adapter the way any user of diffusers does."""
    from diffusers.pipelines.kandinsky5.pipeline_kandinsky import Kandinsky5T2VPipeline
    from diffusers.utils import logging
    from hooktuner_kandinsky5_video import tiny

    logging.disable_progress_bar()

    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    with tempfile.TemporaryDirectory() as folder:
        tiny.build(Path(folder))  # the same weights that were trained on: a function of nothing
        pipeline = Kandinsky5T2VPipeline.from_pretrained(folder, **parts)
    pipeline.load_lora_weights(checkpoint)
    return f"active in {type(pipeline).__name__} as {pipeline.get_active_adapters()}"


def frames_of(path: Path) -> int:
    """Decode a video file completely."""
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


if __name__ == "__main__":
    sys.exit(main())
