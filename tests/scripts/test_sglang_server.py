"""A client of a server that ends in the middle of an answer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts.sglang_server import Server, ServerFailed

#: Answers health checks, and /generate with the pieces of a stream; "cut" is not followed by the stream's end.
SERVER = """
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for count in (1, 2):
            piece = {"output_ids": [7] * count, "meta_info": {"cached_tokens_details": {"host": 16}}}
            self.chunk("data: " + json.dumps(piece) + "\\n\\n")
        if asked["input_ids"] == [1]:
            self.chunk("data: [DONE]\\n\\n")
            self.chunk("")
        self.close_connection = True

    def chunk(self, text):
        self.wfile.write(f"{len(text):x}\\r\\n{text}\\r\\n".encode())

http.server.HTTPServer((sys.argv[-3], int(sys.argv[-1])), Handler).serve_forever()
"""


def test_an_answer_that_was_cut_short_is_none(tmp_path: Path) -> None:
    with Server([sys.executable, "-c", SERVER], {}, tmp_path / "log") as server:
        server.wait_ready(60)
        answer = server.generate([1], 2)
        assert (answer.output_ids, answer.cached) == ([7, 7], {"host": 16})
        with pytest.raises(ServerFailed, match="ended after 2 tokens"):
            server.generate([2], 2)
