"""One benchmark an operation of `fastdit.ops`: `pytest benchmarks/kernels --benchmark-only`."""
