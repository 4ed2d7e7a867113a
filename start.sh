#!/usr/bin/env bash
# Starts Turntable: makes .venv on the first start, installs requirements.txt, and runs app.py with your arguments.
#
#   ./start.sh                        serves the page and prints its address
#   ./start.sh --port 7861            arguments are handed to app.py; --help lists them
#   ./start.sh ask reasoning "…"      so are commands
#
# TURNTABLE_PYTHON=/path/to/python picks the Python that .venv is made from. Only messages of this script go to stderr;
# stdout belongs to app.py. test.sh sources this file for prepare().
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # `sh start.sh`, where sh is another shell
set -euo pipefail

script=$(readlink -f -- "${BASH_SOURCE[0]}" 2>/dev/null || printf '%s' "${BASH_SOURCE[0]}")
here=$(cd -P -- "$(dirname -- "$script")" >/dev/null && pwd)
venv=$here/.venv
stamp=$venv/.installed

say() { printf '%s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Prints what a Python lacks, in order: "old 3.8", "ensurepip 3.11", "libgomp 3.11", or "ok 3.11".
# Nothing at all means that it does not run. libgomp is looked for as llama.cpp will look for it.
probe='
import sys
version = "%d.%d" % sys.version_info[:2]
def lacks():
    if sys.version_info < (3, 10):
        return "old"
    if sys.prefix == sys.base_prefix:
        try:
            import ensurepip, venv
        except ImportError:
            return "ensurepip"
    if sys.platform == "linux":
        try:
            import ctypes
            ctypes.CDLL("libgomp.so.1")
        except (ImportError, OSError):
            return "libgomp"
    return "ok"
print(lacks(), version)
'
look() { "$1" -c "$probe" 2>/dev/null </dev/null || true; }

has_uv() { command -v uv >/dev/null 2>&1; }

# The Pythons to try, one a line, best first.
candidates() {
    if [[ -n ${TURNTABLE_PYTHON:-} ]]; then
        printf '%s\n' "$TURNTABLE_PYTHON"
        return
    fi
    printf '%s\n' python3.13 python3.12 python3.11 python3.10 python3
    # uv may keep Pythons of its own.
    if has_uv; then uv python find --no-project '>=3.10' 2>/dev/null || true; fi
}

# Sets $python and $version to the first Python that serves, or ends with the line that says what to install.
choose_python() {
    local candidate state seen="" found=""
    while IFS= read -r candidate; do
        state=$(look "$candidate")
        # uv makes environments without ensurepip.
        if [[ $state == "ensurepip "* ]] && has_uv; then state="ok ${state#* }"; fi
        if [[ $state == "ok "* ]]; then
            python=$candidate version=${state#* }
            return
        fi
        # "old" tells less than the others: those need a package only.
        if [[ -n $state && (-z $seen || $seen == "old "*) ]]; then seen=$state found=$candidate; fi
    done < <(candidates)
    complain "$seen" "$found"
}

# complain STATE PYTHON: ends with one line, what is missing and how to get it.
complain() {
    case $1 in
        "libgomp "*) die "Missing libgomp.so.1, which llama.cpp needs: sudo apt-get install libgomp1 (Debian, Ubuntu)," \
            "sudo dnf install libgomp (Fedora), sudo pacman -S gcc-libs (Arch), sudo apk add libgomp (Alpine)." ;;
        "ensurepip "*) die "Missing the venv package of $2: sudo apt-get install python${1#* }-venv (Debian, Ubuntu)," \
            "or install uv." ;;
        "old "*) die "Python 3.10 or newer is needed; $2 is ${1#* }: sudo apt-get install python3 python3-venv (Debian, Ubuntu)," \
            "or uv python install 3.13, or set TURNTABLE_PYTHON=/path/to/python3." ;;
    esac
    if [[ -n ${TURNTABLE_PYTHON:-} ]]; then die "TURNTABLE_PYTHON=$TURNTABLE_PYTHON does not run; set it to a Python 3.10 or newer."; fi
    die "Missing Python 3.10 or newer: sudo apt-get install python3 python3-venv (Debian, Ubuntu)," \
        "sudo dnf install python3 (Fedora), or set TURNTABLE_PYTHON=/path/to/python3."
}

