"""Contexts absorbed by weights: without the context, the model answers as it does with it in front. They are trained by
gradient, or found in closed form.

module       in -> out
settings     options of a person -> options and a setting, checked
dialogue     a context and a question -> token ids with the context and without it, through the chat template or as text
answers      many prompts -> the text that a model writes behind each
questions    a context -> questions that the model writes itself, in several wordings
teaching     a context -> conversations: to solve for, to choose the setting by, to report
stream       rows of tokens -> what each block reads and gives, one block after the other
formula      inputs, what outputs lack, text -> the weight delta of a block, in two factors (pure tensors)
patches      weight deltas of several blocks -> hooks on their projections, on or off
lesson       conversations and a setting -> weight deltas; how far apart two models are
gradient     weight deltas, or none yet -> weight deltas trained by gradient
general      text of the base -> what must not be disturbed, and by how much it was
choice       held-out questions and a limit on general text -> blocks, mu and lambda
absorbed     one context: what was asked, how it was solved for, what came out
contexts     the ledger of a store, solved for together
whole        previews and divergences by whole passes
files        the ledger -> JSON and tensors and back
"""
