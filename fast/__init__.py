"""The model of longllama.py, faster and with other kinds of memory, plugged in where it says that it can be.

| file | what it gains |
| --- | --- |
| model.py | `FastLlama`, which has all of it, and `FastConfig`, which checks every value |
| linear.py | products with weights, by the fastest of torch's ways on this processor |
| quantised.py | weights in 8 and 4 bits |
| attention.py | the fastest kernel for a set of keys, with padding and grouped queries; search of the K best |
| storage.py | keys and values padded for kernels, cast in pieces, as float8, streamed from main memory |
| memory.py | a memory that grows in place |
| context.py | a local context that grows in place |
| steps.py | compiled layers, and steps of one token as a CUDA graph |
| sampling.py | a penalty for ids that were there |
| saved.py | a memory in a file |
| files.py | finding and writing files of tensors |
| tuned.py | memory layers that were tuned, in a small file to lay over their base |
| folder.py | what a folder is that holds no model; one model in the place of another, as a whole |
"""

from fast.context import FastContext
from fast.memory import FastMemory
from fast.model import MEM_DTYPES, FastConfig, FastLlama
from fast.saved import load_memory, save_memory

__all__ = ["MEM_DTYPES", "FastConfig", "FastContext", "FastLlama", "FastMemory", "load_memory", "save_memory"]
