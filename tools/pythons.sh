#!/bin/sh
# The Pythons from 3.10 to 3.14 that this machine has, a path a line, oldest first: those on PATH, pyenv's and uv's.
for minor in 10 11 12 13 14; do
    for python in "python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor."*/bin/python3 \
            "$HOME/.local/share/uv/python/"*"-3.$minor."*/bin/python3; do
        if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
            command -v "$python"
            break
        fi
    done
done
