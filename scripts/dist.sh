#!/usr/bin/env bash
# Puts what another machine needs into a folder: the binary, the base template, the unit, the licence texts, checksums.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
stillbox=$top/target/release/stillbox
out=${1:-$top/dist}
work=$(mktemp -d "${TMPDIR:-/tmp}/stillbox-dist.XXXXXX")
trap 'rm -rf "$work"' EXIT

mkdir -p "$out"
install -m 0755 "$stillbox" "$out/stillbox"
"$stillbox" template export base "$out/base.tar.zst" --data-dir "$work/data"
install -m 0644 "$top/config/stillbox.service" "$top/config/stillbox.toml" "$top/LICENSE" "$top/NOTICE" "$out/"
install -m 0644 "$top"/criu/*.patch "$out/"
(cd "$out" && sha256sum stillbox base.tar.zst stillbox.service stillbox.toml LICENSE NOTICE ./*.patch >SHA256SUMS)
echo "$out:"
(cd "$out" && ls -l)
