"""The command line: words come in, one function of a lower room is called, what it gives back is printed.

A file per room it speaks with; nothing heavy is imported before a command runs, so that `surgery --help` responds at
once.
"""
