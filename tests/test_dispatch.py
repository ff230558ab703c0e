"""Which backend runs, and that no refusal is silent."""

import pytest
import torch

import fused_peft as fp
from fused_peft.core import dispatch, operands
from fused_peft.core.eager import Eager


class Picky(Eager):
    """Takes nothing wider than 16 features, and says so."""

    name = "picky"

    def reasons(self, problem):
        wide = [f"K={problem.K} is above 16"] if problem.K > 16 else []
        return wide + ([f"{problem.dtype} is not float32"] if problem.dtype != torch.float32 else [])


class Absent(Eager):
    name = "absent"

    def available(self):
        return ["no device of its kind"]


@pytest.fixture
def layers():
    return {k: fp.PeftLinear(k, 8, config=fp.LoraConfig(r=2)) for k in (16, 32)}


def test_eager_is_the_first_choice_on_cpu(layers):
    fp.set_strict(True)
    layers[16](torch.randn(3, 16))
    (row,) = fp.explain(torch.nn.Sequential(layers[16]))
    assert (row.backend, row.why) == ("eager", "first choice for this device")


def test_refusals_are_explained_and_strict_raises_all_of_them(layers):
    dispatch.register(Picky(), ("cpu",))
    dispatch.register(Absent(), ("cpu",))
    model = torch.nn.Sequential(layers[16], torch.nn.Linear(8, 32), layers[32]).double()
    rows = fp.explain(model)
    assert [r.backend for r in rows] == ["eager", "eager"]
    assert rows[1].why == "absent: no device of its kind; picky: K=32 is above 16, torch.float64 is not float32"
    assert "K=32 is above 16" in str(rows)
    rows = fp.explain(model.float())
    assert [r.backend for r in rows] == ["picky", "eager"]
    dispatch.unregister("absent")
    fp.set_strict(True)
    layers[16](torch.randn(3, 16))
    with pytest.raises(fp.StrictError, match=r"K=32 is above 16"):
        layers[32](torch.randn(3, 32))
    with pytest.raises(fp.StrictError, match=r"K=32 is above 16"):
        fp.explain(model)


def test_forced_backend(layers):
    dispatch.register(Picky())
    fp.set_backend("picky")
    layers[16](torch.randn(3, 16))
    layers[32](torch.randn(3, 32))
    assert [r.backend for r in fp.explain(torch.nn.Sequential(*layers.values()))] == ["picky", "eager"]
    fp.set_strict(True)
    with pytest.raises(fp.StrictError, match="picky"):
        layers[32](torch.randn(3, 32))
    fp.set_strict(False)
    fp.set_backend(None)


def test_bad_settings_are_refused_and_change_nothing():
    with pytest.raises(ValueError, match=r"'nope'.*eager"):
        fp.set_backend("nope")
    with pytest.raises(TypeError, match="strict='yes'"):
        fp.set_strict("yes")


def test_explain_says_what_merged_and_disabled_layers_do(layers):
    model = torch.nn.Sequential(layers[16])
    fp.merge(model)
    assert "merged" in fp.explain(model)[0].why
    with fp.disable_adapter(model):
        assert "disabled" in fp.explain(model)[0].why


def test_problem_describes_the_call():
    x, w = torch.randn(2, 3, 16), torch.randn(8, 16)
    A, B, G = torch.randn(2, 16), torch.randn(8, 2), torch.randn(2, 2)
    problem = operands.Problem.of(operands.Operands(x, w, A=A, B=B, G=G, h="relu", p=0.5))
    assert (problem.M, problem.K, problem.N, problem.r) == (6, 16, 8, 2)
    assert (problem.device, problem.arch, problem.G, problem.h) == ("cpu", None, "matrix", "relu")
    assert problem.p == 0.0  # no seed, no dropout
    assert problem.present == {"x", "w", "A", "B", "G"}
    assert hash(problem) == hash(operands.Problem.of(operands.Operands(x, w, A=A, B=B, G=G, h="relu", p=0.5)))


def test_a_product_of_weights_says_so():
    (row,) = fp.explain(torch.nn.Sequential(fp.PeftLinear(16, 8, config=fp.LieraConfig(r=2))))
    assert (row.form, row.backend) == ("product", "eager")
    assert row.why.startswith("W * (1 + s*BA) is formed once each way")
