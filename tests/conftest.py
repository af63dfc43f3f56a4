"""What the tests share: a toy dataset, tiny random models of several architectures, the real data where it is."""

import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from browser import browser, open_page  # noqa: F401
from tokenizers.processors import TemplateProcessing
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from convert.scratch import train_tokenizer
from reclingua.reporting.details import folder_of

SHARED = Path(__file__).parents[2] / "shared"
QUICK = ("--per_device_batch_size", 8, "--learning_rate", 1e-3, "--logging_steps", 50, "--use_cpu")
TITLE = 'Toy <b>"bold"</b> & $x_1$ <script src="http://x"></script>'
METHOD_FLAGS = {
    "tallrec": (),
    "collm": ("--collab", "mf"),
    "binllm": ("--collab", "hash"),
    "cora": ("--collab", "mf", "--lora_target_modules", "q_proj,k_proj,v_proj,o_proj", "--lora_r", 4),
    "softprompt": (),
    "personprompt": ("--soft_tokens", 2),
}
SPARSE = ("--save_and_eval_strategy", "steps", "--save_steps", 150)
LONGEST = ("test_run_sh", "test_preference_scripts", "test_zero", "test_tasks", "test_decoding", "test_collaborative")
torch.set_num_threads(1)

ROPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ROPE |= {"num_key_value_heads": 1, "max_position_embeddings": 512}
ARCHITECTURES = {
    "llama": lambda n: LlamaForCausalLM(LlamaConfig(vocab_size=n, tie_word_embeddings=False, **ROPE)),
    "llama-tied": lambda n: LlamaForCausalLM(LlamaConfig(vocab_size=n, tie_word_embeddings=True, **ROPE)),
    "qwen2": lambda n: Qwen2ForCausalLM(Qwen2Config(vocab_size=n, tie_word_embeddings=True, **ROPE)),
    "qwen3": lambda n: Qwen3ForCausalLM(
        Qwen3Config(vocab_size=n + 40, head_dim=16, tie_word_embeddings=False, **ROPE)
    ),
    "mistral": lambda n: MistralForCausalLM(MistralConfig(vocab_size=n, sliding_window=None, **ROPE)),
    "gpt2": lambda n: GPT2LMHeadModel(
        GPT2Config(vocab_size=n, n_embd=32, n_layer=2, n_head=2, n_positions=512, bos_token_id=1, eos_token_id=2)
    ),
    "gemma": lambda n: GemmaForCausalLM(GemmaConfig(vocab_size=n, head_dim=16, **ROPE)),
}
# Wide enough to be quantised: weights come in blocks of 64.
WIDE = ROPE | {"hidden_size": 128, "intermediate_size": 256}
# Those whose beams cannot always be one query block.
OTHERS = {
    "bloom": lambda n: BloomForCausalLM(BloomConfig(vocab_size=n, hidden_size=32, n_layer=2, n_head=2)),
    "gpt-neo": lambda n: GPTNeoForCausalLM(  # its local layers count places in the cache, which no mask can mend
        GPTNeoConfig(
            vocab_size=n,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=24,
            max_position_embeddings=512,
        )
    ),  # fmt: skip
    "mistral-window": lambda n: MistralForCausalLM(MistralConfig(vocab_size=n, sliding_window=6, **ROPE)),
    "gemma3-window": lambda n: Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=n, head_dim=16, sliding_window=6, layer_types=["full_attention", "sliding_attention"], **ROPE
        )
    ),
}


def make_tokenizer(bos: bool):
    """A small tokenizer that does or does not put a BOS before a text."""
    texts = ["### Instruction: a user had these items, oldest first. Which comes next? Response:"] * 3
    tokenizer = train_tokenizer(texts, vocab_size=320, max_length=512)
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def make_model(architecture: str, vocabulary: int, spread: float = 8):
    """A tiny model with random weights, by default spread so wide that its choices are not near-ties."""
    torch.manual_seed(0)
    wide = {"llama-wide": lambda n: LlamaForCausalLM(LlamaConfig(vocab_size=n, **WIDE))}
    model = (ARCHITECTURES | OTHERS | wide)[architecture](vocabulary).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(spread)
    return model