# What .installed says of a requirements file; requirements-dev.txt includes requirements.txt, so it counts both.
mark() {
    local files=("$here/requirements.txt")
    if [[ $1 != requirements.txt ]]; then files+=("$here/$1"); fi
    printf '%s %s\n' "$1" "$(cat -- "${files[@]}" | cksum)"
}

# The folder is part of the home: the scripts inside a moved .venv still name the old place.
home() { printf 'python %s in %s\n' "$1" "$venv"; }

is_installed() { [[ -f $stamp ]] && grep -qxF -- "$(mark "$1")" "$stamp"; }

# Sets $version and is true when .venv exists, runs, is where it was made, and is of the Python that was asked for.
is_sound() {
    local state wanted
    if [[ ! -x $venv/bin/python ]]; then return 1; fi
    state=$(look "$venv/bin/python")
    if [[ $state == "libgomp "* ]]; then complain "$state" "$venv/bin/python"; fi
    if [[ $state != "ok "* ]]; then return 1; fi
    version=${state#* }
    if [[ -f $stamp ]] && ! grep -qxF -- "$(home "$version")" "$stamp"; then return 1; fi
    if [[ -n ${TURNTABLE_PYTHON:-} ]]; then
        wanted=$(look "$TURNTABLE_PYTHON")
        if [[ ${wanted#* } != "$version" ]]; then return 1; fi
    fi
}

with_uv() {
    has_uv || return 1
    if [[ ! -x $venv/bin/python ]]; then uv venv --quiet --python "$python" "$venv" || return 1; fi
    uv pip install --python "$venv/bin/python" --compile-bytecode -r "$here/$1"
}

with_pip() {
    # An environment that uv made has no pip.
    if ! "$venv/bin/python" -m pip --version; then
        rm -rf -- "$venv"
        "$python" -m venv "$venv" || return 1
    fi
    # A pip set to install for the user would refuse to work inside .venv.
    PIP_USER=0 "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --prefer-binary -r "$here/$1"
}

# install FILE: fills .venv, and marks it as filled last, so that a start that was cut off installs again.
install() {
    local log
    if is_sound; then
        python=$("$venv/bin/python" -c 'import sys; print(sys._base_executable)')
        rm -f -- "$stamp"
    else
        choose_python
        rm -rf -- "$venv"
    fi
    log=$(mktemp "${TMPDIR:-/tmp}/turntable-install.XXXXXX")
    say "Installing $1 into ${venv##*/} (once; it takes a few minutes) …"
    # uv first; where it cannot (an index that only pip knows, say), pip.
    if ! { with_uv "$1" || with_pip "$1"; } >"$log" 2>&1 </dev/null; then
        tail -n 25 -- "$log" >&2
        die "Could not install $1; the lines above say why (all of them: $log). Is this machine online?"
    fi
    rm -f -- "$log"
    {
        home "$version"
        mark requirements.txt
        if [[ $1 != requirements.txt ]]; then mark "$1"; fi
    } >"$stamp.new"
    mv -f -- "$stamp.new" "$stamp"
}

# prepare FILE: makes sure that .venv holds what FILE names. Two starts at once take turns.
prepare() {
    if is_sound && is_installed "$1"; then return; fi
    exec 9<"$script"
    if command -v flock >/dev/null 2>&1 && ! flock -n 9; then
        say "Another start is installing; waiting for it …"
        flock 9 || true
    fi
    if ! { is_sound && is_installed "$1"; }; then install "$1"; fi
    exec 9<&-
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    prepare requirements.txt
    exec "$venv/bin/python" "$here/app.py" "$@"
fi
