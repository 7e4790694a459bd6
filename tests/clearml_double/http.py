"""The double as it answers over HTTP: the API's endpoints, and the file server at the same address."""

import base64
import contextlib
import io
import json
import re
import time
import traceback
from email.parser import BytesHeaderParser
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from clearml_double.rules import ACCESS_KEY, API_VERSION, SECRET_KEY, Refused, new_id


class Call(NamedTuple):
    endpoint: str  # "tasks.create", or "POST", "GET", "HEAD" for the file server
    body: object  # dict; list of events for events.add_batch; the path for the file server
    status: int  # of HTTP; 0 where no answer was given
    time: float  # seconds since the epoch


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.double.connections.add(self.connection)

    def finish(self):
        self.double.connections.discard(self.connection)
        super().finish()

    def handle(self):
        with contextlib.suppress(OSError):  # the other side, or stop(), closed the connection
            super().handle()

    def log_message(self, *args):
        pass

    def answer(self, status, body, kind="application/json"):
        body = json.dumps(body).encode() if kind == "application/json" else body
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        if self.double.hanging.is_set():
            self.double.record(Call(path.strip("/"), None, 0, time.time()))
            self.double.hanging_over.wait()
            self.close_connection = True
            return
        call = re.fullmatch(r"/(?:v[\d.]+/)?([a-z]+\.[a-z_]+)", path)
        if call:
            self.api_call(call[1], body)
        else:
            self.file_call(unquote(path).strip("/"), body)

    do_GET = do_POST = do_HEAD = do_DELETE = do_any

    def api_call(self, endpoint, raw):
        double = self.double
        if "json-lines" in self.headers.get("Content-Type", ""):
            body = [json.loads(line) for line in raw.splitlines() if line.strip()]
        else:
            body = json.loads(raw or b"{}") or {}
        status, subcode, message, data = 200, 0, "OK", {}
        try:
            self.authorize(endpoint)
            double.fail(endpoint)
            with double.lock:
                data = double.api.call(endpoint, body)
        except Refused as refused:
            status, subcode, message = refused.status, refused.subcode, str(refused)
            (double.unknown if refused.unknown else double.refused).append(f"{endpoint}: {message}")
        except Exception:
            double.broken.append(f"{endpoint}: {traceback.format_exc()}")
            status, subcode, message = 400, 0, "error in the double"
        double.record(Call(endpoint, body, status, time.time()), message if status != 200 else None)
        meta = {
            "id": new_id(), "trx": new_id(),
            "endpoint": {"name": endpoint, "requested_version": API_VERSION, "actual_version": "1.0"},
            "result_code": status, "result_subcode": subcode, "result_msg": message, "error_stack": "",
            "error_data": {},
        }  # fmt: skip
        self.answer(status, {"meta": meta, "data": data})

    def has_token(self):
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        return kind == "Bearer" and given in self.double.api.tokens

    def authorize(self, endpoint):
        if endpoint == "debug.ping" or self.has_token():
            return
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        if not given:
            raise Refused(20, "Unauthorized (missing credentials)", status=401)
        if kind == "Bearer":
            raise Refused(30, "Invalid token", status=401)
        keys = base64.b64decode(given).decode()
        if endpoint != "auth.login" or keys != f"{ACCESS_KEY}:{SECRET_KEY}":
            raise Refused(22, "Unauthorized (invalid credentials) (failed to locate provided credentials)", status=401)

    def file_call(self, path, body):
        """Answer as the file server: with a token of the API alone, but for the question whether it is there."""
        double = self.double
        status, content = 200, b""
        asks = self.command in ("GET", "HEAD")
        try:
            double.fail(self.command)
            if asks and not path and "Authorization" not in self.headers:
                content = b"OK"
            elif not self.has_token():
                status = 401
            elif self.command == "POST":
                parts = list(multipart(self.headers.get("Content-Type", ""), body))
                for name, part in parts:
                    path = unquote(name).strip("/")
                    double.files[path] = part
                if not parts:
                    double.broken.append(f"POST {path}: no file in it, headers {dict(self.headers)}")
            elif asks:
                status, content = (200, double.files[path]) if path in double.files else (404, b"")
            elif double.files.pop(path, None) is None:
                status = 404
        except Refused as refused:
            status = refused.status
        double.record(Call(self.command, path, status, time.time()))
        self.answer(status, content, "application/octet-stream")


def multipart(content_type, body):
    """The parts of an upload: (field name, bytes). The SDK gives the path on the file server as the field's name."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    if not boundary:
        return
    for part in body.split(b"--" + boundary[1].encode())[1:-1]:
        head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        headers = BytesHeaderParser().parse(io.BytesIO(head + b"\r\n\r\n"))
        yield headers.get_param("name", header="content-disposition"), content.removesuffix(b"\r\n")
