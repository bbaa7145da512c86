"""Throughput of vLLM on random weights, with Quatom's plugin or with vLLM's own FP8.

    python scripts/bench_vllm.py llama-3-8b --recipe quatom-w4a8kv4 --gpu-memory 72 --json FILE
    python scripts/bench_vllm.py llama-3-8b --recipe fp8 --gpu-memory 72 --json FILE
    quatom bench throughput --random-weights llama-3-8b --recipe quatom-w4a8kv4 ... --json FILE

The third measures Quatom's own engine; all three add to one file. Needs vLLM and a GPU, or with
`--tensor-parallel-size` several. With `--prepare` the first two compile what they will run and
stop, so that the run itself starts in less time; preparations may run beside each other.
"""

import argparse
import json
import os
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

# The engine runs in this process, which then can set its weights.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from quatom.benchmark.model_shapes import SHAPES
from quatom.benchmark.serving_results import add_entries, make_entry, read_entries
from quatom.benchmark.workloads import fixed_lengths, random_prompts
from quatom.presets import PRESETS

GIB = 2**30
ALL_REDUCES = ("all_reduce", "allreduce", "cross_device_reduce")
"""Parts of the names of kernels that add up over ranks: vLLM's own, and NCCL's."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--recipe", required=True, help="a preset of Quatom; fp8: without plugin")
    parser.add_argument("--gpu-memory", type=float, required=True, help="GiB per GPU in all")
    parser.add_argument("--num-prompts", type=int, default=512)
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument(
        "--disable-custom-all-reduce", action="store_true", help="NCCL adds up over ranks"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, help="fewer blocks, for trials")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--profile", type=Path, help="file for the kernels of prefill and decode")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--json", type=Path)
    target.add_argument("--prepare", action="store_true", help="fill vLLM's cache, measure nothing")
    return parser.parse_args()


def write_model(asked: argparse.Namespace) -> Path:
    """A folder that vLLM takes for a checkpoint without weights.

    Equal models have equal folders: vLLM's cache of compiled code depends on the name.
    """
    config = dict(SHAPES[asked.shape])
    config["torch_dtype"] = asked.dtype
    if asked.layers is not None:
        config["num_hidden_layers"] = asked.layers
    if asked.recipe != "fp8":
        recipe = PRESETS[asked.recipe].to_dict() | {"tensor_parallel": asked.tensor_parallel_size}
        config["quantization_config"] = {"quant_method": "quatom", "recipe": recipe}
    text = json.dumps(config)
    name = f"bench-vllm-{asked.shape}-{sha256(text.encode()).hexdigest()[:12]}"
    folder = Path(tempfile.gettempdir(), name)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text)
    return folder


def memory(asked: argparse.Namespace) -> dict[str, Any]:
    """What vLLM may take.

    vLLM does not count what is in use before it starts (the CUDA context, about half a GiB): that
    is taken off, so that everything stays within the budget. A preparation needs little, and
    measures nothing that other processes could change.
    """
    if asked.prepare:
        return {"gpu_memory_utilization": 0.01, "kv_cache_memory_bytes": 4 * GIB}
    free, total = torch.cuda.mem_get_info()
    budget = asked.gpu_memory * GIB - (total - free)
    return {"gpu_memory_utilization": min(budget / total, 0.98)}


def settings(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    found = memory(asked) | {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": asked.dtype,
        "max_model_len": asked.input_len + asked.output_len + 8,
        "max_num_seqs": min(asked.max_num_seqs, asked.num_prompts),
        "max_num_batched_tokens": asked.max_num_batched_tokens,
        "tensor_parallel_size": asked.tensor_parallel_size,
        "disable_custom_all_reduce": asked.disable_custom_all_reduce,
        "enable_prefix_caching": False,
        "enforce_eager": asked.enforce_eager,
        "disable_log_stats": True,
    }
    if asked.recipe == "fp8":
        found |= {"quantization": "fp8", "kv_cache_dtype": "fp8"}
    return found


def normalize(worker: Any) -> None:
    """Norms that keep the size of their input: dummy ones would make all activations tiny."""
    for name, parameter in worker.get_model().named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1.0)


def all_reduce(worker: Any) -> str | None:
    """What adds up over the ranks of this worker: vLLM's own kernel or NCCL."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return None
    own = getattr(group.device_communicator, "ca_comm", None)
    return "nccl" if own is None or own.disabled else "custom"


