#!/bin/bash
# Process 1 of the first boot: the kernel, its file systems and stillbox, nothing else. Everything that a sandbox is
# promised is tried once here; the same binary passes the long tests on the machine that built it.

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mkdir -p /dev/pts /dev/shm
mount -t devpts -o newinstance,gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -o remount,rw /
hostname stillbox-vm
. /vm/lib.sh
ip link set lo up
# What udev or an administrator does elsewhere; everything else the kernel loads by itself.
modprobe loop
exec 3>&1 </dev/null >/dev/ttyS1 2>&1

main() {
    # A foreign device in a shared layer, open to everybody: no import lets it in, and if one did, nothing may open it.
    for layer in /var/lib/stillbox/layers/*; do mknod -m 0666 "$layer/opt/foreign" b 254 0; done
    check "kernel 6.1, cgroup v2 alone" 'uname -r | grep -q ^6.1 && [ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ]'
    CHECK_SECONDS=100 check "doctor --deep" "stillbox doctor --deep"
    stillbox serve </dev/null >/var/log/stillbox.log 2>&1 &
    SERVER=$!
    export SERVER
    check "the server answers" 'until_true 50 stillbox sandbox ls'
    ID=$(stillbox sandbox create base 2>/tmp/create.err)
    export ID
    check "create" '[ -n "$ID" ] || { cat /tmp/create.err; tail -n 5 /var/log/stillbox.log; false; }'
    [ -z "$ID" ] || in_a_sandbox
    kill -TERM $SERVER
    check "a clean stop" 'until_true 20 bash -c "! kill -0 $SERVER"'
    check "nothing of the server is left" '
        left=$(ip -o link | grep -E " sb[a-z0-9]{5}"; nft list tables | grep stillbox; ip netns list; ls /run/netns 2>/dev/null)
        [ -z "$left" ] || { echo "$left"; false; }'
}

in_a_sandbox() {
    check "commands run as user, sudo as root" '[ "$(inside "id -u; sudo id -u")" = "$(printf "1000\n0")" ]'
    check "exit codes come back" 'inside "exit 7"; [ $? = 7 ]'
    check "python, node and git are there" 'inside "python --version && node --version && git --version"'
    check "files" 'head -c 3000000 /dev/urandom >/tmp/sent && curl_agent "/files?path=x.bin" -H "Content-Type: application/octet-stream" --data-binary @/tmp/sent >/dev/null &&
        curl_agent "/files?path=x.bin" -o /tmp/got && cmp /tmp/sent /tmp/got'
    check "a port inside, by its name" 'stillbox sandbox exec "$ID" -- bash -c "cd /tmp && echo served >index.html && (setsid python3 -m http.server --bind 127.0.0.1 8000 >/dev/null 2>&1 &)" &&
        until_true 30 bash -c "curl -sS -m 5 -H \"Host: 8000-$ID.stillbox.localhost\" http://127.0.0.1:3000/ | grep -q served"'
    check "disk: 20 GB by df" 'size=$(inside "df -BG --output=size / | tail -n 1" | tr -dc 0-9); [ "$size" -ge 18 ] && [ "$size" -le 20 ]'
    check "devices: its own work, foreign ones do not" '
        inside "head -c 4 /dev/urandom | wc -c && echo x >/dev/null" && ! inside "sudo mknod /tmp/node b 254 0" &&
        inside "test -b /opt/foreign" && ! inside "head -c 1 /opt/foreign" && ! inside "sudo head -c 1 /opt/foreign"'
    check "memory: beyond the limit a process ends, the sandbox lives" '
        group=$(cgroup_of $ID) && [ "$(cat $group/memory.max)" = $((1 << 30)) ] && echo 200M >$group/memory.max &&
        ! inside "head -c 400M /dev/zero | tail >/dev/null" && echo 1G >$group/memory.max &&
        grep -q "oom_kill [1-9]" $group/memory.events && [ "$(inside "echo alive")" = alive ]'
    check "processes: the limit holds" '
        group=$(cgroup_of $ID) && [ "$(cat $group/pids.max)" = 4096 ] && now=$(cat $group/pids.current) && echo $((now + 20)) >$group/pids.max &&
        ! inside "for i in \$(seq 60); do sleep 5 & done" ; code=$?; echo 4096 >$group/pids.max; until_true 20 bash -c "[ \$(cat $group/pids.current) -lt $((now + 15)) ]" && [ $code = 0 ]'
    check "CPU: the limit holds" '
        group=$(cgroup_of $ID) && [ "$(cat $group/cpu.max)" = "200000 100000" ] && echo "10000 100000" >$group/cpu.max &&
        before=$(awk "/^nr_throttled/ {print \$2}" $group/cpu.stat) && inside "timeout 2 sh -c \"while :; do :; done\"; true" &&
        echo "200000 100000" >$group/cpu.max && [ $(awk "/^nr_throttled/ {print \$2}" $group/cpu.stat) -gt $((before + 5)) ]'
    check "namespaces cannot be made inside" '! inside "unshare --user --map-root-user true" && ! inside "sudo unshare --net true"'
    stopped_time
    check "kill" "stillbox sandbox kill --all"
    check "nothing of it is left" 'until_true 20 nothing_left || { left_of_sandboxes; false; }'
}

# Create by a restore, pause, resume and fork over the API.
stopped_time() {
    check "create restores a dump of the template" '
        until_true 60 grep -q "restore a dump from now on" /var/log/stillbox.log && other=$(stillbox sandbox create base) &&
        [ -e /var/lib/stillbox/sandboxes/$other/restored.json ] && [ "$(ID=$other inside "echo on")" = on ] && stillbox sandbox kill "$other"'
    check "pause and resume: a program goes on" '
        inside "nohup sh -c \"i=0; while :; do i=\\\$((i+1)); echo \\\$i >/tmp/count; sleep 0.05; done\" >/dev/null 2>&1 & sleep 1" &&
        post() { curl -sS --fail-with-body -m 60 -H "X-API-KEY: $(api_key)" -H "Content-Type: application/json" "http://127.0.0.1:3000/sandboxes/$ID/$1" -d "$2"; } &&
        count() { inside "until count=\$(cat /tmp/count) && [ -n \"\$count\" ]; do :; done; echo \$count"; } &&
        before=$(count) && post pause "{}" && [ -z "$(cgroup_of $ID)" ] && post connect "{\"timeout\":300}" >/dev/null &&
        sleep 1 && [ "$(count)" -gt "$before" ]'
    check "fork: two copies with files of their own" '
        copies=$(curl -sS --fail-with-body -m 60 -H "X-API-KEY: $(api_key)" -H "Content-Type: application/json" "http://127.0.0.1:3000/sandboxes/$ID/fork" -d "{\"count\":2,\"timeout\":300}" | jq -r ".[].sandbox.sandboxID") &&
        [ "$(wc -w <<<$copies)" = 2 ] && for copy in $copies; do ID=$copy inside "echo $copy >/tmp/whose; [ \$(cat /tmp/whose) = $copy ]" || exit 1; done &&
        ! inside "test -e /tmp/whose"'
}

main
echo end
sync
echo o >/proc/sysrq-trigger
sleep 30
