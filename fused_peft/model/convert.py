"""From a model to an adapted model and back: get_peft_model, merge, unmerge, merge_and_unload, disable_adapter."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..core.factors import NotMergeableError
from ..core.frozen import kind_of
from ..core.sharded import (
    fsdp_modules,
    gathered,
    is_partitioned,
    is_spread,
    numel,
    reshard,
    set_data,
    whole,
)
from ..methods import Method, PeftConfig, method_of
from . import checks, model_saving, prompt, trainable_tokens
from .adapted import STATE, is_adapted, is_pefts, layers, roots, unwrap
from .adapter import refuse_inference
from .embedding import layer_class
from .holder import Holder
from .layer import PeftLayer
from .parameter import PeftParameter, matrix_shape
from .parts import adapted_parts
from .plain import plain_layers, unmark
from .state import AdapterState, by_keyword, refuse_pefts, refuse_while_disabled
from .targets import check_parameters, find_parameters, find_targets, is_target, modules_to_save, resolve
from .unmet import warn_of_unmet
from .wide import HALF, READERS, narrow, widen

_T = TypeVar("_T")


@dataclass
class _Plan:
    """Everything get_peft_model will do, made and checked before the model is touched."""

    state: AdapterState
    layers: dict[str, PeftLayer | PeftParameter]
    copies: dict[str, nn.Module]
    wide: torch.dtype  # of the heads and biases that train in half-precision modules
    plain_prompt: bool = False  # a soft prompt without the encoder that trained it


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
        if parts := adapted_parts(model):
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
    refuse_inference(model.parameters(), config)
    resolved = resolve(model, config)
    saved = modules_to_save(model, resolved)
    originals = {name: model.get_submodule(name) for name in saved}
    with gathered(p for module in originals.values() for p in module.parameters()):
        copies = {name: copy.deepcopy(module) for name, module in originals.items()}
    if soft:
        if resolved.trainable_token_indices:
            raise ValueError(
                f"trainable_token_indices={resolved.trainable_token_indices}: rows train beside an adapter, and "
                f"{type(config).__name__} makes none; leave it out"
            )
        resolved = replace(resolved, **prompt.resolve(model, resolved))
        prompt.hooked(model, resolved)
        prompt.warn_positions(model, resolved)
        warn_of_unmet(model, config, resolved, ())
        return _Plan(AdapterState(resolved.in_use(), saved=originals), {}, copies, adapter_dtype or torch.float32)
    new, targets = {}, find_targets(model, resolved, config)
    parameters = find_parameters(model, resolved)
    check_parameters(parameters, config)
    both = [name for name in targets if name in saved]
    if both:
        raise ValueError(
            f"modules_to_save={resolved.modules_to_save!r} also means {both[0]!r}, by the end of its name, and that is "
            f"a target; a module is adapted or trained whole: add {both[0]!r} to exclude_modules"
        )
    tokens = trainable_tokens.planned(model, resolved, (*targets, *saved), adapter_dtype)
    matrices = (matrix_shape(owner, key) for owner, key in parameters.values())
    resolved = resolved.for_targets([*(shape(module) for module in targets.values()), *matrices])
    with _frozen_as_before(model):
        for name, module in shown(targets, method_of(resolved)):
            try:
                new[name] = layer_class(module).made_from(module, resolved.for_module(name), adapter_dtype)
            except (ValueError, TypeError) as e:
                raise type(e)(f"{name}: {e}") from e
        for name, (owner, key) in shown(parameters, method_of(resolved)):
            new[name] = adapted_parameter(name, owner, key, resolved, adapter_dtype)
    if any(layer.fan_in_fan_out for layer in new.values()) and hasattr(resolved, "fan_in_fan_out"):
        resolved = replace(resolved, fan_in_fan_out=True)
    warn_tied(model, new)
    warn_of_unmet(model, config, resolved, new)
    biases = {}
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        if last == "bias" and not any(name.startswith(f"{s}.") for s in saved):
            if _bias_trains(resolved, owner, owner in new):
                biases[name] = whole(parameter).detach().clone()
    state = AdapterState(resolved.in_use(), saved=originals, biases=biases, tokens=tokens)
    return _Plan(state, new, copies, adapter_dtype or torch.float32)


def adapted_parameter(
    name: str, owner: nn.Module, key: str, config: PeftConfig | None, adapter_dtype: torch.dtype | None
) -> PeftParameter:
    """The adapter of a parameter, not yet put beside it. Errors name the parameter."""
    try:
        return PeftParameter(owner, key, config and config.for_module(name), adapter_dtype)
    except (ValueError, TypeError) as e:
        raise type(e)(f"{name}: {e}") from e


def shown(targets: dict[str, _T], method: Method) -> Iterable[tuple[str, _T]]:
    """The targets, with a progress bar where their starts take longer than two seconds (an SVD a layer)."""
    if not method.from_weight:
        return targets.items()
    from tqdm import tqdm

    return tqdm(targets.items(), f"{method.name} starts from the weights", unit="layer", delay=2, disable=None)


def shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a module that is adapted or can be."""
    if isinstance(module, PeftLayer):
        return module.out_features, module.in_features
    return kind_of(module).shape(module)


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
            if parameter.requires_grad != flag:
                with torch.inference_mode(parameter.is_inference()):
                    parameter.requires_grad_(flag)


