"""Weights as one backend multiplies them, and what they demand of their input."""

from dataclasses import dataclass, replace

from torch import Tensor

from quatom.errors import ShapeError
from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import ByteLayout, MixedTensor, QuantizeSpec
from quatom.ops.backend import Backend

_BYTE_LAYOUTS: dict[Backend, ByteLayout] = {Backend.CPU: "padded", Backend.CUDA: "groups"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedWeights:
    """Weights in the layout of one backend: of a linear layer, or of a layer's experts."""

    backend: Backend
    layout: GroupLayout
    out_channels: int
    """N."""
    weight_format: str
    activation_format: str
    tensors: tuple[Tensor, ...]
    """Weights, and where the backend keeps them apart outliers and scales, in its own layout."""
    bias: Tensor | None  # (N,) float32; of experts (E, N)

    @property
    def byte_layout(self) -> ByteLayout:
        """The layout of activations that this backend reads."""
        return _BYTE_LAYOUTS.get(self.backend, "rows")

    def input_spec(self, spec: QuantizeSpec) -> QuantizeSpec:
        """`spec` with the byte layout that these weights read."""
        return replace(spec, byte_layout=self.byte_layout)

    def check_input(self, x: MixedTensor | Tensor) -> None:
        """Refuse an input that these weights cannot multiply.

        Raises:
            ShapeError: x has other channels, another format or another byte layout.
        """
        if x.shape[-1] != self.layout.channels or len(x.shape) != 2:
            raise ShapeError(
                f"expected x (T, {self.layout.channels}) as the weights; got {tuple(x.shape)}"
            )
        if isinstance(x, MixedTensor):
            if x.spec.layout != self.layout or x.spec.byte_layout != self.byte_layout:
                raise ShapeError(
                    f"x is quantized as {x.spec.layout}, bytes {x.spec.byte_layout!r}, and the "
                    f"weights expect {self.layout}, bytes {self.byte_layout!r}: quantize with "
                    "prepared.input_spec(spec)"
                )
            if x.spec.normal != self.activation_format:
                raise ShapeError(
                    f"x is {x.spec.normal}, the weights are prepared for activations in "
                    f"{self.activation_format}"
                )
        elif self.activation_format != "float16":
            raise ShapeError(
                f"x is a plain tensor, the weights are prepared for activations in "
                f"{self.activation_format}: quantize x first"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedLinear(PreparedWeights):
    """Weights of one linear layer."""
