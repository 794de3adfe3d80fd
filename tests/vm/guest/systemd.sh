#!/bin/bash
exec >/dev/ttyS1 2>&1
echo "ok systemd $(systemctl is-system-running) $(stat -fc %T /sys/fs/cgroup)"
systemd-analyze; systemd-analyze blame | head; cat /proc/uptime; systemctl list-jobs
echo end
systemctl poweroff
