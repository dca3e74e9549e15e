"""Compile flex attention's CUDA kernels without a GPU: does each fit into a card's shared memory?

    python -m benchmarks.offline_kernels
    python -m benchmarks.offline_kernels --archs sm_90 --cases qwen3 phi

Needs the CUDA wheels of torch and triton, which bring the compiler (about 5 GB, Linux: `pip install
torch` from PyPI); no driver and no card. About 20 s a case. Prints a markdown table of bytes of
shared memory, forward / backward, and marks what a card does not have; there the backend computes
attention segment by segment.

The graphs are those of training: `flex.fused` on a row of four blocks with a shared prefix, traced
on the CPU, since autograd does not run on a pretended card. Their tensors are then moved to one
that torch is told of (`Pretended`), inductor generates the Triton kernels, and Triton and ptxas
compile them for the card's architecture. Nothing runs. Plain causal models in bfloat16 take torch's
own flash attention instead, which is compiled already.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import types
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

CARDS = {
    # shared memory a block can have in bytes, multiprocessors, and a card that has them
    "sm_80": (166_912, 108, "A100"),
    "sm_86": (101_376, 84, "A10, RTX 3090"),
    "sm_89": (101_376, 128, "L4, RTX 4090"),
    "sm_90": (232_448, 132, "H100, H200"),
    "sm_120": (101_376, 170, "RTX 5090"),
}
BF16, FP32 = torch.bfloat16, torch.float32
CASES: dict[str, tuple[int, int, int, torch.dtype, int | None, float | None]] = {
    # heads, key heads, head_dim, precision, window, soft cap
    "head_dim 16": (4, 2, 16, BF16, None, None),
    "head_dim 16, float32": (4, 2, 16, FP32, None, None),
    "llama 1B": (32, 8, 64, BF16, None, None),
    "qwen2.5 0.5B (7 heads a key head)": (14, 2, 64, BF16, None, None),
    "phi": (32, 32, 96, BF16, None, None),
    "qwen3": (16, 8, 128, BF16, None, None),
    "qwen3, float32": (16, 8, 128, FP32, None, None),
    "mistral (window)": (32, 8, 128, BF16, 4096, None),
    "128, window and soft cap": (8, 4, 128, BF16, 4096, 50.0),
    "gemma2 (256, soft cap)": (8, 4, 256, BF16, None, 50.0),
    "gemma2 (256, window and soft cap)": (8, 4, 256, BF16, 4096, 50.0),
    "gemma3 (256, window)": (8, 4, 256, BF16, 512, None),
}
HELP = "pip install --force-reinstall torch --index-url https://pypi.org/simple (Linux, 5 GB)"


# ---- a card that is not there --------------------------------------------------------------------


class Pretended:
    """Make torch, inductor and Triton believe in a card of one architecture, to compile for it."""

    def __init__(self, arch: str) -> None:
        self.capability = divmod(int(arch.removeprefix("sm_")), 10)
        self.shared, self.processors, _ = CARDS[arch]
        self.compiling = False
        """torch.cuda.is_available(): only while inductor compiles, or autograd would look."""

    def install(self) -> None:
        """Change modules of this process for good; a process compiles for one architecture."""
        import torch._dynamo.device_interface as interface
        import torch._inductor.config as inductor
        import torch._inductor.runtime.triton_helpers as helpers
        import torch._inductor.scheduler as scheduler
        import torch._inductor.utils as utils
        import torch._subclasses.fake_tensor as fake
        import torch.utils._triton as found
        from triton.runtime import driver

        answers: dict[str, Any] = {
            "is_available": lambda: self.compiling,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_properties": lambda *_: self.properties(),
            "get_device_capability": lambda *_: self.capability,
            "is_bf16_supported": lambda *_, **__: True,
            "synchronize": lambda *_: None,
            "_lazy_init": lambda: None,
        }
        for name, answer in answers.items():
            setattr(torch.cuda, name, answer)
        for name in ("get_device_properties", "current_device", "device_count"):
            setattr(interface.CudaInterface, name, staticmethod(answers[name]))
        for guard in (torch.cuda.device, torch.cuda._DeviceGuard):
            guard.__enter__ = lambda _: None
            guard.__exit__ = lambda *_: False
        for module in (torch.cuda, torch.cuda.random):
            module.get_rng_state = lambda *_, **__: torch.empty(0, dtype=torch.uint8)
            module.set_rng_state = lambda *_, **__: None
        for module in (found, scheduler, utils):
            for name in {"has_triton", "has_triton_package"} & set(dir(module)):
                setattr(module, name, lambda *_: True)
        fake.init_gpu_context = lambda *_: None
        helpers.set_driver_to_gpu = lambda: None
        driver.set_active(self.driver())
        inductor.compile_threads, inductor.fx_graph_cache = 1, False

    def properties(self) -> Any:
        return types.SimpleNamespace(
            name="pretended",
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=self.processors,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=1536 if self.shared < 150_000 else 2048,
            max_threads_per_block=1024,
            warp_size=32,
            total_memory=24 << 30,
            shared_memory_per_block=49152,
            shared_memory_per_block_optin=self.shared,
            shared_memory_per_multiprocessor=self.shared + 1024,
            L2_cache_size=50 << 20,
            gcnArchName="",
            is_integrated=0,
        )

    def target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability[0] * 10 + self.capability[1], 32)

    def driver(self) -> Any:
        limits = {
            "max_shared_mem": self.shared,
            "multiprocessor_count": self.processors,
            "warpSize": 32,
            "max_num_regs": 65536,
        }
        return types.SimpleNamespace(
            get_current_target=self.target,
            get_current_device=lambda: 0,
            set_current_device=lambda _: None,
            get_active_torch_device=lambda: torch.device("cuda", 0),
            get_device_interface=lambda: torch.cuda,
            utils=types.SimpleNamespace(get_device_properties=lambda _: limits),
            launcher_cls=None,
        )


# ---- compiling -----------------------------------------------------------------------------------


def move(graph: Any, inputs: list[Any]) -> list[Any]:
    """Give a graph traced on the CPU, and its subgraphs, inputs and values on the card."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    from torch.utils._pytree import tree_map_only

    fake = next(x.fake_mode for x in inputs if isinstance(x, torch.Tensor))
    card = torch.device("cuda", 0)

    def moved(x: Any) -> Any:
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=card)

    with fake:
        values = tree_map_only(torch.Tensor, moved, inputs)
        for module in graph.modules():
            if not isinstance(module, torch.fx.GraphModule):
                continue
            for node in module.graph.nodes:
                if node.kwargs.get("device") is not None:
                    node.kwargs = {**node.kwargs, "device": card}
                if module is not graph and "val" in node.meta:
                    node.meta["val"] = tree_map_only(torch.Tensor, moved, node.meta["val"])
            module.recompile()
    FakeTensorProp(graph, mode=fake).propagate_dont_convert_inputs(*values)
    return values


