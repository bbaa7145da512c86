"""The least time that a GPU needs for decode steps and prompts.

Each phase takes its bytes over the bandwidth or its operations over a matrix rate, whichever is
larger, and phases follow one another. docs/lab/performance.md derives the formulas.

What is left out (launches, norms, activations read and written, gathering, sampling) is what a
perfect implementation would hide, so a share of this limit never reaches 100 %.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Self

from quatom.checkpoint.schema import bits_by_linear, bits_per_kv, bits_per_weight
from quatom.plan import ModelPlan

_HALF = 2  # bytes of a number that no recipe quantizes


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What one GPU can do at best, as measured or given."""

    copy_tb_s: float
    """Memory bandwidth, bytes read plus bytes written."""
    bf16_tflops: float
    """16-bit matrix rate."""
    low_bit_tflops: float
    """Matrix rate of operands of 8 bits or fewer. FP8's on Hopper, which multiplies INT4 codes
    exactly and has no INT4 units of its own."""

    @classmethod
    def from_environment(cls, measured: Mapping[str, Any]) -> Self:
        """From `measure_ceilings`; a GPU without FP8 multiplies INT8 twice as fast as BF16."""
        bf16 = measured["bf16_tflops"]
        return cls(measured["copy_tb_s"], bf16, measured.get("fp8_tflops", 2 * bf16))


@dataclass(frozen=True, slots=True)
class Queries:
    """New tokens of a sequence, `count` from position `first` on, and as many of others alike."""

    first: float
    count: float
    sequences: float = 1
    decoded: bool = False
    """Each in a step of its own, which reads what it sees from the cache; else all at once."""

    @property
    def tokens(self) -> float:
        """New tokens, all together."""
        return self.count * self.sequences

    def pairs(self, window: int | None) -> float:
        """(query, key) pairs that one head of a layer with this window scores."""
        growing = self.count  # queries that see all tokens before them
        if window is not None:
            growing = min(max(window - self.first, 0), self.count)
        pairs = growing * self.first + growing * (growing + 1) / 2
        return self.sequences * (pairs + (self.count - growing) * (window or 0))

    def cached_read(self, window: int | None) -> float:
        """Cached tokens that a layer with this window reads: all seen but the query's own."""
        return self.pairs(window) - self.tokens if self.decoded else 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """What a step, or a whole run, has to do."""

    steps: float
    """Times that every weight is read."""
    sampled: float
    """Rows through the output head."""
    queries: tuple[Queries, ...]
    """Tokens through the linears: decodes and prompts."""

    @property
    def tokens(self) -> float:
        """Tokens through the linears."""
        return sum(queries.tokens for queries in self.queries)

    @classmethod
    def decode(cls, batch: int, context: float) -> Self:
        """One token for each of `batch` sequences that have `context` cached ones."""
        return cls(1, batch, (Queries(context, 1, batch, decoded=True),))


