"""A page on which tuned models can be tried: build a history by clicks, and see what a model makes of it.

python demo.py --ckpt_path ckpt/ml-100k/lcrec --dataset ml-100k                      then open http://127.0.0.1:7860
python demo.py --ckpt_path ckpt/ml-1m/collm-mf --dataset ml-1m --data_path ../shared/data

The page is to be had on this machine alone (loopback), and asks nothing of any other.
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

from reclingua.inference.loading import read_record
from reclingua.models.collaborative import COLLABORATIVE_MODELS
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.text import unique_names

HOST = "127.0.0.1"
PORTS = range(7860, 7960)
URL_PREFIX = "the page is at "  # before its address


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("models")
    model.add_argument(
        "--ckpt_path", type=Path, nargs="+", required=True, help="folders written by finetune.py, a tab for each"
    )
    model.add_argument("--base_model", help="where the base model of an adapter folder is now, if it has moved")
    model.add_argument("--cf_model", help="where the collaborative model is now, if it has moved")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help="name of the dataset (default: the one a model was tuned on)")
    data.add_argument("--data_path", default="data", help="folder that holds <dataset>/ (default: %(default)s)")
    data.add_argument(
        "--index_file", default=".index.json",
        help="suffix of the index file, or a path to one if it has a slash (default: %(default)s)",
    )  # fmt: skip
    page = parser.add_argument_group("page")
    page.add_argument("--num_beams", type=int, default=20, help="items searched for (default: %(default)s)")
    page.add_argument("--port", type=int, help=f"default: the first that is free from {PORTS.start} on")
    page.add_argument("--timeout", type=float, default=60, help="seconds a request may take (default: %(default)s)")
    return one_line_errors(parser).parse_args()


@cli_main
def main() -> None:
    args = parse_args()
    silence_third_party()
    if args.num_beams < 1:
        raise InputError(f"--num_beams {args.num_beams}: should be 1 at least")
    if not 0 < args.timeout <= 86_400:
        raise InputError(f"--timeout {args.timeout:g}: should be more than 0 seconds, and a day at most")
    if len(set(args.ckpt_path)) < len(args.ckpt_path):
        raise InputError("--ckpt_path: a folder is given twice; name each once")
    records = {folder: read_record(folder) for folder in args.ckpt_path}
    for folder, record in records.items():
        if record["method"] in COLLABORATIVE_MODELS:
            raise InputError(f"{folder}: is a collaborative model alone; give a folder written by finetune.py")
    free_port(args.port)  # or an end, before models are loaded
    with TemporaryDirectory(prefix="reclingua-") as folder:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the folder taken away, as Ctrl-C does
        set_environment(folder)
        show(args, records)


def show(args: argparse.Namespace, records: dict[Path, dict]) -> None:
    """The page of models by the records in their folders, until somebody ends it."""
    # ---- Models, each with its data ----
    from reclingua.demo.app import THEME, build  # Gradio takes seconds to import
    from reclingua.demo.next_item import NextItem
    from reclingua.demo.yes_no import YesOrNo

    models = {}
    for name, folder in zip(unique_names([path.resolve() for path in args.ckpt_path]), args.ckpt_path, strict=True):
        record = records[folder]
        if record["method"] == "lcrec":
            where = args.data_path, args.dataset, args.index_file, args.num_beams, args.base_model
            model = NextItem(folder, record, *where)
        else:
            model = YesOrNo(folder, record, args.data_path, args.dataset, args.base_model, args.cf_model)
        models[name] = model
        print(f"{folder}: {model.name} on {model.dataset.name}, {len(model.catalogue.titles):,} items")

    # ---- The page, on loopback ----
    page, port = build(models, args.timeout), free_port(args.port)
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
            **THEME,
        )
    except OSError as error:
        raise InputError(f"--port {port}: cannot be listened at ({error}); name another") from None
    try:
        print(f"{URL_PREFIX}http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
        while True:
            time.sleep(1)  # not for ever: a signal just before it would then be heeded never
    finally:
        page.close(verbose=False)


def set_environment(folder: str) -> None:
    """Have Gradio keep its files in `folder`, and the environment not make it serve others, listen elsewhere, or ask a
    proxy for its own page."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ["GRADIO_TEMP_DIR"] = folder
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{others},{HOST}" if others else HOST


def free_port(wanted: int | None) -> int:
    """`wanted`, or the first of PORTS, that nobody listens at; InputError if there is none."""
    if wanted is not None and not 0 < wanted < 65_536:
        raise InputError(f"--port {wanted}: should be from 1 to 65535")
    for port in PORTS if wanted is None else [wanted]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a page just closed is in the way
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise InputError(f"--port {wanted or f'{PORTS.start} to {PORTS.stop - 1}'}: cannot be listened at; name another")


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)  # without waiting for threads: one may search for what nobody wants any more
