#!/usr/bin/env bash
# Makes the static CRIU that the stillbox binary embeds: `criu/build.sh OUT_FILE`. See README.md beside it.
#
# Source: Debian's package (suite sid, from the mirror that this machine's apt is configured with, signature
# checked by apt), or a release tarball: STILLBOX_CRIU_TARBALL=path and STILLBOX_CRIU_TARBALL_SHA256=its hash.
# A finished build is kept in ${XDG_CACHE_HOME:-~/.cache}/stillbox/criu and used again while this script and
# the patches stay the same; STILLBOX_CRIU_REFRESH=1 looks for a newer source.
set -euo pipefail

readonly VERSION_MIN=4.2
readonly SUITE=sid

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=

say() { printf 'criu: %s\n' "$*" >&2; }
die() {
    printf 'criu: error: %s\n' "$1" >&2
    shift
    local next_step
    for next_step in "$@"; do printf 'criu:   %s\n' "$next_step" >&2; done
    exit 1
}
clean_up() { [ -z "$work" ] || rm -rf "$work"; }
trap clean_up EXIT

readonly OTHER_WAYS=(
    "or give a release tarball of CRIU >= $VERSION_MIN: STILLBOX_CRIU_TARBALL=FILE STILLBOX_CRIU_TARBALL_SHA256=HASH"
    "or install CRIU >= $VERSION_MIN and name it in stillbox's configuration (runtime.criu)"
)

# ---------------------------------------------------------------- cache

