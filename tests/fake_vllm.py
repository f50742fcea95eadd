"""A small stand-in for vLLM's OpenAI-compatible server: in this process, or as `python -m fake_vllm`."""

from __future__ import annotations

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeVLLM(ThreadingHTTPServer):
    """Answers on a free port of 127.0.0.1 from the moment it is made.

    Attributes:
        reply: request's body -> text; or (text, finish_reason); or an HTTP status, with which the request fails;
            or None: the connection is closed without an answer.
        requests: bodies of the completion requests, in the order of arrival.
        tokenize: text -> token ids; None: no such endpoint.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, reply, tokenize=None, models=("model",), max_model_len=128, port=0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.reply, self.tokenize, self.max_model_len = reply, tokenize, max_model_len
        self.models, self.requests = models, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/v1/models":
            self._send(
                200, {"data": [{"id": m, "max_model_len": self.server.max_model_len} for m in self.server.models]}
            )
        else:
            self._send(200 if self.path == "/health" else 404, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize" and self.server.tokenize:
            self._send(200, {"tokens": self.server.tokenize(body["prompt"])})
        elif self.path == "/v1/completions":
            self.server.requests.append(body)
            reply = self.server.reply(body)
            if reply is None:
                self.close_connection = True
                return
            if isinstance(reply, int):
                self._send(reply, {"error": {"message": f"refused with {reply}"}})
                return
            text, reason = reply if isinstance(reply, tuple) else (reply, "stop")
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(text), "total_tokens": 0}
            choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
            self._send(
                200,
                {
                    "id": "1",
                    "object": "text_completion",
                    "created": 1,
                    "model": "m",
                    "choices": [choice],
                    "usage": usage,
                },
            )
        else:
            self._send(404, {"error": {"message": "no such page"}})

    def _send(self, status, payload):
        content = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("--model", "--host", "--port", "--reply"):
        parser.add_argument(name)
    given, _ = parser.parse_known_args()
    if given.reply is None:
        raise SystemExit("no --reply: cannot start")
    FakeVLLM(lambda body: given.reply, models=(given.model,), port=int(given.port))
    threading.Event().wait()
