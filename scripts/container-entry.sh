#!/bin/sh
# The entry point of the container: makes room for the sandboxes' cgroups, then runs stillbox with the given arguments.
set -eu

cgroups=/sys/fs/cgroup
if [ -e "$cgroups/cgroup.controllers" ]; then
    # A cgroup with processes in it gives no controllers to its children, and we begin in the container's topmost one:
    # go into a leaf, then hand the controllers down.
    mkdir -p "$cgroups/stillbox-server"
    while read -r pid; do
        # A process that has just ended cannot be moved, and need not be.
        echo "$pid" > "$cgroups/stillbox-server/cgroup.procs" 2>/dev/null || true
    done < "$cgroups/cgroup.procs"
    for controller in cpu memory pids; do
        echo "+$controller" > "$cgroups/cgroup.subtree_control" || echo "container-entry: the host gives no $controller controller to this container" >&2
    done
fi

exec stillbox "$@"
