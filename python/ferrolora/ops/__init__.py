"""The operators `torch.ops.ferrolora.*`: importing this package registers them.

One operator a file: schema, fake kernel, CPU kernel (a call into `ferrolora._native`), autograd where it has a
gradient, and the public function. `reference` is the slow, readable torch-only twin that the tests compare with;
nothing here ever falls back on it.
"""

from ferrolora.ops import (  # noqa: F401  (each import registers its operators)
    dequantize_4bit,
    double_quantize,
    int8,
    linear_base,
    linear_group,
    linear_lora,
    quantize_4bit,
    quantize_blockwise,
)
