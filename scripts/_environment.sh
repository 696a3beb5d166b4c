# Sourced by the scripts beside it. `prepare_environment` makes a virtual environment in the checkout on first use, and
# again when what it was made from has changed; otherwise it returns at once. Works with bash 3.2 (macOS) and later.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

# Variables that make a virtual environment's Python import other code than the environment's own, or compile it anew in
# each of the hundreds of processes that the tests start.
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

# Succeeds if command $1 is a Python of version $2 to before version $3, written "3, 10".
is_python() {
    "$1" -c "import sys; sys.exit(not (($2) <= sys.version_info[:2] < ($3)))" >/dev/null 2>&1
}

# Sets `python` to the first interpreter that fits: a tested version (3.10 to 3.13) if there is one, else a later one.
find_python() {
    local candidate before
    if [ -n "${PYTHON:-}" ]; then
        is_python "$PYTHON" "3, 10" "4, 0" || fail "PYTHON=$PYTHON is not a Python 3.10 or later."
        python="$PYTHON"
    else
        python=""
        for before in "3, 14" "4, 0"; do
            for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
                if [ -z "$python" ] && is_python "$candidate" "3, 10" "$before"; then
                    python="$candidate"
                fi
            done
        done
    fi
    [ -n "$python" ] || fail "No Python 3.10 or later was found (looked for python3, python3.13 ... python3.10)." \
        "Install one, or name it: PYTHON=/path/to/python3 $0"
    "$python" -c "import venv, ensurepip" >/dev/null 2>&1 || fail \
        "$python cannot make virtual environments: its 'venv' or 'ensurepip' module is missing." \
        "On Debian or Ubuntu: sudo apt-get install python3-venv"
}

# Makes sure that $root/$1 holds the project (editable, extra "dev") at the versions of the constraints file $2, and, if
# there is a third argument, what the requirements file $3 names.
prepare_environment() {
    local environment="$root/$1" constraints="$root/$2" requirements="${3:+$root/$3}" python made_from
    made_from="$root"$'\n'"$(cd "$root" && cat pyproject.toml "$2" ${requirements:+"$requirements"} | cksum)"
    if is_prepared; then
        return
    fi
    # Two scripts started at the same time take turns. Where there is no flock, they must not be.
    exec 9>"$environment.lock"
    if command -v flock >/dev/null 2>&1; then
        flock 9
    fi
    if ! is_prepared; then
        install_project
    fi
    exec 9>&-
}

is_prepared() {
    [ -f "$environment/made-from" ] && [ "$(cat "$environment/made-from")" = "$made_from" ] &&
        "$environment/bin/python" -c "" >/dev/null 2>&1
}

# The file "made-from" is written last: an environment without it was left by an interrupted run, and is made anew, as is
# one whose checkout has moved, because its commands contain their own path.
install_project() {
    if [ -f "$environment/made-from" ] && [ "$(head -n 1 "$environment/made-from")" = "$root" ] &&
        "$environment/bin/python" -c "" >/dev/null 2>&1; then
        rm -f "$environment/made-from"
        printf 'Updating %s ...\n' "$environment" >&2
    else
        find_python
        printf 'Making %s (once; a minute or two) ...\n' "$environment" >&2
        "$python" -m venv --clear "$environment"
    fi
    # Quiet, except for errors.
    "$environment/bin/python" -m pip install -qq --no-input --disable-pip-version-check --prefer-binary \
        --constraint "$constraints" --editable "${root}[dev]" ${requirements:+--requirement "$requirements"} ||
        fail "The installation failed, see above. Run $0 again once the reason is gone; it starts afresh."
    printf '%s\n' "$made_from" >"$environment/made-from"
}
