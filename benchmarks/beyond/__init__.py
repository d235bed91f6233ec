"""Memory beyond the context: facts that are read once, then asked for when the text that stated them is gone.

module    in -> out
facts     a seed and a number -> facts of invented people, each with a statement, a wording to learn and one to be asked in
arms      facts -> what each arm answers, what it costs, what it does to other text
tables    kept figures -> the table of docs/editing.md
"""
