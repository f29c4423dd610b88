# Sourced by the other scripts. Creates virtual environments with pinned versions, and updates them when the pins change.
# Needs Python 3.10 or newer. Uses uv if it is installed or pip can install it, because it is much faster.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1m▸ %s\033[0m\n' "$*"; }

find_python() {  # find_python [CONDITION]: print the first Python that meets CONDITION (default: 3.10 or newer)
    local condition=${1:-"(3, 10) <= sys.version_info[:2]"} candidate
    for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c "import sys; sys.exit(not ($condition))" 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "setup: no Python with $condition found. Install one, or put it on the PATH as python3." >&2
    exit 2
}

set_up() {  # set_up EXTRA: create .venv with an editable prunesearch[EXTRA] and the versions of constraints.txt
    set_up_environment .venv "$(find_python)" "$1" --constraint constraints.txt --editable ".[$1]"
}

set_up_environment() {  # set_up_environment FOLDER PYTHON NAME ARGUMENT...: ARGUMENTs go to pip install
    local folder=$1 python=$2 stamp wanted
    stamp=$folder/.set-up-for-$(basename "$3")
    wanted=$(cat pyproject.toml constraints*.txt scripts/setup.sh | cksum)
    shift 3
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    say "Setting up $folder (the first time downloads about 3 GB)"
    [ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
    if ! command -v uv >/dev/null && [ ! -x "$folder/bin/uv" ]; then
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check uv || say "uv could not be installed; using pip"
    fi
    # uv keeps no bytecode unless told to: where Python may not write any, each process would compile PyTorch again
    if command -v uv >/dev/null; then
        uv pip install --quiet --compile-bytecode --python "$folder/bin/python" "$@"
    elif [ -x "$folder/bin/uv" ]; then
        "$folder/bin/uv" pip install --quiet --compile-bytecode --python "$folder/bin/python" "$@"
    else
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    fi
    echo "$wanted" > "$stamp"
}
