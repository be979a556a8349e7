#!/usr/bin/env bash
# Turn a prompt file into clips:
#   bash launch/infer.sh prompts.txt [--model EXPORT] [--out DIR] [key=value ...]
# Uses the active environment if megacog is installed there, else the repository's .venv.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

has_megacog() {
  "$1" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("megacog", "megacog_kernels", "torch"))))' \
    >/dev/null 2>&1
}

for python in "${VIRTUAL_ENV:-}/bin/python" "${CONDA_PREFIX:-}/bin/python" "$root/.venv/bin/python" python3 python; do
  if command -v "$python" >/dev/null 2>&1 && has_megacog "$python"; then
    exec "$python" "$root/launch/infer.py" "$@"
  fi
done

echo "error: no Python environment with megacog was found. Run: bash launch/install.sh" >&2
exit 1
