"""What training would not say: adapted layers that have vanished, parameters that no gradient or no optimizer reaches,
dropout that is off, schedules that nobody drives.

``check_training`` is called once, by a training loop or by FusedPeftCallback. A loop that calls nothing is watched: a
hook before each optimizer step judges a model at its first steps, says what it found, and is gone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .adapted import STATE, active_layers, few, is_adapted, is_pefts, layers, plain_name, roots, unwrap
from .holder import Holder
from .layer import PeftLinear
from .parts import lost_by_saving

_Named = list[tuple[str, nn.Parameter]]

_plain = partial(plain_name, parallel=True)
_PATIENCE = 4  # steps of one optimizer without a gradient to judge by, after which a model is no longer watched


# Adapted layers that have vanished


def vanished(model: nn.Module) -> list[str]:
    """The names of adapted layers and modules_to_save that are no longer in the model, as code that rebuilds linear
    layers or ties weights leaves them.

    Wrappers put in since do not count: nothing has vanished while there are as many adapted layers as there were.
    """
    return [name for root in roots(model) for name in _vanished(root)]


def _vanished(root: nn.Module) -> list[str]:
    names, beside = root.__dict__[STATE].layers, _lost_beside(root)
    if sum(isinstance(m, Holder) for m in root.modules()) >= len(names):
        return [*beside]
    here = {_plain(name) for name, _ in layers(root)}
    return [*(name for name in names if _plain(name) not in here), *beside]


def _lost_beside(root: nn.Module) -> dict[str, str]:
    """{name of what trained beside the layers and does not any more: what is there now}"""
    return _lost_heads(root) | _lost_rows(root)


def _lost_heads(root: nn.Module) -> dict[str, str]:
    """{name of a module of modules_to_save that does not train any more: what is there now}: it is gone, or a frozen
    parameter of another module is in place of its own, as tie_weights puts it."""
    state = root.__dict__[STATE]
    if not state.saved or state.disabled:
        return {}
    here = {_plain(name): m for name, m in root.named_modules(remove_duplicate=False)}
    found = {name: "now gone" for name in state.saved if _plain(name) not in here}
    heads = {name: here[_plain(name)] for name in state.saved if name not in found}
    frozen = {id(p): name for name, head in heads.items() for p in head.parameters() if not p.requires_grad}
    inside = {id(m) for head in heads.values() for m in head.modules()}
    for name, m in root.named_modules() if frozen else ():
        for key, p in m._parameters.items() if id(m) not in inside else ():
            if id(p) in frozen:
                found[frozen[id(p)]] = f"now tied to {_plain(name)}.{key}"
    return found


def _lost_rows(root: nn.Module) -> dict[str, str]:
    """{embedding whose trained rows are not called any more: what is there now}"""
    here, modules = {id(m) for m in root.modules()}, {_plain(n): m for n, m in root.named_modules()}
    lost = [name for name, tokens in root.__dict__[STATE].tokens.items() if id(tokens) not in here]
    return {n: f"now another {type(modules[n]).__name__}" if n in modules else "now gone" for n in lost}


def _about_vanished(root: nn.Module, gone: list[str]) -> str:
    state, beside = root.__dict__[STATE], _lost_beside(root)
    now = {_plain(name): f"now a {type(m).__name__}" for name, m in root.named_modules()} | beside
    named = few(f"{name} ({now[_plain(name)]})" if _plain(name) in now else name for name in gone)
    what = "adapted layers and what trains beside them" if beside else "adapted layers"
    total = len(state.layers) + (len(state.saved) + len(state.tokens) if beside else 0)
    return (
        f"{len(gone)} of {total} {what} have vanished since get_peft_model: {named}. Code that rebuilds linear layers "
        "(resize_token_embeddings, a float8 conversion) or ties weights (tie_weights) drops what they train; run it "
        "before get_peft_model, then build the optimizer"
    )


def warn_vanished(model: nn.Module, again: bool = True, stacklevel: int = 3) -> None:
    """A warning for the adapted layers that have vanished; ``again=False`` tells of each set of names once."""
    for root in roots(model):
        gone, state = _vanished(root), root.__dict__[STATE]
        if gone and (again or state.told != tuple(gone)):
            state.told = tuple(gone)
            warnings.warn(_about_vanished(root, gone), stacklevel=stacklevel)


def refuse_vanished(model: nn.Module, what: str) -> None:
    """RuntimeError where adapted layers have vanished, so that ``what`` would act on a part of the adapter."""
    for root in roots(model):
        if gone := _vanished(root):
            raise RuntimeError(f"{what} would miss a part of the adapter: {_about_vanished(root, gone)}")


# What a backward pass and an optimizer show


def check_training(model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] | None = None) -> list[str]:
    """Whether what was asked for trains. Call it once, after the first backward and before ``zero_grad``.

    Returns what it found, one sentence each, and gives one warning that lists them; an empty list is a clean bill.
    Found are trainable adapter parameters without a gradient, adapted layers that have vanished, dropout that the
    config asks for in layers that are in eval mode, a model without a trainable parameter, and a Hugging Face model
    whose own save_pretrained would lose the adapter, which is on a part of it. With the optimizer,
    or a list of them, also trainable parameters that none holds: frozen ones held instead show that it was built before
    the model was adapted. (Frozen parameters held beside all trainable ones do no harm, and are not reported.)

    Values are not read, so a GPU need not be waited for. Biases trained in place (``bias="all"``) may go without a
    gradient. Gradients that DeepSpeed or Megatron keep in buffers of their own are not looked for.

    Args:
        model: adapted by this library or by Hugging Face PEFT, wrapped or not.
        optimizer: anything with ``param_groups``, or several in a list.

    Raises TypeError for another model or optimizer, ValueError when the model has no adapter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} must be a torch.nn.Module")
    model, optimizers = unwrap(model), _listed(optimizer)
    if not has_adapter(model):
        raise ValueError(
            f"model={type(model).__name__} has no adapter to check; call get_peft_model or load_adapter first"
        )
    trainable = _trainable(model)
    found = _of_vanished(model) + _of_dropout(model)
    if why := lost_by_saving(model):
        found.append(f"save_pretrained {why}")
    if not trainable:
        found.append(
            "no parameter of the model is trainable. An adapter made for inference trains with is_trainable=True in "
            "load_adapter, or inference_mode=False in its config"
        )
    found += _of_gradients(model, trainable)
    if optimizers:
        found += _of_optimizers(model, trainable, optimizers)
    for known in (_watched[m] for m in model.modules() if m in _watched):  # which would say the same
        known.judged_gradients = True
        known.judged_optimizer |= bool(optimizers)
    _warn(found, stacklevel=3)
    return found


