"""
What the commands do. Each is two modules: `convert.py` has what is typed, and imports what `run_convert.py` needs only
once that is read, so that `--help` is quick.
"""
