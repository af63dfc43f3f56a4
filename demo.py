"""Serve a demo page for tuned models: build a history by clicks, and see what a model recommends.

python demo.py --ckpt_path ckpt/ml-100k/lcrec --dataset ml-100k                      then open http://127.0.0.1:7860
python demo.py --ckpt_path ckpt/ml-1m/collm-mf --dataset ml-1m --data_path ~/datasets
python demo.py --server http://127.0.0.1:8000                                        of python serve.py

It listens on 127.0.0.1, answers pages of its own alone, and makes no outbound requests.
"""

from reclingua.utils.logging import silence_third_party

import argparse
import os
import signal
import socket
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from reclingua import Recommender, Scorer
from reclingua.inference.fusion import load_fusion
from reclingua.inference.loading import load_metadata
from reclingua.inference.rating_fusion import load_rating_fusion
from reclingua.utils.access import API_KEYS, LOOPBACK, check_hosts, parse_auth
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.hub import TRUST_HELP, trust_remote_code
from reclingua.utils.text import unique_names

HOST = "127.0.0.1"
PORTS = range(7860, 7960)
URL_PREFIX = "the page is at "  # before its address


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("models")
    model.add_argument(
        "--ckpt_path", type=Path, nargs="+", default=[], help="folders written by finetune.py, a tab for each"
    )
    model.add_argument(
        "--server", metavar="URL",
        help=f"ask the next-item model of this serve.py, with the first key of {API_KEYS}, and load no checkpoint",
    )  # fmt: skip
    model.add_argument("--base_model", help="base model of an adapter checkpoint, overrides the stored path")
    model.add_argument("--cf_model", help="collaborative model of a checkpoint, overrides the stored path")
    model.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help="name of the dataset (default: the one a model was tuned on)")
    data.add_argument("--data_path", default="data", help="folder that holds <dataset>/ (default: %(default)s)")
    data.add_argument(
        "--index_file",
        help="semantic IDs: file suffix, or a path if it has a slash (default: those in the checkpoint)",
    )  # fmt: skip
    page = parser.add_argument_group("page")
    page.add_argument("--num_beams", type=int, default=20, help="beam width (default: %(default)s)")
    page.add_argument("--port", type=int, help=f"default: the first that is free from {PORTS.start} on")
    page.add_argument(
        "--auth", metavar="USER:PASSWORD",
        help="ask visitors for it, for machines that others log in to, too; or a file that holds it, since others can "
        "read a command line",
    )  # fmt: skip
    page.add_argument(
        "--allowed_hosts", nargs="+", default=[], metavar="HOST",
        help=f"further names under which browsers reach the page, as through a proxy (default: {', '.join(LOOPBACK)})",
    )  # fmt: skip
    page.add_argument("--timeout", type=float, default=60, help="seconds a request may take (default: %(default)s)")
    return one_line_errors(parser).parse_args()


@cli_main
def main() -> None:
    args = parse_args()
    silence_third_party()
    trust_remote_code(args.trust_remote_code)
    if args.num_beams < 1:
        raise InputError(f"--num_beams {args.num_beams}: should be 1 at least")
    if not 0 < args.timeout <= 86_400:
        raise InputError(f"--timeout {args.timeout:g}: should be more than 0 seconds, and a day at most")
    if bool(args.server) == bool(args.ckpt_path):
        raise InputError("--ckpt_path, --server: give one of them")
    if len(set(args.ckpt_path)) < len(args.ckpt_path):
        raise InputError("--ckpt_path: a folder is given twice; name each once")
    if args.auth is not None:
        args.auth = parse_auth(args.auth)
    metadata = {folder: load_metadata(folder) for folder in args.ckpt_path}
    for folder, stated in metadata.items():
        if stated.method != "lcrec" and not stated.prompts:
            raise InputError(f"{folder}: is a collaborative model alone; give a folder written by finetune.py")
    free_port(args.port)  # fails before models are loaded
    with TemporaryDirectory(prefix="reclingua-") as folder:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes the folder, as Ctrl-C does
        set_environment(folder)
        serve_page(args, {folder: stated.method for folder, stated in metadata.items()})


def serve_page(args: argparse.Namespace, methods: dict[Path, str]) -> None:
    """Serve the page of the models in these folders until a signal ends it."""
    # ---- Models, each with its data ----
    from reclingua.demo.app import THEME, build_page  # Gradio takes seconds to import
    from reclingua.demo.next_item import NextItem
    from reclingua.demo.remote import RemoteRecommender
    from reclingua.demo.yes_no import YesOrNo

    models: dict[str, NextItem | YesOrNo] = {}
    shared = {"data_path": args.data_path, "dataset": args.dataset, "base_model": args.base_model}
    for name, folder in zip(unique_names([path.resolve() for path in args.ckpt_path]), args.ckpt_path, strict=True):
        model: NextItem | YesOrNo
        if methods[folder] == "lcrec":
            recommender = Recommender.from_pretrained(folder, index_file=args.index_file, **shared)
            model = NextItem(recommender, args.num_beams, load_fusion(folder, recommender))
        else:
            scorer = Scorer.from_pretrained(folder, cf_model=args.cf_model, **shared)
            model = YesOrNo(scorer, load_rating_fusion(folder, scorer))
        models[name] = model
        print(f"{folder}: {model.name} on {model.dataset.name}, {len(model.catalogue.titles):,} items")

    if args.server:
        key = os.environ.get(API_KEYS, "").partition(",")[0].strip()
        remote = RemoteRecommender(args.server.rstrip("/"), args.data_path, key, args.timeout)
        models[remote.metadata.method] = NextItem(remote, min(args.num_beams, remote.info["max_k"]))

    # ---- The page, on loopback ----
    page, port = build_page(models, args.timeout), free_port(args.port)
    try:
        page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            max_file_size=1,
            auth=args.auth,
            app_kwargs={"lifespan": check_hosts([*LOOPBACK, *args.allowed_hosts])},
            **THEME,
        )
    except OSError as error:
        raise InputError(f"--port {port}: cannot be listened at ({error}); name another") from None
    try:
        print(f"{URL_PREFIX}http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
        while True:
            time.sleep(1)  # a longer sleep could miss a signal that arrives just before it
    finally:
        page.close(verbose=False)


def set_environment(folder: str) -> None:
    """Keep Gradio's files in `folder`, and keep the environment from changing where it listens or asking a proxy."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ["GRADIO_TEMP_DIR"] = folder
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{others},{HOST}" if others else HOST


def free_port(port: int | None) -> int:
    """Return `port`, or the first free one of PORTS; InputError if it cannot be listened at."""
    if port is not None and not 0 < port < 65_536:
        raise InputError(f"--port {port}: should be from 1 to 65535")
    for candidate in PORTS if port is None else [port]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a page just closed is in the way
            try:
                probe.bind((HOST, candidate))
            except OSError:
                continue
            return candidate
    raise InputError(f"--port {port or f'{PORTS.start} to {PORTS.stop - 1}'}: cannot be listened at; name another")


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)  # without waiting for threads, one of which can be searching still
