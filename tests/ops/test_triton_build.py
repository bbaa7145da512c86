"""Triton kernels that the interpreter runs: a GPU's compiler must take them too.

The interpreter accepts what the compiler refuses: a return under a constexpr branch, say.
"""

import os
import subprocess
import sys

BUILD = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def build(kernel, types, *, arch=90, **constants):
    types = {name: kind for kind, names in types.items() for name in names.split()}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"launch_pdl": constants.get("launch_pdl", False)}
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
    if options["launch_pdl"]:  # before the wait nothing is read
        before, wait, after = ptx.partition("griddepcontrol.wait")
        assert wait and "griddepcontrol.launch_dependents" in before
        assert not any(load in before for load in ("ld.global", "cp.async"))
        assert "griddepcontrol" not in after
"""
QUANTIZE = """
from quatom.numerics.groups import GroupLayout
from quatom.ops.activations import QuantizeSpec
from quatom.ops.triton_quantize import quantize_options

spec = QuantizeSpec(layout=GroupLayout(224, 128, 64), rotate=True, byte_layout="groups")
numbers = "clip_ratio normal_largest outlier_largest"
options = {k: v for k, v in quantize_options(spec).items() if k not in numbers.split()}
"""
PAGES = "S=16, ROW=50, RECORD=16 * 108, ELEMENT_BYTES=1, BITS=4"  # int4 heads of 100 channels
KERNELS = {
    "gated": """
from quatom.ops.gated.triton import _gated_kernel as kernel
for activation in range(6):
    build(
        kernel,
        {"*bf16": "gate_up_ptr out_ptr", "i32": "row_stride"},
        CHANNELS=1500, ACTIVATION=activation, GATED=activation % 2 == 0, TILE=1024,
    )
""",
    "gated_quantize": QUANTIZE
    + """
from quatom.ops.gated_quantize.triton import _gated_quantize_kernel as kernel
build(
    kernel,
    {"*bf16": "gate_up_ptr", "*u8": "codes_ptr", "*fp32": "scales_ptr", "fp32": numbers,
     "i32": "row_stride tokens_padded"},
    ACTIVATION=1, GATED=False, SB=4, WIDTH=128, **options,
)
""",
    "norm": """
from quatom.ops.norm.triton import _norm_kernel as kernel
build(
    kernel,
    {"*bf16": "x_ptr residual_ptr weight_ptr bias_ptr total_ptr out_ptr", "fp32": "eps",
     "i32": "x_row_stride residual_row_stride"},
    K=576, LAYER=True, WEIGHT_OFFSET=1.0, ROUND_FIRST=False, HAS_BIAS=True, HAS_RESIDUAL=True,
    BLOCK_K=1024,
)
""",
    "norm_quantize": QUANTIZE
    + """
from quatom.ops.norm_quantize.triton import _norm_quantize_kernel as kernel
build(
    kernel,
    {"*bf16": "x_ptr residual_ptr weight_ptr bias_ptr total_ptr", "*i32": "order_ptr",
     "*u8": "codes_ptr", "*fp32": "scales_ptr", "fp32": numbers + " eps",
     "i32": "x_row_stride residual_row_stride tokens_padded"},
    LAYER=True, WEIGHT_OFFSET=1.0, HAS_BIAS=True, HAS_ORDER=True, HAS_RESIDUAL=True, BLOCK_K=512,
    SB=4, WIDTH=128, **options,
)
""",
    "head_norm": """
from quatom.ops.head_norm.triton import _head_norm_kernel as kernel
for together, each in ((False, False), (False, True), (True, False)):
    build(
        kernel,
        {"*bf16": "q_ptr k_ptr q_weight_ptr k_weight_ptr out_ptr", "fp32": "eps",
         "i32": "q_token_stride q_head_stride k_token_stride k_head_stride"},
        H=9, KV=3, D=100, ALL=together, EACH=each, ROWS=1 if together else 8,
        Q_PAD=1024 if together else 128, K_PAD=512 if together else 128,
        LAYER=together, WEIGHT_OFFSET=1.0, ROUND_FIRST=not together,
    )
