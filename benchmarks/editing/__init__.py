"""Methods that edit facts, side by side: `npt.EditStore`, ROME, MEMIT, AlphaEdit, UltraEdit, fine-tuning, the context.

module       in -> out
closed_form  ROME, MEMIT, AlphaEdit and UltraEdit, on the solve, metric and keys of `npt.editing`
finetuning   FT-M and LocFT: gradient descent on one down projection
"""
