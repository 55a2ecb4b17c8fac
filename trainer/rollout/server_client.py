"""A vLLM server over HTTP, as `trainer/rollout/vllm_server.py` starts it.

The connections live in one event loop on a thread of its own, so that a caller may wait for answers
or do something else meanwhile.
"""

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from trainer.config import UsageError

T = TypeVar("T")

HEALTH_EVERY_SECONDS = 1.0
# vLLM's server runs 256 to 1024 requests at a time; others wait there.
CONNECTIONS_PER_SERVER = 1024


class ServerLostError(Exception):
    """A server does not answer, or cannot go on; another try may find it well."""


class HttpLoop:
    """An event loop on a thread of its own, and the HTTP session that lives there."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="http", daemon=True)
        self.thread.start()
        self.session = self.run(self._open())

    def submit(self, action: Coroutine[Any, Any, T]) -> "Future[T]":
        """Starts an action."""
        return asyncio.run_coroutine_threadsafe(action, self.loop)

    def run(self, action: Coroutine[Any, Any, T]) -> T:
        """The result of an action."""
        return self.submit(action).result()

    def close(self) -> None:
        """Ends the session and the thread."""
        self.run(self.session.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=CONNECTIONS_PER_SERVER)
        return aiohttp.ClientSession(connector=connector)


class ServerClient:
    """One server.

    Args:
        http: where its connections live.
        url: http://host:port.
        timeout_seconds: without an answer for so long, it is lost.
        start_command: starts such a server, for error messages.
    """

    def __init__(
        self, http: HttpLoop, url: str, *, timeout_seconds: float, start_command: str
    ) -> None:
        self.http, self.url = http, url.rstrip("/")
        self.timeout_seconds, self.start_command = timeout_seconds, start_command

    async def get(self, path: str) -> Any:
        """The answer's JSON value; raises as `post` does."""
        return await self._ask("GET", path, {}, None, self.timeout_seconds)

    async def post(
        self,
        path: str,
        body: object = None,
        *,
        query: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
    ) -> Any:
        """The answer's JSON value, None for an empty one.

        Args:
            timeout_seconds: for the whole answer; None waits for as long as the server is well.

        Raises:
            ServerLostError: no answer, or one that tells of an error inside the server.
            UsageError: the server was not started as it must be, or refuses the request.
        """
        return await self._ask("POST", path, query or {}, body, timeout_seconds)

    async def call_workers(self, method: str, **arguments: object) -> None:
        """Runs a method of the worker extension on all workers; raises as `post` does."""
        await self.while_well(self.post("/collective_rpc", {"method": method, "kwargs": arguments}))

    async def while_well(self, action: Coroutine[Any, Any, T]) -> T:
        """The result of an action that may take as long as it likes while the server is well.

        Raises:
            ServerLostError: the server gave no sign of life for its timeout, or refused a
                connection; the action is then cancelled.
        """
        acting, watching = asyncio.ensure_future(action), asyncio.ensure_future(self._until_lost())
        try:
            await asyncio.wait((acting, watching), return_when=asyncio.FIRST_COMPLETED)
            if acting.done():
                return acting.result()
            raise ServerLostError(watching.result())
        finally:
            acting.cancel()
            watching.cancel()

    async def _until_lost(self) -> str:
        clock = asyncio.get_running_loop().time
        well_at = clock()
        while True:
            await asyncio.sleep(HEALTH_EVERY_SECONDS)
            try:
                await self._ask("GET", "/health", {}, None, self.timeout_seconds)
                well_at = clock()
            except ServerLostError as error:
                is_gone = isinstance(error.__cause__, aiohttp.ClientConnectorError)
                if is_gone or clock() - well_at >= self.timeout_seconds:
                    return str(error)

    async def _ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: object,
        timeout_seconds: float | None,
    ) -> Any:
        timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=self.timeout_seconds)
        try:
            async with self.http.session.request(
                method, self.url + path, params=query, json=body, timeout=timeout
            ) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = "no answer in time" if isinstance(error, TimeoutError) else str(error)
            raise ServerLostError(f"{self.url}: {reason}") from error
        if answer.status >= 500:
            raise ServerLostError(f"{self.url}{path}: error {answer.status} ({text[:300]})")
        if answer.status in (401, 403, 404, 405):
            raise UsageError(
                f"--vllm-url: the server at {self.url} has no {path}; start it with "
                f"`{self.start_command}`"
            )
        if answer.status >= 400:
            raise UsageError(f"--vllm-url: {self.url}{path} refuses the request ({text[:300]})")
        return await answer.json(content_type=None) if text else None


def start_command(model: str, dtype: str, url: str) -> str:
    """The command line that starts the server of a URL."""
    port = urlsplit(url).port
    return f"python -m trainer.rollout.vllm_server --model {model} --dtype {dtype} --port {port}"
