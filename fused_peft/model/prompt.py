"""Soft prompts for Transformers models: trained vectors before the input, or before every layer's keys and values.

Prompt tuning (arXiv 2104.08691): P in front of the input embeddings. P-tuning (arXiv 2103.10385): the same, P the
output of a small encoder. Prefix tuning (arXiv 2101.00190): P in front of keys and values, as a Transformers cache.
Reconstruction group of arXiv 2407.05417: concat(P, ...). There is no weight W here, so there is nothing to fuse and
nothing to merge; modules, shapes and checkpoints are Hugging Face PEFT's.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.versions import warn_outside
from ..methods import PeftConfig
from ..methods.base import positive_int

_SIZES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
}


@dataclass(kw_only=True)
class SoftPromptConfig(PeftConfig):
    """Of trained vectors P; fields that name modules have nothing to name.

    num_virtual_tokens: length of P.
    token_dim, num_layers, num_attention_heads: taken from the model when None.
    num_transformer_submodules: as PEFT stores it.
    """

    num_virtual_tokens: int = 20
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None

    method_name: ClassVar[str]
    is_prompt_learning: ClassVar[bool] = True  # which PEFT asks

    def __post_init__(self):
        super().__post_init__()
        positive_int("num_virtual_tokens", self.num_virtual_tokens)
        if self.target_modules is not None:
            raise ValueError(f"target_modules={self.target_modules!r}: a soft prompt adapts no module; leave it out")
        if self.target_parameters is not None:
            raise ValueError(
                f"target_parameters={self.target_parameters!r}: a soft prompt adapts no parameter; leave it out"
            )


@dataclass(kw_only=True)
class PromptTuningConfig(SoftPromptConfig):
    """Prompt tuning.

    prompt_tuning_init: "RANDOM", or "SAMPLE_VOCAB" (embeddings of random tokens).
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    method_name: ClassVar[str] = "prompt_tuning"

    prompt_tuning_init: str = "RANDOM"

    def __post_init__(self):
        super().__post_init__()
        if self.prompt_tuning_init not in ("RANDOM", "SAMPLE_VOCAB"):
            raise ValueError(f"prompt_tuning_init={self.prompt_tuning_init!r} must be 'RANDOM' or 'SAMPLE_VOCAB'")


@dataclass(kw_only=True)
class PromptEncoderConfig(SoftPromptConfig):
    """P-tuning.

    encoder_reparameterization_type: MLP or LSTM.
    encoder_hidden_size: its width (None: token_dim).
    encoder_num_layers: layers of the LSTM; the MLP has two.
    encoder_dropout: probability on the LSTM's output between layers.
    """

    peft_type: ClassVar[str] = "P_TUNING"
    method_name: ClassVar[str] = "p_tuning"

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        kind = self.encoder_reparameterization_type
        if kind not in ("MLP", "LSTM"):
            raise ValueError(f"encoder_reparameterization_type={kind!r} must be 'MLP' or 'LSTM'")


