"""One QLoRA train step of a whole model, ferrolora against PEFT + bitsandbytes: time and peak memory."""
