"""Phase 3: permanent weight deltas on `down` projections, written, proved, undone and shipped as a LoRA.

module       in -> out
requests     a prompt, a target and what belongs to them -> Request, checked
keys         a tokenised prompt -> the subject's last token
statistics   texts -> second moments of the projection's input
probes       statements about things, for the domain metric and for `scan`
metrics      text of the base, or given -> the moments behind a metric, kept or computed
scan         block by block, the overlap of keys -> the block to edit
solve        keys, values and a metric -> the weight delta, in two factors (pure tensors)
adapter      the factors -> a hook on the projection, on or off; the base's weights stay
replay       one forward, run again from a block on
bench        a model laid open at one block: its inputs, passes from there on, the text it writes
values       a key and a target -> the output that has to be added (a table of strategies)
writing      a request -> its keys and values, found on the base alone
measure      text before and after, divergence, the largest ridge at which all edits hold
joint        pairs of all facts -> how far keys give way and values are shortened
absorbing    a context -> weight deltas of several blocks (a package)
store        `EditStore`, which joins all of these
merging      two stores -> one
checks       arguments of `EditStore`, checked
export       the factors -> a PEFT LoRA, a GGUF LoRA
folder       a store -> files and back
"""
