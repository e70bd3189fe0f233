"""NVIDIA GPUs: compiling the kernels, launching them, and the memory they share. Importing it touches no GPU."""

from ferrolora.cuda.mode import exact as exact
from ferrolora.cuda.workspace import free_workspaces as free_workspaces
