"""One small configuration of each method of PEFT 0.21: those around a linear layer, and those beside it.

Not here: GLoRA takes nothing but plain `nn.Linear`; X-LoRA mixes LoRA adapters from files; Shadow replaces blocks.
"""

from collections.abc import Callable
from typing import Any

import peft
import torch

TWO: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}

# Methods with a wrapper around a linear layer. Widths of the tiny Llama: q_proj 32 -> 32, down_proj 48 -> 32.
LINEAR: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, **TWO),
    "rsLoRA": lambda: peft.LoraConfig(r=4, use_rslora=True, **TWO),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **TWO),
    "AdaLoRA": lambda: peft.AdaLoraConfig(total_step=10, **CAUSAL, **TWO),
    "AdaMSS": lambda: peft.AdamssConfig(r=8, num_subspaces=2, **TWO),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=8, **TWO),
    "C3A": lambda: peft.C3AConfig(block_size=8, **TWO),
    "DEFT": lambda: peft.DeftConfig(r=4, **TWO),
    "DeLoRA": lambda: peft.DeloraConfig(r=4, **TWO),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=16, **TWO),
    "FRoD": lambda: peft.FrodConfig(**TWO),
    "GraLoRA": lambda: peft.GraloraConfig(r=4, gralora_k=2, **TWO),
    "HiRA": lambda: peft.HiraConfig(r=4, **TWO),
    "HRA": lambda: peft.HRAConfig(r=4, **TWO),
    "IA3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **TWO),
    "Lily": lambda: peft.LilyConfig(r=4, stride_A=1, num_B=2, **TWO),
    "LoHa": lambda: peft.LoHaConfig(r=4, **TWO),
    "LoKr": lambda: peft.LoKrConfig(r=4, **TWO),
    "MiSS": lambda: peft.MissConfig(r=4, **TWO),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=8, **TWO),
    "OSF": lambda: peft.OSFConfig(**TWO),
    "PEANuT": lambda: peft.PeanutConfig(r=4, **TWO),
    "Poly": lambda: peft.PolyConfig(r=4, n_tasks=2, n_skills=2, **CAUSAL, **TWO),
    "PSOFT": lambda: peft.PsoftConfig(r=4, **TWO),
    "PVeRA": lambda: peft.PveraConfig(r=4, target_modules=["q_proj"]),
    "RandLoRA": lambda: peft.RandLoraConfig(r=4, **TWO),
    "RoAd": lambda: peft.RoadConfig(group_size=8, **TWO),
    "SHiRA": lambda: peft.ShiraConfig(r=4, random_seed=0, **TWO),
    "SuperTuning": lambda: peft.SupertuningConfig(**TWO),
    "TinyLoRA": lambda: peft.TinyLoraConfig(**TWO),
    "UniLoRA": lambda: peft.UniLoraConfig(r=4, theta_d_length=64, **TWO),
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=4, num_vectors=8, vector_length=8, **TWO),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=16, **TWO),
    "BEFT": lambda: peft.BeftConfig(**TWO),
}

# What a method's forward pass needs besides token ids.
INPUTS: dict[str, dict[str, Any]] = {name: {"task_ids": torch.tensor([0, 1])} for name in ("Poly", "multitask prompt")}

# Methods that leave the linear layers alone.
BESIDE: dict[str, Callable[[], peft.PeftConfig]] = {
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, **CAUSAL),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "P-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **CAUSAL),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "multitask prompt": lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, **CAUSAL),
    "CPT": lambda: peft.CPTConfig(
        cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4], **CAUSAL
    ),
    "cartridge": lambda: peft.CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=1, **CAUSAL),
}
