"""Reads of a weight past its layer are found in the source, and questions about it are not taken for them."""

import functools
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_peft as fp
from fused_peft.model.reads import read_directly


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
        self.block = nn.Module()
        self.block.out = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.table = nn.ModuleDict({"a": nn.Linear(4, 4)})


class Plainly(Layers):
    def forward(self, x):
        return F.linear(x, self.fc.weight, self.fc.bias)


class ByAlias(Layers):
    def forward(self, x):
        a, b = self.fc, self.fc2.weight
        return F.linear(x, a.weight) + x @ b.t()


class ByKeyword(Layers):
    def forward(self, x):
        return F.linear(x, weight=self.fc.weight.data.to(x.dtype))


class ByGetattr(Layers):
    def forward(self, x):
        proj = getattr(self, "fc")  # noqa: B009
        return x @ getattr(proj, "weight").t()  # noqa: B009


class OnOnePath(Layers):
    def forward(self, x):
        w = self.fc.weight if self.training else None
        return self.fc(x) if w is None else x @ w.t()


class OfItsBias(Layers):
    def forward(self, x):
        return self.fc2(x) + self.fc.bias


class TwoLevelsDown(Layers):
    def forward(self, x):
        return F.linear(x, self.block.out.weight)


class InALoop(Layers):
    def forward(self, x):
        for layer in self.layers:
            x = x @ layer.weight.t()
        return x


class ByIndex(Layers):
    def forward(self, x):
        return x @ self.layers[0].weight @ self.table["a"].weight


class InAHelper(Layers):
    @torch.no_grad()
    def _mix(this, x):
        return F.linear(x, this.fc.weight)

    @property
    def norm(self):
        return self.fc2.weight.norm()

    @functools.cached_property
    def mean(self):
        return self.fc2.weight.mean()


class Inherited(Plainly):
    def forward(self, x):
        return super().forward(x) + 1


class Nothing(Layers):
    def forward(self, x):
        w = self.fc.weight
        x = x.to(self.fc.weight.dtype).to(device=w.device)
        if self.fc.weight.is_meta or (isinstance(self.fc.weight, nn.Parameter) and self.fc.bias is not None):
            x = x.to(self.fc2.weight) + torch.zeros_like(input=self.fc.bias) + w.new_zeros(())
        if hasattr(self.fc, "weight") and self.fc.weight.data.shape[0] == w.size(0):
            assert self.fc.weight.ndim == 2
        return self.fc2(self.fc(x))

    def reset_parameters(self):
        nn.init.zeros_(self.fc.weight)

    def _init_weights(self, module):
        self.fc.weight.data.normal_()

    def tie_weights(self):
        self.fc.weight = self.fc2.weight


class Overridden(Plainly):
    def forward(self, x):
        return self.fc(x)


class Other(Layers):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.own = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x):
        weight = self.own
        return self.fc(x) @ self.embed.weight @ weight.t()


READS = [
    (Plainly, {"Plainly.forward": ["fc.weight"]}),
    (ByAlias, {"ByAlias.forward": ["fc.weight", "fc2.weight"]}),
    (ByKeyword, {"ByKeyword.forward": ["fc.weight"]}),
    (ByGetattr, {"ByGetattr.forward": ["fc.weight"]}),
    (OnOnePath, {"OnOnePath.forward": ["fc.weight"]}),
    (OfItsBias, {"OfItsBias.forward": ["fc.bias"]}),
    (TwoLevelsDown, {"TwoLevelsDown.forward": ["block.out.weight"]}),
    (InALoop, {"InALoop.forward": ["layers.*.weight"]}),
    (ByIndex, {"ByIndex.forward": ["layers.*.weight", "table.a.weight"]}),
    (InAHelper, {"InAHelper._mix": ["fc.weight"], "InAHelper.norm": ["fc2.weight"], "InAHelper.mean": ["fc2.weight"]}),
    (Inherited, {"Inherited.forward": ["fc.weight"]}),
    (Nothing, {}),
    (Overridden, {}),
    (Other, {}),
]


def linear(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize(("kind", "expected"), READS, ids=lambda v: getattr(v, "__name__", ""))
def test_reads_are_told_from_questions(kind, expected):
    net = nn.Sequential(kind())
    assert read_directly(net, linear(net)) == expected


def test_only_layers_that_are_adapted_count():
    assert read_directly(ByAlias(), ["fc2", "block.out"]) == {"ByAlias.forward": ["fc2.weight"]}


def test_the_warning_is_true_and_names_the_layer():
    net = ByKeyword()
    with pytest.warns(UserWarning, match=r"ByKeyword\.forward uses fc\.weight without calling the layer") as caught:
        fp.get_peft_model(net, fp.LoraConfig(r=2, target_modules=["fc"]))
    assert [w.filename for w in caught] == [__file__]
    x = torch.ones(2, 4, requires_grad=True)
    net(x).sum().backward()
    assert all(p.grad is None for p in net.parameters() if p.requires_grad)


def test_a_class_without_source_is_taken_at_its_word():
    scope = {"Layers": Layers, "F": F}
    exec("class Typed(Layers):\n    def forward(self, x): return F.linear(x, self.fc.weight)", scope)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.get_peft_model(scope["Typed"](), fp.LoraConfig(r=2, target_modules=["fc"]))


SPEECH = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "conv_dim": (16,),
    "conv_stride": (2,),
    "conv_kernel": (3,),
    "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
MAMBA = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}


@pytest.mark.parametrize(
    ("name", "config", "targets", "expected"),
    [
        ("WavLM", SPEECH, ["q_proj", "v_proj"], "WavLMAttention.* uses v_proj.weight, q_proj.weight"),
        ("Mamba", MAMBA, ["dt_proj", "out_proj"], "MambaMixer.* uses dt_proj.weight, out_proj.weight"),
        ("Mamba", MAMBA, ["in_proj"], None),
        ("Wav2Vec2", SPEECH, ["q_proj", "v_proj", "out_proj"], None),
    ],
)
def test_models_that_read_weights(name, config, targets, expected):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fp.get_peft_model(model, fp.LoraConfig(r=1, target_modules=targets))
    messages = [str(w.message) for w in caught]
    if expected is None:
        assert messages == []
    else:
        (message,) = messages
        assert re.search(expected, message), message
