#!/usr/bin/env bash
# Chooses the Python that runs this repository; scripts/environment.py, which it starts, installs what is missing.
#
#   source scripts/environment.sh [test]           sets PYTHON, and exports PYTHONPATH so that ldm is this checkout's
#   bash scripts/environment.sh [test|retrieval]   prints the path of that Python
#
# PYTHON, where set, is the one to use or to make .venv with; otherwise the first on the PATH that is new enough.

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
    # The work is done in a child, so that nothing leaks into the caller. A file sourced without arguments sees its
    # caller's, so any word but `test` was not meant for it.
    # shellcheck disable=SC2046
    PYTHON="$(PYTHON="${PYTHON:-}" bash "${BASH_SOURCE[0]}" $([[ "${1:-}" != test ]] || echo test))" || return 1
    PYTHONPATH="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONPATH
    return 0
fi

work="$(dirname -- "${BASH_SOURCE[0]}")/environment.py"
candidates=(python3 python python3.14 python3.13 python3.12 python3.11)
[[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        exec "$candidate" "$work" "$@"
    fi
done
if [[ -z "${PYTHON:-}" ]] && command -v uv > /dev/null; then
    exec uv run --quiet --no-project --python '>=3.11,<3.15' "$work" "$@"
fi
echo "Python 3.11 to 3.14 is needed, but there is none among: ${candidates[*]}; install one, or uv, which brings one," \
    "or make and activate the conda environment of environment.yaml." >&2
exit 1
