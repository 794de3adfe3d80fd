"""Servers that are not in the base template; the test brings them along."""

import os
import socket
import subprocess

from .ground import WAIT_S_MAX, place, same, until

REDIS = "/tmp/redis"


class Client:
    """As much of redis's protocol as is needed."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S_MAX)
        self.lines = self.socket.makefile("rb")

    def ask(self, *words):
        self.socket.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in words))
        return self.answer()

    def answer(self):
        line = self.lines.readline()
        kind, rest = line[:1], line[1:].strip()
        if kind == b"$":
            return None if rest == b"-1" else self.lines.read(int(rest) + 2)[:-2].decode()
        if kind == b"*":
            return [self.answer() for _ in range(int(rest))]
        return int(rest) if kind == b":" else rest.decode()


def redis_keeps_its_keys_its_connections_and_its_subscribers():
    folder, port = place("redis"), 7379
    arguments = ["--port", str(port), "--appendonly", "yes", "--dir", str(folder), "--logfile", str(folder / "log")]
    server = subprocess.Popen([f"{REDIS}/redis-server", *arguments], env={**os.environ, "LD_LIBRARY_PATH": REDIS})
    until(lambda: (folder / "log").exists() and "Ready to accept connections" in (folder / "log").read_text(), "redis")
    client, subscriber = Client(port), Client(port)
    same(subscriber.ask("SUBSCRIBE", "news"), ["subscribe", "news", 1], "the subscription")
    cycle = 0
    while True:
        cycle += 1
        same(client.ask("INCR", "cycles"), cycle, "the count")
        client.ask("SET", f"key-{cycle}", f"value-{cycle}")
        yield
        same(client.ask("GET", "cycles"), str(cycle), "the count afterwards")
        same(client.ask("GET", f"key-{cycle}"), f"value-{cycle}", "the newest value")
        same(client.ask("GET", "key-1"), "value-1", "the oldest value")
        same(client.ask("PUBLISH", "news", str(cycle)), 1, "subscribers")
        same(subscriber.answer(), ["message", "news", str(cycle)], "what the subscriber got")
        same(server.poll(), None, "the end of redis")
