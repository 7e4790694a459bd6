"""A double of the Hugging Face Hub on the loopback, as far as huggingface_hub asks it to upload a folder."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """The Hub, used as a context.

    token: of the one user it knows
    created: the requests to make a repository
    files: what was committed, by path
    refuse: answer commits with an error of the server
    unknown: what it was asked and does not know; nothing, at the end
    """

    def __init__(self):
        self.token, self.refuse = "hf_of_the_double", False
        self.created, self.files, self.unknown = [], {}, []

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, content = hub.answer(self.path, self.headers.get("Authorization"), body)
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        assert self.unknown == []

    def answer(self, path, authorization, body):
        """The status and content of an answer."""
        if authorization != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "someone"}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return 200, {"url": f"{self.address}/{self.created[-1]['organization']}/{self.created[-1]['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/models/someone/digits/preupload/main":
            asked = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in asked]}
        if path == "/api/models/someone/digits/commit/main":
            if self.refuse:
                return 400, {"error": "not now"}
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.address}/someone/digits/commit/0123abc", "commitOid": "0123abc", "success": True}  # fmt: skip
        self.unknown.append(path)
        return 404, {"error": "the double does not know this"}