""",
    "rope_append_kv": f"""
from quatom.ops.rope_append_kv.triton import _rope_append_kv_kernel as kernel
strides = [f"{{x}}_{{axis}}_stride" for x in "qkv" for axis in ("token", "head")]
build(
    kernel,
    {{"*bf16": "q_ptr k_ptr v_ptr rotated_ptr", "*fp32": "cos_ptr sin_ptr key_offset_ptr",
     "*i64": "positions_ptr slots_ptr", "*u8": "rows_ptr", "*fp16": "pairs_ptr",
     "fp32": "clip_ratio", "i32": " ".join(strides)}},
    H=4, KV=2, HALF=50, HALF_PAD=64, MIXED=2, LOG2_MIXED=1, {PAGES}, ROTATE_KEYS=True,
    HADAMARD=True, KEY_OFFSET=True, BLOCK_H=8, MIN_SCALE=2.0**-14,
)
""",
    "attention": f"""
from quatom.ops.attention.triton import _attention_kernel as kernel
build(
    kernel,
    {{"*bf16": "q_ptr out_ptr", "*fp32": "partial_ptr stats_ptr cos_ptr sin_ptr sinks_ptr",
     "*u8": "rows_ptr", "*fp16": "pairs_ptr", "*i32": "table_ptr starts_ptr lens_ptr",
     "i32": "table_stride splits q_stride window", "fp32": "score_scale softcap_log2e"}},
    H=4, KV=2, HALF=50, HALF_PAD=64, {PAGES}, SPLIT=True, SOFTCAP=True, WINDOW=True, SINKS=True,
    KEY_ROTARY=False, PTX=True, BLOCK_M=16, BLOCK_T=64, ALIGN=16,
)
""",
    "merge": """
from quatom.ops.attention.triton import _merge_kernel as kernel
build(
    kernel,
    {"*bf16": "out_ptr", "*fp32": "partial_ptr stats_ptr sinks_ptr", "i32": "splits"},
    H=4, SINKS=True, D=100, D_PAD=128, SPLITS_PAD=8,
)
""",
    "gather": f"""
from quatom.ops.attention.triton_gather import _gather_kernel as kernel
build(
    kernel,
    {{"*bf16": "k_ptr v_ptr", "*fp32": "cos_ptr sin_ptr", "*u8": "rows_ptr", "*fp16": "pairs_ptr",
     "*i32": "table_ptr starts_ptr lens_ptr", "i32": "table_stride"}},
    KV=2, HALF=50, HALF_PAD=64, {PAGES}, KEY_ROTARY=True, LAST=True, OUT=104, BLOCK_T=32,
)
""",
    "group_tokens": """
from quatom.ops.experts.triton_groups import _count_kernel, _place_kernel, _scan_kernel
count = {"*i32": "ids_ptr counts_ptr", "i32": "COUNT"}
build(_count_kernel, count, E=5, BINS=8, BLOCK=1024, launch_pdl=True)
build(_scan_kernel, {"*i32": "counts_ptr", "i32": "COUNT"}, BLOCK=4096, launch_pdl=True)
build(
    _place_kernel,
    {"*i32": "ids_ptr firsts_ptr slots_ptr offsets_ptr positions_ptr", "i32": "COUNT"},
    ONE_CHUNK=False, BLOCK=1024, launch_pdl=True,
)
""",
    "route": """
from quatom.ops.experts.triton_routing import _route_kernel as kernel
for sigmoid, normalized in ((True, True), (False, True), (False, False)):
    build(
        kernel,
        {"*fp32": "logits_ptr bias_ptr correction_ptr weights_ptr", "*i32": "ids_ptr", "i32": "T",
         "fp32": "SCALE"},
        SHARES=4 if sigmoid else 1, HAS_BIAS=sigmoid, E=60, K=6, SIGMOID=sigmoid,
        NORMALIZED=normalized, CORRECTED=sigmoid, TOKENS=8, BLOCK_E=64, BLOCK_K=8, launch_pdl=True,
    )