def has_adapter(model: nn.Module) -> bool:
    """Whether there is anything to check: an adapter of this library, or of Hugging Face PEFT."""
    return bool(roots(model)) or is_adapted(model) or is_pefts(model)


def _listed(optimizer) -> list:
    if optimizer is None:
        return []
    several = [optimizer] if hasattr(optimizer, "param_groups") or not isinstance(optimizer, Iterable) else [*optimizer]
    for one in several:
        if not hasattr(one, "param_groups"):
            raise TypeError(f"optimizer={one!r} has no param_groups; give a torch.optim.Optimizer, or a list of them")
    return several


def _held(optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _warn(found: list[str], stacklevel: int) -> None:
    if found:
        warnings.warn("Training would not do what was asked for:\n- " + "\n- ".join(found), stacklevel=stacklevel)


def _trainable(model: nn.Module) -> _Named:
    return [(_plain(name), p) for name, p in model.named_parameters() if p.requires_grad]


def _elsewhere(p: nn.Parameter) -> bool:
    """Whether a training engine keeps this parameter's gradient in a buffer of its own: ZeRO's stages, Megatron."""
    return any(hasattr(p, name) for name in ("ds_id", "_hp_mapping", "main_grad"))


def _training_layers(model: nn.Module) -> list[tuple[str, PeftLinear]]:
    """The adapted layers whose adapter trains."""
    return [(name, m) for name, m in active_layers(model) if any(t.requires_grad for t in m.adapter_tensors())]


def _of_vanished(model: nn.Module) -> list[str]:
    return [_about_vanished(root, gone) for root in roots(model) if (gone := _vanished(root))]


def _of_dropout(model: nn.Module) -> list[str]:
    """Layers that train and are in eval mode, where the config asks for dropout."""
    dropping = [(_plain(name), layer) for name, layer in _training_layers(model) if layer.config.dropout]
    still = [name for name, layer in dropping if not layer.training]
    if not still:
        return []
    return [
        f"the config's dropout of {dropping[0][1].config.dropout} is off in {len(still)} of {len(dropping)} adapted "
        f"layers, which are in eval mode: {few(still)}. Call model.train() before training"
    ]


def _of_gradients(model: nn.Module, trainable: _Named) -> list[str]:
    """The adapter parameters among these without a gradient."""
    in_place = _biases_in_place(model)
    expected = [(name, p) for name, p in trainable if p.numel() and id(p) not in in_place and not _elsewhere(p)]
    without = [name for name, p in expected if p.grad is None]
    if not without:
        return []
    if not any(p.grad is not None for _, p in trainable):
        return [
            f"none of the {len(expected)} trainable parameters has a gradient: {few(without)}. Check after backward "
            "and before zero_grad; if that was so, no adapted layer takes part in the loss"
        ]
    return [
        f"{len(without)} of {len(expected)} trainable parameters have no gradient after backward: {few(without)}. "
        "Their layers are not called, or their weight is read without a call, so these do not train; adapt other "
        "modules. (A layer called for some inputs only, such as an expert, may be named wrongly)"
    ]


def _biases_in_place(model: nn.Module) -> set[int]:
    """The base model's own biases that train (``bias="all"``): they lie in unused layers too."""
    found = set()
    for root in roots(model):
        names = {_plain(name) for name in root.__dict__[STATE].biases}
        found |= {id(p) for name, p in root.named_parameters() if _plain(name) in names} if names else set()
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict) and any(getattr(c, "bias", "none") != "none" for c in configs.values()):
        found |= {id(p) for name, p in model.named_parameters() if name.endswith(".bias")}
    return found


