"""GPT-BigCode: GPT-2 with one head of K and V, and weights as all others have them."""

from quatom.families.decoder import Family
from quatom.families.gpt2 import gpt
from quatom.families.keys import Keys
from quatom.families.spec import ModelConfig


def read(keys: Keys) -> ModelConfig:
    """What a GPTBigCodeForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported; q, k and v of each head in turns, as without
            multi_query, are not.
    """
    keys.only("multi_query", True)
    # How StarCoder's first code ran it.
    keys.ignore("inference_runner", "max_batch_size", "pad_key_length", "pre_allocate_kv_cache")
    keys.ignore("validate_runner_input")
    return gpt(keys, family="gpt_bigcode", kv_heads=1, default="gelu_pytorch_tanh")


GPT_BIGCODE = Family(
    name="gpt_bigcode",
    architectures=("GPTBigCodeForCausalLM",),
    model_type="gpt_bigcode",
    models="StarCoder, Granite Code 20B and 34B",
    read=read,
)
