"""What a process knows about the checkpoint that it runs."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from vllm import __version__ as vllm_version
from vllm.logger import init_logger

from quatom.checkpoint.reader import read_model_config
from quatom.errors import ModelError
from quatom.modeling.rotary import RotaryTables
from quatom.numerics.rotary import head_order
from quatom.plan import LayerPlan, ModelPlan, SitePlan, plan
from quatom.recipe import Recipe

logger = init_logger("vllm.quatom")

_DENSE = """
    arcee cohere cwm ernie4_5 exaone4 gemma gemma2 gemma3 glm glm4 granite helium hyperclovax jais2
    llama ministral ministral3 mistral nemotron olmo2 olmo3 opt phi phi3 qwen2 qwen3 seed_oss
    smollm3 stablelm starcoder2 vaultgemma
"""
DENSE_FAMILIES = frozenset(_DENSE.split())
"""Families without experts that tests ran in vLLM. It might compute others otherwise."""
EXPERT_MODULES = {
    "mixtral": "block_sparse_moe",
    "qwen2_moe": "mlp",
    "qwen3_moe": "mlp",
    "olmoe": "mlp",
    "granitemoe": "block_sparse_moe",
    "glm4_moe": "mlp",
}
"""Families with routed experts that run, and what vLLM's model calls a layer of them.

Not phimoe: vLLM's model leaves out the bias of the head. Not gpt_oss: attention with sinks.
"""
_OWN_LOADERS = {("granitemoe", "0.26.0")}
"""Families whose model in a version of vLLM loads experts under no other names than its own."""


@dataclass(slots=True)
class CheckpointState:
    """A recipe, and the plan that it makes of a model."""

    recipe: Recipe
    resolved: ModelPlan | None = None
    rotary: RotaryTables | None = None
    """Tables for caches that hold K before rotary embedding, once weights are loaded."""
    compiled: set[Hashable] = field(default_factory=set)
    """Kinds of linears whose kernels have run."""
    kernels: set[str] = field(default_factory=set)
    """Backends that the log has named."""

    @property
    def plan(self) -> ModelPlan:
        """The recipe resolved for the model.

        Raises:
            ModelError: `resolve` was not called.
        """
        if self.resolved is None:
            raise ModelError("vLLM did not say which folder the checkpoint is in")
        return self.resolved

    def resolve(self, folder: str) -> None:
        """Read the model's config.json.

        Raises:
            ModelError: the model is not supported, is of none of `DENSE_FAMILIES`, has routed
                experts of another family than `EXPERT_MODULES` or in floating point, or of one that
                this vLLM does not load, or vLLM's model normalizes q and k whose channels the
                checkpoint holds in another order, or each head by a norm of its own, or computes
                other layers; or the recipe rotates outputs.
            RecipeError: the recipe does not fit the model's sizes.
        """
        config, _recipe = read_model_config(folder)
        self.resolved = plan(config, self.recipe)
        release = vllm_version.partition("+")[0]
        if (config.family, release) in _OWN_LOADERS:
            raise ModelError(
                f"{folder} is a {config.family}, whose experts vLLM {release} reads from none but "
                "its original files: install a newer vLLM, or use quatom serve"
            )
        if self.recipe.incoherence is not None:
            raise ModelError(
                f"{folder} has a recipe with incoherence, whose rotations of inputs and outputs "
                "the plugin does not run: use quatom serve"
            )
        dense = all(layer.spec.experts is None for layer in self.resolved.layers)
        if dense and config.family not in DENSE_FAMILIES | EXPERT_MODULES.keys():
            raise ModelError(
                f"{folder} is a {config.family}, which the plugin was not tried with: use quatom "
                "serve"
            )
        for layer in self.resolved.layers:
            runs = config.family in EXPERT_MODULES and self.recipe.quantizes_weights
            if layer.spec.experts is not None and not runs:
                raise ModelError(
                    f"{folder} is a {config.family} with recipe {self.recipe.name}: the plugin "
                    f"runs routed experts of {', '.join(EXPERT_MODULES)} with quantized weights; "
                    "use quatom serve"
                )
            if layer.spec.parallel and config.family == "stablelm":
                raise ModelError(
                    f"{folder} has attention beside the feed-forward layer, which vLLM's model of "
                    "StableLM does not compute: use quatom serve"
                )
            attention = layer.spec.attention
            if attention.qk_norm is not None and attention.qk_norm_axis == "each":
                raise ModelError(
                    f"{folder} has a norm for each head of q and k, which the plugin was not tried "
                    "with: use quatom serve"
                )
            moved = head_order(attention.rope, attention.head_dim) is not None
            if moved and attention.qk_norm is not None:
                raise ModelError(
                    f"{folder} normalizes q and k whose channels Quatom stores in another order "
                    "than vLLM's model: run it with Quatom's own engine"
                )

    def layer_of(self, prefix: str) -> LayerPlan:
        """The layer that a module of this name is in.

        Raises:
            ModelError: there is none.
        """
        for layer in self.plan.layers:
            if prefix.startswith(layer.prefix):
                return layer
        raise ModelError(f"vLLM's model has {prefix}, which is in no layer of the checkpoint")

    def check_window(self, prefix: str, window: int | None) -> None:
        """Refuse attention over another number of tokens than the checkpoint's.

        Args:
            prefix: The module's name.
            window: The most tokens that vLLM's model attends to; None: all.

        Raises:
            ModelError: the numbers differ.
        """
        own, length = self.layer_of(prefix).spec.attention.window, self.plan.config.max_position
        if min(own or length, length) != min(window or length, length):
            raise ModelError(
                f"{prefix} attends to {own or 'all'} tokens, in vLLM's model to {window or 'all'}: "
                "use quatom serve"
            )

    def is_router(self, prefix: str) -> bool:
        """Whether a linear computes the scores of experts."""
        names = [name for name, _ in self.layer_of(prefix).router_tensors().values()]
        return f"{prefix}.weight" in names

    def site_of(self, prefix: str, parts: Sequence[str]) -> tuple[LayerPlan, SitePlan]:
        """The layer and site of a linear.

        Args:
            prefix: Its name in vLLM's model.
            parts: Last parts of the names of the linears that it was fused of.

        Raises:
            ModelError: these linears are no site of the checkpoint.
        """
        layer = self.layer_of(prefix)
        parent = prefix.rpartition(".")[0]
        wanted = [{f"{parent}.{part}" for part in parts}, {prefix}]
        for site in layer.sites.values():
            if {linear.name for linear in site.linears} in wanted:
                return layer, site
        sites = "; ".join(" ".join(lin.kind for lin in s.linears) for s in layer.sites.values())
        raise ModelError(
            f"vLLM's {prefix} joins {' '.join(parts)}, the checkpoint's linears that share an "
            f"input are: {sites}"
        )

    def note_kernel(self, backend: str) -> None:
        """Say once which kernels run the recipe."""
        if backend not in self.kernels:
            self.kernels.add(backend)
            logger.info(
                "Quatom: recipe %s, linears on backend %s, KV cache %s",
                self.recipe.name,
                backend,
                self.recipe.kv_cache.format,
            )
