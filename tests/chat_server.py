"""A stand-in for a served model: a real HTTP server that speaks the OpenAI chat protocol and answers what a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class ChatServer:
    """Serves until the block ends. `respond(request body, number of the request from 0)` gives a `Reply`, or the model's output."""

    def __init__(self, respond: Callable[[dict[str, Any], int], Any]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.requests)
                    server.requests.append(body | {"path": self.path})
                    server.headers.append(dict(self.headers))
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    reply = respond(body, number)
                finally:  # before the client has the answer, after which it may send the next request
                    with lock:
                        server.at_once -= 1
                try:
                    (reply if isinstance(reply, Reply) else completion(reply)).send(self)
                except ConnectionError:
                    pass  # the client gave up, as a test of time-outs wants it to

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Reply:
    """A raw reply: its bytes in pieces, with a pause before each."""

    def __init__(self, status: int, content: bytes, headers: dict[str, str] | None = None, pieces: int = 1, pause: float = 0.0):
        self.status, self.content, self.headers, self.pieces, self.pause = status, content, headers or {}, pieces, pause

    def send(self, handler: BaseHTTPRequestHandler) -> None:
        """Write it to a client."""
        handler.send_response(self.status)
        for name, value in {"Content-Length": str(len(self.content)), **self.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        size = -(-len(self.content) // self.pieces)
        for start in range(0, len(self.content), size or 1):
            time.sleep(self.pause)
            handler.wfile.write(self.content[start : start + size])
            handler.wfile.flush()


def completion(output: str | None, finish_reason: str = "stop", **reply: Any) -> Reply:
    """A chat completion as the protocol has it."""
    message = {"role": "assistant", "content": output}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice], "usage": usage}
    return Reply(200, json.dumps(body).encode(), **reply)
