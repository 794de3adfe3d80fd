"""Sockets and pipes, with what nobody has read yet."""

import os
import socket
import struct

from .ground import WAIT_S_MAX, as_root, place, same, until


def loopback_tcp_keeps_its_connections_and_what_nobody_has_read():
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    half = socket.create_connection(listener.getsockname())
    half_server, _ = listener.accept()
    half.sendall(b"last words")
    half.shutdown(socket.SHUT_WR)
    for each in (client, server, half, half_server, listener):
        each.settimeout(WAIT_S_MAX)
    there, back = os.urandom(50_000), os.urandom(30_000)

    def receive(connection, size):
        data = b""
        while len(data) < size and (more := connection.recv(size - len(data))):
            data += more
        return data

    cycle = 0
    while True:
        client.sendall(there)
        server.sendall(back)
        yield
        same(receive(server, len(there)), there, "what the client had sent")
        same(receive(client, len(back)), back, "what the server had sent")
        if cycle == 0:
            same(receive(half_server, 100), b"last words", "what came before the end of a half-closed connection")
        half_server.sendall(b"answer")
        same(receive(half, 6), b"answer", "the open half of a connection")
        new = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        new.sendall(b"new")
        same(receive(accepted, 3), b"new", "a new connection to the old listener")
        new.close()
        accepted.close()
        cycle += 1


def unix_sockets_of_every_kind_keep_their_peers_and_messages():
    folder = place("unix")
    pairs = {}
    for name, kind, address in [
        ("path", socket.SOCK_STREAM, str(folder / "stream")),
        ("abstract", socket.SOCK_STREAM, "\0workloads-abstract"),
        ("seqpacket", socket.SOCK_SEQPACKET, str(folder / "seqpacket")),
    ]:
        listener = socket.socket(socket.AF_UNIX, kind)
        listener.bind(address)
        listener.listen()
        client = socket.socket(socket.AF_UNIX, kind)
        client.connect(address)
        pairs[name] = (client, listener.accept()[0], listener)
    datagrams = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
    datagrams[1].bind(str(folder / "datagram"))
    datagrams[0].connect(str(folder / "datagram"))
    pairs["datagram"] = (*datagrams, None)
    pairs["socketpair"] = (*socket.socketpair(), None)
    while True:
        for name, (client, _, _) in pairs.items():
            client.send(f"first {name}".encode())
            client.send(f"second {name}".encode())
        yield
        for name, (client, server, listener) in pairs.items():
            server.settimeout(WAIT_S_MAX)
            size = len(f"first {name}")
            same(server.recv(size).decode(), f"first {name}", "the first message")
            same(server.recv(100).decode(), f"second {name}", "the second message")
            if listener is not None:
                new = socket.socket(socket.AF_UNIX, client.type)
                new.connect(listener.getsockname())
                listener.settimeout(WAIT_S_MAX)
                listener.accept()[0].close()
                new.close()


def a_fifo_and_a_pipe_keep_what_was_written():
    path = place("fifo") / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY)
    pipe = os.pipe()
    while True:
        os.write(writer, b"by fifo")
        os.write(pipe[1], b"p" * 60_000)
        yield
        same(os.read(reader, 100), b"by fifo", "the FIFO's bytes")
        same(os.read(pipe[0], 100_000), b"p" * 60_000, "the pipe's bytes")


def udp_sockets_stay_bound_and_connected():
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.connect(server.getsockname())
    names = client.getsockname(), client.getpeername()
    server.settimeout(WAIT_S_MAX)
    while True:
        yield
        same((client.getsockname(), client.getpeername()), names, "addresses")
        client.send(b"datagram")
        same(server.recvfrom(100), (b"datagram", names[0]), "a datagram")


def a_netlink_socket_still_answers():
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    netlink.bind((0, 0))
    netlink.settimeout(WAIT_S_MAX)
    while True:
        yield
        # RTM_GETLINK with NLM_F_REQUEST, about link 1
        netlink.send(struct.pack("IHHII", 32, 18, 1, 5, 0) + struct.pack("BxHiII", 0, 0, 1, 0, 0))
        answer = netlink.recv(65536)
        same(struct.unpack_from("H", answer, 4)[0], 16, "the kind of the answer (RTM_NEWLINK)")
        assert b"lo\0" in answer, "link 1 is not lo"


@as_root
def a_packet_socket_still_hears_its_link():
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    packets.bind(("lo", 3))
    packets.settimeout(0.5)
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    while True:
        yield
        token = os.urandom(16)

        def heard():
            sender.sendto(token, ("127.0.0.1", 9))
            try:
                return any(token in packets.recv(65536) for _ in range(1000))
            except TimeoutError:
                return False

        until(heard, "a packet on lo")
