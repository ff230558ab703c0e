"""What training would not say: each finding of check_training and of the watch, and each loop that must stay quiet."""

import copy
import gc
import pickle
import re
import warnings
from dataclasses import fields, replace

import pytest
import torch
from cases import CASES
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.optim import optimizer as torch_optimizer

import fused_peft as fp
from fused_peft.methods import METHODS
from fused_peft.model import checks

TARGETS = ["fc1", "fc2"]
ALL = ["fc1", "fc2", "proj"]
pytestmark = pytest.mark.filterwarnings("ignore:Net.forward uses proj.weight")
SCHEDULED = {name for name, method in METHODS.items() if method.on_step is not None}
CONFIGS = sorted({m.config for m in METHODS.values()}, key=lambda c: c.__name__)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(7, 10), nn.LayerNorm(10), nn.Linear(10, 7)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.norm(self.fc1(x))))


class Net(nn.Module):
    """Two blocks and a head; ``proj`` is never called, its weight is read."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.proj, self.head = nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x @ self.proj.weight.T)


def adapted(config=None, targets=TARGETS, **kwargs):
    config = config or fp.LoraConfig(r=2)
    return fp.get_peft_model(Net(), replace(config, target_modules=targets, **kwargs)).train()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def loss(model):
    return model(torch.randn(4, 7)).square().mean()


def train(model, *optimizers, steps=3, after=lambda step: None):
    for step in range(steps):
        loss(model).backward()
        for optimizer in optimizers:
            optimizer.step()
        after(step)
        for optimizer in optimizers:
            optimizer.zero_grad()


def heard(act, *args, **kwargs):
    """The texts of the warnings that this library gave meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act(*args, **kwargs)
    return [str(w.message) for w in caught if re.search("adapted|Training would", str(w.message))]


@pytest.fixture(autouse=True)
def _nobody_watched():
    """Models of other tests that wait for a garbage collection do not count here."""
    checks._watched.clear()
    checks._stop()
    yield
    checks._watched.clear()
    checks._stop()


def hooks():
    return len(torch_optimizer._global_optimizer_pre_hooks)


# --- vanished layers -------------------------------------------------------------------------------------------------


def rebuild_linear_layers(module):
    """What a float8 conversion does: a new layer for every nn.Linear."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, nn.Linear(child.in_features, child.out_features))
        rebuild_linear_layers(child)


def one_rebuilt():
    model = adapted()
    model.blocks[1].fc1 = nn.Linear(7, 10)
    return model


def test_vanished_layers_are_known_by_name():
    model = adapted()
    assert checks.vanished(model) == []
    rebuild_linear_layers(model)
    assert checks.vanished(model) == ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]
    assert checks.vanished(one_rebuilt()) == ["blocks.1.fc1"]
    cut = adapted()
    cut.blocks = cut.blocks[:1]
    assert checks.vanished(cut) == ["blocks.1.fc1", "blocks.1.fc2"]
    assert checks.vanished(Net()) == []


@pytest.mark.parametrize("kept", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_knows_its_layers_too(kept):
    assert checks.vanished(kept(adapted())) == []
    assert checks.vanished(kept(one_rebuilt())) == ["blocks.1.fc1"]


def checkpointing(model):
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, (Block, nn.Linear)))


def compiled_blocks(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")


def parallel_blocks(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = nn.DataParallel(block)


@pytest.mark.parametrize("wrap", [checkpointing, compiled_blocks, parallel_blocks])
def test_wrappers_put_in_later_do_not_count(wrap):
    model = adapted(bias="all")
    wrap(model)
    assert checks.vanished(model) == []
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    assert heard(train, model, optimizer, after=lambda step: fp.on_step(model, step)) == []
    wrapped = model.get_submodule(next(n for n, m in model.named_modules() if n.endswith("1.module.fc1")) if wrap is
                                  parallel_blocks else next(n for n, _ in checks.layers(model)))  # fmt: skip
    assert isinstance(wrapped, fp.PeftLinear)
    for name, parent in model.named_modules():  # and what vanishes behind one is found by its old name
        if checks._plain(name) == "blocks.1" and isinstance(parent, Block):
            parent.fc1 = nn.Linear(7, 10)
    assert checks.vanished(model) == ["blocks.1.fc1"]


class Around(nn.Module):
    """A user's module that holds the adapted model as a part."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def test_a_wrapper_that_nobody_has_heard_of_does_not_count_either():
    model = adapted()
    model.blocks[0] = Around(model.blocks[0])
    assert checks.vanished(model) == []


