"""The client over a real connection: what `MockTransport` cannot show is how requests and cuts look as bytes."""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from deltaserve_client import AsyncClient, Client, Conflict, ConnectionFailed, StreamTruncated


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self):
        length = int(self.headers["content-length"])
        self.server.received.append((self.path, self.headers["transfer-encoding"], len(self.rfile.read(length))))
        self.reply(b'{"error": {"message": "no", "code": "name_conflict"}}', 409)

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.write(b'1f\r\ndata: {"choices":[{"text":"a"}]}\r\n')  # the rest of the chunk never comes
        self.close_connection = True

    def do_DELETE(self):
        self.server.received.append(self.path)
        self.reply(b"{}", 200)

    def reply(self, content, status):
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.received = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_an_upload_declares_its_length_instead_of_being_chunked(server, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 3_000_000)

    async def upload():
        async with AsyncClient(server.url) as client:
            await client.upload("a", path)

    with pytest.raises(Conflict):
        asyncio.run(upload())
    with Client(server.url) as client, pytest.raises(Conflict):
        client.upload("a", path)
    assert [(encoding, length) for _, encoding, length in server.received] == [(None, 3_000_000)] * 2


def test_a_name_of_dots_reaches_the_server_as_a_name(server):
    with Client(server.url) as client:
        client.delete("..")
        client.delete("a/../b")
    assert server.received == ["/v1/deltas/%2E%2E", "/v1/deltas/a%2F..%2Fb"]


def test_a_connection_cut_inside_a_stream_is_a_truncated_stream(server):
    with Client(server.url) as client, pytest.raises(StreamTruncated):
        list(client.stream("m", "p"))


def test_a_port_where_nobody_listens_surely_ran_nothing(server):
    url = server.url
    server.server_close()
    with Client(url, retries=0) as client, pytest.raises(ConnectionFailed) as caught:
        client.complete("m", "p")
    assert not caught.value.maybe_ran
