"""What llama.cpp computes with an adapter that peftkit wrote, beside what torch computes with it; on a CPU.

`python -m benchmarks.llama_cpp` takes SmolLM2-135M, which `make demo MODEL=smollm2` unpacks into `.cache`; llama.cpp is that
of the package xllamacpp. The tests do the same to a small model.
"""
