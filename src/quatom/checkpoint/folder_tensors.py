"""The tensors of a safetensors folder, by the names that a decoder's have.

Weights are saved by many tools: compiled, wrapped, as the language part of a larger model. Names
that differ from transformers' in a known prefix are read; what cannot change the result is passed
over. Both are noted. Everything else is refused.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from quatom.checkpoint.contents import is_present
from quatom.checkpoint.safetensors_file import StoredTensor, read_header
from quatom.checkpoint.validation import read_json, same_values
from quatom.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

# Prefixes that wrappers put before the names of a model, and what transformers has there.
_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")
_LANGUAGE_PARTS = {
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "language_model.model.model.": "model.",  # as transformers 5.17 saves models of sound
    "language_model.": "",
}
# Parts of a larger model that read no token of text.
_OTHER_PARTS = re.compile(
    r"(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|embed_vision|audio_tower)\."
    r"|(model\.)?image_newline$"
)
_ADAPTER = re.compile(r"\.lora_[ABE]|\.lora_embedding_|\.lora_magnitude_vector|\.modules_to_save\.")
# Buffers that older releases of transformers saved, which are computed from config.json.
_BUFFERS = re.compile(
    r".*(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|rope\.freqs|freqs_cis"
    r"|position_ids|\.masked_bias|(attn|attention)\.bias)"
)


def read_headers(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Every stored tensor of a folder by name, and notes of files that were passed over.

    As in transformers, model.safetensors goes before an index of shards.

    Raises:
        CheckpointError: a file is missing, damaged, or not what the index says.
    """
    single, index = folder / SINGLE, folder / INDEX
    if is_present(single):
        notes = _others(folder, {SINGLE}, f"{SINGLE} goes first")
        return read_header(single), notes
    if not is_present(index):
        raise CheckpointError(_why_nothing(folder))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map; download it again")
    for name, file_name in weight_map.items():
        named = isinstance(file_name, str) and file_name not in ("", "..")
        if not named or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index}: weight_map must give each tensor the name of a file in the folder, it "
                f"gives {file_name!r} for {name}; download it again"
            )
    headers: dict[str, StoredTensor] = {}
    unlisted: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        if not is_present(folder / file_name):
            count = sum(value == file_name for value in weight_map.values())
            raise CheckpointError(
                f"{folder} lacks the shard {file_name} with {count} of {len(weight_map)} tensors; "
                "download it"
            )
        stored = read_header(folder / file_name)
        headers |= {n: t for n, t in stored.items() if weight_map.get(n) == file_name}
        unlisted |= {n: t for n, t in stored.items() if weight_map.get(n) != file_name}
    if missing := sorted(weight_map.keys() - headers.keys()):
        raise CheckpointError(
            f"{folder / weight_map[missing[0]]} lacks {missing[0]}, which {index.name} promises "
            f"({len(missing)} tensors in all); download the shard again"
        )
    for name, tensor in unlisted.items():
        listed = headers.setdefault(name, tensor)
        if listed is not tensor and not same_values(listed, tensor):
            raise CheckpointError(
                f"{listed.file} and {tensor.file.name} both hold {name}, with other values; "
                "download all shards again, into an empty folder"
            )
    return headers, _others(folder, {INDEX, *weight_map.values()}, f"{INDEX} does not name them")


def _others(folder: Path, read: Iterable[str], reason: str) -> list[str]:
    others = sorted({f.name for f in folder.glob("*.safetensors*")} - set(read))
    return [f"{', '.join(others)} passed over: {reason}"] if others else []


def adapter(folder: Path) -> str | None:
    """What to do with a folder that holds an adapter and no model; None: it does not."""
    if not any(is_present(folder / name) for name in _ADAPTER_FILES):
        return None
    return (
        f"{folder} holds an adapter (PEFT) and no model; merge it into its base model with "
        "merge_and_unload and save that"
    )


def _why_nothing(folder: Path) -> str:
    if (reason := adapter(folder)) is not None:
        return reason
    found = ", ".join(sorted(f.name for f in folder.glob("*.safetensors"))[:3])
    return f"{folder} has neither {SINGLE} nor {INDEX} (it has {found}); download the missing one"


