"""An OpenAI-compatible server of a tiny model, in threads of the test's process."""

import json
import threading
from collections import deque
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CompletionServer:
    """Greedy completions of token ids, with the fields of vLLM; attributes change what it does.

    `bodies` are the requests so far, without the probes of a starting client (8 tokens).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Collection[int]
    ) -> None:
        self.model, self.tokenizer, self.stop_token_ids = model, tokenizer, stop_token_ids
        self.models: Any = [{"id": "tiny", "object": "model", "max_model_len": 256}]  # or an HTML page
        self.returns_ids = True
        self.added_first: list[int] = []  # tokens that the server puts before a prompt
        self.api_key: str | None = None
        self.statuses: deque[int] = deque()  # of the next completions
        self.status_for: dict[int, int] = {}  # by length of the prompt, always
        self.most_prompt_tokens: int | None = None
        self.held_prompt: list[int] | None = None  # gets no answer before the server ends
        self._ending = threading.Event()
        self.together: threading.Barrier | None = None  # all of its parties are under way at a time
        self.bodies: list[dict[str, Any]] = []
        self.most_at_a_time = 0
        self._under_way = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "CompletionServer":
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def reply(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            probe = body["max_tokens"] == 8
            if not probe:
                self.bodies.append(body)
            self._under_way += 1
            self.most_at_a_time = max(self.most_at_a_time, self._under_way)
            status = self.status_for.get(len(body["prompt"]), 200)
            status = self.statuses.popleft() if self.statuses and not probe else status
        try:
            if self.together is not None and not probe:
                self.together.wait(timeout=60)
            if body["prompt"] == self.held_prompt:
                self._ending.wait(timeout=60)
            most = self.most_prompt_tokens
            if most is not None and len(body["prompt"]) > most and not probe:
                return 400, {"error": {"message": "the prompt is too long", "code": 400}}
            if status != 200:
                return status, {"error": {"message": f"made to answer {status}", "code": status}}
            with self._lock:
                return 200, self._completion(body)
        finally:
            with self._lock:
                self._under_way -= 1

    @torch.inference_mode()
    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = [*self.added_first, *body["prompt"]]
        said: list[int] = []
        stops = {*self.stop_token_ids, *body["stop_token_ids"]}
        text, ended_by = "", None
        while len(said) < body["max_tokens"] and (not said or said[-1] not in stops) and ended_by is None:
            said.append(int(self.model(torch.tensor([[*prompt, *said]])).logits[0, -1].argmax()))
            text = self.tokenizer.decode([token for token in said if token not in stops])
            ended_by = next((stop for stop in body.get("stop", []) if stop in text), None)
        stopped = said[-1] in stops or ended_by is not None
        choice: dict[str, Any] = {
            "index": 0,
            "text": text if ended_by is None else text.partition(ended_by)[0],
            "finish_reason": "stop" if stopped else "length",
        }
        if self.returns_ids:
            choice |= {"token_ids": said, "prompt_token_ids": prompt, "stop_reason": ended_by}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(said), "total_tokens": 0}
        return {
            "id": "1",
            "object": "text_completion",
            "created": 0,
            "model": "tiny",
            "choices": [choice],
            "usage": usage,
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if isinstance(server.models, str):
                    self._send(200, server.models)
                else:
                    self._send(200, {"object": "list", "data": server.models})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                self._send(*server.reply(body))

            def _send(self, status: int, content: Any) -> None:
                if server.api_key and self.headers["authorization"] != f"Bearer {server.api_key}":
                    status, content = 401, {"error": "Unauthorized"}
                if not self.path.startswith("/v1/"):
                    status, content = 404, {"detail": "Not Found"}
                kind = "text/html" if isinstance(content, str) else "application/json"
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                if server._ending.is_set():
                    return  # the client is gone
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(data)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
