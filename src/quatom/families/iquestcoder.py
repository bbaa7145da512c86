"""IQuest-Coder: Llama with other defaults."""

from quatom.families.decoder import Family
from quatom.families.keys import Keys
from quatom.families.llama import llama
from quatom.families.rope import one_rope
from quatom.families.sizes import read_sizes
from quatom.families.spec import ModelConfig


def read(keys: Keys) -> ModelConfig:
    """What an IQuestCoderForCausalLM computes.

    Raises:
        ModelError: a key is missing or not supported; clamped q, k and v (clip_qkv) are not.
    """
    keys.only("clip_qkv")
    sizes = read_sizes(keys, max_position=131_072, kv_heads=8, head_dim=128)
    return llama(keys, sizes, one_rope(keys, sizes), family="iquestcoder", eps=1e-5)


IQUESTCODER = Family(
    name="iquestcoder",
    architectures=("IQuestCoderForCausalLM",),
    model_type="iquestcoder",
    saved_as="LlamaForCausalLM",
    models="IQuest-Coder-V1 40B, but for the Loop variant",
    read=read,
)
