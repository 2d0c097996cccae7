#!/usr/bin/env bash
# Chooses the Python that runs this repository: the active one if it holds what pyproject.toml asks for, else the
# repository's own .venv, which is made from requirements.txt where it is missing and mended where it is incomplete.
#
#   source scripts/environment.sh [test]   sets PYTHON, and exports PYTHONPATH so that ldm is this checkout's
#   bash scripts/environment.sh [test]     prints the path of that Python
#
# `test` asks for pyproject.toml's test extra as well. PYTHON, where set, is the first Python that is looked at.

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
    # The work is done in a child, so that neither functions nor shell options leak into the caller. A file sourced
    # without arguments sees its caller's, so any word but `test` was not meant for it.
    if [[ "${1:-}" == test ]]; then
        PYTHON="$(PYTHON="${PYTHON:-}" bash "${BASH_SOURCE[0]}" test)" || return 1
    else
        PYTHON="$(PYTHON="${PYTHON:-}" bash "${BASH_SOURCE[0]}")" || return 1
    fi
    PYTHONPATH="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONPATH
    return 0
fi

set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
extra="${1:-}"

say() { printf '%s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
[[ -z "$extra" || "$extra" == test ]] || fail "environment.sh knows no argument '$extra'; give 'test' or nothing."

# check PYTHON: prints the interpreter's path; or prints what is wrong with it, and returns 1.
check() {
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" \
        "$1" "$root/scripts/check_environment.py" --extra "$extra" 2>/dev/null
}

# base_python: prints the first Python that requirements.txt can be installed for.
base_python() {
    local candidate version seen=""
    for candidate in ${PYTHON:+"$PYTHON"} python3 python python3.12 python3.11; do
        version="$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || continue
        # The pinned numpy and pyarrow (clip-retrieval holds both back) have no builds for 3.13.
        case "$version" in 3.11 | 3.12) command -v "$candidate"; return ;; esac
        seen="${seen:-$candidate is Python $version}"
    done
    fail "Python 3.11 or 3.12 is needed, but ${seen:-there is no python3 on the PATH};" \
        "install one, or make and activate the conda environment of environment.yaml."
}

# make_venv: makes .venv afresh, unless it has a Python and a whole pip; pip's RECORD is the last file it gets.
make_venv() {
    local base output
    "$venv/bin/python" -I -c 'import sys, importlib.metadata as metadata, pip._internal.cli.main
sys.exit(not metadata.distribution("pip").read_text("RECORD"))' 2>/dev/null && return
    base="$(base_python)" || exit 1
    output="$("$base" -I -m venv --clear "$venv" 2>&1)" \
        || fail "$base cannot make $venv; is its venv module there (Debian: apt install python3-venv)?" \
            "It says: $(tail -n 1 <<< "$output")"
}

# install WHY: fills .venv with the pins and the extra.
install() {
    local path package packages=()
    say "Installing requirements.txt into $venv, because $1: about 6 GB and a few minutes the first time."
    make_venv
    # Any stamp but the current one asks the next run to install again; this one lies there until all is done.
    : > "$venv/.installed-partly"
    for path in "$venv"/.installed-*; do
        [[ "$path" == */.installed-partly ]] || rm -f "$path"
    done
    # pip takes a package for installed once it has a dist-info, but writes RECORD only after its last file.
    for path in "$venv"/lib/python*/site-packages/*.dist-info; do
        [[ -e "$path/RECORD" ]] || rm -rf "$path"
    done
    while read -r package; do
        [[ -z "$package" ]] || packages+=("$package")
    done < <("$venv/bin/python" "$root/scripts/check_environment.py" --show requirements --extra "$extra")
    if ! "$venv/bin/python" -I -m pip install --no-input --disable-pip-version-check -r "$root/requirements.txt" \
            ${packages[@]+"${packages[@]}"} > "$venv/install.log" 2>&1 < /dev/null; then
        { grep '^ERROR' "$venv/install.log" || tail -n 3 "$venv/install.log"; } | tail -n 3 | cut -c 1-300 >&2
        fail "The installation stopped; $venv/install.log says more, and the next run takes it up again."
    fi
    : > "$venv/$("$venv/bin/python" "$root/scripts/check_environment.py" --show stamp)"
    : > "$venv/$("$venv/bin/python" "$root/scripts/check_environment.py" --show stamp --extra "$extra")"
    rm "$venv/.installed-partly"
}

# A python beside python3 is the same environment's; elsewhere it may be another's.
why=""
candidates=(${PYTHON:+"$PYTHON"} python3)
[[ "$(dirname "$(command -v python3)")" == "$(dirname "$(command -v python)")" ]] || candidates+=(python)
for candidate in "${candidates[@]}"; do
    if found="$(check "$candidate")"; then
        printf '%s\n' "$found"
        exit
    fi
    why="${why:-$candidate ${found:-cannot be run}}"
done
if found="$(check "$venv/bin/python")"; then
    [[ -z "${PYTHON:-}" ]] || say "Using $venv, because $why."
    printf '%s\n' "$found"
    exit
fi

# The lock is this very file, so that there is none to create or to leave behind; pip inherits it and keeps it
# should this shell be killed. Where the system has no flock, two installations at a time are the user's to avoid.
exec 9< "${BASH_SOURCE[0]}"
if command -v flock > /dev/null && ! flock -n 9 2>/dev/null; then
    say "Waiting for the run that is installing into $venv."
    flock 9 || true
fi
if ! found="$(check "$venv/bin/python")"; then
    install "$why"
    found="$(check "$venv/bin/python")" \
        || fail "$venv/bin/python $found even now that requirements.txt is installed: pyproject.toml asks for more."
fi
printf '%s\n' "$found"
