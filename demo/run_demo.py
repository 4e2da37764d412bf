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
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def main() -> int:
    os.chdir(ROOT)
    from hooktuner.testing import make_clips

    for name in ("output", "cache", "clips"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    clips = make_clips(HERE / "clips", count=6, frames=48, size=(192, 128), rate=24)
    print(f"1. wrote {len(clips)} clips with captions to {HERE / 'clips'}", flush=True)

    command = [str(Path(sys.executable).with_name("tuner")), "run", "--plugin", "kandinsky5-video", "demo/config.json"]
    print(f"2. $ {' '.join(['tuner', *command[1:]])}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        return code

    output = HERE / "output"
    checkpoint = sorted((output / "checkpoints").iterdir())[-1]
    video = next((output / "validation").rglob("*.mp4"))
    print("3. checking the results")
    print(f"   LoRA        {checkpoint / 'pytorch_lora_weights.safetensors'}: {adapters_in(checkpoint)}")
    print(f"   validation  {video}: {frames_of(video)} frames")
    losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    print(f"   metrics     {output / 'metrics.jsonl'}: {len(losses)} steps, loss {first:.3f} → {last:.3f}")
    return 0


def adapters_in(checkpoint: Path) -> str:
    """Load the adapter the way any user of diffusers does."""
    from hooktuner_kandinsky5_video.testing import tiny_pipeline

    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(checkpoint)
    return f"active in {type(pipeline).__name__} as {pipeline.get_active_adapters()}"


def frames_of(path: Path) -> int:
    """Decode a video file completely."""
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


if __name__ == "__main__":
    sys.exit(main())
