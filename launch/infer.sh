#!/usr/bin/env bash
# Turn a prompt file into clips:
#   bash launch/infer.sh prompts.txt [--model EXPORT] [--out DIR] [key=value ...]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"

python="$(command -v python || command -v python3 || true)"
if [ -z "$python" ] || ! "$python" -c 'import megacog, megacog_kernels' >/dev/null 2>&1; then
    echo "error: megacog is not installed in ${python:-any Python on the PATH}. Run: bash launch/install.sh" >&2
    exit 1
fi
exec "$python" "$root/launch/infer.py" "$@"