def warn_tied(model: nn.Module, new: dict[str, Holder]) -> None:
    holders = Holders(model)
    for name, layer in new.items():
        tied = holders.others(getattr(layer, "weight", None), holder_of(layer, name))
        if tied:
            warnings.warn(
                f"{name}.weight is shared with {', '.join(tied)}, which stay as they are; the adapter cannot be merged "
                "before the two are untied",
                stacklevel=5,  # the caller of get_peft_model
            )


def holder_of(layer: nn.Module, name: str) -> str:
    """The name of the module that holds the weight of an adapted layer of this name."""
    return name.rpartition(".")[0] if isinstance(layer, PeftParameter) else name


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


@by_keyword("the first adapter is called 'default'; add_adapter(model, name, config) gives a model another one")
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
    with torch.inference_mode(False):  # what trains must not be an inference tensor
        return carry_out(model, plan(model, config, adapter_dtype))


def carry_out(model: nn.Module, planned: _Plan) -> nn.Module:
    model.requires_grad_(False)
    install(model, planned.layers)
    for layer in planned.layers.values():
        for parameter in layer.tensor_names:
            getattr(layer, parameter).requires_grad_(not planned.state.config.inference_mode)
    trained = {id(p) for m in planned.state.saved.values() for p in m.parameters()}
    trained |= {id(p) for layer in planned.layers.values() for p in layer.adapter_tensors()}
    like = next((p for p in model.parameters() if p.dtype in HALF and id(p) not in trained), None)
    for name, module in planned.copies.items():
        widen(module, planned.wide, like)
        # under this name only: a tied or shared original stays frozen wherever else it is used
        _set(model, name, module.requires_grad_(not planned.state.config.inference_mode))
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
    for name, tokens in planned.state.tokens.items():
        trainable_tokens.install(model, name, tokens.requires_grad_(not planned.state.config.inference_mode))
    planned.state.layers = tuple(planned.layers)
    setattr(model, STATE, planned.state)
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


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def put(model: nn.Module, new: dict[int, nn.Module]) -> None:
    """Put new[id(old)] wherever old is registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]


def install(model: nn.Module, new: dict[str, PeftLayer | PeftParameter]) -> None:
    """Put adapted layers in the places of the modules of their names, and adapted parameters beside theirs."""
    modules = {name: layer for name, layer in new.items() if isinstance(layer, PeftLayer)}
    put(model, {id(model.get_submodule(name)): layer for name, layer in modules.items()})
    for name, layer in new.items():
        if name not in modules:
            layer.freeze_base()
            layer.install()


def unload(model: nn.Module, found: Iterable[nn.Module], merge: bool = True) -> set[int]:
    """Turn adapted layers back into what they were, merged or not; the ids of the plain modules now in their places."""
    plain = {id(layer): layer.unload(merge=merge) for layer in found}
    plain = {key: module for key, module in plain.items() if module is not None}
    put(model, plain)
    return {id(module) for module in plain.values()}


def merge(model: nn.Module, safe_merge: bool = False) -> None:
    """Fold every adapter into its weight. All layers are checked first: on any error the model is as it was.

    Raises RuntimeError when already merged, NotMergeableError when a method has no equivalent weight, ValueError with
    safe_merge when a merged weight is not finite.
    """
    found = adapted_layers(model, "merge")
    refuse_while_disabled(model, "merge")
    reshard(model)
    for name, layer in found:
        if layer.merged:
            raise RuntimeError(f"{name} is already merged; call unmerge before merging again")
    _merge(model, found, safe_merge)


def _merge(model: nn.Module, found: list[tuple[str, Holder]], safe_merge: bool) -> None:
    """Merge these layers, all or none; NotMergeableError where another module holds the same weight."""
    checks.warn_vanished(model)
    refuse_shared(model, found)
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


def refuse_shared(model: nn.Module, found: list[tuple[str, Holder]]) -> None:
    """NotMergeableError where another module holds the weight or bias of one of these layers."""
    holders = Holders(unwrap(model))
    for name, layer in found:
        if (tied := holders.others(layer.bias, holder_of(layer, name))) and layer.changes_bias():
            raise NotMergeableError(
                f"{name}.bias is shared with {', '.join(tied)}, which merging would change too; give {name} a bias of "
                "its own, torch.nn.Parameter(layer.bias.detach().clone())"
            )
        if tied := holders.others(getattr(layer, "weight", None), holder_of(layer, name)):
            setting = "model.config.tie_word_embeddings = False, and " if hasattr(model, "config") else ""
            raise NotMergeableError(
                f"{name}.weight is shared with {', '.join(tied)}, which merging would change too; untie them first: "
                f"{setting}give {name} a weight of its own, torch.nn.Parameter(layer.weight.detach().clone())"
            )


def unmerge(model: nn.Module) -> None:
    """Restore every base weight bit for bit. Raises RuntimeError when a layer is not merged."""
    found = adapted_layers(model, "unmerge")
    refuse_while_disabled(model, "unmerge")
    reshard(model)
    for name, layer in found:
        if not layer.merged:
            raise RuntimeError(f"{name} is not merged; there is nothing to unmerge")
    for _, layer in found:
        layer.unmerge()


def adapted_layers(model: nn.Module, what: str | None = None) -> list[tuple[str, Holder]]:
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


def merge_and_unload(model: nn.Module, safe_merge: bool = False, dequantize: bool = False) -> nn.Module:
    """Merge, then turn every layer back into its original class, with trained rows in their tables; returns the plain
    model. Raises as ``merge`` does.

    dequantize: layers that are stored in parts (4 or 8 bits), where ``merge`` is refused, become frozen nn.Linear of
    the decoded weight plus the update, computed in fp32, in the dtype that the layer computes in (``compute_dtype`` of
    a 4-bit layer; else that of the model's other frozen parameters). So do quantised layers without an adapter: the
    model holds W in full afterwards, and what marks a Transformers model as quantised is removed. Give the whole model.
    NotMergeableError, with nothing changed, where something in it cannot be decoded. Of a dense model it changes
    nothing.
    """
    model = unwrap(model)
    found = adapted_layers(model, "merge_and_unload")
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
    if safe_merge:
        for root in roots(model):
            trainable_tokens.refuse_infinite(root.__dict__[STATE].tokens)
    decoded = plain_layers(model, safe_merge) if dequantize else {}
    dense = [(name, layer) for name, layer in found if id(layer) not in decoded]
    _merge(model, [(name, layer) for name, layer in dense if not layer.merged], safe_merge)
    biased = [name for name, layer in dense if layer.has_new_bias()]
    biased += [n for n, m in found if id(m) in decoded and m.bias is None and decoded[id(m)].bias is not None]
    if biased and hasattr(model, "save_pretrained"):
        warnings.warn(
            f"{biased[0]} (of {len(biased)} such layers) has a bias now that the architecture lacks: from_pretrained "
            "would leave it out of a checkpoint of this model; save the adapter instead, or the model by torch.save",
            stacklevel=2,
        )
    plain = unload(model, (layer for _, layer in dense))
    if decoded:
        put(model, decoded)
        plain |= {id(module) for module in decoded.values()}
    for root in roots(model):
        state = root.__dict__[STATE]
        for name in state.saved:
            narrow(root.get_submodule(name))
        for name in state.tokens:
            trainable_tokens.remove(root, name)
        for name in state.biases:
            narrow(_reader(root, name)[0])
            owner = root.get_submodule(name.rpartition(".")[0])
            if id(owner) in plain:
                owner.bias.data = owner.bias.data.to(owner.weight.dtype)
        delattr(root, STATE)
    model_saving.restore(model)
    if decoded:
        unmark(model)
        _warn_of_dtypes(model, decoded.values())
    return model


def _warn_of_dtypes(model: nn.Module, decoded: Iterable[nn.Linear]) -> None:
    """A plain layer takes x in its own dtype alone, where a quantised one casts it."""
    own = sorted({str(layer.weight.dtype) for layer in decoded})
    everywhere = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()})
    if len(everywhere) > 1:
        warnings.warn(
            f"the dequantised layers are in {', '.join(own)}, and the model's parameters in {', '.join(everywhere)}; "
            f"where x comes in another dtype than a layer's, call model.to({own[0]})",
            stacklevel=3,
        )


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes what the base model did: adapters and trained rows off, merged or not;
    heads of modules_to_save and biases trained in place back at their base values.

    Where there are any of those, ``state_dict``, ``load_state_dict`` and pickling raise RuntimeError meanwhile."""
    model = unwrap(model)
    parts = roots(model)
    if parts and STATE not in model.__dict__:  # adapted in part
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(disable_adapter(part))
            yield model
        return
    state = getattr(model, STATE, None) or AdapterState(config=None)
    soft = prompt.attached(model)
    found = [("soft_prompt", soft)] if soft is not None else adapted_layers(model, "disable_adapter")
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
        for switched in (*(layer for _, layer in found), *state.tokens.values()):
            switched.enabled = False
        for name, module in trained.items():
            if name in parted:
                continue
            like = next(module.parameters(), None)
            original = state.saved[name]
            _set(model, name, original if like is None else original.to(like.device))
            original.train(module.training)
        for p, base in exchanged:
            set_data(p, base.detach().to(p.device, p.dtype))
        yield model
    finally:
        state.disabled -= 1
        for (_, layer), enabled in zip(found, before, strict=True):
            layer.enabled = enabled
        for tokens in state.tokens.values():
            tokens.enabled = state.disabled == 0
        for name, module in trained.items():
            if name not in parted:
                _set(model, name, module)
        for (p, _), value in zip(exchanged, values, strict=True):
            set_data(p, value)


def _bias_in_use(model: nn.Module, name: str) -> Tensor:
    """The tensor that a disabled layer reads as its bias: merged layers read the one kept beside the merged."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner._base_bias if isinstance(owner, PeftLayer) and owner.merged else owner.bias


def print_trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Print and return (trainable, all) parameter counts, in PEFT's words, with the originals of modules_to_save."""
    trainable = sum(numel(p) for p in model.parameters() if p.requires_grad)
    model = unwrap(model)
    kept = getattr(model, STATE).saved.values() if hasattr(model, STATE) else ()
    total = sum(numel(p) for p in {*model.parameters(), *(p for m in kept for p in m.parameters())})
    percent = 100 * trainable / max(total, 1)
    checks.warn_vanished(model)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}")
    return trainable, total
