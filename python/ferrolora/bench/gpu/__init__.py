"""The kernels on a GPU beside what the card allows and what bitsandbytes and PEFT need, in one process."""
