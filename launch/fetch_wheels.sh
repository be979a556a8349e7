#!/usr/bin/env bash
# Fetches wheels for a GPU machine without network that has torch, triton, numpy and the like but not all that megacog
# imports: x86-64 Linux with Python 3.12. There `bash launch/test_gpu.sh --wheels FOLDER ...` uses them.
#
#   bash launch/fetch_wheels.sh [FOLDER [PACKAGE ...]]
#
#   FOLDER   default: .whl, which git ignores; its wheels are replaced
#   PACKAGE  default: pydantic pydantic-core annotated-types typing-inspection deepspeed hjson av (40 MB, of which av, for
#            mp4 files, is 35). In the versions that are installed here, without what they depend on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    -h | --help) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
esac
folder="${1:-.whl}"
packages=("${@:2}")
[ "${#packages[@]}" -gt 0 ] || packages=(pydantic pydantic-core annotated-types typing-inspection deepspeed hjson av)

source launch/environment.sh
mkdir -p "$folder"
rm -f "$folder"/*.whl
for package in "${packages[@]}"; do
    version="$(python -c 'import sys, importlib.metadata as m; print(m.version(sys.argv[1]))' "$package" 2>/dev/null)" ||
        { echo "error: $package is not installed here, so its version is not known; pip install $package" >&2; exit 1; }
    case "$package" in
        deepspeed | hjson) # published as source only; as pure Python they serve every interpreter
            DS_BUILD_OPS=0 python -m pip wheel -q --no-deps --no-build-isolation "$package==$version" -w "$folder" ;;
        *)
            python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
                --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
                -d "$folder" "$package==$version" ;;
    esac
done
for wheel in "$folder"/*.whl; do
    case "$wheel" in
        *-none-any.whl | *-cp312-* | *-abi3-*) ;;
        *) echo "error: $wheel is no wheel for Python 3.12" >&2; exit 1 ;;
    esac
done
du -ch "$folder"/*.whl
