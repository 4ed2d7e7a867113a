#!/usr/bin/env bash
# Checks everything: ruff, mypy, pytest with branch coverage, and the README's generated parts.
#
#   ./test.sh                         everything; ends with what failed
#   ./test.sh -k loader               with arguments: pytest alone, with these arguments, from the project's folder
#
# Makes .venv and installs requirements-dev.txt when that is due (see start.sh), and finds or installs Chromium for the
# browser tests. TURNTABLE_CHROMIUM=/path/to/chromium picks one. Also makes .venv-exllama with PyTorch for the tests of the
# ExLlama adapters; TURNTABLE_TEST_EXLLAMA=0 leaves that out, and those tests are skipped.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # `sh test.sh`, where sh is another shell
set -euo pipefail

script=$(readlink -f -- "${BASH_SOURCE[0]}" 2>/dev/null || printf '%s' "${BASH_SOURCE[0]}")
# shellcheck source=start.sh
source "$(dirname -- "$script")/start.sh"

# A Chromium that is there and runs: the one that was named, the system's, or Playwright's. Prints its path.
find_chromium() {
    local candidate
    for candidate in "${TURNTABLE_CHROMIUM:-}" chromium chromium-browser google-chrome-stable google-chrome "$(playwrights)"; do
        candidate=$(command -v -- "$candidate" 2>/dev/null || true)
        # A placeholder that only says how to install one is no browser.
        if [[ -n $candidate && $("$candidate" --version </dev/null 2>/dev/null || true) == *Chrom* ]]; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

playwrights() {
    "$venv/bin/python" - 2>/dev/null <<'PYTHON' || true
from playwright.sync_api import sync_playwright

with sync_playwright() as playwright:
    print(playwright.chromium.executable_path)
PYTHON
}

# as_root COMMAND…: runs it as root where that needs no password.
as_root() {
    if [[ $(id -u) == 0 ]]; then "$@"; else sudo -n "$@"; fi
}

install_chromium() {
    local log
    log=$(mktemp "${TMPDIR:-/tmp}/turntable-chromium.XXXXXX")
    say "Installing Chromium for the browser tests (once) …"
    {
        if command -v apt-get && as_root true; then
            as_root apt-get update || true
            as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium || true
        fi
        if ! find_chromium; then
            "$venv/bin/python" -m playwright install chromium || true
            # Playwright's own brings no system libraries.
            if ! find_chromium && as_root true; then "$venv/bin/python" -m playwright install-deps chromium || true; fi
        fi
    } >"$log" 2>&1 </dev/null
    if ! find_chromium >/dev/null; then
        tail -n 15 -- "$log" >&2
        die "Missing Chromium, which the browser tests need: sudo apt-get install chromium (Debian)," \
            "sudo dnf install chromium (Fedora), .venv/bin/python -m playwright install --with-deps chromium," \
            "or set TURNTABLE_CHROMIUM=/path/to/chromium. The whole log: $log"
    fi
    rm -f -- "$log"
}

# step NAME COMMAND…: runs it, says how it went, and keeps the names of those that failed.
failed=()
step() {
    local name=$1 started=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    if "$@"; then
        printf '== %s: ok, %d s\n' "$name" $((SECONDS - started))
    else
        printf '== %s: FAILED, %d s\n' "$name" $((SECONDS - started))
        failed+=("$name")
    fi
}

# The tests of the ExLlama adapters run in an environment of their own, because it holds PyTorch.
prepare_exllama() {
    if [[ ${TURNTABLE_TEST_EXLLAMA:-} == 0 ]]; then
        say "TURNTABLE_TEST_EXLLAMA=0: the tests of the ExLlama adapters will be skipped."
        return
    fi
    (
        venv=$here/.venv-exllama
        stamp=$venv/.installed
        prepare requirements-test-exllama.txt
    )
}

prepare requirements-dev.txt
prepare_exllama
cd -- "$here"
run=("$venv/bin/python" -m)

if [[ $# -gt 0 ]]; then
    if found=$(find_chromium); then export TURNTABLE_CHROMIUM=$found; fi
    exec "${run[@]}" pytest "$@"
fi

find_chromium >/dev/null || install_chromium
TURNTABLE_CHROMIUM=$(find_chromium)
export TURNTABLE_CHROMIUM

step ruff "${run[@]}" ruff check .
step mypy "${run[@]}" mypy
# A file's tests stay together, because they share servers and engines. What fails beside another file on a busy machine
# is run once more, alone, and named: only what fails then as well has failed.
tests() {
    "${run[@]}" pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered && return
    printf '\n== what failed, once more and alone\n'
    "${run[@]}" pytest --last-failed --last-failed-no-failures none -v
}
step pytest tests
step docs "$venv/bin/python" docs/readme.py --check

if [[ ${#failed[@]} -gt 0 ]]; then
    printf '\nFailed: %s\n' "${failed[*]}"
    exit 1
fi
printf '\nAll is well.\n'
