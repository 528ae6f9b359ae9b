# shellcheck shell=bash
# Sourced by the other scripts: installs Debian packages that are missing, and makes the virtual environment.
# Everything is idempotent, says what it is about to do, and does nothing (quickly) when all is there.

set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=$(basename "$0")

say() { echo "$name: $*" >&2; }
die() { say "$*"; exit 1; }

# packages FILE...: the Debian packages that the files list
packages() {
    local file
    for file in "$@"; do sed 's/#.*//' "$checkout/scripts/packages/$file.txt"; done | grep -oE '[^[:space:]]+'
}

# missing PACKAGE...: those that are neither installed nor provided by one that is (Debian 13 renamed some to ...t64)
missing() {
    local have
    have=$(dpkg-query -W -f '${db:Status-Status} ${Package} ${Provides}\n' 2>/dev/null |
        sed -n 's/^installed //; T; s/([^)]*)//g; s/,/ /g; p' | tr -s ' ' '\n' | sort -u)
    comm -23 <(printf '%s\n' "$@" | sort -u) <(echo "$have")
}

# install_packages PACKAGE...
install_packages() {
    local wanted
    wanted=$(missing "$@" | xargs)
    [ -n "$wanted" ] || return 0
    command -v apt-get >/dev/null || die "needs the equivalents of these Debian packages: $wanted"
    local sudo=""
    if [ "$(id -u)" != 0 ]; then
        sudo=$(command -v sudo) || die "not root, and missing: $wanted. Let root run: apt-get install --no-install-recommends $wanted"
    fi
    say "installing from Debian: $wanted"
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get update -qq >&2
    # shellcheck disable=SC2086
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $wanted >&2
}

# A Python that crbd runs on. Debian's own comes first: it is built for speed, and other users can reach it.
find_python() {
    local candidate
    for candidate in /usr/bin/python3 python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer with venv: apt-get install python3-venv"
}

# make_venv EXTRA...: .venv with crbd (editable) and its extras; sets $venv
make_venv() {
    venv=$checkout/.venv
    local extras python stamp wanted
    extras=$(IFS=,; echo "$*")
    python=$(find_python)
    wanted="$python $("$python" -V) $(sha256sum < "$checkout/pyproject.toml") ${extras:-none}"
    stamp=$venv/crbd-stamp
    if [ -f "$stamp" ] && grep -qxF -- "$wanted" "$stamp"; then return; fi
    say "making $venv with $python and installing crbd${extras:+ with its extras $extras} from PyPI"
    if [ ! -x "$venv/bin/python" ] || [ "$("$venv/bin/python" -V 2>&1)" != "$("$python" -V)" ]; then
        "$python" -m venv --clear "$venv"
    fi
    "$venv/bin/pip" install -q --disable-pip-version-check -e "$checkout${extras:+[$extras]}" >&2
    echo "$wanted" >> "$stamp"
}
