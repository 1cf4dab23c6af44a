"""A server in this process with vLLM's fields, which draws from a tiny model by a plain greedy loop."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from conftest import byte_level_tokenizer, tiny_llama

from align.engines import EngineConfig, open_engine

TOKENIZER = byte_level_tokenizer()
END, EOS = 7, TOKENIZER.eos_token_id


def a_model():
    """With an end token of its own beside EOS, as chat models have."""
    model = tiny_llama(initializer_range=0.5)
    model.generation_config.eos_token_id = [EOS, END]
    return model


MODEL = a_model()


def greedy(prompt, stop, ends, length):
    """Completion and finish reason as a server has them: up to the end token, or the token that completes a stop text."""
    ids = []
    while len(ids) < length:
        logits = MODEL(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
        ids.append(logits.argmax().item())
        if ids[-1] in ends or any(text in TOKENIZER.decode(ids) for text in stop):
            return ids, "stop"
    return ids, "length"


class Fake:
    """A server with vLLM's fields. `spoil(request, body)` changes an answer, `fail(count)` gives a status in its place."""

    def __init__(self, folder):
        self.requests, self.headers, self.at_once, self.most = [], [], 0, 0
        self.spoil, self.fail, self.delay = lambda asked, body: body, lambda count: None, 0
        self.refusal = "no more of {count}"
        self.models = {"data": [{"id": folder, "max_model_len": 256}]}
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.answer(200 if self.path == "/v1/models" else 404, fake.models)

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.requests.append(asked)
                    fake.headers.append(dict(self.headers))
                    fake.at_once += 1
                    fake.most = max(fake.most, fake.at_once)
                    count = len(fake.requests)
                time.sleep(fake.delay)
                failure = fake.fail(count)
                if failure is None:
                    self.answer(200, fake.spoil(asked, fake.complete(asked)))
                elif failure == "hang up":
                    self.close_connection = True
                else:
                    self.answer(failure, {"error": {"message": fake.refusal.format(count=count)}})
                with fake.lock:
                    fake.at_once -= 1

            def answer(self, status, body):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def complete(self, asked):
        with self.lock, torch.inference_mode():
            ids, reason = greedy(asked["prompt"], asked["stop"], asked["stop_token_ids"], asked["max_tokens"])
        choice = {
            "text": "not to be read",
            "token_ids": ids,
            "prompt_token_ids": asked["prompt"],
            "finish_reason": reason,
        }
        return {"choices": [{"index": i, **choice} for i in reversed(range(asked["n"]))]}

    def engine(self, folder, **options):
        return open_engine(EngineConfig("server", server_url=self.url, **options), {"path": folder}, TOKENIZER)
