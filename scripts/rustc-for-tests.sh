#!/usr/bin/env bash
# cargo's RUSTC_WRAPPER while scripts/test.sh compiles: `scripts/rustc-for-tests.sh RUSTC ARGUMENTS…`. What holds tests is
# compiled without optimisation, which takes a tenth of the time; what is tested (the program, the library that the
# tests in tests/ call) stays as it is shipped. Unit tests are compiled with their room, so they see debug assertions too.
set -euo pipefail

for argument in "$@"; do
    [ "$argument" != --test ] || exec "$@" -C opt-level=0
done
exec "$@"