def generate(engine: Any, prompts: list[list[int]], count: int) -> int:
    """Tokens that were generated: `count` for each prompt, past any end."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = engine.generate(requests, sampling, use_tqdm=False)
    return sum(len(answer.outputs[0].token_ids) for answer in answers)


def begin_profile(worker: Any) -> None:
    """Record the kernels of this worker."""
    worker.quatom_profile = torch.profiler.profile()
    worker.quatom_profile.start()


def end_profile(worker: Any) -> tuple[str, float]:
    """A table of the kernels that took longest, and the share of time in all-reduces."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    worker.quatom_profile.stop()
    found = worker.quatom_profile.key_averages()
    times = {event.key: event.self_device_time_total for event in found}
    shared = sum(us for key, us in times.items() if any(n in key.lower() for n in ALL_REDUCES))
    return found.table("self_device_time_total", 30), shared / max(sum(times.values()), 1)


def profile(engine: Any, asked: argparse.Namespace) -> dict[str, float]:
    """Write the kernels of rank 0: in prefills alone, in full decode batches alone.

    Returns the share of time in all-reduces of both.
    """
    tables, shares, vocabulary = [], {}, int(SHAPES[asked.shape]["vocab_size"])
    workloads = {"prefill": (32, asked.input_len, 1), "decode": (asked.max_num_seqs, 16, 32)}
    for phase, (requests, length, count) in workloads.items():
        prompts = random_prompts(fixed_lengths(requests, length, count), vocabulary, seed=2)
        engine.collective_rpc(begin_profile)
        generate(engine, prompts, count)
        text, shares[phase] = engine.collective_rpc(end_profile)[0]
        tables.append(f"{phase}: {requests} requests of {length} + {count}\n{text}")
    asked.profile.write_text("\n".join(tables))
    return {phase: round(share, 4) for phase, share in shares.items()}


def start(asked: argparse.Namespace) -> Any:
    """An engine that has run prompts and decodes."""
    import vllm

    vocabulary = int(SHAPES[asked.shape]["vocab_size"])
    engine = vllm.LLM(**settings(write_model(asked), asked))
    engine.collective_rpc(normalize)
    warm_up = fixed_lengths(min(32, asked.num_prompts), asked.input_len, 1)
    generate(engine, random_prompts(warm_up, vocabulary, seed=1), 8)
    return engine


def measure(asked: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """One entry of the result file, and the engine that made it."""
    import vllm

    started = time.monotonic()
    engine = start(asked)
    startup = time.monotonic() - started
    workload = fixed_lengths(asked.num_prompts, asked.input_len, asked.output_len)
    prompts = random_prompts(workload, int(SHAPES[asked.shape]["vocab_size"]))
    started = time.monotonic()
    output = generate(engine, prompts, asked.output_len)
    seconds = time.monotonic() - started
    free, total = torch.cuda.mem_get_info()
    config = engine.llm_engine.vllm_config
    cache = config.cache_config
    entry = make_entry(
        mode="throughput",
        model=asked.shape if asked.layers is None else f"{asked.shape}, {asked.layers} layers",
        recipe=asked.recipe,
        gpu_memory_gb=asked.gpu_memory,
        **workload.describe(),
        engine="vllm" if asked.recipe == "fp8" else "vllm+quatom",
        vllm=vllm.__version__,
        tensor_parallel=asked.tensor_parallel_size,
        all_reduce=engine.collective_rpc(all_reduce)[0],
        output_tokens_per_s=round(output / seconds, 1),
        total_tokens_per_s=round((output + workload.input_tokens) / seconds, 1),
        seconds=round(seconds, 3),
        startup_seconds=round(startup, 1),
        gpu_memory_used_gb=round((total - free) / GIB, 2),
        kv_tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
        block_size=cache.block_size,
        kv_cache_dtype=cache.cache_dtype,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        cudagraph_mode=config.compilation_config.cudagraph_mode.name,
        dtype=asked.dtype,
    )
    return entry, engine


def main() -> None:
    """Measure, say it in a line, add it to the file."""
    asked = parse()
    if asked.prepare:
        start(asked)
        return
    read_entries(asked.json)  # no minutes of a GPU for a file that cannot be added to
    entry, engine = measure(asked)
    print(f"{entry['engine']} {entry['model']} {entry['recipe']}: ", end="")
    print(f"{entry['output_tokens_per_s']:.0f} output tokens/s", flush=True)
    program = ("python", "scripts/bench_vllm.py")
    add_entries(asked.json, [entry], None, program=program)
    if asked.profile is not None:
        entry["all_reduce_share"] = profile(engine, asked)
        add_entries(asked.json, [entry], None, program=program)


if __name__ == "__main__":
    main()
