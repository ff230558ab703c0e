"""Names of modules that an older Transformers had otherwise, in adapters saved then: its own table maps them."""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import nn


def renaming(model: nn.Module) -> Callable[[str], str]:
    """name of a parameter or module in an old checkpoint -> its name in the model today, the same where none is known.

    Transformers maps the keys of its own old checkpoints when it loads them (vision-language models before 4.52 had
    ``language_model.model.layers`` where ``model.language_model.layers`` is now); adapters have the same names.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return lambda name: name
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # a Transformers before 5
        return lambda name: name
    known = [t for t in get_model_conversion_mapping(model, add_legacy=False) if isinstance(t, WeightRenaming)]

    def rename(name: str) -> str:
        for transform in known:
            name, _ = transform.rename_source_key(name)
        return name

    return rename
