# Sourced by the other scripts: puts the Python environment that megacog uses first on the PATH.
# That is the active virtual or conda environment if there is one, else .venv in the repository.

_megacog_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

_megacog_in_virtualenv() {
    local python
    python="$(command -v python)" && [ -f "$(dirname "$(dirname "$python")")/pyvenv.cfg" ]
}

if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
    export PATH="$VIRTUAL_ENV/bin:$PATH"
elif [ -n "${CONDA_PREFIX:-}" ] && [ -x "$CONDA_PREFIX/bin/python" ]; then
    export PATH="$CONDA_PREFIX/bin:$PATH"
elif _megacog_in_virtualenv; then
    :
elif [ -x "$_megacog_root/.venv/bin/python" ]; then
    export VIRTUAL_ENV="$_megacog_root/.venv"
    export PATH="$VIRTUAL_ENV/bin:$PATH"
    unset PYTHONHOME
fi