@dataclass(kw_only=True)
class PrefixTuningConfig(SoftPromptConfig):
    """Prefix tuning.

    prefix_projection: P through a two-layer MLP.
    encoder_hidden_size: its width (None: token_dim).
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    method_name: ClassVar[str] = "prefix_tuning"

    encoder_hidden_size: int | None = None
    prefix_projection: bool = False


# what Transformers calls the argument that takes a cache, newest first
_CACHE_NAMES = ("cache", "past_key_values")

CONFIGS = {c.peft_type: c for c in (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig)}


def resolve(model: nn.Module, config: SoftPromptConfig) -> dict[str, Any]:
    """The sizes a config leaves to the model. Raises ValueError when the model lacks what the method needs."""
    sizes, model_config = {}, getattr(model, "config", None)
    for name, aliases in _SIZES.items():
        value = getattr(config, name)
        if value is None:
            value = next((getattr(model_config, a) for a in aliases if hasattr(model_config, a)), None)
        if value is None:
            raise ValueError(f"{name}=None, and model={type(model).__name__} has no config that tells it; give {name}")
        sizes[name] = value
    if isinstance(config, PrefixTuningConfig):
        groups = getattr(model_config, "num_key_value_heads", None)
        if groups and config.num_attention_heads is None:  # grouped queries: the cache is that much narrower
            sizes["token_dim"] = sizes["token_dim"] // sizes["num_attention_heads"] * groups
            sizes["num_attention_heads"] = groups
    sizes["num_transformer_submodules"] = config.num_transformer_submodules or 1
    if hasattr(config, "encoder_hidden_size"):
        sizes["encoder_hidden_size"] = config.encoder_hidden_size or sizes["token_dim"]
    return sizes


def hooked(model: nn.Module, config: SoftPromptConfig) -> nn.Module:
    """The module whose inputs the prompt joins. Raises ValueError when none accepts what is needed."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model={type(model).__name__} is an encoder-decoder; soft prompts here are for single stacks")
    needed = _CACHE_NAMES if isinstance(config, PrefixTuningConfig) else ("inputs_embeds",)
    for module in (model, getattr(model, "base_model", model)):
        if _argument(module, needed):
            return module
    raise ValueError(
        f"model={type(model).__name__} does not accept {' or '.join(needed)}, which {config.peft_type.upper()} needs; "
        "adapt weights instead, e.g. with LoraConfig"
    )


def warn_positions(model: nn.Module, config: SoftPromptConfig) -> None:
    """Warn where a span's positions are labels: like PEFT's, they are passed on as they are."""
    joins_the_text = not isinstance(config, PrefixTuningConfig)
    if joins_the_text and not config.inference_mode and _argument(model, ("start_positions",)):
        n = config.num_virtual_tokens
        warnings.warn(
            f"{type(model).__name__} counts start_positions, end_positions and the positions of its logits from the "
            f"first of {n} soft tokens, as under Hugging Face PEFT: add {n} to both labels, and take {n} from a "
            "predicted position, to mean the text (with PrefixTuningConfig there is nothing to add)",
            stacklevel=5,  # the caller of get_peft_model
        )


