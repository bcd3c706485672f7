"""A running SGLang server as a benchmark's engine: /generate over HTTP, streamed to time the first token."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.parse
from collections.abc import Iterator

from sglang_xmem.bench.engine import Answer, EngineGone, RequestFailed, sampling
from sglang_xmem.bench.workloads import Materializer, Prompt
from sglang_xmem.errors import ConfigError


class ServerClient:
    """Asks a server; `ask` may be called from several threads at once.

    Args:
        url: such as http://127.0.0.1:30000.
        vocab: ids of prompts are below this.
        timeout_s: of one request.

    Raises:
        ConfigError: no server answers there.
    """

    tier: str | None = None
    #: Set to fail whatever is asked from now on.
    stopped = False

    def __init__(self, url: str, vocab: int, timeout_s: float) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url {url} is not an address; give one such as http://127.0.0.1:30000.")
        self._https = parts.scheme == "https"
        self._address = (parts.hostname, parts.port or (443 if self._https else 80))
        self._path = parts.path.rstrip("/")
        self._timeout_s = timeout_s
        self._tokens = Materializer(vocab)
        try:
            connection = self._connect()
            connection.request("GET", f"{self._path}/health")
            status = connection.getresponse().status
            connection.close()
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(f"no server answers at --url {url} ({error}); start one first.") from None
        if status != 200:
            raise ConfigError(f"the server at --url {url} is not healthy: /health answers {status}.")

    def ask(self, prompt: Prompt, max_new_tokens: int = 1) -> Answer:
        """One request."""
        if self.stopped:
            raise EngineGone("the run was interrupted")
        body = json.dumps(
            {"input_ids": self._tokens(prompt), "sampling_params": sampling(max_new_tokens), "stream": True}
        )
        connection = self._connect()
        try:
            start = time.perf_counter()
            connection.request("POST", f"{self._path}/generate", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RequestFailed(f"/generate answered {response.status}: {response.read(500)!r}")
            first_ms, last = None, b""
            for raw in response:
                line = raw.strip()
                if not line.startswith(b"data:") or line == b"data: [DONE]":
                    continue
                if first_ms is None:
                    first_ms = (time.perf_counter() - start) * 1e3
                last = line
            total_ms = (time.perf_counter() - start) * 1e3
        except (OSError, http.client.HTTPException) as error:
            raise EngineGone(f"the server at {self._address[0]}:{self._address[1]} is gone: {error}") from None
        finally:
            connection.close()
        if first_ms is None:
            raise RequestFailed("/generate ended without a token")
        reply = json.loads(last.removeprefix(b"data:"))
        if "error" in reply:
            raise RequestFailed(str(reply["error"]))
        return Answer.of(reply, first_ms, total_ms)

    @contextlib.contextmanager
    def concurrent(self) -> Iterator[None]:
        """Nothing to prepare."""
        yield

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        return kind(*self._address, timeout=self._timeout_s)
