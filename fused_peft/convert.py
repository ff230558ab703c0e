"""From a model to an adapted model and back: get_peft_model, merge, unmerge, merge_and_unload, disable_adapter."""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from . import checks, dispatch, model_saving, prompt
from .adapted import STATE as _STATE
from .adapted import is_adapted, is_pefts, layers, roots, unwrap
from .factors import NotMergeableError
from .linear import Gathered, PeftLinear
from .methods import Method, PeftConfig, method_of
from .sharded import (
    fsdp_modules,
    gathered,
    is_partitioned,
    is_sharded,
    is_spread,
    numel,
    reshard,
    set_data,
    shape_of,
    whole,
)
from .targets import find_targets, is_target, modules_to_save, resolve
from .unmet import warn_of_unmet
from .wide import HALF, READERS, narrow, widen

# what Hugging Face PEFT's own models have in place of the functions here
_PEFT_CALLS = {
    "merge": "merge_adapter()",
    "unmerge": "unmerge_adapter()",
    "merge_and_unload": "merge_and_unload()",
    "disable_adapter": "disable_adapter()",
    "save_pretrained": "save_pretrained(path)",
    "load_adapter": "load_adapter(path, adapter_name)",
}


@dataclass
class AdapterState:
    """What get_peft_model leaves on the model beside its layers: the config, and how to see the base again."""

    config: PeftConfig
    saved: dict[str, nn.Module] = field(default_factory=dict)  # modules_to_save: name -> frozen original
    biases: dict[str, Tensor] = field(default_factory=dict)  # trained in place: parameter name -> base value
    embeddings: dict[str, Tensor] = field(default_factory=dict)  # brought along by a loaded adapter: name -> base value
    disabled: int = 0  # how many disable_adapter contexts are open
    layers: tuple[str, ...] = ()  # the names of the adapted layers, by which a vanished one is noticed
    told: tuple[str, ...] = ()  # the vanished ones that on_step has warned of

    def __getstate__(self) -> dict:
        self.refuse_while_exchanged("pickling the model")
        return self.__dict__

    def __setstate__(self, state: dict) -> None:
        """As it was pickled, by an older version too: what that did not have was empty."""
        empty = vars(AdapterState(config=None))
        self.__dict__.update(empty | {key: value for key, value in state.items() if key in empty})
        if not isinstance(self.embeddings, dict):
            self.embeddings = {}
        model_saving.guard()

    def __deepcopy__(self, memo: dict) -> AdapterState:
        return replace(self, **{key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})

    def refuse_while_exchanged(self, what: str) -> None:
        """RuntimeError where base values stand in for trained heads and biases."""
        if self.disabled and (self.saved or self.biases):
            names = checks.few([*self.saved, *self.biases])
            raise RuntimeError(
                f"{what} inside disable_adapter would take the base values of {names} for the trained ones; leave the "
                "context first"
            )


@dataclass
class _Plan:
    """Everything get_peft_model will do, made and checked before the model is touched."""

    state: AdapterState
    layers: dict[str, PeftLinear]
    copies: dict[str, nn.Module]
    wide: torch.dtype  # of the heads and biases that train in half-precision modules
    plain_prompt: bool = False  # a soft prompt without the encoder that trained it


def refuse_while_disabled(model: nn.Module, what: str) -> None:
    """RuntimeError inside disable_adapter, where base values stand in for the trained ones."""
    state = getattr(unwrap(model), _STATE, None)
    if state is not None and state.disabled:
        raise RuntimeError(f"{what} inside disable_adapter would act on the base values; leave the context first")


def refuse_pefts(model: nn.Module, what: str) -> None:
    """ValueError where the adapters of the model are Hugging Face PEFT's, not get_peft_model's; names PEFT's call."""
    if not is_adapted(model) and is_pefts(model):
        raise ValueError(
            f"model={type(model).__name__} is Hugging Face PEFT's, and fused_peft.{what} is for models of "
            f"fused_peft.get_peft_model; call {_PEFT_CALLS[what]} of the model that peft.get_peft_model returned"
        )


