"""The leading singular triplets without a full decomposition: as exact, the same every time, or handed over."""

import pytest
import torch

import fused_peft as fp
from fused_peft.methods import svd

SHAPE = (1100, 1400)


def _weight(kind):
    torch.manual_seed(0)
    if kind == "untrained":  # singular values lie close together: the hardest case
        return torch.nn.Linear(*SHAPE[::-1]).weight.detach()
    U, V = (torch.linalg.qr(torch.randn(n, SHAPE[0])).Q for n in SHAPE)
    return U * torch.arange(1, SHAPE[0] + 1) ** -0.5 @ V.t()


@pytest.mark.parametrize("kind", ["untrained", "decaying"])
def test_leading_triplets_are_those_of_the_full_decomposition(kind):
    W, r = _weight(kind), 16
    U, S, Vh = svd.leading(W, r)
    full_U, full_S, full_Vh = torch.linalg.svd(W.double(), full_matrices=False)
    torch.testing.assert_close(S.double(), full_S[:r], rtol=1e-5, atol=0)
    for mine, others in ((Vh.double(), full_Vh[r:]), (U.double().t(), full_U[:, r:].t())):
        sine = torch.linalg.matrix_norm(mine @ others.t(), 2)  # of the largest angle between the subspaces
        assert sine <= (1e-3 if kind == "untrained" else 2e-5)
    torch.testing.assert_close(Vh @ Vh.t(), torch.eye(r), rtol=0, atol=1e-5)
    torch.testing.assert_close(U.t() @ U, torch.eye(r), rtol=0, atol=1e-5)
    best = (W.double() - (full_U[:, :r] * full_S[:r]) @ full_Vh[:r]).norm()
    assert (W - (U * S) @ Vh).double().norm() <= best * (1 + 1e-6)


def test_it_is_the_same_every_time_and_draws_nothing_from_the_global_generator():
    W, state = _weight("decaying"), torch.get_rng_state()
    first, second = svd.leading(W, 8), svd.leading(W, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_what_does_not_converge_is_decomposed_in_full(monkeypatch):
    W = _weight("untrained")
    monkeypatch.setattr(svd, "SWEEPS", 1)
    monkeypatch.setattr(svd, "DEPTH", 2)
    assert svd.leading(W, 8) is None
    U, S, Vh = svd.decomposed(W, None, rank=8)
    torch.testing.assert_close(S, torch.linalg.svdvals(W)[:8])
    assert (U.shape, Vh.shape) == ((SHAPE[0], 8), (8, SHAPE[1]))


@pytest.mark.parametrize(("shape", "dtype", "rank"), [((200, 300), torch.float32, 4), (SHAPE, torch.float32, 18)])
def test_a_small_matrix_or_a_large_rank_is_decomposed_in_full(shape, dtype, rank, monkeypatch):
    monkeypatch.setattr(svd, "leading", lambda W, rank: pytest.fail("not worth it"))
    assert len(svd.decomposed(torch.randn(shape, dtype=dtype), None, rank=rank)[1]) == rank


@pytest.mark.parametrize(
    "config", [fp.PissaConfig(r=8), fp.LoraXsConfig(r=8), fp.SpectralAdapterConfig(r=8)], ids=lambda c: type(c).__name__
)
def test_methods_start_from_it_and_change_nothing(config, monkeypatch):
    asked, leading = [], svd.leading
    monkeypatch.setattr(svd, "leading", lambda W, rank: asked.append(rank) or leading(W, rank))
    torch.manual_seed(1)
    linear = torch.nn.Linear(1200, 1024)
    x = torch.randn(3, 1200)
    y = linear(x)
    layer = fp.PeftLinear.from_linear(linear, config)
    assert asked == [8]
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