def _of_optimizers(model: nn.Module, trainable: _Named, optimizers: list) -> list[str]:
    """The trainable parameters that no optimizer holds."""
    held = set().union(*map(_held, optimizers))
    missing = [name for name, p in trainable if id(p) not in held]
    if not missing or any(_elsewhere(p) for _, p in trainable):
        return []
    frozen = [_plain(name) for name, p in model.named_parameters() if not p.requires_grad and id(p) in held]
    return [_about_missing(missing, len(trainable), frozen)]


def _about_missing(missing: list[str], trainable: int, frozen: list[str]) -> str:
    fix = "torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])"
    text = f"the optimizer does not hold {len(missing)} of {trainable} trainable parameters: {few(missing)}. "
    if not frozen:
        return text + f"They stay as they are; give them to it: {fix}"
    return text + (
        f"It holds {len(frozen)} frozen ones instead ({few(frozen, 2)}), so it was built before the model was "
        f"adapted; build it after get_peft_model: {fix}"
    )


# A loop that calls nothing


@dataclass
class _Watch:
    """What is known of a model whose first optimizer steps are awaited."""

    steps: WeakKeyDictionary = field(default_factory=WeakKeyDictionary)  # optimizer -> how often it has stepped
    strangers: WeakSet = field(default_factory=WeakSet)  # optimizers that hold nothing of the model
    judged: WeakSet = field(default_factory=WeakSet)  # optimizers whose parameters' gradients were looked at
    judged_gradients: bool = False  # all of them, by check_training
    judged_optimizer: bool = False  # one is known to hold what trains, or check_training has said that it does not
    driven: bool = False  # on_step was called


