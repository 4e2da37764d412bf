"""`PLUGINS`: the published hooktuner plugins, by name (format: see the README)."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

PLUGINS: dict[str, dict[str, Any]] = json.loads(files(__name__).joinpath("plugins.json").read_text(encoding="utf-8"))
