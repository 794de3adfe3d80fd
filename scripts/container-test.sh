#!/usr/bin/env bash
# Builds the Dockerfile at the top with buildah, on a base image made of our own base template (no registry is asked), and
# runs `doctor` and the demo in it, privileged, by runc. Needs root and target/release/stillbox. `make container-test`.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
stillbox=$top/target/release/stillbox
work=$top/target/container
image=localhost/stillbox
container=stillbox-container-test-$$
mounted=

say() { echo "== container: $* (${SECONDS} s)"; }
# An image store of our own: nothing of the machine's is seen or changed.
store() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver overlay "$@"; }

clean_up() {
    runc delete --force "$container" >/dev/null 2>&1 || true
    [ -z "$mounted" ] || store rm "$mounted" >/dev/null 2>&1 || true
    # The server's data folder is a mount on itself.
    umount --recursive "$work/data" 2>/dev/null || true
    rm -rf "$work/data" "$work/bundle"
}
trap clean_up EXIT

# The base template's only layer, as it lies in a data folder.
base_layer() {
    "$stillbox" template build base --data-dir "$work/template" >&2
    local layer
    layer=$(sed -n 's/^ *"\([0-9a-f]\{64\}\)",\{0,1\}$/\1/p' "$work"/template/templates/base-*.json | head -n1)
    echo "$work/template/layers/$layer"
}

make_base_image() {
    local from folder
    from=$(store from scratch)
    folder=$(store mount "$from")
    cp -a "$1/." "$folder/"
    # What Docker writes into every container itself.
    cp /etc/resolv.conf "$folder/etc/resolv.conf"
    store umount "$from" >/dev/null
    store commit --quiet --disable-compression "$from" localhost/stillbox-test-base >/dev/null
    store rm "$from" >/dev/null
}

# A bundle with what `docker run --privileged --cgroupns private -v /dev:/dev -v …:/var/lib/stillbox` gives.
make_bundle() { # root file system
    mkdir -p "$work/bundle" "$work/data"
    (cd "$work/bundle" && rm -f config.json && runc spec)
    python3 - "$work/bundle/config.json" "$1" "$work/data" "$work/base.tar.zst" <<'PYTHON'
import json, sys
path, root, data, archive = sys.argv[1:]
spec = json.load(open(path))
capabilities = [line.strip() for line in open("/proc/self/status") if line.startswith("CapEff:")]
held = int(capabilities[0].split()[1], 16)
names = """CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT
SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG
WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE""".split()
kept = ["CAP_" + name for number, name in enumerate(names) if held >> number & 1]
process = spec["process"]
process.update(terminal=False, noNewPrivileges=False, args=["/usr/local/bin/container-entry", "serve", "--template-archive", "/base.tar.zst"])
process["env"] = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
process["capabilities"] = {kind: kept for kind in ("bounding", "effective", "permitted")}
process.pop("rlimits", None)
spec["root"] = {"path": root, "readonly": False}
spec["hostname"] = "stillbox"
spec["linux"] = {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")],
                 "resources": {"devices": [{"allow": True, "access": "rwm"}]}}
spec["mounts"] = [mount for mount in spec["mounts"] if mount["destination"] in ("/proc",)] + [
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "rw"]},
    {"destination": "/dev", "type": "bind", "source": "/dev", "options": ["rbind", "rw"]},
    {"destination": "/var/lib/stillbox", "type": "bind", "source": data, "options": ["bind", "rw"]},
    {"destination": "/base.tar.zst", "type": "bind", "source": archive, "options": ["bind", "ro"]}]
json.dump(spec, open(path, "w"))
PYTHON
}

inside() { runc exec "$container" stillbox "$@"; }

# Until the server answers; if it ends before, its log says why.
wait_for_server() {
    local deadline=$((SECONDS + 90))
    until inside sandbox ls >/dev/null 2>&1; do
        if ! runc state "$container" 2>/dev/null | grep -q '"status": "running"' || [ $SECONDS -ge $deadline ]; then
            echo "== container: the server does not answer; its log:" >&2
            cat "$work/serve.log" >&2
            exit 1
        fi
        sleep 0.2
    done
}

[ "$(id -u)" = 0 ] || { echo "container: mounting and runc need root" >&2; exit 1; }
[ -x "$stillbox" ] || { echo "container: $stillbox is missing; run make build" >&2; exit 1; }
mkdir -p "$work"
layer=$(base_layer)
"$stillbox" template export base "$work/base.tar.zst" --data-dir "$work/template" >/dev/null
store inspect --type image localhost/stillbox-test-base >/dev/null 2>&1 || make_base_image "$layer"
say "base image is there"
store build --quiet --isolation chroot --network host --build-arg BASE=localhost/stillbox-test-base --build-arg BINARY=from-host \
    --layers=false --tag "$image" "$top" >/dev/null
say "image is built"
mounted=$(store from --pull-never "$image")
make_bundle "$(store mount "$mounted")"
runc run --bundle "$work/bundle" --detach "$container" >"$work/serve.log" 2>&1 </dev/null
wait_for_server
say "server answers"
inside doctor
inside demo
say "doctor and demo passed"
