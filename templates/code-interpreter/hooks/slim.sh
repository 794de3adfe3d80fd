#!/bin/sh
# The debugger is spoken to by notebooks alone, and every kernel loads it when it is there: 7 MiB of each dump.
set -eu
python3 -m pip uninstall --quiet --yes --root-user-action=ignore debugpy