def state_of(model: nn.Module, what: str = "save_pretrained") -> AdapterState:
    """The model's adapter state; ValueError when get_peft_model has not run on it, for the function ``what``."""
    state = getattr(unwrap(model), _STATE, None)
    if state is None:
        refuse_pefts(model, what)
        if parts := model_saving.adapted_parts(unwrap(model)):
            raise ValueError(f"{what}: {model_saving.about_parts(unwrap(model), parts)}")
        raise ValueError(f"model={type(model).__name__} has no adapter; call get_peft_model or load_adapter first")
    return state


def plan(model: nn.Module, config: PeftConfig, adapter_dtype: torch.dtype | None = None) -> _Plan:
    """Build every new module without changing the model. Raises what get_peft_model raises."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} must be a torch.nn.Module")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(
            f"model is a {type(model).__name__}; adapt the model inside, model.module, and wrap it after that"
        )
    soft = isinstance(config, prompt.SoftPromptConfig)
    if not soft:
        method_of(config)
    if is_adapted(model):
        if parts := model_saving.adapted_parts(model):
            raise ValueError(
                f"get_peft_model has adapted model.{parts[0]}, a part of this model={type(model).__name__}; call "
                f"merge_and_unload(model.{parts[0]}) first, or load_adapter(model.{parts[0]}, path) to replace its "
                "adapter"
            )
        raise ValueError("the model already has adapters; call merge_and_unload first, or load_adapter to replace them")
    if is_pefts(model):
        raise ValueError(
            f"model={type(model).__name__} already carries Hugging Face PEFT layers; fused_peft.accelerate(model) runs "
            "them fused as they are, or call model.merge_and_unload() and adapt what it returns"
        )
    config = replace(config)  # re-validates, and never edits the caller's object
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    resolved = resolve(model, config)
    saved = modules_to_save(model, resolved)
    originals = {name: model.get_submodule(name) for name in saved}
    with gathered(p for module in originals.values() for p in module.parameters()):
        copies = {name: copy.deepcopy(module) for name, module in originals.items()}
    if soft:
        resolved = replace(resolved, **prompt.resolve(model, resolved))
        prompt.hooked(model, resolved)
        warn_of_unmet(model, config, resolved, ())
        return _Plan(AdapterState(resolved.in_use(), saved=originals), {}, copies, adapter_dtype or torch.float32)
    new, targets = {}, find_targets(model, resolved, config)
    both = [name for name in targets if name in saved]
    if both:
        raise ValueError(
            f"modules_to_save={resolved.modules_to_save!r} also means {both[0]!r}, by the end of its name, and that is "
            f"a target; a module is adapted or trained whole: add {both[0]!r} to exclude_modules"
        )
    resolved = resolved.for_targets([_shape(module) for module in targets.values()])
    with _frozen_as_before(model):
        for name, module in _shown(targets, method_of(resolved)):
            try:
                new[name] = PeftLinear.from_linear(module, resolved.for_module(name), adapter_dtype)
            except ValueError as e:
                raise ValueError(f"{name}: {e}") from e
    if any(layer.fan_in_fan_out for layer in new.values()) and hasattr(resolved, "fan_in_fan_out"):
        resolved = replace(resolved, fan_in_fan_out=True)
    _warn_tied(model, new)
    warn_of_unmet(model, config, resolved, new)
    biases = {}
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        if last == "bias" and not any(name.startswith(f"{s}.") for s in saved):
            if _bias_trains(resolved, owner, owner in new):
                biases[name] = whole(parameter).detach().clone()
    state = AdapterState(resolved.in_use(), saved=originals, biases=biases)
    return _Plan(state, new, copies, adapter_dtype or torch.float32)


def _shown(targets: dict[str, nn.Module], method: Method) -> Iterable[tuple[str, nn.Module]]:
    """The targets, with a progress bar where their starts take longer than two seconds (an SVD a layer)."""
    if not method.from_weight:
        return targets.items()
    from tqdm import tqdm

    return tqdm(targets.items(), f"{method.name} starts from the weights", unit="layer", delay=2, disable=None)


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer or Conv1D."""
    shape = shape_of(module.weight)
    return shape if isinstance(module, nn.Linear) else shape[::-1]


