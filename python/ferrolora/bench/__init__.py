"""Side-by-side measurements of the kernels and of a train step: ours, torch, bitsandbytes, PEFT.

All contenders of a row take turns in one process; a result is checked before it is timed. The command is
`ferrolora bench`.
"""
