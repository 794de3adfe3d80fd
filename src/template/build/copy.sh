# A COPY step, run as root inside the build's sandbox; the archive and what is unpacked of it go with the sandbox.
# Given: ARCHIVE, UNPACKED, TAR_FLAGS, SOURCE (a path in the archive, empty for all of it), TARGET, OWNER, MODE (may be
# empty), WORKDIR (empty: USER_NAME's home), USER_NAME.
set -eo pipefail

if [ -z "$WORKDIR" ]; then
    while IFS=: read -r name _ _ _ _ home _; do
        if [ "$name" = "$USER_NAME" ]; then WORKDIR=$home; fi
    done < /etc/passwd
fi
cd "${WORKDIR:-/}"
case $TARGET in
    /*) ;;
    *) TARGET=$(pwd)/$TARGET ;;
esac

mkdir -p "$UNPACKED"
tar "-x${TAR_FLAGS}f" "$ARCHIVE" -C "$UNPACKED"
entry=$UNPACKED${SOURCE:+/$SOURCE}
if [ ! -e "$entry" ] && [ ! -L "$entry" ]; then
    echo "source path does not exist: ${SOURCE:-.}" >&2
    exit 1
fi

if [ -d "$entry" ] && [ ! -L "$entry" ]; then
    chown -hR "$OWNER" "$entry"
    if [ -n "$MODE" ]; then chmod -R "$MODE" "$entry"; fi
    if [ ! -d "$TARGET" ]; then
        mkdir -p "$TARGET"
        chown "$OWNER" "$TARGET"
    fi
    # Merged as docker does it: files replace files and links, folders that are there keep their metadata, and a link to
    # a folder (/lib -> usr/lib) is followed. Busybox's tar knows none of these words.
    if tar --version 2>/dev/null | grep -q GNU; then
        tar -cf - -C "$entry" . | tar -xpf - -C "$TARGET" --same-owner --keep-directory-symlink --no-overwrite-dir
    else
        cp -a "$entry/." "$TARGET/"
    fi
    exit 0
fi

# The mode of a link is that of what it leads to, which is not ours to change.
chown -h "$OWNER" "$entry"
if [ -n "$MODE" ] && [ ! -L "$entry" ]; then chmod "$MODE" "$entry"; fi
case $TARGET in
    */) folder=$TARGET ;;
    *) folder=$(dirname "$TARGET") ;;
esac
if [ ! -d "$folder" ]; then
    mkdir -p "$folder"
    chown "$OWNER" "$folder"
fi
mv -f "$entry" "$TARGET"
