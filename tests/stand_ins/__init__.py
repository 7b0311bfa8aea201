"""Stand-ins for packages that only a machine with a GPU can have; they compute in plain torch, on the CPU too.

Transformer Engine (`te.py`): Megatron-Core's own wrappers (TELayerNormColumnParallelLinear, TEDotProductAttention, ...)
run over it as they are. What can be imported is what the recorded version of the real package offers
(`tests/contracts`), so that Megatron-Core takes the paths that it takes there; each call of what is implemented is
bound to the recorded signature, and an argument that the stand-in does not know how to honour must have its default.
Everything else can be named but not used. flash-attn (`flash.py`): its one function that is called.

They show that specs, arguments, names of parameters and parallelism are right. They show nothing about kernels.
"""
