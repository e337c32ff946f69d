"""Drafts saved to a directory, and pushed to and loaded from a hub on loopback."""

import base64
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from test_speculators_form import export

from eagle_rpc.serving import ExportedDraft
from eagle_rpc.serving.speculators_config import Speculators

COMMIT = "a" * 40


def test_a_saved_draft_is_loaded_with_all_that_it_had(tmp_path):
    export(tmp_path / "draft", speculators=False)
    (tmp_path / "draft" / "README.md").write_text("card\n")
    draft = ExportedDraft.from_pretrained(tmp_path / "draft")
    files = draft.save_pretrained(tmp_path / "copy")
    assert [file.name for file in files] == ["config.json", "model.safetensors", "README.md"]
    for file in files:
        assert file.read_bytes() == (tmp_path / "draft" / file.name).read_bytes(), file.name
    draft.save_pretrained(tmp_path / "other", speculators=Speculators("owner/target", 3))
    again = ExportedDraft.from_pretrained(str(tmp_path / "other"))
    assert (again.eos_token_id, again.card) == ([2, 3], "card\n")
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in draft.weights.items())


class Hub(BaseHTTPRequestHandler):
    """The calls that huggingface_hub makes to create a repository, commit small files, and download them."""

    files: dict[str, bytes]

    def log_message(self, *_):
        pass

    def answer(self, content, *, headers=None, kind="application/json"):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = f"http://{self.headers['Host']}/owner/draft"
        if self.path.endswith("/repos/create"):
            self.answer({"url": url, "name": "owner/draft"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self.answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
                    ]
                }
            )
        elif "/commit/" in self.path:
            for line in filter(None, body.splitlines()):
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer({"commitUrl": f"{url}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
        else:
            self.answer({})

    def do_GET(self):
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            content = self.files[path.split(f"/resolve/{COMMIT}/")[1]]
            self.answer(
                content,
                headers={"X-Repo-Commit": COMMIT, "ETag": f'"{sha1(content).hexdigest()}"'},
                kind="application/octet-stream",
            )
        elif "/tree/" in path:
            self.answer(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": sha1(content).hexdigest()}
                    for name, content in self.files.items()
                ]
            )
        else:
            siblings = [{"rfilename": name} for name in self.files]
            self.answer({"id": "owner/draft", "sha": COMMIT, "siblings": siblings})

    do_HEAD = do_GET


@contextmanager
def hub():
    handler = type("OneHub", (Hub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.files
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


PROGRAM = """
import sys
from eagle_rpc import ExportedDraft
source, copy = sys.argv[1:]
print(ExportedDraft.from_pretrained(source).push_to_hub("owner/draft", private=True))
ExportedDraft.from_pretrained("owner/draft").save_pretrained(copy)
"""


def test_a_pushed_draft_is_loaded_by_its_name(tmp_path):
    export(tmp_path / "draft", speculators=False)
    with hub() as (address, files):
        outside = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "draft"), str(tmp_path / "copy")],
            env=outside | settings | {"HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    assert f"/owner/draft/commit/{COMMIT}" in done.stdout
    for name in ("config.json", "model.safetensors"):
        assert files[name] == (tmp_path / "copy" / name).read_bytes(), name
        assert files[name] == (tmp_path / "draft" / name).read_bytes(), name
