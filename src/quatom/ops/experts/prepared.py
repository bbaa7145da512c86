"""Weights of all experts of a layer, as one backend multiplies them."""

from dataclasses import dataclass

from quatom.ops.linear.prepared import PreparedLinear, PreparedWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedExperts(PreparedWeights):
    """Weights of all experts of a layer.

    `tensors` are those of a linear layer with a leading dimension E; of the backends that take one
    expert after another, those of expert 0, then those of expert 1, and so on.
    """

    num_experts: int
    """E."""

    def expert(self, index: int) -> PreparedLinear:
        """One expert as a linear layer, where the backend takes one after another."""
        count = len(self.tensors) // self.num_experts
        return PreparedLinear(
            backend=self.backend,
            layout=self.layout,
            out_channels=self.out_channels,
            weight_format=self.weight_format,
            activation_format=self.activation_format,
            tensors=self.tensors[index * count : (index + 1) * count],
            bias=None if self.bias is None else self.bias[index],
        )
