"""What a checkpoint must compute, built from its files and transformers' own network.

Nothing here is shared with the package: tensors are read with safetensors, bits are unpacked with
numpy, inputs and KV cache are quantized by a few lines of torch in hooks around transformers'
linears. Weights stand in their original channel order, so orders are judged as well.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

PLACES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": tuple(
        f"{mlp}.{name}"
        for mlp in ("mlp", "mlp.shared_expert", "mlp.shared_experts")
        for name in ("gate_proj", "up_proj")
    ),
    "down": ("mlp.down_proj", "mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj"),
}
BITS = {"odd4": 4, "e2m1": 4, "e4m3": 8} | {f"int{b}": b for b in range(2, 9)}
LARGEST = {"e2m1": 6.0, "e4m3": 448.0} | {f"int{b}": 2.0 ** (b - 1) - 1 for b in range(2, 9)}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def nearest(x: torch.Tensor, name: str) -> torch.Tensor:
    """x / scale -> nearest value of the format, ties to even."""
    if name == "e4m3":
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    if name == "e2m1":
        # An odd code loses a tie by a distance far below any other difference.
        distance = (x.double().abs().unsqueeze(-1) - E2M1).abs() + torch.arange(8) % 2 * 1e-12
        return torch.copysign(E2M1[distance.argmin(-1)].float(), x)
    return torch.round(x).clamp(-LARGEST[name] - 1, LARGEST[name])


def unpack(packed: torch.Tensor, name: str) -> torch.Tensor:
    """(N, bytes) -> values (N, K): a little-endian bit string of two's complement or e2m1."""
    bits = BITS[name]
    string = np.unpackbits(packed.numpy(), axis=1, bitorder="little")
    patterns = string.reshape(packed.shape[0], -1, bits).astype(np.int64) @ (1 << np.arange(bits))
    patterns = torch.from_numpy(patterns)
    if name == "e2m1":
        return torch.where(patterns >= 8, -E2M1[patterns & 7], E2M1[patterns & 7]).float()
    codes = torch.where(patterns >= 2 ** (bits - 1), patterns - 2**bits, patterns).float()
    return 2 * codes + 1 if name == "odd4" else codes


@cache
def hadamard(size: int) -> torch.Tensor:
    """Orthonormal, by its definition: the sign is the parity of the bits that i and j share."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs) / size**0.5


def multiple_of_seven_bits(step: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """The nearest multiple, 1 to 16, of `least` rounded up to 7 significant bits."""
    last_bit = 2.0 ** (least.double().log2().floor() - 6)
    unit = (least / last_bit).ceil() * last_bit
    return (torch.round(step / unit).clamp(1, 16) * unit).float()


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Each block of 2**n channels, the largest that divides the width, times a Hadamard matrix."""
    size = x.shape[-1] & -x.shape[-1]
    return (x.unflatten(-1, (-1, size)) @ hadamard(size)).flatten(-2)


