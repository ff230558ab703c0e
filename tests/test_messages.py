"""What a user is told: each message names what was given and what to do, is short, and nothing has changed before it.

One table: a row is a situation, the model in it, the call, the exception or warning, and words that must appear.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from test_accelerate import Packed  # noqa: E402
from test_layers import Quantised, QuantisedForInference  # noqa: E402
from test_register import Tied  # noqa: E402

import fused_peft as fp  # noqa: E402

LONGEST = 500
ON = {"target_modules": ["0"]}


def plain():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def ours(config=None):
    return fp.get_peft_model(plain(), config or fp.LoraConfig(r=2, **ON))


def pefts(config=None):
    return peft.get_peft_model(plain(), config or peft.LoraConfig(r=2, **ON))


def pefts_prompt():
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    return peft.get_peft_model(base, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def tied_in_peft():
    return peft.get_peft_model(Tied(), fp.FloraConfig(r=2, target_modules=["body", "lm_head"]))


def packed_in_peft():
    model = pefts(fp.SSBConfig(**ON))
    base = model.base_model.model[0].base_layer
    base.weight = nn.Parameter(Packed(base.weight.detach()), requires_grad=False)
    return model


def many_with_one_of_its_own():
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)), nn.MultiheadAttention(4, 1))


def merged():
    model = ours()
    fp.merge(model)
    return model


class OwnLora(fp.LoraConfig):
    """A subclass of a user's."""


def without_peft(name):
    """The call in a process where PEFT cannot be imported, with what it raises there."""
    script = f"""
import sys
sys.modules["peft"] = None
import fused_peft, torch
try:
    fused_peft.{name}(torch.nn.Linear(2, 2))
except ImportError as e:
    print(e)
"""

    def run(model):
        found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
        if found.stdout:
            raise ImportError(found.stdout.strip())

    return run


def disabled(model):
    with fp.disable_adapter(model):
        pass


def into_a_file(model, folder):
    (folder / "taken").write_text("")
    fp.save_pretrained(model, folder / "taken")


def below_a_file(model, folder):
    (folder / "taken").write_text("")
    fp.save_pretrained(model, folder / "taken/adapter")


def into_a_locked_folder(model, folder):
    with pytest.MonkeyPatch.context() as patch:  # whoever runs the tests may write anywhere
        patch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
        fp.save_pretrained(model, folder / "adapter")


def tied():
    return fp.get_peft_model(Tied(), fp.FloraConfig(r=2, target_modules=["body", "lm_head"]))


def packed_base():
    model = plain()
    model[0].weight = nn.Parameter(Packed(model[0].weight.detach()), requires_grad=False)
    return model


def packed():
    model = ours()
    model[0].weight = nn.Parameter(Packed(model[0].weight.detach()), requires_grad=False)
    return model


def quantised(config=None, kind=Quantised):
    """Adapted, and then quantised by something that can multiply by its weight and do nothing else with it."""
    model = ours(config)
    model[0].weight = nn.Parameter(kind(model[0].weight.detach()), requires_grad=False)
    return model


def pruned():
    model = plain()
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def parametrized():
    model = ours()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def lost():
    model = ours()
    model[0] = nn.Linear(4, 4)
    return model


def from_a_file(model, folder):
    (folder / "taken").write_text("")
    fp.load_adapter(model, folder / "taken")


def load_from(path, model):
    fp.load_adapter(model, path)


def from_a_folder_of_named_adapters(model, folder, names=("first", "second")):
    for name in names:
        peft_model = pefts()
        peft_model.add_adapter(name, peft.LoraConfig(r=2, **ON))
        peft_model.save_pretrained(folder / "taken", selected_adapters=[name])
    fp.load_adapter(model, folder / "taken")


def adapt(config):
    return lambda model: fp.get_peft_model(model, config)


def on_an_input_that_needs_a_gradient(model):
    model(torch.randn(2, 4, requires_grad=True))


@dataclass(frozen=True)
class Row:
    """call(model), or call(model, folder) where it needs two arguments; words: what the message must hold."""

    situation: str
    model: Callable[[], object]
    call: Callable
    kind: type[Exception]
    words: tuple[str, ...] = field(default=())