@pytest.mark.parametrize("wrap", [nn.DataParallel, Around, lambda m: torch.compile(m, backend="eager")])
def test_an_adapted_model_is_found_inside_another(wrap):
    assert checks.vanished(wrap(one_rebuilt())) == ["blocks.1.fc1"]
    assert checks.vanished(wrap(adapted())) == []


class Tied(nn.Module):
    """A head tied to the embedding, as Transformers ties it, and a module under two names."""

    def __init__(self):
        super().__init__()
        self.embed, self.q, self.norm = nn.Embedding(6, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.head, self.again = nn.Linear(4, 6, bias=False), nn.ModuleDict({"norm": self.norm})
        self.tie_weights()

    def tie_weights(self):
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.q(self.again["norm"](self.embed(ids)))))


def tied(*names):
    config = fp.LoraConfig(r=2, target_modules=["q"], modules_to_save=[*names], init_lora_weights=False)
    return fp.get_peft_model(Tied(), config)


def remove(model):
    del model.head
    model.head = None


@pytest.mark.parametrize(
    ("how", "now"), [(Tied.tie_weights, "tied to embed.weight"), (remove, "gone")], ids=["tied", "removed"]
)
def test_modules_to_save_that_no_longer_train_are_named(how, now, tmp_path):
    model = tied("head", "norm")
    ids = torch.arange(6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        model(ids).square().sum().backward()
        optimizer.step()
    assert checks.vanished(model) == []
    how(model)
    assert checks.vanished(model) == ["head"]
    with pytest.raises(RuntimeError, match=rf"1 of 4 adapted layers and what trains beside them .* head \(now {now}\)"):
        fp.save_pretrained(model, tmp_path)
    with pytest.warns(UserWarning, match="tie_weights"):
        assert fp.check_training(model)


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), checkpoint_wrapper])
def test_modules_to_save_in_wrappers_frozen_by_hand_or_off_have_not_vanished(wrap, tmp_path):
    model = tied("head")
    model.head = wrap(model.head)
    assert checks.vanished(model) == []
    model.requires_grad_(False)
    assert checks.vanished(model) == []
    with fp.disable_adapter(model):
        assert checks.vanished(model) == []
    fp.save_pretrained(model, tmp_path)
    assert checks.vanished(fp.load_adapter(Tied(), tmp_path, is_trainable=False)) == []


def test_a_module_under_two_names_trains_under_both():
    plain, model = Tied(), tied("norm")
    assert model.again["norm"] is not model.norm  # a copy a name, as in PEFT
    assert model.norm.weight.requires_grad
    assert model.again["norm"].weight.requires_grad
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        model.norm.weight.add_(1)
    with fp.disable_adapter(model):
        assert torch.equal(model(torch.arange(6)), plain(torch.arange(6)))
    assert (model.norm.weight > 1.5).all()


def test_on_step_names_a_set_of_vanished_layers_once():
    model = one_rebuilt()
    (text,) = heard(fp.on_step, model, 0)
    assert "1 of 4 adapted layers have vanished" in text
    assert "blocks.1.fc1 (now a Linear)" in text
    assert heard(fp.on_step, model, 1) == []
    model.blocks[0].fc2 = nn.Linear(10, 7)
    assert "2 of 4" in heard(fp.on_step, model, 2)[0]
    assert heard(fp.on_step, model, 3) == heard(fp.on_step, adapted(), 0) == []


def test_print_trainable_parameters_names_vanished_layers_each_time(capsys):
    model = one_rebuilt()
    assert all("blocks.1.fc1" in heard(fp.print_trainable_parameters, model)[0] for _ in range(2))
    assert heard(fp.print_trainable_parameters, adapted()) == []