def _argument(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of the names that the module's forward has as an argument."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in names if name in parameters), None)


class SoftPrompt(nn.Module):
    """P, the encoder it goes through where the config asks for one, and a pre-hook that joins it to the inputs.

    plain: P itself is the parameter, as in a loaded checkpoint, whatever encoder trained it.
    """

    def __init__(self, config: SoftPromptConfig, words: nn.Embedding, layers: int, plain: bool = False):
        super().__init__()
        n, width = config.num_virtual_tokens, config.token_dim
        self.config, self.enabled, self.encoder, self.recurrent = config, True, None, None
        self.prefix, self.layers = isinstance(config, PrefixTuningConfig), layers
        like = {"device": words.weight.device, "dtype": torch.float32}
        hidden, out = getattr(config, "encoder_hidden_size", None), 2 * layers * width if self.prefix else width
        encoded = not plain and (isinstance(config, PromptEncoderConfig) or getattr(config, "prefix_projection", False))
        self.embedding = nn.Embedding(n, width if encoded else out, **like)
        if encoded and self.prefix:
            self.encoder = nn.Sequential(nn.Linear(width, hidden, **like), nn.Tanh(), nn.Linear(hidden, out, **like))
        elif encoded and config.encoder_reparameterization_type == "LSTM":
            self.recurrent = nn.LSTM(
                width, hidden, config.encoder_num_layers, dropout=config.encoder_dropout, bidirectional=True,
                batch_first=True, **like,
            )  # fmt: skip
            wide = 2 * hidden
            self.encoder = nn.Sequential(nn.Linear(wide, wide, **like), nn.ReLU(), nn.Linear(wide, out, **like))
        elif encoded:
            first, middle = nn.Linear(width, hidden, **like), nn.Linear(hidden, hidden, **like)
            self.encoder = nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), nn.Linear(hidden, out, **like))
        if getattr(config, "prompt_tuning_init", None) == "SAMPLE_VOCAB":
            rows = torch.randint(words.num_embeddings, (n,), device=words.weight.device)
            self.embedding.weight.data.copy_(words.weight.detach()[rows])

    def prompt(self) -> Tensor:
        """P: (num_virtual_tokens, token_dim), or (num_virtual_tokens, 2 · layers · token_dim) for a prefix."""
        P = self.embedding.weight
        if self.recurrent is not None:
            P = self.recurrent(P[None])[0][0]
        return P if self.encoder is None else self.encoder(P)

    def _cache(self, batch: int, config, dtype: torch.dtype):
        """The prefix as a Transformers cache."""
        from transformers import DynamicCache

        heads, n = self.config.num_attention_heads, self.config.num_virtual_tokens
        P = self.prompt().to(dtype).view(n, 2 * self.layers, heads, -1).permute(1, 2, 0, 3)
        cache = DynamicCache(config=config)
        for i in range(self.layers):
            key, value = (P[2 * i + j].expand(batch, -1, -1, -1) for j in (0, 1))
            cache.update(key, value, i)
        return cache

    def join(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The pre-hook: the inputs with the prompt in front. Continuing from a cache only the mask grows."""
        if not self.enabled:
            return args, kwargs
        names = list(inspect.signature(module.forward).parameters)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        first = embeds if ids is None else ids
        if first is None:
            raise ValueError("a soft prompt needs input_ids or inputs_embeds")
        batch, n = first.shape[0], self.config.num_virtual_tokens
        mask = kwargs.get("attention_mask")
        past = next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
        if mask is not None:
            kwargs["attention_mask"] = torch.cat([mask.new_ones(batch, n), mask], dim=1)
        if past is not None and past.get_seq_length() > 0:
            return (), kwargs
        words = module.get_input_embeddings()
        if self.prefix:
            if module.training and getattr(module, "is_gradient_checkpointing", False):
                raise RuntimeError(
                    "prefix tuning does not work with gradient checkpointing, under which Transformers drops the cache "
                    "with the prefix; call model.gradient_checkpointing_disable()"
                )
            if kwargs.get("position_ids") is not None:  # of the tokens alone; the prefix takes the first n
                kwargs["position_ids"] = kwargs["position_ids"] + n
            for name in _CACHE_NAMES:
                kwargs.pop(name, None)
            kwargs[_argument(module, _CACHE_NAMES)] = self._cache(batch, module.config, words.weight.dtype)
            return (), kwargs
        if embeds is None:
            embeds = words(ids)
        P = self.prompt().to(embeds.dtype).expand(batch, -1, -1)
        kwargs["inputs_embeds"], kwargs["input_ids"] = torch.cat([P, embeds], dim=1), None
        kwargs.pop("position_ids", None)
        if kwargs.get("token_type_ids") is not None:
            types = kwargs["token_type_ids"]
            kwargs["token_type_ids"] = torch.cat([types.new_zeros(batch, n), types], dim=1)
        labels = kwargs.get("labels")
        if labels is not None and labels.dim() == 2 and labels.shape[1] == first.shape[1]:  # a label a token
            kwargs["labels"] = torch.cat([labels.new_full((batch, n), -100), labels], dim=1)
        return (), kwargs

    def extra_repr(self) -> str:
        return f"{self.config.method_name}, num_virtual_tokens={self.config.num_virtual_tokens}"


def attached(model: nn.Module) -> SoftPrompt | None:
    """The model's soft prompt, if it has one of this library's."""
    soft = getattr(model, "soft_prompt", None)
    return soft if isinstance(soft, SoftPrompt) else None


def attach(model: nn.Module, config: SoftPromptConfig, plain: bool = False) -> SoftPrompt:
    """Register a SoftPrompt as ``model.soft_prompt`` and hook it to the inputs. Raises ValueError, nothing changed."""
    warn_outside("transformers")
    module = hooked(model, config)
    soft = SoftPrompt(config, model.get_input_embeddings(), config.num_layers, plain)
    model.soft_prompt = soft
    soft.handle = module.register_forward_pre_hook(soft.join, with_kwargs=True)
    return soft