_watched: WeakKeyDictionary[nn.Module, _Watch] = WeakKeyDictionary()
_hook = None  # torch's handle of _before_step, while a model is watched


def watch(model: nn.Module) -> None:
    """Judge the model at its first optimizer steps. It is held weakly, and copies of it are not watched."""
    global _hook
    _watched[model] = _Watch()
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before_step)


def driven(acting: list[PeftLinear]) -> None:
    """``on_step`` was called on these layers, whose methods have a schedule."""
    ids = {id(layer) for layer in acting} if _watched else ()
    for model, known in _watched.items() if ids else ():
        known.driven = known.driven or any(id(layer) in ids for _, layer in active_layers(model))


def _before_step(optimizer: Optimizer, args, kwargs) -> None:
    if torch.compiler.is_compiling():  # a compiled step: nothing of this shall be in its graph
        return
    closure = bool(args[1:]) or kwargs.get("closure") is not None
    for model, known in [*_watched.items()]:
        try:
            found, done = _judge(model, known, optimizer, closure)
        except Exception:  # a model that cannot be judged trains all the same
            found, done = [], True
        if done:
            _watched.pop(model, None)
        _warn(found, stacklevel=4)
    if not _watched:
        optimizer.register_step_post_hook(_stop)  # torch is walking over the hooks that are called before a step


def _stop(*_) -> None:
    global _hook
    if _hook is not None and not _watched:
        _hook.remove()
        _hook = None


def _judge(model: nn.Module, known: _Watch, optimizer: Optimizer, closure: bool) -> tuple[list[str], bool]:
    """(what to warn of before this step, whether the model need not be watched any longer)"""
    if optimizer in known.strangers:
        return [], False
    held, trainable = _held(optimizer), _trainable(model)
    frozen = [(_plain(name), p) for name, p in model.named_parameters() if not p.requires_grad]
    mine, stuck = ([(name, p) for name, p in some if id(p) in held] for some in (trainable, frozen))
    if not mine and not stuck:
        known.strangers.add(optimizer)
        return [], False
    if not trainable:
        return _of_vanished(model), True
    step = known.steps[optimizer] = known.steps.get(optimizer, 0) + 1
    if mine:
        known.judged_optimizer = True
        return _judge_step(model, known, optimizer, trainable, mine, step, closure)
    # one that holds a part of the frozen ones may have a fellow that holds what trains, and steps after it
    if known.judged_optimizer or (step == 1 and len(stuck) < len(frozen)):
        return [], False
    return [_about_missing([name for name, _ in trainable], len(trainable), [name for name, _ in stuck])], True


def _judge_step(
    model: nn.Module, known: _Watch, optimizer: Optimizer, trainable: _Named, mine: _Named, step: int, closure: bool
) -> tuple[list[str], bool]:
    """``_judge`` for an optimizer that holds ``mine`` of the trainable parameters: it answers for those alone."""
    found = []
    shows = any(p.grad is not None for _, p in (mine if closure else trainable))  # a closure makes them in the step
    if shows and not known.judged_gradients and optimizer not in known.judged:
        found = [] if known.judged else _of_vanished(model) + _of_dropout(model)
        found += _of_gradients(model, mine)
        known.judged.add(optimizer)
    waiting = [] if known.driven else _schedules(model)
    if waiting and step > 1:
        return [*found, _about_schedules(waiting)], True
    judged = known.judged_gradients or len(known.judged) > 0
    alone = len(mine) == len(trainable)
    return found, (judged and alone and not waiting) or (step > 1 and (judged or step == _PATIENCE))


def _schedules(model: nn.Module) -> list[str]:
    """The methods that train in the model and act between steps."""
    return sorted({layer.method.name for _, layer in _training_layers(model) if layer.method.on_step is not None})


def _about_schedules(methods: list[str]) -> str:
    return (
        f"{', '.join(methods)} acts between steps, but fused_peft.on_step was not called since the optimizer's first "
        "step: call fused_peft.on_step(model, step) after every optimizer.step() and before zero_grad (Trainer: "
        "callbacks=[FusedPeftCallback()])"
    )
