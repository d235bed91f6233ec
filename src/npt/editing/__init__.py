"""Phase 3: permanent weight deltas on one `down` projection, written, proved, undone and shipped as a LoRA.

module       in -> out
requests     a prompt, a target and what belongs to them, checked -> Request
statistics   texts -> second moments of the projection's input
solve        keys, values and a metric -> the weight delta, in two factors (pure tensors)
keys         a tokenised prompt -> the subject's last token, and the projection's input there
values       keys and a target -> the output that has to be added (a table of strategies)
scan         block by block, the overlap of keys -> the block to edit
adapter      the factors -> a hook on the projection, on or off; the base's weights are never written to
replay       one forward, run again from a block on
store        `EditStore`, which joins all of these
folder       a store -> files and back
export       the factors -> a PEFT LoRA, a GGUF LoRA
"""
