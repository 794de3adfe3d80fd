# Makes an image a base of sandboxes, run as root: what users of E2B's templates rely on, whatever the image is.
set -e
if ! id -u user >/dev/null 2>&1; then
    if command -v useradd >/dev/null; then
        useradd --create-home --shell /bin/bash user
    elif command -v adduser >/dev/null; then
        adduser -D -s /bin/bash user
    else
        uid=1000
        while grep -q "^[^:]*:[^:]*:$uid:" /etc/passwd; do uid=$((uid + 1)); done
        echo "user:x:$uid:$uid::/home/user:/bin/bash" >> /etc/passwd
        echo "user:x:$uid:" >> /etc/group
    fi
fi
mkdir -p /home/user
if [ -d /etc/skel ]; then
    for file in /etc/skel/.[!.]*; do
        target=/home/user/${file##*/}
        if [ -e "$file" ] && [ ! -e "$target" ]; then cp -a "$file" "$target"; fi
    done
fi
chown -R user: /home/user
# Images without sudo have no use for the rule, and no folder for it.
if [ -e /etc/sudoers ] && ! grep -qs '^user ALL=(ALL:ALL) NOPASSWD: ALL' /etc/sudoers; then
    echo 'user ALL=(ALL:ALL) NOPASSWD: ALL' >> /etc/sudoers
fi
mkdir -p /code /usr/local
chmod 777 /code
# Folders only: what is installed there stays in the image's own layers.
find /usr/local -type d ! -perm 777 -exec chmod 777 {} +