ROWS = [
    # fused_peft.accelerate
    Row("accelerate without PEFT", plain, without_peft("accelerate"), ImportError,
        ("fused_peft.accelerate works on models of Hugging Face PEFT", 'pip install "fused_peft[peft]"')),
    Row("restore without PEFT", plain, without_peft("restore"), ImportError,
        ("fused_peft.restore works on models of Hugging Face PEFT", 'pip install "fused_peft[peft]"')),
    Row("accelerate a plain model", plain, fp.accelerate, ValueError,
        ("model=Sequential has no Hugging Face PEFT layer", "peft.get_peft_model")),
    Row("accelerate no model", lambda: 3, fp.accelerate, TypeError, ("model=3 must be a torch.nn.Module",)),
    Row("restore no model", lambda: None, fp.restore, TypeError, ("model=None must be a torch.nn.Module",)),
    Row("accelerate a model of this library", ours, fp.accelerate, ValueError,
        ("model=Sequential was adapted by fused_peft.get_peft_model", "already", "leave accelerate out")),
    Row("accelerate a soft prompt of PEFT's", pefts_prompt, fp.accelerate, ValueError,
        ("no layer to fuse", "PROMPT_TUNING", "leave accelerate out")),
    Row("accelerate what has no fused form", lambda: pefts(peft.LoHaConfig(r=2, **ON)), fp.accelerate, UserWarning,
        ("fused 0 of 1 PEFT layers; 1 keep PEFT's forward", "an update of the whole weight in each call (1, e.g. ")),
    # a model of PEFT's where one of this library's is needed
    Row("merge PEFT's", pefts, fp.merge, ValueError,
        ("model=PeftModel is Hugging Face PEFT's", "fused_peft.merge", "call merge_adapter()")),
    Row("unmerge PEFT's", pefts, fp.unmerge, ValueError, ("model=PeftModel is Hugging", "call unmerge_adapter()")),
    Row("merge_and_unload PEFT's", pefts, fp.merge_and_unload, ValueError,
        ("model=PeftModel is Hugging", "call merge_and_unload() of the model that peft.get_peft_model returned")),
    Row("save PEFT's", pefts, fp.save_pretrained, ValueError,
        ("model=PeftModel is Hugging", "call save_pretrained(path) of the model")),
    Row("load into PEFT's", pefts, fp.load_adapter, ValueError,
        ("model=PeftModel is Hugging", "call load_adapter(path, adapter_name) of the model")),
    Row("disable PEFT's", pefts, disabled, ValueError, ("model=PeftModel is Hugging", "call disable_adapter()")),
    Row("merge a registered method in PEFT", lambda: pefts(fp.SSBConfig(**ON)), fp.merge, ValueError,
        ("model=PeftModel is Hugging", "call merge_adapter()")),
    Row("merge an accelerated model", lambda: fp.accelerate(pefts()), fp.merge, ValueError,
        ("model=PeftModel is Hugging", "call merge_adapter()")),
    Row("adapt PEFT's", pefts, adapt(fp.LoraConfig(r=2, **ON)), ValueError,
        ("model=PeftModel already carries Hugging Face PEFT layers", "fused_peft.accelerate", "merge_and_unload()")),
    # something else where a config of this library is needed
    Row("a class as config", plain, adapt(fp.LoraConfig), TypeError,
        ("config=LoraConfig is the class", "fused_peft.LoraConfig(...)")),
    Row("a dict as config", plain, adapt({"r": 8}), TypeError,
        ("config={'r': 8} is a dict", "fused_peft.LoraConfig(**config)")),
    Row("a stored dict as config", plain, adapt({"peft_type": "LORA", "r": 8, "x": "y" * 900}), TypeError,
        ("is a dict", "fused_peft.LoraConfig(**config) (without 'peft_type')")),
    Row("a config of PEFT's", plain, adapt(peft.LoraConfig(r=2, **ON)), TypeError,
        ("config is a peft.tuners.lora.config.LoraConfig", "peft.get_peft_model(model, config)",
         "fused_peft.accelerate(model)")),
    Row("a class of PEFT's", plain, adapt(peft.LoraConfig), TypeError,
        ("config is a peft.tuners.lora.config.LoraConfig", "fused_peft.accelerate(model)")),
    Row("None as config", plain, adapt(None), TypeError, ("config=None", "fused_peft.LoraConfig(r=16)")),
    Row("a folder as config", plain, adapt("./adapter"), TypeError,
        ("config='./adapter' is no config", "fused_peft.load_adapter(model, folder)")),
    Row("a number as config", plain, adapt(8), TypeError,
        ("config=8 is a builtins.int", "fused_peft.LoraConfig(r=16)")),
    Row("a subclass as config", plain, adapt(OwnLora(**ON)), TypeError,
        ("OwnLora, a subclass that belongs to no method", "give a fused_peft.LoraConfig itself")),
    Row("a layer with PEFT's config", plain, lambda m: fp.PeftLinear.from_linear(m[0], peft.IA3Config()), TypeError,
        ("IA3Config, Hugging Face PEFT's own", "fused_peft.accelerate(model)")),
    Row("a layer with a class", plain, lambda m: fp.PeftLinear.from_linear(m[0], fp.SSBConfig), TypeError,
        ("config=SSBConfig is the class", "fused_peft.SSBConfig(...)")),
    Row("a layer without a config", plain, lambda m: fp.PeftLinear(4, 4), TypeError, ("config=None",)),
    Row("a layer with a soft prompt", plain,
        lambda m: fp.PeftLinear.from_linear(m[0], fp.PromptTuningConfig(num_virtual_tokens=2)), TypeError,
        ("PromptTuningConfig, which no single layer has", "fused_peft.get_peft_model(model, config)")),
    Row("PEFT with what its LoRA lacks", plain,
        lambda m: peft.get_peft_model(m, fp.LoraConfig(r=2, nonlinearity="relu", **ON)), ValueError,
        ("nonlinearity='relu' of fused_peft.LoraConfig has no counterpart in peft.LoraConfig",
         "fused_peft.get_peft_model")),
    Row("no model to adapt", lambda: "gpt2", adapt(fp.LoraConfig(r=2, **ON)), TypeError,
        ("model='gpt2' must be a torch.nn.Module",)),
    # merging
    Row("merge a tied weight in PEFT", tied_in_peft, lambda m: m.merge_adapter(), fp.NotMergeableError,
        ("lm_head shares its weight with embed_tokens", "model.config.tie_word_embeddings = False")),
    Row("unload a tied weight in PEFT", tied_in_peft, lambda m: m.merge_and_unload(), fp.NotMergeableError,
        ("lm_head shares its weight with embed_tokens", "lm_head.weight = nn.Parameter(lm_head.weight.clone())")),
    Row("merge a quantised weight in PEFT", packed_in_peft, lambda m: m.merge_adapter(), fp.NotMergeableError,
        ("the weight of 0 is a Packed", "keep the adapter unmerged")),
    Row("merge twice", merged, fp.merge, RuntimeError, ("0 is already merged", "call unmerge")),
    Row("unmerge what is not merged", ours, fp.unmerge, RuntimeError, ("0 is not merged",)),
    Row("merge a plain model", plain, fp.merge, ValueError,
        ("model=Sequential has no adapted layer", "get_peft_model")),
    # adapting, saving and loading
    Row("adapt twice", ours, adapt(fp.LoraConfig(r=2, **ON)), ValueError,
        ("already has adapters", "merge_and_unload", "load_adapter")),
    Row("nothing matches", plain, adapt(fp.LoraConfig(r=2, target_modules=["q_proj"])), ValueError,
        ("target_modules=['q_proj'] matches no module",)),
    Row("save a plain model", plain, fp.save_pretrained, ValueError,
        ("model=Sequential has no adapter", "get_peft_model or load_adapter")),
    Row("a name in place of a keyword", ours, lambda m: fp.get_peft_model(m, fp.LoraConfig(r=2), "second"), TypeError,
        ("'second' as a third positional argument", "add_adapter(model, name, config)")),
    Row("a name for a loaded adapter", ours, lambda m, folder: fp.load_adapter(m, folder, "second"), TypeError,
        ("'second' as a third positional argument",)),
    Row("a name of the hub as folder", plain, lambda m: fp.load_adapter(m, "someone/adapter"), FileNotFoundError,
        ("path='someone/adapter' is no folder here",)),
    *(Row(f"an address of the hub as folder: {address}", plain, partial(load_from, address), FileNotFoundError,
          (f"path={address!r} is no folder here", f"path = huggingface_hub.snapshot_download({call}"))
      for address, call in {
          "https://huggingface.co/someone/adapter": "'someone/adapter')",
          "https://hf.co/someone/adapter": "'someone/adapter')",
          "https://huggingface.co/someone/adapter/tree/v2/second": "'someone/adapter', revision='v2') + '/second'",
          "https://huggingface.co/someone/adapter/blob/main/adapter_config.json":
              "'someone/adapter', revision='main')",
          "hf://someone/adapter": "'someone/adapter')",
          "hf://someone/adapter@v2/second": "'someone/adapter', revision='v2') + '/second'",
      }.items()),
    Row("the folder of a PEFT model's named adapters", plain, from_a_folder_of_named_adapters, FileNotFoundError,
        ("holds no adapter_config.json; first, second in it have one: give '", "/second'")),
    Row("a folder with one adapter below", plain, partial(from_a_folder_of_named_adapters, names=("first",)),
        FileNotFoundError, ("first in it has one", "/first'")),
    Row("a file as folder", plain, from_a_file, NotADirectoryError, ("is a file; give the folder that holds",)),
    Row("a name as a plain string", lambda: nn.Sequential(plain()), adapt(fp.LoraConfig(r=2, target_modules="2")),
        ValueError, ("target_modules='2' matches no module", "regular expression", "target_modules=['2']")),
    Row("all-linear with a layer that is none of ours", many_with_one_of_its_own,
        adapt(fp.LoraConfig(r=2, target_modules="all-linear")), TypeError,
        ("target_modules='all-linear' matches '9.out_proj'", "reads its weight and never calls it", "exclude it")),
    Row("save into a file", ours, into_a_file, FileExistsError, ("is an existing file; give a folder",)),
    Row("save below a file", ours, below_a_file, FileExistsError, ("lies below", "a file")),
    Row("save without permission", ours, into_a_locked_folder, PermissionError,
        ("no permission to write into", "give another folder")),
    Row("is_trainable by word", ours, lambda m, folder: fp.load_adapter(m, folder, is_trainable="no"), TypeError,
        ("is_trainable='no' must be True or False",)),
    Row("save what has lost a layer", lost, fp.save_pretrained, RuntimeError, ("0", "vanished")),
    Row("train while merged", merged, lambda m: m.train()(torch.randn(2, 4)), UserWarning,
        ("merged lora layer", "gets no gradient", "unmerge(model)")),
    Row("a task type of nobody's", plain, lambda m: fp.LoraConfig(task_type="SEQ_CLASS"), ValueError,
        ("task_type='SEQ_CLASS'", "SEQ_CLS")),
    Row("a pattern that is no table", plain, lambda m: fp.LoraConfig(rank_pattern=3), TypeError,
        ("rank_pattern=3 must be a dict",)),
    Row("a rank for AdaLoRA's kept ones", plain,
        lambda m: fp.AdaLoraConfig(total_step=9, rank_pattern={"0": 2}), TypeError,
        ("rank_pattern={'0': 2} must be a stored allocation", "[kept, ...]")),
    Row("a word for a switch", plain, lambda m: fp.LoraConfig(use_rslora="false"), TypeError,
        ("use_rslora='false' must be True or False",)),
    Row("a word for layer indices", plain, lambda m: fp.LoraConfig(layers_to_transform="0"), TypeError,
        ("layers_to_transform='0' must be an index",)),
    Row("adapt inside DataParallel", lambda: nn.DataParallel(plain()), adapt(fp.LoraConfig(r=2, **ON)), ValueError,
        ("model is a DataParallel", "model.module")),
    Row("adapt and train whole", lambda: nn.ModuleDict({"my_head": plain()[0], "head": plain()[2]}),
        adapt(fp.LoraConfig(r=2, target_modules=["my_head"], modules_to_save=["head"])), ValueError,
        ("also means 'my_head'", "exclude_modules")),
    Row("adapt a pruned layer", pruned, adapt(fp.LoraConfig(r=2, **ON)), TypeError,
        ("a hook computes its weight", "prune.remove")),
    Row("merge a parametrized layer", parametrized, fp.merge, fp.NotMergeableError, ("is parametrized", "unmerged")),
    Row("trace with dropout", lambda: fp.PeftLinear(4, 4, config=fp.LoraConfig(r=2, lora_dropout=0.5)),
        lambda m: torch.jit.trace(m, torch.randn(2, 4)), RuntimeError, ("dropout", "model.eval()")),
    Row("merge a tied weight", tied, fp.merge, fp.NotMergeableError,
        ("lm_head.weight is shared with embed_tokens", "untie them first", "torch.nn.Parameter")),
    Row("unload a tied weight", tied, fp.merge_and_unload, fp.NotMergeableError,
        ("lm_head.weight is shared with embed_tokens", "untie them first")),
    Row("merge a quantised weight", packed, fp.merge, fp.NotMergeableError,
        ("its weight is a Packed", "keep the layer unmerged")),
    Row("adapt a quantised weight by its values", packed_base, adapt(fp.DoraConfig(r=2, **ON)), TypeError,
        ("dora reads the weight", "in a form that cannot be read (a Packed)", "such as LoRA")),
    Row("quantised behind LieRA's back", lambda: quantised(fp.LieraConfig(r=2, **ON)), lambda m: m(torch.randn(2, 4)),
        RuntimeError, ("liera layer (in_features=4, out_features=4)", "is a Quantised", "keep this layer unquantised")),
    Row("quantised behind DoRA's back", lambda: quantised(fp.DoraConfig(r=2, **ON)), lambda m: m(torch.randn(2, 4)),
        RuntimeError, ("dora layer", "is a Quantised", "e.g. LoRA")),
    Row("quantised without a gradient", lambda: quantised(kind=QuantisedForInference),
        on_an_input_that_needs_a_gradient, RuntimeError,
        ("lora layer (in_features=4", "QuantisedForInference", "passes no gradient", "quantise the weights only")),
    Row("adapt a tied weight", Tied, adapt(fp.LoraConfig(r=2, target_modules=["lm_head"])), UserWarning,
        ("lm_head.weight is shared with embed_tokens", "untied")),
    Row("load from an empty folder", plain, fp.load_adapter, FileNotFoundError,
        ("holds no adapter_config.json", "give the folder that save_pretrained wrote")),
]  # fmt: skip


def described(model):
    """All of a model that a call could have changed."""
    if not isinstance(model, nn.Module):
        return model
    modules = [(name, id(m), type(m), m.training, tuple(m.__dict__)) for name, m in model.named_modules()]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return modules, [(name, id(t), t.requires_grad, t._version) for name, t in tensors]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.situation)
def test_message(row, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = row.model()
    before, there = described(model), set(os.listdir(tmp_path))
    needed = [p for p in inspect.signature(row.call).parameters.values() if p.default is p.empty]
    folder = [tmp_path] if len(needed) > 1 else []
    if issubclass(row.kind, Warning):
        with pytest.warns(row.kind) as found:
            row.call(model, *folder)
        text = str(found[0].message)
    else:
        with pytest.raises(row.kind) as found:
            row.call(model, *folder)
        assert type(found.value) is row.kind
        text = str(found.value)
        assert described(model) == before
        assert set(os.listdir(tmp_path)) - there <= {"taken"}
    for words in row.words:
        assert words in text
    assert len(text) < LONGEST
    assert not any(str(Path(p)) in text for p in sys.path if len(p) > 1)
