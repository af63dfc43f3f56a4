"""serve.py in a process of its own, and clients of it."""

import json
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2

from tests.helpers.scripts import redirect_output

KEY, ADMIN = "key-of-a-client-0001", "key-of-the-admin-0001"


class Server:
    """A running server: `process`, `url`, and `log`, the file of what it prints."""

    def __init__(self, process, log: Path):
        self.process, self.log = process, log
        self.url = self._wait_for_url()
        self.client = httpx2.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        self.address = self.client.base_url.host, self.client.base_url.port

    def _wait_for_url(self) -> str:
        from serve import URL_PREFIX

        for _ in range(600):
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            if line := next((line for line in lines if line.startswith(URL_PREFIX)), None):
                return line.removeprefix(URL_PREFIX).split()[0]
            assert self.process.is_alive(), lines
            time.sleep(0.05)
        raise AssertionError("the server did not start")

    def post(self, path: str, **body):
        return self.client.post(path, json=body)

    def reload(self):
        return self.client.post("/v1/admin/reload", headers={"Authorization": f"Bearer {ADMIN}"})

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels; a label can be part of the name."""
        lines = [line for line in self.client.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def post_all(self, path: str, bodies: list[dict], threads: int = 32) -> list:
        """Return the responses to all bodies, sent at the same time."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda body: self.post(path, **body), bodies))


@contextmanager
def run_server(*flags, **environment):
    """Run serve.py at a free port, forked so that no library is imported again; yields a Server."""
    keys = {"RECLINGUA_API_KEYS": KEY, "RECLINGUA_ADMIN_KEY": ADMIN}
    with TemporaryDirectory() as folder:
        argv = ["serve.py", "--port", "0", *map(str, flags)]
        log = Path(folder) / "log"
        process = multiprocessing.get_context("fork").Process(target=_serve, args=(argv, log, keys | environment))
        process.start()
        try:
            server = Server(process, log)
            with server.client:
                yield server
        finally:
            process.terminate()
            process.join(20)
            process.kill()
            process.join()


def _serve(argv, log, environment):
    import serve

    redirect_output(*[os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)] * 2)
    os.environ |= environment
    sys.argv = argv
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve.main()


def write_titles(path: Path, prefix: str) -> None:
    """Give every item of a dataset a title that starts with `prefix`, at once for those who read the file."""
    items = {item: texts | {"title": f"{prefix} {item}"} for item, texts in json.loads(path.read_text()).items()}
    with suppress(FileNotFoundError):
        path.with_suffix(".new").unlink()
    path.with_suffix(".new").write_text(json.dumps(items))
    path.with_suffix(".new").rename(path)
