# What the checks of both boots share. One line per check on standard output: `ok NAME` or `FAIL NAME: why`.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8

# check NAME SCRIPT: a shell script with this file's functions; its exit code is the verdict, its last words the reason.
# Emulation is slow, so the time is generous.
check() {
    local output
    if output=$(timeout --kill-after=5 "${CHECK_SECONDS:-60}" bash -c ". /vm/lib.sh; $2" 2>&1); then
        echo "ok $1"
    else
        echo "FAIL $1: exit code $?: $(printf '%s' "$output" | grep -v '^ok ' | tail -n 8 | tr '\n' '|')"
    fi
}

# until_true SECONDS COMMAND…
until_true() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || { "$@"; return 1; }
        sleep 0.2
    done
}

inside() { stillbox sandbox exec "$ID" -- bash -c "$1"; }

token() { stillbox sandbox info --json "$ID" | jq -r '.envdAccessToken // empty'; }

# curl_agent PATH ARGUMENTS…
curl_agent() {
    local path=$1
    shift
    curl -sS --fail-with-body -m 30 -H "E2b-Sandbox-Id: $ID" -H 'E2b-Sandbox-Port: 49983' -H "X-Access-Token: $(token)" \
        "http://127.0.0.1:3000$path" "$@"
}

api_key() { cat /var/lib/stillbox/api_key; }

cgroup_of() { find /sys/fs/cgroup -type d -name "*$1*" | head -n 1; }

# What the kernel still holds of this server's sandboxes, one per line; nothing is what we want after a kill.
left_of_sandboxes() {
    grep -o '/var/lib/stillbox/sandboxes/[^ ]*' /proc/mounts
    losetup -a | grep -F /var/lib/stillbox/sandboxes/
    ls -A /var/lib/stillbox/sandboxes
    find /sys/fs/cgroup -mindepth 2 -type d -path '*stillbox-*' -name 'i????????????????????*'
    pgrep -af '^/.stillbox/agent'
    return 0
}

nothing_left() { [ -z "$(left_of_sandboxes)" ]; }
