"""Transformers' Trainer with adapted models: schedules run, and an interrupted run resumes exactly."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import fused_peft as fp  # noqa: E402
from fused_peft.integrations.transformers import ScheduleCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 8


def model():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    net = transformers.BertForSequenceClassification(config)
    adapter = fp.AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=2, total_step=STEPS, lora_dropout=0.1, task_type="SEQ_CLS",
        target_modules=["query", "value"],
    )  # fmt: skip
    return fp.get_peft_model(net, adapter)


def trainer(folder, **kwargs):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 40, (4 * STEPS, 7), generator=generator)
    data = [{"input_ids": r, "labels": int(r[0]) % 2} for r in rows]
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=STEPS, learning_rate=1e-2, report_to=[], seed=0,
        save_steps=STEPS // 2, logging_strategy="no", use_cpu=True, disable_tqdm=True, **kwargs,
    )  # fmt: skip
    return transformers.Trainer(model(), args, train_dataset=data, callbacks=[ScheduleCallback()])


def test_trainer_drives_the_allocator_and_resumes_exactly(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    layers = [m for m in whole.model.modules() if isinstance(m, fp.PeftLinear)]
    assert sum(int(m.kept.sum()) for m in layers) == 2 * len(layers)
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{STEPS // 2}"))
    resumed = again.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed[name]), name
