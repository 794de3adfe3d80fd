#!/usr/bin/env bash
# Sums what cargo, pytest and tests/vm/run.sh say of themselves, read from standard input: `N passed, N failed`.
# Skipped, ignored and expected-to-fail tests count as failed. Fails when anything failed or nothing passed.
set -euo pipefail

awk '
    # test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; …
    /^test result: / {
        for (i = 2; i <= NF; i++) {
            if ($i ~ /^passed/) passed += $(i - 1)
            if ($i ~ /^(failed|ignored)/) failed += $(i - 1)
        }
        next
    }
    # 10 passed, 1 skipped, 2 failed in 12.3s (pytest); 5 passed, 0 failed (the emulated machine)
    /^=* ?[0-9]+ (passed|failed|skipped|error|errors|xfailed|xpassed|deselected|warnings?)(,| in |$)/ {
        gsub(/[=,]/, "")
        for (i = 2; i <= NF; i++) {
            if ($i == "passed") passed += $(i - 1)
            if ($i ~ /^(failed|skipped|errors?|xfailed|xpassed)$/) failed += $(i - 1)
        }
    }
    END {
        printf "%d passed, %d failed\n", passed, failed
        exit !(passed > 0 && failed == 0)
    }
'
