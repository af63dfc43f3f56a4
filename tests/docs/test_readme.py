"""The shell blocks of docs/getting-started.md and README.md run, in order, with a tiny model and few steps.

They are the end-to-end tests of both families, from raw ratings to results, reports and their comparison.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.helpers.preloaded import run_with_preloaded_python
from tests.helpers.scripts import ROOT, copy_repository

pytestmark = pytest.mark.slow
TINY = """
targets: all
per_device_batch_size: 8
learning_rate: 1.0e-2
max_eval_samples: 20
save_and_eval_strategy: steps
save_steps: 20
per_device_eval_batch_size: 128
"""
# Settings that make each command short; the commands themselves are those of the page.
SHORT = """
set -euo pipefail
bash() {
  case "$*" in
    *--method*) command bash "$@" --base_model "$TINY_MODEL" ;;
    *) command bash "$@" --config tiny.yaml ;;
  esac
}
"""
FEW = {
    "index.train": ["--epochs", "30"],
    "pretrain.py": ["--epochs", "2"],
    "finetune.py": ["--max_steps", "20"],
    "test.py": ["--num_beams", "10", "--test_batch_size", "128"],
}


def shell_blocks(page: Path) -> list[str]:
    """Return the bash blocks of a Markdown page."""
    return re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def run_page(workshop, tmp_path_factory):
    """run_page(path): run the bash blocks of a page in one shell, in a copy of the repository; return its output."""
    if not (ROOT / ".venv/requirements.sha256").exists():
        pytest.skip("run.sh needs its .venv, which tests/run.sh makes")
    copy = copy_repository(tmp_path_factory.mktemp("clone") / "repository")
    (copy / "tiny.yaml").write_text(TINY)
    environment = {"CUDA_VISIBLE_DEVICES": "", "TINY_MODEL": str(workshop / "base")}

    def run(path: str) -> str:
        blocks = shell_blocks(ROOT / path)
        assert blocks, path
        command = ["bash", "-c", SHORT + "\n".join(blocks)]
        done = run_with_preloaded_python(command, copy, FEW, **environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run.folder = copy
    return run


def test_getting_started(run_page):
    printed = run_page("docs/getting-started.md")
    results = run_page.folder / "results"
    next_item = json.loads((results / "ml-100k/lcrec.json").read_text())
    assert next_item["users"] == 943 and next_item["baselines"]["popularity"]["hit@10"] == pytest.approx(82 / 943)
    assert json.loads((results / "shop/lcrec.json").read_text())["users"] == 300
    for name in ("tallrec-sample", "collm-mf-sample"):
        assert json.loads((results / f"ml-100k/{name}.json").read_text())["test"]["samples"] > 700
    assert printed.count("all stages done") == 3 and "co-occurrence" in printed and "collm-mf" in printed
    pages = {str(page.relative_to(results)) for page in results.rglob("*.html")}
    assert pages >= {"ml-100k/lcrec/report.html", "shop/lcrec/report.html", "ml-100k/tallrec-sample.compared.html"}


def test_readme(run_page):
    """Its commands repeat those of getting-started, so that their stages are up to date."""
    for table in ("sales.csv", "goods.csv"):
        shutil.copy(run_page.folder / "data/shop" / table, run_page.folder)
    printed = run_page("README.md")
    assert printed.count("all stages done") == 2 and printed.count("up to date, skipped") == 13