def pytest_collection_modifyitems(items):
    """The longest files first, or one process would be at them still when the others have nothing to do."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(params=[*ARCHITECTURES])
def architecture(request):
    return request.param


def write_toy(root: Path, users: int = 12, items: int = 9) -> Path:
    """A dataset folder root/toy: users walk around a ring of items, so the next item is certain."""
    folder = root / "toy"
    folder.mkdir(parents=True, exist_ok=True)
    inter = {str(u): [(u + step) % items for step in range(6 + u % 3)] for u in range(users)}
    item = {str(i): {"title": f"Toy number {i}", "description": f"kind {i % 3}"} for i in range(items)}
    index = {str(i): [f"<a_{i // 3}>", f"<b_{i % 3}>"] for i in range(items)}
    for name, content in (("inter", inter), ("item", item), ("index", index)):
        (folder / f"toy.{name}.json").write_text(json.dumps(content))
    return folder


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


def run_main(main, *argv):
    """A script's main with these arguments, for fixtures that outlive one test."""
    before, sys.argv = sys.argv, ["script", *map(str, argv)]
    try:
        main()
    finally:
        sys.argv = before


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


def flags(workshop, output, *more):
    where = ("--dataset", "toy", "--data_path", workshop / "datasets", "--base_model", workshop / "base")
    return *where, "--output_dir", output, *QUICK, *more


@pytest.fixture(scope="session")
def tuned(workshop):
    """A model that has learned the ring, whole histories."""
    learn = ("--supervise", "history", "--max_his_len", 3, "--his_sep", "", "--epochs", 30)
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
    """The folder of SmolLM2-135M-Instruct, from its package."""
    from convert import smollm2

    folder = tmp_path_factory.mktemp("smollm2")
    run_main(smollm2.main, "--output_dir", folder)
    return folder


def write_preferences(root: Path, users: int = 40, items: int = 30, name: str = "liked") -> Path:
    """A preference dataset root/`name`: users like the items of their own parity. The last users are cold."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    rows = {"train": [], "valid": [], "test": []}
    for user in range(1, users + 1):
        his = []
        for at, item in enumerate(draw.permutation(np.arange(1, items + 1)).tolist()):
            part = "train" if at < items * 0.6 else "valid" if at < items * 0.8 else "test"
            if part == "train" and user > users - 4:
                continue
            label = int((user + item) % 2 == 0)
            row = {"uid": user, "iid": item, "label": label, "timestamp": at, "his": [*his]}
            rows[part].append(row | {"not_cold": int(user <= users - 4)})
            his += [item] * label
    for part, content in rows.items():
        pq.write_table(pa.Table.from_pylist(content), folder / f"{part}.parquet")
    titles = {str(item): {"title": f"Thing {item}"} for item in range(1, items + 1)}
    (folder / "item.json").write_text(json.dumps(titles))
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


def tune(root, method, output, *more):
    flags = [root / flag if flag in ("mf", "hash", "sasrec") else flag for flag in METHOD_FLAGS[method]]
    given = ("--dataset", "liked", "--data_path", root, "--output_dir", output, "--method", method)
    return *given, *QUICK, "--epochs", 1, "--max_his_len", 4, "--per_device_eval_batch_size", 64, *flags, *more


def measure(script, root, ckpt, *more):
    import test as test_script

    results = root / "results.json"
    code, out, error = script(
        test_script.main, "--ckpt_path", ckpt, "--data_path", root, "--results_file", results, *more
    )
    assert code == 0, error
    return json.loads(results.read_text()), out


def second(root, method, output, *more):
    return tune(root, method, output, "--init_from", root / "tallrec", *more)


def predictions(script, root, ckpt, *more):
    lines = root / "predictions.jsonl"
    results, _ = measure(script, root, ckpt, "--predictions_file", lines, *more)
    return results, [json.loads(line) for line in lines.read_text().splitlines()]


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


def copy_of(file, folder, name="r.json"):
    """A copy of a results file, with the folder of its report."""
    copy = folder / name
    shutil.copy(file, copy)
    shutil.copytree(folder_of(file), folder_of(copy))
    return copy


def change(file, **fields):
    """Put other fields into the evidence of a results file."""
    path = folder_of(file) / "evidence.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