def compile_case(card: Pretended, case: str) -> dict[str, Any]:
    """Compile one case's kernels for a card.

    Returns:
        "forward" and "backward": most bytes of shared memory of a kernel, or an error's first line.
    """
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    found: dict[str, Any] = {}

    def compiler(direction: str) -> Any:
        def run(graph: Any, inputs: list[Any]) -> Any:
            on_card = copy.deepcopy(graph)
            found[direction] = sizes = Sizes(card)
            card.compiling = True
            try:
                with sizes:
                    values = move(on_card, inputs)
                    compile_fx_inner(on_card, values, is_backward=direction == "backward")
            except Exception as error:
                found[direction] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            else:
                found[direction] = max(sizes.bytes)
            finally:
                card.compiling = False
            return make_boxed_func(graph.forward)

        return run

    backend = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        inference_compiler=compiler("forward"),
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    attend(backend, *CASES[case])
    return found


class Sizes:
    """Inside, kernels are compiled and not loaded, and their shared memory, in bytes, recorded."""

    def __init__(self, card: Pretended) -> None:
        self.card, self.bytes = card, [0]

    def __enter__(self) -> None:
        import triton
        from torch._inductor.runtime import triton_heuristics as heuristics

        own = heuristics.CachingAutotuner.precompile
        self.restore = lambda: setattr(heuristics.CachingAutotuner, "precompile", own)

        def precompile(tuner: Any, *_: Any, **__: Any) -> None:
            for config in tuner.configs:
                meta = tuner._create_compile_meta(config)
                constants, attributes = meta["constants"], meta["configs"][0]
                source = heuristics.ASTSource(tuner.fn, meta["signature"], constants, attributes)
                options = tuner._create_compile_options(config, meta)
                made = triton.compile(source, target=self.card.target(), options=options)
                self.bytes.append(made.metadata.shared)

        heuristics.CachingAutotuner.precompile = precompile

    def __exit__(self, *_: object) -> None:
        self.restore()


