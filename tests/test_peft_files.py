"""Adapters that stock PEFT writes with more than adapters in them, or for older models, load and compute the same."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import fused_peft as fp  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(1))
TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
    "pad_token_id": 0,
}  # fmt: skip


def llama(tie=False, vocabulary=40):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**TEXT, "tie_word_embeddings": tie})
    model = transformers.LlamaForCausalLM(config)
    if vocabulary != 40:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model.eval()


def stored(model, folder, **config):
    """A trained adapter of PEFT's in the folder, and what it computes."""
    config = {"target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
    return adapted, lambda **kwargs: (adapted.save_pretrained(folder, **kwargs), adapted(IDS).logits.detach())[1]


@pytest.mark.parametrize("method", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
@pytest.mark.parametrize("tie", [False, True])
def test_an_adapter_with_lm_head_among_its_targets(tie, method, tmp_path):
    _, save = stored(llama(tie), tmp_path, target_modules=["q_proj", "lm_head"], **method)
    want = save()
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    if tie and method.get("init_lora_weights") == "pissa":  # whose residual PEFT lets the embedding read too
        with pytest.raises(fp.AdapterFormatError, match=r"residual of pissa, and put in place of model.embed_tokens"):
            fp.load_adapter(llama(tie), tmp_path)
        return
    mine = fp.load_adapter(llama(tie), tmp_path).eval()
    torch.testing.assert_close(mine(IDS).logits, want, rtol=1e-4, atol=2e-5)
    with fp.disable_adapter(mine):
        assert torch.equal(mine(IDS).logits, llama(tie)(IDS).logits)


@pytest.mark.parametrize("method", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=str)
def test_embeddings_stored_beside_the_adapter_are_taken_over_and_kept(targets, method, tmp_path):
    """As after adding tokens: they are not the base model's, and go on into what is saved next. (PEFT stores what it
    targets, or else both.)"""
    torch.manual_seed(7)
    adapted, save = stored(llama(vocabulary=44), tmp_path / "theirs", target_modules=targets, **method)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if name.endswith("lm_head.base_layer.weight" if "lm_head" in targets else "embed_tokens.weight"):
                p.add_(torch.randn_like(p))
    want = save(save_embedding_layers=True)
    mine = fp.load_adapter(llama(vocabulary=44), tmp_path / "theirs").eval()
    torch.testing.assert_close(mine(IDS).logits, want, rtol=1e-4, atol=1e-4)
    fp.save_pretrained(mine, tmp_path / "ours")
    again = fp.load_adapter(llama(vocabulary=44), tmp_path / "ours").eval()
    torch.testing.assert_close(again(IDS).logits, want, rtol=1e-4, atol=1e-4)
    back = peft.PeftModel.from_pretrained(llama(vocabulary=44), tmp_path / "ours").eval()
    torch.testing.assert_close(back(IDS).logits, want, rtol=1e-4, atol=1e-4)
    small = llama()
    before = {n: t.clone() for n, t in small.state_dict().items()}
    with pytest.raises(fp.AdapterFormatError, match=r"has shape \(44, 16\).*resize_token_embeddings\(44\)"):
        fp.load_adapter(small, tmp_path / "theirs")
    assert all(torch.equal(t, before[n]) for n, t in small.state_dict().items())
    assert not hasattr(small, "_fused_peft")


def llava():
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(**{**TEXT, "image_size": 16, "patch_size": 8})
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**TEXT), vision_config=vision)
    return transformers.LlavaForConditionalGeneration(config).eval()


def qwen2_vl():
    torch.manual_seed(0)
    text = {**TEXT, "hidden_size": 32, "num_key_value_heads": 2, "max_window_layers": 2}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=5, video_token_id=6)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


OLD = {
    "llava": (llava, "model.language_model.", "language_model.model."),
    "qwen2_vl": (qwen2_vl, "model.language_model.", "model."),
}


@pytest.mark.parametrize("full_names", [False, True])
@pytest.mark.parametrize("name", OLD)
def test_names_from_before_transformers_4_52(name, full_names, tmp_path):
    """Vision-language models had their language model elsewhere; Transformers' own table maps the names."""
    make, new, old = OLD[name]
    targets = [n for n, _ in make().named_modules() if n.startswith(new) and n.endswith("q_proj")]
    _, save = stored(make(), tmp_path, target_modules=targets)
    want = save()
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model."
    renamed = {k.replace(prefix + new, prefix + old): v for k, v in tensors.items()}
    assert renamed.keys().isdisjoint(tensors)
    save_file(renamed, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = [t.replace(new, old, 1) for t in targets] if full_names else r".*language_model.*q_proj"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close(fp.load_adapter(make(), tmp_path)(IDS).logits, want, rtol=1e-4, atol=2e-5)


def test_a_rank_above_the_smaller_side(tmp_path):
    _, save = stored(llama(), tmp_path, r=40, target_modules=["q_proj", "down_proj"])
    want = save()
    torch.testing.assert_close(fp.load_adapter(llama(), tmp_path)(IDS).logits, want, rtol=1e-4, atol=2e-5)


def test_pefts_kasa_is_refused_by_name(tmp_path):
    kasa = {"kasa_config": peft.KasaConfig()} if hasattr(peft, "KasaConfig") else pytest.skip("this PEFT has no KaSA")
    _, save = stored(llama(), tmp_path, init_lora_weights=True, **kasa)
    save()
    model = llama()
    with pytest.raises(
        fp.AdapterFormatError, match=r"kasa_config.*not supported for LORA; load this adapter with PEFT"
    ):
        fp.load_adapter(model, tmp_path)
    assert not hasattr(model, "_fused_peft")


def test_embeddings_of_the_adapter_before_do_not_stay(tmp_path):
    for name, noise in (("with", 1.0), ("without", 0.0)):
        adapted, save = stored(llama(), tmp_path / name)
        with torch.no_grad():
            adapted.get_input_embeddings().weight.add_(noise)
        want = save(save_embedding_layers=noise > 0)
    mine = fp.load_adapter(llama(), tmp_path / "with")
    fp.load_adapter(mine, tmp_path / "without")
    torch.testing.assert_close(mine.eval()(IDS).logits, want, rtol=1e-4, atol=2e-5)
    fp.save_pretrained(mine, tmp_path / "again")
    assert not [k for k in load_file(tmp_path / "again/adapter_model.safetensors") if "embed" in k]
