#!/usr/bin/env bash
# Make .venv with core, all plugins (editable) and the tools, in the versions of constraints.txt.
# Needs a Python >= 3.11 called python3. uv does the installing where it can be had, else pip.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hooktuner needs Python 3.11 or newer; python3 is " + sys.version)'
[ -x .venv/bin/python ] || python3 -m venv .venv
python=.venv/bin/python

arguments=(-c constraints.txt -e '.[tensorboard]')
for project in plugins/*/pyproject.toml; do arguments+=(-e "$(dirname "$project")"); done
arguments+=(hypothesis import-linter 'pyright[nodejs]' pytest pytest-xdist ruff)

if [ -x .venv/bin/uv ] || $python -m pip install --quiet --disable-pip-version-check uv; then
  # uv does not read pip's setting for folders of wheels, so pass it on.
  for folder in ${PIP_FIND_LINKS:-}; do arguments+=(--find-links "$folder"); done
  # Without such a folder and without a GPU, torch's CPU build does, at a fraction of the size.
  if [ -z "${PIP_FIND_LINKS:-}" ] && ! command -v nvidia-smi >/dev/null; then export UV_TORCH_BACKEND="${UV_TORCH_BACKEND:-cpu}"; fi
  .venv/bin/uv pip install --quiet --python "$python" "${arguments[@]}"
else
  $python -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
fi

# What `tuner --help` imports is compiled now (uv leaves that to the first import), so that it answers at once.
$python - <<'PYTHON'
import compileall
import importlib.util
import pathlib

for name in ("annotated_types", "click", "pluggy", "pydantic", "pydantic_core", "rich", "typing_extensions", "typing_inspection"):
    found = importlib.util.find_spec(name)
    origin = pathlib.Path(found.origin) if found and found.origin else None
    if origin is not None:
        (compileall.compile_dir if origin.name == "__init__.py" else compileall.compile_file)(
            str(origin.parent if origin.name == "__init__.py" else origin), quiet=1
        )
for folder in (pathlib.Path("core/hooktuner"), *pathlib.Path("plugins").glob("*/hooktuner_*")):
    compileall.compile_dir(str(folder), quiet=1, maxlevels=0)
PYTHON
touch .venv/.installed
