"""Yes/No model: a language model scored by the logit of Yes (TALLRec), and the base class of CoLLM and CoRA.

A saved folder contains the trained weights, a few MB, and points to the base model. BinLLM uses this model, too, with
collaborative codes as text in the prompt.
"""

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from reclingua.models.chunked_loss import patched_forward
from reclingua.models.collaborative import COLLABORATIVE_MODELS, load_collaborative, weights_sha256
from reclingua.models.collaborative.base import CollaborativeModel, CollaborativeOutput, Values
from reclingua.models.language import check_base_model, load_model
from reclingua.models.lora import add_lora
from reclingua.models.tree_attention import attention_argument, supports_trees, tree_mask
from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json

Device = torch.device | None
COMPONENTS = ("language", "lora", "projector", "cf_model")


class YesNoConfig(PreTrainedConfig):
    """Config of a Yes/No model.

    Args:
        base_model: absolute folder or hub name of the language model.
        base_sha256: fingerprint of its weights.
        base_dtype: dtype of frozen weights; trained weights are float32.
        load_in_4bit: linear layers of the language model have nf4 weights.
        answer: token id of Yes.
        offset: subtracted from the logit within the loss, so that training starts at the share of Yes in the data and
            not at the usual level of a language model's logits, ten or more; it changes no ranking.
        lora: rank, alpha, dropout and targets of the LoRA weights; empty: none.
        cf_model, cf_sha256: absolute folder and fingerprint of the collaborative model; its own config is `cf_config`.
        trained: COMPONENTS that receive gradients: the language model, its LoRA weights, the projector between it and
            the collaborative model, the collaborative model.
        saved: COMPONENTS in a saved folder; the folder points to the others.
        base_config: config of the language model if its weights are in the folder.
        hidden_size: width of the language model, from which DeepSpeed derives its buckets.
    """

    model_type = "recommender-yesno"

    base_model: str = ""
    base_sha256: str | None = None
    base_dtype: str = "float32"
    load_in_4bit: bool = False
    answer: int = 0
    offset: float = 0.0
    lora: dict | None = None
    cf_model: str | None = None
    cf_sha256: str | None = None
    cf_config: dict | None = None
    trained: list[str] | None = None
    saved: list[str] | None = None
    base_config: dict | None = None
    hidden_size: int | None = None