def test_refuse_vanished():
    checks.refuse_vanished(adapted(), "save_pretrained")
    with pytest.raises(RuntimeError, match=r"save_pretrained would miss .*blocks\.1\.fc1"):
        checks.refuse_vanished(one_rebuilt(), "save_pretrained")


def test_a_merged_and_unloaded_model_has_lost_nothing():
    model = fp.merge_and_unload(adapted())
    assert checks.vanished(model) == []
    fp.get_peft_model(model, fp.LoraConfig(r=2, target_modules=["fc1"]))
    assert checks.vanished(model) == []


# --- check_training --------------------------------------------------------------------------------------------------


def checked(model, optimizer=None):
    """check_training's findings, which it must also have warned of, once."""
    found = []
    texts = heard(lambda: found.extend(fp.check_training(model, optimizer)))
    assert len(texts) == bool(found)
    assert all(line in texts[0] for line in found)
    return found


def after_backward(model):
    loss(model).backward()
    return model


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_method_trains_and_nothing_is_found(case):
    model = after_backward(adapted(case.make(2), modules_to_save=["head"]))
    assert checked(model, torch.optim.SGD(trainable(model), lr=0.1)) == []


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, Around, lambda m: torch.compile(m, backend="eager")])
def test_adapters_without_a_gradient(wrap):
    (found,) = checked(wrap(after_backward(adapted(targets=ALL))))
    assert "2 of 10 trainable parameters have no gradient" in found
    assert "proj.lora_A" in found
    assert "named wrongly" in found


def test_names_are_capped():
    model = adapted()
    (found,) = checked(model)
    assert "none of the 8 trainable parameters has a gradient" in found
    assert "and 4 more" in found


def test_biases_trained_in_place_may_go_without_a_gradient():
    model = after_backward(adapted(bias="all"))  # proj's bias is never read
    assert model.proj.bias.requires_grad
    assert model.proj.bias.grad is None
    assert checked(model) == []


@pytest.mark.parametrize("attribute", ["ds_id", "_hp_mapping", "main_grad"])
def test_gradients_in_an_engine_s_own_buffers_are_not_looked_for(attribute):
    model = adapted()
    for p in trainable(model):
        setattr(p, attribute, None)
    assert checked(model, torch.optim.SGD([torch.zeros(1)], lr=0.1)) == []


def test_an_optimizer_built_before_adapting():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    fp.get_peft_model(model, fp.LoraConfig(r=2, target_modules=TARGETS)).train()
    (found,) = checked(after_backward(model), optimizer)
    assert "does not hold 8 of 8 trainable parameters" in found
    assert "16 frozen ones instead" in found
    assert "built before the model was adapted" in found


def test_an_optimizer_that_lacks_a_part():
    model = after_backward(adapted())
    first, last = trainable(model)[:1], trainable(model)[1:]
    (found,) = checked(model, torch.optim.SGD(last, lr=0.1))
    assert "does not hold 1 of 8" in found
    assert "blocks.0.fc1.lora_A" in found
    assert "built before" not in found
    assert checked(model, [torch.optim.SGD(last, lr=0.1), torch.optim.SGD(first, lr=0.1)]) == []
    assert checked(model, torch.optim.SGD(model.parameters(), lr=0.1)) == []  # the frozen ones besides do no harm


def test_dropout_that_is_off():
    model = adapted(lora_dropout=0.1).eval()
    (found,) = checked(after_backward(model))
    assert "dropout of 0.1 is off in 4 of 4" in found
    assert checked(model.train()) == []
    assert checked(after_backward(adapted()).eval()) == []  # no dropout was asked for


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_dropout_is_read_from_every_config(config):
    """By the end of the field's name; a field with another name would pass unseen."""
    names = [f.name for f in fields(config) if "drop" in f.name]
    assert len(names) <= 1
    assert all(name.endswith("_dropout") for name in names)
    method = next(m for m in METHODS.values() if m.config is config)
    example = method.example(2)
    assert example.dropout == 0
    for name in names:
        try:
            asked = replace(example, **{name: 0.25})
        except ValueError as e:
            assert "has no meaning" in str(e)  # noqa: PT017
            continue
        assert asked.dropout == 0.25
        model = after_backward(adapted(asked).eval())
        assert "dropout of 0.25 is off" in checked(model)[0]
        layer = model.blocks[0].fc1
        if method.factors is not None:
            assert method.factors(layer).p == 0.25


