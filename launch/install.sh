#!/usr/bin/env bash
# Installs megacog: the one place that does, for people, tests, the quickstart and the Dockerfile.
#
#   bash launch/install.sh [--target cpu|gpu] [--dev]
#
#   --target   gpu adds Triton and checks that torch sees CUDA; default: gpu if there is nvidia-smi, else cpu
#   --dev      also what the tests need
#
# Goes into the active virtual or conda environment; without one it makes .venv in the repository (then
# `source launch/environment.sh`). Needs Python >= 3.11 and no compiler. Can be interrupted and run again.
#
#   TORCH_INDEX_URL   package index to take torch from, e.g. one with smaller CPU builds; default: pip's own
#   TORCH_VERSION     torch to install when the environment has none that is new enough
#   PYTHON            interpreter that makes .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH_VERSION="${TORCH_VERSION:-2.13.0}"
target=""
dev=no
while [ $# -gt 0 ]; do
    case "$1" in
        --target) target="${2:-}"; shift 2 || true ;;
        --target=*) target="${1#*=}"; shift ;;
        --dev) dev=yes; shift ;;
        -h | --help) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
        *) echo "error: unknown option $1; see launch/install.sh --help" >&2; exit 2 ;;
    esac
done
if [ -z "$target" ]; then
    if command -v nvidia-smi >/dev/null 2>&1; then target=gpu; else target=cpu; fi
fi
case "$target" in
    cpu | gpu) ;;
    *) echo "error: --target must be cpu or gpu, not '$target'" >&2; exit 2 ;;
esac

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.11 python3.12 python; do
        if command -v "$candidate" >/dev/null 2>&1 && new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python >= 3.11 found; install one or set PYTHON to its path" >&2
    return 1
}

make_environment() {
    local python
    python="$(find_python)"
    echo "making .venv with $("$python" --version)"
    # --clear: a half-made one, from an interrupted run, is of no use.
    if ! "$python" -m venv --clear .venv; then
        echo "error: $python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
        return 1
    fi
}

# One line: prefix of the environment (empty outside of one), "ok" if Python is new enough, "complete" if all
# packages can be found.
describe_environment() {
    python - <<'PYTHON' 2>/dev/null
import os, sys
from importlib.util import find_spec
inside = sys.prefix != sys.base_prefix or os.environ.get("CONDA_PREFIX")
sys.path = [entry for entry in sys.path if entry not in ("", ".", os.getcwd())]
names = "torch deepspeed h5py yaml sentencepiece av PIL safetensors tqdm megacog megacog_kernels".split()
print(sys.prefix if inside else "", "ok" if sys.version_info >= (3, 11) else "old",
      "complete" if all(find_spec(name) for name in names) else "incomplete", sep="\t")
PYTHON
}

source launch/environment.sh
IFS=$'\t' read -r prefix version_verdict completeness < <(describe_environment | sed 's/^\t/-\t/') || prefix=-
if [ "$prefix" = - ]; then
    make_environment
    source launch/environment.sh
    IFS=$'\t' read -r prefix version_verdict completeness < <(describe_environment)
fi
if [ "$version_verdict" != ok ]; then
    echo "error: the active environment $prefix has $(python --version); Python >= 3.11 is needed" >&2
    exit 1
fi

if command -v flock >/dev/null 2>&1; then
    exec 9>"$prefix/.megacog-install.lock"
    flock 9 # two scripts may install at the same time
fi

# Nothing to do when an install from the same files and settings has finished here.
stamp="$prefix/.megacog-install"
extras="logging,demo"
[ "$target" = gpu ] && extras="$extras,gpu"
[ "$dev" = yes ] && extras="$extras,dev"
files_checksum="$(cat setup.py pyproject.toml megacog/__init__.py launch/install.sh | cksum)"
wanted="$files_checksum $PWD $TORCH_VERSION ${TORCH_INDEX_URL:-}"
installed_extras=""
if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$wanted" ]; then
    installed_extras="$(sed -n 2p "$stamp")"
fi
missing_extras="$(comm -23 <(tr , '\n' <<<"$extras" | sort) <(tr , '\n' <<<"$installed_extras" | sort))"
if [ "$completeness" = complete ] && [ -z "$missing_extras" ]; then
    exit 0
fi
if [ -n "$installed_extras" ]; then # keep what an earlier call added, e.g. --dev
    extras="$(tr , '\n' <<<"$extras,$installed_extras" | sort -u | paste -sd , -)"
fi
if ! python -m pip --version >/dev/null 2>&1; then # the making of .venv was interrupted
    if [ "$prefix" != "$PWD/.venv" ]; then
        echo "error: the active environment $prefix has no pip; install pip into it, or deactivate it" >&2
        exit 1
    fi
    make_environment
fi

rm -f "$stamp"
pip_install() {
    local quiet=()
    [ -t 1 ] || quiet=(--quiet)
    python -m pip install --no-input --disable-pip-version-check "${quiet[@]}" "$@"
}

# torch comes first and alone, so that TORCH_INDEX_URL is asked for nothing else; what torch needs comes with
# the rest.
torch_version() { python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null; }
torch_suffices() {
    python - <<'PYTHON' 2>/dev/null
from importlib.metadata import version
import sys
sys.exit(tuple(int(part) for part in version("torch").split("+")[0].split(".")[:2]) < (2, 11))
PYTHON
}
if torch_suffices; then
    torch_source="already in $prefix"
elif [ -n "${TORCH_INDEX_URL:-}" ]; then
    pip_install --index-url "$TORCH_INDEX_URL" --no-deps "torch==$TORCH_VERSION"
    torch_source="from $(sed -E 's#://[^/@]*@#://#' <<<"$TORCH_INDEX_URL")"
else
    pip_install "torch==$TORCH_VERSION"
    torch_source="from pip's default sources"
fi
echo "torch $(torch_version), $torch_source"

# DeepSpeed comes as source. In an isolated build it sees no torch and compiles nothing.
DS_BUILD_OPS=0 pip_install --use-pep517 -e ".[$extras]"

if [ "$target" = gpu ] && ! python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    echo "error: torch $(torch_version) has no CUDA support; run: python -m pip uninstall torch," \
        "then again with TORCH_INDEX_URL naming an index with CUDA builds, or --target cpu" >&2
    exit 1
fi
printf '%s\n%s\n' "$wanted" "$extras" >"$stamp"
echo "megacog is installed in $prefix"
