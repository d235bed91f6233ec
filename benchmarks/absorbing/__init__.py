"""Absorbing a context beside gradient context distillation, the context itself and nothing: python -m benchmarks.absorbing

module    in -> out
cases     documents.jsonl and prompts.jsonl -> contexts with held-out questions, checked
exam      held-out questions -> KL to the model with the context, texts, general text, of what is at work
arms      a context -> the record of all arms
choice    records of the development contexts -> the gradient's rate and steps; means with standard errors
tables    kept records -> the table and the plot of docs/editing.md
"""
