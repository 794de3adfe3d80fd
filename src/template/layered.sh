# Runs in a mount and pid namespace of its own and makes one layer: a chroot into an overlay whose upper is the layer.
# $1 lowers, top first, with ':' in between   $2 upper   $3 scratch   $4 cache, or empty
# In scratch: sources.list, packages, pip (a word per line each), recipe/ and finish.sh. What the host needs to reach its
# mirrors (resolver, CAs, pip's and apt's settings) is mounted into the chroot and gone with the namespace.
set -eu
lowers=$1 upper=$2 scratch=$3 cache=$4
root=$scratch/root
# Below /run, which is a tmpfs here: nothing of it can stay in the layer.
tools=/run/stillbox-build
step() { echo "I: $*" >&2; }

mkdir "$root" "$scratch/work"
mount -t overlay -o "lowerdir=$lowers,upperdir=$upper,workdir=$scratch/work,index=off,metacopy=off,redirect_dir=off" stillbox "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=0755 stillbox "$root/run"
mount -t tmpfs -o mode=0755 stillbox "$root/dev"
mount -t tmpfs -o mode=1777 stillbox "$root/tmp"
for device in null zero full random urandom tty; do
  : > "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir -p "$root$tools/pip-global/pip" "$root$tools/cache" "$root$tools/lists/partial"
if [ -e "$root/etc/resolv.conf" ] && [ -e /etc/resolv.conf ]; then
  mount --bind /etc/resolv.conf "$root/etc/resolv.conf"
fi
cp "$scratch/sources.list" "$root$tools/sources.list"

# What is downloaded is kept for the next build, where there is a place for it.
if [ -n "$cache" ]; then
  mkdir -p "$cache/apt/partial" "$cache/pip"
  mount --bind "$cache" "$root$tools/cache"
else
  mkdir -p "$root$tools/cache/apt/partial"
fi

# pip's settings, its variables included; files that they name are found under names of the chroot's own.
set --
for name in $(env | sed -n 's/^\(PIP_[A-Z_]*\|[a-z]*_proxy\|[A-Z]*_PROXY\)=.*/\1/p'); do
  eval "set -- \"\$@\" \"$name=\$$name\""
done
[ ! -f /etc/pip.conf ] || cp /etc/pip.conf "$root$tools/pip-global/pip/pip.conf"
for file in "${PIP_CONFIG_FILE:-}" "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf"; do
  [ -n "$file" ] && [ -f "$file" ] || continue
  cp "$file" "$root$tools/pip.conf"
  set -- "$@" "PIP_CONFIG_FILE=$tools/pip.conf"
  break
done
for file in "${PIP_CERT:-}" "${SSL_CERT_FILE:-}" /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt; do
  [ -n "$file" ] && [ -f "$file" ] || continue
  cp "$file" "$root$tools/ca.pem"
  set -- "$@" "PIP_CERT=$tools/ca.pem" "SSL_CERT_FILE=$tools/ca.pem" "REQUESTS_CA_BUNDLE=$tools/ca.pem"
  break
done
if [ -d "${PIP_FIND_LINKS:-}" ]; then
  mkdir "$root$tools/wheels"
  mount --bind "$PIP_FIND_LINKS" "$root$tools/wheels"
  set -- "$@" "PIP_FIND_LINKS=$tools/wheels"
fi
inside() {
  env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
    DEBIAN_FRONTEND=noninteractive XDG_CONFIG_DIRS="$tools/pip-global" PYTHONDONTWRITEBYTECODE=1 "$@"
}

apt() {
  inside "$@" chroot "$root" apt-get -qq -y -o APT::Sandbox::User=root -o Dpkg::Use-Pty=0 \
    -o Dir::Etc::SourceList="$tools/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::State::Lists="$tools/lists" -o Dir::Cache::Archives="$tools/cache/apt" -o APT::Keep-Downloaded-Packages=true \
    $verb
}
if [ -s "$scratch/packages" ]; then
  step "installing Debian packages: $(tr '\n' ' ' < "$scratch/packages")"
  # Services that packages want to start would be the host's.
  printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d"
  chmod 0755 "$root/usr/sbin/policy-rc.d"
  verb=update apt "$@" >&2
  verb="install --no-install-recommends $(tr '\n' ' ' < "$scratch/packages")" apt "$@" >&2
  rm -f "$root/usr/sbin/policy-rc.d"
fi
if [ -s "$scratch/pip" ]; then
  step "installing Python packages: $(tr '\n' ' ' < "$scratch/pip")"
  cp "$scratch/pip" "$root$tools/requirements.txt"
  inside "$@" PIP_CACHE_DIR="$tools/cache/pip" PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE= \
    chroot "$root" python3 -m pip install --quiet --no-input --no-compile --root-user-action=ignore --no-warn-script-location \
    --progress-bar off -r "$tools/requirements.txt" >&2
  step "compiling Python packages"
  inside PYTHONDONTWRITEBYTECODE= chroot "$root" python3 -m compileall -q -j 0 /usr/local/lib >&2 || true
fi
step "finishing"
STILLBOX_RECIPE=$scratch/recipe sh -eu "$scratch/finish.sh" "$root"
rm -rf "$root/var/log/apt" "$root/var/log/dpkg.log" "$root/var/log/alternatives.log" "$root/var/cache/debconf/"*-old \
  "$root/var/lib/dpkg/"*-old "$root/var/cache/ldconfig" "$root/root/.cache"
