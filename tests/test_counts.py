"""The numbers of trainable parameters of arXiv 2407.05417 (supplementary tables II to IV), on a meta-device model."""

import json
from pathlib import Path

import pytest
import torch

import fused_peft as fp

transformers = pytest.importorskip("transformers")

PAPER = json.loads((Path(__file__).parent / "data/paper_params_roberta_base.json").read_text())
SIX = ["query", "key", "value", "dense"]
LOW_RANK = {"lora": fp.LoraConfig, "trilora": fp.TriLoraConfig, "flora": fp.FloraConfig, "dora": fp.DoraConfig}
SCALES = {"ia3": fp.IA3Config, "ssl": fp.SSLConfig, "ssb": fp.SSBConfig}


def config(entry: str) -> fp.methods.PeftConfig:
    name, _, r = entry.partition("@")
    r = int(r or 0)
    if name in LOW_RANK:
        return LOW_RANK[name](r=r, target_modules=SIX)
    if name in SCALES:
        extra = {"feedforward_modules": []} if name == "ia3" else {}
        return SCALES[name](target_modules=["key", "value", "intermediate.dense"], **extra)
    return {
        "adalora": lambda: fp.AdaLoraConfig(init_r=r, target_r=r, total_step=100, target_modules=SIX),
        "parallel_adapter": lambda: fp.ParallelAdapterConfig(r=r, target_modules=SIX),
        "sam_parser": lambda: fp.SamParserConfig(target_modules=SIX),
        "bitfit": fp.BitFitConfig,
        "houlsby": lambda: fp.BottleneckConfig(kind="houlsby", r=4 * r),
        "pfeiffer": lambda: fp.BottleneckConfig(kind="pfeiffer", r=8 * r),
    }[name]()


@pytest.mark.parametrize("entry", PAPER["permille"])
def test_trainable_parameters_are_the_papers(entry):
    with torch.device("meta"):
        model = transformers.RobertaModel(transformers.RobertaConfig(), add_pooling_layer=False)
    fp.get_peft_model(model, config(entry))
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    permille, paper = 1000 * counted / PAPER["params"], PAPER["permille"][entry]
    assert abs(permille - paper) <= max(0.015 * paper, 0.02), (entry, permille, paper)
