"""A language model that answers Yes or No, scored by the logit of Yes: TALLRec, and the ground of CoLLM and CoRA.

What is saved is what was trained, with a pointer to the rest: an adapter folder of a few MB. BinLLM is this model,
too; its collaborative knowledge comes in as words.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from reclingua.models.chunked_loss import patched_forward
from reclingua.models.collaborative import COLLABORATIVE_MODELS, load_collaborative, weights_sha256
from reclingua.models.collaborative.base import CollaborativeModel, CollaborativeOutput
from reclingua.models.language import MIN_SHARED_PREFIX, accepts_argument, attention_window, load_model
from reclingua.models.lora import add_lora
from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json

PARTS = ("language", "lora", "projector", "cf_model")


class YesNoConfig(PreTrainedConfig):
    """
    Args:
        base_model: folder or hub name of the language model.
        base_dtype: of its frozen weights; what is trained is float32.
        load_in_4bit: its linear layers as nf4.
        answer: token id of Yes.
        offset: taken off the logit within the loss, so that training begins at the share of Yes there is, not at the
            level, ten or more, that a language model's logits have; which score is higher is not up to it.
        lora: r, alpha, dropout and targets of its LoRA weights; empty: it has none.
        cf_model, cf_sha256: folder and fingerprint of the collaborative model; its own config is `cf_config`.
        trained: which of PARTS gradients go to: the language model itself, its LoRA weights, what joins it to the
            collaborative model, that model.
        saved: which of PARTS a folder holds; the others are pointed to.
        base_config: config of the language model where its weights are in the folder, too.
        hidden_size: width of the language model, by which DeepSpeed chooses its buckets.
    """

    model_type = "recommender-yesno"

    base_model: str = ""
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
    """Scores prompts. Others know it by `forward`, `from_pretrained` and `save_pretrained`.

    Args:
        language: a causal language model, with LoRA weights where the config has some.
        cf_model: a collaborative model, for the methods that have one.
    """

    config_class = YesNoConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    supports_prefix_sharing = True  # whether what two prompts begin with is the same for both

    def __init__(self, config: YesNoConfig, language: PreTrainedModel, cf_model: CollaborativeModel | None = None):
        super().__init__(config)
        self.language, self.cf_model = language, cf_model
        config.hidden_size = self.get_input_embeddings().embedding_dim
        self.build_projector()
        for module in self.modules():
            module._is_hf_initialized = True  # all weights have their values; nothing is to be drawn anew
        self.post_init()
        self.freeze_parameters()

    def build_projector(self) -> None:
        """Make what stands between the language model and the collaborative one, the part "projector"."""
        if self.cf_model is None:
            return
        for name, width in (("user", self.cf_model.user_width), ("item", self.cf_model.item_width)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))

    @torch.no_grad()
    def fit_normalization(
        self, users: torch.Tensor, items: torch.Tensor, histories: torch.Tensor | None = None
    ) -> None:
        """Called before training with some of its rows, int64 [rows]: from then on `normalize` knows their scale.

        Embeddings of collaborative models spread by .01 (items of DIN) or by 1 (users of SASRec); a network that is to
        read both should not have to find that out.
        """
        found = {
            "user": self.cf_model.user_vectors(users, histories, items),
            "item": self.cf_model.item_vectors(items),
        }
        for name, vectors in found.items():
            std, mean = torch.std_mean(vectors, 0)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(torch.where(std > 1e-8, std, 1.0))

    def normalize(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors [..., width] of a "user" or an "item" on the scale that `fit_normalization` has learned."""
        return ((vectors - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_std")).to(vectors.dtype)

    @staticmethod
    def component_of(name: str) -> str:
        """Which of PARTS a parameter belongs to."""
        part = name.partition(".")[0]
        if part == "language":
            return "lora" if ".lora_" in name else part
        return part if part in PARTS else "projector"

    def freeze_parameters(self) -> None:
        """Let gradients go to the parts that are trained, in float32, and know what is to be saved."""
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
        """Whether gradients go through what the language model is, or has beside it."""
        return not {"language", "lora"}.isdisjoint(self.config.trained)

    def train(self, mode: bool = True) -> "YesNoModel":
        """Parts that are frozen stay in evaluation mode."""
        super().train(mode)
        if self.cf_model is not None and "cf_model" not in self.config.trained:
            self.cf_model.eval()
        if not self.tunes_language:
            # A layer that is checkpointed recomputes itself in training mode alone.
            checkpointed = self.language.is_activation_checkpointing
            for module in self.language.modules():
                if isinstance(module, nn.Dropout) or not checkpointed:
                    module.training = False
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language.get_output_embeddings()

    def embed_inputs(self, input_ids: torch.Tensor, **about) -> torch.Tensor:
        """What the language model reads: the tokens, or, float [batch, length, hidden], their embeddings."""
        return input_ids

    def forward(
        self,
        input_ids: torch.Tensor,
        last: torch.Tensor,
        shared: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **about,
    ) -> CollaborativeOutput:
        """The logit of Yes after each prompt.

        Args:
            input_ids: int64 [batch, length], padded on the right, which no earlier place sees.
            last: int64 [batch], where each prompt ends.
            shared: int64 [batch], with how many tokens each prompt begins that have nothing to do with the item; they
                are computed once for rows that begin alike.
            labels: float [batch], 1 liked, 0 not.
            num_items_in_batch: what the summed loss is divided by (default: the rows).
            about: what else a `data.questions.YesNoCollator` gives.

        Returns:
            logits float32 [batch]; the loss, binary cross-entropy, where there are labels.
        """
        words = self.embed_inputs(input_ids, **about)
        if shared is None or not shared.any() or not self._can_share_prefix():
            logits = self._yes(words, last)
        else:
            logits = self._logits_after_prefix(self._can_skip(shared), input_ids, words, last)
        loss = None
        if labels is not None:
            count = len(labels) if num_items_in_batch is None else num_items_in_batch
            loss = F.binary_cross_entropy_with_logits(self.log_odds(logits), labels.float(), reduction="sum") / count
        return CollaborativeOutput(loss=loss, logits=logits)

    def log_odds(self, logits: torch.Tensor | np.ndarray) -> torch.Tensor | np.ndarray:
        """Of logits those that the loss sees; the sigmoid of these is the probability of Yes."""
        return logits - self.config.offset

    @property
    def is_zero3(self) -> bool:
        """Whether ZeRO-3 gathers weights in every pass: then the data of a batch must not tell how many there are, or
        one process would wait for another."""
        return self.training and hasattr(next(self.parameters()), "ds_id")

    def _can_share_prefix(self) -> bool:
        """Whether what prompts begin with can be computed apart: no gradient is to go through it."""
        learns = torch.is_grad_enabled() and self.tunes_language
        if learns or self.is_zero3 or not self.supports_prefix_sharing or self.language.is_activation_checkpointing:
            return False
        return attention_window(self.language) > 0

    def _can_skip(self, shared: torch.Tensor) -> torch.Tensor:
        """`shared`, or the least of it for all rows, where a model counts places in a cache instead of positions."""
        slides = attention_window(self.language) < float("inf")
        counts = slides or not accepts_argument(self.language, "position_ids")
        return shared.min().expand(len(shared)) if counts else shared

    def _logits_after_prefix(
        self, shared: torch.Tensor, input_ids: torch.Tensor, words: torch.Tensor, last: torch.Tensor
    ) -> torch.Tensor:
        """As `_yes`; each distinct beginning, `shared` tokens of a row, is computed once, without gradients."""
        longest, places = int(shared.max()), torch.arange(input_ids.shape[1], device=input_ids.device)
        beginnings = torch.where(places < shared[:, None], input_ids, input_ids[0, 0])[:, :longest]
        cache = self._prefix_cache(beginnings)
        # What follows, moved to the left: place `shared` of each row becomes place 0.
        rest = shared[:, None] + torch.arange(int((last - shared).max()) + 1, device=last.device)
        rows, where = torch.arange(len(last), device=last.device)[:, None], rest.clamp(max=input_ids.shape[1] - 1)
        given = {}
        if int(shared.min()) < longest:  # some rows of the cache end with places that nothing stands in
            there = places[:longest] < shared[:, None]
            given = {"attention_mask": torch.cat([there, torch.ones_like(rest, dtype=torch.bool)], 1).long()}
            given["position_ids"] = rest
        return self._yes(words[rows, where], last - shared, cache, **given)

    @torch.no_grad()
    def _prefix_cache(self, ids: torch.Tensor) -> DynamicCache:
        """Keys and values of int64 ids [batch, length]: each distinct row once, and once what all begin with."""
        rows, row_of = torch.unique(ids, dim=0, return_inverse=True)
        cache, done = DynamicCache(config=self.language.config), 0
        common = int((rows == rows[:1]).all(0).cumprod(0).sum())
        if (len(rows) - 1) * common >= MIN_SHARED_PREFIX:
            self._yes(rows[:1, :common], row_of[:1] * 0, cache)
            cache.batch_repeat_interleave(len(rows))
            done = common
        if done < ids.shape[1]:
            self._yes(rows[:, done:], row_of.new_zeros(len(rows)), cache)
        cache.batch_select_indices(row_of)
        return cache

    def _yes(
        self, words: torch.Tensor, last: torch.Tensor, cache: DynamicCache | None = None, **given
    ) -> torch.Tensor:
        """Logits of Yes, float32 [batch], after place `last` of each row; no other logit is computed."""
        head, rows = self.language.get_output_embeddings(), torch.arange(len(last), device=last.device)

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            logit = (hidden[rows, last].float() * head.weight[self.config.answer].float()).sum(-1)
            if getattr(head, "bias", None) is not None:
                logit = logit + head.bias[self.config.answer].float()
            return logit[:, None, None]

        given["inputs_embeds" if words.is_floating_point() else "input_ids"] = words
        # What a model does to its logits after the head (caps, scales) it does to this one as well.
        with patched_forward(head, forward):
            return self.language(**given, past_key_values=cache, use_cache=cache is not None).logits[:, 0, 0]

    def include_base_weights(self) -> None:
        """From now on a saved folder holds the language model and the collaborative model, too."""
        self.config.saved = list(PARTS)
        self.config.base_config = self.language.config.to_dict()
        self.freeze_parameters()

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes) -> "YesNoModel":
        """The model in `folder`, for evaluation, put together with what the folder points to.

        Args:
            changes: to the config, where they are not None: base_model or cf_model if these have moved, load_in_4bit or
                base_dtype.

        Raises:
            InputError: something is missing, or is not what the model was trained with.
        """
        config = cls.config_class.from_dict(read_json(Path(folder) / "config.json", "the config of a tuned model"))
        if config.trained is None or config.saved is None:
            raise InputError(f"{Path(folder) / 'config.json'}: is not the config of a tuned {cls.__name__}")
        for key, value in changes.items():
            if value is not None:
                setattr(config, key, value)
        if config.load_in_4bit and "language" in config.saved:
            raise InputError(
                f"{folder}: holds a whole language model, which is not quantised: not with --load_in_4bit"
            )
        model = cls(config, open_language(config), open_cf_model(config, folder))
        state = {}
        try:
            for file in sorted(Path(folder).glob("model*.safetensors")):
                state |= load_file(file)
            found = model.load_state_dict(state, strict=False)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"{folder}: its weights do not fit ({' '.join(str(error).split())[:200]}); is {config.base_model} "
                "the model it was tuned from?"
            ) from None
        tied = model.all_tied_weights_keys
        missing = [name for name in found.missing_keys if cls.component_of(name) in config.saved and name not in tied]
        if wrong := [*missing, *found.unexpected_keys]:
            raise InputError(f"{folder}: its weights are not those of its config ({wrong[0]}); train it again")
        return model.eval()


def open_language(config: YesNoConfig) -> PreTrainedModel:
    """The language model that `config` points to, or, untrained, the one it describes; with LoRA if it has some."""
    dtype = getattr(torch, config.base_dtype)
    if config.base_config:
        language = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.base_config), dtype=dtype)
    else:
        language = load_model(config.base_model, dtype, config.load_in_4bit)
    language.requires_grad_(False)
    if config.lora:
        add_lora(language, **config.lora)
    return language


def open_cf_model(config: YesNoConfig, folder: str | Path) -> CollaborativeModel | None:
    """The collaborative model that `config` points to, or, untrained, the one it describes."""
    if not config.cf_config:
        return None
    if "cf_model" in config.saved:
        kind = COLLABORATIVE_MODELS[config.cf_config["model_type"]]
        return kind(kind.config_class.from_dict(config.cf_config))
    model = load_collaborative(config.cf_model)
    if weights_sha256(model) != config.cf_sha256:
        raise InputError(f"{config.cf_model}: is not the model that {folder} was trained with; see --cf_model")
    return model