def attend(
    backend: Any, heads: int, kv_heads: int, width: int, dtype: Any, window: Any, cap: Any
) -> None:
    """Run flex attention forward and backward on a row of four blocks with a shared prefix."""
    from cookbook_core.backend.local.scoring import flex, packing

    import torch.nn.attention.flex_attention as torch_flex

    torch_flex._validate_device = lambda *_: None  # of the CPU, on which it is traced
    layout = packing.lay_out([[1] * 200 + [2 + n] * (130 + n) for n in range(2)])
    q, k, v = (
        torch.zeros(n, len(layout.tokens), width, dtype=dtype, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    torch._dynamo.reset()
    run = flex.compile_fused(backend=backend)
    flex.attend(q, k, v, width**-0.5, layout, window, cap, run=run).float().sum().backward()


# ---- the table -----------------------------------------------------------------------------------


def measure(arch: str, cases: list[str]) -> None:
    """Compile cases for one architecture; print a JSON line for each."""
    card = Pretended(arch)
    card.install()
    for case in cases:
        try:
            found = compile_case(card, case)
        except Exception as error:
            found = {"forward": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        print(json.dumps({"arch": arch, "case": case, **found}), flush=True)


def cell(arch: str, found: dict[str, Any]) -> str:
    """ "66,048 / 57,344"; too much is bold; an error's first words stand for a number."""
    words = []
    for direction in ("forward", "backward"):
        size = found.get(direction, "not compiled")
        text = f"{size:,}" if isinstance(size, int) else str(size)[:60]
        fits = isinstance(size, int) and size <= CARDS[arch][0]
        words.append(text if fits else f"**{text}**")
    return " / ".join(words)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archs", nargs="+", choices=list(CARDS), default=list(CARDS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if torch.version.cuda is None or find_spec("triton") is None:
        print(f"torch {torch.__version__}, without CUDA or Triton: {HELP}", file=sys.stderr)
        return 2
    if options.worker:
        measure(options.archs[0], options.cases)
        return 0
    table: dict[str, dict[str, str]] = {case: {} for case in options.cases}
    for arch in options.archs:
        command = [sys.executable, "-m", "benchmarks.offline_kernels", "--worker"]
        command += ["--archs", arch, "--cases", *options.cases]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                found = json.loads(line)
                table[found["case"]][arch] = cell(arch, found)
                print(line, end="", file=sys.stderr, flush=True)
    versions = f"torch {torch.__version__}, triton {version('triton')}"
    print(f"\nBytes of shared memory, forward / backward; bold: too much. {versions}.\n")
    print("| |", " | ".join(f"{arch} ({CARDS[arch][2]})" for arch in options.archs), "|")
    print("|---" * (len(options.archs) + 1) + "|")
    print("| limit |", " | ".join(f"{CARDS[arch][0]:,}" for arch in options.archs), "|")
    for case, cells in table.items():
        print(f"| {case} |", " | ".join(cells.get(arch, "-") for arch in options.archs), "|")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