@cache
def incoherent(seed: int, name: str, size: int) -> torch.Tensor:
    """The matrix of `quip-w4a16` for an input or for the rows of a linear: (size, size) float64."""
    bits = hashlib.shake_256(f"{seed} {name}".encode()).digest((size + 7) // 8)
    signs = [1 - 2 * (bits[i // 8] >> (i % 8) & 1) for i in range(size)]
    odd = size // (size & -size)
    angle = 2 * torch.pi * torch.outer(torch.arange(odd), torch.arange(odd)).double() / odd
    hartley = (angle.cos() + angle.sin()) / odd**0.5
    # A Kronecker product of Sylvester's matrices is that of their product.
    return torch.kron(hartley, hadamard(size // odd).double()) * torch.tensor(signs)


@dataclass
class Groups:
    """Channels of each group of one linear's input, and the format of each group."""

    channels: list[torch.Tensor]
    normal: int
    """Groups before the outlier groups."""


@dataclass
class Counts:
    """Groups where the simulation and the model rounded a value on a tie differently."""

    groups: int = 0
    differing: int = 0

    def settle(self, ours: torch.Tensor, theirs: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Compare quantized values group by group, (tokens, groups, width), and go on with theirs.

        Both networks compute the same real numbers up to the order of float32 sums, about 1e-6. A
        number that lies that close to a tie (or whose group's scale lies that close to a tie of
        float16) may be rounded the other way: by one step. Taking over their value keeps such a
        tie from spreading, so that everything behind it is compared as sharply as before.
        """
        different = (ours != theirs).any(dim=-1)
        assert ((ours - theirs).abs() <= 1.01 * step.unsqueeze(-1)).all()
        self.groups += different.numel()
        self.differing += int(different.sum())
        return theirs


def unpack_scales(tensors: dict, groups: int, blocks: int) -> torch.Tensor:
    """(rows, G): nibbles of multiples less one, each block's from a byte of its own."""
    packed = tensors["weight_multiple"]
    nibbles = torch.stack((packed % 16, packed // 16), dim=-1).flatten(1).int()
    wanted = [part[:, : groups // blocks] for part in nibbles.chunk(blocks, dim=1)]
    return (torch.cat(wanted, dim=1) + 1) * tensors["row_scale"].float()[:, None]


class Simulation:
    """transformers' model with weights, inputs and KV cache as the checkpoint in `folder` says."""

    def __init__(self, folder: Path, source: Path, **options: str) -> None:
        import transformers

        config = json.loads((folder / "config.json").read_text())
        self.recipe = config["quantization_config"]["recipe"]
        self.tensors = {}
        for file in folder.glob("*.safetensors"):
            self.tensors |= load_file(file)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation="eager", **options
        ).eval()
        for name, parameter in self.model.named_parameters():
            if "norm" in name and name in self.tensors:  # factors of channels are folded into them
                parameter.data.copy_(self.tensors[name])
        self.counts = Counts()
        self.recorded: dict[tuple[int, str], torch.Tensor] = {}
        for index, layer in enumerate(self.model.model.layers):
            for place, names in PLACES.items():
                for name in names:
                    if name in dict(layer.named_modules()):
                        self._replace(layer.get_submodule(name), index, place, name)
            if hasattr(layer.mlp, "experts"):
                self._replace_experts(layer.mlp.experts, index)
            if self.at(index)["kv_cache"]["format"] != "float16":
                for name in "kv":
                    projection = getattr(layer.self_attn, f"{name}_proj")
                    if name == "k" and self.recipe["kv_cache"]["keys"]["method"] == "post_rope":
                        continue  # see logits()
                    projection.register_forward_hook(self._kv_hook(index, name))

    def at(self, index: int, place: str | None = None) -> dict:
        """The recipe as overrides have it for one site of one layer."""
        own = dict(self.recipe)
        for override in self.recipe["overrides"]:
            layers = set()
            for part in override["layers"].split(","):
                first, _, last = part.partition("-")
                whole = part == "all"
                layers |= {index} if whole else {*range(int(first), int(last or first) + 1)}
            if index in layers and place in override.get("sites", [place]):
                for name in ("weights", "activations", "outliers", "kv_cache"):
                    own[name] = own[name] | override.get(name, {})
        return own

    def _replace(self, linear: torch.nn.Linear, index: int, place: str, name: str) -> None:
        key = f"model.layers.{index}.{name}."
        tensors = {n.removeprefix(key): t for n, t in self.tensors.items() if n.startswith(key)}
        with torch.no_grad():
            groups = self._dequantize(linear.weight, tensors, index, place)
            back = self._make_coherent(linear.weight, index, place, key)
            if linear.bias is not None:
                linear.bias.copy_(back @ tensors["bias"])
        if self.at(index, place)["activations"]["format"] != "float16":
            linear.register_forward_pre_hook(self._input_hook(index, place, groups))

    def _replace_experts(self, module: torch.nn.Module, index: int) -> None:
        """A forward of its own: every expert's weights, its slots in order, its inputs rounded."""
        weights, biases, hooks = {}, {}, {}
        is_gpt_oss = hasattr(module, "gate_up_proj_bias")  # its weights are (E, K, N)
        for place, name in (("experts_gate_up", "gate_up_proj"), ("experts_down", "down_proj")):
            key = f"model.layers.{index}.mlp.experts.{name}."
            tensors = {n.removeprefix(key): t for n, t in self.tensors.items() if n.startswith(key)}
            weight = getattr(module, name).detach()
            weights[place] = (weight.transpose(1, 2) if is_gpt_oss else weight).clone()
            biases[place] = tensors.pop("bias", torch.zeros(weights[place].shape[:2]))
            for expert, weight in enumerate(weights[place]):
                own = {n: t if n == "order" else t[expert] for n, t in tensors.items()}
                groups = self._dequantize(weight, own, index, place)
                self._make_coherent(weight, index, place, key)
            hooks[place] = self._input_hook(index, place, groups)

        def quantized(place, x):
            if self.at(index, place)["activations"]["format"] == "float16":
                return x
            return hooks[place](None, (x,))[0]

        def activated(gate, up):
            if is_gpt_oss:
                return module._apply_gate(torch.stack((gate, up), dim=-1).flatten(1))
            return torch.nn.functional.silu(gate) * up

        def forward(x, chosen, shares):  # (T, hidden), (T, k), (T, k)
            shape, x, top_k = x.shape, x.flatten(0, -2), chosen.shape[-1]
            x, out = quantized("experts_gate_up", x), torch.zeros_like(x)
            slots = sorted(range(chosen.numel()), key=lambda s: (int(chosen.flatten()[s]), s))
            owners = [int(chosen.flatten()[slot]) for slot in slots]
            made = [
                weights["experts_gate_up"][expert] @ x[slot // top_k]
                + biases["experts_gate_up"][expert]
                for slot, expert in zip(slots, owners, strict=True)
            ]
            gate, up = torch.stack(made).chunk(2, dim=1)
            rows = quantized("experts_down", activated(gate, up))
            for slot, expert, row in zip(slots, owners, rows, strict=True):
                out[slot // top_k] += shares.flatten()[slot] * (
                    weights["experts_down"][expert] @ row + biases["experts_down"][expert]
                )
            return out.view(shape)

        module.forward = forward

    def _make_coherent(self, weight: torch.Tensor, index: int, place: str, key: str):
        """U^T W V for a weight W (N, K) as stored; returns U^T (N, N)."""
        if self.recipe["incoherence"] is None:
            return torch.eye(weight.shape[0])
        seed = self.recipe["incoherence"]["seed"]
        u = incoherent(seed, key.removesuffix("."), weight.shape[0])
        v = incoherent(seed, f"model.layers.{index} {place}", weight.shape[1])
        weight.copy_(u.t() @ weight.double() @ v)
        return u.t().float()

    def _dequantize(self, weight: torch.Tensor, tensors: dict, index: int, place: str) -> Groups:
        """Fill a weight (N, K) with what its stored tensors stand for."""
        spec, (rows, channels) = self.at(index, place)["weights"], weight.shape
        codes = unpack(tensors["weight_packed"], spec["format"])
        outliers = tensors.get("outlier_weight", torch.empty(rows, 0))
        blocks = self.recipe["tensor_parallel"] if place in ("o", "down") else 1
        order = tensors.get("order", torch.arange(channels)).long()
        # Each block's slice of the order: its normal channels, then its outliers.
        normal, outlier = order.view(blocks, -1).split(
            (codes.shape[1] // blocks, outliers.shape[1] // blocks), dim=1
        )
        size = spec["group_size"] if spec["group_size"] != -1 else codes.shape[1]
        channels_of = list(normal.flatten().split(size))
        groups = Groups(channels_of, len(channels_of))
        if outliers.shape[1]:
            groups.channels += list(outlier)
        if spec["scale_format"] == "packed_multiples":
            scales = unpack_scales(tensors, groups.normal, blocks)
        else:
            scales = tensors["weight_scale"].float()
        scales = scales.repeat_interleave(spec["rows_per_scale"], dim=0)[:rows]
        weight.fill_(torch.nan)  # every channel must be written
        split = self.recipe["channel_splitting"] is not None
        if split:  # but those merged away; parts of one channel have one code, so columns add up
            weight.fill_(0.0)
        for g, part in enumerate(codes.split(size, dim=1)):
            part = part * scales[:, g : g + 1]
            # A rotation is its own inverse: here weights stand unrotated.
            part = rotate(part) if self.recipe["activations"]["rotation"] != "none" else part
            if split:
                weight.index_add_(1, groups.channels[g], part)
            else:
                weight[:, groups.channels[g]] = part
        if outliers.shape[1]:
            kept = outliers.float().split(outliers.shape[1] // blocks, dim=1)
            factor = tensors.get("outlier_scale", torch.ones(rows, blocks)).float()
            for b, part in enumerate(kept):
                weight[:, outlier[b]] = part * factor[:, b : b + 1]
        assert torch.isfinite(weight).all()
        return groups

    def _input_hook(self, index: int, place: str, groups: Groups):
        spec = self.at(index, place)["activations"]

        def fake_quantize(_, arguments):
            x = arguments[0].flatten(0, -2)  # (tokens, K)
            theirs = self.recorded[index, place]
            first = 0
            split = self.recipe["channel_splitting"] is not None
            out = torch.full_like(x, 0.0 if split else torch.nan)
            parts = [x[:, channels] for channels in groups.channels]
            normal, rotated = slice(groups.normal), spec["rotation"] != "none"
            if rotated:
                parts[normal] = [rotate(part) for part in parts[normal]]
            token_absmax = torch.cat(parts[normal], dim=1).abs().amax(dim=1, keepdim=True)
            for g, (channels, part) in enumerate(zip(groups.channels, parts, strict=True)):
                is_outlier = g >= groups.normal
                name = self.recipe["outliers"]["format"] if is_outlier else spec["format"]
                if name == "float16":
                    ours = part.half().float()
                    step = ours.abs().amax(dim=1, keepdim=True) * 2.0**-10
                else:
                    clip = 1.0 if is_outlier else spec["clip_ratio"]
                    absmax = part.abs().amax(dim=1, keepdim=True)
                    if spec["group_size"] == -1 and not is_outlier:
                        absmax = token_absmax
                    step = (clip * absmax / LARGEST[name]).half().float().clamp(min=2.0**-14)
                    several = groups.normal > 1  # one group alone has a scale of its own
                    if spec["scale_format"] == "multiples" and several and not is_outlier:
                        widest = (clip * token_absmax / LARGEST[name]).half().float()
                        step = multiple_of_seven_bits(step, widest.clamp(min=2.0**-14) / 16)
                    ours = nearest(part / step, name) * step
                    if name in ("e4m3", "e2m1"):
                        step = step * LARGEST[name] / 4  # their widest spacing
                width = len(channels)
                got = theirs[:, first : first + width]
                first += width
                settled = self.counts.settle(ours[:, None], got[:, None], step)[:, 0]
                out[:, channels] = rotate(settled) if rotated and not is_outlier else settled
            assert first == x.shape[1]
            return (out.view(arguments[0].shape),)

        return fake_quantize

    def _quantize_kv(self, x: torch.Tensor, index: int, name: str) -> torch.Tensor:
        """(tokens, heads, D): asymmetric, one group a token and head."""
        form = self.at(index)["kv_cache"]["format"]
        if form == "float16":
            return x
        largest = 2 ** BITS[form] - 1
        low = x.amin(-1, keepdim=True).half().float()
        step = ((x.amax(-1, keepdim=True) - low) / largest).half().float().clamp(min=2.0**-14)
        ours = torch.round((x - low) / step).clamp(0, largest) * step + low
        # A minimum that rounds to its other neighbour moves the whole group by 2**-10 of itself.
        allowed = torch.maximum(step, low.abs() * 2.0**-10)[..., 0]
        return self.counts.settle(ours, self.recorded[index, name], allowed)

    def _kv_hook(self, index: int, name: str):
        def fake_quantize(_, __, output):
            shape = self.recorded[index, name].shape
            return self._quantize_kv(output[0].view(shape), index, name).reshape(output.shape)

        return fake_quantize

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, recorded: dict, monkeypatch) -> torch.Tensor:
        """(tokens, vocab), going along with what the model under test recorded at each place."""
        self.recorded = recorded
        self.counts = Counts()
        cached = any(name == "k" for _, name in recorded)
        if self.recipe["kv_cache"]["keys"]["method"] == "post_rope" and cached:
            module = __import__(type(self.model).__module__, fromlist=["x"])
            embed, layers = module.apply_rotary_pos_emb, iter(range(100))
            rotated = self.recipe["kv_cache"]["keys"]["rotation"] != "none"

            def rotate_and_quantize(q, k, cos, sin):
                q, k = embed(q, k, cos, sin)
                layer = next(layers)
                offset = self.tensors.get(f"model.layers.{layer}.self_attn.k_offset")
                k = k if offset is None else k - offset[None, :, None]
                q, k = (rotate(q), rotate(k)) if rotated else (q, k)
                k = self._quantize_kv(k[0].transpose(0, 1), layer, "k")
                return q, k.transpose(0, 1)[None]

            monkeypatch.setattr(module, "apply_rotary_pos_emb", rotate_and_quantize)
        return self.model(tokens[None]).logits[0]


@torch.no_grad()
def run_and_record(loaded, tokens: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Logits (tokens, vocab) of a loaded model, and its quantized inputs, keys and values."""
    from quatom.modeling.context import full_sequences_context
    from quatom.quantize.statistics import observe

    context = full_sequences_context(1, len(tokens), 16, torch.device("cpu"))
    cache = loaded.model.allocate_kv_cache(context.block_tables.numel(), 16)
    recorded: dict[tuple[int, str], torch.Tensor] = {}
    from contextlib import ExitStack

    with ExitStack() as stack:
        for index, block in enumerate(loaded.model.blocks):

            def see(place, x, index=index):
                recorded[index, place] = x.float()

            stack.enter_context(observe(block, see))
        logits = loaded.model.compute_logits(loaded.model(tokens, context, cache))
    for index, pages in enumerate(cache):
        if pages.quantized:
            k, v = pages.gather(context.block_tables[0], len(tokens))
            recorded |= {(index, "k"): k.float(), (index, "v"): v.float()}
    return logits, recorded