def test_a_model_without_a_trainable_parameter(tmp_path):
    fp.save_pretrained(adapted(), tmp_path)
    (found,) = checked(fp.load_adapter(Net(), tmp_path, is_trainable=False))
    assert "no parameter of the model is trainable" in found
    rebuilt = adapted()
    rebuild_linear_layers(rebuilt)
    rebuilt.requires_grad_(False)
    assert [re.search("vanished|trainable", text)[0] for text in checked(rebuilt)] == ["vanished", "trainable"]


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(TypeError, match=r"model=3"):
        fp.check_training(3)
    with pytest.raises(ValueError, match=r"model=Net has no adapter"):
        fp.check_training(Net())
    with pytest.raises(TypeError, match=r"optimizer=3 has no param_groups"):
        fp.check_training(adapted(), 3)
    with pytest.raises(TypeError, match=r"has no param_groups"):
        fp.check_training(adapted(), trainable(adapted()))


# --- a loop that calls nothing ---------------------------------------------------------------------------------------


def adamw(model):
    return torch.optim.AdamW(trainable(model), lr=1e-2)


def test_the_hook_is_gone_after_the_first_step():
    before, model = hooks(), adapted()
    assert hooks() == before + 1
    optimizer = adamw(model)
    assert heard(train, model, optimizer, steps=1) == []
    assert hooks() == before
    assert heard(train, model, optimizer) == []
    assert hooks() == before
    adapted()
    assert hooks() == before + 1


def test_a_watched_model_can_be_freed():
    before = hooks()
    adapted()
    gc.collect()
    assert len(checks._watched) == 0
    torch.optim.SGD([torch.zeros(1)], lr=0.1).step()
    assert hooks() == before


def test_a_model_for_inference_is_not_watched(tmp_path):
    fp.save_pretrained(adapted(), tmp_path)
    model = fp.load_adapter(Net(), tmp_path, is_trainable=False)
    assert model not in checks._watched
    assert fp.load_adapter(model := Net(), tmp_path) in checks._watched


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_loop_whose_optimizer_was_built_before_adapting(filtered, steps):
    model = Net()
    model.head.requires_grad_(False)
    optimizer = torch.optim.AdamW(trainable(model) if filtered else model.parameters())
    fp.get_peft_model(model, fp.LoraConfig(r=2, target_modules=TARGETS)).train()
    texts = heard(train, model, optimizer, steps=steps)
    if filtered and steps == 1:  # it might have a fellow
        assert texts == []
        return
    (text,) = texts
    assert "built before the model was adapted" in text
    assert hooks() == 0


def test_a_loop_with_adapters_that_get_no_gradient():
    model = adapted(targets=ALL)
    (text,) = heard(train, model, adamw(model))
    assert "2 of 10 trainable parameters have no gradient" in text
    assert "proj.lora_A" in text


def test_a_loop_in_eval_mode():
    model = adapted(lora_dropout=0.1).eval()
    (text,) = heard(train, model, adamw(model))
    assert "is off in 4 of 4" in text


def test_a_loop_after_layers_have_vanished():
    model = one_rebuilt()
    (text,) = heard(train, model, adamw(model))
    assert "blocks.1.fc1 (now a Linear)" in text


def test_a_step_of_a_model_in_which_nothing_trains():
    model = adapted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.requires_grad_(False)  # by hand, which is nothing to warn of
    assert heard(optimizer.step) == []
    model = adapted()
    rebuild_linear_layers(model)
    model.requires_grad_(False)
    assert "4 of 4 adapted layers have vanished" in heard(torch.optim.SGD(model.parameters(), lr=0.1).step)[0]
    assert hooks() == 0


