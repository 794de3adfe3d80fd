# Stillbox in a container:
#
#   docker build -t stillbox .
#   docker run --privileged --cgroupns private -v /dev:/dev -v stillbox:/var/lib/stillbox -p 3000:3000 -p 3443:3443 stillbox
#
# --privileged: it makes namespaces, mounts, loop devices and network rules, and dumps processes. -v /dev:/dev: loop
# devices that are made while it runs would not appear in a /dev of the container's own. The volume is a folder on the
# host's ext4, xfs or btrfs: sandboxes' root file systems cannot lie on the container's own overlay.
#
# BINARY=built-here compiles everything (about ten minutes); BINARY=from-host takes target/release/stillbox as it is
# (`make build` before). BASE is any Debian 13 or newer; the tests name one made of our own rootfs.
ARG BASE=debian:trixie-slim
ARG RUST=rust:1-trixie
ARG BINARY=built-here

# ---------------------------------------------------------------- the binary, compiled here
FROM ${RUST} AS built-here
WORKDIR /src
COPY scripts/setup.sh scripts/setup.sh
RUN scripts/setup.sh run
COPY . .
RUN make build && install -D target/release/stillbox /out/stillbox

# ---------------------------------------------------------------- the binary, as the host built it
FROM ${BASE} AS from-host
COPY target/release/stillbox /out/stillbox

FROM ${BINARY} AS binary

# ---------------------------------------------------------------- what runs
FROM ${BASE}
# What the server calls (nft, conntrack, ip, mkfs.ext4), what makes the base template at first start (mmdebstrap and
# Debian's keys), and the CAs for registries.
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      ca-certificates conntrack debian-archive-keyring e2fsprogs iproute2 libnss-myhostname mmdebstrap nftables \
 && rm -rf /var/lib/apt/lists/*
COPY --from=binary /out/stillbox /usr/local/bin/stillbox
COPY scripts/container-entry.sh /usr/local/bin/container-entry
VOLUME /var/lib/stillbox
EXPOSE 3000 3443
# A container's port is published by the host, which decides who reaches it; inside, all addresses are served.
ENV STILLBOX_LISTEN=0.0.0.0:3000 STILLBOX_TLS_LISTEN=0.0.0.0:3443
STOPSIGNAL SIGTERM
ENTRYPOINT ["container-entry"]
CMD ["serve"]
