#!/bin/sh
# Runs inside the new rootfs after all packages are installed. Must give the same result when run twice.
set -eu

# The user that commands run as unless they name another one.
if ! id user >/dev/null 2>&1; then
  useradd --uid 1000 --create-home --shell /bin/bash --groups sudo user
fi
chmod 0755 /home/user

# `pip install` is why people open a sandbox; there is no distribution here to protect from it.
rm -f /usr/lib/python3*/EXTERNALLY-MANAGED

# Installers of languages write here without sudo (npm -g, pip, make install); /code is where E2B's users put theirs.
mkdir -p /code
chmod -R a+rwX /usr/local /code

# Some packages (openjdk) fail to configure when the folders of the man pages they skipped are missing.
for section in 1 2 3 4 5 6 7 8; do mkdir -p "/usr/share/man/man$section"; done

# Every program that starts with LANG=C.UTF-8 reads the locale: thirteen files, each looked for twice, or one archive.
# That is 0.3 to 0.4 ms of the millisecond that /bin/echo takes.
rm -f /usr/lib/locale/locale-archive
localedef --add-to-archive /usr/lib/locale/C.utf8

# What names one machine is written by the agent's /init when a sandbox gets its identity.
: > /etc/machine-id
rm -f /var/lib/dbus/machine-id /etc/ssh/ssh_host_*
echo localhost > /etc/hostname
rm -f /etc/resolv.conf
: > /etc/resolv.conf

# Left over by the installation, different at every build. Not /tmp: mmdebstrap keeps its apt configuration there
# until the end, and without it its own `apt-get clean` works on the host's lists and cache instead (it did).
rm -rf /var/cache/ldconfig /var/cache/debconf/*-old /var/lib/dpkg/*-old /var/log/apt /var/log/dpkg.log \
  /var/log/bootstrap.log /var/log/alternatives.log