@pytest.mark.parametrize("order", [1, -1])
def test_adapters_that_lie_in_an_optimizer_of_their_own_are_judged_beside_a_head_that_trains(order):
    model = adapted(targets=["proj"], modules_to_save=["head"])
    ours = [p for n, p in model.named_parameters() if "lora" in n]
    head = [*model.head.parameters()]
    both = [torch.optim.SGD(head, lr=0.1), torch.optim.SGD(ours, lr=0.1)][::order]
    (text,) = heard(train, model, *both)
    assert "none of the 2 trainable parameters has a gradient: proj.lora_A, proj.lora_B" in text


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_schedules_are_missed_in_the_second_step_and_only_where_there_are_any(case):
    model = adapted(case.make(2))
    texts = heard(train, model, adamw(model), steps=1)
    assert texts == []
    model = adapted(case.make(2))
    texts = heard(train, model, adamw(model))
    assert len(texts) == (case.method in SCHEDULED)
    if texts:
        assert f"{case.method} acts between steps" in texts[0]
        assert "fused_peft.on_step(model, step)" in texts[0]
    assert hooks() == 0


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, Around, lambda m: m.blocks])
def test_schedules_that_are_driven(wrap):
    """On the model, on what holds it, or on its part that is adapted."""
    for method in sorted(SCHEDULED):
        model = adapted(METHODS[method].example(2))
        outer = wrap(model)
        assert heard(train, model, adamw(model), after=lambda step, m=outer: fp.on_step(m, step)) == []
        assert hooks() == 0


def test_check_training_and_the_watch_say_a_thing_once():
    model = adapted(targets=ALL)
    optimizer = adamw(model)
    loss(model).backward()
    assert len(heard(fp.check_training, model, optimizer)) == 1
    assert heard(train, model, optimizer) == []
    scheduled = adapted(fp.AdaLoraConfig(init_r=2, target_r=1, total_step=9))  # this is still to be seen
    optimizer = adamw(scheduled)
    loss(scheduled).backward()
    assert heard(fp.check_training, scheduled, optimizer) == []
    assert "adalora acts" in heard(train, scheduled, optimizer)[0]


def test_a_check_without_the_optimizer_leaves_that_to_the_watch():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fp.get_peft_model(model, fp.LoraConfig(r=2, target_modules=TARGETS))
    assert checked(after_backward(model)) == []
    assert "built before" in heard(train, model, optimizer)[0]


def test_an_optimizer_that_check_training_has_named_is_not_named_again():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fp.get_peft_model(model, fp.LoraConfig(r=2, target_modules=TARGETS))
    assert "built before" in checked(after_backward(model), optimizer)[0]
    assert heard(train, model, optimizer) == []


def test_optimizers_that_share_the_parameters():
    """As Muon for matrices and AdamW for the rest: the second of them may hold frozen parameters only."""
    for order in (1, -1):
        model = adapted()
        matrices, rest = ([p for p in model.parameters() if (p.dim() == 2) is two] for two in (True, False))
        both = [torch.optim.AdamW(rest), torch.optim.SGD(matrices, lr=0.1)][::order]
        assert heard(train, model, *both) == []
        assert hooks() == 0
    model = adapted(modules_to_save=["head"])
    frozen = [p for p in model.parameters() if not p.requires_grad][:3]
    thirds = frozen, trainable(model)[::2], trainable(model)[1::2]
    assert heard(train, model, *(torch.optim.SGD(some, lr=0.1) for some in thirds)) == []
    assert hooks() == 0
    model = adapted(modules_to_save=["head"])
    half = trainable(model)[::2], trainable(model)[1::2]
    assert heard(train, model, *(torch.optim.SGD(some, lr=0.1) for some in half)) == []
    assert hooks() == 0


