#!/usr/bin/env bash
# Installs what is missing on a Debian-like machine, and says which package and why: `scripts/setup.sh [run|test|bench|container]`.
# `run` = what building and running needs (the default), `test` = what the tests need as well, `bench` = and `make bench`,
# `container` = and `make container-test`.
# Quick and silent when everything is there; changes nothing but installing packages.
set -euo pipefail

readonly RUST_MIN=1.88

# Package, the purpose it serves; `test` packages come after the line that says so.
packages() {
    cat <<'LIST'
build-essential|compiles the C parts (SQLite, zstd, CRIU)
pkg-config|finds libraries for CRIU's build
libseccomp-dev|system-call filters of sandboxes, linked into the binary
protobuf-compiler|CRIU's messages
protobuf-c-compiler|CRIU's messages
libprotobuf-dev|CRIU's messages
libprotobuf-c-dev|CRIU
libbsd-dev|CRIU
libcap-dev|CRIU
libnet1-dev|CRIU
libnl-3-dev|CRIU
uuid-dev|CRIU
patch|CRIU: our changes
xz-utils|CRIU: its source archive
bzip2|CRIU: its source archive
mmdebstrap|makes the base template from Debian's packages
debian-archive-keyring|verifies those packages
nftables|network rules of sandboxes
conntrack|forgets a sandbox's connections when its network is reused
iproute2|looks at links and routes when something is wrong
e2fsprogs|makes the sandboxes' disks
ca-certificates|the public CAs that `stillbox env` keeps trusted
curl|waits for the server in `make run`
libnss-myhostname|lets *.localhost names lead to this machine; its installation adds 'myhostname' to /etc/nsswitch.conf
LIST
    [ "$1" != run ] || return 0
    cat <<'LIST'
python3-venv|runs the Python SDKs in environments of their own
nodejs|runs the JavaScript SDK
npm|fetches the JavaScript SDK
qemu-system-x86|the emulated machine of `make vm-test`
busybox-static|that machine's first programs
zstd|that machine's files
runc|the peer that benchmarks compare with
docker-registry|the registry that image tests start on a port of their own
skopeo|fills that registry and writes image archives
LIST
    if [ "$1" = bench ]; then
        echo "podman|the peer that stops time as well, which benchmarks compare with"
    fi
    [ "$1" = container ] || return 0
    cat <<'LIST'
buildah|builds the Dockerfile at the top in `make container-test`
LIST
}

# A command that does a package's work when it comes from elsewhere (pyenv, nodesource, nvm).
stands_in() {
    case $1 in
    python3-venv) python3 -c 'import venv, ensurepip' ;;
    nodejs) command -v node ;;
    npm) command -v npm ;;
    *) false ;;
    esac >/dev/null 2>&1
}

is_installed() { [ "$(dpkg-query --show --showformat '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

check_cargo() {
    local found
    [ ! -d "$HOME/.cargo/bin" ] || PATH=$PATH:$HOME/.cargo/bin
    if ! found=$(cargo --version 2>/dev/null); then
        echo "setup: error: cargo is not installed; stillbox is built with Rust >= $RUST_MIN" >&2
        echo "setup:   install it with rustup (Debian 13: apt-get install rustup && rustup default stable; elsewhere: rustup.rs), then run this again" >&2
        exit 1
    fi
    found=$(cut -d' ' -f2 <<<"$found")
    if [ "$(printf '%s\n' "$RUST_MIN" "$found" | sort -V | head -n1)" != "$RUST_MIN" ]; then
        echo "setup: error: cargo $found is too old; stillbox needs Rust >= $RUST_MIN" >&2
        echo "setup:   rustup update stable" >&2
        exit 1
    fi
}

install_missing() {
    local package purpose missing=()
    while IFS='|' read -r package purpose; do
        is_installed "$package" || stands_in "$package" || missing+=("$package|$purpose")
    done < <(packages "$1")
    [ ${#missing[@]} -gt 0 ] || return 0
    echo "setup: these packages are missing:"
    printf '%s\n' "${missing[@]}" | while IFS='|' read -r package purpose; do printf 'setup:   %-24s %s\n' "$package" "$purpose"; done
    if [ "$(id -u)" != 0 ]; then
        echo "setup: error: installing needs root; run: sudo apt-get install -y --no-install-recommends ${missing[*]%%|*}" >&2
        exit 1
    fi
    echo "setup: installing them with apt-get"
    apt-get update -qq || echo "setup: warning: apt-get update had errors; trying with what it knows" >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]%%|*}" </dev/null >/dev/null
    echo "setup: installed"
}

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || { echo "setup: error: stillbox runs on x86_64 Linux, not $(uname -s) on $(uname -m)" >&2; exit 1; }
if command -v dpkg-query >/dev/null && command -v apt-get >/dev/null; then
    install_missing "${1:-run}"
else
    echo "setup: this machine has no apt; it needs the equivalents of: $(packages "${1:-run}" | cut -d'|' -f1 | tr '\n' ' ')"
fi
check_cargo