def plain_names(
    folder: Path, headers: Mapping[str, StoredTensor], expected: Iterable[str]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Tensors by the names that transformers gives them in a decoder, and notes of what changed.

    Raises:
        CheckpointError: they are those of an adapter, or two have the same plain name.
    """
    wanted = set(expected)
    if wanted <= headers.keys():
        return dict(headers), []
    if adapters := [name for name in headers if _ADAPTER.search(name)]:
        raise CheckpointError(
            f"{folder} holds {adapters[0]} ({len(adapters)} such tensors): adapters (PEFT) are "
            "not merged; call merge_and_unload and save the model again"
        )
    notes = []
    for what, rename in _RENAMINGS.items():
        renamed: dict[str, StoredTensor] = {}
        origins: dict[str, str] = {}
        for name, tensor in headers.items():
            plain = rename(name)
            if plain in renamed:
                raise CheckpointError(
                    f"{folder} holds both {origins[plain]} and {name}, which would both be read "
                    f"as {plain}; remove one"
                )
            renamed[plain], origins[plain] = tensor, name
        if renamed.keys() != headers.keys() and len(wanted & renamed.keys()) > len(
            wanted & headers.keys()
        ):
            first = next(name for name, origin in origins.items() if name != origin)
            notes.append(f"{what}: {origins[first]} is read as {first}")
            headers = renamed
    return dict(headers), notes


def _without_wrappers(name: str) -> str:
    name = name.replace("._orig_mod.", ".")
    while prefix := next((p for p in _WRAPPERS if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def _with_prefix(prefixes: Mapping[str, str], name: str) -> str:
    """The name with another prefix where it has one of these."""
    for prefix, instead in prefixes.items():
        if name.startswith(prefix):
            return instead + name.removeprefix(prefix)
    return name


def _with_head(model: str, name: str) -> str:
    """The name that a tensor of a model without head has in one with a head."""
    return name if name.startswith("lm_head.") else f"{model}.{name}"


_RENAMINGS: dict[str, Callable[[str], str]] = {
    "prefix of a wrapper taken off": _without_wrappers,
    "language part of a larger model": partial(_with_prefix, _LANGUAGE_PARTS),
    "model saved without its head": partial(_with_head, "model"),
    "GPT saved without its head": partial(_with_head, "transformer"),
    "head of GPT-NeoX": partial(_with_prefix, {"embed_out.": "lm_head."}),
}


def pass_over(
    stored: Mapping[str, StoredTensor],
    expected: Iterable[str],
    unused: tuple[str, ...] = (),
    *,
    of_larger: bool = False,
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Tensors without those that no result depends on, and a note of these.

    Args:
        stored: tensors by name.
        expected: names of the model's own.
        unused: prefixes of tensors that this model does not run.
        of_larger: they are the tensors of a larger model: what lies in none of the modules that the
            expected names have is another part of it.
    """
    wanted = set(expected)
    modules = {_module(name) for name in wanted}
    harmless = {
        n: t
        for n, t in stored.items()
        if n not in wanted
        and (
            n.startswith(unused) or _is_harmless(n, t) or (of_larger and _module(n) not in modules)
        )
    }
    kept = {name: tensor for name, tensor in stored.items() if name not in harmless}
    if not harmless:
        return kept, []
    more = f" and {len(harmless) - 1} more" if len(harmless) > 1 else ""
    return kept, [f"{next(iter(harmless))}{more} passed over: no result depends on it"]


def _module(name: str) -> str:
    """The first two parts of the module that has it: "model.layers", "lm_head"."""
    return ".".join(name.split(".")[:-1][:2])


def _is_harmless(name: str, tensor: StoredTensor) -> bool:
    if name.endswith(("attn.bias", "attention.bias")) and len(tensor.shape) != 4:
        return False  # no causal mask (1, 1, length, length)
    return bool(_BUFFERS.fullmatch(name) or _OTHER_PARTS.match(name))


def embedding_from_head(
    headers: Mapping[str, StoredTensor], head: str, embedding: str
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Tensors of a tied model whose embedding may be stored as the head alone, and a note of it."""
    if embedding in headers or head not in headers:
        return dict(headers), []
    renamed = {embedding if name == head else name: tensor for name, tensor in headers.items()}
    return renamed, [f"embedding stored as the head alone: {head} is read as {embedding}"]
