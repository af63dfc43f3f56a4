"""What the tests share: a toy dataset, tiny random models of several architectures, the real data where it is.

Libraries that take seconds are imported in the fixtures: the process that starts the workers does without.
"""

import gc
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.helpers.browser import browser, open_page  # noqa: F401
from tests.helpers.scripts import SPARSE, flags, run_main, tune
from tests.helpers.toys import TITLE, write_preferences, write_toy

SHARED = Path(__file__).parents[2] / "shared"
LONGEST = ("test_readme", "test_zero", "cli/test_yes_no", "demo/test_page", "test_tasks", "test_checkpoints")
LONGEST += ("models/test_yes_no", "cli/test_run_sh", "data/test_prepare")
TRAINED = {"tuned", "studio", "smollm2", "preference_runs", "tuned_on_all", "uninterrupted", "runs"}  # fixtures
ARCHITECTURES = ("llama", "llama-tied", "qwen2", "qwen3", "mistral", "gpt2", "gemma")  # of tests/helpers/models.py


def pytest_collection_finish():
    """Each worker computes in one thread, and does not search the libraries for garbage after each training."""
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests that open pages or need a trained model; run the longest files first, beside the others."""
    for item in items:
        if "browser" in item.fixturenames:
            item.add_marker("browser")
        if TRAINED & {*item.fixturenames}:
            item.add_marker("slow")

    def rank(item) -> int:
        name = str(item.path.with_suffix(""))
        return next((rank for rank, ending in enumerate(LONGEST) if name.endswith(ending)), len(LONGEST))

    items.sort(key=rank)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture
def toy(tmp_path) -> Path:
    """A folder that holds the dataset `toy`, to be passed as --data_path."""
    write_toy(tmp_path / "datasets")
    return tmp_path / "datasets"


@pytest.fixture
def edit(toy):
    """edit("item", change): rewrite toy.item.json by a function on its content."""

    def edit_file(name, change):
        path = toy / "toy" / f"toy.{name}.json"
        content = json.loads(path.read_text())
        changed = change(content)
        path.write_text(json.dumps(content if changed is None else changed))

    return edit_file


@pytest.fixture
def script(monkeypatch, capsys):
    """script(main, "--flag", value): run a script's main; returns (exit code, stdout, stderr)."""

    def run(main, *argv):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, argv)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(script):
    """refused(main, *argv): the script must end with exit code 2 and one line on stderr, which is returned."""

    def run(main, *argv):
        code, _, error = script(main, *argv)
        assert code == 2, error
        lines = error.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), error
        return lines[0]

    return run


@pytest.fixture
def heeded():
    """What a test starts heeds SIGINT, also where the tests are a background job, which does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def shared():
    if not SHARED.is_dir():
        pytest.skip("the real datasets are not beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """The toy dataset in datasets/ and a model from scratch in base/."""
    root = tmp_path_factory.mktemp("workshop")
    write_toy(root / "datasets", users=60)
    size = ("--vocab_size", 320, "--hidden_size", 64, "--layers", 2, "--attention_dropout", 0)
    where = ("--dataset", "toy", "--data_path", root / "datasets", "--output_dir", root / "base")
    from convert import scratch

    run_main(scratch.main, *where, *size)
    return root


@pytest.fixture(scope="session")
def tuned(workshop):
    """A model that has learned the ring, whole histories."""
    learn = ("--targets", "all", "--max_his_len", 3, "--his_sep", "", "--epochs", 30)
    import finetune

    run_main(finetune.main, *flags(workshop, workshop / "tuned", *learn, *SPARSE))
    return workshop / "tuned"


@pytest.fixture(scope="session")
def ml_100k(tmp_path_factory):
    """MovieLens-100k, prepared; a folder to be passed as --data_path."""
    from data import prepare

    root = tmp_path_factory.mktemp("ml")
    run_main(prepare.main, "--source", "recbole", "--dataset", "ml-100k", "--data_path", root)
    return root


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The folder of SmolLM2-135M-Instruct, from its package; all workers share one, which no test changes."""
    from filelock import FileLock

    from convert import smollm2

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").exists():
            run_main(smollm2.main, "--output_dir", folder)
    return folder


@pytest.fixture(scope="session")
def studio(workshop, tmp_path_factory):
    """Preference data, collaborative models mf, sasrec, din, hash, and a first stage in tallrec."""
    import finetune
    import pretrain

    root = tmp_path_factory.mktemp("studio")
    write_preferences(root)
    for kind, lr in (("mf", 0.05), ("sasrec", 0.01), ("din", 0.01), ("hash", 0.05)):
        where = ("--output_dir", root / kind, "--results_file", root / f"{kind}.json", "--data_path", root)
        size = ("--embedding_size", 16, "--epochs", 80, "--learning_rate", lr, "--weight_decay", 1e-4)
        run_main(pretrain.main, "--model", kind, "--dataset", "liked", *where, *size)
    run_main(finetune.main, *tune(root, "tallrec", root / "tallrec", "--base_model", workshop / "base"))
    return root


@pytest.fixture(scope="session")
def searched(workshop, tuned, tmp_path_factory):
    """searched(*flags): the results file of a test of the toy's model, whose items have dangerous titles."""
    import test as test_script

    root = tmp_path_factory.mktemp("searched")
    shutil.copytree(workshop / "datasets", root / "datasets")
    items = {str(i): {"title": f"{TITLE} {i}"} for i in range(9)}
    (root / "datasets/toy/toy.item.json").write_text(json.dumps(items))

    def run(name, *more):
        file = root / "results" / f"{name}.json"
        where = ("--ckpt_path", tuned, "--data_path", root / "datasets", "--results_file", file)
        few = ("--num_beams", 5, "--metrics", "hit@1,hit@5,ndcg@5", "--exclude_seen")
        run_main(test_script.main, *where, *few, *more)
        return file

    return run


@pytest.fixture(scope="session")
def search_run(searched):
    return searched("lcrec", "--test_prompt_ids", "all")


@pytest.fixture(scope="session")
def preference_runs(tmp_path_factory):
    """Two collaborative models' results files on one dataset."""
    import pretrain
    import test as test_script

    root = tmp_path_factory.mktemp("preferences")
    write_preferences(root)
    files = []
    for kind, epochs in (("mf", 2), ("din", 30)):
        size = ("--embedding_size", 8, "--epochs", epochs, "--learning_rate", 0.01, "--data_path", root)
        where = ("--output_dir", root / kind, "--results_file", root / "pretrained.json", "--dataset", "liked")
        run_main(pretrain.main, "--model", kind, *where, *size)
        files.append(root / "results" / f"{kind}.json")
        run_main(test_script.main, "--ckpt_path", root / kind, "--data_path", root, "--results_file", files[-1])
    return files
