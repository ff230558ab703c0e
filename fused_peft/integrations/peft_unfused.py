"""Why layers of PEFT's have no fused form, in a few words: by their class, the file they stand in, or their method."""

from __future__ import annotations

_CONVOLUTION = "a convolution is no product with one matrix"
_QUANTISED = "the format that its weight is stored in is not read"
_WHOLE = "it forms an update of the whole weight in each call"
_ROTATED = "it rotates the weight or the input, which is no update of low rank"
_SHARED = "it makes its factors in each call from vectors that layers share"

_CLASSES = {
    "lora.MultiheadAttention": "nn.MultiheadAttention computes with its weights itself and calls no linear layer",
    "lora.LoraParallelLinear": "Megatron spreads it over processes",
    "hira.Embedding": "it multiplies the rows of a table",
}
_NAMES = dict.fromkeys(("_ConvNd", "Conv1d", "Conv2d", "Conv3d", "HRAConv2d", "SVDConv2d"), _CONVOLUTION)
_FILES = dict.fromkeys(("aqlm", "awq", "eetq", "gptq", "hqq", "inc", "te"), _QUANTISED)
_METHODS = {
    "adamss": "it has factors of their own for subspaces of rows, which it drops as it trains",
    "beft": "it trains a bias alone, so there is nothing to fuse",
    "boft": _ROTATED,
    "c3a": "its update is a circular convolution",
    "deft": "it projects the product of the base, in fp32",
    "fourierft": _WHOLE,
    "frod": "it computes with a decomposition of the weight in the place of the base",
    "glora": _WHOLE,
    "hra": _ROTATED,
    "lily": "it mixes factors that layers share by each token",
    "ln_tuning": "it trains norms whole, so there is nothing to fuse",
    "loha": _WHOLE,
    "lokr": "its update is a Kronecker product",
    "oft": _ROTATED,
    "osf": "it trains parts of the weight's own decomposition",
    "peanut": _WHOLE,
    "poly": "a router mixes its factors for each sample",
    "psoft": "it rotates between A and B",
    "pvera": "it draws noise between A and B",
    "randlora": "its update is a sum of random bases of full rank",
    "road": "it rotates the output by pairs",
    "shadow": "it runs a network beside the model",
    "shira": "it writes single entries into the weight",
    "supertuning": "it writes single entries into the weight",
    "tinylora": _SHARED,
    "trainable_tokens": "it trains rows of the table, which have no factors",
    "unilora": _SHARED,
    "vblora": _SHARED,
    "waveft": _WHOLE,
}


def why_unfused(kind: type) -> str | None:
    """Why a class of PEFT's has no fused form; None for one that is not known here."""
    parts, name = kind.__module__.split("."), kind.__name__
    if parts[:2] != ["peft", "tuners"]:
        return None
    method = parts[2]
    found = _CLASSES.get(f"{method}.{name}") or _NAMES.get(name) or _FILES.get(parts[-1])
    return found or _METHODS.get(method)