def test_an_optimizer_in_the_backward_pass():
    """One optimizer a parameter, which steps and forgets the gradient as soon as it is there."""
    model = adapted()
    for p in trainable(model):
        one = torch.optim.SGD([p], lr=0.1)

        def step(p, one=one):
            one.step()
            one.zero_grad()

        p.register_post_accumulate_grad_hook(step)

    def run():
        for _ in range(3):
            loss(model).backward()

    assert heard(run) == []
    assert hooks() == 0


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.LBFGS(p, max_iter=2), lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.AdamW(p, foreach=True), lambda p: torch.optim.AdamW(p, fused=True),
])  # fmt: skip
@pytest.mark.parametrize("targets", [TARGETS, ALL], ids=["right", "unused"])
@pytest.mark.parametrize("keyword", [False, True])
def test_closures(make, targets, keyword):
    """The gradients come in the step: they are judged in the second one."""
    model = adapted(targets=targets)
    optimizer = make(trainable(model))

    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    def run(steps):
        for _ in range(steps):
            optimizer.step(closure=closure) if keyword else optimizer.step(closure)

    assert heard(run, 1) == []
    assert len(heard(run, 2)) == (targets == ALL)
    assert hooks() == 0


@pytest.mark.parametrize("keyword", [False, True])
def test_closures_beside_a_step_that_has_its_gradients(keyword):
    model = adapted(modules_to_save=["head"])
    first, second = trainable(model)[:4], trainable(model)[4:]
    plain, closed = torch.optim.SGD(first, lr=0.1), torch.optim.LBFGS(second, max_iter=1)

    def closure():
        closed.zero_grad()
        value = loss(model)
        value.backward()
        return value

    def run():
        for _ in range(3):
            loss(model).backward()
            plain.step()
            closed.zero_grad()
            closed.step(closure=closure) if keyword else closed.step(closure)
            plain.zero_grad()

    assert heard(run) == []
    assert hooks() == 0


def test_steps_without_any_gradient_show_nothing_and_end_the_watch_in_time():
    model = adapted()
    optimizer = adamw(model)

    def run():
        for _ in range(checks._PATIENCE):
            optimizer.step()

    assert heard(run) == []
    assert hooks() == 0


@pytest.mark.parametrize("dry", [1, 2])
def test_dry_steps_before_training_are_not_judged(dry):
    model = adapted(targets=ALL)
    optimizer = adamw(model)
    assert [text for _ in range(dry) for text in heard(optimizer.step)] == []
    assert "proj.lora_A" in heard(train, model, optimizer)[0]


def test_grad_scaler_and_accumulation():
    model = adapted()
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu", init_scale=8.0)

    def run():
        for step in range(8):
            value = loss(model) * (float("inf") if step < 2 else 1.0)
            scaler.scale(value).backward()
            if step % 2:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

    assert heard(run) == []
    assert hooks() == 0


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), Around])
def test_a_wrapped_model_trains_in_peace(wrap):
    model = wrap(adapted())
    assert heard(train, model, adamw(model)) == []
    assert hooks() == 0


def test_a_copy_is_not_watched_and_the_original_still_is():
    model = adapted(targets=ALL)
    twin = copy.deepcopy(model)
    assert heard(train, twin, adamw(twin)) == []
    assert "proj.lora_A" in heard(train, model, adamw(model))[0]


def test_other_models_and_their_optimizers_are_strangers(monkeypatch):
    waiting, other = adapted(targets=ALL), Net()
    assert heard(train, other, torch.optim.SGD(other.parameters(), lr=0.1)) == []
    assert waiting in checks._watched
    looked = []
    monkeypatch.setattr(checks, "_held", lambda optimizer, held=checks._held: looked.append(1) or held(optimizer))
    train(other, stranger := torch.optim.SGD(other.parameters(), lr=0.1))
    train(other, stranger)
    assert len(looked) == 1  # a stranger is looked at once
    second = adapted()
    assert heard(train, second, adamw(second)) == []
    assert [*checks._watched] == [waiting]
    assert len(heard(train, waiting, adamw(waiting))) == 1


def test_a_model_adapted_anew_is_judged_anew():
    model = adapted()
    train(model, adamw(model))
    model = fp.get_peft_model(fp.merge_and_unload(model), fp.LoraConfig(r=2, target_modules=ALL)).train()
    assert "proj.lora_A" in heard(train, model, adamw(model))[0]