@dataclass(frozen=True, slots=True)
class Roofline:
    """The limits of one model under one recipe on one GPU."""

    ceilings: Ceilings
    linear_weights: float
    """Weights of the decoder linears that a token goes through: of experts those of `top_k`."""
    linear_bytes: float
    """Bytes of all decoder linears as the recipe stores them, scales and outliers included."""
    linear_tflops: float
    """The matrix rate that their operands allow."""
    head_weights: int
    kv_bytes: float
    """Bytes of one cached token, all layers."""
    attention_flops: int
    """Operations of one (query, key) pair, all heads and layers: QK and PV."""
    windows: Mapping[int | None, float]
    """Sliding window, None for none -> the share of attention that layers with it have."""
    expert_bytes: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """Of `linear_bytes`, those of routed experts, by their number and how many a token goes to."""

    @classmethod
    def of(cls, resolved: ModelPlan, ceilings: Ceilings) -> Self:
        """The roofline of a model."""
        weights: float = resolved.num_weights
        config = resolved.config
        low_bit = all(site.input_spec is not None for site in resolved.sites())
        attentions = [layer.spec.attention for layer in resolved.layers]
        windows: dict[int | None, float] = {}
        for attention in attentions:
            windows[attention.window] = windows.get(attention.window, 0) + 1 / len(attentions)
        expert_bytes: dict[tuple[int, int], float] = {}
        bits = bits_by_linear(resolved)
        for layer in resolved.layers:
            for site in layer.sites.values():
                if site.experts is None:
                    continue
                assert layer.spec.experts is not None
                kind = (site.experts, layer.spec.experts.top_k)
                for linear in site.linears:
                    size = prod(linear.shape)
                    weights -= size * (1 - kind[1] / kind[0])
                    expert_bytes[kind] = expert_bytes.get(kind, 0) + size * bits[linear.name] / 8
        kv_numbers = 2 * sum(attention.kv_size for attention in attentions)
        return cls(
            ceilings=ceilings,
            linear_weights=weights,
            linear_bytes=resolved.num_weights * bits_per_weight(resolved) / 8,
            linear_tflops=ceilings.low_bit_tflops if low_bit else ceilings.bf16_tflops,
            head_weights=config.vocab_size * config.hidden_size,
            kv_bytes=kv_numbers * bits_per_kv(resolved) / 8,
            attention_flops=4 * sum(attention.q_size for attention in attentions),
            windows=windows,
            expert_bytes=expert_bytes,
        )

    def bytes_read(self, tokens: float) -> float:
        """Bytes of the decoder linears that a step of so many tokens reads.

        Of E experts, tokens that choose k each, evenly and independently, touch
        E (1 - (1 - k / E) ** tokens) on average.
        """
        untouched = sum(
            size * (1 - top_k / experts) ** tokens
            for (experts, top_k), size in self.expert_bytes.items()
        )
        return self.linear_bytes - untouched

    def seconds(self, work: Work) -> float:
        """Least time: linears, output head and attention, one after another."""
        return sum(self.phases(work).values())

    def phases(self, work: Work) -> dict[str, float]:
        """Least seconds of each phase: "linears", "head", "attention"."""
        bf16 = self.ceilings.bf16_tflops
        pairs = cached = 0.0  # of an average layer
        for window, share in self.windows.items():
            pairs += share * sum(queries.pairs(window) for queries in work.queries)
            cached += share * sum(queries.cached_read(window) for queries in work.queries)
        return {
            "linears": self._phase(
                work.steps * self.bytes_read(work.tokens / work.steps),
                2 * self.linear_weights * work.tokens,
                self.linear_tflops,
            ),
            "head": self._phase(
                work.steps * self.head_weights * _HALF, 2 * self.head_weights * work.sampled, bf16
            ),
            "attention": self._phase(
                (cached + work.tokens) * self.kv_bytes,  # every token is written once
                self.attention_flops * pairs,
                bf16,
            ),
        }

    def decode_step(self, batch: int, context: float) -> float:
        """Least seconds of one decode of `batch` sequences that have `context` cached tokens."""
        return self.seconds(Work.decode(batch, context))

    def run(self, lengths: list[tuple[int, int]], concurrent: float) -> float:
        """Least seconds for requests of (input, output) tokens, `concurrent` of them at a time.

        Prompts ride in the same steps as decodes, so weights are read once per step for both.
        """
        output = sum(length for _, length in lengths)
        decoded = output - len(lengths)  # the first token comes from the prompt's own step
        queries = [Queries(0, prompt) for prompt, _ in lengths]
        queries += [Queries(prompt, count - 1, decoded=True) for prompt, count in lengths]
        return self.seconds(Work(max(decoded / concurrent, 1.0), output, tuple(queries)))

    def _phase(self, num_bytes: float, operations: float, tflops: float) -> float:
        return max(num_bytes / (self.ceilings.copy_tb_s * 1e12), operations / (tflops * 1e12))
