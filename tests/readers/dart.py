"""Golden cases of DART."""

from collections.abc import Iterator

import torch
from golden_cases import Check
from torch import Tensor

from prune import VisualTokens, get_method
from prune.kernels import topk_indices
from prune.reducers.dart import key_norm, set_order


def read(data: dict[str, Tensor], params: dict) -> Iterator[Check]:
    start, stop = params["image_start"], params["image_start"] + params["image_len"]
    keys = data["k_states"].transpose(1, 2)
    columns = torch.arange(params["seq_len"])[None]
    tokens = VisualTokens(
        features=data["hidden"][:, start:stop],
        columns=columns[:, start:stop],
        keys=keys[:, start:stop],
        normed_features=data["last_layer_state"][:, start:stop],
        text_features=data["hidden"][:, stop:],
        text_mask=torch.ones_like(columns[:, stop:], dtype=torch.bool),
        text_columns=columns[:, stop:],
        text_keys=keys[:, stop:],
        normed_text=data["last_layer_state"][:, stop:],
    )
    norm, text_norm = key_norm(tokens.keys), key_norm(tokens.text_keys)
    image, _ = topk_indices(norm, params["pivot_image"])
    text, _ = topk_indices(text_norm, params["pivot_text"])
    assert torch.equal(image[0], data["image_pivots"].sort().values)
    pivots = torch.cat([tokens.columns.gather(1, image), tokens.text_columns.gather(1, text)], 1)
    norms = torch.cat([norm.gather(1, image), text_norm.gather(1, text)], 1)
    order = set_order(pivots, norms, torch.ones_like(pivots, dtype=torch.bool), image.shape[1])
    assert torch.equal(pivots.gather(1, order)[0], data["pivot_order"])

    options = {"image_pivots": params["pivot_image"], "text_pivots": params["pivot_text"]}
    yield Check(get_method("dart", pivot_order="authors", **options), tokens, data["keep"])
    yield Check(get_method("dart", pivot_order="sorted", **options), tokens, data["keep_sorted_order"])
