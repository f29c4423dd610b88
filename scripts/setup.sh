# Sourced by the scripts beside it: makes .venv with the pinned versions, once, and again when they change.
# Needs only Python 3.10 or newer. uv is used when it is there or pip can bring it, because it is much faster.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1m▸ %s\033[0m\n' "$*"; }

find_python() {
    local candidate
    for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.10 or newer found. Install one, or put it on the PATH as python3." >&2
    exit 2
}

set_up() {  # set_up EXTRA: .venv with prunesearch[EXTRA], editable
    local extra=$1 python stamp wanted
    stamp=.venv/.set-up-for-$extra
    wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    python=$(find_python)
    say "Setting up .venv with the tested versions of constraints.txt (the first time downloads about 3 GB)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    if ! command -v uv >/dev/null && [ ! -x .venv/bin/uv ]; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check uv || say "uv is not to be had; using pip"
    fi
    if command -v uv >/dev/null; then
        uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable ".[$extra]"
    elif [ -x .venv/bin/uv ]; then
        .venv/bin/uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable ".[$extra]"
    else
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extra]"
    fi
    echo "$wanted" > "$stamp"
}
