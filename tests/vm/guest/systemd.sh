#!/bin/bash
# The second boot: systemd, udev, and config/stillbox.service as users have it. Sandboxes outlive the server.

exec </dev/null >/dev/ttyS1 2>&1
. /vm/lib.sh

unit() { systemctl show --property "$1" --value stillbox; }
export -f unit

check "the unit starts" 'systemctl start stillbox && until_true 50 stillbox sandbox ls'
ID=$(stillbox sandbox create base 2>/tmp/create.err)
export ID
check "create under systemd" '[ -n "$ID" ] || { cat /tmp/create.err; journalctl -u stillbox -n 8 -o cat; false; }'
check "a program runs" 'inside "setsid sleep 1000 >/dev/null 2>&1 & echo \$! >/tmp/pid; kill -0 \$(cat /tmp/pid)"'
check "systemctl restart: the sandbox and its program live on" '
    before=$(unit MainPID) && systemctl restart stillbox && until_true 50 stillbox sandbox ls && [ "$(unit MainPID)" != "$before" ] &&
    stillbox sandbox ls | grep "$ID" | grep -q running && inside "kill -0 \$(cat /tmp/pid)"'
check "kill -9 of the server: systemd starts it again, the sandbox lives on" '
    before=$(unit MainPID) && kill -9 "$before" && until_true 50 bash -c "[ \$(systemctl show --property MainPID --value stillbox) != 0 ] && [ \$(systemctl show --property MainPID --value stillbox) != $before ] && stillbox sandbox ls" &&
    stillbox sandbox ls | grep "$ID" | grep -q running && inside "kill -0 \$(cat /tmp/pid)"'
check "a new sandbox beside the old one" 'second=$(stillbox sandbox create base) && [ "$(ID=$second inside "echo two")" = two ]'
check "stop: the server ends, sandboxes stay" 'systemctl stop stillbox && [ "$(unit MainPID)" = 0 ] && pgrep -f "^/.stillbox/agent" >/dev/null'
check "start and kill: nothing is left" '
    systemctl start stillbox && until_true 50 stillbox sandbox ls && stillbox sandbox kill --all &&
    { until_true 20 nothing_left || { left_of_sandboxes; false; }; }'
echo end
systemctl poweroff