def _bias_trains(config: PeftConfig, owner: str, adapted: bool) -> bool:
    """Whether a base bias trains in place."""
    if method_of(config).trains_other_biases:
        return config.target_modules is None and not adapted and is_target(config, owner)
    return config.bias == "all" or (config.bias != "none" and adapted)


@contextmanager
def _frozen_as_before(model: nn.Module):
    """from_linear freezes shared parameters; undo that when building fails, and until the plan is carried out."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _warn_tied(model: nn.Module, new: dict[str, PeftLinear]) -> None:
    holders = Holders(model)
    for name, layer in new.items():
        tied = holders.others(layer.weight, name)
        if tied:
            warnings.warn(
                f"{name}.weight is shared with {', '.join(tied)}, which stay as they are; the adapter cannot be merged "
                "before the two are untied",
                stacklevel=5,  # the caller of get_peft_model
            )


class Holders:
    """Which modules of a model hold which parameters."""

    def __init__(self, model: nn.Module):
        self.names: dict[int, list[tuple[str, str]]] = {}
        for name, module in model.named_modules():
            for key, p in module._parameters.items():
                self.names.setdefault(id(p), []).append((name, key))

    def others(self, parameter: Tensor | None, owner: str) -> list[str]:
        """The names under which modules other than the owner hold a parameter, a plain ".weight" left out."""
        held = () if parameter is None else self.names.get(id(parameter), ())
        return [f"{name}.{key}".removesuffix(".weight") for name, key in held if name != owner]


_P, _R = ParamSpec("_P"), TypeVar("_R")


def by_keyword(instead: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make a function of (model, something, *, ...) say what to do with a third positional argument: TypeError."""

    def decorate(call: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(call)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if len(args) > 2:
                raise TypeError(
                    f"{call.__name__} got {args[2]!r} as a third positional argument: {instead}; its other settings go "
                    "by keyword"
                )
            return call(*args, **kwargs)

        return checked

    return decorate


@by_keyword("a model of this library holds one adapter, which has no name")
def get_peft_model(
    model: nn.Module,
    config: PeftConfig,
    *,
    autocast_adapter_dtype: bool = True,
    adapter_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Adapt a model in place and return it: base frozen, adapters (and asked-for biases and heads) trainable.

    Every trainable parameter exists when this returns. Layers, parameter names and targets follow Hugging Face PEFT;
    each adapted linear layer becomes a ``PeftLinear`` that shares its weight.

    Args:
        model: any nn.Module with linear layers.
        config: e.g. ``LoraConfig(r=16, target_modules="all-linear")``.
        autocast_adapter_dtype: adapters of fp16 and bf16 layers are kept in fp32 (PEFT's default).
        adapter_dtype: an explicit dtype for every adapter, instead.

    Raises ValueError or TypeError with the model unchanged: already adapted, no or unsuitable matches, r too large.
    """
    if adapter_dtype is None and not autocast_adapter_dtype:
        adapter_dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return carry_out(model, plan(model, config, adapter_dtype))


def carry_out(model: nn.Module, planned: _Plan) -> nn.Module:
    model.requires_grad_(False)
    _replace(model, {id(model.get_submodule(name)): layer for name, layer in planned.layers.items()})
    for layer in planned.layers.values():
        for parameter in layer.adapter_names:
            getattr(layer, parameter).requires_grad_(not planned.state.config.inference_mode)
    trained = {id(p) for m in planned.state.saved.values() for p in m.parameters()}
    trained |= {id(p) for layer in planned.layers.values() for p in layer.adapter_tensors()}
    like = next((p for p in model.parameters() if p.dtype in HALF and id(p) not in trained), None)
    for name, module in planned.copies.items():
        widen(module, planned.wide, like)
        # under every name that the module itself has; a parameter tied to it stays frozen wherever else it is used
        _replace(model, {id(planned.state.saved[name]): module.requires_grad_(not planned.state.config.inference_mode)})
    if isinstance(planned.state.config, prompt.SoftPromptConfig):
        soft = prompt.attach(model, planned.state.config, plain=planned.plain_prompt)
        soft.requires_grad_(not planned.state.config.inference_mode)
    holders = Holders(model).names
    for name in planned.state.biases:
        half = planned.state.biases[name].dtype in HALF
        for owner, key in holders[id(model.get_parameter(name))] if half else ():
            if owner not in planned.layers:
                reader, below = _reader(model, f"{owner}.{key}" if owner else key)
                widen(reader, planned.wide, like, [below])
        if (own := model.get_parameter(name)).dtype in HALF:
            with gathered([own], write=True):
                own.data = own.data.to(planned.wide)  # a PeftLinear computes in its input's dtype
        model.get_parameter(name).requires_grad_(not planned.state.config.inference_mode)
    planned.state.layers = tuple(planned.layers)
    setattr(model, _STATE, planned.state)
    model_saving.redirect(model)
    if not planned.state.config.inference_mode:
        checks.watch(model)
    return model


def _reader(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter, or the one above that reads it there, and the parameter's name in it."""
    owner = name.rpartition(".")[0]
    above = [".".join(owner.split(".")[:i]) for i in range(len(owner.split(".")))]
    top = next((n for n in above if isinstance(model.get_submodule(n), READERS)), owner)
    return model.get_submodule(top), name.removeprefix(f"{top}." if top else "")


def _replace(model: nn.Module, new: dict[int, nn.Module]) -> None:
    """Put new[id(old)] wherever old is registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]


def merge(model: nn.Module, safe_merge: bool = False) -> None:
    """Fold every adapter into its weight. All layers are checked first: on any error the model is as it was.

    Raises RuntimeError when already merged, NotMergeableError when a method has no equivalent weight, ValueError with
    safe_merge when a merged weight is not finite.
    """
    found = _found(model, "merge")
    refuse_while_disabled(model, "merge")
    reshard(model)
    for name, layer in found:
        if layer.merged:
            raise RuntimeError(f"{name} is already merged; call unmerge before merging again")
    _merge(model, found, safe_merge)


def _merge(model: nn.Module, found: list[tuple[str, PeftLinear]], safe_merge: bool) -> None:
    """Merge these layers, all or none; NotMergeableError where another module holds the same weight."""
    checks.warn_vanished(model)
    holders = Holders(unwrap(model))
    for name, layer in found:
        if (tied := holders.others(layer.bias, name)) and layer.changes_bias():
            raise NotMergeableError(
                f"{name}.bias is shared with {', '.join(tied)}, which merging would change too; give {name} a bias of "
                "its own, torch.nn.Parameter(layer.bias.detach().clone())"
            )
        if tied := holders.others(layer.weight, name):
            setting = "model.config.tie_word_embeddings = False, and " if hasattr(model, "config") else ""
            raise NotMergeableError(
                f"{name}.weight is shared with {', '.join(tied)}, which merging would change too; untie them first: "
                f"{setting}give {name} a weight of its own, torch.nn.Parameter(layer.weight.detach().clone())"
            )
    done = []
    try:
        for name, layer in found:
            layer.merge(safe_merge)
            done.append(layer)
    except BaseException as e:
        for layer in done:
            layer.unmerge()
        if isinstance(e, ValueError):
            raise type(e)(f"{name}: {e}") from e
        raise


def unmerge(model: nn.Module) -> None:
    """Restore every base weight bit for bit. Raises RuntimeError when a layer is not merged."""
    found = _found(model, "unmerge")
    refuse_while_disabled(model, "unmerge")
    reshard(model)
    for name, layer in found:
        if not layer.merged:
            raise RuntimeError(f"{name} is not merged; there is nothing to unmerge")
    for _, layer in found:
        layer.unmerge()


def _found(model: nn.Module, what: str | None = None) -> list[tuple[str, PeftLinear]]:
    """The model's adapted layers, for the function ``what`` where PEFT has its own; ValueError where there are none."""
    model = unwrap(model)
    if what is not None:
        refuse_pefts(model, what)
    found = list(layers(model))
    if prompt.attached(model):
        raise NotMergeableError("a soft prompt has no weight: there is nothing to merge, unload or explain per layer")
    if not found:
        raise ValueError(f"model={type(model).__name__} has no adapted layer; call get_peft_model first")
    return found


def merge_and_unload(model: nn.Module, safe_merge: bool = False) -> nn.Module:
    """Merge, then turn every layer back into its original class; returns the plain model. Raises as ``merge`` does."""
    model = unwrap(model)
    found = _found(model, "merge_and_unload")
    refuse_while_disabled(model, "merge_and_unload")
    if fsdp_modules(model):
        raise RuntimeError(
            "merge_and_unload would replace layers whose parameters fully_shard manages; merge(model) works, or "
            "save_pretrained, then load_adapter and merge_and_unload on a model that is not sharded"
        )
    if any(map(is_partitioned, model.parameters())):
        raise RuntimeError(
            "merge_and_unload would replace layers whose parameters DeepSpeed ZeRO-3 manages; merge(model) works, or "
            "save_pretrained, then load_adapter and merge_and_unload on a model that is not partitioned"
        )
    if not any(layer.merged for _, layer in found):
        merge(model, safe_merge)
    else:
        _merge(model, [(name, layer) for name, layer in found if not layer.merged], safe_merge)
    biased = [name for name, layer in found if layer.has_new_bias()]
    if biased and hasattr(model, "save_pretrained"):
        warnings.warn(
            f"{biased[0]} (of {len(biased)} such layers) has a bias now that the architecture lacks: from_pretrained "
            "would leave it out of a checkpoint of this model; save the adapter instead, or the model by torch.save",
            stacklevel=2,
        )
    unloaded = {id(layer): layer.unload() for _, layer in found}
    _replace(model, unloaded)
    plain = {id(layer) for layer in unloaded.values()}
    for root in roots(model):
        state = root.__dict__[_STATE]
        for name in state.saved:
            narrow(root.get_submodule(name))
        for name in state.biases:
            narrow(_reader(root, name)[0])
            owner = root.get_submodule(name.rpartition(".")[0])
            if id(owner) in plain:
                owner.bias.data = owner.bias.data.to(owner.weight.dtype)
        delattr(root, _STATE)
    model_saving.restore(model)
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes what the base model did: adapters off, merged or not; heads of
    modules_to_save and biases trained in place back at their base values.

    Where there are any of those, ``state_dict``, ``load_state_dict`` and pickling raise RuntimeError meanwhile."""
    model = unwrap(model)
    parts = roots(model)
    if parts and _STATE not in model.__dict__:  # adapted in part
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(disable_adapter(part))
            yield model
        return
    state = getattr(model, _STATE, None) or AdapterState(config=None)
    soft = prompt.attached(model)
    found = [("soft_prompt", soft)] if soft is not None else _found(model, "disable_adapter")
    before = [layer.enabled for _, layer in found]
    trained = {name: model.get_submodule(name) for name in state.saved}
    # ZeRO-3 knows the modules that it was given and no others: there the values change places, not the modules
    parted = {name for name, module in trained.items() if any(map(is_partitioned, module.parameters()))}
    exchanged = [(_bias_in_use(model, name), value) for name, value in state.biases.items()]
    for name in parted:
        exchanged += zip(trained[name].parameters(), map(whole, state.saved[name].parameters()), strict=True)
    reshard(model)
    values = [whole(p).detach().clone() if is_spread(p) else p.data for p, _ in exchanged]
    state.disabled += 1
    try:
        for _, layer in found:
            layer.enabled = False
        for name, module in trained.items():
            if name in parted:
                continue
            like = next(module.parameters(), None)
            original = state.saved[name]
            _replace(model, {id(module): original if like is None else original.to(like.device)})
            original.train(module.training)
        for p, base in exchanged:
            set_data(p, base.detach().to(p.device, p.dtype))
        yield model
    finally:
        state.disabled -= 1
        for (_, layer), enabled in zip(found, before, strict=True):
            layer.enabled = enabled
        _replace(model, {id(state.saved[name]): m for name, m in trained.items() if name not in parted})
        for (p, _), value in zip(exchanged, values, strict=True):
            set_data(p, value)


def _bias_in_use(model: nn.Module, name: str) -> Tensor:
    """The tensor that a disabled layer reads as its bias: merged layers read the one kept beside the merged."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner._base_bias if isinstance(owner, PeftLinear) and owner.merged else owner.bias


def print_trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Print and return (trainable, all) parameter counts, in PEFT's words, with the originals of modules_to_save."""
    trainable = sum(numel(p) for p in model.parameters() if p.requires_grad)
    model = unwrap(model)
    kept = getattr(model, _STATE).saved.values() if hasattr(model, _STATE) else ()
    total = sum(numel(p) for p in {*model.parameters(), *(p for m in kept for p in m.parameters())})
    percent = 100 * trainable / max(total, 1)
    checks.warn_vanished(model)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}")
    return trainable, total


@dataclass(frozen=True)
class LayerExplanation:
    """Which form and backend compute one layer, and why: the refusals of the backends before it."""

    name: str
    method: str
    form: str
    backend: str
    why: str


class Explanation(list):
    """One LayerExplanation a layer; prints as a table."""

    def __str__(self) -> str:
        rows = [("layer", "method", "form", "backend", "why")]
        rows += [(e.name, e.method, e.form, e.backend, e.why) for e in self]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]) for row in rows)


