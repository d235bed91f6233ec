"""Methods that edit facts, side by side: `npt.EditStore`, ROME, MEMIT, AlphaEdit, UltraEdit, fine-tuning, the context.

module       in -> out
records      a file of CounterFact's or zsRE's format -> facts, their paraphrases and neighbours
methods      what a method of editing is: `write_many`, a model to call, `undo`; EditStore and the context as such
closed_form  ROME, MEMIT, AlphaEdit and UltraEdit, on the solve, metric and keys of `npt.editing`
finetuning   FT-M and LocFT: gradient descent on one down projection
figures      a method and records -> figures on generated text, with standard errors
"""
