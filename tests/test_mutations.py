"""The oracle must notice a wrong backend: each mutant of the eager one has to be caught, and the original not."""

import pytest
from cases import CASES, SMALL
from oracle import build, disagreements, inputs

from fused_peft.core import dispatch, ops
from fused_peft.core.eager import Eager
from fused_peft.core.operands import Operands
from fused_peft.methods import METHODS

FIELDS = Operands._fields


class Mutant(Eager):
    name = "mutant"


def scale_gradient(field, factor=2.0):
    """One gradient multiplied."""

    class Scaled(Mutant):
        def backward(self, *args):
            grads = list(super().backward(*args))
            i = FIELDS.index(field)
            grads[i] = None if grads[i] is None else grads[i] * factor
            return tuple(grads)

    return Scaled


def change_operands(change, forward=True, backward=True):
    """The computation run with other operands."""

    class Changed(Mutant):
        def forward(self, o, keep_z):
            return super().forward(change(Operands(*o)) if forward else o, keep_z)

        def backward(self, dy, o, T, z, need):
            return super().backward(dy, change(Operands(*o)) if backward else o, T, z, need)

    return Changed


class NoAdapterInDx(Mutant):
    """dx = dy W only."""

    def backward(self, dy, o, T, z, need):
        grads = list(super().backward(dy, o, T, z, need))
        if need[0] and o[1] is not None:
            plain = Operands(*o)._replace(A=None, B=None, G=None, a=None, seed=None)
            grads[0] = super().backward(dy, plain, None, z, (True, *(False,) * (len(need) - 1)))[0]
        return tuple(grads)


class SwappedRows(Mutant):
    """The last row of y left unwritten."""

    def forward(self, o, keep_z):
        y, T, z = super().forward(o, keep_z)
        y.view(-1, y.shape[-1])[-1] = float("nan")
        return y, T, z


class NoTransposedScale(Mutant):
    """dz = dy: d_out forgotten on the way back, except in its own gradient."""

    def backward(self, dy, o, T, z, need):
        o = Operands(*o)
        wrong = super().backward(dy, o._replace(d_out=None), T, z, (*need[:5], False, *need[6:]))
        right = super().backward(dy, o, T, z, need)
        return (*wrong[:5], right[5], *wrong[6:])


def other_seed(o):
    return o if o.seed is None else o._replace(seed=o.seed + 1)


def no_dropout(o):
    return o._replace(seed=None)


# the cases that a backend computes: those of methods with no weight formed in each call
THROUGH_BACKEND = [c.name for c in CASES if METHODS[c.method].weight is None]

# mutant -> the cases that must catch it
MUTANTS = {
    "double dA": (scale_gradient("A"), ["lora", "lora+dropout"]),
    "double dB": (scale_gradient("B"), ["lora", "lora+dropout", "rslora"]),
    "dB off by a millionth": (scale_gradient("B", 1 + 1e-6), ["lora"]),
    "double dx": (scale_gradient("x"), ["lora", "ia3", "ssl", "ssb", "bitfit"]),
    "double dd_in": (scale_gradient("d_in"), ["ssl", "ssb", "ia3+feedforward"]),
    "double dd_out": (scale_gradient("d_out"), ["ssb", "ia3"]),
    "double dbias": (scale_gradient("bias"), ["bitfit", "lora+bias"]),
    "adapter dropped from dx": (NoAdapterInDx, ["lora", "lora+dropout", "rslora"]),
    "d_out dropped from dz": (NoTransposedScale, ["ssb", "ia3"]),
    "row not written": (SwappedRows, THROUGH_BACKEND),
    "scale wrong": (change_operands(lambda o: o._replace(s=2 * o.s)), ["lora", "rslora", "lora+bias"]),
    "scale dropped": (change_operands(lambda o: o._replace(s=1.0)), ["lora", "rslora"]),
    "scale wrong in backward": (change_operands(lambda o: o._replace(s=2 * o.s), forward=False), ["lora"]),
    "dropout ignored": (change_operands(no_dropout), ["lora+dropout"]),
    "dropout ignored in backward": (change_operands(no_dropout, forward=False), ["lora+dropout"]),
    "another mask in backward": (change_operands(other_seed, forward=False), ["lora+dropout"]),
    "dropout not rescaled": (
        change_operands(lambda o: o if o.seed is None else o._replace(s=o.s * (1 - o.p))),
        ["lora+dropout"],
    ),
    "d_in ignored": (change_operands(lambda o: o._replace(d_in=None), backward=False), ["ssl", "ssb"]),
    "d_out ignored": (change_operands(lambda o: o._replace(d_out=None), backward=False), ["ssb", "ia3"]),
    "bias ignored": (
        change_operands(lambda o: o._replace(bias=None), backward=False),
        [n for n in THROUGH_BACKEND if n not in ("houlsby", "pfeiffer+gelu")],
    ),
}


def _verdict(case):
    return disagreements(case, build(case, SMALL), *inputs(SMALL))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    mutant, catchers = MUTANTS[name]
    cases = [c for c in CASES if c.name in catchers]
    assert len(cases) == len(catchers)
    dispatch.register(mutant(), ("cpu",))
    for case in cases:
        assert _verdict(case), f"{case.name} does not notice: {name}"


FORMED = [c for c in CASES if METHODS[c.method].form == "weight"]


@pytest.mark.parametrize("position", [1, 3], ids=["double dx", "double the first parameter's gradient"])
def test_mutant_of_the_formed_weight_is_caught(position, monkeypatch):
    right = ops._Formed.backward

    def wrong(ctx, dy):
        grads = list(right(ctx, dy))
        grads[position] = grads[position] * 2
        return tuple(grads)

    monkeypatch.setattr(ops._Formed, "backward", staticmethod(wrong))
    assert FORMED
    for case in FORMED:
        assert _verdict(case), case.name


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_an_unchanged_subclass_passes(case):
    dispatch.register(Mutant(), ("cpu",))
    assert not _verdict(case)