hash_of_recipe() {
    (cd "$here" && sha256sum build.sh ./*.patch | sha256sum | cut -c1-16)
}

# An entry is good when the binary and its notes match the hashes written beside them.
entry_is_good() {
    [ -s "$1/SHA256SUMS" ] && (cd "$1" && sha256sum --quiet --strict --check SHA256SUMS) >/dev/null 2>&1
}

# The newest good entry of this recipe; what fails its hash is removed.
find_cached() {
    local entry
    for entry in $(ls -1dt "$cache"/"$recipe"-* 2>/dev/null); do
        case $entry in *.tmp.*) continue ;; esac
        if entry_is_good "$entry"; then
            printf '%s' "$entry"
            return 0
        fi
        say "cached $entry does not match its hashes; removing it"
        rm -rf "$entry"
    done
    return 1
}

# Never fatal: the cache saves time, the build does not need it.
put_in_cache() {
    local entry=$cache/$recipe-$1 aside
    aside=$entry.tmp.$$
    if mkdir -p "$aside" && cp "$work/criu" "$work/source.txt" "$aside/" &&
        (cd "$aside" && sha256sum criu source.txt >SHA256SUMS) &&
        rm -rf "$entry" && mv -T "$aside" "$entry"; then
        say "cached in $entry"
    else
        rm -rf "$aside"
        say "could not write the cache $cache; going on without"
    fi
}

deliver() {
    mkdir -p "$(dirname "$out")"
    # Untouched when it is the same: cargo compiles the binary that embeds it anew when it looks changed.
    if ! cmp -s "$1/criu" "$out" || [ ! -x "$out" ]; then
        cp "$1/criu" "$out.tmp.$$"
        chmod 0755 "$out.tmp.$$"
        mv -f "$out.tmp.$$" "$out"
    fi
    say "$out: $(sed -n 's/^about: //p' "$1/source.txt"), $(stat -c %s "$out") bytes"
}

# ---------------------------------------------------------------- source

# at_least 4.2.1 4.2
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n1)" = "$2" ]; }

fetch_tarball_given() {
    local sum
    [ -r "$STILLBOX_CRIU_TARBALL" ] || die "cannot read STILLBOX_CRIU_TARBALL=$STILLBOX_CRIU_TARBALL" "give the path of CRIU's release tarball"
    [ -n "${STILLBOX_CRIU_TARBALL_SHA256:-}" ] ||
        die "STILLBOX_CRIU_TARBALL is set without STILLBOX_CRIU_TARBALL_SHA256" "set it to the SHA-256 that the release was published with"
    sum=$(sha256sum "$STILLBOX_CRIU_TARBALL" | cut -d' ' -f1)
    [ "$sum" = "${STILLBOX_CRIU_TARBALL_SHA256,,}" ] ||
        die "$STILLBOX_CRIU_TARBALL has SHA-256 $sum, not $STILLBOX_CRIU_TARBALL_SHA256" "fetch it again, or correct the hash"
    tarball=$STILLBOX_CRIU_TARBALL
}

# apt with a source list and list store of its own: the machine's own set-up stays as it is.
apt_private() {
    local tool=$1
    shift
    "$tool" -o Dir::Etc::SourceList="$work/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State="$work/apt/state" -o Dir::State::Lists="$work/apt/lists" -o Dir::State::status=/dev/null \
        -o Dir::Cache="$work/apt/cache" -o APT::Sandbox::User= -o Acquire::Languages=none -o Acquire::Retries=2 "$@"
}

# The archives of Debian proper that apt is configured with; all archives while it has no lists yet.
mirrors() {
    local filter uris
    for filter in 'Label: Debian' 'Created-By: Packages'; do
        uris=$(apt-get indextargets --format '$(REPO_URI)' "$filter" 2>/dev/null | grep -v -- security | sort -u || true)
        if [ -n "$uris" ]; then
            printf '%s\n' "$uris"
            return
        fi
    done
}

fetch_from_apt() {
    local uri log=$work/apt.log
    command -v apt-get >/dev/null ||
        die "this machine has no apt to take CRIU's source from" "${OTHER_WAYS[@]}"
    mkdir -p "$work"/apt/{lists,state,cache}/partial "$work/source"
    for uri in $(mirrors); do
        say "asking $uri for the source of criu in $SUITE"
        printf 'deb-src %s %s main\n' "$uri" "$SUITE" >"$work/apt/sources.list"
        if apt_private apt-get update >"$log" 2>&1 &&
            (cd "$work/source" && apt_private apt-get source --download-only --tar-only criu) >>"$log" 2>&1; then
            tarball=$(ls "$work"/source/criu_*.orig.tar.*z* 2>/dev/null | head -n1)
            [ -z "$tarball" ] || return 0
        fi
        say "it did not give it: $(grep -E '^(E|Err)' "$log" | head -n2 | tr '\n' ' ')"
    done
    die "no Debian mirror of this machine's apt gave CRIU's source, and no earlier build is cached" \
        "check the network and run this again" "${OTHER_WAYS[@]}"
}

# ---------------------------------------------------------------- build

# Debian's name of the package that holds what the build asks for, when it is missing.
missing_packages() {
    local probe package
    while read -r package probe; do
        case $probe in
        /*) [ -e "$probe" ] ;;
        *.h) printf '#include <sys/types.h>\n#include <%s>\n' "$probe" | gcc -E -o /dev/null - 2>/dev/null ;;
        lib*.a) [ -e "$(gcc -print-file-name="$probe" 2>/dev/null || true)" ] ;;
        *) command -v "$probe" >/dev/null ;;
        esac || printf '%s\n' "$package"
    done <<'LIST' | sort -u
gcc gcc
libc6-dev libc.a
make make
patch patch
xz-utils xz
bzip2 bzip2
binutils strip
perl perl
pkg-config pkg-config
protobuf-compiler protoc
protobuf-c-compiler protoc-c
libprotobuf-dev /usr/include/google/protobuf/descriptor.proto
libprotobuf-c-dev protobuf-c/protobuf-c.h
libprotobuf-c-dev libprotobuf-c.a
libbsd-dev bsd/unistd.h
libbsd-dev libbsd.a
libbsd-dev libmd.a
libcap-dev sys/capability.h
libnet1-dev libnet.h
libnet1-dev libnet.a
libnl-3-dev /usr/include/libnl3/netlink/netlink.h
libnl-3-dev libnl-3.a
uuid-dev uuid/uuid.h
uuid-dev libuuid.a
LIST
}

check_tools() {
    local missing
    missing=$(missing_packages | tr '\n' ' ')
    [ -z "$missing" ] || die "building CRIU needs packages that are not installed (Debian's names): $missing" \
        "install them: apt-get install -y --no-install-recommends $missing"
}

unpack() {
    local folder
    mkdir -p "$work/tree"
    tar -xf "$tarball" -C "$work/tree" --strip-components=1 ||
        die "cannot unpack $tarball" "is it CRIU's source tarball, whole?"
    folder=$work/tree
    [ -f "$folder/Makefile.versions" ] || die "$tarball is not CRIU's source: it has no Makefile.versions" "${OTHER_WAYS[@]}"
    version=$(sed -nE 's/^CRIU_VERSION_(MAJOR|MINOR|SUBLEVEL)[[:space:]]*:=[[:space:]]*([0-9]+).*/\2/p' "$folder/Makefile.versions" | paste -sd.)
    at_least "$version" "$VERSION_MIN" ||
        die "the source found is CRIU $version; kernels from 6.16 on need $VERSION_MIN or newer" "${OTHER_WAYS[@]}"
}

# Each change is applied where it fits; CRIU works without, slower or without lazy restores, and doctor says so.
apply_changes() {
    local change name
    changes=
    for change in "$here"/*.patch; do
        name=$(basename "$change" .patch)
        if patch -d "$work/tree" -p1 --forward --batch --dry-run <"$change" >/dev/null 2>&1; then
            patch -d "$work/tree" -p1 --forward --batch --silent <"$change"
            changes+="${changes:++}${name%%-*}"
            say "applied $name"
        else
            say "warning: $name does not fit CRIU $version; building without it"
        fi
    done
}

# Static, so without what only exists as a shared library or pulls in a plugin loader.
compile() {
    local log=$work/make.log epoch
    cat >"$work/pkg-config" <<'WRAPPER'
#!/bin/sh
for word; do case $word in libbpf | libdrm | libnftables | libselinux | gnutls) exit 1 ;; esac; done
exec pkg-config "$@"
WRAPPER
    chmod +x "$work/pkg-config"
    # CRIU tells its kernel-probe caches of different builds apart by this number.
    epoch=$((16#$(printf '%s %s' "$recipe" "$source_sha256" | sha256sum | cut -c1-7)))
    say "compiling CRIU $version (about half a minute on 2 cores)"
    env -u CFLAGS -u LDFLAGS -u LIBS -u MAKEFLAGS -u MAKELEVEL -u MFLAGS \
        SOURCE_DATE_EPOCH=$epoch USERCFLAGS="-ffile-prefix-map=$work/tree=." WRAPFLAGS="-static -lmd -lpthread -ldl" \
        make -C "$work/tree" -j"$(nproc)" NO_GNUTLS=1 WERROR=0 PKG_CONFIG="$work/pkg-config" \
        GITID="stillbox-${changes:-unchanged}" criu >"$log" 2>&1 || {
        tail -n 25 "$log" >&2
        cp "$log" "$out.log" 2>/dev/null || true
        die "CRIU $version did not compile; the whole log is $out.log" \
            "read its first error; a missing header is a missing -dev package" "${OTHER_WAYS[@]}"
    }
    cp "$work/tree/criu/criu" "$work/criu"
    strip "$work/criu"
}

check_result() {
    local told
    if readelf --program-headers "$work/criu" | grep -q INTERP; then
        die "the CRIU built is not static" "look for a library without a .a file among the packages named in $here/README.md"
    fi
    told=$("$work/criu" --version 2>&1) || die "the CRIU built does not run: $told"
    case $told in
    *"Version: $version"*) ;;
    *) die "the CRIU built says '$told', not version $version" ;;
    esac
    if [ "$(id -u)" != 0 ]; then
        say "criu check needs root: left out"
    elif told=$("$work/criu" check 2>&1); then
        say "criu check: looks good"
    else
        say "warning: criu check fails on this machine: $(printf '%s' "$told" | grep -iE 'error|fail' | head -n3 | tr '\n' ' ')"
        say "  stillbox doctor says what that means for this kernel"
    fi
}

build() {
    work=$(mktemp -d "${TMPDIR:-/tmp}/stillbox-criu.XXXXXX")
    if [ -n "${STILLBOX_CRIU_TARBALL:-}" ]; then fetch_tarball_given; else fetch_from_apt; fi
    source_sha256=$(sha256sum "$tarball" | cut -d' ' -f1)
    say "source: $(basename "$tarball"), sha256 $source_sha256"
    unpack
    apply_changes
    compile
    check_result
    cat >"$work/source.txt" <<NOTES
about: CRIU $version, static, our changes: ${changes:-none}
source: $(basename "$tarball")
source-sha256: $source_sha256
NOTES
    put_in_cache "$version-${source_sha256:0:16}"
}

main() {
    [ $# = 1 ] && [ -n "$1" ] || die "usage: criu/build.sh OUT_FILE"
    case $1 in /*) out=$1 ;; *) out=$PWD/$1 ;; esac
    [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
        die "this recipe is for x86_64 Linux, not $(uname -s) on $(uname -m)" "install CRIU >= $VERSION_MIN and name it in stillbox's configuration (runtime.criu)"
    recipe=$(hash_of_recipe)
    cache=${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/stillbox/criu
    local entry
    if [ -z "${STILLBOX_CRIU_TARBALL:-}${STILLBOX_CRIU_REFRESH:-}" ] && entry=$(find_cached); then
        say "using the earlier build $entry"
        deliver "$entry"
        return
    fi
    check_tools
    build
    deliver "$work"
}

main "$@"
