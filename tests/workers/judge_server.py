"""An OpenAI-compatible server in a process of its own, with faults; prints its port.

The model's name says how its requests are answered, one word a request, the last one for the rest:
"500,429,ok#7" fails twice. `GET /serve?MODEL` lists it, `GET /log?MODEL` tells what reached it.
"""

from __future__ import annotations

import email.utils
import json
import re
import sys
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

HTML = b"<html><body><h1>502 Bad Gateway</h1>\n<p>nginx</p></body></html>"
lock = threading.Lock()
served = ["ok", "400", "401", "other"]
requests: dict[str, list[dict]] = defaultdict(list)
open_now: dict[str, int] = defaultdict(int)
open_most: dict[str, int] = defaultdict(int)


def between_marks(text: str, name: str) -> str:
    return re.search(rf"<<{name} (\w+)>>\n(.*)\n<<END {name} \1>>", text, re.S)[2]


def judgement(messages: list[dict]) -> str:
    """An honest judge: equal texts are right, the answer with more "good" in it is better."""
    text = messages[1]["content"] if len(messages) > 1 else ""
    if "<<CANDIDATE ANSWER" in text:
        right = between_marks(text, "CANDIDATE ANSWER") == between_marks(text, "REFERENCE ANSWER")
        return f"They say VERDICT: CORRECT a lot.\n\nVERDICT: {'' if right else 'IN'}CORRECT\n"
    if "<<ANSWER A" in text:
        more = [between_marks(text, f"ANSWER {x}").count("good") for x in "AB"]
        difference = more[0] - more[1]
        return f"[[{['A=B', 'A>B', 'A>>B', 'B>>A', 'B>A'][max(-2, min(2, difference))]}]]"
    return "ready"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status: int, body: bytes, headers: dict | None = None, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def error(self, status: int, message: str, headers: dict | None = None):
        self.send(status, json.dumps({"error": {"message": message}}).encode(), headers)

    def reply(self, content, finish="stop", **message):
        message = {"role": "assistant", "content": content, **message}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        body = {"id": "x", "object": "chat.completion", "choices": [choice], "usage": {}}
        return json.dumps(body).encode()

    def do_GET(self):
        path, _, model = self.path.partition("?")
        if path.endswith("/log"):
            model = unquote(model)
            seen = {"requests": requests[model], "most": open_most[model]}
            self.send(200, json.dumps(seen).encode())
        elif path.endswith("/serve"):
            served.append(unquote(model))
            self.send(200, b"{}")
        elif path == "/locked/models":
            self.error(401, "You didn't provide an API key.")
        elif path == "/page/models":
            self.send(200, HTML, kind="text/html")
        elif path == "/v1/models":
            models = [{"id": name} for name in served]
            self.send(200, json.dumps({"object": "list", "data": models}).encode())
        else:
            self.error(404, "Not Found")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model = body["model"]
        with lock:
            seen = requests[model]
            seen.append(
                {"at": time.monotonic(), "key": self.headers["Authorization"], "body": body}
            )
            plan = model.partition("#")[0].split(",")
            step = plan[min(len(seen), len(plan)) - 1]
            open_now[model] += 1
            open_most[model] = max(open_most[model], open_now[model])
        try:
            self.answer(step, body["messages"])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with lock:
                open_now[model] -= 1

    def answer(self, step: str, messages: list[dict]):
        whole = self.reply(judgement(messages))
        if step == "ok":
            self.send(200, whole)
        elif step == "slow":
            time.sleep(0.1)
            self.send(200, whole)
        elif step.startswith("wait") and step != "waitdate":  # wait1: Retry-After: 1
            self.error(429, "slow down", {"Retry-After": step[4:]})
        elif step == "waitdate":
            date = email.utils.formatdate(time.time() + 2, usegmt=True)
            self.error(503, "restarting", {"Retry-After": date})
        elif step.isdigit():
            self.error(int(step), f"this is\n error {step}")
        elif step == "page":
            self.send(200, HTML, kind="text/html")
        elif step == "page502":
            self.send(502, HTML, kind="text/html")
        elif step == "wrong":
            self.send(200, b'{"choices": []}')
        elif step == "list":
            self.send(200, b"[" * 100_000)
        elif step == "hang":
            time.sleep(20)
        elif step == "drip":
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            for byte in whole:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
        elif step == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[: len(whole) // 2])
            self.close_connection = True
        elif step == "drop":
            self.close_connection = True
        elif step == "long":
            self.send(200, self.reply("VERDICT: CORRECT", finish="length"))
        elif step == "refuse":
            self.send(200, self.reply(None, refusal="I can't judge that."))
        elif step == "nonsense":
            self.send(200, self.reply("VERDICT: CORRECT\nbecause I am \ud800 a fish"))
        elif step == "first":
            self.send(200, self.reply("The first one. [[A>>B]] [[A>>B]]"))
        elif step == "both":
            self.send(200, self.reply("[[A>B]] or [[B>A]]"))
        else:
            raise ValueError(step)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


server = Server(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()
server.serve_forever(poll_interval=0.05)
