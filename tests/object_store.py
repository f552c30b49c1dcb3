"""An S3 store on loopback (moto's server), and a proxy before it that drops, delays and refuses."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "clips"


class Store:
    """A store with one bucket.

    Args:
        address: Of its server.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.client = boto3.client("s3", **credentials(), endpoint_url=self.endpoint)
        self.client.create_bucket(Bucket=BUCKET)

    @property
    def endpoint(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    def environment(self, endpoint: str = "") -> dict[str, str]:
        """Environment of a process that is to reach it."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def credentials() -> dict[str, str]:
    return {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}


@contextmanager
def running() -> Iterator[Store]:
    """Context manager: a store that runs."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield Store(server.get_host_and_port())
    finally:
        server.stop()


Fault = Callable[[bytes], "bytes | None"]
"""Given the first bytes of a request: bytes to answer with instead of the store, b"" to close; None to pass it on."""


def refusal(status: int, code: str = "") -> bytes:
    """An error as S3 answers it."""
    body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode() if code else b""
    head = f"HTTP/1.1 {status} Refused\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


class Proxy:
    """A TCP proxy before a store, one connection a request.

    Attributes:
        fault: Decides what becomes of a request.
        cut: Bytes of an answer after which the connection is dropped; None for never. It is reset by each cut.
        pause: Seconds before each block of an answer.
        requests: First lines of the requests.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.fault: Fault = lambda request: None
        self.cut: list[int] = []
        self.pause = 0.0
        self.requests: list[str] = []
        self._open = True
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def reset(self) -> None:
        """Forget faults and requests."""
        self.fault, self.cut, self.pause, self.requests = lambda request: None, [], 0.0, []

    def close(self) -> None:
        self._open = False
        self._server.close()

    def _serve(self) -> None:
        while self._open:
            with suppress(OSError):
                connection, _ = self._server.accept()
                threading.Thread(target=self._pass, args=(connection,), daemon=True).start()

    def _pass(self, connection: socket.socket) -> None:
        import time

        with suppress(OSError), connection:
            head = b""
            while b"\r\n\r\n" not in head:
                if not (block := connection.recv(1 << 16)):
                    return
                head += block
            self.requests.append(head.split(b"\r\n", 1)[0].decode())
            answer = self.fault(head)
            if answer is not None:
                self._read_rest(connection, head)
                connection.sendall(answer)
                return
            fields, _, rest = head.partition(b"\r\n\r\n")
            lines = [
                line for line in fields.split(b"\r\n") if not line.lower().startswith((b"connection:", b"expect:"))
            ]
            if b"100-continue" in fields:
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            with socket.create_connection(self._store.address) as store:
                store.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + rest)
                threading.Thread(target=self._forward, args=(connection, store), daemon=True).start()
                passed = 0
                while block := store.recv(1 << 14):
                    if self.pause:
                        time.sleep(self.pause)
                    if self.cut and passed + len(block) > self.cut[0]:
                        connection.sendall(block[: self.cut.pop(0) - passed])
                        connection.shutdown(socket.SHUT_RDWR)  # a close alone waits for the thread that reads from it
                        return
                    connection.sendall(block)
                    passed += len(block)

    @staticmethod
    def _read_rest(connection: socket.socket, head: bytes) -> None:
        """Read the body of a request that is not passed on, so that its sender reads the answer."""
        fields, _, rest = head.partition(b"\r\n\r\n")
        length = next(
            (int(line.split(b":")[1]) for line in fields.split(b"\r\n") if line.lower().startswith(b"content-length")),
            0,
        )
        if b"100-continue" in fields:
            return
        while len(rest) < length and (block := connection.recv(1 << 16)):
            rest += block

    @staticmethod
    def _forward(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while block := source.recv(1 << 16):
                target.sendall(block)
