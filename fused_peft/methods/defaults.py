"""The modules each architecture adapts when ``target_modules`` is None: Hugging Face PEFT's choices, by model_type."""

from __future__ import annotations


def _table(text: str) -> dict[str, list[str]]:
    """Lines "modules : model types" -> {model type: modules}."""
    table = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        modules, types = line.split(" : ")
        table.update((t, modules.split()) for t in types.split())
    return table


LORA_TARGETS = _table(
    """
    q v : t5 mt5
    q_proj v_proj : bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3
    q v q_proj v_proj : blip-2
    q_proj v_proj fc1 fc2 : phi
    q_proj k_proj v_proj o_proj : nemotron_h
    query value : bert roberta xlm-roberta electra layoutlm
    query_proj value_proj : deberta-v2
    in_proj : deberta
    c_attn : gpt2 gpt_bigcode
    c_proj c_attn : btlm
    query_key_value : bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon
    Wqkv : mpt
    qkv_proj : codegen
    key value receptance output : rwkv
    r_proj k_proj v_proj o_proj key value : rwkv7
    """
)
LORA_TARGETS["gemma4"] = r".*language_model\..*\.(q_proj|v_proj)"

IA3_TARGETS = _table(
    """
    k v wo : t5
    k v wi_1 : mt5
    key value output.dense : bert roberta
    key_proj value_proj output.dense : deberta-v2
    in_proj output.dense : deberta
    c_attn mlp.c_proj : gpt2 gpt_bigcode
    query_key_value mlp.dense_4h_to_h : bloom
    query_key_value dense_4h_to_h : gpt_neox RefinedWebModel RefinedWeb falcon
    q_proj k_proj fc2 : opt
    q_proj v_proj fc2 : bart phi
    q_proj v_proj fc_out : gptj
    q_proj v_proj c_proj : gpt_neo
    k_proj v_proj down_proj : llama mistral
    q_proj v_proj down_proj : llama4 gemma gemma2 gemma3_text qwen2 qwen3
    k_proj v_proj w2 : mixtral
    """
)

IA3_FEEDFORWARD = _table(
    """
    wo : t5
    output.dense : bert roberta deberta-v2 deberta
    mlp.c_proj : gpt2 gpt_bigcode
    mlp.dense_4h_to_h : bloom
    dense_4h_to_h : gpt_neox RefinedWebModel RefinedWeb falcon
    fc2 : opt bart phi
    fc_out : gptj
    c_proj : gpt_neo
    down_proj : llama llama4 mistral gemma gemma2 gemma3_text qwen2 qwen3
    w2 : mixtral
    """
)
IA3_FEEDFORWARD["mt5"] = []

ADALORA_TARGETS = _table(
    """
    q k v o wi wo : t5
    q k v o wi_0 wi_1 wo : mt5
    q_proj k_proj v_proj out_proj fc1 fc2 : bart opt
    c_attn : gpt2 gpt_bigcode
    query_key_value : bloom gpt_neox
    q_proj v_proj : gptj gpt_neo llama llama4 gemma gemma2 gemma3_text qwen2 qwen3
    query value : bert
    query key value dense : roberta
    query_proj key_proj value_proj dense : deberta-v2
    in_proj : deberta
    q_proj k_proj v_proj o_proj : nemotron_h
    """
)
ADALORA_TARGETS["gemma4"] = LORA_TARGETS["gemma4"]

# The last linear layer of a sublayer, after which a bottleneck adapter sits: of both sublayers, and of the feed-forward
# one alone. (PEFT has no such method.) "output.dense" ends "attention.output.dense" too, hence the expressions.
_BERTS = ("bert", "roberta", "xlm-roberta", "electra", "layoutlm", "deberta", "deberta-v2")
BOTH_OUTPUTS = dict.fromkeys(_BERTS, r".*\.layer\.\d+\.(attention\.)?output\.dense") | _table(
    """
    o_proj down_proj : llama llama4 mistral gemma gemma2 gemma3_text qwen2 qwen3
    attn.c_proj mlp.c_proj : gpt2 gpt_bigcode
    out_proj fc2 : bart opt
    out_proj fc_out : gptj
    SelfAttention.o wo : t5 mt5
    """
)
FFN_OUTPUTS = dict.fromkeys(_BERTS, r".*\.layer\.\d+\.output\.dense") | _table(
    """
    down_proj : llama llama4 mistral gemma gemma2 gemma3_text qwen2 qwen3
    mlp.c_proj : gpt2 gpt_bigcode
    fc2 : bart opt
    fc_out : gptj
    wo : t5 mt5
    """
)
