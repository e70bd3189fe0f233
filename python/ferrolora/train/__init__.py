"""Training: data files, tokenization, the loop over the Transformers Trainer, memory figures and reports."""
