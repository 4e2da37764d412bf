"""Write docs/images/run.svg: what a run looks like in a terminal, from a real run of demo/config.json.

python tools/picture.py        # after `make demo`, which makes the clips
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import hooktuner
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the demo's training again, recorded."""
    console = Console(record=True, width=112, file=io.StringIO(), force_terminal=False)
    console.print("$ tuner run demo/config.json", highlight=False)
    hooktuner.run("demo/config.json", flags=["--resume_from_checkpoint", "none"], console=console)
    picture = console.export_svg(title="hooktuner")
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.S)  # fonts come from the reader's machine
    target = ROOT / "docs/images/run.svg"
    target.parent.mkdir(exist_ok=True)
    target.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
