"""What GPT-2, GPT-BigCode, GPT-J and GPT-Neo have in common."""

from typing import Any

from quatom.families.decoder import activation
from quatom.families.keys import Keys
from quatom.families.sizes import Sizes
from quatom.families.spec import FeedForward, Norm


def gpt_parts(
    keys: Keys, sizes: Sizes, *, inner: str = "n_inner", default: str = "gelu_new"
) -> dict[str, Any]:
    """What GPT-2 and its relatives share, as arguments of `decoder`.

    Args:
        keys: of config.json.
        sizes: from `read_sizes`.
        inner: Key of the width of a feed-forward layer.
        default: of activation_function.

    Raises:
        ModelError: a key is wrong.
    """
    return {
        "norm": Norm(
            kind="layer", eps=keys.positive("layer_norm_epsilon", default=1e-5), bias=True
        ),
        "feed_forward": FeedForward(
            size=keys.integer(inner, default=4 * sizes.hidden),
            activation=activation(keys, "activation_function", default=default),
            gated=False,
        ),
        "mlp_bias": True,
        "layer_prefix": "transformer.h.",
        "embedding_name": "transformer.wte.weight",
        "final_norm_name": "transformer.ln_f",
    }
