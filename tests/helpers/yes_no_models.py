"""Tiny Yes/No models of every kind, with LoRA weights and collaborative models, and batches for them."""

import torch

from reclingua.datasets.prompts import PromptTemplate
from reclingua.datasets.yes_no import YesNoCollator, YesNoDataset
from reclingua.inference.scorer import Scorer
from reclingua.models.collaborative import weights_sha256
from reclingua.models.collaborative.din import DIN, DINConfig
from reclingua.models.collaborative.hash import HashedMF, HashedMFConfig
from reclingua.models.collaborative.lightgcn import LightGCN, LightGCNConfig
from reclingua.models.collaborative.mf import MF, MFConfig
from reclingua.models.collaborative.sasrec import SASRec, SASRecConfig
from reclingua.models.collm import CoLLM, CoLLMConfig
from reclingua.models.cora import CoRA, CoRAConfig
from reclingua.models.lora import add_lora
from reclingua.models.yes_no import YesNoConfig, YesNoModel
from reclingua.utils.metadata import CheckpointMetadata
from tests.helpers.models import make_model, make_tokenizer

TEXT = [PromptTemplate('Liked so far: {history}. Is "{title}" liked as well? Answer:')]
SOFT = [PromptTemplate('Liked so far: {history}, by {user}. Is "{title}" {item} liked as well? Answer:')]
SIZES = {"num_users": 41, "num_items": 31, "embedding_size": 8}
COLLAB = {"mf": (MF, MFConfig), "lightgcn": (LightGCN, LightGCNConfig), "sasrec": (SASRec, SASRecConfig),
          "din": (DIN, DINConfig), "hash": (HashedMF, HashedMFConfig)}  # fmt: skip
ATTENTION = {"gpt2": ["c_attn"], "bloom": ["query_key_value"]}


def make_cf_model(kind="mf"):
    torch.manual_seed(1)
    model, config = COLLAB[kind]
    made = model(config(**SIZES, initializer_range=0.5))
    made.set_graph(torch.arange(1, 31), torch.arange(30, 0, -1))
    return made.eval()


def make_yes_no_model(kind, architecture="llama", cf_model="mf", trained=None, lora=True, **own):
    """A tiny model of the kind; LoRA's and CoRA's second matrices are not 0, as they are after training."""
    tokenizer = make_tokenizer(False)
    language = make_model(architecture, len(tokenizer) + 8, spread=3).requires_grad_(False)
    targets = ATTENTION.get(architecture, ["q_proj", "v_proj"])
    settings = {"rank": 4, "alpha": 8, "dropout": 0.5, "targets": targets} if lora else None
    if lora:
        add_lora(language, **settings)
    configs = {YesNoModel: YesNoConfig, CoLLM: CoLLMConfig, CoRA: CoRAConfig}
    if kind is CoRA:
        own = {"r": 4, "alpha": 8, "targets": targets, "num_layers": 2, "dropout": 0.5} | own
    trained = trained or (["lora"] if kind is YesNoModel else ["projector"])
    known = make_cf_model(cf_model) if kind is not YesNoModel else None
    config = configs[kind](
        base_model="nowhere", lora=settings, answer=37, trained=trained, saved=sorted({*trained, "lora", "projector"}),
        cf_model="nowhere", cf_config=known and known.config.to_dict(), cf_sha256=known and weights_sha256(known),
        **own,
    )  # fmt: skip
    model = kind(config, language, known).eval()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or name.startswith("b."):
                weight.copy_(torch.randn(weight.shape, generator=draw) * (3 if name.startswith("b.") else 0.3))
    return model, tokenizer


def scorer_of(model, tokenizer, dataset):
    """A Scorer of a model that no script has saved."""
    return Scorer(model, dataset, CheckpointMetadata("tallrec", dataset.name, prompts={"text": []}), tokenizer)


def questions_for(model, tokenizer, dataset, templates=None, num_rows=240, **trees):
    """Rows of test, one a tree unless `trees` says otherwise."""
    length = model.cf_model.history_length if model.cf_model is not None else 0
    titles = {item: "Thing " + "very " * (item % 5) + str(item) for item in range(1, 31)}
    templates = templates or (SOFT if isinstance(model, CoLLM) else TEXT)
    own = {"soft_tokens": getattr(model.config, "soft_tokens", 1), "read_length": length}
    part = dataset.parts["test"].take(num_rows)
    return YesNoDataset(part, titles, tokenizer, templates, 4, ", ", 10**6, **own, **trees)


def batch_of(questions, rows):
    batch = YesNoCollator(questions.tokenizer)([questions[i] for i in rows])
    del batch["lengths"]
    return batch


def logits_of(model, questions, rows, **changes):
    with torch.no_grad():
        return model(**(batch_of(questions, rows) | changes)).logits
