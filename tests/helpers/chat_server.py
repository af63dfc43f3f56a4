"""OpenAI-compatible server for tests, with scripted responses."""

import json
import time
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread


def answer_from_prompt(number, request):
    """Return a valid answer that depends on the prompt alone."""
    digest = sha256(request["messages"][0]["content"].encode()).hexdigest()[:8]
    return completion(f"Somebody wishes for {digest} and nothing else.")


def completion(text, reason="stop"):
    content = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]}
    return 200, json.dumps(content).encode(), {}


def status(code, body=b"sorry", **headers):
    return lambda number, request: (code, body, headers)


def body(content):
    return lambda number, request: (200, content, {})


def close_connection(number, request):
    return None


@contextmanager
def run_server(*responses):
    """Run a server that answers its nth request with the nth of `responses`, later ones with the last.

    A response is a function (number of the request, its JSON) -> (status, body, headers), or None to close the
    connection; or the string "stalls".
    """
    server = Server(("127.0.0.1", 0), Handler)
    server.responses, server.requests, server.keys, server.times = responses, [], [], []
    server.released = Event()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Print nothing: a client that times out closes its connections."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = len(server.requests)
        server.requests.append(request)
        server.keys.append(self.headers.get("Authorization"))
        server.times.append(time.monotonic())
        assert self.path == "/v1/chat/completions"
        response = server.responses[min(number, len(server.responses) - 1)]
        if response == "stalls":
            server.released.wait(30)
            return
        result = response(number, request)
        if result is None:
            self.close_connection = True
            return
        code, content, headers = result
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def sent_prompts(server):
    return [request["messages"][0]["content"] for request in server.requests]
