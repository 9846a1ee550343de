"""The kernels of Householder Sylvester flows where there is no GPU: interpreted, and compiled for GPUs but not run."""

import os
import pathlib
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")


def test_kernels_equal_the_flow_in_the_interpreter() -> None:
    """In a process of its own: Triton asks for the interpreter when a kernel is defined."""
    file = pathlib.Path(__file__).with_name("in_triton_interpreter.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", str(file)]
    found = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert found.returncode == 0 and " passed" in found.stdout, found.stdout + found.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["_move_kernel", "_move_backward_kernel"])
def test_kernels_compile_for_a_gpu(name: str, capability: int) -> None:
    """At the paper's size, without running out of registers."""
    from triton.backends.compiler import GPUTarget

    from popgen.nn.flows import hsnf_kernels

    kernel = getattr(hsnf_kernels, name)
    numbers = ("programs", "batch", "flows", "latent", "reflections")
    blocks = {"latent_block": 64, "reflection_block": 8}
    signature = {
        argument: "i32" if argument in numbers else "fp32" if argument == "max_diagonal" else "*fp32"
        for argument in kernel.arg_names
    } | dict.fromkeys(blocks, "constexpr")
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=blocks)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": hsnf_kernels.NUM_WARPS})
    assert f".target sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]