@pytest.mark.parametrize("frozen", ["inference", "by hand"])
def test_an_adapter_that_does_not_train_is_not_expected_to(frozen):
    config = fp.AdaLoraConfig(
        init_r=2, target_r=1, total_step=9, lora_dropout=0.1, inference_mode=frozen == "inference"
    )
    model = adapted(config).eval()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    assert heard(train, model, adamw(model)) == []
    assert checked(after_backward(model)) == []


def test_a_check_that_fails_lets_the_training_go_on(monkeypatch):
    def fails(*args):
        raise KeyError("broken")

    model = adapted()
    monkeypatch.setattr(checks, "_judge", fails)
    before = [p.clone() for p in trainable(model)]
    assert heard(train, model, adamw(model)) == []
    assert any(not torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))
    assert hooks() == 0


def test_a_compiled_step_is_as_whole_as_without_the_hook():
    """No part of the check in the graph, and no further graph break."""
    breaks = []
    for watched in (False, True):
        model = adapted()
        if not watched:
            checks._watched.clear()
            checks._stop()
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        loss(model).backward()
        before = [p.clone() for p in trainable(model)]
        torch._dynamo.reset()
        counters.clear()
        assert heard(torch.compile(lambda o=optimizer: o.step(), backend="eager")) == []
        assert all(torch.allclose(a - 0.1 * p.grad, p) for a, p in zip(before, trainable(model), strict=True))
        breaks.append({str(reason): n for reason, n in counters["graph_break"].items()})
    assert breaks[0] == breaks[1]


# --- inside Hugging Face PEFT ----------------------------------------------------------------------------------------


def in_peft(config, targets=TARGETS, before=lambda model: None):
    peft = pytest.importorskip("peft")
    net = Net()
    before(net)
    return peft.get_peft_model(net, replace(config, target_modules=targets)).train()


REGISTERED = ["ssb", "kasa", "lora_dash", "flora", "trilora"]


@pytest.mark.parametrize("method", REGISTERED)
def test_registered_methods_are_checked_inside_peft(method):
    config = METHODS[method].example(2)
    model = after_backward(in_peft(config))
    assert checked(model, adamw(model)) == []
    (found,) = checked(after_backward(in_peft(config, ALL)))
    assert "proj" in found
    assert "no gradient" in found


def test_registered_methods_in_eval_mode_and_in_a_loop():
    config = METHODS["lora_dash"].example(2)
    assert "dropout of 0.2" in checked(after_backward(in_peft(replace(config, lora_dropout=0.2)).eval()))[0]
    model = in_peft(config)
    assert "lora_dash acts between steps" in heard(train, model, adamw(model))[0]
    model = in_peft(config)
    assert heard(train, model, adamw(model), after=lambda step: fp.on_step(model, step)) == []
    assert hooks() == 0


def test_an_optimizer_built_before_peft_adapted_with_a_registered_method():
    built = []
    model = in_peft(METHODS["ssb"].example(2), before=lambda m: built.append(torch.optim.SGD(m.parameters(), lr=0.1)))
    assert "built before" in checked(after_backward(model), built[0])[0]
    model = in_peft(METHODS["ssb"].example(2), before=lambda m: built.append(torch.optim.SGD(m.parameters(), lr=0.1)))
    assert "built before" in heard(train, model, built[1])[0]


@pytest.mark.parametrize("accelerated", [False, True])
def test_pefts_own_adapters_are_checked_too(accelerated):
    peft = pytest.importorskip("peft")

    def made(targets, **kwargs):
        model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=targets, **kwargs)).train()
        return fp.accelerate(model) if accelerated else model

    model = after_backward(made(TARGETS, bias="all"))
    assert checked(model, adamw(model)) == []
    (found,) = checked(after_backward(made(ALL)))
    assert "2 of 10" in found
    assert "proj.lora_A" in found
    assert "does not hold" in checked(model, torch.optim.SGD([torch.zeros(1)], lr=0.1))[0]
