# A USER step, run as root: makes the user if there is none of that name. Given: NAME, SUDO (yes or empty).
set -e
if ! id -u "$NAME" >/dev/null 2>&1; then
    if command -v useradd >/dev/null; then
        useradd --create-home --shell /bin/bash "$NAME"
    else
        adduser -D -s /bin/bash "$NAME"
    fi
fi
if [ -n "$SUDO" ]; then
    for group in sudo wheel; do
        if grep -q "^$group:" /etc/group; then
            if command -v usermod >/dev/null; then usermod -aG "$group" "$NAME"; else addgroup "$NAME" "$group"; fi
            break
        fi
    done
    line="$NAME ALL=(ALL:ALL) NOPASSWD: ALL"
    if ! grep -qxF "$line" /etc/sudoers 2>/dev/null; then echo "$line" >> /etc/sudoers; fi
fi