class YesNoModel(PreTrainedModel):
    """Model that scores prompts by the logit of Yes.

    Args:
        language: causal language model, with LoRA weights if the config has some.
        cf_model: collaborative model, for the methods with one.
    """

    config_class = YesNoConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    def __init__(self, config: YesNoConfig, language: PreTrainedModel, cf_model: CollaborativeModel | None = None):
        super().__init__(config)
        self.language, self.cf_model = language, cf_model
        embedding: Any = self.get_input_embeddings()
        config.hidden_size = embedding.embedding_dim
        self.build_projector()
        for module in self.modules():
            # All weights have their values and must not be initialised again.
            module._is_hf_initialized = True  # type: ignore[assignment]  # nn.Module allows any attribute
        self.post_init()
        self.freeze_parameters()

    def build_projector(self) -> None:
        """Build the component "projector" between the collaborative model and the language model."""
        if self.cf_model is None:
            return
        for name, width in (("user", self.cf_model.user_width), ("item", self.cf_model.item_width)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))

    @torch.no_grad()
    def fit_normalization(
        self, users: torch.Tensor, items: torch.Tensor, histories: torch.Tensor | None = None
    ) -> None:
        """Fit `normalize` to some training rows, int64 [rows]; called before training.

        The standard deviation of collaborative embeddings is .01 (items of DIN) or 1 (users of SASRec); the projector
        should not have to learn that.
        """
        assert self.cf_model is not None
        vectors_of = {
            "user": self.cf_model.user_vectors(users, histories, items),
            "item": self.cf_model.item_vectors(items),
        }
        for name, vectors in vectors_of.items():
            std, mean = torch.std_mean(vectors, 0)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(torch.where(std > 1e-8, std, 1.0))

    def normalize(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """Return vectors [..., width] of a "user" or an "item", standardised as `fit_normalization` has found."""
        return ((vectors - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_std")).to(vectors.dtype)

    @staticmethod
    def component_of(name: str) -> str:
        """Return which of COMPONENTS a parameter belongs to."""
        component = name.partition(".")[0]
        if component == "language":
            return "lora" if ".lora_" in name else component
        return component if component in COMPONENTS else "projector"

    def freeze_parameters(self) -> None:
        """Freeze all but the trained components, make these float32, and exclude from saving what is not saved."""
        config = self.config
        for name, weight in self.named_parameters():
            trained = self.component_of(name) in config.trained
            weight.requires_grad_(trained and weight.is_floating_point())
            if trained and weight.is_floating_point():
                weight.data = weight.data.float()
        self._keys_to_ignore_on_save = {
            name for name in self.state_dict() if self.component_of(name) not in config.saved
        }
        self.train(self.training)

    @property
    def tunes_language(self) -> bool:
        """Whether the language model or its LoRA weights are trained."""
        return not {"language", "lora"}.isdisjoint(self.config.trained)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of trained components; frozen ones stay in evaluation mode."""
        super().train(mode)
        if self.cf_model is not None and "cf_model" not in self.config.trained:
            self.cf_model.eval()
        if not self.tunes_language:
            # Gradient checkpointing recomputes a layer only if the layer is in training mode.
            checkpointed = self.language.is_activation_checkpointing
            for module in self.language.modules():
                if isinstance(module, nn.Dropout) or not checkpointed:
                    module.training = False
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language.get_output_embeddings()

    def embed_inputs(self, input_ids: torch.Tensor, **inputs) -> torch.Tensor:
        """Return the input of the language model: token ids, or embeddings, float [batch, length, hidden]."""
        return input_ids

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        branch: torch.Tensor,
        visible: torch.Tensor,
        trunk: torch.Tensor,
        tree: torch.Tensor,
        last: torch.Tensor,
        sizes: tuple[int, int],
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **inputs,
    ) -> CollaborativeOutput:
        """Return the logit of Yes after each prompt; the prompts of a tree share its trunk.

        Args:
            input_ids, position_ids: int64 [trees, length], padded on the right.
            branch, visible: int64 [trees, length], see `reclingua.models.tree_attention.tree_mask`.
            trunk: int64 [trees], number of tokens of each trunk.
            sizes: tokens of the longest trunk, and most tokens of all branches of a tree.
            tree, last: int64 [rows], the tree of each row and the place of the last token of its prompt in it.
            labels: float [rows], 1 liked, 0 not.
            num_items_in_batch: divisor of the summed loss (default: the rows).
            inputs: further keys of a batch of `reclingua.datasets.yes_no.YesNoCollator`.

        Returns:
            logits float32 [rows]; the loss, binary cross-entropy, if there are labels.
        """
        words = self.embed_inputs(input_ids, **inputs)
        if len(tree) == len(input_ids):  # one row a tree: causal attention is all it takes, for any model
            logits = self._yes(words, tree, last)
        elif self._can_freeze_trunk() and sizes[0]:
            logits = self._logits_behind_trunk(
                input_ids, words, position_ids, tree, last, trunk, branch, visible, sizes
            )
        else:
            mask = attention_argument(self.language, tree_mask(branch, visible))
            logits = self._yes(words, tree, last, position_ids=position_ids, attention_mask=mask)
        loss = None
        if labels is not None:
            count = len(labels) if num_items_in_batch is None else num_items_in_batch
            loss = F.binary_cross_entropy_with_logits(self.log_odds(logits), labels.float(), reduction="sum") / count
        return CollaborativeOutput(loss=loss, logits=logits)

    def log_odds(self, logits: Values) -> Values:
        """Return the logits within the loss; their sigmoid is the probability of Yes."""
        return logits - self.config.offset

    @cached_property
    def supports_trees(self) -> bool:
        """Whether several rows can share a trunk, with the very logits of each row alone."""
        return supports_trees(self.language)

    @property
    def is_zero3(self) -> bool:
        """Whether ZeRO-3 gathers weights in every forward pass.

        Then the number of passes must not depend on the data of a batch: processes would wait for each other forever.
        """
        return self.training and hasattr(next(self.parameters()), "ds_id")

    def _can_freeze_trunk(self) -> bool:
        """Return whether trunks are computed without gradients: only branches depend on trained weights."""
        return (
            torch.is_grad_enabled()
            and not self.tunes_language
            and not self.is_zero3
            and not self.language.is_activation_checkpointing
        )

    def _logits_behind_trunk(
        self,
        input_ids: torch.Tensor,
        words: torch.Tensor,
        position_ids: torch.Tensor,
        tree: torch.Tensor,
        last: torch.Tensor,
        trunk: torch.Tensor,
        branch: torch.Tensor,
        visible: torch.Tensor,
        sizes: tuple[int, int],
    ) -> torch.Tensor:
        """Return what `_yes` does; the trunks become a cache without gradients, the branches are one query block.

        trees                 cache        queries (moved to the left)
            t t t|a a|b         t t t        a a b
            u u|a|b b           u u .        a b b       . is a token that no query sees
        """
        longest, width = sizes
        cache = DynamicCache(config=self.language.config)
        with torch.no_grad():
            first = torch.arange(len(input_ids), device=last.device)
            self._yes(input_ids[:, :longest], first, torch.zeros_like(first), cache)
        places = trunk[:, None] + torch.arange(width, device=last.device)
        exists = places < input_ids.shape[1]
        places = places.clamp(max=input_ids.shape[1] - 1)
        rows = torch.arange(len(input_ids), device=last.device)[:, None]
        branch = torch.where(exists, branch[rows, places], -1)
        visible = visible[rows, places]
        in_trunk = torch.arange(longest, device=last.device) < visible[:, :, None]
        mask = torch.cat([in_trunk, tree_mask(branch, torch.zeros_like(visible))], 2)
        return self._yes(
            words[rows, places],
            tree,
            last - trunk[tree],
            cache,
            position_ids=position_ids[rows, places],
            attention_mask=attention_argument(self.language, mask),
        )

    def _yes(
        self,
        words: torch.Tensor,
        tree: torch.Tensor,
        last: torch.Tensor,
        cache: DynamicCache | None = None,
        **attention,
    ) -> torch.Tensor:
        """Return the logits of Yes, float32 [rows], after place `last` of each row's `tree`; no other is computed.

        The argument `logits_to_keep` of transformers is no substitute: it leaves the logits in the dtype of the
        model, and bfloat16 rounds a logit of 10 to a multiple of 1/16, which makes many scores equal.
        """
        head: Any = self.language.get_output_embeddings()

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            logit = (hidden[tree, last].float() * head.weight[self.config.answer].float()).sum(-1)
            if getattr(head, "bias", None) is not None:
                logit = logit + head.bias[self.config.answer].float()
            return logit[:, None, None]

        inputs = {"inputs_embeds" if words.is_floating_point() else "input_ids": words} | attention
        # The caps and scales that some models apply to logits after the head are applied to this one as well.
        with patched_forward(head, forward):
            return self.language(**inputs, past_key_values=cache, use_cache=cache is not None).logits[:, 0, 0]

    def include_base_weights(self) -> None:
        """Save the language model and the collaborative model, too, from now on."""
        self.config.saved = list(COMPONENTS)
        self.config.base_config = self.language.config.to_dict()
        self.freeze_parameters()

    @classmethod
    def from_pretrained(  # type: ignore[override]  # fewer arguments
        cls, folder: str | Path, components: Collection[str] = COMPONENTS, device: Device = None, **changes
    ) -> Self:
        """Load the model in `folder`, and the models that it points to, for evaluation.

        Args:
            components: which of COMPONENTS are loaded; without "cf_model" no collaborative model is needed.
            device: of weights in 4 bits, see `load_model`; the others stay on the CPU.
            changes: values for the config, used unless None: base_model or cf_model if these have moved, load_in_4bit
                or base_dtype.

        Raises:
            InputError: something is missing, or differs from what the model was trained with.
        """
        config = cls.config_class.from_dict(read_json(Path(folder) / "config.json", "the config of a tuned model"))
        if config.trained is None or config.saved is None:
            raise InputError(f"{Path(folder) / 'config.json'}: is not the config of a tuned {cls.__name__}")
        for key, value in changes.items():
            if value is not None:
                setattr(config, key, value)
        if config.load_in_4bit and "language" in config.saved:
            raise InputError(
                f"{folder}: contains a whole language model, which cannot be quantised; leave out --load_in_4bit"
            )
        cf_model = open_cf_model(config, folder) if "cf_model" in components else None
        model = cls(config, open_language(config, device), cf_model)
        if "language" not in config.saved:
            check_base_model(config.base_model, config.base_sha256, folder)
        state = {name: w for name, w in read_weights(folder).items() if cls.component_of(name) in components}
        saved = {*components} & {*config.saved}
        try:
            keys = model.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise InputError(
                f"{folder}: its weights do not fit ({' '.join(str(error).split())[:200]}); is {config.base_model} "
                "the model it was tuned from?"
            ) from None
        tied = model.all_tied_weights_keys
        missing = [name for name in keys.missing_keys if cls.component_of(name) in saved and name not in tied]
        if mismatches := [*missing, *keys.unexpected_keys]:
            raise InputError(f"{folder}: its weights do not match its config ({mismatches[0]}); train it again")
        return model.eval()


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """Return name -> weight of the safetensors in `folder`; InputError if a file is broken."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        try:
            state |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: its weights cannot be read ({' '.join(str(error).split())[:200]})") from None
    return state


def open_language(config: YesNoConfig, device: Device = None) -> PreTrainedModel:
    """Load the language model that `config` points to, or build the one it describes, with its LoRA weights.

    Weights in 4 bits go to `device`, see `load_model`.
    """
    dtype = getattr(torch, config.base_dtype)
    if config.base_config:
        base = AutoConfig.for_model(**config.base_config)
        language = AutoModelForCausalLM.from_config(base, dtype=dtype, trust_remote_code=False)
    else:
        language = load_model(config.base_model, dtype, config.load_in_4bit, device=device)
    language.requires_grad_(False)
    if config.lora:
        add_lora(language, **config.lora)
    return language


def open_cf_model(config: YesNoConfig, folder: str | Path) -> CollaborativeModel | None:
    """Load the collaborative model that `config` points to, or build the one it describes."""
    if not config.cf_config:
        return None
    if "cf_model" in (config.saved or []):
        kind = COLLABORATIVE_MODELS[config.cf_config["model_type"]]
        return kind(kind.config_class.from_dict(config.cf_config))
    model = load_collaborative(str(config.cf_model))
    if weights_sha256(model) != config.cf_sha256:
        raise InputError(f"{config.cf_model}: is not the model that {folder} was trained with; see --cf_model")
    return model
