"""Which family a config.json is of, and what it says."""

from collections.abc import Mapping
from typing import Any

from quatom.errors import ModelError
from quatom.families.arcee import ARCEE
from quatom.families.cohere import COHERE, COHERE2
from quatom.families.cwm import CWM
from quatom.families.decoder import Family
from quatom.families.dots1 import DOTS1
from quatom.families.ernie import ERNIE4_5, HELIUM
from quatom.families.ernie_moe import ERNIE4_5_MOE
from quatom.families.exaone import EXAONE
from quatom.families.exaone4 import EXAONE4
from quatom.families.exaone_moe import EXAONE_MOE
from quatom.families.falcon import FALCON
from quatom.families.flex_olmo import FLEX_OLMO
from quatom.families.gemma import GEMMA
from quatom.families.gemma2 import GEMMA2
from quatom.families.gemma3 import GEMMA3
from quatom.families.glm import GLM, GLM4
from quatom.families.glm_moe import GLM4_MOE
from quatom.families.gpt2 import GPT2
from quatom.families.gpt_bigcode import GPT_BIGCODE
from quatom.families.gpt_neo import GPT_NEO
from quatom.families.gpt_neox import GPT_NEOX
from quatom.families.gpt_oss import GPT_OSS
from quatom.families.gptj import GPTJ
from quatom.families.granite import GRANITE
from quatom.families.granite4 import GRANITE4
from quatom.families.granite_moe import GRANITE_MOE, GRANITE_MOE_SHARED
from quatom.families.granite_swa import GRANITE_MOE_SWA, GRANITE_SWA
from quatom.families.hy_v3 import HY_V3
from quatom.families.hyperclovax import HYPERCLOVAX
from quatom.families.internlm3 import INTERNLM3
from quatom.families.iquestcoder import IQUESTCODER
from quatom.families.jais2 import JAIS2
from quatom.families.keys import Keys
from quatom.families.llama import LLAMA
from quatom.families.mellum import MELLUM
from quatom.families.minimax_m2 import MINIMAX_M2
from quatom.families.ministral3 import MINISTRAL3
from quatom.families.mistral import MINISTRAL, MISTRAL
from quatom.families.mixtral import MIXTRAL
from quatom.families.nemotron import NEMOTRON
from quatom.families.olmo import OLMO2, OLMO3
from quatom.families.olmo1 import OLMO
from quatom.families.olmoe import OLMOE
from quatom.families.opt import OPT
from quatom.families.phi import PHI
from quatom.families.phi3 import PHI3
from quatom.families.phi_moe import PHI_MOE
from quatom.families.qwen import QWEN2, QWEN3
from quatom.families.qwen2_moe import QWEN2_MOE
from quatom.families.qwen3_moe import QWEN3_MOE
from quatom.families.refused import REFUSED, check_not_refused, nearest
from quatom.families.restated import check_restated
from quatom.families.seed_oss import SEED_OSS
from quatom.families.smollm3 import SMOLLM3
from quatom.families.solar_open import SOLAR_OPEN
from quatom.families.spec import ModelConfig
from quatom.families.stablelm import STABLELM
from quatom.families.starcoder2 import STARCODER2
from quatom.families.vaultgemma import VAULTGEMMA

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    MINISTRAL,
    MINISTRAL3,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    VAULTGEMMA,
    PHI3,
    OLMO,
    OLMO2,
    OLMO3,
    GRANITE,
    GRANITE4,
    GRANITE_SWA,
    SMOLLM3,
    SEED_OSS,
    GLM,
    GLM4,
    ERNIE4_5,
    HELIUM,
    EXAONE,
    EXAONE4,
    COHERE,
    COHERE2,
    PHI,
    GPT_NEO,
    GPT_NEOX,
    FALCON,
    GPTJ,
    STARCODER2,
    STABLELM,
    NEMOTRON,
    ARCEE,
    HYPERCLOVAX,
    INTERNLM3,
    CWM,
    IQUESTCODER,
    JAIS2,
    OPT,
    GPT2,
    GPT_BIGCODE,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    GRANITE_MOE,
    PHI_MOE,
    GLM4_MOE,
    GPT_OSS,
    MINIMAX_M2,
    ERNIE4_5_MOE,
    DOTS1,
    SOLAR_OPEN,
    EXAONE_MOE,
    HY_V3,
    FLEX_OLMO,
    GRANITE_MOE_SHARED,
    GRANITE_MOE_SWA,
    MELLUM,
)
"""Every supported family, in the order of the table in the docs."""

_BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}
_BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES}


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """What the decoder computes that a config.json of transformers 4 or 5 describes.

    Raises:
        ModelError: its architecture is not supported, or a key is missing, contradicts another, or
            changes the mathematics in a way that Quatom does not implement.
    """
    keys = Keys(config)
    family = find_family(config)
    read = family.read(keys)
    check_restated(keys, read)
    keys.finish()
    return read


def find_family(config: Mapping[str, Any]) -> Family:
    """The family that `architectures` and `model_type` agree on.

    Raises:
        ModelError: one of them is not supported, with the reason where it is a known model; or they
            name different families.
    """
    check_not_refused(config, _BY_ARCHITECTURE)
    if config.get("text_config") is not None:
        raise ModelError(
            f"config.json of {', '.join(_names(config)) or config.get('model_type')} describes in "
            "text_config the text part of a larger model; save its text model alone with "
            "transformers, and use that"
        )
    model_type = config.get("model_type")
    names = _names(config)
    if not names and model_type is None:
        raise ModelError("config.json has neither architectures nor model_type; add architectures")
    if model_type is not None and not isinstance(model_type, str):
        raise ModelError(f"config key model_type must be a string, got {model_type!r}")
    of_type = _BY_MODEL_TYPE.get(model_type or "")
    found = {}
    for name in names:
        if of_type is not None and name == of_type.saved_as:
            continue
        if name not in _BY_ARCHITECTURE:
            raise ModelError(
                f"architecture {name} is not supported; {nearest(name, _BY_ARCHITECTURE)}"
            )
        found[name] = _BY_ARCHITECTURE[name]
    if of_type is not None:
        found[f"model_type {model_type}"] = of_type
    elif model_type is not None and model_type not in REFUSED:
        usual = {f"{name} has {family.model_type!r}" for name, family in found.items()}
        raise ModelError(
            f"model_type {model_type!r} is not supported; "
            f"{'; '.join(sorted(usual)) or nearest(model_type, _BY_MODEL_TYPE)}"
        )
    families = list(found.values())
    if any(family is not families[0] for family in families):
        raise ModelError(
            f"config.json contradicts itself: {', '.join(found)} are different families; keep the "
            "one whose weights these are"
        )
    return families[0]


def _names(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    names = [names] if isinstance(names, str) else names or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"config key architectures must be a list of names, got {names!r}")
    return list(names)
