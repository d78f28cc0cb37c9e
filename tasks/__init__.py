"""SeqIO tasks: importing a module of this folder registers what it names.

Registration reads no file; a task's text is read when it is prepared or evaluated.
"""
