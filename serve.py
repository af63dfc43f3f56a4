"""Serve recommendations and scores over HTTP: concurrent requests share batches, catalogues reload without a restart.

python serve.py --ckpt_path ckpt/ml-100k/lcrec --dataset ml-100k
python serve.py --ckpt_path films=ckpt/ml-100k/lcrec likes=ckpt/ml-1m/collm-mf --port 8001

It listens on 127.0.0.1. On another address it needs the keys of its clients in RECLINGUA_API_KEYS, separated by
commas. RECLINGUA_ADMIN_KEY is the key of POST /v1/admin/reload; SIGHUP reloads as well. SIGTERM ends it after the
requests that it has accepted.
"""

from reclingua.utils.logging import silence_third_party

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

import uvicorn

from reclingua.serving.access import Keys
from reclingua.serving.app import build_app
from reclingua.serving.batching import BatchQueue
from reclingua.serving.metrics import Metrics
from reclingua.serving.models import ModelOptions, ModelSource
from reclingua.serving.registry import ModelRegistry
from reclingua.serving.service import Service
from reclingua.utils.access import API_KEYS, LOOPBACK
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.hub import TRUST_HELP, trust_remote_code
from reclingua.utils.processes import claim_device
from reclingua.utils.text import unique_names

MAX_CONNECTIONS = 1000  # more are answered 503
DRAIN_SECONDS = 5  # beyond --timeout, until requests are cancelled
URL_PREFIX = "the server is at "  # before its address


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("models")
    model.add_argument(
        "--ckpt_path", nargs="+", required=True, metavar="[NAME=]FOLDER",
        help="folders written by finetune.py or pretrain.py, and the names of their models in requests (default: "
        "those of the folders)",
    )  # fmt: skip
    model.add_argument("--base_model", help="base model of an adapter checkpoint, overrides the stored path")
    model.add_argument("--cf_model", help="collaborative model of a checkpoint, overrides the stored path")
    model.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)
    model.add_argument("--gpu_id", type=int, default=0, help="GPU to use, where there is one (default: %(default)s)")
    model.add_argument("--bf16", action="store_true", help="compute in bfloat16, weights keep their dtype")
    model.add_argument(
        "--num_beams", type=int, default=20, help="beam width, and the longest list (default: %(default)s)"
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help="name of the dataset (default: the one a model was tuned on)")
    data.add_argument("--data_path", default="data", help="folder that holds <dataset>/ (default: %(default)s)")
    data.add_argument(
        "--index_file",
        help="semantic IDs: file suffix, or a path if it has a slash (default: those in the checkpoint)",
    )  # fmt: skip
    batches = parser.add_argument_group("batches")
    batches.add_argument("--max_batch", type=int, default=32, help="rows of a batch (default: %(default)s)")
    batches.add_argument(
        "--max_wait_ms", type=float, default=5,
        help="milliseconds that a request waits for others while the model is idle (default: %(default)s)",
    )  # fmt: skip
    batches.add_argument(
        "--max_queue", type=int, default=256, help="requests that wait; more are answered 503 (default: %(default)s)"
    )
    batches.add_argument(
        "--timeout", type=float, default=10, help="seconds until a request is answered 504 (default: %(default)s)"
    )
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    server.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    server.add_argument(
        "--allowed_hosts", nargs="+", default=[], metavar="HOST",
        help=f"further names under which clients reach the server (default: {', '.join(LOOPBACK)})",
    )  # fmt: skip
    return one_line_errors(parser).parse_args()


class Server(uvicorn.Server):
    """Server that prints its address, and that states in /ready that it shuts down."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            print(f"{URL_PREFIX}http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.is_draining = True
        super().handle_exit(sig, frame)


@cli_main
def main() -> None:
    args = parse_args()
    check_flags(args)
    keys = Keys.from_environment()
    if not keys.api and not is_loopback(args.host):
        raise InputError(f"--host {args.host}: others can reach it, so set {API_KEYS} in the environment")
    listener = bind(args.host, args.port)  # fails before models are loaded
    silence_third_party()
    trust_remote_code(args.trust_remote_code)
    logger = logging.getLogger("reclingua.serving")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)

    # ---- Models ----
    queue = BatchQueue(args.max_batch, args.max_wait_ms / 1000, args.max_queue, Metrics())
    registry = ModelRegistry(parse_sources(args), queue)
    for model in registry.models.values():
        print(f"{model.name}: a {model.kind} model of {model.dataset.name}, {len(model.catalogue.titles):,} items")

    # ---- The server ----
    serve(args, registry, queue, keys, listener)


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError for a flag out of range."""
    for name in ("num_beams", "max_batch", "max_queue"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: should be 1 at least")
    if not 0 < args.timeout <= 86_400:
        raise InputError(f"--timeout {args.timeout:g}: should be more than 0 seconds, and a day at most")
    if not 0 <= args.max_wait_ms <= args.timeout * 1000:
        raise InputError(f"--max_wait_ms {args.max_wait_ms:g}: should be from 0 to --timeout")
    if not 0 <= args.port < 65_536:
        raise InputError(f"--port {args.port}: should be from 0 to 65535")


def parse_sources(args: argparse.Namespace) -> list[ModelSource]:
    """Return the checkpoints of --ckpt_path with their names; InputError for a name that is empty or given twice."""
    options = ModelOptions(
        data_path=args.data_path,
        dataset=args.dataset,
        index_file=args.index_file,
        base_model=args.base_model,
        cf_model=args.cf_model,
        device=claim_device(args.gpu_id),
        bf16=args.bf16,
        num_beams=args.num_beams,
        batch_size=args.max_batch,
    )
    named = [("", value) if Path(value).is_dir() else value.rpartition("=")[::2] for value in args.ckpt_path]
    folders = [Path(folder) for _, folder in named]
    defaults = unique_names([folder.resolve() for folder in folders])
    names = [name or default for (name, _), default in zip(named, defaults, strict=True)]
    if len(set(names)) < len(names):
        raise InputError(
            f"--ckpt_path: two models are called {max(names, key=names.count)!r}; give each its own NAME="
        )
    return [ModelSource(name, folder, options) for name, folder in zip(names, folders, strict=True)]


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address; InputError if that is in use or not of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a server just closed is in the way
        listener.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"--host {host}, --port {port}: cannot be listened at ({reason}); name another") from None
    return listener


def serve(
    args: argparse.Namespace, registry: ModelRegistry, queue: BatchQueue, keys: Keys, listener: socket.socket
) -> None:
    """Answer requests until SIGTERM or SIGINT, and finish those that were accepted."""
    service = Service(registry, queue, keys, args.timeout)
    config = uvicorn.Config(
        build_app(service, [*LOOPBACK, args.host, *args.allowed_hosts]),
        http="h11",
        ws="none",
        lifespan="on",
        log_level="critical",  # its log has paths with queries, and messages of exceptions
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=int(args.timeout) + DRAIN_SECONDS,
    )
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn sends it again after the shutdown, which is the end
    Server(config, service).run(sockets=[listener])


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)  # without waiting for the model's thread, which can be computing still
    sys.stdout.flush()
    os._exit(0)
