"""How methods of editing are measured: facts of a file, written and asked, with standard errors.

module       in -> out
records      a file of CounterFact's or zsRE's format -> facts, their paraphrases and neighbours
methods      what a method of editing is: `write_many`, a model to call, `undo`; EditStore and the context as such
registry     a method's name and its options as text -> the method
asking       a model with edits -> the text that it writes, what it holds likely, its divergence from the base
extras       the same -> how varied its text is, what it learns from a prompt
figures      a method and records -> figures on generated text, with standard errors
rows         figures -> a table, and a file that keeps them
page         rows -> one HTML page

wording, world, small, factworld, worlds belong together: invented people, models that know them, edits measured on those.
continuing   many prompts -> the text behind each, in batches
muon         the optimizer of the small models
worlds       figures of FactWorld -> a table, and a file that keeps them
"""