def explain(model: nn.Module, tokens: int = 2048, dtype: torch.dtype | None = None) -> Explanation:
    """Which form and backend would run each layer on ``tokens`` rows of ``dtype`` (default: the weight's), and why.

    ``print(fp.explain(model))`` shows a table. In strict mode, raises StrictError as the forward would.
    """
    if "peft" in sys.modules and is_pefts(model):
        from .integrations import peft

        if rows := peft.explanations(model, tokens, dtype):
            return Explanation(LayerExplanation(*row) for row in rows)
    return Explanation(LayerExplanation(name, *explain_layer(layer, tokens, dtype)) for name, layer in _found(model))


def explain_layer(layer: PeftLinear, tokens: int, dtype: torch.dtype | None) -> tuple[str, str, str, str]:
    """(method, form, backend, why) of one layer."""
    method = layer.method
    if layer.merged or not layer.enabled:
        state = "merged" if layer.merged and layer.enabled else "disabled"
        return method.name, "plain", "torch", f"{state}: one plain linear layer"
    if layer.forms_weight(tokens):
        why = "the weight is formed in each call, then one plain GEMM"
        if method.cost:
            factored, formed = (f / 1e9 for f in method.cost(layer, tokens))
            why += f": {formed:.3g} GFLOP instead of {factored:.3g} factored"
        return method.name, "weight", "torch", why
    sharded = is_sharded(layer.weight)
    problem = _problem(Gathered(layer, values=False) if sharded else layer, tokens, dtype or layer.weight.dtype)
    choice = dispatch.choose(problem)
    form = "output" if method.output else "product" if problem.hadamard else "factors"
    why = "W * (1 + s*BA) is formed once each way; " if problem.hadamard else ""
    why += f"sharded over {layer.weight.device_mesh.size()} processes; " if sharded else ""
    return method.name, form, choice.backend.name, why + choice.why()


def _problem(layer: PeftLinear, tokens: int, dtype: torch.dtype) -> dispatch.Problem:
    """The call that a layer makes on ``tokens`` rows, without making it."""
    with torch.no_grad():
        f = (layer.method.output or layer.method.factors)(layer)
    behind = layer.method.output is not None
    width = layer.out_features if behind else layer.in_features
    w = None if behind or layer.method.replaces_weight else layer.matrix
    bias = f.bias if f.bias is not None or behind else layer.bias
    x = torch.empty(1, device="meta", dtype=dtype).expand(tokens, width)
    return dispatch.foreseen(f, x, w, bias, x if behind else None, layer.training, layer.weight.device)