""",
    "products of the router": """
from quatom.ops.experts.triton_routing import _product_kernel as kernel
for parts in (1, 3):
    build(
        kernel,
        {"*bf16": "x_ptr weight_ptr", "*fp32": "logits_ptr", "i32": "T x_row_stride",
         "fp32": "STEP"},
        CHANNELS=1000, SHARE=256, PARTS=parts, E=60, TOKENS=16, BLOCK_C=128, BLOCK_E=64,
        launch_pdl=True,
    )
""",
    "combine": """
from quatom.ops.experts.triton_groups import _combine_kernel as kernel
build(
    kernel,
    {"*bf16": "y_ptr out_ptr", "*i32": "positions_ptr", "*fp32": "weights_ptr",
     "i32": "y_row_stride"},
    K=8, CHANNELS=2880, TILE=1024, launch_pdl=True,
)
""",
    "linear": """
from quatom.ops.linear.triton import _linear_kernel as kernel
for codes, packed in ((True, True), (True, False), (False, True)):
    for arch in (80, 90):
        build(
            kernel,
            {"*i8": codes * "x_ptr " + "w_ptr outlier_ptr", "*bf16": (not codes) * "x_ptr",
             "*fp32": "xs_ptr ws_ptr bias_ptr", "*fp16": "y_ptr",
             "i32": "T N x_row_stride w_row_stride"},
            arch=arch, NORMAL=224, GROUP_SIZE=128, OUTLIERS=64, OUTLIER_SIZE=64, NUM_SCALES=3,
            PACKED=packed, FLOATS=not codes, HAS_XS=True, HAS_BIAS=True, BM=16, BN=64, BK=128,
            SPLIT=3,
        )
""",
    "experts": """
from quatom.ops.experts.triton import _experts_kernel as kernel
sizes = dict(EXPERTS=5, OUTLIERS=64, OUTLIER_SIZE=64, NUM_SCALES=3, EXPERT_BLOCK=8, BM=16, BN=64)
for codes in (True, False):
    floats = not codes
    build(
        kernel,
        {"*i8": "outlier_ptr" + codes * " x_ptr w_ptr", "*i32": "slots_ptr offsets_ptr",
         "*fp32": "xs_ptr ws_ptr bias_ptr", "*bf16": "y_ptr" + floats * " x_ptr w_ptr",
         "i32": "N x_row_stride w_row_stride top_k"},
        GATHER=codes, NORMAL=224, GROUP_SIZE=128 if codes else 224, PACKED=codes,
        FLOATS=floats, HAS_XS=codes, HAS_WS=codes, HAS_BIAS=True, BK=128 if codes else 64,
        **(sizes if codes else sizes | {"OUTLIERS": 0}),
    )
""",
    "prefill": """
from quatom.ops.attention.triton_prefill import _prefill_kernel as kernel
for softcap in (True, False):
    build(
        kernel,
        {"*bf16": "q_ptr k_ptr v_ptr out_ptr", "*i32": "starts_q_ptr starts_k_ptr",
         "i32": "q_stride window", "fp32": "score_scale softcap_log2e", "*fp32": "sinks_ptr"},
        H=4, KV=2, D=100, D_PAD=128, SOFTCAP=softcap, WINDOW=True, SINKS=softcap, BLOCK_M=64,
        BLOCK_N=32,
    )
""",
}


def test_kernels_compile_for_a_gpu_without_one():
    """In one process: importing torch and Triton takes longer than most of the kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    parts = [f"{code}\nprint({name!r}, flush=True)" for name, code in KERNELS.items()]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD + "\n".join(parts)],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == list(KERNELS), done.stderr
