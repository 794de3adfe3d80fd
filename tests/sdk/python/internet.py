"""The internet of a test's world (world.py), a program in a network namespace of its own: a name server, a web server that
says who asked it for what, and the real hosts that are let in, each at an address of its own.

usage: internet.py RELAY [REAL_HOST…]
"""

import http.server
import socket
import struct
import subprocess
import sys
import threading

from world import splice

GATEWAY, RESOLVER, WEB = "198.51.100.1", "8.8.8.8", "93.184.216.34"
# Free for what a test starts in here itself.
SPARE, SPARE_NAME = "93.184.216.40", "spare.internet.example"
NAMES = {"www.internet.example": WEB, SPARE_NAME: SPARE}
A, IN, NO_SUCH_NAME = 1, 1, 3


def answer_to(question):
    """One A record, or an empty answer, or that there is no such name."""
    labels, at = [], 12
    while length := question[at]:
        labels.append(question[at + 1 : at + 1 + length].decode().lower())
        at += 1 + length
    kind, _ = struct.unpack("!HH", question[at + 1 : at + 5])
    address = NAMES.get(".".join(labels))
    records = 1 if address and kind == A else 0
    flags = 0x8180 | (0 if address else NO_SUCH_NAME)
    head = question[:2] + struct.pack("!HHHHH", flags, 1, records, 0, 0)
    body = question[12 : at + 5]
    record = struct.pack("!HHHIH", 0xC00C, A, IN, 60, 4) + socket.inet_aton(address) if records else b""
    return head + body + record


def serve_names():
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.bind((RESOLVER, 53))
    while True:
        question, asker = listener.recvfrom(512)
        listener.sendto(answer_to(question), asker)


class Web(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{self.headers['host']} {self.path} for {self.client_address[0]}\n".encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def let_in(relay, host, address, port):
    """What is asked of `address` is asked of the real host."""

    def serve(connection):
        with connection, socket.socket(socket.AF_UNIX) as outside:
            outside.connect(relay)
            outside.sendall(f"{host} {port}\n".encode())
            splice(connection, outside)

    listener = socket.create_server((address, port))
    while True:
        threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()


def main():
    print("started", flush=True)
    assert input() == "linked"
    relay, *hosts = sys.argv[1:]
    real = {host: f"93.184.216.{100 + number}" for number, host in enumerate(hosts)}
    addresses = [RESOLVER, WEB, SPARE, *real.values()]
    for command in ("link set lo up", f"address add {GATEWAY}/24 dev wan", "link set wan up", *(f"address add {address}/32 dev lo" for address in addresses)):
        subprocess.run(["ip", *command.split()], check=True)
    NAMES.update(real)
    for host, address in real.items():
        for port in (80, 443):
            threading.Thread(target=let_in, args=(relay, host, address, port), daemon=True).start()
    threading.Thread(target=serve_names, daemon=True).start()
    web = http.server.ThreadingHTTPServer((WEB, 80), Web)
    print("ready", flush=True)
    web.serve_forever()


if __name__ == "__main__":
    main()
