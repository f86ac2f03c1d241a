"""An HTTP server in this process, on a port that was free, for the tests that need an endpoint."""
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """seen: what the handler of a test keeps of all requests."""
    daemon_threads = True

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.seen = []
        # it is never shut down: looking for that a hundred times a second costs each test after
        threading.Thread(target=self.serve_forever, args=(3600,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def body(self):
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def send(self, code, text, *headers, size=None):
        self.send_response(code)
        for name, value in (*headers, ("Content-Length", size or len(text))):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(text)

    def say(self, text, end="stop", code=200):
        """A chat completion."""
        self.send(code, json.dumps({
            "choices": [{"message": {"content": text}, "finish_reason": end}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 7}}).encode())
