"""For every test of the workspace: one thread per worker, no network, and nothing written outside the test folders."""

from __future__ import annotations

import os
import tempfile

# Before torch is imported: OpenMP threads of several pytest workers would spin against each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Checkpoints that flavours build are shared by all tests of a machine's run, but not with the user's own.
os.environ.setdefault("HOOKTUNER_HOME", os.path.join(tempfile.gettempdir(), f"hooktuner-tests-{os.getuid()}"))
